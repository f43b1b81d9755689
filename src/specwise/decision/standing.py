"""What is known of a sweep after some of its trials: each cell's best arm, and what it may lose.

Pure: the same trials, the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from specwise.analysis.cells import Cells
from specwise.analysis.steps import slowed_trials
from specwise.analysis.sweep_forecast import SweepForecast, forecast_sweep
from specwise.decision.belief import Belief, Candidate, Regret, believe, regret
from specwise.decision.findings import listed, percent
from specwise.decision.observations import observed
from specwise.domain import LoadPoint, Purpose, Speculation, StudyDesign
from specwise.measurement.sweep import families


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


def survey(
    design: StudyDesign, measured: Cells, *, seed: int = 0, forecast: SweepForecast | None = None
) -> Standing:
    """What the complete trials in ``measured`` say of every arm in every cell of ``design``.

    ``forecast`` may be given where the caller has it already.
    """
    by_family = families(design)
    slowed = slowed_trials(measured)
    measured = without(measured, slowed)
    if forecast is None:
        forecast = forecast_sweep(design, measured, by_family)
    cells = tuple((w.name, load) for w in design.workloads for load in design.loads)
    candidates = tuple(
        Candidate(arm, family, method_of(design, arm), length_of(design, arm))
        for family, arms in by_family.items()
        for arm in arms
    )
    belief = believe(
        candidates,
        cells,
        workloads={w.name: w for w in design.workloads},
        predicted=forecast.log_gain,
        rests_on=forecast.rests_on,
        observed=observed(design, measured),
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


def without(measured: Cells, slowed: Collection[str]) -> Cells:
    """``measured`` less the trials with these ids."""
    kept = {
        key: tuple(t for t in tables if t.trial.trial_id not in slowed)
        for key, tables in measured.items()
    }
    return {key: tables for key, tables in kept.items() if tables}


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


def speculation_of(design: StudyDesign, arm: str) -> Speculation:
    """How an arm of a family speculates."""
    speculation = design.arm(arm).speculation
    assert speculation is not None  # noqa: S101 - families are of speculating arms
    return speculation


def method_of(design: StudyDesign, arm: str) -> str:
    """Its method, as vLLM names it."""
    return str(speculation_of(design, arm).method)


def length_of(design: StudyDesign, arm: str) -> int:
    """Its k; 0 for the arm that idles."""
    speculation = speculation_of(design, arm)
    return 0 if speculation.schedule else int(speculation.k)
