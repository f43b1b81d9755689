from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis.synthetic import C4, C16, Truth, demo_design, demo_study

from specwise.analysis.cells import CellKey, TrialTable, cells
from specwise.analysis.pairs import (
    REQUEST_METRICS,
    SPEEDUP,
    Metric,
    TrialNoise,
    _machine_noise,
    _Square,
    bootstrap_variances,
    log_ratio,
    match_pairs,
    noise_blocks,
    pair_trials,
    statistic,
    trial_noise,
    trial_variances,
)
from specwise.domain import Purpose

values = st.lists(st.floats(0.01, 10.0), min_size=2, max_size=30)


@settings(deadline=None, max_examples=60)
@given(values, st.sampled_from(["mean", "p50", "p95", "p99"]), st.integers(0, 5))
def test_statistics_equal_numpy_and_ignore_missing_values(
    held: list[float], kind: str, missing: int
) -> None:
    column = np.array([*held, *[np.nan] * missing])
    found = float(statistic(column, None, kind))
    expected = np.mean(held) if kind == "mean" else np.quantile(held, int(kind[1:]) / 100)
    assert found == pytest.approx(expected)


def test_time_per_token_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    found = statistic(np.array([1.0, 10.0]), np.array([10.0, 20.0]), "ratio")
    assert float(found) == pytest.approx(11 / 30)


def test_log_ratio_is_signed_so_that_a_speedup_is_above_zero() -> None:
    slow, fast = np.array(0.2), np.array(0.1)
    assert float(log_ratio(SPEEDUP, slow, fast)) == pytest.approx(np.log(2))
    latency = Metric("ttft_mean", "ttft_s", "mean", "lower")
    assert float(log_ratio(latency, slow, fast)) == pytest.approx(-np.log(2))
    assert np.isnan(log_ratio(latency, np.array(0.0), fast))


def test_pairs_are_requests_that_ended_ok_in_both_arms() -> None:
    truth = Truth(failure_share={"draft_model": 0.2, "baseline": 0.1})
    measured = cells(demo_study(demo_design(loads=(C4,), production_load=C4), truth))
    base, arm = (
        measured[name, "json", C4, Purpose.MEASURE] for name in ("baseline", "draft_model")
    )
    pairs = pair_trials(base, arm, ("draft_model", "json", None, C4))
    assert pairs is not None
    both = sum(int((a.ok & b.ok).sum()) for a, b in zip(base, arm, strict=True))
    assert pairs.count == both < 64
    assert pairs.failed == tuple(sum(int((~t.ok).sum()) for t in side) for side in (base, arm))
    assert not pairs.shares_prompts


def test_the_bootstrap_agrees_with_the_delta_method() -> None:
    """Variance of log(sum e2e / sum tokens) differences, by hand, within Monte Carlo error."""
    measured = cells(demo_study(demo_design(repeats=8, loads=(C16,), requests=48)))
    key = ("draft_model", "json", None, C16)
    pairs = match_pairs(measured, "baseline", {})[key]
    found = bootstrap_variances(pairs, (SPEEDUP,), seed=0)["speedup"]
    e2e, tokens = pairs.columns["e2e_s"], pairs.columns["output_tokens"]
    influence = (e2e / e2e.mean(1, keepdims=True)) - (tokens / tokens.mean(1, keepdims=True))
    expected = (influence[0] - influence[1]).var(ddof=1) / pairs.count
    assert found == pytest.approx(expected, rel=0.3)


def test_the_bootstrap_is_the_same_for_the_same_seed_whatever_else_is_compared() -> None:
    measured = cells(demo_study(demo_design(repeats=1, loads=(C16,))))
    pairs = match_pairs(measured, "baseline", {})["ngram", "copy", None, C16]
    together = bootstrap_variances(pairs, REQUEST_METRICS, seed=3)
    alone = bootstrap_variances(pairs, (SPEEDUP,), seed=3)
    assert together["speedup"] == alone["speedup"]
    assert bootstrap_variances(pairs, (SPEEDUP,), seed=4) != alone


@pytest.mark.parametrize("trial_sd", [0.0, 0.05])
def test_trial_noise_is_recovered_from_repeats(trial_sd: float) -> None:
    truth = Truth(trial_sd=trial_sd, request_sd=0.01)
    measured = cells(demo_study(demo_design(repeats=12, loads=(C16,), requests=40), truth))
    found = _noise(measured)
    assert found.dof == 4 * 2 * 11 + 1
    assert found.pair_variance == pytest.approx(2 * trial_sd**2, rel=0.4, abs=1e-4)
    assert found.machine_variance == pytest.approx(2 * trial_sd**2, rel=0.4, abs=1e-4)


def test_loads_with_few_requests_do_not_hide_the_machines_noise() -> None:
    """The variance of requests is 400 times as large at one load as at the other; it is exact, so
    that only trials are uncertain. Pooled, the machine's is found as well as the better one tells.
    """
    truth, requests = 0.0009, {C4: 0.02, C16: 0.00005}
    rng = np.random.default_rng(8)
    found = []
    for _ in range(400):
        pool = [
            _Square(load, (truth + r) * float(rng.chisquare(4)), 4, r)
            for load, r in requests.items()
        ]
        found.append(_machine_noise(pool, requests[C16]))
    estimates = np.array([noise.machine_variance for noise in found])
    assert estimates.mean() == pytest.approx(truth, rel=0.1)
    # Of four degrees of freedom: 2 / 4 of the variance squared, and hardly more from the other.
    assert estimates.var() == pytest.approx(0.5 * (truth + requests[C16]) ** 2, rel=0.3)
    assert np.mean([noise.doubt for noise in found]) == pytest.approx(estimates.var(), rel=0.8)


@given(
    squares=st.lists(
        st.tuples(st.floats(0, 1e-2), st.integers(1, 30), st.floats(0, 1e-2)), min_size=1
    )
)
def test_the_machines_noise_is_the_likeliest(squares: list[tuple[float, int, float]]) -> None:
    pool = [_Square(C4, mean * dof, dof, r) for mean, dof, r in squares]
    noise = _machine_noise(pool, 1e-4)

    def misfit(m2: float) -> float:
        return sum(
            s.dof * math.log(m2 + s.request_variance + 1e-12)
            + s.total / (m2 + s.request_variance + 1e-12)
            for s in pool
        )

    at = noise.machine_variance
    assert at >= 0
    assert misfit(at) <= min(misfit(at * 1.05 + 1e-9), misfit(at / 1.05)) + 1e-2
    assert noise.dof == sum(s.dof for s in pool)
    assert 0 <= noise.pair_variance <= at + 1.001e-4


def test_one_repeat_leaves_the_aa_trial_or_nothing() -> None:
    with_aa = cells(demo_study(demo_design(repeats=1, loads=(C16,))))
    without = cells(demo_study(demo_design(repeats=1, loads=(C16,), noise_floor=False)))
    assert _noise(with_aa).dof == 1
    assert _noise(without).dof == 0


def test_a_tail_is_known_worse_from_one_trial_than_from_all() -> None:
    measured = cells(demo_study(demo_design(repeats=4, loads=(C16,), requests=40)))
    pairs = match_pairs(measured, "baseline", {})["draft_model", "json", None, C16]
    whole = bootstrap_variances(pairs, REQUEST_METRICS, seed=0)
    trial = trial_variances(pairs, REQUEST_METRICS, seed=0)
    assert trial["speedup"] == pytest.approx(4 * whole["speedup"], rel=0.3)
    assert all(trial[m.name] > whole[m.name] for m in REQUEST_METRICS)


def _noise(measured: dict[CellKey, tuple[TrialTable, ...]]) -> TrialNoise:
    matched = match_pairs(measured, "baseline", {})
    of_trials = {k: trial_variances(p, (SPEEDUP,), seed=0) for k, p in matched.items()}
    return trial_noise(noise_blocks(measured, "baseline"), SPEEDUP, of_trials)[C16]
