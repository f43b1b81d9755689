"""A tuning as one self-contained page."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from specwise.decision.confirmation import Confirmation
from specwise.decision.deployment import Tuned
from specwise.decision.standing import ArmStanding
from specwise.decision.ways import KEPT, FamilyStanding
from specwise.domain import LoadPoint
from specwise.reporting import wording
from specwise.reporting.export import whole_file
from specwise.reporting.html import page_template
from specwise.reporting.svg import Chart
from specwise.reporting.tuning_figures import (
    BELIEF_STYLE,
    DEPLOYED_STYLE,
    STATIC_STYLE,
    BoundAt,
    bound_chart,
    loads_chart,
)
from specwise.reporting.tuning_view import (
    HOLDS_WORDS,
    STOPPED_WORDS,
    TuningView,
    batch_span,
    holds,
    minutes,
    slowed_words,
)

_RESTS_ON: Final[Mapping[str, str]] = {
    "itself": "its own trials",
    "its method": "trials of its method with another draft or sampling",
    "nothing": "nothing measured: its gain is unknown",
}
_SURE: Final = math.log(2)  # a ratio of 2 or a half has the strongest colour
_FEW: Final = 12  # trials that stand unfolded


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
    view = TuningView(tuned)
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
        holds_words=HOLDS_WORDS,
        batches=batch_span,
        heats=[_heat(view, w.name) for w in _production_first(view)],
        bound=_bound(view),
        few=_FEW,
        not_run=_never_run(view),
        ways=[_way_row(view, way) for way in tuned.ways],
        minutes=minutes,
        stopped=STOPPED_WORDS[tuned.stopped],
        measured=_measured(view),
        rests_on=[(name, _RESTS_ON[known]) for name, known in standing.forecast.rests_on.items()],
        next_steps=view.next_steps(view.folder(path)),
        confirming=_confirming(tuned, beside),
        measured_again={c.family for c in tuned.confirmations},
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
        study = tuned.confirming[confirmation.number - 1]
        report = _link(Path(study.folder) / "report.html" if study.folder else None, beside)
        found.append(Confirmed(confirmation, study.folder, report))
    return found


def _link(target: Path | None, beside: Path) -> str | None:
    """The relative URL of ``target``; None where there is no such thing."""
    if target is None or not target.exists():
        return None
    return quote(os.path.relpath(target, beside)) + ("/" if target.is_dir() else "")


def _production_first(view: TuningView) -> list[Any]:
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


def _heat(view: TuningView, workload: str) -> Heat:
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


def _bound(view: TuningView) -> Chart | None:
    tuned = view.tuned
    points = [
        BoundAt(step.at_minutes, step.pick.regret_bound, step.pick.started_server)
        for step in view.steps
        if step.pick.regret_bound is not None
    ]
    points.append(BoundAt(view.time.search_s / 60, tuned.standing.regret_bound, start=False))
    budget = None if tuned.budget_s is None else tuned.budget_s / 60
    return bound_chart(points, tuned.tolerance, budget, predicted=tuned.search.predicted)


def _never_run(view: TuningView) -> list[str]:
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


def _way_row(view: TuningView, way: FamilyStanding) -> WayRow:
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


def _measured(view: TuningView) -> Measured:
    held = view.all_standings()
    ran = [a for a in held if a.trials]
    off = [abs(math.log(a.gain / a.predicted)) for a in ran if math.isfinite(a.predicted)]
    return Measured(
        len(held),
        len(ran),
        math.expm1(statistics.median(off)) if off else math.nan,
        math.expm1(max(off)) if off else math.nan,
    )
