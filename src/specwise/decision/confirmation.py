"""The confirmation: what looked best is measured again, beside off and the best static arm.

What looked best among many arms is partly luck, so it is measured on requests that chose nothing.
A refusal is not the end: what it showed joins the search, and the next way is chosen by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specwise.analysis.cells import CellKey, Cells, TrialTable, cells
from specwise.analysis.comparison import Effect, speedup_effects
from specwise.analysis.sweep_forecast import k_at
from specwise.decision.findings import counted, listed, percent
from specwise.decision.standing import length_of, survey
from specwise.decision.ways import KEPT, FamilyStanding, batches_at, family_standings, to_confirm
from specwise.domain import Arm, LoadPoint, Purpose, StudyData, StudyDesign, Trial
from specwise.measurement.sweep import families
from specwise.measurement.trials import order_trials

SCHEDULED = "scheduled"
FEWEST_REPEATS = 2
MOST_CONFIRMATIONS = 3
_CLEARLY = 0.98
_ROOM = 0.95
_SURELY = 0.98
_APART = 1000  # repeats of a confirmation start there, so that no block is the search's


def confirmation_design(
    design: StudyDesign,
    standing: FamilyStanding,
    *,
    repeats: int,
) -> StudyDesign:
    """The study that confirms ``standing``: the baseline, the best static arm, the scheduled one.

    Every workload at every load of the sweep, on requests that the search did not use (the seed is
    another). The verdict is about the largest load, which a schedule must survive.
    """
    arms = (design.arms[0], *_arms_of(design, standing))
    requests = {trial.load: trial.requests for trial in design.trials}
    return replace(
        design,
        name=f"{design.name}-confirm",
        seed=design.seed + 1,
        arms=arms,
        experiment="",
        tune=None,
        trials=order_trials(
            arms,
            design.workloads,
            design.loads,
            requests=requests,
            repeats=repeats,
            noise_workload=design.production_workload,
            together=design.servers_together,
        ),
    )


def _arms_of(design: StudyDesign, way: FamilyStanding) -> tuple[Arm, ...]:
    """What is confirmed of a way to speculate: its best static arm, and its schedule if any."""
    static = design.arm(way.static)
    if way.schedule is None:
        return (static,)
    assert static.speculation is not None  # noqa: S101 - it is a candidate
    rows = way.schedule.rows
    speculation = replace(static.speculation, k=max(k for _, _, k in rows), schedule=rows)
    return (static, Arm(SCHEDULED, speculation, static.deployment))


def next_way(
    search: StudyData, confirming: Sequence[StudyData], tolerance: float, *, seed: int = 0
) -> FamilyStanding | None:
    """What to confirm next, after the confirmations ``confirming``; None if nothing is left.

    A schedule that was refused is not the end: its trials say at which loads it loses. They join
    those of the search, and the best draft length at each load is chosen anew. What results is
    worth confirming if it was not tried yet, and, for a family that was, if by all that is known
    now it keeps `KEPT` at every load. Where drafting was refused and idling ran at most once, that
    is not known: one trial may have met an odd minute, and idling is all that is left. At most
    `MOST_CONFIRMATIONS` in all: each is one more chance to be lucky.
    """
    if len(confirming) >= MOST_CONFIRMATIONS:
        return None
    design, measured = search.design, dict(cells(search))
    for number, study in enumerate(confirming, start=1):
        for key, tables in _as_swept(study, design, measured, number).items():
            measured[key] = (*measured.get(key, ()), *tables)
    ways = family_standings(
        design,
        survey(design, measured, seed=seed),
        measured,
        seed=seed,
        idling=_left_to_idle(design, confirming, measured),
    )
    tried = [study.design.arms[1:] for study in confirming]
    families_tried = {_confirmed_family(design, study) for study in confirming}
    for way in to_confirm(ways, tolerance):
        again = way.family in families_tried
        if not (again and (way.least < KEPT or _arms_of(design, way) in tried)):
            return way
    return None


def _left_to_idle(
    design: StudyDesign, confirming: Sequence[StudyData], measured: Cells
) -> set[tuple[str, LoadPoint]]:
    """Families and loads where a schedule that drafts was refused and idling is hardly known.

    None of a schedule that was refused where it idled, too: then idling is known to cost too much.
    """
    loads, production = sorted(design.loads), design.production_workload
    batches = dict(zip(loads, batches_at(design, loads, measured), strict=True))
    found: set[tuple[str, LoadPoint]] = set()
    for study in confirming:
        family, arm = _confirmed_family(design, study), study.design.arms[-1]
        idle = next((a for a in families(design)[family] if not length_of(design, a)), None)
        if idle is None or arm.name != SCHEDULED or arm.speculation is None:
            continue
        effects = _by_cell(speedup_effects(cells(study), design.arms[0].name), SCHEDULED)
        lost = [
            load for (workload, load), e in effects.items() if workload == production and slower(e)
        ]
        if all(k_at(arm.speculation, batches[load]) for load in lost):
            ran = {
                load: len(measured.get((idle, production, load, Purpose.MEASURE), ()))
                for load in lost
            }
            found |= {(family, load) for load in lost if ran[load] < FEWEST_REPEATS}
    return found


def _confirmed_family(design: StudyDesign, study: StudyData) -> str:
    """The family of the sweep that the confirmation ``study`` is of."""
    static = study.design.arms[1].name
    return next(family for family, arms in families(design).items() if static in arms)


def _as_swept(
    study: StudyData, design: StudyDesign, measured: Cells, number: int
) -> dict[CellKey, tuple[TrialTable, ...]]:
    """The trials of a confirmation as trials of the sweep's own arms.

    A scheduled arm is at each load the arm with the draft length that it has there. Blocks stay
    apart from the search's: the requests are others.
    """
    loads = sorted(design.loads)
    batches = dict(zip(loads, batches_at(design, loads, measured), strict=True))
    siblings = families(design)[_confirmed_family(design, study)]
    found: dict[CellKey, list[TrialTable]] = {}
    for (arm, workload, load, purpose), tables in cells(study).items():
        name: str | None = arm
        if arm == SCHEDULED:
            speculation = study.design.arm(arm).speculation
            k = k_at(speculation, batches[load]) if speculation else 0
            name = next((a for a in siblings if length_of(design, a) == k), None)
        if name is None:
            continue
        for table in tables:
            trial = replace(
                table.trial,
                trial_id=f"confirm-{number}/{table.trial.trial_id}",
                arm=name,
                repeat=_APART * number + table.trial.repeat,
            )
            found.setdefault((name, workload, load, purpose), []).append(
                replace(table, trial=trial)
            )
    return {key: tuple(tables) for key, tables in found.items()}


def settled(study: StudyData) -> frozenset[LoadPoint]:
    """Loads of a confirmation at which no more repeats are needed.

    The scheduled arm (without a schedule the static one) is shown to keep `KEPT` of the baseline,
    or not to, on the production workload.
    """
    design = study.design
    effects = speedup_effects(cells(study), design.arms[0].name)
    return frozenset(
        e.load
        for e in effects
        if (e.arm, e.workload) == (design.arms[-1].name, design.production_workload)
        and e.repeats >= FEWEST_REPEATS
        and (keeps(e) or slower(e))
    )


def keeps(effect: Effect) -> bool:
    """Whether what off gives is shown to be kept, or nearly, with no room for a loss of 5 %.

    At 98 %, and as surely as whole trials say it: it is asked at many loads, and after each repeat.
    """
    low, _ = effect.strict_interval(_SURELY)
    return low >= KEPT or (effect.ratio >= _CLEARLY and low >= _ROOM)


def slower(effect: Effect) -> bool:
    """Whether it is shown to be slower than off, by more than a schedule may cost."""
    return effect.high < KEPT or (effect.high < 1 and effect.ratio < KEPT)


def next_confirmation(study: StudyData) -> Trial | None:
    """The next trial of a confirmation; None when nothing is left to learn.

    Every cell once and those of the production workload `FEWEST_REPEATS` times, then more repeats
    of its loads that are not settled.
    """
    design = study.design
    done = {t.trial.trial_id for t in study.trials if t.complete} | set(study.skipped)
    left = [trial for trial in design.trials if trial.trial_id not in done]
    ours = [trial for trial in left if trial.workload == design.production_workload]
    first = [trial for trial in left if trial.repeat == 0 or trial in ours]
    if first and first[0].repeat < FEWEST_REPEATS:
        return first[0]
    clear = settled(study)
    return next((trial for trial in ours if trial.load not in clear), None)


# ---------------------------------------------------------------------------------------------
# What it says


@dataclass(frozen=True, slots=True)
class ConfirmedLoad:
    """The deployed arm in one cell of the confirmation.

    ``to_baseline`` and ``to_static`` are paired effects on time per token (above 1: faster);
    ``ratio`` is the one against the better of the two, [``low``, ``high``] its 95 % interval.
    """

    workload: str
    load: LoadPoint
    to_baseline: Effect
    to_static: Effect | None
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Whether the arm to deploy holds what the tuning promised, cell by cell.

    ``number`` says which of the tuning's confirmations it is from, the first being 1.
    ``outcome`` is "confirmed": at every load of the production workload the whole interval keeps
    `KEPT` of the baseline (or the ratio is 0.98 or more and the interval leaves no room for a loss
    of 5 %), and at one at least it is shown to be faster; "refused": a load is shown to be slower;
    "undecided": the intervals are too wide to say.
    """

    number: int
    family: str
    arm: str
    schedule: tuple[tuple[int, int, int], ...]
    static_arm: str
    cells: tuple[ConfirmedLoad, ...]
    outcome: Literal["confirmed", "refused", "undecided"]
    reasons: tuple[str, ...]


def confirm(
    sweep: StudyDesign, study: StudyData, *, number: int = 1, seed: int = 0
) -> tuple[Confirmation, ...]:
    """What ``study``, a confirmation of ``sweep``, says of each arm in it, the scheduled first."""
    family, measured = _confirmed_family(sweep, study), cells(study)
    baseline, static, *scheduled = (arm.name for arm in study.design.arms)
    over_off = speedup_effects(measured, baseline, seed=seed)
    over_static = speedup_effects(measured, static, seed=seed) if scheduled else ()
    of_static = _by_cell(over_off, static)
    found = []
    for arm in (*scheduled, static):
        speculation = study.design.arm(arm).speculation
        assert speculation is not None  # noqa: S101 - only such arms are confirmed
        to_static = _by_cell(over_static, arm)
        held = [
            _confirmed_load(effect, of_static.get(cell), to_static.get(cell))
            for cell, effect in _by_cell(over_off, arm).items()
        ]
        ours = [c for c in held if c.workload == study.design.production_workload]
        outcome, reasons = _outcome(ours, len(study.design.loads))
        found.append(
            Confirmation(
                number, family, arm, speculation.schedule, static, tuple(held), outcome, reasons
            )
        )
    return tuple(found)


def _confirmed_load(
    to_baseline: Effect, static: Effect | None, to_static: Effect | None
) -> ConfirmedLoad:
    """One cell; ``static`` is what the static arm has over the baseline there."""
    rival = to_baseline
    if to_static is not None and static is not None and static.ratio > 1:
        rival = to_static
    return ConfirmedLoad(
        workload=to_baseline.workload,
        load=to_baseline.load,
        to_baseline=to_baseline,
        to_static=to_static,
        ratio=rival.ratio,
        low=rival.low,
        high=rival.high,
    )


def _by_cell(effects: Sequence[Effect], arm: str) -> dict[tuple[str, LoadPoint], Effect]:
    return {(e.workload, e.load): e for e in effects if e.arm == arm}


def _outcome(
    ours: Sequence[ConfirmedLoad], loads: int
) -> tuple[Literal["confirmed", "refused", "undecided"], tuple[str, ...]]:
    lost = [c for c in ours if slower(c.to_baseline)]
    if lost:
        return "refused", tuple(
            f"at {c.load.label} it is slower than off: {_span(c.to_baseline)}" for c in lost
        )
    faster = [c for c in ours if c.to_baseline.low > 1]
    doubtful = [c for c in ours if not keeps(c.to_baseline)]
    behind = [c for c in ours if c.ratio < KEPT and c.high < 1]
    reasons = []
    if len(ours) < loads:
        reasons.append(f"only {len(ours)} of {counted(loads, 'load')} were measured")
    if doubtful:
        reasons.append(
            f"room for a loss of more than {percent(1 - KEPT)} is left at "
            + listed([f"{c.load.label} ({_span(c.to_baseline)})" for c in doubtful])
        )
    if behind:
        reasons.append(
            "the best static arm is faster at "
            + listed(
                [f"{c.load.label} ({c.ratio:.2f}x [{c.low:.2f}, {c.high:.2f}])" for c in behind]
            )
        )
    if not faster:
        reasons.append("at no load is it shown to be faster than off")
    if len(ours) < loads or doubtful or not faster:
        return "undecided", tuple(reasons)
    won = listed([f"{c.load.label} ({_span(c.to_baseline)})" for c in faster])
    return "confirmed", (f"faster than off at {won}, and slower at no load", *reasons)


def _span(effect: Effect) -> str:
    return f"{effect.ratio:.2f}x [{effect.low:.2f}, {effect.high:.2f}]"
