"""Two studies of one change: req D2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.analysis import synthetic
from tests.analysis.synthetic import C4, C16, Truth, demo_design, demo_study

from specwise.analysis.acceptance import unconditional_acceptance
from specwise.analysis.before_after import (
    DROP,
    AcceptanceChange,
    BeforeAfter,
    Estimate,
    at_draft_length,
    compare_studies,
    judge_drop,
    paired_difference,
    unpaired_difference,
)
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Arm,
    Slo,
    Speculation,
    StudyData,
)
from specwise.errors import InputError
from specwise.vllm.response import acceptance_from_chunks

ARMS = (
    Arm("baseline", url="http://a"),
    Arm("draft_model", Speculation("draft_model", 4, draft="draft"), url="http://b"),
)


def study(folder: str, *, seed: int, **options: Any) -> StudyData:
    """Baseline and one drafting arm at 16 clients, twice, 64 requests a trial."""
    arms = options.pop("arms", ARMS)
    requests = options.pop("requests", 64)
    loads = options.pop("loads", (C16,))
    made = demo_study(
        demo_design(arms=arms, loads=loads, requests=requests, repeats=options.pop("repeats", 2)),
        seed=seed,
        **options,
    )
    return replace(made, folder=folder)


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StudyData]:
    """A study whose drafting arm accepts with these conditional probabilities by segment."""

    def make(folder: str, rates: dict[str, float], **options: Any) -> StudyData:
        of_arm = synthetic.ACCEPTANCE["draft_model"] | rates
        monkeypatch.setitem(synthetic.ACCEPTANCE, "draft_model", of_arm)
        return study(folder, **options)

    return make


def by_segment(change: BeforeAfter) -> dict[str, AcceptanceChange]:
    return {a.segment: a for a in change.acceptance}


# ---------------------------------------------------------------------------------------------
# The estimator


def test_with_equal_drafts_it_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.uniform(0.3, 0.9, 30), rng.uniform(0.2, 0.8, 30)
    found = paired_difference([(a * 40, 40.0) for a in before], [(b * 60, 60.0) for b in after])
    expected = stats.ttest_rel(after, before).confidence_interval()
    assert found.difference == pytest.approx(after.mean() - before.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_without_shared_prompts_it_is_welchs_interval() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.uniform(0.3, 0.9, 30), rng.uniform(0.2, 0.8, 20)
    found = unpaired_difference([(a * 9, 9.0) for a in before], [(b * 7, 7.0) for b in after])
    expected = stats.ttest_ind(after, before, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_units_that_never_differ_get_the_rule_of_three() -> None:
    """Sixty prompts with the same counts do not prove that the sixty-first has them too."""
    same = [(7.0, 12.0), (3.0, 9.0), (12.0, 12.0)] * 20
    found = paired_difference(same, same)
    apart = 1 - 3 / 9
    assert (found.low, found.high) == pytest.approx((-0.05 * apart, 0.05 * apart))
    constant = paired_difference([(4.0, 4.0)] * 30, [(4.0, 4.0)] * 30)
    assert (constant.low, constant.high) == pytest.approx((-0.1, 0.1))
    few = paired_difference(same[:9], same[:9])
    assert judge_drop(few, 9)[0] == "cannot tell"


def test_one_unit_has_no_interval() -> None:
    for estimate in (paired_difference, unpaired_difference):
        found = estimate([(3.0, 4.0)], [(1.0, 4.0)])
        assert found.difference == -0.5
        assert math.isnan(found.low)
        assert judge_drop(found, 1) == ("cannot tell", None)


@pytest.mark.parametrize("estimate", [paired_difference, unpaired_difference])
def test_intervals_hold_the_truth(estimate: Callable[..., Estimate]) -> None:
    """2,000 simulated changes over 40 prompts of unequal length and difficulty."""
    rng = np.random.default_rng(3)
    hits, trials, drop = 0, 2000, 0.08
    for _ in range(trials):
        hard = rng.beta(5, 3, 40)
        other = hard if estimate is paired_difference else rng.beta(5, 3, 40)
        sides = []
        for difficulty in (hard, other - drop * (other / (5 / 8))):
            drafted = 3 * rng.integers(5, 40, 40)
            accepted = rng.binomial(drafted, difficulty)
            sides.append(list(zip(accepted.astype(float), drafted.astype(float), strict=True)))
        found = estimate(*sides)
        hits += found.low <= -drop <= found.high
    assert 0.93 <= hits / trials <= 0.97


@given(
    st.floats(-0.3, 0.2),
    st.floats(0.001, 0.2),
    st.integers(2, 300),
)
def test_as_many_units_as_it_asks_for_decide(middle: float, half: float, units: int) -> None:
    found = Estimate(0.6, 0.6 + middle, middle - half, middle + half)
    verdict, more = judge_drop(found, units)
    assert (verdict == "fell") == (found.high < -DROP)
    assert (verdict == "held") == (found.low > -DROP)
    if more is not None:
        assert verdict == "cannot tell"
        shrunk = half * math.sqrt(units / (units + more))
        assert shrunk <= abs(middle + DROP) * 1.000001
    elif verdict == "cannot tell":
        assert half * 0.1 > abs(middle + DROP)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9), st.integers(1, 8))
def test_cutting_the_histogram_keeps_the_first_positions(steps: list[int], k: int) -> None:
    longest = len(steps) - 1
    if not sum(steps):
        steps[0] = 1
    k = min(k, longest)
    counts = AcceptanceCounts(AcceptanceSource.PER_REQUEST, tuple(steps), sum(steps) * longest)
    accepted, drafted = at_draft_length(counts, longest, k)
    assert drafted == sum(steps) * k
    expected = sum(unconditional_acceptance(steps)[:k]) / k
    assert accepted / drafted == pytest.approx(expected)


def test_a_lookup_that_proposed_less_than_k_keeps_its_own_count() -> None:
    counts = AcceptanceCounts(AcceptanceSource.PER_REQUEST, (2, 3, 0, 1), 9)
    assert at_draft_length(counts, 3, 3) == (6.0, 9.0)
    assert at_draft_length(counts, 3, 2) == (5.0, 12.0)


# ---------------------------------------------------------------------------------------------
# Whole studies


def test_a_drop_is_found_where_it_is(accepting: Callable[..., StudyData]) -> None:
    before = accepting("a", {}, seed=1)
    change = compare_studies(before, accepting("b", {"json": 0.8}, seed=2))
    found = by_segment(change)
    assert found["json"].verdict == "fell"
    assert found["json"].estimate.difference == pytest.approx(-0.20, abs=0.04)
    assert {found[s].verdict for s in ("prose", "copy")} == {"held"}
    assert found["json"].paired
    assert found["json"].units == 128  # the prompts of both repeats, the mix included
    assert found["json"].unit == "prompts"


def test_equal_studies_are_not_told_apart() -> None:
    """Six pairs of studies that differ by chance alone: no drop is ever called certain."""
    verdicts = []
    for seed in range(6):
        a, b = (study(n, seed=100 * seed + i, requests=20) for i, n in enumerate("ab"))
        verdicts += [c.verdict for c in compare_studies(a, b).acceptance]
    assert "fell" not in verdicts


def test_other_draft_lengths_are_compared_over_the_positions_they_share() -> None:
    shorter = (
        ARMS[0],
        Arm("draft_model", Speculation("draft_model", 2, draft="d"), url="http://b"),
    )
    change = compare_studies(study("a", seed=1), study("b", seed=2, arms=shorter))
    for found in change.acceptance:
        assert found.k == 2
        assert found.verdict == "held"
        assert "k differs (4 and 2)" in found.note
        assert found.estimate.low < 0 < found.estimate.high
    json = by_segment(change)["json"].estimate.before
    assert json == pytest.approx((0.9 + 0.81) / 2, abs=0.04)  # a=0.9 over two positions
    assert {d.what for d in change.differences} >= {"k", "draft"}


def test_a_schedule_is_compared_over_its_shortest_draft() -> None:
    speculation = Speculation("draft_model", 4, draft="draft", schedule=((1, 4, 4), (5, 64, 1)))
    scheduled = (ARMS[0], Arm("draft_model", speculation, url="http://b"))
    change = compare_studies(study("a", seed=1), study("b", seed=2, arms=scheduled))
    assert {a.k for a in change.acceptance} == {1}
    assert "follows the batch size" in change.acceptance[0].note


def test_counters_are_compared_by_trial_and_workload() -> None:
    options: dict[str, Any] = {"source": AcceptanceSource.COUNTERS, "repeats": 4, "requests": 20}
    change = compare_studies(study("a", seed=1, **options), study("b", seed=2, **options))
    found = by_segment(change)
    assert found.keys() == {"json", "prose", "copy", "mix"}
    assert {(a.unit, a.units) for a in change.acceptance} == {("trials", 4)}
    assert "nothing else used it" in found["mix"].note


def test_chunks_on_one_side_make_an_estimate_of_both() -> None:
    """The estimate leaves out each request's last step; on one side alone that would be a drop."""
    measured = study("b", seed=2)
    without = tuple(
        replace(
            t,
            records=tuple(
                replace(r, acceptance=acceptance_from_chunks(r.chunk_tokens or (), finished=True))
                if r.acceptance
                else r
                for r in t.records
            ),
        )
        for t in measured.trials
    )
    change = compare_studies(replace(measured, folder="a", trials=without), measured)
    for found in change.acceptance:
        assert found.source is AcceptanceSource.CHUNKS
        assert found.estimate.difference == 0
        assert "both are estimated" in found.note


def test_prompts_that_are_not_shared_are_not_paired() -> None:
    before, after = study("a", seed=1), study("b", seed=2)
    renamed = tuple(
        replace(t, records=tuple(replace(r, prompt_id=f"other-{r.prompt_id}") for r in t.records))
        for t in after.trials
    )
    change = compare_studies(before, replace(after, trials=renamed))
    assert not any(a.paired for a in change.acceptance)
    assert "too few prompts" in change.acceptance[0].note
    paired = compare_studies(before, after)
    widths = [
        by_segment(c)["prose"].estimate.high - by_segment(c)["prose"].estimate.low
        for c in (change, paired)
    ]
    assert widths[0] == pytest.approx(widths[1], rel=0.3)  # the synthetic arms share no difficulty


def test_a_segment_without_figures_in_both_is_named() -> None:
    after = study("b", seed=2, requests=20)
    silent = tuple(
        replace(
            t,
            records=tuple(
                replace(r, acceptance=None) if r.segment == "copy" else r for r in t.records
            ),
        )
        for t in after.trials
    )
    change = compare_studies(study("a", seed=1, requests=20), replace(after, trials=silent))
    assert by_segment(change).keys() == {"json", "prose"}
    assert any("for copy" in words for words in change.cautions)


def test_studies_without_any_figures_are_one_clear_error() -> None:
    after = study("b", seed=2, requests=4)
    unfinished = tuple(replace(t, complete=False) for t in after.trials)
    with pytest.raises(InputError, match="acceptance figures in both"):
        compare_studies(study("a", seed=1, requests=4), replace(after, trials=unfinished))


def test_greedy_outputs_are_counted_as_same_or_not() -> None:
    before, after = study("a", seed=1), study("b", seed=2)
    changed = replace(
        after,
        trials=tuple(
            replace(
                t,
                records=tuple(
                    replace(r, output_sha256="x") if r.prompt_id.endswith("-3") else r
                    for r in t.records
                ),
            )
            for t in after.trials
        ),
    )
    found = by_segment(compare_studies(before, changed))
    same, of = found["json"].same_outputs or (0, 0)
    assert of - same == sum(
        r.prompt_id.endswith("-3")
        for p in {r.prompt_id: r for t in before.trials for r in t.records}.values()
        for r in [p]
        if r.segment == "json"
    )
    assert found["prose"].same_outputs is None  # sampled: outputs differ by chance


def test_a_machine_that_drifted_shows_in_times_and_not_in_the_speedups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = study("a", seed=1)
    monkeypatch.setattr(synthetic, "BASE_TPOT_S", {16: 0.045 * 1.4})
    monkeypatch.setattr(synthetic, "BASE_TTFT_S", {16: 0.160 * 1.4})
    change = compare_studies(before, study("b", seed=2))
    production = [e for e in change.effects if (e.workload, e.segment) == ("mix", None)]
    speeds = {e.arm: e for e in production if e.metric == "speedup"}
    assert speeds.keys() == {"baseline", "draft_model"}
    for effect in speeds.values():
        assert effect.low <= 1 / 1.4 <= effect.high
        assert effect.direction == "worse"
    for own in change.speedups:
        assert own.direction == "undecided", own
    assert change.controls == ("baseline", "draft_model")
    assert any("not alternated" in words and "shows it" in words for words in change.cautions)


def test_a_gain_that_speculation_lost_shows_in_the_speedups() -> None:
    slow = Truth(speedup={"draft_model": {s: {16: 0.7} for s in ("json", "prose", "copy")}})
    change = compare_studies(study("a", seed=1), study("b", seed=2, truth=slow))
    json = next(s for s in change.speedups if s.workload == "json")
    assert json.direction == "worse"
    assert json.low < 0.7 / 1.25 < json.high


def test_times_of_another_machine_are_not_compared() -> None:
    before, after = study("a", seed=1), study("b", seed=2)
    other = replace(after, provenance=dict(after.provenance) | {"processor": "B", "cores": 4})
    known = replace(before, provenance=dict(before.provenance) | {"processor": "A", "cores": 4})
    change = compare_studies(known, other)
    assert change.effects == ()
    assert change.speedups  # each within its own machine
    assert len(change.acceptance) == 3
    assert any("two machines" in words for words in change.cautions)


def test_lengths_that_differ_spoil_the_times_of_their_workloads_only() -> None:
    after = study("b", seed=2)
    segments = tuple(
        replace(s, max_tokens=32) if s.name == "prose" else s for s in after.design.segments
    )
    changed = replace(after, design=replace(after.design, segments=segments))
    change = compare_studies(study("a", seed=1), changed)
    assert {e.workload for e in change.effects} == {"json", "copy"}


def test_goodput_is_judged_by_one_slo() -> None:
    after = study("b", seed=2)
    strict = replace(after, design=replace(after.design, slo=Slo(tpot_s=0.04)))
    change = compare_studies(study("a", seed=1), strict)
    goodput = next(
        e
        for e in change.effects
        if (e.metric, e.workload, e.arm) == ("goodput_per_s", "json", "baseline")
    )
    assert goodput.baseline_value == pytest.approx(goodput.candidate_value, rel=0.3)
    assert any("second study's SLO" in words for words in change.cautions)


def test_only_loads_that_both_measured_are_compared() -> None:
    change = compare_studies(
        study("a", seed=1, loads=(C4, C16), requests=24), study("b", seed=2, requests=24)
    )
    assert {e.load for e in change.effects} == {C16}
    assert any(d.what == "loads" for d in change.differences)


@given(seed=st.integers(0, 5))
@settings(max_examples=2, deadline=None)
def test_a_study_is_the_same_as_itself(seed: int) -> None:
    one = study("a", seed=seed, requests=20)
    change = compare_studies(one, one)
    assert all(a.estimate.difference == 0 for a in change.acceptance)
    assert all(e.direction == "undecided" for e in change.effects)
    assert change.differences == ()
    assert any("same study" in words for words in change.cautions)
