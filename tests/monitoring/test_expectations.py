from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from tests.analysis.synthetic import C16, demo_study

from specwise.decision.assessment import Assessment, assess
from specwise.domain import LoadPoint, Loop, Outcome
from specwise.errors import InputError
from specwise.monitoring.expectations import expectations


@cache
def demo() -> Assessment:
    return assess(demo_study())


def test_they_are_the_arms_own_figures_at_the_production_load() -> None:
    assessment = demo()
    study = assessment.study
    expected = expectations(assessment, arm="draft_model")
    records = [
        record
        for measured in study.trials
        if (measured.trial.arm, measured.trial.workload, measured.trial.load)
        == ("draft_model", "mix", C16)
        for record in measured.records
        if record.outcome is Outcome.OK
    ]
    counts = [r.acceptance for r in records if r.acceptance is not None]
    drafted = sum(c.drafted_tokens or 0 for c in counts)
    assert expected.rate == pytest.approx(sum(c.accepted_tokens for c in counts) / drafted)
    assert expected.spread is not None
    assert expected.spread.requests == len(counts)
    single = [c.accepted_tokens / c.drafted_tokens for c in counts if c.drafted_tokens]
    assert expected.spread.p10 == pytest.approx(np.quantile(single, 0.1))
    assert [s.segment for s in expected.segments] == ["json", "prose", "copy"]
    assert expected.segments[0].rate > expected.rate > expected.segments[1].rate
    assert expected.production_load == C16
    assert expected.k == 4
    assert expected.drifted_rate == pytest.approx(expected.rate - 0.05)


def test_the_deviation_predicts_how_a_rate_over_many_requests_varies() -> None:
    """Against the spread of the rate over resampled requests: what the deviation stands for."""
    study = demo().study
    expected = expectations(demo(), arm="draft_model")
    held = np.array(
        [
            (record.acceptance.accepted_tokens, record.acceptance.drafted_tokens)
            for measured in study.trials
            if (measured.trial.arm, measured.trial.workload) == ("draft_model", "mix")
            and measured.trial.load == C16
            for record in measured.records
            if record.acceptance is not None
        ]
    )
    rng = np.random.default_rng(1)
    drawn = held[rng.integers(len(held), size=(4000, len(held)))]
    rates = drawn[..., 0].sum(axis=1) / drawn[..., 1].sum(axis=1)
    assert expected.spread is not None
    stated = expected.spread.deviation / np.sqrt(len(held))
    assert stated == pytest.approx(rates.std(), rel=0.05)


def test_break_even_is_where_tpot_would_equal_the_baselines() -> None:
    """By definition: at that rate a step's tokens pay exactly for its cost."""
    expected = expectations(demo(), arm="draft_model")
    assert expected.break_even is not None
    cost = expected.length * expected.tpot_s.mean / expected.baseline_tpot_s.mean
    tokens_at_break_even = 1 + (expected.length - 1) * expected.break_even / expected.rate
    assert tokens_at_break_even == pytest.approx(cost)
    assert expected.low_rate == expected.break_even


def test_the_crossover_is_given_in_running_requests() -> None:
    closed = expectations(demo(), arm="ngram")
    found = {(c.arm, c.workload): c for c in demo().crossovers if c.segment is None}
    assert closed.crossover_running == found["ngram", "mix"].load_value


def test_in_an_open_loop_the_crossover_is_read_off_the_running_requests() -> None:
    rates = {load: LoadPoint(Loop.OPEN, load.value / 2) for load in demo_study().design.loads}
    study = demo_study()
    design = dataclasses.replace(
        study.design,
        loads=tuple(rates.values()),
        production_load=rates[C16],
        trials=tuple(dataclasses.replace(t, load=rates[t.load]) for t in study.design.trials),
    )
    trials = tuple(
        dataclasses.replace(m, trial=dataclasses.replace(m.trial, load=rates[m.trial.load]))
        for m in study.trials
    )
    assessment = assess(dataclasses.replace(study, design=design, trials=trials))
    expected = expectations(assessment, arm="ngram")
    crossover = next(
        c for c in assessment.crossovers if (c.arm, c.workload, c.segment) == ("ngram", "mix", None)
    )
    assert crossover.load_value is not None
    assert expected.crossover_running is not None
    running = [s.running_mean for s in assessment.summaries if s.arm == "ngram"]
    assert min(r for r in running if r) <= expected.crossover_running
    assert expected.crossover_running <= max(r for r in running if r)


def test_an_arm_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"no speculating arm 'baseline'.*\n.*draft_model, ngram"):
        expectations(demo(), arm="baseline")


def test_what_was_not_measured_cannot_be_expected() -> None:
    study = dataclasses.replace(demo_study(), trials=())
    with pytest.raises(InputError, match=r"has not measured acceptance.*\n.*--resume"):
        expectations(assess(study), arm="draft_model")
