from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.synthetic import (
    C1,
    C4,
    C16,
    DRAFT_MODEL,
    HEALTHY_CLIENT,
    Truth,
    demo_design,
    demo_study,
)

from specwise.analysis.cells import CellKey, TrialTable
from specwise.analysis.comparison import (
    Comparison,
    Effect,
    compare,
    find_signatures,
    speedup_effects,
    t_quantile,
    tail_probability,
)
from specwise.domain import Purpose, Trial, TrialPart


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(demo_study(demo_design(repeats=3)))


def effect(**changes: object) -> Effect:
    base = Effect(
        metric="tpot_p50",
        better="lower",
        arm="a",
        workload="mix",
        segment=None,
        load=C16,
        ratio=0.9,
        low=0.85,
        high=0.95,
        confidence=0.95,
        pairs=64,
        repeats=2,
        baseline_value=0.02,
        candidate_value=0.018,
        se_log=0.02,
        dof=8,
        trial_noise_known=True,
        note="",
        trial_ids=(),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("better", "low", "high", "direction"),
    [
        ("higher", 1.01, 1.2, "better"),
        ("higher", 0.8, 0.99, "worse"),
        ("lower", 0.8, 0.99, "better"),
        ("lower", 1.01, 1.2, "worse"),
        ("higher", 0.9, 1.1, "undecided"),
        ("lower", math.nan, math.nan, "undecided"),
    ],
)
def test_direction_needs_the_whole_interval(
    better: str, low: float, high: float, direction: str
) -> None:
    assert effect(better=better, low=low, high=high).direction == direction


def test_an_effect_gives_its_interval_at_any_confidence() -> None:
    low, high = effect().interval(0.99)
    half = t_quantile(8, 0.99) * 0.02
    assert (low, high) == pytest.approx((0.9 * math.exp(-half), 0.9 * math.exp(half)))
    assert all(math.isnan(v) for v in effect(se_log=math.nan).interval(0.95))


def test_t_quantiles_are_students() -> None:
    assert t_quantile(1, 0.95) == pytest.approx(12.706, abs=1e-3)
    assert t_quantile(10, 0.95) == pytest.approx(2.228, abs=1e-3)
    assert t_quantile(1e6, 0.95) == pytest.approx(1.960, abs=1e-3)


def test_pure_workloads_recover_the_true_speedup(comparison: Comparison) -> None:
    found = {
        (e.workload, e.load.value): e
        for e in comparison.effects
        if (e.metric, e.arm, e.segment) == ("tpot_mean", "draft_model", None)
        and e.workload != "mix"
    }
    assert len(found) == 9
    for (workload, concurrency), e in found.items():
        assert 1 / e.ratio == pytest.approx(DRAFT_MODEL[workload][concurrency], rel=0.08)


def test_values_and_ratio_agree(comparison: Comparison) -> None:
    for e in comparison.effects:
        ratio = e.candidate_value / e.baseline_value
        assert e.ratio == pytest.approx(1 / ratio if e.metric == "speedup" else ratio)
        if math.isnan(e.se_log):
            assert "no interval" in e.note
            assert e.direction == "undecided"
        else:
            assert e.low < e.ratio < e.high


def test_a_tail_percentile_needs_requests_that_reach_it(comparison: Comparison) -> None:
    for e in comparison.effects:
        fewest = {"p99": 100, "p95": 20}.get(e.metric[-3:], 0)
        assert math.isnan(e.se_log) == (e.pairs < fewest)


def test_an_effect_says_what_its_error_is_made_of(comparison: Comparison) -> None:
    for e in comparison.effects:
        if math.isfinite(e.se_log):
            total = e.request_variance + e.machine_variance / e.repeats
            assert e.noise_dof >= 2
            assert e.se_log == pytest.approx(math.sqrt(total))


def test_a_mix_has_effects_for_each_segment(comparison: Comparison) -> None:
    segments = {e.segment for e in comparison.effects if e.workload == "mix"}
    assert segments == {None, "json", "prose", "copy"}
    assert {e.segment for e in comparison.effects if e.workload == "json"} == {None}


def test_comparing_is_deterministic() -> None:
    study = demo_study(demo_design(repeats=1, loads=(C4,), production_load=C4))
    assert repr(compare(study)) == repr(compare(study))  # NaN equals itself in text only


def test_order_of_the_trials_does_not_matter() -> None:
    study = demo_study(demo_design(repeats=2, loads=(C4,), production_load=C4))
    shuffled = replace(study, trials=study.trials[::-1])
    one, other = (
        {(e.metric, e.arm, e.workload, e.segment): e for e in compare(s).effects}
        for s in (study, shuffled)
    )
    assert one.keys() == other.keys()
    for key, e in one.items():
        assert (e.low, e.high) == pytest.approx((other[key].low, other[key].high), nan_ok=True)


def test_notes_own_up_to_failures_and_small_samples() -> None:
    truth = Truth(failure_share={"ngram": 0.2})
    design = demo_design(repeats=1, loads=(C1,), production_load=C1, noise_floor=False)
    found = compare(demo_study(design, truth)).effects
    p99 = next(e for e in found if (e.arm, e.metric) == ("ngram", "ttft_p99"))
    assert "failed requests: baseline 0, ngram" in p99.note
    assert "no interval: P99 needs 100 requests" in p99.note
    assert "no repeat and no A/A trial" in p99.note
    assert not p99.trial_noise_known


def test_goodput_without_a_value_is_undecided_not_zero() -> None:
    study = demo_study(demo_design(repeats=2, loads=(C16,)))
    strict = replace(study.design.slo, ttft_s=1e-6)
    hopeless = replace(study, design=replace(study.design, slo=strict))
    found = [e for e in compare(hopeless).effects if e.metric == "goodput_per_s"]
    assert found
    for e in found:
        assert math.isnan(e.ratio)
        assert e.direction == "undecided"
        assert "no request met the SLO" in e.note


def test_noise_floor_compares_the_baseline_with_itself(comparison: Comparison) -> None:
    found = [f for f in comparison.noise_floors if f.metric == "speedup"]
    assert [f.load for f in found] == [C1, C4, C16]
    for floor in found:
        assert floor.low < floor.ratio < floor.high
        assert floor.ratio == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("p50", "p99", "present"),
    [
        ((0.80, 0.90), (1.10, 1.30), True),
        ((0.80, 0.90), (0.90, 1.10), None),
        ((0.80, 0.90), (0.80, 0.95), False),
        ((1.05, 1.10), (1.10, 1.30), False),
        ((0.90, 1.10), (1.10, 1.30), None),
    ],
)
def test_signature_is_tested_not_eyeballed(
    p50: tuple[float, float], p99: tuple[float, float], present: bool | None
) -> None:
    effects = [
        effect(metric="tpot_p50", low=p50[0], high=p50[1]),
        effect(metric="tpot_p99", low=p99[0], high=p99[1]),
    ]
    (found,) = find_signatures(effects)
    assert found.present is present


def test_a_split_mix_shows_the_signature() -> None:
    split = {"json": {16: 1.8}, "prose": {16: 0.6}, "copy": {16: 1.8}}
    truth = Truth(speedup={"draft_model": split, "ngram": split})
    study = demo_study(demo_design(repeats=4, loads=(C16,), requests=64), truth)
    found = [s for s in compare(study).signatures if s.arm == "draft_model"]
    by_place = {(s.workload, s.segment, s.metric): s.present for s in found}
    assert by_place["mix", None, "tpot"] is True
    assert by_place["json", None, "tpot"] is False
    assert by_place["mix", "prose", "tpot"] is False


def test_fishers_exact_test() -> None:
    assert tail_probability(0, 50, 0, 50) == 1.0
    # All three failures on one of two equal arms: C(47, 0)... = C(50, 3) / C(100, 3).
    assert tail_probability(3, 50, 0, 50) == pytest.approx(19600 / 161700)
    assert tail_probability(30, 100, 5, 100) < 1e-4


# ---------------------------------------------------------------------------------------------
# Do the intervals cover? Studies simulated as columns, with noise of trials and of requests.

WORKLOADS = ("json", "prose", "copy")
TRUE_SPEEDUP = {"same": 1.0, "faster": 1.3}


def simulate(
    rng: np.random.Generator,
    *,
    repeats: int,
    trial_sd: float,
    request_sd: tuple[float, float, float],
    reaction_sd: float | None = None,
    shared_prompts: bool = False,
    noise_floor: bool = False,
    requests: int = 32,
) -> dict[CellKey, tuple[TrialTable, ...]]:
    """Cells at one load. A request's time per token: prompt x arm x trial x request noise.

    The arm's effect differs by prompt too, so that the choice of prompts matters, by
    ``reaction_sd`` (as much as the requests' noise where it is None).
    """
    measured: dict[CellKey, tuple[TrialTable, ...]] = {}
    for workload, sd in zip(WORKLOADS, request_sd, strict=True):
        tokens = rng.integers(20, 80, (repeats, requests)).astype(np.float64)
        hardness = rng.normal(0, 0.3, (repeats, requests))
        spread = sd if reaction_sd is None else reaction_sd
        # Centred so that the mean of exp(reaction), which a ratio of sums sees, is 1.
        reaction = {
            arm: rng.normal(-(spread**2) / 2, spread, (repeats, requests)) for arm in TRUE_SPEEDUP
        }
        names = np.arange(repeats * requests).reshape(repeats, requests)
        if shared_prompts:
            tokens, hardness = (np.repeat(a[:1], repeats, 0) for a in (tokens, hardness))
            reaction = {arm: np.repeat(a[:1], repeats, 0) for arm, a in reaction.items()}
            names = np.repeat(names[:1], repeats, 0)
        plans = [("baseline", Purpose.MEASURE), *((a, Purpose.MEASURE) for a in TRUE_SPEEDUP)]
        if noise_floor and workload == "json":
            plans.append(("baseline", Purpose.NOISE_FLOOR))
        for arm, purpose in plans:
            tables = []
            for r in range(1 if purpose is Purpose.NOISE_FLOOR else repeats):
                log = hardness[r] + rng.normal(0, trial_sd) + rng.normal(0, sd, requests)
                if arm in TRUE_SPEEDUP:
                    log += reaction[arm][r] - np.log(TRUE_SPEEDUP[arm])
                trial = Trial(f"{arm}-{workload}-{r}", arm, workload, C16, r, purpose, requests)
                tables.append(_table(trial, names[r], tokens[r], 0.02 * np.exp(log) * tokens[r]))
            measured[arm, workload, C16, purpose] = tuple(tables)
    return measured


def _table(trial: Trial, names: np.ndarray, tokens: np.ndarray, e2e_s: np.ndarray) -> TrialTable:
    yes = np.ones(len(tokens), dtype=np.bool_)
    return TrialTable(
        trial=trial,
        records=(),
        parts=(TrialPart("", 1.0, HEALTHY_CLIENT),),
        index=np.arange(len(tokens)),
        prompt_id=np.array([str(n) for n in names], dtype=np.object_),
        segment=np.full(len(tokens), trial.workload, dtype=np.object_),
        ok=yes,
        meets_slo=yes,
        ttft_s=e2e_s / 10,
        ttft_from_sent_s=e2e_s / 10,
        tpot_s=e2e_s / tokens,
        e2e_s=e2e_s,
        e2e_from_sent_s=e2e_s,
        output_tokens=tokens,
        window_tokens=tokens,
        window_s=1.0,
    )


def coverage(studies: int, **noise: object) -> tuple[float, float]:
    """Share of intervals that hold the truth, and of equal arms called better or worse."""
    rng = np.random.default_rng(20)
    held, wrong = [], []
    for _ in range(studies):
        for e in speedup_effects(simulate(rng, **noise), "baseline"):  # type: ignore[arg-type]
            held.append(e.low <= TRUE_SPEEDUP[e.arm] <= e.high)
            if e.arm == "same":
                wrong.append(e.direction != "undecided")
    return float(np.mean(held)), float(np.mean(wrong))


@pytest.mark.parametrize(
    ("studies", "noise"),
    [
        (150, {"repeats": 2, "trial_sd": 0.03, "request_sd": (0.05, 0.15, 0.05)}),
        (80, {"repeats": 2, "trial_sd": 0.0, "request_sd": (0.1, 0.1, 0.1)}),
        (80, {"repeats": 3, "trial_sd": 0.06, "request_sd": (0.02, 0.02, 0.1)}),
        (
            80,
            {
                "repeats": 4,
                "trial_sd": 0.075,
                "request_sd": (0.02, 0.02, 0.02),
                "reaction_sd": 0.3,
                "shared_prompts": True,
            },
        ),
    ],
    ids=["both", "requests-only", "trials-mostly", "shared-prompts"],
)
def test_intervals_cover_and_equal_arms_are_left_undecided(
    studies: int, noise: dict[str, object]
) -> None:
    covered, wrong = coverage(studies, **noise)
    # Without any trial noise its estimate can only err upwards: intervals are wide there.
    assert 0.92 <= covered <= (0.985 if noise["trial_sd"] else 0.995)
    assert wrong <= 0.1


def test_ignoring_trial_noise_would_not_cover() -> None:
    """What the pooled noise is for: requests alone claim far too much."""
    rng = np.random.default_rng(21)
    held = []
    for _ in range(60):
        cells_ = simulate(rng, repeats=1, trial_sd=0.06, request_sd=(0.03, 0.03, 0.03))
        held += [
            e.low <= TRUE_SPEEDUP[e.arm] <= e.high for e in speedup_effects(cells_, "baseline")
        ]
    assert np.mean(held) < 0.6


def test_one_aa_trial_makes_a_single_repeat_honest() -> None:
    covered, wrong = coverage(
        150, repeats=1, trial_sd=0.06, request_sd=(0.03, 0.03, 0.03), noise_floor=True
    )
    assert covered >= 0.92
    assert wrong <= 0.08
