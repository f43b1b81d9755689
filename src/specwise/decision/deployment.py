"""The answer of a tuning: what to deploy, by what was found and what was confirmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specwise.analysis.cells import cells
from specwise.decision.confirmation import Confirmation, confirm
from specwise.decision.findings import listed, percent
from specwise.decision.standing import Standing, length_of, survey
from specwise.decision.tuning import Spent, sweep_seconds
from specwise.decision.verdict import Decision
from specwise.decision.ways import KEPT, FamilyStanding, family_standings, to_confirm
from specwise.domain import PickRecord, StudyData, StudyDesign
from specwise.measurement.sweep import families


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to do with the deployment. ``arm`` is a static arm of ``family`` or "scheduled"; both
    None where nothing should be turned on. ``reasons`` are sentences, the weightiest first.
    ``confirmed_by`` is the number of the confirmation that it rests on, if on one."""

    decision: Decision
    family: str | None
    arm: str | None
    schedule: tuple[tuple[int, int, int], ...]
    headline: str
    reasons: tuple[str, ...]
    routing: str = ""
    confirmed_by: int | None = None


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
    refused = tuple(f"{_named(c)}: {c.outcome}; {listed(c.reasons)}." for c in confirmations)
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
        confirmed_by=confirmation.number,
    )


def _named(confirmation: Confirmation) -> str:
    """An arm that was confirmed, with its schedule: that of another confirmation may differ."""
    rows = confirmation.schedule
    return f"{confirmation.arm} ({_rows(rows)})" if rows else confirmation.arm


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
        for number, study in enumerate(confirming, start=1)
        for found in confirm(design, study, number=number, seed=seed)
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
