"""Arm against baseline: paired effects with intervals that own up to trial-to-trial noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specwise.domain import LoadPoint

Direction = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Effect:
    """A ratio between a candidate arm and the baseline in one cell, with its interval.

    ``speedup`` is baseline / candidate time per output token (above 1 is good); every other metric
    is candidate / baseline. ``better`` says which side of 1 is good. ``baseline_value`` and
    ``candidate_value`` are the metric itself (seconds, tokens/s, requests/s; for ``speedup`` the
    time per output token). ``low`` and ``high`` bound the ratio at ``confidence``; they are NaN,
    like ``ratio``, where the metric has no value. ``se_log`` is the standard error of log(ratio)
    and ``dof`` the degrees of freedom of its t quantile. ``pairs`` are requests that ended OK in
    both arms. ``trial_noise_known`` is False where no repeat and no A/A trial could tell how much
    trials differ: the interval is then a lower bound on the uncertainty.
    """

    metric: str
    better: Literal["higher", "lower"]
    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    ratio: float
    low: float
    high: float
    confidence: float
    pairs: int
    repeats: int
    baseline_value: float
    candidate_value: float
    se_log: float
    dof: float
    trial_noise_known: bool
    note: str
    trial_ids: tuple[str, ...]

    @property
    def direction(self) -> Direction:
        """Which side of 1 the whole interval lies on; "undecided" when it holds 1 or is NaN."""
        if self.low > 1.0:
            return "better" if self.better == "higher" else "worse"
        if self.high < 1.0:
            return "worse" if self.better == "higher" else "better"
        return "undecided"


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The A/A trial against the baseline it repeats: what "no difference" looks like here.

    The interval comes from the requests alone, so one that excludes 1 shows that trials differ by
    more than their requests do; the effects' own intervals take that into account.
    """

    load: LoadPoint
    workload: str
    metric: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Signature:
    """P50 better while P99 worse (req F3): the mark of a mix that speculation splits.

    ``metric`` is "tpot" or "e2e". ``present`` is True where both intervals say so, False where one
    of them excludes it, None where neither can be said.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    metric: str
    p50: Effect
    p99: Effect
    present: bool | None
