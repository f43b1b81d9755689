from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.analysis.test_extrapolation import scenario
from tests.cli.test_main import run

from specwise.domain import Loop, StudyData
from specwise.measurement.store import StudyFolder
from specwise.prediction.forecast import forecast_study

BASE = ("predict", "llama-3.1-70b", "--gpus", "4")


def test_the_example_of_the_help_with_its_page(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(
        *BASE, "--draft", "llama-3.1-8b", "--method", "ngram", "--gpu", "h100",
        "--concurrency", "1,8,32,128", "--tpot-ms", "30", "--out", "page.html", folder=tmp_path,
    )  # fmt: skip
    print(f"predict with its page: {time.monotonic() - began:.1f} s (the bar: 10 s, idle machine)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("PREDICTED")
    assert "stops paying" in done.stdout
    assert (tmp_path / "page.html").stat().st_size > 20_000


def test_json_of_an_open_loop_with_acceptance_given() -> None:
    done = run(
        *BASE, "--method", "eagle3", "-k", "2", "--rate", "1,4", "--production", "1",
        "--acceptance", "0.8,0.6", "--json",
    )  # fmt: skip
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["predicted"]
    [candidate] = found["candidates"]
    assert (candidate["k"], candidate["acceptance"]) == (2, [0.8, 0.6])
    assert candidate["acceptance_from"] == "given"
    assert {s["load"]["loop"] for s in found["serving"]} == {"open"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0.5"], "whole number"),
        (["--concurrency", "nan"], "not positive"),
        (["--concurrency", "many"], "not a list of numbers"),
        (["--rate", "inf"], "not positive"),
        (["--rate", "1", "--concurrency", "2"], "not both"),
        (["--production", "7"], "not among the loads"),
        (["--acceptance", "1.2"], "not a list of probabilities"),
        (["--acceptance", "nan"], "not a list of probabilities"),
        (["--method", "draft_model"], "--draft"),
        (["--method", "magic"], "Invalid value"),
        (["-k", "0"], "Invalid value"),
        (["--gpu", "abacus"], "No accelerator"),
        (["--gpus", "1"], "leaves no KV cache"),
        (["--costs", "none.json"], "specwise calibrate"),
        (["--draft", "none"], "no model folder 'none'"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(*BASE, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_page_that_cannot_be_written_is_one_clear_error() -> None:
    done = run(*BASE, "--method", "ngram", "--concurrency", "1", "--out", "/proc/none/page.html")
    assert done.returncode == 3
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def written(simulated: StudyData, path: Path) -> Path:
    """A simulated study, written as a measurement is."""
    design = replace(simulated.design, timeout_s=60.0)
    folder = StudyFolder.create(path, design, {}, "")
    for measured in simulated.trials:
        with folder.recording(measured.trial) as writer:
            for record in measured.records:
                writer.request(record)
            for part in measured.parts:
                writer.part(part)
            writer.complete()
    return folder.path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study of known costs."""
    simulated = forecast_study(scenario((1.0, 4.0, 16.0)), repeats=1)
    return written(simulated, tmp_path_factory.mktemp("from") / "study")


def test_rates_arrive_as_the_studys_own_do(tmp_path: Path) -> None:
    asked = scenario((1.0, 2.0, 4.0), loop=Loop.OPEN)
    bursts = tuple(replace(load, arrivals="gamma", burstiness=0.5) for load in asked.loads)
    simulated = forecast_study(replace(asked, loads=bursts, production=bursts[1]), repeats=1)
    done = run(
        "predict", "--from", str(written(simulated, tmp_path / "s")), "--rate", "2,6", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    loads = [s["load"] for s in json.loads(done.stdout)["serving"]]
    assert {(load["value"], load["arrivals"], load["burstiness"]) for load in loads} == {
        (2, "gamma", 0.5), (6, "gamma", 0.5)
    }  # fmt: skip


def test_from_a_study_at_more_loads_and_draft_lengths(study: Path, tmp_path: Path) -> None:
    done = run("predict", "--from", str(study), "-k", "1", "--json", "--out", str(tmp_path / "p"))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["predicted"]
    assert (found["gpu"], found["gpus"]) == (None, None)
    assert [c["name"] for c in found["candidates"]] == ["draft", "draft, k=1"]
    assert {c["acceptance_from"] for c in found["candidates"]} == {f"measured in {found['target']}"}
    assert {s["load"]["value"] for s in found["serving"]} == {1, 4, 16, 32, 64}
    page = (tmp_path / "p").read_text()
    assert "its own servers" in page
    assert "was measured, as the one acceptance" in page
    assert "if acceptance is as assumed" not in page
    assert any("fitted to" in note for note in found["notes"])
    assert "fitted to" in page
    asked = run("predict", "--from", str(study), "--concurrency", "8,128")
    assert asked.returncode == 0
    assert "c128" in asked.stdout
    assert "Costs and acceptance are the study's own" in " ".join(asked.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "TARGET or --from"),
        (["llama-3.1-8b", "--from", "STUDY"], 2, "TARGET or --from"),
        (["--from", "none"], 3, "not a study folder"),
        (["--from", "STUDY", "--gpu", "h100"], 2, "--gpu does not go with --from"),
        (["--from", "STUDY", "--acceptance", "0.5"], 2, "--acceptance does not go"),
        (["--from", "STUDY", "--production", "4"], 2, "--production needs the loads"),
        (["llama-3.1-8b", "-k", "1", "-k", "2"], 2, "need --from"),
    ],
)
def test_bad_input_with_a_study(study: Path, arguments: list[str], code: int, message: str) -> None:
    done = run("predict", *(str(study) if a == "STUDY" else a for a in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
