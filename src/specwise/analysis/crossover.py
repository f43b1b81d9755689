"""The load at which speculation stops paying, with its interval."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from specwise.analysis.cells import Floats
from specwise.analysis.comparison import Effect
from specwise.domain import Loop

Outcome = Literal["crosses", "always better", "always worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where the speedup of an arm passes 1 as the load grows (req I5).

    ``load_value`` is the estimate in the unit of ``loop`` (concurrency or requests/s), None where
    the measured loads show no change of sign. ``low`` and ``high`` bound it at 95 %; None means
    "outside the measured loads" (below the smallest, above the largest). "always" means over the
    loads measured, ``loads``, never beyond them.
    """

    arm: str
    workload: str
    segment: str | None
    outcome: Outcome
    load_value: float | None
    low: float | None
    high: float | None
    loop: Loop
    loads: tuple[float, ...]
    note: str


SURE = 0.975
_DRAWS = 4000


def find_crossovers(
    effects: Sequence[Effect], *, metric: str = "speedup", seed: int = 0
) -> tuple[Crossover, ...]:
    """The crossover of every arm, workload and segment that was measured at two loads or more.

    Open and closed loop are kept apart: a rate and a concurrency are not one axis.
    """
    curves: dict[tuple[str, str, str | None, Loop], list[Effect]] = defaultdict(list)
    for effect in effects:
        if effect.metric == metric and math.isfinite(effect.se_log):
            key = (effect.arm, effect.workload, effect.segment, effect.load.loop)
            curves[key].append(effect)
    found = []
    for (arm, workload, segment, loop), curve in curves.items():
        ordered = sorted(curve, key=lambda e: e.load.value)
        if len({e.load.value for e in ordered}) < 2:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(f"{arm}/{workload}/{segment}".encode())])
        loads = np.array([e.load.value for e in ordered])
        logs = np.array([_gain(e) for e in ordered])
        found.append(
            locate(
                (arm, workload, segment, loop),
                loads,
                logs,
                se=np.array([e.se_log for e in ordered]),
                dof=np.array([e.dof for e in ordered]),
                rng=rng,
            )
        )
    return tuple(found)


def _gain(effect: Effect) -> float:
    """log ratio, signed so that above 0 is good."""
    return math.log(effect.ratio) * (1 if effect.better == "higher" else -1)


def locate(
    key: tuple[str, str, str | None, Loop],
    loads: Floats,
    gains: Floats,
    *,
    se: Floats,
    dof: Floats,
    rng: np.random.Generator,
) -> Crossover:
    """Where a gain that falls with load passes zero, from its values at ``loads`` (ascending).

    Each draw of a parametric bootstrap moves every gain by se x Student t, makes the curve fall
    monotonically (weighted isotonic regression: the invariant that speedup falls with batch), and
    reads the zero off by interpolation in log2(load). A draw that is positive everywhere crosses
    above the measured loads, one that is negative everywhere below them; ``low`` and ``high``
    are the 2.5 % and 97.5 % quantiles of the draws. An outcome is claimed when 97.5 % of the
    draws agree on each of its ends.
    """
    arm, workload, segment, loop = key
    weights = 1.0 / np.maximum(se, 1e-9) ** 2
    uniform = rng.random((_DRAWS, len(loads)))
    drawn = gains + se * stdtrit(dof, uniform)
    curves = falling(drawn, weights)
    crossings = _crossings(np.log2(loads), curves)
    starts_better = float((curves[:, 0] > 0).mean())
    ends_better = float((curves[:, -1] > 0).mean())
    estimate = float(_crossings(np.log2(loads), falling(gains[None, :], weights))[0])
    outcome: Outcome = "undecided"
    if ends_better >= SURE:
        outcome = "always better"
    elif starts_better <= 1 - SURE:
        outcome = "always worse"
    elif starts_better >= SURE and ends_better <= 1 - SURE:
        outcome = "crosses"
    decided = outcome.startswith("always")
    low, high = np.quantile(crossings, [1 - SURE, SURE], method="inverted_cdf")
    return Crossover(
        arm=arm,
        workload=workload,
        segment=segment,
        outcome=outcome,
        load_value=None if decided else _load(estimate),
        low=None if decided else _load(low),
        high=None if decided else _load(high),
        loop=loop,
        loads=tuple(float(v) for v in loads),
        note=_note(gains, se),
    )


def falling(values: Floats, weights: Floats) -> Floats:
    """Each row's closest non-increasing curve in weighted least squares (isotonic regression).

    The min-max formula: f_j = min over a <= j of max over b >= j of the weighted mean of a..b
    (Barlow et al. 1972, Statistical Inference under Order Restrictions, section 1.2).
    """
    count = values.shape[-1]
    padded = np.concatenate([np.zeros((*values.shape[:-1], 1)), (values * weights).cumsum(-1)], -1)
    total = np.concatenate([[0.0], weights.cumsum()])
    fitted = np.empty_like(values)
    for j in range(count):
        best = np.full(values.shape[:-1], np.inf)
        for a in range(j + 1):
            means = [
                (padded[..., b + 1] - padded[..., a]) / (total[b + 1] - total[a])
                for b in range(j, count)
            ]
            best = np.minimum(best, np.max(means, axis=0))
        fitted[..., j] = best
    return fitted


def _crossings(log2_loads: Floats, curves: Floats) -> Floats:
    """Where each falling curve passes zero, in log2(load); -inf or inf outside the loads."""
    places = np.full(len(curves), np.inf)
    places[curves[:, 0] <= 0] = -np.inf
    for j in range(len(log2_loads) - 1):
        left, right = curves[:, j], curves[:, j + 1]
        inside = (left > 0) & (right <= 0)
        share = left[inside] / (left[inside] - right[inside])
        places[inside] = log2_loads[j] + share * (log2_loads[j + 1] - log2_loads[j])
    return places


def _load(place: float) -> float | None:
    return float(2.0**place) if math.isfinite(place) else None


def _note(gains: Floats, se: Floats) -> str:
    """Says so where a later load is clearly better than an earlier one."""
    for j in range(1, len(gains)):
        for i in range(j):
            if gains[j] - gains[i] > 2 * math.hypot(se[i], se[j]):
                return "the effect rises again with load: more than one crossover is possible"
    return ""
