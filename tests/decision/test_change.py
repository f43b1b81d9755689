"""The 5-point rule and the order of remedies: req D1, D2, D3."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.analysis.test_before_after import study

from specwise.analysis.before_after import BeforeAfter, Estimate, compare_studies, judge_drop
from specwise.decision.change import EXIT_CODES, Outcome, judge
from specwise.domain import StudyData


@pytest.fixture(scope="module")
def nothing_changed() -> BeforeAfter:
    return compare_studies(study("a", seed=1, requests=20), study("b", seed=2, requests=20))


def with_drop(change: BeforeAfter, middle: float, half: float) -> BeforeAfter:
    """The change as if the first segment's acceptance had moved by ``middle`` -+ ``half``."""
    first, *rest = change.acceptance
    estimate = Estimate(0.8, 0.8 + middle, middle - half, middle + half)
    verdict, more = judge_drop(estimate, first.units)
    moved = replace(first, estimate=estimate, verdict=verdict, more=more)
    rest = [replace(a, verdict="held") for a in rest]
    return replace(change, acceptance=(moved, *rest))


def with_speed(change: BeforeAfter, ratio: float, half_log: float, *, known: bool) -> BeforeAfter:
    def moved(effect: Any) -> Any:
        if effect.metric != "speedup" or effect.arm != "draft_model":
            return effect
        return replace(
            effect,
            ratio=ratio,
            low=ratio * math.exp(-half_log),
            high=ratio * math.exp(half_log),
            trial_noise_known=known,
        )

    return replace(change, effects=tuple(moved(e) for e in change.effects))


def quantised(change: BeforeAfter, *, target: tuple[float, float], draft: float) -> BeforeAfter:
    def noted(study: StudyData, bits: float) -> StudyData:
        served = {"checkpoint": {"weight_bits": bits}, "draft_checkpoint": {"weight_bits": draft}}
        return replace(study, provenance={"arms": {"draft_model": served}})

    before, after = noted(change.before, target[0]), noted(change.after, target[1])
    return dataclasses.replace(change, before=before, after=after)


@pytest.mark.parametrize(
    ("middle", "half", "outcome"),
    [
        (-0.08, 0.02, Outcome.FELL),
        (-0.08, 0.04, Outcome.CANNOT_TELL),
        (-0.06, 0.02, Outcome.CANNOT_TELL),
        (-0.02, 0.02, Outcome.NO_HARM),
        (0.10, 0.30, Outcome.CANNOT_TELL),
        (-0.04, 0.005, Outcome.NO_HARM),
    ],
)
def test_the_interval_decides(
    nothing_changed: BeforeAfter, middle: float, half: float, outcome: Outcome
) -> None:
    verdict = judge(with_drop(nothing_changed, middle, half))
    assert verdict.outcome is outcome
    assert EXIT_CODES[outcome] == {"fell": 1, "cannot-tell": 3, "no-harm": 0}[outcome.value]
    assert ("json" in verdict.headline) == (outcome is not Outcome.NO_HARM)


def test_what_cannot_be_told_says_how_many_more(nothing_changed: BeforeAfter) -> None:
    change = with_drop(nothing_changed, -0.08, 0.06)
    (first, *_) = change.acceptance
    # Half the width takes four times the prompts.
    assert first.more == pytest.approx(3 * first.units, abs=1)
    verdict = judge(change)
    assert f"about {first.more} more prompts" in verdict.reasons[0]
    assert f"Measure about {first.more} more prompts of json on both sides" in verdict.advice[0]
    on_the_line = judge(with_drop(nothing_changed, -0.05, 0.03))
    assert "no feasible number" in on_the_line.reasons[0]
    assert "about 5 points" in on_the_line.advice[0]


def test_four_bits_go_to_eight_first(nothing_changed: BeforeAfter) -> None:
    fell = with_drop(nothing_changed, -0.09, 0.01)
    advice = judge(quantised(fell, target=(16, 4), draft=16)).advice
    assert advice[0].startswith("Go from INT4 to INT8 on the target")
    assert "same-level" in advice[1]
    assert "acceptance method" in advice[2]
    same_level = judge(quantised(fell, target=(16, 4), draft=4)).advice
    assert not any("same-level" in words for words in same_level)


def test_eight_bits_go_back(nothing_changed: BeforeAfter) -> None:
    fell = with_drop(nothing_changed, -0.09, 0.01)
    advice = judge(quantised(fell, target=(16, 8), draft=8)).advice
    assert advice[0].startswith("Take the target back from 8 to 16 bits")


def test_a_change_that_nobody_noted_is_looked_for(nothing_changed: BeforeAfter) -> None:
    advice = judge(with_drop(nothing_changed, -0.09, 0.01)).advice
    assert "Nothing in the manifests explains it" in advice[0]


@pytest.mark.parametrize(
    ("ratio", "half_log", "known", "outcome"),
    [
        (0.80, 0.05, True, Outcome.SLOWER),
        (0.80, 0.30, True, Outcome.NO_HARM),  # its interval holds 1
        (0.97, 0.01, True, Outcome.NO_HARM),  # slower, by less than a machine drifts
        (0.80, 0.05, False, Outcome.NO_HARM),  # nobody knows how much trials differ
        (1.30, 0.05, True, Outcome.NO_HARM),
    ],
)
def test_slower_must_be_certain_and_more_than_drift(
    nothing_changed: BeforeAfter, ratio: float, half_log: float, known: bool, outcome: Outcome
) -> None:
    change = with_speed(with_drop(nothing_changed, 0, 0.01), ratio, half_log, known=known)
    verdict = judge(change)
    assert verdict.outcome is outcome
    if outcome is Outcome.SLOWER:
        assert "draft_model takes 1.25x the time" in verdict.headline
        assert "arm baseline, which did not change" in verdict.advice[0]


def test_a_drop_outranks_a_slowdown_and_both_are_told(nothing_changed: BeforeAfter) -> None:
    change = with_speed(with_drop(nothing_changed, -0.09, 0.01), 0.7, 0.02, known=True)
    verdict = judge(change)
    assert verdict.outcome is Outcome.FELL
    assert len(verdict.reasons) == 2
