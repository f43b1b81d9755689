from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from tests.analysis.synthetic import C16, demo_design, demo_study

from specwise.cli.decide import decide
from specwise.decision.assessment import Assessment, assess
from specwise.decision.explanation import explain
from specwise.domain import StudyData
from specwise.measurement.store import StudyFolder
from specwise.reporting.explanation import print_explanation
from specwise.reporting.html import render_report


@pytest.fixture(scope="module")
def assessed() -> Assessment:
    return assess(demo_study(demo_design(loads=(C16,))))


def stored(folder: Path, study: StudyData) -> Path:
    held = StudyFolder.create(folder, study.design, study.provenance, "")
    for measured in study.trials:
        with held.recording(measured.trial) as writer:
            for record in measured.records:
                writer.request(record)
            for part in measured.parts:
                writer.part(part)
            writer.complete()
    return folder


def printed(assessed: Assessment, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_explanation(explain(assessed), Console(file=file, width=100))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_it_prints_steps_conditions_and_commands(assessed: Assessment) -> None:
    text = printed(assessed)
    found = explain(assessed)
    for number, step in enumerate(found.steps, 1):
        assert f"{number}. {step.title[:40]}" in text
    assert "Against (" in text
    assert "Nobody knows yet (" in text
    assert "For (" in text
    for command in found.recompute:
        assert command in text


def test_it_prints_without_unicode(assessed: Assessment) -> None:
    assert "Recompute it" in printed(assessed, "ascii")


def test_the_page_shows_the_same_steps(assessed: Assessment, tmp_path: Path) -> None:
    page = render_report(assessed, tmp_path)
    assert 'id="explanation"' in page
    for step in explain(assessed).steps:
        assert step.title.split("(")[0].strip()[:30] in page


def test_decide_explains_in_text_and_json_and_hears_who_watches(tmp_path: Path) -> None:
    folder = stored(tmp_path / "study", demo_study(demo_design(loads=(C16,), requests=24)))
    text = CliRunner().invoke(decide, [str(folder), "--explain"])
    assert text.exit_code in {0, 1, 3}
    assert "Standard error of log(ratio) = sqrt(b2 + m2 / 2)" in text.output
    answer = CliRunner().invoke(decide, [str(folder), "--explain", "--json", "--watched"])
    found = json.loads(answer.output)
    steps = found["explanation"]["steps"]
    figures = next(s["figures"] for s in steps if s["figures"].get("metric") == "speedup")
    assert figures["ratio"] == pytest.approx(figures["baseline"] / figures["candidate"])
    watched = next(c for c in found["conditions"] if c["id"] == "I3-monitoring")
    assert watched["status"] == "pass"
    silent = json.loads(CliRunner().invoke(decide, [str(folder), "--json"]).output)
    assert "explanation" not in silent


def test_an_empty_study_is_explained_too() -> None:
    study = replace(demo_study(demo_design(loads=(C16,), requests=4)), trials=())
    found = explain(assess(study))
    assert any("share no complete trial" in line for s in found.steps for line in s.lines)
    assert found.recompute
