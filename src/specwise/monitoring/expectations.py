"""What a study says that production should look like: the yardstick of watch, alerts, dashboard.

Everything is the chosen arm's own measurement at the study's production load. Where a rule of thumb
takes the place of a measurement that the study does not have, `Expectations` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from specwise.analysis.acceptance import break_even_rate
from specwise.analysis.latency import Percentiles
from specwise.decision.assessment import Assessment
from specwise.decision.verdict import Decision
from specwise.domain import LoadPoint, Loop, Outcome, Purpose, RequestRecord
from specwise.errors import InputError

MEANINGFUL_DROP = 0.05
"""A fall of acceptance by more than this is acted upon (req D2: five percentage points)."""

UNHEALTHY_RATE = 0.5
HEALTHY_RATE = 0.7
"""The article's classes for the server's own counters (req H1); rules of thumb."""

TTFT_SLACK = 1.25
"""TTFT may be a quarter above the study's mean before it counts as a regression."""

FULL_KV_USE = 0.9
"""Preemptions beside a KV use above this mean that the draft's memory is missing."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How acceptance differs from request to request, over ``requests``.

    ``p10`` is of the requests' own rates, ``drafted_tokens`` the mean number of drafts of one.
    ``deviation`` is what one request adds to the noise of a rate over many: the rate over n
    requests, sum(accepted) / sum(drafted), has the standard error deviation / sqrt(n), where

        deviation^2 = mean((accepted_i - rate drafted_i)^2) / mean(drafted_i)^2

    (ratio estimator; Cochran, Sampling Techniques, 1977, eq. 6.4), so that requests of uneven
    length count for what they weigh.
    """

    requests: int
    deviation: float
    p10: float
    drafted_tokens: float


@dataclass(frozen=True, slots=True)
class SegmentExpectation:
    """One segment as it was measured at the production load, inside the mix where there is one.

    ``temperature`` is the segment's own; ``rate`` accepted / drafted tokens.
    """

    segment: str
    temperature: float
    rate: float
    spread: Spread | None


@dataclass(frozen=True, slots=True)
class Expectations:
    """What the study measured for ``arm`` at ``production_load``; None is "not measured".

    ``break_even`` is the acceptance rate at which the arm's TPOT would equal the baseline's at
    production's load (req B5); None where the study cannot tell or no rate could reach it.
    ``crossover_running`` is the number of running requests from which speculation stops paying,
    None where the study found no crossover. Latencies are from the intended time of a request.
    A schedule may draft nothing at the study's production load: ``production_load`` is then the
    heaviest lighter load at which it drafts, and all figures are from there.
    """

    study: str
    arm: str
    decision: Decision
    k: int
    production_load: LoadPoint
    rate: float
    length: float
    spread: Spread | None
    segments: tuple[SegmentExpectation, ...]
    break_even: float | None
    ttft_s: Percentiles
    tpot_s: Percentiles
    baseline_ttft_s: Percentiles
    baseline_tpot_s: Percentiles
    running: float | None
    crossover_running: float | None
    kv_use_max: float | None

    @property
    def low_rate(self) -> float:
        """The rate below which speculation is unhealthy: measured break-even, else 0.5."""
        return UNHEALTHY_RATE if self.break_even is None else self.break_even

    @property
    def drifted_rate(self) -> float:
        """The rate below which acceptance is no longer the study's."""
        return self.rate - MEANINGFUL_DROP

    @property
    def ttft_limit_s(self) -> float:
        """The mean TTFT above which first tokens come later than measured, in seconds."""
        return self.ttft_s.mean * TTFT_SLACK

    def segment_floor(self, segment: SegmentExpectation) -> float:
        """The rate below which one segment's acceptance is no longer the study's."""
        return segment.rate - MEANINGFUL_DROP


def expectations(assessment: Assessment, *, arm: str | None = None) -> Expectations:
    """What ``assessment`` says of ``arm``, by default the verdict's, else the first candidate.

    Raises InputError when the study has no such arm, or did not measure its acceptance and
    latency at the production load.
    """
    design = assessment.study.design
    candidates = [a for a in design.arms if not a.is_baseline]
    name = arm or assessment.verdict.arm or candidates[0].name
    chosen = next((a for a in candidates if a.name == name), None)
    if chosen is None or chosen.speculation is None:
        raise InputError(
            f"Study {design.name} has no speculating arm {name!r}.",
            f"It has {', '.join(a.name for a in candidates)}.",
        )
    workload, load = design.production_workload, _watched_load(assessment, name)
    serving = {
        s.arm: s
        for s in assessment.summaries
        if (s.workload, s.segment, s.load, s.purpose) == (workload, None, load, Purpose.MEASURE)
    }
    accepted = {
        a.segment: a
        for a in assessment.acceptance
        if (a.arm, a.workload, a.load) == (name, workload, load)
    }
    candidate, baseline = serving.get(name), serving.get(design.arms[0].name)
    whole = accepted.get(None)
    if (
        candidate is None
        or baseline is None
        or whole is None
        or whole.rate is None
        or whole.length is None
        or candidate.ttft_s is None
        or candidate.tpot_s is None
        or baseline.ttft_s is None
        or baseline.tpot_s is None
    ):
        raise InputError(
            f"Study {design.name} has not measured acceptance and latency of {name} on {workload} "
            f"at {load.label} beside the baseline.",
            "Finish the study with `specwise measure --resume`, then try again.",
        )
    records = [
        record
        for measured in assessment.study.trials
        if measured.complete
        and (measured.trial.arm, measured.trial.workload, measured.trial.load)
        == (name, workload, load)
        for record in measured.records
        if record.outcome is Outcome.OK
    ]
    shares = [segment for segment, _ in design.workload(workload).shares]
    segments = []
    for segment in shares:
        of_segment = accepted.get(segment if len(shares) > 1 else None)
        if of_segment is not None and of_segment.rate is not None:
            segments.append(
                SegmentExpectation(
                    segment=segment,
                    temperature=design.segment(segment).temperature,
                    rate=of_segment.rate,
                    spread=request_spread(r for r in records if r.segment == segment),
                )
            )
    return Expectations(
        study=design.name,
        arm=name,
        decision=assessment.verdict.decision,
        k=chosen.speculation.k,
        production_load=load,
        rate=whole.rate,
        length=whole.length,
        spread=request_spread(records),
        segments=tuple(segments),
        break_even=_break_even(
            whole.rate, whole.length, candidate.tpot_s.mean / baseline.tpot_s.mean
        ),
        ttft_s=candidate.ttft_s,
        tpot_s=candidate.tpot_s,
        baseline_ttft_s=baseline.ttft_s,
        baseline_tpot_s=baseline.tpot_s,
        running=candidate.running_mean,
        crossover_running=_crossover_running(assessment, name),
        kv_use_max=candidate.kv_use_max,
    )


def _watched_load(assessment: Assessment, arm: str) -> LoadPoint:
    """The production load, or the heaviest lighter one at which the arm's schedule drafts."""
    design = assessment.study.design
    production = design.production_load
    speculation = design.arm(arm).speculation
    if speculation is None or not speculation.schedule:
        return production
    drafting = [
        a.load
        for a in assessment.acceptance
        if (a.arm, a.workload, a.segment) == (arm, design.production_workload, None)
        and a.rate is not None
        and a.load.loop is production.loop
        and a.load.value <= production.value
    ]
    return max(drafting, default=production)


def request_spread(records: Iterable[RequestRecord]) -> Spread | None:
    """Noise and spread of the requests' rates; None with fewer than two requests."""
    counts = [r.acceptance for r in records]
    held = np.array(
        [(c.accepted_tokens, c.drafted_tokens) for c in counts if c and c.drafted_tokens], float
    )
    if len(held) < 2:
        return None
    accepted, drafted = held.T
    residual = accepted - accepted.sum() / drafted.sum() * drafted
    variance = (residual**2).sum() / (len(held) - 1) / drafted.mean() ** 2
    return Spread(
        requests=len(held),
        deviation=math.sqrt(variance),
        p10=float(np.quantile(accepted / drafted, 0.1)),
        drafted_tokens=float(drafted.mean()),
    )


def _break_even(rate: float, length: float, tpot_ratio: float) -> float | None:
    needed = break_even_rate(rate=rate, tokens_per_step=length, tpot_ratio=tpot_ratio)
    if math.isnan(needed) or needed > 1:
        return None
    return max(needed, 0.0)


def _crossover_running(assessment: Assessment, arm: str) -> float | None:
    """The crossover as a number of running requests, which any server exports.

    In a closed loop the load is that number. In an open loop it is read off the arm's own mean
    of running requests over the measured rates, linearly between them.
    """
    workload = assessment.study.design.production_workload
    for crossover in assessment.crossovers:
        if (crossover.arm, crossover.workload, crossover.segment) != (arm, workload, None):
            continue
        if crossover.load_value is None:
            return None
        if crossover.loop is Loop.CLOSED:
            return crossover.load_value
        points = sorted(
            (s.load.value, s.running_mean)
            for s in assessment.summaries
            if (s.arm, s.workload, s.segment, s.purpose) == (arm, workload, None, Purpose.MEASURE)
            and s.running_mean is not None
            and s.load.loop is Loop.OPEN
        )
        if len(points) < 2:
            return None
        rates, running = zip(*points, strict=True)
        return float(np.interp(crossover.load_value, rates, running))
    return None
