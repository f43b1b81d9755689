"""`specwise tune` from the command line, on stand-ins for vLLM that specwise starts itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.stand_in_engine import install

from specwise.cli.main import specwise
from specwise.cli.tune import confirmation_folder, read_tuning
from specwise.decision.confirmation import confirmation_design
from specwise.errors import SpecwiseError
from specwise.measurement.store import StudyFolder

STUDY = """
name = "tuned"
[slo]
bound = "throughput"
[serve]
model = "{model}"
engine = "{python}"
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = {{ method = "ngram", k = 2 }}
[[segment]]
name = "one"
prompts = "prompts.jsonl"
max_tokens = 20
[load]
concurrency = [1, 2]
requests = [8, 12]
warmup = 1
[tune]
k = [2, 3]
repeats = 2
idle = false
tolerance = 0.1
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study file whose servers are stand-ins; the current folder is its folder."""
    install(
        tmp_path,
        monkeypatch,
        conditional="(0.9,) * k",
        # 6 ms over up to four tokens, and 1.5 ms more for each beyond.
        step_s="0.006 + 0.0015 * max(running * (1 + k) - 4, 0)",
    )
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tune.toml"
    file.write_text(STUDY.format(model=tmp_path / "model", python=sys.executable))
    return file


def run(*words: str) -> Result:
    return CliRunner().invoke(specwise, list(words))


def test_a_tuning_from_the_study_file_to_the_command_to_serve(study: Path) -> None:
    done = run("tune", str(study), "--out", "out")
    assert done.exit_code == 0, done.output
    assert "best so far" in done.output
    assert "Confirming on requests dealt anew: baseline, draft-k" in done.output
    folder = study.parent / "out"
    for name in ("report.html", "tuning.json", "confirm/report.html", "search/picks.jsonl"):
        assert (folder / name).exists(), name
    answer = json.loads((folder / "tuning.json").read_text())
    assert answer["recommendation"]["decision"] == "on"
    arm = answer["recommendation"]["arm"]
    assert arm in ("draft-k2", "draft-k3")

    again = run("tune", "--resume", "out", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["recommendation"] == answer["recommendation"]

    said = run("decide", "out", "--json")
    assert said.exit_code == 0
    assert json.loads(said.stdout)["recommendation"] == answer["recommendation"]

    page = run("report", "out", "--out", "page.html")
    assert page.exit_code == 0
    elsewhere = (study.parent / "page.html").read_text()
    assert 'href="out/confirm/report.html"' in elsewhere
    assert "specwise flags --from out" in elsewhere
    refused = run("report", "out", "--records", "csv")
    assert "its raw records are in the studies that it holds" in str(refused.exception)

    rules = run("alerts", "out")
    assert rules.exit_code == 0, rules.output
    assert "groups:" in rules.stdout

    more = confirmation_design(
        read_tuning(folder).search.design, read_tuning(folder).ways[0], repeats=9
    )
    longer = confirmation_folder(folder, more)
    assert longer.path == folder / "confirm"
    assert longer.design.trials == more.trials

    flags = run("flags", "--from", "out")
    assert flags.exit_code == 0, flags.output
    assert f'"num_speculative_tokens": {arm[-1]}' in flags.stdout


def test_a_budget_that_ends_first_says_so_and_more_minutes_go_on(study: Path) -> None:
    done = run("tune", str(study), "--out", "out", "--budget", "0.02", "--no-confirm", "--json")
    assert done.exit_code == 3
    first = json.loads(done.stdout)
    assert first["stopped"] == "budget"
    assert first["recommendation"]["decision"] == "measure-more"
    tried = len(StudyFolder.open(study.parent / "out" / "search").picks())

    more = run("tune", "--resume", "out", "--budget", "5", "--no-confirm", "--json")
    assert json.loads(more.stdout)["stopped"] == "tolerance"
    folder = StudyFolder.open(study.parent / "out" / "search")
    assert len(folder.picks()) > tried
    assert all(folder.is_over(trial) for trial in folder.design.trials)


def test_the_plan_and_the_example_start_nothing(study: Path) -> None:
    plan = run("tune", str(study), "--plan")
    assert plan.exit_code == 0
    assert "3 arms: baseline, draft-k2, draft-k3" in plan.output
    assert "2 cells" in plan.output
    assert not list(study.parent.glob("*-tuning"))
    example = run("tune", "--example")
    assert "[tune]" in example.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Give a study file"),
        (("tune.toml", "--resume", "out"), "Give a study file"),
        (("--resume", "nowhere"), "not the folder of a tuning"),
        (("missing.toml",), "does not exist"),
    ],
)
def test_wrong_calls_are_told_what_to_do(study: Path, words: tuple[str, ...], says: str) -> None:
    del study
    done = run("tune", *words)
    assert isinstance(done.exception, SpecwiseError)
    assert says in str(done.exception)


def test_arms_with_a_url_cannot_be_tuned(study: Path) -> None:
    text = study.read_text().replace(
        'name = "baseline"\n', 'name = "baseline"\nurl = "http://127.0.0.1:1"\n', 1
    )
    study.write_text(text)
    done = run("tune", str(study))
    assert isinstance(done.exception, SpecwiseError)
    assert "url" in str(done.exception)
