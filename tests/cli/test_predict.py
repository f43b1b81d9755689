from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tests.cli.test_main import run

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
