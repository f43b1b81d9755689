"""Finding the best arm for each load without trying every arm at every load.

A tuning is a study whose design is the exhaustive sweep and whose next trial is chosen when the
last has ended: where what is not known yet costs most goodput for each second of measuring, server
starts included. `next_pick` chooses; `survey` says what is known, what is ruled out and what
choosing now may still lose. Both are pure: the same trials, the same answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells, TrialTable
from specwise.analysis.steps import slowed_trials
from specwise.analysis.sweep_forecast import SweepForecast, forecast_sweep
from specwise.decision.belief import (
    Belief,
    Candidate,
    Cell,
    Observed,
    Regret,
    believe,
    regret,
    worth,
)
from specwise.decision.findings import listed, percent
from specwise.domain import LoadPoint, PickRecord, Purpose, Speculation, StudyDesign, Trial
from specwise.measurement.sweep import families

Floats = NDArray[np.float64]

USUAL_START_S = 60.0
_USUAL_TRIAL_S = 10.0
_TRIALS_A_START = 3  # a server is started for about that many trials: its start is shared by them
_SHRUNK_BY = 6.0  # requests that the pooled variance counts for beside a trial's own


@dataclass(frozen=True, slots=True)
class ArmStanding:
    """One arm in one cell: its goodput over the baseline's, with the 95 % interval of the belief.

    ``gain``, ``low`` and ``high`` rest on the prediction and all trials; ``predicted`` on the
    prediction alone (NaN: there is none), ``trials`` of which this cell has. ``best_probability``
    is the chance that no other arm is better here.
    """

    arm: str
    workload: str
    load: LoadPoint
    gain: float
    low: float
    high: float
    trials: int
    predicted: float
    best_probability: float


@dataclass(frozen=True, slots=True)
class CellStanding:
    """One workload at one load: the arm to choose, and what choosing it may lose.

    ``regret`` is expected, ``regret_bound`` holds with 95 %: shares of goodput. ``arms`` are all,
    the baseline among them, the best first.
    """

    workload: str
    load: LoadPoint
    best: str
    regret: float
    regret_bound: float
    arms: tuple[ArmStanding, ...]


@dataclass(frozen=True, slots=True)
class Elimination:
    """An arm that is worse than another in every cell. ``measured`` says that it ran at all."""

    arm: str
    reason: str
    measured: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a sweep after some of its trials.

    ``regret`` and ``regret_bound`` are averages over the cells: what is lost, expected and with
    95 %, if the best arm so far is chosen in each. ``belief`` is what they are computed from, all
    trials but the ``slowed`` ones (see `slowed_trials`).
    """

    cells: tuple[CellStanding, ...]
    eliminated: tuple[Elimination, ...]
    regret: float
    regret_bound: float
    belief: Belief
    forecast: SweepForecast
    slowed: Mapping[str, float]

    def cell(self, workload: str, load: LoadPoint) -> CellStanding:
        """That cell; KeyError if the sweep has none."""
        for cell in self.cells:
            if (cell.workload, cell.load) == (workload, load):
                return cell
        raise KeyError(f"{workload} at {load.label}")


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


def survey(
    design: StudyDesign, measured: Cells, *, seed: int = 0, forecast: SweepForecast | None = None
) -> Standing:
    """What the complete trials in ``measured`` say of every arm in every cell of ``design``.

    ``forecast`` may be given where the caller has it already.
    """
    by_family = families(design)
    slowed = slowed_trials(measured)
    measured = _without(measured, slowed)
    if forecast is None:
        forecast = forecast_sweep(design, measured, by_family)
    cells = tuple((w.name, load) for w in design.workloads for load in design.loads)
    candidates = tuple(
        Candidate(arm, family, _method(design, arm), _length(design, arm))
        for family, arms in by_family.items()
        for arm in arms
    )
    belief = believe(
        candidates,
        cells,
        workloads={w.name: w for w in design.workloads},
        predicted=forecast.log_gain,
        rests_on=forecast.rests_on,
        observed=_observed(design, measured),
    )
    found = regret(belief, np.random.default_rng([seed, len(cells)]))
    standing_cells = _cell_standings(design, measured, belief, found, forecast)
    return Standing(
        cells=standing_cells,
        eliminated=_eliminated(belief, measured),
        regret=found.mean,
        regret_bound=found.mean_bound,
        belief=belief,
        forecast=forecast,
        slowed=slowed,
    )


def _without(measured: Cells, slowed: Collection[str]) -> Cells:
    kept = {
        key: tuple(t for t in tables if t.trial.trial_id not in slowed)
        for key, tables in measured.items()
    }
    return {key: tables for key, tables in kept.items() if tables}


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
    kept = _without(measured, standing.slowed)
    clock = _Clock(design, kept, spent, standing.belief)
    chosen = _most_worth(
        standing,
        worth(standing.belief, _expected_variances(design, kept, standing.belief)),
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
        static = [a for a in arms if not _speculation(design, a).schedule]
        middle = min(static, key=lambda a: (abs(_speculation(design, a).k - 3), a))
        speculation = _speculation(design, middle)
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
        reason = f"the costs and the acceptance of {_method(design, arm)}"
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
        idle = [a for a in arms if not _length(design, a)]
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


# ---------------------------------------------------------------------------------------------
# What trials show


def _speculation(design: StudyDesign, arm: str) -> Speculation:
    speculation = design.arm(arm).speculation
    assert speculation is not None  # noqa: S101 - families are of speculating arms
    return speculation


def _method(design: StudyDesign, arm: str) -> str:
    return str(_speculation(design, arm).method)


def _length(design: StudyDesign, arm: str) -> int:
    """Its k; 0 for the arm that idles."""
    speculation = _speculation(design, arm)
    return 0 if speculation.schedule else int(speculation.k)


def log_goodput(table: TrialTable) -> float:
    """log(output tokens / request seconds) + log(share of requests that meet the SLO).

    In a closed loop of c clients goodput is c / (mean request time) x (share that meets it), so
    the difference of two arms is that of their log goodputs. In an open loop all arms are offered
    the same; the first term then ranks what the second leaves equal. NaN if no request ended OK.
    """
    seconds = float(np.nansum(table.e2e_s[table.ok]))
    tokens = float(np.nansum(table.output_tokens[table.ok]))
    if not (seconds > 0 and tokens > 0):
        return math.nan
    share = max(float(table.meets_slo.mean()), 0.5 / len(table.meets_slo))
    return math.log(tokens / seconds) + math.log(share)


def _observed(design: StudyDesign, measured: Cells) -> list[Observed]:
    baseline = design.arms[0].name
    bases = _bases(measured, baseline)
    pooled = _pooled_variance(measured, bases, baseline)
    found = []
    for (arm, workload, load, purpose), tables in measured.items():
        for table in tables:
            value = log_goodput(table)
            if math.isnan(value):
                continue
            base = bases.get((workload, load, table.trial.repeat))
            is_baseline = arm == baseline
            if is_baseline and purpose is Purpose.MEASURE:
                variance = pooled / len(table.index)
            elif base is None:
                variance = 2 * pooled / len(table.index)
            else:
                variance = _shrunk(_pair_residuals(base, table), pooled)
            found.append(
                Observed(
                    arm=None if is_baseline else arm,
                    cell=(workload, load),
                    repeat=table.trial.repeat,
                    value=value,
                    # Half of a pair's variance each, so that the pair has it all.
                    request_variance=variance / 2 + _share_variance(table),
                    at_s=_middle_s(table),
                )
            )
    return found


def _middle_s(table: TrialTable) -> float | None:
    """The middle of a trial in seconds of the wall clock; None where it has no times."""
    try:
        began = [datetime.fromisoformat(part.started_at).timestamp() for part in table.parts]
    except ValueError:
        return None
    ended = [at + part.duration_s for at, part in zip(began, table.parts, strict=True)]
    return (min(began) + max(ended)) / 2 if began else None


def _bases(measured: Cells, baseline: str) -> dict[tuple[str, LoadPoint, int], TrialTable]:
    return {
        (workload, load, table.trial.repeat): table
        for (arm, workload, load, purpose), tables in measured.items()
        if arm == baseline and purpose is Purpose.MEASURE
        for table in tables
    }


def _pair_residuals(base: TrialTable, table: TrialTable) -> Floats:
    """What each request contributes to the log ratio of time per token, beyond the ratio itself.

    Linearised (the delta method): u = (e - R t) / mean(e) of each arm, R = sum e / sum t, with
    time e and tokens t; their variance over requests / n is the log ratio's.
    """
    _, a, b = np.intersect1d(base.index[base.ok], table.index[table.ok], return_indices=True)
    rows = [(base, np.flatnonzero(base.ok)[a]), (table, np.flatnonzero(table.ok)[b])]
    residuals = []
    for of, chosen in rows:
        seconds, tokens = of.e2e_s[chosen], of.output_tokens[chosen]
        known = np.isfinite(seconds) & np.isfinite(tokens)
        if not known.any():
            return np.zeros(0)
        ratio = seconds[known].sum() / tokens[known].sum()
        residuals.append(np.where(known, (seconds - ratio * tokens) / seconds[known].mean(), 0.0))
    return np.asarray(residuals[1] - residuals[0])


def _pooled_variance(
    measured: Cells, bases: Mapping[tuple[str, LoadPoint, int], TrialTable], baseline: str
) -> float:
    """Variance of a request's residual, over all pairs of trials that there are."""
    squares, count = 0.0, 0
    for (arm, workload, load, _), tables in measured.items():
        for table in tables if arm != baseline else ():
            base = bases.get((workload, load, table.trial.repeat))
            if base is not None:
                residuals = _pair_residuals(base, table)
                squares += float((residuals**2).sum())
                count += max(len(residuals) - 1, 0)
    return squares / count if count else 0.05


def _shrunk(residuals: Floats, pooled: float) -> float:
    """A trial's variance of the log ratio: its own requests', drawn to the pool's by few."""
    n = max(len(residuals), 1)
    each = (float((residuals**2).sum()) + _SHRUNK_BY * pooled) / (n - 1 + _SHRUNK_BY)
    return each / n


def _share_variance(table: TrialTable) -> float:
    """Variance of log(share that meets the SLO): (1 - p) / (n p), binomial."""
    n = len(table.meets_slo)
    share = max(float(table.meets_slo.mean()), 0.5 / n)
    return (1 - share) / (n * share)


def _expected_variances(design: StudyDesign, measured: Cells, belief: Belief) -> Floats:
    """The request variance that a trial of each pair would have, against its baseline."""
    baseline = design.arms[0].name
    pooled = _pooled_variance(measured, _bases(measured, baseline), baseline)
    requests = {trial.load: trial.requests for trial in design.trials}
    row = np.array([pooled / requests[load] for _, load in belief.cells])
    return np.broadcast_to(row, belief.mean.shape)


# ---------------------------------------------------------------------------------------------
# What is known


def _cell_standings(
    design: StudyDesign,
    measured: Cells,
    belief: Belief,
    found: Regret,
    forecast: SweepForecast,
) -> tuple[CellStanding, ...]:
    names = [design.arms[0].name, *(c.arm for c in belief.candidates)]
    deviation = np.vstack([np.zeros(len(belief.cells)), belief.deviation])
    mean = np.vstack([np.zeros(len(belief.cells)), belief.mean])
    best = belief.best()
    standings = []
    for j, (workload, load) in enumerate(belief.cells):
        arms = [
            ArmStanding(
                arm=name,
                workload=workload,
                load=load,
                gain=math.exp(mean[i, j]),
                low=math.exp(mean[i, j] - 1.96 * deviation[i, j]),
                high=math.exp(mean[i, j] + 1.96 * deviation[i, j]),
                trials=len(measured.get((name, workload, load, Purpose.MEASURE), ())),
                predicted=1.0
                if i == 0
                else math.exp(forecast.log_gain.get((name, workload, load), math.nan)),
                best_probability=float(found.best_probability[i, j]),
            )
            for i, name in enumerate(names)
        ]
        standings.append(
            CellStanding(
                workload=workload,
                load=load,
                best=names[best[j]],
                regret=float(found.expected[j]),
                regret_bound=float(found.bound[j]),
                arms=tuple(sorted(arms, key=lambda a: -a.gain)),
            )
        )
    return tuple(standings)


def _eliminated(belief: Belief, measured: Cells) -> tuple[Elimination, ...]:
    """Arms whose paired interval against the best arm lies below it in every cell (97.5 %)."""
    columns = len(belief.cells)
    best = belief.best()
    ran = {(arm, workload, load) for arm, workload, load, _ in measured}
    found = []
    variance = np.diag(belief.covariance)
    for i, candidate in enumerate(belief.candidates):
        if not candidate.k:
            continue  # never the best arm, but a schedule may need it
        tried = any((candidate.arm, *cell) in ran for cell in belief.cells)
        # A prediction alone must be surer: it is wrong in ways that it does not know.
        surely = 1.96 if tried else 3.0
        behind = np.zeros(columns)
        reach = np.zeros(columns)
        for j in range(columns):
            own = i * columns + j
            if best[j] == 0:
                behind[j], spread = belief.mean[i, j], variance[own]
            else:
                other = (best[j] - 1) * columns + j
                behind[j] = belief.mean[i, j] - belief.mean[best[j] - 1, j]
                spread = variance[own] + variance[other] - 2 * belief.covariance[own, other]
            reach[j] = behind[j] + surely * math.sqrt(max(spread, 0.0))
        if (best == i + 1).any() or reach.max() >= 0:
            continue
        nearest = int(np.argmax(reach))
        workload, load = belief.cells[nearest]
        rival = "the baseline" if best[nearest] == 0 else belief.candidates[best[nearest] - 1].arm
        found.append(
            Elimination(
                candidate.arm,
                f"worse in every cell; nearest on {workload} at {load.label}, "
                f"{math.exp(behind[nearest]):.2f}x of {rival}, at most "
                f"{math.exp(reach[nearest]):.2f}x"
                + ("" if tried else " (predicted: it was not run)"),
                tried,
            )
        )
    return tuple(found)


def not_run(
    design: StudyDesign, standing: Standing, reason: str, done: Collection[str]
) -> dict[str, str]:
    """Why each trial that was not run need not be, by id."""
    why = {e.arm: f"{e.arm} is ruled out: {e.reason}" for e in standing.eliminated}
    return {
        trial.trial_id: why.get(trial.arm, reason)
        for trial in design.trials
        if trial.trial_id not in done
    }


def summary_line(standing: Standing, design: StudyDesign) -> str:
    """The best arm at each load of the production workload, and the bound, for the terminal."""
    chosen = [
        f"{cell.load.label} {cell.best} {cell.arms[0].gain:.2f}x"
        for cell in standing.cells
        if cell.workload == design.production_workload
    ]
    return f"best so far: {listed(chosen)}; at most {percent(standing.regret_bound)} to lose"
