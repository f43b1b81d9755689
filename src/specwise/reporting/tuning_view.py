"""What terminal, page and JSON need of one tuning, each worked out once.

What was confirmed on new requests and what the search believes stand apart everywhere, and a figure
of an arm that no trial ran in that cell says that it is predicted.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from specwise.analysis.cells import cells
from specwise.analysis.sweep_forecast import k_at
from specwise.decision.confirmation import Confirmation, ConfirmedLoad, keeps, slower
from specwise.decision.deployment import Tuned
from specwise.decision.findings import listed
from specwise.decision.standing import (
    ArmStanding,
    CellStanding,
    Standing,
    length_of,
    speculation_of,
)
from specwise.decision.tuning import Spent
from specwise.decision.verdict import Decision
from specwise.decision.ways import FamilyStanding, batches_at
from specwise.domain import LoadPoint, PickRecord, Trial
from specwise.measurement.sweep import families
from specwise.reporting.json_export import SCHEMA_VERSION, json_types
from specwise.reporting.tuning_figures import LoadRow
from specwise.reporting.wording import MISSING, interval, number, ratio

STOPPED_WORDS: Final[Mapping[str, str]] = {
    "tolerance": "the bound is within the tolerance",
    "budget": "the budget is spent",
    "exhausted": "every trial of the sweep was run",
    "": "the search is not over",
}
HOLDS_WORDS: Final[Mapping[str, str]] = {"better": "yes", "worse": "no", "undecided": "not shown"}


def holds(cell: ConfirmedLoad) -> str:
    """Whether the arm is shown to keep `KEPT` of what off gives there: as better, worse or
    undecided, the words that judgements have."""
    if keeps(cell.to_baseline):
        return "better"
    return "worse" if slower(cell.to_baseline) else "undecided"


@dataclass(frozen=True, slots=True)
class Step:
    """One trial of the search: what was tried, why, and when (minutes spent before it).

    ``failed`` says why it gave nothing, for one whose server did not come up.
    """

    number: int
    pick: PickRecord
    trial: Trial
    at_minutes: float
    failed: str


@dataclass(frozen=True, slots=True)
class Time:
    """Where the seconds went. ``confirming_s`` counts trials only, not their servers' starts."""

    trials_s: float
    starts: int
    starts_s: float
    sweep_s: float
    sweep_trials: int
    confirming: int
    confirming_s: float

    @property
    def search_s(self) -> float:
        """The whole search."""
        return self.trials_s + self.starts_s

    @property
    def share(self) -> float:
        """The search's part of what the sweep would have taken."""
        return self.search_s / self.sweep_s if self.sweep_s > 0 else math.nan


class TuningView:
    """What page, terminal and JSON need of one tuning, each worked out once."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.design = tuned.search.design
        self.production = self.design.production_workload
        self.loads = sorted(self.design.loads)
        self.cells = sorted(
            tuned.standing.cells, key=lambda c: (c.workload != self.production, c.workload, c.load)
        )
        self.ours = [c for c in self.cells if c.workload == self.production]
        self.deployed = self._deployed()
        self.way = self._way()
        self.batches = batches_at(self.design, self.loads, cells(tuned.search))
        self.rows = [self._row(load) for load in self.loads]
        self.steps = self._steps()
        self.time = self._time()

    def _deployed(self) -> Confirmation | None:
        """The confirmation that the answer is about: of the recommended arm, else one that left
        it open, else the first."""
        held = self.tuned.confirmations
        answer = self.tuned.recommendation
        wanted = (answer.confirmed_by, answer.arm)  # each may have an arm "scheduled"
        about = [c for c in held if (c.number, c.arm) == wanted]
        undecided = [c for c in held if c.outcome == "undecided"]
        return next(iter((*about, *undecided, *held)), None)

    def _way(self) -> FamilyStanding | None:
        ways = self.tuned.ways
        family = self.deployed.family if self.deployed else None
        return next((w for w in ways if w.family == family), ways[0] if ways else None)

    def _row(self, load: LoadPoint) -> LoadRow:
        found: dict[str, ConfirmedLoad] = {}
        number = self.deployed.number if self.deployed else None
        for confirmation in self.tuned.confirmations:
            for cell in confirmation.cells if confirmation.number == number else ():
                if (cell.workload, cell.load) == (self.production, load):
                    found["scheduled" if confirmation.schedule else "static"] = cell
        deployed = None
        if self.deployed is not None:
            deployed = found.get("scheduled" if self.deployed.schedule else "static")
        return LoadRow(
            load, found.get("static"), found.get("scheduled"), deployed, self.believed(load)
        )

    def believed(self, load: LoadPoint) -> ArmStanding:
        """The search's belief of what would run at ``load``: the length that the way has there."""
        cell = next(c for c in self.ours if c.load == load)
        name = self._arm_at(load)
        return next((a for a in cell.arms if a.arm == name), cell.arms[0])

    def _arm_at(self, load: LoadPoint) -> str:
        if self.way is None:
            return self.design.arms[0].name
        rows = self.way.schedule.rows if self.way.schedule else ()
        if self.deployed is not None:  # confirmed anew, it may differ from the search's
            rows = self.deployed.schedule
        if not rows:
            return self.way.static
        scheduled = replace(speculation_of(self.design, self.way.static), schedule=rows)
        batch = self.batches[self.loads.index(load)]
        return self.lengths(self.way.family)[k_at(scheduled, batch)]

    def lengths(self, family: str) -> dict[int, str]:
        """The family's arms by draft length, 0 for the one that idles."""
        return {length_of(self.design, name): name for name in families(self.design)[family]}

    def idle_price(self, way: FamilyStanding) -> list[tuple[LoadPoint, str, bool]]:
        """(load, ratio with interval, predicted) of being on with k = 0."""
        trials = {(a.arm, c.load): a.trials for c in self.ours for a in c.arms}
        idle = self.lengths(way.family).get(0, "")
        return [
            (load, f"{ratio(gain)} {interval(low, high)}", trials[idle, load] == 0)
            for load, gain, low, high in way.idle_price
        ]

    def _steps(self) -> list[Step]:
        by_id = {trial.trial_id: trial for trial in self.design.trials}
        steps, spent_s = [], 0.0
        skipped = self.tuned.search.skipped
        for place, pick in enumerate(self.tuned.picks, 1):
            failed = skipped.get(pick.trial_id, "")
            steps.append(Step(place, pick, by_id[pick.trial_id], spent_s / 60, failed))
            spent_s += pick.seconds + (pick.start_s if pick.started_server else 0.0)
        return steps

    def _time(self) -> Time:
        spent = Spent.of(self.tuned.picks)
        ran = [trial for study in self.tuned.confirming for trial in study.trials]
        design = self.design
        return Time(
            trials_s=sum(spent.trials.values()),
            starts=len(spent.starts),
            starts_s=sum(spent.starts),
            sweep_s=self.tuned.sweep_s,
            sweep_trials=len(design.arms) * len(design.workloads) * len(design.loads),
            confirming=len(ran),
            confirming_s=sum(part.duration_s for trial in ran for part in trial.parts),
        )

    def all_standings(self) -> list[ArmStanding]:
        """Every speculating arm in every cell."""
        baseline = self.design.arms[0].name
        return [a for c in self.cells for a in c.arms if a.arm != baseline]

    def folder(self, page: Path | None) -> Path:
        """The tuning's folder, which holds the search's; where it is not kept, the page's."""
        if self.tuned.search.folder:
            return Path(self.tuned.search.folder).parent
        return page.parent if page is not None else Path()

    def next_steps(self, folder: Path) -> list[str]:
        """Commands that follow from the answer."""
        where = shlex.quote(str(folder))
        decision = self.tuned.recommendation.decision
        if decision in (Decision.ON, Decision.SCHEDULE):
            return [
                f"specwise flags --from {where}",
                f"specwise flags --from {where} --rollout",
            ]
        if decision is Decision.MEASURE_MORE:
            budget = " --budget MINUTES" if self.tuned.stopped == "budget" else ""
            return [f"specwise tune --resume {where}{budget}"]
        return []


def slowed_words(standing: Standing) -> str:
    """Which trials count for nothing, and why."""
    trials = [f"{name} ({times:.1f}x)" for name, times in standing.slowed.items()]
    return (
        f"{listed(trials)}: something slowed the machine. A step took that many times as long as "
        "in another trial of the same arm, workload and load."
    )


def batch_span(first: int, last: int) -> str:
    """Running requests from ``first`` to ``last``: ``3–10``."""
    return f"{first}" if first == last else f"{first}–{last}"


def minutes(seconds: float) -> str:
    """A span for people: ``4.2 min`` or ``3.1 h``."""
    if not math.isfinite(seconds):
        return MISSING
    return f"{number(seconds / 60, 2)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tuning_to_dict(tuned: Tuned) -> dict[str, Any]:
    """Everything but the records, as JSON types: seconds, and gains as ratios to the baseline.

    ``predicted_only`` is true for a figure of an arm in a cell where no trial ran it.
    """
    view = TuningView(tuned)
    design, standing = view.design, tuned.standing
    return {
        "schema_version": SCHEMA_VERSION,
        "predicted": tuned.search.predicted,
        "name": design.name,
        "production_workload": view.production,
        "recommendation": json_types(tuned.recommendation),
        "stopped": tuned.stopped or None,
        "tolerance": tuned.tolerance,
        "budget_s": tuned.budget_s,
        "regret": json_types(standing.regret),
        "regret_bound": json_types(standing.regret_bound),
        "machine_deviation": json_types(standing.belief.machine_deviation),
        "rests_on": dict(standing.forecast.rests_on),
        "time": json_types(asdict(view.time))
        | {"search_s": view.time.search_s, "share_of_sweep": json_types(view.time.share)},
        "arms": [
            {"name": arm.name, "speculation": json_types(arm.speculation)} for arm in design.arms
        ],
        "cells": [_cell_to_dict(cell, design.arms[0].name) for cell in view.cells],
        "picks": [
            {
                "number": step.number,
                "at_s": 60 * step.at_minutes,
                **json_types(step.pick),
                "arm": step.trial.arm,
                "workload": step.trial.workload,
                "load": json_types(step.trial.load),
                "repeat": step.trial.repeat,
                "purpose": step.trial.purpose.value,
                "failed": step.failed,
            }
            for step in view.steps
        ],
        "eliminated": json_types(standing.eliminated),
        "slowed": dict(standing.slowed),
        "ways": [json_types(way) | {"gain": json_types(way.gain)} for way in tuned.ways],
        "confirmations": [
            json_types(c) | {"cells": [_confirmed_to_dict(cell) for cell in c.cells]}
            for c in tuned.confirmations
        ],
    }


def _confirmed_to_dict(cell: ConfirmedLoad) -> dict[str, Any]:
    plain: dict[str, Any] = json_types(cell)
    return plain | {"holds": HOLDS_WORDS[holds(cell)]}


def _cell_to_dict(cell: CellStanding, baseline: str) -> dict[str, Any]:
    plain: dict[str, Any] = json_types(cell)
    for arm, standing in zip(plain["arms"], cell.arms, strict=True):
        del arm["workload"], arm["load"]  # the cell's own
        arm["predicted_only"] = standing.trials == 0 and standing.arm != baseline
    return plain
