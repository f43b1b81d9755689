"""From what a tuning found to what can be deployed, and whether a fresh measurement confirms it.

A server runs one way to speculate (a *family*: method, draft model, sampling) with one draft length
or a schedule of them. What looked best among many arms is partly luck, so the arm to deploy is
measured again, on requests that chose nothing, beside the baseline and the best static arm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import CellKey, Cells, TrialTable, cells
from specwise.analysis.comparison import Effect, speedup_effects
from specwise.analysis.sweep_forecast import k_at
from specwise.decision.findings import counted, listed, percent
from specwise.decision.schedule import Composed, Lengths, compose
from specwise.decision.standing import Standing, length_of, survey
from specwise.decision.tuning import Spent, sweep_seconds
from specwise.decision.verdict import Decision
from specwise.domain import Arm, LoadPoint, Loop, PickRecord, Purpose, StudyData, StudyDesign, Trial
from specwise.measurement.sweep import families, is_data_parallel
from specwise.measurement.trials import order_trials

KEPT = 0.97
"""What a schedule must keep of the better of the baseline and the best static arm, at each load."""
_CLEARLY = 0.98
_ROOM = 0.95
_SURELY = 0.98
FEWEST_REPEATS = 2
MOST_CONFIRMATIONS = 3
_RULED_OUT = 1.0  # in log goodput: more than any draft length gains over idling
_APART = 1000  # repeats of a confirmation start there, so that no block is the search's
SCHEDULED = "scheduled"


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
                    batches=_batches(design, loads, measured),
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


def _batches(design: StudyDesign, loads: Sequence[LoadPoint], measured: Cells) -> tuple[int, ...]:
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


def to_confirm(ways: Sequence[FamilyStanding], tolerance: float) -> tuple[FamilyStanding, ...]:
    """The ways to speculate that are worth confirming, the first first; at most two.

    Those that gain more than the tolerance, averaged over the loads; first those expected to keep
    `KEPT` of the baseline at every load, then by what they gain.
    """
    worth_it = [way for way in ways if way.gain > 1 + tolerance]
    return tuple(sorted(worth_it, key=lambda way: (way.least < KEPT, -way.gain))[:2])


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
    batches = dict(zip(loads, _batches(design, loads, measured), strict=True))
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
    batches = dict(zip(loads, _batches(design, loads, measured), strict=True))
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
# What the confirmation says


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

    ``outcome`` is "confirmed": at every load of the production workload the whole interval keeps
    `KEPT` of the baseline (or the ratio is 0.98 or more and the interval leaves no room for a loss
    of 5 %), and at one at least it is shown to be faster; "refused": a load is shown to be slower;
    "undecided": the intervals are too wide to say.
    """

    family: str
    arm: str
    schedule: tuple[tuple[int, int, int], ...]
    static_arm: str
    cells: tuple[ConfirmedLoad, ...]
    outcome: Literal["confirmed", "refused", "undecided"]
    reasons: tuple[str, ...]


def confirm(study: StudyData, family: str, *, seed: int = 0) -> tuple[Confirmation, ...]:
    """What the confirmation ``study`` says of each arm of ``family`` in it, the scheduled first."""
    arms = [arm.name for arm in study.design.arms[1:]]
    return tuple(_confirm(study, family, arm, seed) for arm in reversed(arms))


def _confirm(study: StudyData, family: str, arm: str, seed: int) -> Confirmation:
    design = study.design
    measured = cells(study)
    baseline, static = design.arms[0].name, design.arms[1].name
    to_baseline = _by_cell(speedup_effects(measured, baseline, seed=seed), arm)
    to_static: Mapping[tuple[str, LoadPoint], Effect] = {}
    if arm != static:
        to_static = _by_cell(speedup_effects(measured, static, seed=seed), arm)
    versus = _by_cell(speedup_effects(measured, baseline, seed=seed), static)
    found = []
    for cell, effect in to_baseline.items():
        rival = effect
        if cell in to_static and cell in versus and versus[cell].ratio > 1:
            rival = to_static[cell]
        found.append(
            ConfirmedLoad(
                cell[0], cell[1], effect, to_static.get(cell), rival.ratio, rival.low, rival.high
            )
        )
    ours = [c for c in found if c.workload == design.production_workload]
    speculation = design.arm(arm).speculation
    assert speculation is not None  # noqa: S101 - only such arms are confirmed
    outcome, reasons = _outcome(ours, len(design.loads))
    return Confirmation(family, arm, speculation.schedule, static, tuple(found), outcome, reasons)


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


# ---------------------------------------------------------------------------------------------
# What to do


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do with the deployment. ``arm`` is a static arm of ``family`` or "scheduled"; both
    None where nothing should be turned on. ``reasons`` are sentences, the weightiest first."""

    decision: Decision
    family: str | None
    arm: str | None
    schedule: tuple[tuple[int, int, int], ...]
    headline: str
    reasons: tuple[str, ...]
    routing: str = ""


def recommend(
    design: StudyDesign,
    standing: Standing,
    ways: Sequence[FamilyStanding],
    confirmations: Sequence[Confirmation],
    *,
    stopped: str,
    tolerance: float,
) -> Recommendation:
    """The answer of a tuning, from what was found and what was confirmed.

    A schedule or a static arm is only recommended if a confirmation holds. Off is said where the
    bound is within the tolerance, and no way to speculate gains more than it or the confirmation
    refused what looked best; anything else is measure-more, with the bound that was reached.
    """
    bound = (
        f"the remaining regret is at most {percent(standing.regret_bound)} "
        f"(tolerance {percent(tolerance)}; {_STOPPED.get(stopped, 'not finished')})"
    )
    for confirmation in confirmations:
        if confirmation.outcome == "confirmed":
            return _confirmed(confirmation, bound)
    refused = tuple(
        f"{c.arm}: {c.outcome}; {listed(c.reasons)}."
        for c in confirmations
        if c.outcome != "confirmed"
    )
    known = standing.regret_bound <= tolerance
    nothing = not to_confirm(ways, tolerance)
    if known and (
        nothing or (confirmations and all(c.outcome == "refused" for c in confirmations))
    ):
        return Recommendation(
            Decision.OFF,
            None,
            None,
            (),
            "Leave speculation off: nothing tried is faster without being slower elsewhere.",
            (*refused, *(f"{w.family}: {w.note}." for w in ways if w.note), f"{_sentence(bound)}."),
            _routing(design, standing, confirmations),
        )
    open_ = [c for c in confirmations if c.outcome == "undecided"]
    headline = f"Not decided: {bound}."
    go_on = "more minutes (--budget)"
    if open_:
        headline = f"Not decided: the confirmation of {open_[0].arm} leaves it open."
        go_on = "the undecided loads more repeats (--confirm-repeats)"
    return Recommendation(
        Decision.MEASURE_MORE,
        None,
        None,
        (),
        headline,
        (
            *refused,
            *([f"{_sentence(bound)}."] if open_ else []),
            f"Go on with --resume and give {go_on}: nothing measured is lost. More requests a "
            "trial, or a quieter machine, narrow the intervals sooner.",
        ),
        _routing(design, standing, confirmations),
    )


def _routing(design: StudyDesign, standing: Standing, confirmations: Sequence[Confirmation]) -> str:
    """Two pools by segment, where an arm that cannot serve everything serves some segments well.

    A segment goes to the speculating pool if it was measured alone, keeps what off gives at every
    load and gains at one: in a confirmation, or as far as the search can tell.
    """
    for confirmation in confirmations:
        good = []
        for segment in design.segments:
            own = [c for c in confirmation.cells if c.workload == segment.name]
            kept = len(own) == len(design.loads) and all(
                c.to_baseline.ratio >= KEPT and c.to_baseline.high >= 1 for c in own
            )
            if kept and any(c.to_baseline.low > 1 for c in own):
                good.append(segment.name)
        if 0 < len(good) < len(design.segments):
            arm = confirmation.arm
            if confirmation.schedule:
                arm = f"{confirmation.family} and the schedule {_rows(confirmation.schedule)}"
            return _two_pools(design, arm, good)
    found: dict[str, list[str]] = {}
    gains: dict[str, float] = {}
    ran = {a.arm for c in standing.cells for a in c.arms if a.trials}
    for name in [a for arms in families(design).values() for a in arms if length_of(design, a)]:
        for segment in design.segments:
            cells_of = [c for c in standing.cells if c.workload == segment.name]
            own_arm = [a for c in cells_of for a in c.arms if a.arm == name]
            kept = bool(own_arm) and all(a.gain >= KEPT and a.high >= 1 for a in own_arm)
            if name in ran and kept and any(a.low > 1 for a in own_arm):
                found.setdefault(name, []).append(segment.name)
                gains[name] = gains.get(name, 0.0) + sum(math.log(a.gain) for a in own_arm)
    for name in sorted(found, key=lambda name: -gains[name]):
        if len(found[name]) < len(design.segments):
            return _two_pools(design, name, found[name]) + " This was not confirmed."
    return ""


def _two_pools(design: StudyDesign, arm: str, good: Sequence[str]) -> str:
    labels = {s.name: f"{s.name} (temperature {s.temperature:g})" for s in design.segments}
    return (
        f"Two pools, if requests can be routed: {listed([labels[name] for name in good])} to a "
        f"server with {arm}, {listed([labels[n] for n in labels if n not in good])} to one without "
        "speculation. vLLM cannot switch it off for a single request."
    )


def _confirmed(confirmation: Confirmation, bound: str) -> Recommendation:
    rows = confirmation.schedule
    how = f"with the schedule {_rows(rows)}" if rows else f"with {confirmation.arm}"
    return Recommendation(
        Decision.SCHEDULE if rows else Decision.ON,
        confirmation.family,
        confirmation.arm,
        rows,
        f"Turn speculation on {how}: at no load is it slower than off.",
        (*(f"Confirmed: {reason}." for reason in confirmation.reasons), f"{_sentence(bound)}."),
    )


_STOPPED = {
    "tolerance": "within the tolerance",
    "budget": "the budget is spent",
    "exhausted": "every trial was run",
}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rows(rows: Sequence[tuple[int, int, int]]) -> str:
    """``1: k=6, 2 to 9: k=2, from 10: k=0``."""
    *closed, last = rows
    spans = [f"{a} to {b}: k={k}" if b > a else f"{a}: k={k}" for a, b, k in closed]
    return ", ".join([*spans, f"from {last[0]}: k={last[2]}"])


@dataclass(frozen=True, slots=True)
class Tuned:
    """Everything a tuning came to: what the console, the page and the JSON show.

    ``search`` is the study of the sweep as far as it was run, ``confirming`` those that measured
    again what looked best, one way to speculate each; ``confirmations`` is what they say.
    ``sweep_s`` estimates what running every arm once in every cell would have taken. ``stopped`` is
    "tolerance", "budget", "exhausted", or "" while the search is not over.
    """

    search: StudyData
    standing: Standing
    picks: tuple[PickRecord, ...]
    sweep_s: float
    tolerance: float
    budget_s: float | None
    stopped: str
    ways: tuple[FamilyStanding, ...]
    confirming: tuple[StudyData, ...]
    confirmations: tuple[Confirmation, ...]
    recommendation: Recommendation


def assess_tuning(
    search: StudyData,
    picks: Sequence[PickRecord],
    confirming: Sequence[StudyData],
    *,
    tolerance: float,
    budget_s: float | None,
    seed: int = 0,
) -> Tuned:
    """All that follows from a tuning's two studies and its journal. Pure and deterministic."""
    design = search.design
    measured = cells(search)
    spent = Spent.of(picks)
    standing = survey(design, measured, seed=seed)
    done = {t.trial.trial_id for t in search.trials if t.complete} | set(search.skipped)
    stopped = ""
    if all(trial.trial_id in done for trial in design.trials):
        stopped = "exhausted"
        if standing.regret_bound <= tolerance:
            stopped = "tolerance"
        elif budget_s is not None and spent.total_s >= budget_s:
            stopped = "budget"
    ways = family_standings(design, standing, measured, seed=seed)
    confirmations = tuple(
        found
        for study in confirming
        for found in confirm(study, _confirmed_family(design, study), seed=seed)
    )
    return Tuned(
        search=search,
        standing=standing,
        picks=tuple(picks),
        sweep_s=sweep_seconds(design, measured, spent),
        tolerance=tolerance,
        budget_s=budget_s,
        stopped=stopped,
        ways=ways,
        confirming=tuple(confirming),
        confirmations=confirmations,
        recommendation=recommend(
            design, standing, ways, confirmations, stopped=stopped, tolerance=tolerance
        ),
    )
