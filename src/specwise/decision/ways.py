"""What could be deployed: a way to speculate, with one draft length or a schedule of them.

A server runs one way to speculate (a *family*: method, draft model, sampling). Here each is given
its best single length and its best lengths by load, by all that is believed after the search.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells
from specwise.decision.schedule import Composed, Lengths, compose
from specwise.decision.standing import Standing, length_of
from specwise.domain import LoadPoint, Loop, Purpose, StudyDesign
from specwise.measurement.sweep import families, is_data_parallel

KEPT = 0.97
"""What a schedule must keep of the better of the baseline and the best static arm, at each load."""
_RULED_OUT = 1.0  # in log goodput: more than any draft length gains over idling


@dataclass(frozen=True, slots=True)
class FamilyStanding:
    """One way to speculate, as it could be deployed, on the production workload.

    ``static`` is its best single draft length and ``static_gain`` its goodput over the baseline's,
    averaged (geometrically) over the loads; ``schedule`` the best lengths by load, None where one
    length serves all or the engine takes none (``note`` says why), with ``scheduled_gain``.
    ``idle_price`` holds (load, ratio to the baseline, low, high) of being on with k = 0.
    """

    family: str
    static: str
    static_gain: float
    schedule: Composed | None
    scheduled_gain: float
    least: float
    idle_price: tuple[tuple[LoadPoint, float, float, float], ...]
    note: str

    @property
    def gain(self) -> float:
        """The better of both."""
        return max(self.static_gain, self.scheduled_gain if self.schedule else 0.0)


def family_standings(
    design: StudyDesign,
    standing: Standing,
    measured: Cells,
    *,
    seed: int = 0,
    idling: Collection[tuple[str, LoadPoint]] = (),
) -> tuple[FamilyStanding, ...]:
    """Every family of the sweep on the production workload, the best first.

    At the loads in ``idling`` the schedule of that family does not draft, whatever is believed of
    it, and ``least`` leaves them out.
    """
    draws = standing.belief.draws(1000, np.random.default_rng([seed, 5]))
    loads = sorted(design.loads)
    columns = [standing.belief.cells.index((design.production_workload, load)) for load in loads]
    place = {c.arm: i for i, c in enumerate(standing.belief.candidates)}
    found = []
    for family, arms in families(design).items():
        gains = {a: standing.belief.mean[place[a]][columns] for a in arms}
        idle = [a for a in arms if not length_of(design, a)]
        static = max((a for a in arms if a not in idle), key=lambda a: float(gains[a].mean()))
        static_gain = math.exp(float(gains[static].mean()))
        composed, note = None, ""
        ruled_out = np.array([_RULED_OUT if (family, load) in idling else 0.0 for load in loads])
        if idle:
            # Subtracted from every length but k = 0.
            less = {a: ruled_out * bool(length_of(design, a)) for a in arms}
            composed = compose(
                Lengths(
                    batches=batches_at(design, loads, measured),
                    gains={length_of(design, a): (gains[a] - less[a]).tolist() for a in arms},
                    draws={
                        length_of(design, a): draws[:, 1 + place[a]][:, columns] - less[a]
                        for a in arms
                    },
                )
            )
            if len(set(composed.lengths)) == 1:
                note = f"k = {composed.lengths[0]} serves every load: no schedule is needed"
                composed = None
        else:
            note = no_schedule_reason(design, family)
        found.append(
            FamilyStanding(
                family=family,
                static=static,
                static_gain=static_gain,
                schedule=composed,
                scheduled_gain=math.exp(composed.gain) if composed else math.nan,
                least=_least(design, composed, gains, static, ruled_out > 0),
                idle_price=_idle_price(standing, design, idle[0], loads) if idle else (),
                note=note,
            )
        )
    return tuple(sorted(found, key=lambda f: -f.gain))


def _least(
    design: StudyDesign,
    composed: Composed | None,
    gains: Mapping[str, NDArray[np.float64]],
    static: str,
    left_out: NDArray[np.bool_],
) -> float:
    if composed is None:
        return math.exp(float(gains[static].min()))
    by_k = {length_of(design, arm): values for arm, values in gains.items()}
    held = [float(by_k[k][j]) for j, k in enumerate(composed.lengths) if not left_out[j]]
    return math.exp(min(held, default=0.0))


def no_schedule_reason(design: StudyDesign, family: str) -> str:
    """Why the sweep has no schedule for ``family``."""
    arm = design.arm(families(design)[family][0])
    if arm.deployment is not None and is_data_parallel(arm.deployment):
        return "vLLM ignores a schedule with data parallelism"
    method = arm.speculation.method if arm.speculation else ""
    return f"this vLLM takes no schedule with {method}"


def batches_at(design: StudyDesign, loads: Sequence[LoadPoint], measured: Cells) -> tuple[int, ...]:
    """Requests in the batch at each load: the clients, or by Little's law rate x E2E."""
    found: list[int] = []
    for load in loads:
        if load.loop is Loop.CLOSED:
            batch = int(load.value)
        else:
            key = (design.arms[0].name, design.production_workload, load, Purpose.MEASURE)
            tables = measured.get(key, ())
            e2e_s = [float(np.nanmean(t.e2e_from_sent_s)) for t in tables if t.ok.any()]
            batch = round(load.value * float(np.mean(e2e_s))) if e2e_s else round(load.value)
        found.append(max(batch, 1 + (found[-1] if found else 0)))
    return tuple(found)


def _idle_price(
    standing: Standing, design: StudyDesign, idle: str, loads: Sequence[LoadPoint]
) -> tuple[tuple[LoadPoint, float, float, float], ...]:
    held = []
    for load in loads:
        cell = standing.cell(design.production_workload, load)
        arm = next(a for a in cell.arms if a.arm == idle)
        held.append((load, arm.gain, arm.low, arm.high))
    return tuple(held)


def to_confirm(ways: Sequence[FamilyStanding], tolerance: float) -> tuple[FamilyStanding, ...]:
    """The ways to speculate that are worth confirming, the first first; at most two.

    Those that gain more than the tolerance, averaged over the loads; first those expected to keep
    `KEPT` of the baseline at every load, then by what they gain.
    """
    worth_it = [way for way in ways if way.gain > 1 + tolerance]
    return tuple(sorted(worth_it, key=lambda way: (way.least < KEPT, -way.gain))[:2])
