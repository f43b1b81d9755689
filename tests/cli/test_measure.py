"""`specwise measure` with experiments, on servers of known truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fake_vllm import FakeVllm

from specwise.cli.main import main
from specwise.cli.measure import engine_version
from specwise.domain import Deployment
from specwise.measurement.design import parse_study
from specwise.measurement.store import read_study
from specwise.vllm.engine import embedded_version

STUDY = """
name = "fake"
[[arm]]
name = "baseline"
url = "{baseline}"
[[arm]]
name = "draft"
url = "{draft}"
speculation = {{ method = "draft_model", k = 2, draft = "d" }}
[[segment]]
name = "chat"
prompts = "prompts.jsonl"
temperature = 0.4
max_tokens = 6
[load]
concurrency = [1, 2, 4]
requests = 8
production = 2
repeats = 3
warmup = 1
timeout_s = 20
"""


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def study_file(folder: Path, baseline: str, draft: str) -> str:
    prompts = "\n".join(json.dumps({"prompt": f"say {i} words"}) for i in range(60))
    (folder / "prompts.jsonl").write_text(prompts)
    (folder / "study.toml").write_text(STUDY.format(baseline=baseline, draft=draft))
    return str(folder / "study.toml")


def test_a_clear_ladder_ends_early_and_counts_as_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "study")
    with (
        FakeVllm(step_s=lambda _: 0.008) as baseline,
        FakeVllm(step_s=lambda _: 0.035, conditional=(0.2, 0.2)) as draft,
    ):
        path = study_file(tmp_path, baseline.url, draft.url)
        assert run("measure", path, "--experiment", "ladder", "--out", folder) == 0
        out = capsys.readouterr().out
    assert "skipping c4" in out
    assert "The climb ended early, without c4: the answer is clear: draft is slower at c" in (
        " ".join(out.split())
    )
    study = read_study(Path(folder))
    assert {t.trial.load.value for t in study.trials} == {1, 2}
    assert set(study.skipped) == {t.trial_id for t in study.design.trials if t.load.value == 4}
    assert run("measure", "--resume", folder) == 0, "the servers are gone, and not asked"
    assert run("decide", folder) in (1, 3), "3 where the machine was too busy to send on time"
    decided = capsys.readouterr().out
    assert "did not have to be run" in decided
    assert "not complete" not in decided
    assert run("report", folder) == 0
    assert json.loads((tmp_path / "study" / "assessment.json").read_text())["experiment"][
        "skipped_trials"
    ]


def test_a_sweep_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    with FakeVllm() as baseline, FakeVllm(conditional=(0.8, 0.8)) as draft:
        path = study_file(tmp_path, baseline.url, draft.url)
        options = ("--experiment", "temperature", "--temperatures", "0, 0.9", "--json")
        assert run("measure", path, *options, "--out", str(folder)) == 0
        assert json.loads(capsys.readouterr().out)["complete"]
        sent = {body["temperature"] for body in draft.bodies}
    assert sent == {0.0, 0.4, 0.9}
    assert read_study(folder).design.experiment == "temperature"


@pytest.mark.parametrize("name", ["temperature", "ladder", "mixed"])
def test_each_experiment_prints_a_study_to_start_from(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", "--example", "--experiment", name) == 0
    assert parse_study(capsys.readouterr().out, name="example").experiment == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experiment", "temperature", "--temperatures", "hot"), "are not temperatures"),
        (("--experiment", "temperature", "--temperatures", "0,3"), "numbers from 0 to 2"),
        (("--temperatures", "0.5"), "the experiment is none"),
        (("--experiment", "mixed"), "needs two segments"),
    ],
)
def test_what_makes_no_experiment_is_one_clear_error(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_file(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:2")
    assert run("measure", path, *arguments, "--plan") == 2
    assert message in capsys.readouterr().err


def test_resuming_takes_no_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("measure", "--resume", str(tmp_path), "--experiment", "ladder") == 2
    assert "--resume goes on with one" in capsys.readouterr().err


def test_the_version_of_a_started_engine_is_known(tmp_path: Path) -> None:
    assert engine_version(Deployment("m")) == embedded_version()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.28.0\n")
    python.chmod(0o755)
    assert engine_version(Deployment("m", engine=str(python))) == "0.28.0"
