"""What every arm of a sweep is likely to give in every cell, from the few trials run so far.

Costs are fitted to the steps of those trials, acceptance is read from their requests, and a
request's time follows in closed form, so that a thousand cells take no longer than one. Every
figure is a ratio to the baseline: what the form leaves out (the last requests of a trial, a queue)
it leaves out on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from specwise.analysis.acceptance import counted_by_server
from specwise.analysis.cells import Cells, TrialTable
from specwise.analysis.extrapolation import counted_acceptance, pooled_conditional
from specwise.analysis.steps import LOOKUPS, drafted_share, observed_steps
from specwise.domain import (
    AcceptanceCounts,
    Arm,
    LoadPoint,
    Loop,
    Outcome,
    Purpose,
    RequestRecord,
    Slo,
    Speculation,
    StudyDesign,
    Workload,
)
from specwise.errors import InputError
from specwise.prediction.costs import StepCosts, StepShape
from specwise.prediction.fit import Fit, ObservedStep, fit_methods
from specwise.prediction.forecast import Prior
from specwise.prediction.speedup import Point, tokens_per_step

Known = Literal["itself", "its method", "nothing"]
ArmCell = tuple[str, str, LoadPoint]

_MOST_REQUESTS = 256.0  # of a batch: vLLM's default max_num_seqs


@dataclass(frozen=True, slots=True)
class SweepForecast:
    """``log_gain[arm, workload, load]`` is log(goodput / the baseline's); unpredictable arms are
    left out. ``rests_on`` says of every family what was measured of it: a forecast that rests on
    another family of the same method has borrowed its acceptance."""

    log_gain: Mapping[ArmCell, float]
    rests_on: Mapping[str, Known]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Mean (prompt, output) tokens of a segment's requests; the prompt without what is cached."""

    computed: float
    prompt: float
    output: float


@dataclass(frozen=True, slots=True)
class _Drafting:
    """One arm's acceptance of a segment: the prior's positions count misses of a lookup as well."""

    prior: Prior
    share: float


def forecast_sweep(
    design: StudyDesign, measured: Cells, families: Mapping[str, Sequence[str]]
) -> SweepForecast:
    """The forecast from the complete trials in ``measured``; ``families`` are arms by family.

    Empty until a few kinds of steps of the baseline and of a speculating arm have been seen. Pure
    and deterministic.
    """
    by_arm = _by_arm(measured)
    baseline = design.arms[0]
    family_of = {arm: family for family, arms in families.items() for arm in arms}
    fits = _fits(design, by_arm, family_of)
    sizes = _sizes([table for tables in by_arm.values() for table in tables])
    if not fits or not sizes:
        return SweepForecast({}, dict.fromkeys(families, "nothing"))
    accepted = {
        family: _acceptance(design, [a for a in arms if a in by_arm], by_arm)
        for family, arms in families.items()
    }
    found: dict[ArmCell, float] = {}
    rests_on: dict[str, Known] = {}
    for family, arms in families.items():
        method = _speculation(design.arm(arms[0])).method
        own, rests_on[family] = _borrowed(design, family, families, accepted)
        if method not in fits or not own:
            rests_on[family] = "nothing"
            continue
        fit = fits[method]
        for workload in design.workloads:
            if any(name not in sizes or name not in own for name, _ in workload.shares):
                continue
            for load in design.loads:
                base = measured.get((baseline.name, workload.name, load, Purpose.MEASURE), ())
                plain = _Serving(fit.baseline, None, workload, sizes, {})
                for arm in arms:
                    serving = _Serving(
                        fit.candidate, _speculation(design.arm(arm)), workload, sizes, own
                    )
                    batches = [_batch(s, load, _requests(design, load)) for s in (plain, serving)]
                    gain = math.log(plain.request_s(batches[0]) / serving.request_s(batches[1]))
                    gain += _attainment_gain(base, design.slo, (plain, serving), batches)
                    found[arm, workload.name, load] = gain
    return SweepForecast(found, rests_on)


# ---------------------------------------------------------------------------------------------
# A request's time in closed form


@dataclass(frozen=True, slots=True)
class _Serving:
    """One arm that serves one workload.

    With b requests in flight a step takes S = step(b (1 + drafts)) and computing a prompt on the
    side adds P = step(b (1 + drafts) + prompt) - S. A request waits for its own prompt and, while
    it lives, for those of the b - 1 others that come in as others leave:

        request = S + b P + (n - 1) / tau S,

    with n output tokens at tau tokens a verify step (theory of continuous batching in its steady
    state; a trial's ramp is left out).
    """

    costs: StepCosts
    speculation: Speculation | None
    workload: Workload
    sizes: Mapping[str, _Sizes]
    drafting: Mapping[str, _Drafting]

    def request_s(self, batch: float) -> float:
        """Mean seconds of a request with ``batch`` in flight."""
        ttft_s, step_s = self.ttft_s(batch), self.step_s(batch)
        return ttft_s + math.fsum(
            share * (self.sizes[name].output - 1) / self.length(name, batch) * step_s
            for name, share in self.workload.shares
        )

    def ttft_s(self, batch: float) -> float:
        """S + b P."""
        shape = self._shape(batch)
        computed = self._mean({name: size.computed for name, size in self.sizes.items()})
        with_prompt = replace(shape, tokens=shape.tokens + computed)
        step_s = float(self.costs.step_s(shape))
        return step_s + batch * max(float(self.costs.step_s(with_prompt)) - step_s, 0.0)

    def step_s(self, batch: float) -> float:
        """S."""
        return float(self.costs.step_s(self._shape(batch)))

    def length(self, segment: str, batch: float) -> float:
        """tau: tokens a verify step of a request of ``segment``."""
        k = self._k(batch)
        return tokens_per_step(self.drafting[segment].prior.positions(k)) if k else 1.0

    def _k(self, batch: float) -> int:
        return 0 if self.speculation is None else k_at(self.speculation, round(batch))

    def _shape(self, batch: float) -> StepShape:
        k = self._k(batch)
        share = self._mean({n: d.share for n, d in self.drafting.items()}) if k else 1.0
        context = self._mean({n: s.prompt + s.output / 2 for n, s in self.sizes.items()})
        at = Point(batch, context, share)
        return StepShape(
            tokens=at.batch * (1 + k * share),
            context_tokens=at.batch * at.context_tokens,
            requests=at.batch,
            k=k,
        )

    def _mean(self, of: Mapping[str, float]) -> float:
        return math.fsum(share * of[name] for name, share in self.workload.shares)


def k_at(speculation: Speculation, batch: int) -> int:
    """The draft length at a batch size: the schedule's, which carries on over gaps, else k."""
    if not speculation.schedule:
        return speculation.k
    rows = [row for row in sorted(speculation.schedule) if row[0] <= batch]
    return rows[-1][2] if rows else speculation.k


def _batch(serving: _Serving, load: LoadPoint, requests: int) -> float:
    """Requests in flight: the clients, or by Little's law b = rate x request(b)."""
    if load.loop is Loop.CLOSED:
        return float(min(load.value, requests))
    batch = 1.0
    for _ in range(60):  # request(b) is concave or nearly so: damped steps settle
        following = min(max(load.value * serving.request_s(batch), 1.0), _MOST_REQUESTS)
        batch = 0.5 * (batch + following)
    return batch


def _requests(design: StudyDesign, load: LoadPoint) -> int:
    return next(trial.requests for trial in design.trials if trial.load == load)


def _attainment_gain(
    base: Sequence[TrialTable],
    slo: Slo,
    servings: tuple[_Serving, _Serving],
    batches: Sequence[float],
) -> float:
    """log of the share that would meet the SLO over the share that does on the baseline.

    The baseline's own requests, each with its TTFT and TPOT scaled as the closed form says.
    """
    rows = [t for t in base if t.ok.any()]
    if not rows or (slo.ttft_s is None and slo.tpot_s is None and slo.e2e_s is None):
        return 0.0
    plain, arm = servings
    ttft = arm.ttft_s(batches[1]) / plain.ttft_s(batches[0])
    step = arm.step_s(batches[1]) / plain.step_s(batches[0])
    meets, of = 0, 0
    for table in rows:
        lengths = np.array(
            [arm.length(str(n), batches[1]) if n in arm.drafting else 1.0 for n in table.segment]
        )
        ttft_s, tpot_s = table.ttft_s * ttft, np.nan_to_num(table.tpot_s) * step / lengths
        e2e_s = ttft_s + tpot_s * np.maximum(table.output_tokens - 1, 0)
        good = table.ok.copy()
        for values, limit in ((ttft_s, slo.ttft_s), (tpot_s, slo.tpot_s), (e2e_s, slo.e2e_s)):
            if limit is not None:
                good &= np.nan_to_num(values, nan=math.inf) <= limit
        meets, of = meets + int(good.sum()), of + len(good)
    held = sum(int(t.meets_slo.sum()) for t in rows)
    return math.log(max(meets, 0.5) / max(held, 0.5)) if of else 0.0


# ---------------------------------------------------------------------------------------------
# What the trials say


def _speculation(arm: Arm) -> Speculation:
    assert arm.speculation is not None  # noqa: S101 - families are of speculating arms
    return arm.speculation


def _by_arm(measured: Cells) -> dict[str, list[TrialTable]]:
    found: dict[str, list[TrialTable]] = {}
    for (arm, _, _, _), tables in measured.items():
        found.setdefault(arm, []).extend(tables)
    return found


def _fits(
    design: StudyDesign, by_arm: Mapping[str, Sequence[TrialTable]], family_of: Mapping[str, str]
) -> dict[str, Fit]:
    """Step costs by method; empty while there are too few different steps."""
    plain = [s for t in by_arm.get(design.arms[0].name, ()) for s in observed_steps(t, None)]
    steps: dict[str, list[ObservedStep]] = {}
    for arm in family_of:
        speculation = _speculation(design.arm(arm))
        if arm in by_arm and not speculation.schedule:
            own = [s for t in by_arm[arm] for s in observed_steps(t, speculation)]
            if own:
                steps.setdefault(speculation.method, []).extend(own)
    try:
        return fit_methods(plain, steps, about={"study": design.name}) if steps else {}
    except InputError:
        return {}


def _sizes(tables: Sequence[TrialTable]) -> dict[str, _Sizes]:
    held: dict[str, list[tuple[int, int, int]]] = {}
    for record in (r for t in tables for r in t.records if r.outcome is Outcome.OK):
        if record.prompt_tokens and record.output_tokens:
            cached = record.cached_tokens or 0
            size = (record.prompt_tokens - cached, record.prompt_tokens, record.output_tokens)
            held.setdefault(record.segment, []).append(size)
    return {
        name: _Sizes(*(float(mean) for mean in np.mean(sizes, axis=0)))
        for name, sizes in held.items()
    }


def _acceptance(
    design: StudyDesign, arms: Sequence[str], by_arm: Mapping[str, Sequence[TrialTable]]
) -> dict[str, _Drafting]:
    """By segment, over all loads and draft lengths of one family: neither changes acceptance."""
    found = {}
    for segment in design.segments:
        counted: list[tuple[int, AcceptanceCounts]] = []
        looked_up: list[RequestRecord] = []
        for arm in arms:
            speculation = _speculation(design.arm(arm))
            own = [
                r
                for t in by_arm[arm]
                for r in t.records
                if r.segment == segment.name and r.outcome is Outcome.OK
            ]
            counts = counted_acceptance(own)
            if counts is None:
                pure = [t for t in by_arm[arm] if t.trial.workload == segment.name]
                counts = counted_by_server(pure) if pure else None
            if counts is not None and counts.steps:
                counted.append((speculation.k, counts))
                looked_up += own if speculation.method in LOOKUPS else []
        if counted:
            share = drafted_share(looked_up)
            first, *rest = pooled_conditional(counted)
            found[segment.name] = _Drafting(Prior((share * first, *rest), share, "measured"), share)
    return found


def _borrowed(
    design: StudyDesign,
    family: str,
    families: Mapping[str, Sequence[str]],
    accepted: Mapping[str, Mapping[str, _Drafting]],
) -> tuple[dict[str, _Drafting], Known]:
    """A family's acceptance by segment, or that of the first of its method that was measured."""
    if accepted[family]:
        mean = next(iter(accepted[family].values()))
        return {s.name: accepted[family].get(s.name, mean) for s in design.segments}, "itself"
    method = _speculation(design.arm(families[family][0])).method
    draft = _speculation(design.arm(families[family][0])).draft
    for other, arms in families.items():
        of = _speculation(design.arm(arms[0]))
        if accepted[other] and (of.method, of.draft) == (method, draft):
            mean = next(iter(accepted[other].values()))
            return {
                s.name: accepted[other].get(s.name, mean) for s in design.segments
            }, "its method"
    return {}, "nothing"
