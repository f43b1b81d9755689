from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.analysis.synthetic import C16, demo_study

from specwise.decision.assessment import assess
from specwise.domain import LoadPoint, Loop, Outcome
from specwise.errors import InputError
from specwise.monitoring.expectations import expectations


def test_they_are_the_arms_own_figures_at_the_production_load() -> None:
    study = demo_study()
    assessment = assess(study)
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
    single = [c.accepted_tokens / c.drafted_tokens for c in counts if c.drafted_tokens]
    assert expected.spread is not None
    assert expected.spread.deviation == pytest.approx(np.std(single, ddof=1))
    assert expected.spread.requests == len(single)
    assert [s.segment for s in expected.segments] == ["json", "prose", "copy"]
    assert expected.segments[0].rate > expected.rate > expected.segments[1].rate
    assert expected.production_load == C16
    assert expected.k == 4
    assert expected.drifted_rate == pytest.approx(expected.rate - 0.05)


def test_break_even_is_where_tpot_would_equal_the_baselines() -> None:
    """By definition: at that rate a step's tokens pay exactly for its cost."""
    expected = expectations(assess(demo_study()), arm="draft_model")
    assert expected.break_even is not None
    cost = expected.length * expected.tpot_s.mean / expected.baseline_tpot_s.mean
    tokens_at_break_even = 1 + (expected.length - 1) * expected.break_even / expected.rate
    assert tokens_at_break_even == pytest.approx(cost)
    assert expected.low_rate == expected.break_even


def test_the_crossover_is_given_in_running_requests() -> None:
    study = demo_study()
    closed = expectations(assess(study), arm="ngram")
    found = {(c.arm, c.workload): c for c in assess(study).crossovers if c.segment is None}
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
        expectations(assess(demo_study()), arm="baseline")


def test_what_was_not_measured_cannot_be_expected() -> None:
    study = dataclasses.replace(demo_study(), trials=())
    with pytest.raises(InputError, match=r"has not measured acceptance.*\n.*--resume"):
        expectations(assess(study), arm="draft_model")
