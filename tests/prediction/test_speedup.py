from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.prediction import speedup as s
from specwise.prediction.truth import LinearCosts

ALPHA = st.floats(0.0, 1.0)
K = st.integers(1, 8)
BASELINE = LinearCosts(target_pass_s=0.010)
FREE_VERIFY = LinearCosts(target_pass_s=0.010, draft_pass_s=0.001, speculates=True)
AT = s.Point(batch=1, context_tokens=100)


@pytest.mark.parametrize(
    ("alpha", "k", "cost", "speedup"),
    [(0.75, 7, 0.02, 3.2), (0.62, 7, 0.02, 2.3), (0.80, 7, 0.04, 3.3), (0.82, 7, 0.11, 2.5)],
)
def test_leviathans_table(alpha: float, k: int, cost: float, speedup: float) -> None:
    """Leviathan et al. 2023, table 2, expected improvements."""
    assert s.leviathan_speedup(alpha, k, cost) == pytest.approx(speedup, abs=0.1)


@given(ALPHA, K)
def test_equal_positions_are_equation_1(alpha: float, k: int) -> None:
    assert s.tokens_per_step([alpha] * k) == pytest.approx(s.constant_tokens_per_step(alpha, k))


@given(st.floats(0.0, 0.999), K)
def test_the_alpha_of_a_length_gives_the_length(alpha: float, k: int) -> None:
    length = s.constant_tokens_per_step(alpha, k)
    assert s.constant_tokens_per_step(s.constant_alpha(length, k), k) == pytest.approx(length)


def test_an_impossible_length_is_refused() -> None:
    for length in (0.9, 4.1):
        with pytest.raises(ValueError, match="impossible"):
            s.constant_alpha(length, 3)


@given(st.lists(ALPHA, min_size=1, max_size=8))
def test_tokens_lie_between_one_and_all(conditional: list[float]) -> None:
    tokens = s.tokens_per_step(conditional)
    assert 1 <= tokens <= len(conditional) + 1
    assert s.length_of_rate(s.rate_of_length(tokens, 4), 4) == pytest.approx(tokens)


@given(ALPHA, K)
def test_v0_counts_more_than_v1(alpha: float, k: int) -> None:
    """V0's rate also counted positions behind a rejection."""
    assert s.v1_rate_of_v0_rate(alpha, k) <= alpha + 1e-12
    assert s.v1_rate_of_v0_rate(alpha, 1) == pytest.approx(alpha)


def test_v0s_system_efficiency_is_a_length() -> None:
    """All accepted is efficiency 1; nothing accepted emits one of k + 1."""
    assert s.length_of_v0_efficiency(1.0, 4) == 5
    assert s.length_of_v0_efficiency(1 / 5, 4) == 1


@given(st.integers(0, 2**32 - 1), st.integers(2, 20))
def test_sampled_drafts_are_accepted_by_the_overlap(seed: int, words: int) -> None:
    """Against the definition: E over x ~ q of min(1, p(x) / q(x))."""
    rng = np.random.default_rng(seed)
    target, draft = rng.dirichlet(np.ones(words)), rng.dirichlet(np.ones(words))
    expected = sum(q * min(1.0, p / q) for p, q in zip(target, draft, strict=True) if q > 0)
    assert s.probabilistic_acceptance(target, draft) == pytest.approx(expected)
    greedy = s.greedy_draft_acceptance(target, draft)
    assert greedy == target[draft.argmax()]
    assert s.probabilistic_acceptance(target, target) == pytest.approx(1.0)


def test_a_lookup_is_a_mixture_of_hits_and_misses() -> None:
    """By simulation: hits accept 0.9 a position, misses draft nothing."""
    rng = np.random.default_rng(1)
    hits = rng.random(200_000) < 0.3
    runs = (np.cumprod(rng.random((200_000, 3)) < 0.9, axis=1).sum(axis=1)) * hits
    conditional = s.lookup_acceptance(0.3, (0.9, 0.9, 0.9))
    assert s.tokens_per_step(conditional) == pytest.approx(1 + runs.mean(), abs=0.01)


@given(st.floats(0.0, 1.0), K, st.floats(0.001, 0.5))
def test_with_free_verification_it_is_theorem_3_8(alpha: float, k: int, cost: float) -> None:
    costs = LinearCosts(target_pass_s=0.010, draft_pass_s=0.010 * cost, speculates=True)
    found = s.step_speedup(costs, BASELINE, at=AT, conditional=[alpha] * k)
    assert found == pytest.approx(s.leviathan_speedup(alpha, k, cost))


@given(K, st.floats(0.01, 0.4))
def test_break_even_acceptance_wins_nothing_and_more_wins(k: int, cost: float) -> None:
    costs = LinearCosts(target_pass_s=0.010, draft_pass_s=0.010 * cost, speculates=True)
    alpha = s.break_even_alpha(costs, BASELINE, at=AT, k=k)
    if alpha is None:
        assert s.step_speedup(costs, BASELINE, at=AT, conditional=[1.0] * k) < 1
        return
    assert s.leviathan_speedup(alpha, k, cost) == pytest.approx(1, abs=1e-6)
    if alpha < 0.99:
        assert s.leviathan_speedup(alpha + 0.01, k, cost) > 1


def test_corollary_3_9() -> None:
    """If a > c some k helps (k = 1 does), and if a < c none does."""
    for alpha, cost in ((0.3, 0.25), (0.2, 0.25)):
        costs = LinearCosts(target_pass_s=0.010, draft_pass_s=0.010 * cost, speculates=True)
        k, speedup = s.best_k(costs, BASELINE, at=AT, conditional=lambda _i, a=alpha: a)
        assert (k > 0) == (alpha > cost)
        assert (speedup > 1) == (alpha > cost)


def test_the_best_k_is_the_best() -> None:
    k, speedup = s.best_k(FREE_VERIFY, BASELINE, at=AT, conditional=lambda _i: 0.8)
    speedups = [s.leviathan_speedup(0.8, n, 0.1) for n in range(1, 9)]
    assert speedup == pytest.approx(max(speedups))
    assert k == 1 + speedups.index(max(speedups))


@given(st.floats(1.01, 3.9), st.integers(1, 128))
def test_acceptance_inferred_from_a_speedup_gives_the_speedup(length: float, batch: int) -> None:
    work = s.StaticBatch(batch, prompt_tokens=300, output_tokens=200)
    costs = LinearCosts(0.010, 1e-5, 1e-8, 0.001, speculates=True)
    baseline = LinearCosts(0.010, 1e-5, 1e-8)
    speedup = work.speedup(costs, baseline, k=3, length=length)
    assert work.length_for(costs, baseline, k=3, speedup=speedup) == pytest.approx(length)
    with pytest.raises(ValueError, match="no acceptance"):
        work.length_for(costs, baseline, k=3, speedup=1e9)


def test_a_static_batch_without_prompts_is_the_step_speedup() -> None:
    work = s.StaticBatch(1, prompt_tokens=0, output_tokens=100_000)
    found = work.speedup(FREE_VERIFY, BASELINE, k=3, length=2.5)
    assert found == pytest.approx(2.5 / 1.3, rel=1e-3)
    assert math.isfinite(found)


def test_copies_of_one_request_draft_together_or_not_at_all() -> None:
    """Half of the steps verify, half decode plainly: against stepping through them one by one."""
    costs = LinearCosts(0.010, 1e-4, 1e-8, speculates=True)
    work = s.StaticBatch(16, prompt_tokens=0, output_tokens=1001, drafted_share=0.5)
    steps = [s.Point(16, 500.5, share).step_s(costs, 3) for share in (1.0, 0.0)] * 250
    assert work.decode_s(costs, 3, length=2.0) == pytest.approx(sum(steps))


def test_kinds_of_requests_at_once_are_those_one_by_one() -> None:
    costs = LinearCosts(0.010, 1e-5, 1e-8, 0.001, speculates=True)
    prompts, outputs, lengths = np.array([[50, 900], [100, 300], [1.5, 2.5]])
    together = s.StaticBatch(8, prompts, outputs).tokens_per_s(costs, 3, lengths)
    alone = [
        s.StaticBatch(8, p, o).tokens_per_s(costs, 3, n)
        for p, o, n in zip(prompts, outputs, lengths, strict=True)
    ]
    assert together == pytest.approx(alone)


def test_a_draft_models_range_brackets_its_break_even() -> None:
    """More acceptance gives more; within the range the sign changes where break-even says."""
    from specwise.facts.checkpoint import from_table
    from specwise.facts.hardware import find_gpu

    target, draft = (from_table(f"meta-llama/Llama-3.1-{n}-Instruct") for n in ("70B", "8B"))
    alone, many = s.draft_range(target, draft, find_gpu("h100"), gpus=4)
    assert (alone.batch, many.batch) == (1, 64)
    for found in (alone, many):
        assert found.low < found.high
        assert found.break_even is not None
        assert (found.low > 1) == (found.break_even < s.DRAFT_ACCEPTANCE[0])
        assert (found.high > 1) == (found.break_even < s.DRAFT_ACCEPTANCE[1])
    assert many.high < alone.high
