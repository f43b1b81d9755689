"""What speculation gives, in closed form (requirements A7, B5).

Notation of the glossary: u_i is the share of verify steps that accept the first i drafts
(unconditional), a_i = u_i / u_(i-1) the conditional acceptance, k the draft length. A verify step
emits 1 + sum u_i tokens: the accepted drafts and one token of the target's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specwise.domain import Checkpoint, Gpu, Speculation
from specwise.prediction.costs import StepCosts, StepShape, roofline

Floats = NDArray[np.float64]


# ---------------------------------------------------------------------------------------------
# Acceptance and its conversions


def unconditional(conditional: Sequence[float]) -> tuple[float, ...]:
    """u_i = a_1 a_2 ... a_i."""
    return tuple(float(u) for u in np.cumprod(np.asarray(conditional, dtype=float)))


def tokens_per_step(conditional: Sequence[float]) -> float:
    """1 + sum u_i: tokens that a verify step emits on average."""
    return 1.0 + math.fsum(unconditional(conditional))


def constant_tokens_per_step(alpha: float, k: int) -> float:
    """(1 - a^(k+1)) / (1 - a): tokens per step where every position accepts alike.

    Leviathan et al. 2023 (arXiv 2211.17192), eq. 1; k + 1 at a = 1.
    """
    return float(k + 1) if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)


def leviathan_speedup(alpha: float, k: int, cost_ratio: float) -> float:
    """(1 - a^(k+1)) / ((1 - a)(k c + 1)), c the draft's pass in passes of the target.

    Leviathan et al. 2023, theorem 3.8. Holds while verifying k + 1 tokens costs no more than one:
    the memory-bound regime. `step_speedup` has no such limit.
    """
    return constant_tokens_per_step(alpha, k) / (k * cost_ratio + 1)


def constant_alpha(length: float, k: int) -> float:
    """The a whose ``length`` tokens per step (eq. 1) would be; 0 to 1.

    Raises ValueError for a length outside 1 to k + 1.
    """
    if not 1 <= length <= k + 1:
        raise ValueError(f"a length of {length:g} is impossible with k = {k}")
    if length in (1, k + 1):
        return 0.0 if length == 1 else 1.0
    low, high = 0.0, 1.0
    for _ in range(60):  # by halves: tokens rise with a, and scipy would take longer to load
        middle = (low + high) / 2
        low, high = (
            (middle, high) if constant_tokens_per_step(middle, k) < length else (low, middle)
        )
    return (low + high) / 2


def rate_of_length(length: float, k: int) -> float:
    """vLLM V1's acceptance rate, accepted / drafted = (length - 1) / k."""
    return (length - 1) / k


def length_of_rate(rate: float, k: int) -> float:
    """1 + k x rate, the inverse of `rate_of_length`."""
    return 1 + k * rate


def length_of_v0_efficiency(system_efficiency: float, k: int) -> float:
    """V0's system efficiency is emitted / ((drafted / k)(k + 1)): length = efficiency (k + 1)."""
    return system_efficiency * (k + 1)


def v1_rate_of_v0_rate(rate: float, k: int) -> float:
    """V1's rate where V0 would say ``rate``, if every position accepts alike.

    V0 counted a position as accepted even when the ones before it were rejected, so its rate is
    the conditional acceptance a itself; V1's is (a + a^2 + ... + a^k) / k, which is lower.
    """
    return rate_of_length(constant_tokens_per_step(rate, k), k)


def probabilistic_acceptance(target: Floats, draft: Floats) -> float:
    """sum of min(p, q): the chance that a draft sampled from q is accepted (Leviathan, 3.3)."""
    return float(np.minimum(target, draft).sum())


def greedy_draft_acceptance(target: Floats, draft: Floats) -> float:
    """p at the draft's most likely token: what vLLM's default, a one-hot draft, is accepted with.

    vLLM v1/sample/rejection_sampler.py with draft_sample_method "greedy": q is 1 at its argmax, so
    min(p, q) summed is p there.
    """
    return float(target[int(np.argmax(draft))])


def lookup_acceptance(hit: float, conditional: Sequence[float]) -> tuple[float, ...]:
    """Conditional acceptance of an n-gram lookup: it finds something (``hit``) or drafts nothing.

    Given a hit position i accepts with ``conditional[i]``; u_i = hit x c_1 ... c_i, so only the
    first conditional changes. One alpha cannot describe this: c_1 is small, the others large.
    """
    first, *rest = conditional
    return (hit * first, *rest)


# ---------------------------------------------------------------------------------------------
# Acceptance against cost


def break_even_length(costs: StepCosts, baseline: StepCosts, *, at: Point, k: int) -> float:
    """Tokens per step at which speculation neither wins nor loses: the ratio of the step times."""
    return float(at.step_s(costs, k) / at.step_s(baseline, None))


def break_even_alpha(costs: StepCosts, baseline: StepCosts, *, at: Point, k: int) -> float | None:
    """The conditional acceptance, alike at each position, at which nothing is won (req B5).

    None where even accepting everything loses.
    """
    needed = break_even_length(costs, baseline, at=at, k=k)
    if needed > k + 1:
        return None
    return constant_alpha(max(needed, 1.0), k)


def step_speedup(
    costs: StepCosts, baseline: StepCosts, *, at: Point, conditional: Sequence[float]
) -> float:
    """Tokens per step over the ratio of step times: the speedup of decoding, any regime."""
    k = len(conditional)
    return tokens_per_step(conditional) / break_even_length(costs, baseline, at=at, k=k)


def best_k(
    costs: StepCosts,
    baseline: StepCosts,
    *,
    at: Point,
    conditional: Callable[[int], float],
    largest: int = 8,
) -> tuple[int, float]:
    """(k, speedup) with the largest speedup among 0 to ``largest``; k = 0 is off, speedup 1.

    ``conditional(i)`` is the acceptance of position i, from 1.
    """
    best = (0, 1.0)
    for k in range(1, largest + 1):
        positions = [conditional(i) for i in range(1, k + 1)]
        speedup = step_speedup(costs, baseline, at=at, conditional=positions)
        if speedup > best[1]:
            best = (k, speedup)
    return best


@dataclass(frozen=True, slots=True)
class Point:
    """A moment of decoding: ``batch`` requests with ``context_tokens`` cached each.

    ``drafted_share`` is the share of requests that have drafts to verify: below 1 for lookups,
    which draft nothing where they find nothing.
    """

    batch: Any
    context_tokens: Any
    drafted_share: Any = 1.0

    def step_s(self, costs: StepCosts, k: int | None) -> Any:
        """Seconds of one step; ``k`` None decodes without drafts."""
        drafts = 0 if k is None else k * self.drafted_share
        return costs.step_s(
            StepShape(
                tokens=self.batch * (1 + drafts),
                context_tokens=self.batch * self.context_tokens,
                requests=self.batch,
                k=0 if k is None else k,
            )
        )


@dataclass(frozen=True, slots=True)
class StaticBatch:
    """``batch`` copies of one request that run in step: how throughput is often published.

    ``drafted_share`` is the share of steps in which there are drafts, for all copies or for none:
    below 1 for lookups. Fields may be arrays, one element a kind of request.
    """

    batch: Any
    prompt_tokens: Any
    output_tokens: Any
    drafted_share: Any = 1.0

    def prefill_s(self, costs: StepCosts) -> Any:
        """Seconds until the first tokens: all prompts' tokens through target and drafter.

        The cost of attending inside a prompt is left out; prompts of some thousand tokens change
        little by it.
        """
        tokens = self.batch * self.prompt_tokens
        return costs.step_s(StepShape(tokens, 0.0 * tokens, self.batch + 0.0 * tokens, 0))

    def decode_s(self, costs: StepCosts, k: int | None, length: Any) -> Any:
        """Seconds of all decoding steps, at the mean context."""
        steps = (self.output_tokens - 1) / length
        context = self.prompt_tokens + self.output_tokens / 2
        batch = self.batch + 0.0 * context
        if k is None:
            return steps * Point(batch, context).step_s(costs, None)
        with_drafts, without = (
            Point(batch, context, share).step_s(costs, k) for share in (1.0, 0.0)
        )
        return steps * (self.drafted_share * with_drafts + (1 - self.drafted_share) * without)

    def tokens_per_s(self, costs: StepCosts, k: int | None, length: Any = 1.0) -> Any:
        """Output tokens per second; ``k`` None without speculation."""
        elapsed_s = self.prefill_s(costs) + self.decode_s(costs, k, length)
        return self.batch * self.output_tokens / elapsed_s

    def speedup(self, costs: StepCosts, baseline: StepCosts, *, k: int, length: Any) -> Any:
        """Throughput with ``length`` tokens per verify step over throughput without speculation."""
        return self.tokens_per_s(costs, k, length) / self.tokens_per_s(baseline, None)

    def length_for(self, costs: StepCosts, baseline: StepCosts, *, k: int, speedup: float) -> float:
        """The length at which `speedup` is ``speedup``: acceptance inferred from a measurement.

        Raises ValueError for a speedup that no length can give.
        """
        before = self.prefill_s(baseline) + self.decode_s(baseline, None, 1.0)
        left_s = before / speedup - self.prefill_s(costs)
        length = self.decode_s(costs, k, 1.0) / left_s if left_s > 0 else math.inf
        if not 0 < length < math.inf:
            raise ValueError(f"no acceptance gives a speedup of {speedup:g}")
        return float(length)


@dataclass(frozen=True, slots=True)
class DraftRange:
    """What a draft model may give at a batch: decode speedup over a range of acceptance.

    ``low`` and ``high`` are at the acceptances of `DRAFT_ACCEPTANCE`, alike at every position;
    ``break_even`` is the one at which nothing is won, None where even 1 would not do.
    """

    batch: int
    low: float
    high: float
    break_even: float | None


DRAFT_ACCEPTANCE = (0.5, 0.8)


def draft_range(
    target: Checkpoint, draft: Checkpoint, gpu: Gpu, *, gpus: int = 1, k: int = 3
) -> tuple[DraftRange, ...]:
    """Predicted decode speedup of a draft model at 1 and 64 requests of 1,000 tokens."""
    speculation = Speculation("draft_model", k)
    baseline = roofline(target, gpu, tensor_parallel=gpus)
    costs = roofline(target, gpu, tensor_parallel=gpus, speculation=speculation, draft=draft)
    found = []
    for batch in (1, 64):
        at = Point(batch, 1000)
        low, high = (
            step_speedup(costs, baseline, at=at, conditional=[a] * k) for a in DRAFT_ACCEPTANCE
        )
        needed = break_even_alpha(costs, baseline, at=at, k=k)
        found.append(DraftRange(batch, low, high, needed))
    return tuple(found)
