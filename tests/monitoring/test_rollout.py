"""The note says what the study says: thresholds, times and both commands, for each verdict."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import yaml
from tests.analysis.synthetic import C1, C16, demo_design, demo_study

from specwise.decision.assessment import Assessment, assess
from specwise.decision.verdict import Decision
from specwise.domain import Arm, MeasuredTrial, Speculation, StudyData
from specwise.monitoring.alerts import alert_rules
from specwise.monitoring.drift import DriftState, drift_test, step
from specwise.monitoring.expectations import expectations
from specwise.monitoring.rollout import (
    Rollout,
    Serving,
    duration,
    plan_rollout,
    slowest_alert_s,
    to_markdown,
)

DRAFT = Speculation("draft_model", 4, "draft")
SCHEDULED = replace(DRAFT, schedule=((1, 4, 4), (5, 1024, 0)))
BASELINE = Arm("baseline", url="http://10.0.0.1:8000")


@cache
def won(production: str = "json") -> Assessment:
    """The demo with draft_model alone; on for json, on with a schedule for the mix."""
    arms = (BASELINE, Arm("draft_model", DRAFT, url="http://10.0.0.2:8000"))
    design = demo_design(arms=arms, production_workload=production, loads=(C1, C16))
    return assess(demo_study(design))


def idle_at_production() -> Assessment:
    """A schedule that ran, drafted at c1, and drafted nothing at production's c16."""
    arms = (BASELINE, Arm("draft_model", SCHEDULED, url="http://10.0.0.2:8000"))
    study = demo_study(demo_design(arms=arms, production_workload="json", loads=(C1, C16)))
    return assess(replace(study, trials=tuple(_idle(t) for t in study.trials)))


def _idle(measured: MeasuredTrial) -> MeasuredTrial:
    if (measured.trial.arm, measured.trial.load) != ("draft_model", C16):
        return measured
    return replace(
        measured,
        records=tuple(replace(r, acceptance=None) for r in measured.records),
        parts=tuple(replace(p, counters={}) for p in measured.parts),
    )


def serving(**changes: object) -> Serving:
    usual = Serving(
        arm="draft_model",
        speculation=DRAFT,
        command="vllm serve T --speculative-config '{}' --per-request-spec-decode-metrics summary",
        without="vllm serve T",
        vllm="0.32.0",
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def note(assessment: Assessment, **changes: object) -> Rollout:
    return plan_rollout(assessment, serving(**changes), folder="my study")


# ------------------------------------------------------------------------------------ times


def test_a_step_lasts_until_the_drift_test_and_every_alert_can_speak() -> None:
    assessment = won()
    expected = expectations(assessment, arm="draft_model")
    plan = note(assessment)
    test = drift_test(expected)
    rate = next(
        s.requests_per_s
        for s in assessment.summaries
        if (s.arm, s.workload, s.load) == ("draft_model", "json", C16)
    )
    assert rate is not None
    assert [s.share for s in plan.steps] == [0.05, 0.25, 1.0]
    for found in plan.steps:
        drafted_per_s = rate * found.share * test.drafted_per_request
        delay_s = test.expected_delay_s(drafted_per_s)
        assert found.lasts_s == pytest.approx(max(delay_s, slowest_alert_s(expected)))
        assert found.requests == pytest.approx(rate * found.share * found.lasts_s)
    for slow, fast in pairwise(plan.steps):
        assert fast.lasts_s <= slow.lasts_s


def test_a_fall_is_seen_within_the_requests_that_the_note_names() -> None:
    """Against the test itself: canaries that lose what counts as meaningful, one window a minute.

    The first alarm has to come, in the median canary, before the step is over.
    """
    expected = expectations(won(), arm="draft_model")
    test = drift_test(expected)
    first = note(won()).steps[0]
    windows = int(first.lasts_s / test.window_s)
    drafted = first.requests * test.drafted_per_request / windows
    rng = np.random.default_rng(5)
    deviation = float(np.sqrt(test.window_variance(drafted)))
    seen = 0
    for _ in range(200):
        state = DriftState()
        for number, noise in enumerate(rng.normal(0.0, deviation, windows)):
            state = step(
                test,
                state,
                at_s=60.0 * number,
                drafted_tokens=drafted,
                accepted_tokens=drafted * (test.expected - test.drop + noise),
            )
            if state.alarm_at_s is not None:
                seen += 1
                break
    assert seen > 100


def test_the_slowest_alert_is_that_of_the_rules_themselves() -> None:
    expected = expectations(won(), arm="draft_model")
    rules = [
        rule
        for group in yaml.safe_load(alert_rules(expected, tap=True))["groups"]
        for rule in group["rules"]
    ]
    drift = next(r for r in rules if r.get("alert") == "SpeculationAcceptanceDrift")
    assert (drift["for"], "[1h]" in drift["expr"]) == ("30m", True)
    assert slowest_alert_s(expected) == 5400


def test_durations_are_rounded_up() -> None:
    texts = [duration(s) for s in (61, 5399, 5401, 90_000, 200_000)]
    assert texts == ["2 min", "90 min", "1.6 h", "25 h", "2.4 days"]


# ------------------------------------------------------------------------------- thresholds


def test_thresholds_are_those_of_watch_and_of_the_alerts() -> None:
    expected = expectations(won("mix"), arm="draft_model")
    gates = {g.figure: g for g in note(won("mix")).gates}
    rules = {
        (r["alert"], r["labels"].get("segment")): r["expr"]
        for group in yaml.safe_load(alert_rules(expected, tap=True))["groups"]
        for r in group["rules"]
        if "alert" in r
    }

    def limit(alert: str, segment: str | None = None) -> float:
        return float(rules[alert, segment].replace(">", "<").split(" < ")[1].split()[0])

    def shown(value: float, unit: str) -> str:
        return f"{value * 100:.0f} %" if unit == "%" else f"{value * 1000:.3g} ms"

    tpot = shown(limit("SpeculationTpotAboveBaseline"), "ms")
    assert f"below {tpot}" in gates["Mean TPOT"].holds
    ttft = shown(limit("SpeculationTtftRegression"), "ms")
    assert f"at most {ttft}" in gates["Mean TTFT"].holds
    for segment in ("json", "prose", "copy"):
        floor = shown(limit("SpeculationSegmentAcceptanceLow", segment), "%")
        assert any(f"of {segment} " in n and floor in g.holds for n, g in gates.items())
    both = limit("SpeculationAcceptanceLow"), limit("SpeculationAcceptanceDrift")
    assert f"at least {shown(max(both), '%')}" in gates["Acceptance rate"].holds


def test_one_segment_needs_no_proxy() -> None:
    plan = note(won())
    assert not any("tap" in g.figure for g in plan.gates)
    assert not any("tap" in command for _, command in plan.commands)
    assert (
        "specwise watch --targets canary.txt --against 'my study' --arm draft_model --s"
        in to_markdown(plan)
    )


# --------------------------------------------------------------------------------- verdicts


def test_on_has_evidence_steps_and_both_commands() -> None:
    text = to_markdown(note(won()))
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Rollout: draft_model (draft_model, k=4)",
        "## What is rolled out",
        "## Steps",
        "## Before the next step",
        "## Commands",
        "## Turn it off",
        "## Decide again at",
    ]
    assert won().verdict.headline in text
    assert "vllm serve T --speculative-config" in text
    assert "\nvllm serve T\n" in text
    assert "without speculation refuses it" in text


def test_an_unconfirmed_schedule_is_measured_first() -> None:
    assessment = won("mix")
    assert assessment.verdict.decision is Decision.SCHEDULE
    plan = note(assessment, speculation=SCHEDULED, confirmed=False)
    assert plan.steps == ()
    assert plan.gates == ()
    text = to_markdown(plan)
    assert "## First confirm it" in text
    assert "schedule = [[" in text
    assert "## What it would be" in text


def test_a_schedule_that_idles_at_production_is_watched_where_it_drafts() -> None:
    assessment = idle_at_production()
    expected = expectations(assessment, arm="draft_model")
    assert expected.production_load == C1
    plan = note(assessment, speculation=SCHEDULED)
    assert len(plan.steps) == 3
    assert "At 16 concurrent clients the schedule drafts nothing: mean TPOT" in plan.evidence[-1]
    assert "1-4: k=4, 5-1024: k=0" in to_markdown(plan)


def test_off_says_what_to_serve_and_nothing_to_roll_out() -> None:
    plan = note(won(), arm="baseline", speculation=None, command="vllm serve T")
    text = to_markdown(plan)
    assert text.startswith("# Speculation off\n")
    assert "## Steps" not in text
    assert text.count("vllm serve T") == 1


def test_what_was_forced_or_simulated_is_said_first() -> None:
    assessment = won()
    predicted: StudyData = replace(assessment.study, predicted=True)
    plan = note(replace(assessment, study=predicted), forced=True)
    assert "simulation" in plan.warnings[0]
    assert "was asked for; the verdict is “on”" in plan.warnings[1]
    bare = to_markdown(note(assessment, complete=False))
    assert "address only: add this to its command" in bare
