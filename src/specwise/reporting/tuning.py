"""A tuning: in the terminal, as JSON and as one self-contained page.

What was confirmed on new requests and what the search believes stand apart everywhere, and a figure
of an arm that no trial ran in that cell says that it is predicted.
"""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specwise.decision.deployment import (
    KEPT,
    Confirmation,
    ConfirmedLoad,
    FamilyStanding,
    Tuned,
    keeps,
    slower,
)
from specwise.decision.findings import counted, listed
from specwise.decision.standing import ArmStanding, CellStanding, Standing
from specwise.decision.tuning import Spent
from specwise.decision.verdict import Decision
from specwise.domain import Arm, LoadPoint, PickRecord, Trial
from specwise.measurement.sweep import families
from specwise.reporting import wording
from specwise.reporting.console import COLOURS, console_text, ruled_table
from specwise.reporting.export import whole_file
from specwise.reporting.html import page_template
from specwise.reporting.json_export import SCHEMA_VERSION, json_types
from specwise.reporting.svg import Chart
from specwise.reporting.tuning_figures import (
    BELIEF_STYLE,
    DEPLOYED_STYLE,
    STATIC_STYLE,
    BoundAt,
    LoadRow,
    bound_chart,
    loads_chart,
)
from specwise.reporting.wording import (
    DECISION_MARKS,
    DECISION_WORDS,
    MARKS,
    MISSING,
    interval,
    number,
    percent,
    ratio,
)

_STOPPED: Final[Mapping[str, str]] = {
    "tolerance": "the bound is within the tolerance",
    "budget": "the budget is spent",
    "exhausted": "every trial of the sweep was run",
    "": "the search is not over",
}
_RESTS_ON: Final[Mapping[str, str]] = {
    "itself": "its own trials",
    "its method": "trials of its method with another draft or sampling",
    "nothing": "nothing measured: its gain is unknown",
}
_HOLDS: Final[Mapping[str, str]] = {"better": "yes", "worse": "no", "undecided": "not shown"}
_SURE: Final = math.log(2)  # a ratio of 2 or a half has the strongest colour
_FEW: Final = 12  # trials that stand unfolded


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


def _length(arm: Arm) -> int:
    """The draft length that the arm was measured for; 0 for one that idles."""
    return 0 if arm.speculation is None or arm.speculation.schedule else arm.speculation.k


class _View:
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
        self.of_the_way = [
            c for c in tuned.confirmations if self.way and c.family == self.way.family
        ]
        self.rows = [self._row(load) for load in self.loads]
        self.steps = self._steps()
        self.time = self._time()

    def _deployed(self) -> Confirmation | None:
        """The confirmation that the answer is about: the recommended arm, else the first tried."""
        held = self.tuned.confirmations
        answer = self.tuned.recommendation
        wanted = (answer.family, answer.arm)  # two ways may each have an arm "scheduled"
        return next((c for c in held if (c.family, c.arm) == wanted), held[0] if held else None)

    def _way(self) -> FamilyStanding | None:
        ways = self.tuned.ways
        family = self.deployed.family if self.deployed else None
        return next((w for w in ways if w.family == family), ways[0] if ways else None)

    def _row(self, load: LoadPoint) -> LoadRow:
        found: dict[str, ConfirmedLoad] = {}
        for confirmation in self.of_the_way:
            for cell in confirmation.cells:
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
        composed = self.way.schedule
        if composed is None or (self.deployed is not None and not self.deployed.schedule):
            return self.way.static
        return self.lengths(self.way.family)[composed.lengths[self.loads.index(load)]]

    def lengths(self, family: str) -> dict[int, str]:
        """The family's arms by draft length, 0 for the one that idles."""
        return {_length(self.design.arm(name)): name for name in families(self.design)[family]}

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


# ---------------------------------------------------------------------------------------------
# Terminal


def print_tuning(tuned: Tuned, console: Console | None = None, report: Path | None = None) -> None:
    """Print the answer, the schedule, a line for each load, what is left to lose, and what next.

    ``report`` is the page's path.
    """
    _Printer(console or Console(), _View(tuned)).print_all(report)


def slowed_words(standing: Standing) -> str:
    """Which trials count for nothing, and why."""
    trials = [f"{name} ({times:.1f}x)" for name, times in standing.slowed.items()]
    return (
        f"{listed(trials)}: something slowed the machine. A step took that many times as long as "
        "in another trial of the same arm, workload and load."
    )


class _Printer:
    """One tuning on its way to one console."""

    def __init__(self, console: Console, view: _View) -> None:
        self.console = console
        self.view = view
        self.tuned = view.tuned

    def text(self, words: str, style: str = "") -> Text:
        return console_text(self.console, words, style)

    def line(self, body: Text, indent: int = 2) -> None:
        self.console.print(Padding(body, (0, 0, 0, indent), expand=False), highlight=False)

    def print_all(self, report: Path | None) -> None:
        view, answer = self.view, self.tuned.recommendation
        mark, words = DECISION_MARKS[answer.decision], DECISION_WORDS[answer.decision]
        head = self.text(f"{mark} {words.upper()}", f"bold {COLOURS[answer.decision]}")
        head += self.text(f"   {view.production}, {view.loads[0].label} to {view.loads[-1].label}")
        if self.tuned.search.predicted:
            head += self.text("   PREDICTED, not measured", "bold yellow")
        self.console.print()
        self.line(head, 0)
        self.line(self.text(answer.headline, "bold"))
        for reason in answer.reasons[:3]:
            self.line(self.text(reason))
        if answer.routing:
            self.line(self.text(answer.routing))
        if answer.schedule:
            self._schedule(answer.schedule)
        if view.deployed is not None:
            self._confirmed(view.deployed)
        else:
            self._believed()
        self.console.print()
        facts = Table.grid(padding=(0, 1))
        facts.add_column(width=8, no_wrap=True)
        facts.add_row(self.text("Regret", "bold"), self.text(_regret_words(view)))
        facts.add_row(self.text("Time", "bold"), self.text(_time_words(view)))
        if self.tuned.standing.slowed:
            words = slowed_words(self.tuned.standing)
            facts.add_row(self.text("Left out", "bold"), self.text(words))
        self.console.print(Padding(facts, (0, 0, 0, 2), expand=False), highlight=False)
        for place, command in enumerate(view.next_steps(view.folder(report))):
            self.labelled("" if place else "Next", command)
        if report is not None:
            self.labelled("Report", str(report))

    def labelled(self, label: str, words: str) -> None:
        # never wrapped: a path or command on two lines cannot be clicked or copied
        line = self.text(f"  {label:<8} ", "bold") + self.text(words)
        self.console.print(line, highlight=False, soft_wrap=True)

    def _schedule(self, rows: Sequence[tuple[int, int, int]]) -> None:
        table = ruled_table(self.console)
        table.add_column(self.text("Running requests"), no_wrap=True)
        for first, last, _ in rows:
            table.add_column(self.text(_batches(first, last)), justify="right", no_wrap=True)
        table.add_row(self.text("Draft length k"), *(self.text(str(k)) for *_, k in rows))
        self.console.print()
        self.console.print(Padding(table, (0, 0, 0, 1), expand=False), highlight=False)

    def _confirmed(self, deployed: Confirmation) -> None:
        static = deployed.static_arm if deployed.schedule else None
        table = ruled_table(self.console)
        table.add_column("Load", no_wrap=True)
        table.add_column("Off", no_wrap=True)
        if static is not None:
            table.add_column(self.text(static), no_wrap=True)
        table.add_column(self.text(deployed.arm), no_wrap=True)
        table.add_column(self.text(f"Keeps {KEPT:g}"), no_wrap=True)
        for row in self.view.rows:
            cells = [self.text(row.load.label), self.text("1.00")]
            if static is not None:
                cells.append(self._effect(row.static))
            cells.append(self._effect(row.deployed))
            held = holds(row.deployed) if row.deployed is not None else ""
            cells.append(
                self.text(f"{MARKS[held]} {_HOLDS[held]}", COLOURS[held])
                if held
                else self.text("not measured", "dim")
            )
            table.add_row(*cells)
        self.console.print()
        self.line(self.text("Speed against off, on new requests, 95 % interval", "bold"))
        self.console.print(Padding(table, (0, 0, 0, 1), expand=False), highlight=False)

    def _effect(self, cell: ConfirmedLoad | None) -> Text:
        if cell is None or math.isnan(cell.to_baseline.ratio):
            return self.text(MISSING, "dim")
        effect = cell.to_baseline
        return (
            self.text(f"{MARKS[effect.direction]} ", COLOURS[effect.direction])
            + self.text(f"{ratio(effect.ratio)} ")
            + self.text(interval(effect.low, effect.high), "dim")
        )

    def _believed(self) -> None:
        table = ruled_table(self.console)
        for name in ("Load", "Best so far", "Gain over off", "May lose", "Rests on"):
            table.add_column(name, no_wrap=True)
        for cell in self.view.ours:
            best = next(a for a in cell.arms if a.arm == cell.best)
            is_off = best.arm == self.view.design.arms[0].name
            span = "" if is_off else f" {interval(best.low, best.high)}"
            table.add_row(
                self.text(cell.load.label),
                self.text(cell.best),
                self.text(ratio(best.gain) + span),
                self.text(f"at most {percent(cell.regret_bound, 1)}"),
                self.text("off itself", "dim") if is_off else self.text(*_rests(best)),
            )
        self.console.print()
        self.line(self.text("What the search believes; nothing is confirmed", "bold"))
        self.console.print(Padding(table, (0, 0, 0, 1), expand=False), highlight=False)


def _rests(standing: ArmStanding) -> tuple[str, str]:
    """What an arm's figure in a cell rests on, and its style in a terminal."""
    if standing.trials == 0:
        return "predicted, not run", "yellow"
    return f"{counted(standing.trials, 'trial')} here", ""


def _batches(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def _regret_words(view: _View) -> str:
    tuned = view.tuned
    return (
        f"at most {percent(tuned.standing.regret_bound, 1)} of goodput, averaged over "
        f"{len(view.cells)} cells (tolerance {percent(tuned.tolerance, 1)}); "
        f"{_STOPPED[tuned.stopped]}"
    )


def _time_words(view: _View) -> str:
    time = view.time
    words = (
        f"{minutes(time.search_s)} for {counted(len(view.steps), 'trial')} and "
        f"{counted(time.starts, 'server start')} ({minutes(time.starts_s)}), "
        f"{percent(time.share)} of the whole sweep (about {minutes(time.sweep_s)})"
    )
    if time.confirming:
        words += (
            f"; then {minutes(time.confirming_s)} for {counted(time.confirming, 'trial')} "
            "that confirm"
        )
    return words


def minutes(seconds: float) -> str:
    """A span for people: ``4.2 min`` or ``3.1 h``."""
    if not math.isfinite(seconds):
        return MISSING
    return f"{number(seconds / 60, 2)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------
# JSON


def tuning_to_dict(tuned: Tuned) -> dict[str, Any]:
    """Everything but the records, as JSON types: seconds, and gains as ratios to the baseline.

    ``predicted_only`` is true for a figure of an arm in a cell where no trial ran it.
    """
    view = _View(tuned)
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
            json_types(c)
            | {"cells": [json_types(cell) | {"holds": _HOLDS[holds(cell)]} for cell in c.cells]}
            for c in tuned.confirmations
        ],
    }


def _cell_to_dict(cell: CellStanding, baseline: str) -> dict[str, Any]:
    plain: dict[str, Any] = json_types(cell)
    for arm, standing in zip(plain["arms"], cell.arms, strict=True):
        del arm["workload"], arm["load"]  # the cell's own
        arm["predicted_only"] = standing.trials == 0 and standing.arm != baseline
    return plain


# ---------------------------------------------------------------------------------------------
# Page


def write_tuning(tuned: Tuned, path: Path) -> None:
    """Write the page to ``path``, usually ``report.html`` in the tuning's folder.

    Links to the confirmation's report and to the search's raw records are relative to ``path``.
    Raises StoreError when it cannot be written.
    """
    page = render_tuning(tuned, path)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_tuning(tuned: Tuned, path: Path) -> str:
    """The page as text, its links relative to the folder of ``path``."""
    view = _View(tuned)
    design, standing, beside = view.design, tuned.standing, path.parent
    return page_template("tuning.html").render(
        w=wording,
        tuned=tuned,
        design=design,
        standing=standing,
        slowed=slowed_words(standing),
        answer=tuned.recommendation,
        predicted=tuned.search.predicted,
        baseline=design.arms[0].name,
        view=view,
        kept=KEPT,
        loads=loads_chart(view.rows, predicted=tuned.search.predicted),
        styles={"deployed": DEPLOYED_STYLE, "static": STATIC_STYLE, "belief": BELIEF_STYLE},
        holds=holds,
        holds_words=_HOLDS,
        batches=_batches,
        heats=[_heat(view, w.name) for w in _production_first(view)],
        bound=_bound(view),
        few=_FEW,
        not_run=_never_run(view),
        ways=[_way_row(view, way) for way in tuned.ways],
        minutes=minutes,
        stopped=_STOPPED[tuned.stopped],
        measured=_measured(view),
        rests_on=[(name, _RESTS_ON[known]) for name, known in standing.forecast.rests_on.items()],
        next_steps=view.next_steps(view.folder(path)),
        confirming=_confirming(tuned, beside),
        search_folder=_link(Path(tuned.search.folder) if tuned.search.folder else None, beside),
    )


@dataclass(frozen=True, slots=True)
class Confirmed:
    """One arm that was measured again: what came of it, and where the evidence is."""

    confirmation: Confirmation
    folder: str
    report: str | None


def _confirming(tuned: Tuned, beside: Path) -> list[Confirmed]:
    found = []
    for confirmation in tuned.confirmations:
        # the study of its family is the one that has the same best static arm
        study = next(
            s for s in tuned.confirming if s.design.arms[1].name == confirmation.static_arm
        )
        report = _link(Path(study.folder) / "report.html" if study.folder else None, beside)
        found.append(Confirmed(confirmation, study.folder, report))
    return found


def _link(target: Path | None, beside: Path) -> str | None:
    """The relative URL of ``target``; None where there is no such thing."""
    if target is None or not target.exists():
        return None
    return quote(os.path.relpath(target, beside)) + ("/" if target.is_dir() else "")


def _production_first(view: _View) -> list[Any]:
    return sorted(view.design.workloads, key=lambda w: w.name != view.production)


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One arm at one load: its gain, how strongly to colour it (percent), and on what it rests."""

    standing: ArmStanding
    side: str
    strength: int
    best: bool
    predicted: bool


@dataclass(frozen=True, slots=True)
class Heat:
    """Gains of all speculating arms of one workload, arms by loads."""

    workload: str
    loads: tuple[LoadPoint, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]


def _heat(view: _View, workload: str) -> Heat:
    cells = sorted((c for c in view.cells if c.workload == workload), key=lambda c: c.load)
    rows = []
    for arm in view.design.arms[1:]:
        found = []
        for cell in cells:
            standing = next(a for a in cell.arms if a.arm == arm.name)
            turned = math.log(standing.gain)
            found.append(
                HeatCell(
                    standing,
                    side="gain" if turned >= 0 else "loss",
                    strength=round(45 * min(abs(turned) / _SURE, 1.0)),
                    best=cell.best == arm.name,
                    predicted=standing.trials == 0,
                )
            )
        rows.append((arm.name, tuple(found)))
    return Heat(workload, tuple(c.load for c in cells), tuple(rows))


def _bound(view: _View) -> Chart | None:
    tuned = view.tuned
    points = [
        BoundAt(step.at_minutes, step.pick.regret_bound, step.pick.started_server)
        for step in view.steps
        if step.pick.regret_bound is not None
    ]
    points.append(BoundAt(view.time.search_s / 60, tuned.standing.regret_bound, start=False))
    budget = None if tuned.budget_s is None else tuned.budget_s / 60
    return bound_chart(points, tuned.tolerance, budget, predicted=tuned.search.predicted)


def _never_run(view: _View) -> list[str]:
    """Arms that no trial ran and that nothing rules out."""
    ran = {step.trial.arm for step in view.steps}
    out = {e.arm for e in view.tuned.standing.eliminated}
    return [arm.name for arm in view.design.arms if arm.name not in ran | out]


@dataclass(frozen=True, slots=True)
class WayRow:
    """A way to deploy; ``static_loads`` and ``scheduled_loads`` count the loads at which a trial
    ran what the gain is of. ``idle`` is (load, ratio with interval, predicted)."""

    way: FamilyStanding
    static_loads: int
    scheduled_loads: int
    idle: tuple[tuple[LoadPoint, str, bool], ...]


def _way_row(view: _View, way: FamilyStanding) -> WayRow:
    trials = {(a.arm, c.load): a.trials for c in view.ours for a in c.arms}
    scheduled = 0
    if way.schedule is not None:
        names = view.lengths(way.family)
        scheduled = sum(
            trials[names[k], load] > 0
            for load, k in zip(view.loads, way.schedule.lengths, strict=True)
        )
    static = sum(trials[way.static, load] > 0 for load in view.loads)
    return WayRow(way, static, scheduled, tuple(view.idle_price(way)))


@dataclass(frozen=True, slots=True)
class Measured:
    """How much of what the page shows was measured: (arm, cell) pairs with a trial of all pairs,
    and how far what trials showed lies from the prediction alone (NaN without a pair to compare).
    """

    pairs: int
    with_trial: int
    typical: float
    largest: float


def _measured(view: _View) -> Measured:
    held = view.all_standings()
    ran = [a for a in held if a.trials]
    off = [abs(math.log(a.gain / a.predicted)) for a in ran if math.isfinite(a.predicted)]
    return Measured(
        len(held),
        len(ran),
        math.expm1(statistics.median(off)) if off else math.nan,
        math.expm1(max(off)) if off else math.nan,
    )
