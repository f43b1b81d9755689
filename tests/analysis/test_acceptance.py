from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.analysis.synthetic import (
    ACCEPTANCE,
    C1,
    C16,
    Truth,
    demo_design,
    demo_study,
)

from specwise.analysis.acceptance import (
    AcceptanceSummary,
    break_even_rate,
    conditional_acceptance,
    merge,
    summarise_acceptance,
    unconditional_acceptance,
)
from specwise.domain import AcceptanceCounts, AcceptanceSource, Speculation, StudyData, StudyDesign

histograms = st.lists(st.integers(0, 500), min_size=2, max_size=9).filter(lambda h: sum(h) > 0)


def one(study: StudyData, arm: str, workload: str, segment: str | None) -> AcceptanceSummary:
    (found,) = (
        a
        for a in summarise_acceptance(study)
        if (a.arm, a.workload, a.segment, a.load) == (arm, workload, segment, C16)
    )
    return found


def known_by_chunks(design: StudyDesign) -> StudyData:
    """A study on servers that say nothing of speculation."""
    study = demo_study(design, source=AcceptanceSource.CHUNKS)
    silent = (
        replace(t, parts=tuple(replace(p, counters={}) for p in t.parts)) for t in study.trials
    )
    return replace(study, trials=tuple(silent))


@given(histograms)
def test_unconditional_acceptance_adds_up_to_the_length(histogram: list[int]) -> None:
    counts = AcceptanceCounts(AcceptanceSource.PER_REQUEST, tuple(histogram), None)
    found = unconditional_acceptance(histogram)
    assert sum(found) == pytest.approx(counts.accepted_tokens / counts.steps)
    assert all(a >= b for a, b in pairwise(found))


@given(histograms)
def test_conditional_acceptance_multiplies_back(histogram: list[int]) -> None:
    unconditional = unconditional_acceptance(histogram)
    product = 1.0
    for a, u in zip(conditional_acceptance(unconditional), unconditional, strict=True):
        if math.isnan(a):
            assert u == 0
            break
        product *= a
        assert product == pytest.approx(u)


def test_positions_of_a_known_histogram() -> None:
    # 100 steps: 40 accept none, 30 one, 30 both.
    assert unconditional_acceptance((40, 30, 30)) == pytest.approx((0.6, 0.3))
    assert conditional_acceptance((0.6, 0.3)) == pytest.approx((0.6, 0.5))
    assert unconditional_acceptance((0, 0)) == ()


def test_merging_keeps_drafted_unknown_when_any_is_unknown() -> None:
    known = AcceptanceCounts(AcceptanceSource.CHUNKS, (1, 2), 3)
    unknown = replace(known, drafted_tokens=None)
    assert merge([known, known], 0) == AcceptanceCounts(AcceptanceSource.CHUNKS, (2, 4), 6)
    merged = merge([known, unknown], 3)
    assert merged is not None
    assert merged.drafted_tokens is None
    assert merged.steps_by_accepted == (2, 4, 0, 0)
    assert merge([], 2) is None


@pytest.mark.parametrize("segment", ["json", "prose", "copy"])
def test_conditional_acceptance_recovers_the_truth(segment: str) -> None:
    study = demo_study(demo_design(repeats=4, loads=(C16,), noise_floor=False))
    found = one(study, "draft_model", segment, None)
    truth = ACCEPTANCE["draft_model"][segment]
    # The last step of a request is cut by its length, which lowers later positions a little.
    assert found.conditional[0] == pytest.approx(truth, abs=0.05)
    assert found.temperature == (0.8 if segment == "prose" else 0.0)
    assert one(study, "draft_model", "mix", None).temperature is None


def test_sources_are_tried_best_first_and_agree() -> None:
    design = demo_design(loads=(C16,))
    per_request = one(demo_study(design), "draft_model", "json", None)
    counters = one(
        demo_study(design, source=AcceptanceSource.COUNTERS), "draft_model", "json", None
    )
    chunks = one(known_by_chunks(design), "draft_model", "json", None)
    assert [a.source for a in (per_request, counters, chunks)] == list(AcceptanceSource)
    for other in (counters, chunks):
        assert other.rate == pytest.approx(per_request.rate)
        assert other.length == pytest.approx(per_request.length)
        assert other.unconditional == pytest.approx(per_request.unconditional)
    assert counters.per_request is None
    assert chunks.per_request == replace(per_request.per_request, source=AcceptanceSource.CHUNKS)


def test_a_chunk_that_no_step_can_have_filled_is_not_counted() -> None:
    """One answer of which the server sent the rest in one piece, once its stream had caught up."""
    study = known_by_chunks(demo_design(loads=(C16,)))
    trials, merged = list(study.trials), 0
    for i, measured in enumerate(trials):
        records = list(measured.records)
        for j, record in enumerate(records):
            if record.acceptance is not None and merged < 5:
                counts = record.acceptance.steps_by_accepted
                stalled = replace(record.acceptance, steps_by_accepted=(*counts, *[0] * 25, 1))
                records[j], merged = replace(record, acceptance=stalled), merged + 1
        trials[i] = replace(measured, records=tuple(records))
    assert merged == 5
    assert summarise_acceptance(replace(study, trials=tuple(trials))) == summarise_acceptance(study)


def test_counters_cannot_speak_for_a_segment_of_a_mix() -> None:
    study = demo_study(demo_design(loads=(C16,)), source=AcceptanceSource.COUNTERS)
    found = summarise_acceptance(study)
    assert found
    assert all(a.segment is None for a in found)


def test_counters_of_a_restarted_server_are_not_used() -> None:
    study = demo_study(
        demo_design(loads=(C1,), production_load=C1), source=AcceptanceSource.COUNTERS
    )
    restarted = replace(
        study,
        trials=tuple(
            replace(t, parts=tuple(replace(p, counters_reset=True) for p in t.parts))
            for t in study.trials
        ),
    )
    assert summarise_acceptance(restarted) == ()


def test_lookup_methods_do_not_guess_what_was_drafted_from_chunks() -> None:
    study = demo_study(demo_design(loads=(C16,)), source=AcceptanceSource.CHUNKS)
    found = one(study, "ngram", "mix", "json")
    assert found.source is AcceptanceSource.CHUNKS
    assert found.rate is None
    assert found.length is not None


def test_a_scheduled_arm_has_no_positions() -> None:
    design = demo_design(loads=(C16,))
    scheduled = Speculation("draft_model", 4, draft="draft", schedule=((1, 8, 4), (9, 64, 0)))
    design = replace(
        design,
        arms=(design.arms[0], replace(design.arms[1], speculation=scheduled), design.arms[2]),
    )
    found = one(demo_study(design), "draft_model", "json", None)
    assert (found.k, found.unconditional, found.conditional) == (None, (), ())
    assert found.rate is not None
    assert "compare length and rate only" in found.note


def test_the_spread_shows_what_the_mean_hides() -> None:
    found = one(demo_study(demo_design(loads=(C16,))), "draft_model", "mix", None)
    assert found.per_request is not None
    assert found.per_request.p10 < 0.3
    assert found.per_request.p90 > 0.6
    assert found.per_request.below_half == pytest.approx(0.4, abs=0.1)


@given(
    k=st.integers(1, 8),
    rate=st.floats(0.05, 0.95),
    cost=st.floats(1.01, 6.0),
)
def test_break_even_rate_is_where_a_step_emits_what_it_costs(
    k: int, rate: float, cost: float
) -> None:
    """With k drafts every step: tokens per step 1 + k rate; it must equal the step's cost."""
    tokens_per_step = 1 + k * rate
    found = break_even_rate(
        rate=rate, tokens_per_step=tokens_per_step, tpot_ratio=cost / tokens_per_step
    )
    assert 1 + k * found == pytest.approx(cost)


def test_break_even_is_unknown_where_nothing_was_accepted() -> None:
    assert math.isnan(break_even_rate(rate=0.0, tokens_per_step=1.0, tpot_ratio=1.1))


def test_baseline_has_no_acceptance() -> None:
    found = summarise_acceptance(demo_study(demo_design(repeats=1), Truth()))
    assert {a.arm for a in found} == {"draft_model", "ngram"}
