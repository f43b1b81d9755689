"""Each experiment once on the real engine: one command, then its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from specwise.analysis.ladder import Ladder
from specwise.analysis.mixture import DIAGNOSED, Mixture
from specwise.analysis.temperature import TemperatureSweep
from specwise.cli.main import main
from specwise.decision.assessment import Assessment, assess
from specwise.domain import AcceptanceSource, Outcome
from specwise.measurement.store import read_study
from specwise.vllm.server import Server

STUDY = """
name = "real"
seed = 1
[[arm]]
name = "baseline"
url = "{baseline}"
[[arm]]
name = "draft_model"
url = "{drafting}"
speculation = {{ method = "draft_model", k = 3, draft = "bundled:draft" }}
{body}
"""
PROSE = """
[[segment]]
name = "prose"
prompts = "bundled:prose"
temperature = {temperature}
max_tokens = 24
"""
JSON = """
[[segment]]
name = "json"
prompts = "bundled:json"
temperature = 0.1
max_tokens = 24
"""


def leave(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def measured(folder: Path, body: str, servers: tuple[Server, Server], *options: str) -> Assessment:
    text = STUDY.format(baseline=servers[0].url, drafting=servers[1].url, body=body)
    (folder / "study.toml").write_text(text)
    study = folder / "study"
    assert leave("measure", str(folder / "study.toml"), "--out", str(study), *options) == 0
    assert leave("report", str(study)) == 0
    assert 'id="experiment"' in (study / "report.html").read_text()
    assessment = assess(read_study(study))
    records = [r for t in assessment.study.trials for r in t.records]
    assert {r.outcome for r in records} == {Outcome.OK}
    over = {t.trial.trial_id for t in assessment.study.trials if t.complete}
    over |= set(assessment.study.skipped)
    assert over == {t.trial_id for t in assessment.study.design.trials}
    return assessment


@pytest.fixture
def servers(baseline_server: Server, drafting_server: Server) -> tuple[Server, Server]:
    return baseline_server, drafting_server


def test_acceptance_falls_with_temperature(
    servers: tuple[Server, Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = PROSE.format(temperature=0.8) + "[load]\nconcurrency = [8]\nrequests = 20\nrepeats = 1"
    options = ("--experiment", "temperature", "--temperatures", "0")
    sweep = measured(tmp_path, body, servers, *options).experiment
    assert isinstance(sweep, TemperatureSweep)
    (line,) = sweep.lines
    assert [p.temperature for p in line.points] == [0.0, 0.8]
    assert {p.source for p in line.points} == {AcceptanceSource.PER_REQUEST}
    assert line.falls is True
    assert line.monotone is True
    assert line.at_production is not None
    assert line.at_production.classes == ("off",)
    assert "Acceptance by temperature" in capsys.readouterr().out


def test_a_ladder_is_climbed_until_it_is_clear(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    """At T=1 this draft is mostly wrong and the target is small: it loses at every load."""
    load = "[load]\nconcurrency = [1, 2, 4]\nrequests = 6\nproduction = 1\nrepeats = 2"
    body = PROSE.format(temperature=1.0) + load
    assessment = measured(tmp_path, body, servers, "--experiment", "ladder")
    ladder = assessment.experiment
    assert isinstance(ladder, Ladder)
    assert ladder.rungs[0].load == assessment.study.design.production_load
    assert [r.load.value for r in ladder.rungs] == [1, 2, 4][: len(ladder.rungs)]
    assert bool(ladder.skipped) == (ladder.end in ("clear", "saturated"))
    for rung in ladder.rungs:
        speedup = rung.effect("draft_model", "speedup")
        assert speedup is not None
        assert speedup.ratio < 1
        assert rung.effect("draft_model", "tpot_p50") is not None
        assert rung.effect("draft_model", "ttft_p95") is not None
    assert leave("measure", "--resume", str(tmp_path / "study")) == 0, "nothing is left to do"


def test_a_mix_is_set_beside_its_segments_alone(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    load = (
        '[[workload]]\nname = "mix"\nshares = { json = 1, prose = 1 }\n'
        "[load]\nconcurrency = [8]\nrequests = 24\nrepeats = 1\n"
    )
    body = PROSE.format(temperature=1.0) + JSON + load
    mixture = measured(tmp_path, body, servers, "--experiment", "mixed").experiment
    assert isinstance(mixture, Mixture)
    (view,) = mixture.aggregates
    rates = {s.segment: s.acceptance.rate or 0 for s in view.segments if s.acceptance}
    assert rates["json"] > 0.6
    assert rates["prose"] < 0.35
    assert view.acceptance is not None
    assert rates["prose"] < (view.acceptance.rate or 0) < rates["json"]
    assert {(d.segment, d.metric) for d in mixture.diagnoses} == {
        (segment, metric) for segment in ("json", "prose") for metric in DIAGNOSED
    }
    for diagnosis in mixture.diagnoses:
        assert diagnosis.alone is not None
        if diagnosis.metric == "speedup":
            assert diagnosis.contrast is not None
            assert diagnosis.contrast.low < diagnosis.contrast.ratio < diagnosis.contrast.high
