from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from tests.analysis import synthetic
from tests.analysis.test_before_after import study

from specwise.cli.main import main
from specwise.domain import StudyData
from specwise.measurement.design import read_study_file
from specwise.measurement.store import StudyFolder


def stored(study: StudyData, path: Path) -> Path:
    """The study as a folder, as `specwise measure` would have left it."""
    folder = StudyFolder.create(path, study.design, study.provenance, "")
    for measured in study.trials:
        with folder.recording(measured.trial) as writer:
            for record in measured.records:
                writer.request(record)
            for part in measured.parts:
                writer.part(part)
            writer.complete()
    return path


def leave(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study, the same once more, one with less acceptance on json, and a very short one."""
    root = tmp_path_factory.mktemp("studies")
    made = {
        "before": stored(study("", seed=1), root / "before"),
        "same": stored(study("", seed=2), root / "same"),
        "short": stored(study("", seed=3, requests=3, repeats=1), root / "short"),
    }
    with pytest.MonkeyPatch.context() as patch:
        rates = synthetic.ACCEPTANCE["draft_model"] | {"json": 0.7}
        patch.setitem(synthetic.ACCEPTANCE, "draft_model", rates)
        made["worse"] = stored(study("", seed=4), root / "worse")
    return made


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [("same", 0, "NO HARM"), ("worse", 1, "ACCEPTANCE FELL"), ("short", 3, "CANNOT TELL YET")],
)
def test_the_exit_code_is_the_answer(
    folders: dict[str, Path], after: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave("compare", folders["before"], folders[after]) == code
    assert said in capsys.readouterr().out
    assert (folders[after] / "compare.html").exists()


def test_json_goes_to_stdout_and_the_page_where_it_is_asked_for(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    arguments = ("compare", folders["before"], folders["worse"], "--json", "--out", page)
    assert leave(*arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "fell"
    assert found["page"] == str(page)
    assert page.exists()


def test_studies_that_cannot_be_compared_are_bad_input(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = study("", seed=5, requests=4)
    segments = tuple(replace(s, temperature=0.3) for s in other.design.segments)
    path = stored(replace(other, design=replace(other.design, segments=segments)), tmp_path / "t")
    done = subprocess.run(
        [sys.executable, "-m", "specwise.cli.main", "compare", folders["before"], path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "temperature 0 before, 0.3 after" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 2), (("one",), 2), (("no/where", "no/where"), 3)]
)
def test_too_little_to_compare(
    arguments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave("compare", *arguments) == code
    assert "specwise: " in capsys.readouterr().err


def test_examples_differ_in_the_model_and_the_name_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {}
    for side in ("float", "int8", "int4"):
        leave("compare", "--example", side)
        text = capsys.readouterr().out
        (tmp_path / f"{side}.toml").write_text(text)
        read_study_file(tmp_path / f"{side}.toml")
        sides[side] = tomllib.loads(text)
    models = [sides[side]["serve"].pop("model") for side in sides]
    assert models == [f"bundled:target-unpadded{end}" for end in ("", "-int8", "-int4")]
    assert [sides[side].pop("name") for side in sides] == [f"quantise-{side}" for side in sides]
    assert sides["float"] == sides["int8"] == sides["int4"]
