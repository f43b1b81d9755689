"""The decision: on, on with a schedule, off, or measure more, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from specwise.analysis.comparison import Effect
from specwise.decision.schedule import ScheduleProposal


class Decision(StrEnum):
    """What to do about speculation."""

    ON = "on"
    SCHEDULE = "on-with-schedule"
    OFF = "off"
    MEASURE_MORE = "measure-more"


@dataclass(frozen=True, slots=True)
class SegmentVerdict:
    """The decision for one segment at the production load, alone or inside a mix.

    ``workload`` is where it was measured: the mix, or the pure workload of that segment. ``arm`` is
    the candidate that serves it best, None where nothing could be compared. ``effects`` are the
    deciding effects of every candidate arm.
    """

    segment: str
    workload: str
    arm: str | None
    decision: Decision
    reason: str
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class NextTrial:
    """What to measure next: ``what`` in a sentence, ``why``, and the lines for the study file."""

    what: str
    why: str
    toml: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for the production workload at the production load.

    ``arm`` is the candidate it is about, None where there is none. ``effect`` is the deciding
    effect of that arm. ``reasons`` are sentences, the most important first.
    """

    decision: Decision
    arm: str | None
    headline: str
    reasons: tuple[str, ...]
    effect: Effect | None
    segments: tuple[SegmentVerdict, ...]
    schedule: ScheduleProposal | None
    next_trials: tuple[NextTrial, ...]
    client_limited: bool


def exit_code(decision: Decision) -> int:
    """0 for an answer that turns speculation on, 1 for off, 3 where it takes more measuring."""
    return {
        Decision.ON: 0,
        Decision.SCHEDULE: 0,
        Decision.OFF: 1,
        Decision.MEASURE_MORE: 3,
    }[decision]
