"""Finding the best arm for each load without trying every arm at every load.

A tuning is a study whose design is the exhaustive sweep and whose next trial is chosen when the
last has ended: where what is not known yet costs most goodput for each second of measuring, server
starts included. `standing.survey` says what is known, what is ruled out and what choosing now may
still lose; `next_pick` chooses. Pure: the same trials, the same answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from specwise.analysis.cells import Cells
from specwise.decision.belief import Belief, Cell, worth
from specwise.decision.findings import percent
from specwise.decision.observations import Floats, expected_variances
from specwise.decision.standing import (
    CellStanding,
    Standing,
    length_of,
    method_of,
    speculation_of,
    survey,
    without,
)
from specwise.domain import LoadPoint, PickRecord, Purpose, StudyDesign, Trial
from specwise.measurement.sweep import families

USUAL_START_S = 60.0
_USUAL_TRIAL_S = 10.0
_TRIALS_A_START = 3  # a server is started for about that many trials: its start is shared by them


@dataclass(frozen=True, slots=True)
class Next:
    """The next trial, or why there is none: ``stopped`` is then "tolerance", "budget" or
    "exhausted". ``reason`` is a sentence either way."""

    trial: Trial | None
    reason: str
    stopped: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class Spent:
    """What measuring has cost so far, in seconds: each trial by its id, and each server start."""

    trials: Mapping[str, float]
    starts: tuple[float, ...]

    @classmethod
    def of(cls, picks: Sequence[PickRecord]) -> Spent:
        """From the journal of a tuning."""
        return cls(
            {pick.trial_id: pick.seconds for pick in picks},
            tuple(pick.start_s for pick in picks if pick.started_server),
        )

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.trials.values()) + sum(self.starts)

    @property
    def start_s(self) -> float:
        """What starting one more server is expected to take."""
        return statistics.fmean(self.starts) if self.starts else USUAL_START_S


def next_pick(
    design: StudyDesign,
    measured: Cells,
    *,
    spent: Spent,
    running: Collection[str],
    tolerance: float,
    budget_s: float | None,
    over: Collection[str] = (),
    seed: int = 0,
) -> Next:
    """The trial to run next, given ``running`` servers; ``over`` are trials that cannot be run.

    First come the trials that a prediction needs: the baseline at every load of the production
    workload, one of them twice (how much the machine varies by itself), and one arm of each method
    at a light and at a medium load. Then the trial whose knowledge is worth most for each second it
    takes (see `belief.worth`). The end is the tolerance on the 95 % bound of the average regret,
    the budget, or that no trial is left. Within the tolerance two things are seen to first: the arm
    that idles is tried where a schedule would need it, because it never is the best arm and yet
    decides whether a schedule can hold; and the baseline is seen a second time wherever it was seen
    once only, in case something had slowed that trial.
    """
    done = {t.trial.trial_id for tables in measured.values() for t in tables} | set(over)
    standing = survey(design, measured, seed=seed)
    if budget_s is not None and spent.total_s >= budget_s:
        reason = (
            f"the budget of {budget_s / 60:g} min is spent; the bound on the remaining regret is "
            f"{percent(standing.regret_bound)}"
        )
        return Next(None, reason, "budget", standing)
    for trial, reason in _opening(design):
        if trial.trial_id not in done:
            return Next(trial, reason, "", standing)
    last = _before_the_end(design, standing, measured, done)
    if standing.regret_bound <= tolerance and last is not None:
        return Next(*last, "", standing)
    if standing.regret_bound <= tolerance:
        reason = (
            f"the bound on the remaining regret, {percent(standing.regret_bound)}, is within the "
            f"tolerance of {percent(tolerance)}"
        )
        return Next(None, reason, "tolerance", standing)
    kept = without(measured, standing.slowed)
    clock = _Clock(design, kept, spent, standing.belief)
    chosen = _most_worth(
        standing,
        worth(standing.belief, expected_variances(design, kept, standing.belief)),
        _open_trials(design, done | _beside_slowed(design, standing.slowed)),
        clock,
        running,
    )
    if chosen is None:
        reason = (
            "every trial of the sweep was run; the bound on the remaining regret is "
            f"{percent(standing.regret_bound)}"
        )
        return Next(None, reason, "exhausted", standing)
    return Next(chosen[0], chosen[1], "", standing)


def sweep_seconds(design: StudyDesign, measured: Cells, spent: Spent) -> float:
    """What running every arm once in every cell would take, starts included: an estimate."""
    clock = _Clock(design, measured, spent, survey(design, measured).belief)
    arms = [arm.name for arm in design.arms]
    trials_s = sum(
        clock.trial_s(arm, (workload.name, load))
        for arm in arms
        for workload in design.workloads
        for load in design.loads
    )
    return trials_s + len(arms) * spent.start_s


# ---------------------------------------------------------------------------------------------
# The opening


def probe_arms(design: StudyDesign) -> tuple[str, ...]:
    """For each method (and draft model) the arm that is tried first: k nearest to 3, or below.

    It shows the acceptance of the positions that matter most and is seldom far from the best, so
    that its server is of use later.
    """
    found: dict[tuple[str, str | None], str] = {}
    for arms in families(design).values():
        static = [a for a in arms if not speculation_of(design, a).schedule]
        middle = min(static, key=lambda a: (abs(speculation_of(design, a).k - 3), a))
        speculation = speculation_of(design, middle)
        found.setdefault((speculation.method, speculation.draft), middle)
    return tuple(found.values())


def _opening(design: StudyDesign) -> list[tuple[Trial, str]]:
    production = design.production_workload
    loads = sorted(design.loads)
    light, medium = loads[0], loads[len(loads) // 2]
    baseline = design.arms[0].name
    wanted: list[tuple[str, str, LoadPoint, Purpose, str]] = [
        (baseline, production, load, Purpose.MEASURE, "what speculation is compared with")
        for load in loads
    ]
    wanted.append(
        (
            baseline,
            production,
            medium,
            Purpose.NOISE_FLOOR,
            "the baseline again: how much trials differ by themselves",
        )
    )
    named = {name for name, _ in design.workload(production).shares}
    apart = [w.name for w in design.workloads if any(name not in named for name, _ in w.shares)]
    for arm in probe_arms(design):
        reason = f"the costs and the acceptance of {method_of(design, arm)}"
        wanted += [
            (arm, production, load, Purpose.MEASURE, reason)
            for load in dict.fromkeys((light, medium))
        ]
        for workload in apart:
            wanted.append((baseline, workload, light, Purpose.MEASURE, "to compare the next with"))
            wanted.append((arm, workload, light, Purpose.MEASURE, reason))
    first = {(t.arm, t.workload, t.load, t.purpose): t for t in design.trials if not t.repeat}
    return [(first[key], reason) for *key_, reason in wanted if (key := tuple(key_)) in first]


def _beside_slowed(design: StudyDesign, slowed: Collection[str]) -> set[str]:
    """Trials that could be compared with a slowed baseline only."""
    baseline = design.arms[0].name
    blocks = {
        (t.workload, t.load, t.repeat)
        for t in design.trials
        if t.trial_id in slowed and (t.arm, t.purpose) == (baseline, Purpose.MEASURE)
    }
    return {t.trial_id for t in design.trials if (t.workload, t.load, t.repeat) in blocks}


def _second_look(design: StudyDesign, measured: Cells, done: Collection[str]) -> Trial | None:
    """A repeat of the baseline on the production workload where it was measured once."""
    baseline, production = design.arms[0].name, design.production_workload
    seen = [
        load
        for (arm, workload, load, _), tables in measured.items()
        for _ in tables
        if (arm, workload) == (baseline, production)
    ]
    left = _open_trials(design, done)
    return next(
        (
            trial
            for load in sorted(design.loads)
            if seen.count(load) == 1
            and (trial := left.get((baseline, production, load))) is not None
        ),
        None,
    )


def _before_the_end(
    design: StudyDesign, standing: Standing, measured: Cells, done: Collection[str]
) -> tuple[Trial, str] | None:
    """What is still to be seen once the bound is within the tolerance, and why."""
    idle = _idle_look(design, standing, done)
    if idle is not None:
        return idle, f"where a schedule would not draft: what being on costs at {idle.load.label}"
    again = _second_look(design, measured, done)
    if again is not None:
        return again, "the baseline at another time: something may have slowed the only trial of it"
    return None


def _idle_look(design: StudyDesign, standing: Standing, done: Collection[str]) -> Trial | None:
    """A trial of the idling arm, of the family that gains most, at a load where drafting loses.

    On the production workload, the largest load first; None where it ran at all of those, or no
    family gains.
    """
    cells_of = [standing.cell(design.production_workload, load) for load in sorted(design.loads)]
    best: dict[str, list[float]] = {}
    idles: dict[str, str] = {}
    for family, arms in families(design).items():
        idle = [a for a in arms if not length_of(design, a)]
        if idle:
            idles[family] = idle[0]
            best[family] = [
                max(math.log(a.gain) for a in cell.arms if a.arm in arms and a.arm != idle[0])
                for cell in cells_of
            ]
    gains = {family: sum(max(g, 0.0) for g in held) for family, held in best.items()}
    if not gains or max(gains.values()) <= 0:
        return None
    family = max(gains, key=lambda name: gains[name])
    ran = {a.load for cell in cells_of for a in cell.arms if a.arm == idles[family] and a.trials}
    left = _open_trials(design, done)
    for cell, gain in zip(reversed(cells_of), reversed(best[family]), strict=True):
        trial = left.get((idles[family], cell.workload, cell.load))
        if gain < 0 and cell.load not in ran and trial is not None:
            return trial
    return None


# ---------------------------------------------------------------------------------------------
# The next trial


def _most_worth(
    standing: Standing,
    value: Floats,
    open_trials: Mapping[tuple[str, str, LoadPoint], Trial],
    clock: _Clock,
    running: Collection[str],
) -> tuple[Trial, str] | None:
    """The trial with the most expected gain per second, and why.

    A trial whose block has no baseline yet is preceded by the baseline's, which its cost counts. A
    server that is not up costs a share of its start: it is not started for one trial alone.
    """
    belief = standing.belief
    baseline = clock.baseline
    ranked: list[tuple[float, Trial, bool]] = []
    out = {e.arm for e in standing.eliminated}
    for i, candidate in enumerate(belief.candidates):
        if candidate.arm in out:
            continue
        for j, cell in enumerate(belief.cells):
            trial = open_trials.get((candidate.arm, *cell))
            if trial is None:
                continue
            seconds = clock.trial_s(candidate.arm, cell)
            ready = open_trials.get((baseline, *cell))
            preceded = ready is not None and ready.repeat <= trial.repeat
            if preceded:
                seconds += clock.trial_s(baseline, cell)
            if candidate.arm not in running:
                seconds += clock.start_s
            chance = standing.cells[j].regret * _chance(standing.cells[j], candidate.arm)
            ranked.append(((value[i, j] + 1e-3 * chance) / seconds, trial, preceded))
    if not ranked:
        return None
    _, trial, preceded = max(ranked, key=lambda item: item[0])
    cell_standing = standing.cell(trial.workload, trial.load)
    reason = (
        f"{trial.workload} at {trial.load.label} may lose {percent(cell_standing.regret)} with "
        f"{cell_standing.best}; {trial.arm} has a chance of "
        f"{percent(_chance(cell_standing, trial.arm))} to be the best"
    )
    if preceded:
        first = open_trials[baseline, trial.workload, trial.load]
        return first, f"to compare {trial.arm} with: {reason}"
    return trial, reason


def _open_trials(
    design: StudyDesign, done: Collection[str]
) -> dict[tuple[str, str, LoadPoint], Trial]:
    """For each arm and cell its first repeat that was not run."""
    found: dict[tuple[str, str, LoadPoint], Trial] = {}
    for trial in sorted(design.trials, key=lambda t: t.repeat):
        if trial.trial_id not in done and trial.purpose is Purpose.MEASURE:
            found.setdefault((trial.arm, trial.workload, trial.load), trial)
    return found


def _chance(cell: CellStanding, arm: str) -> float:
    return next(a.best_probability for a in cell.arms if a.arm == arm)


class _Clock:
    """How long trials take: what they took, else as the baseline's at that load over the gain."""

    def __init__(self, design: StudyDesign, measured: Cells, spent: Spent, belief: Belief) -> None:
        self.baseline = design.arms[0].name
        self.start_s = spent.start_s / _TRIALS_A_START
        self._belief = belief
        self._took: dict[LoadPoint, list[float]] = {}
        self._own: dict[tuple[str, str, LoadPoint], float] = {}
        for (arm, workload, load, _), tables in measured.items():
            times = [
                spent.trials.get(t.trial.trial_id, sum(p.duration_s for p in t.parts))
                for t in tables
            ]
            self._own[arm, workload, load] = statistics.fmean(times)
            if arm == self.baseline:
                self._took.setdefault(load, []).extend(times)
        self._place = {c.arm: i for i, c in enumerate(belief.candidates)}

    def trial_s(self, arm: str, cell: Cell) -> float:
        """Seconds of one trial of ``arm`` in ``cell``."""
        workload, load = cell
        own = self._own.get((arm, workload, load))
        if own is not None:
            return own
        base = self._own.get((self.baseline, workload, load))
        if base is None:
            held = self._took.get(load) or [s for times in self._took.values() for s in times]
            base = statistics.fmean(held) if held else _USUAL_TRIAL_S
        if arm == self.baseline:
            return base
        gain = self._belief.mean[self._place[arm], self._belief.cells.index(cell)]
        return float(base / math.exp(gain))
