"""One study in, everything that can be said about it out."""

from __future__ import annotations

from dataclasses import dataclass

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.comparison import Effect, NoiseFloor, Signature
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import ServingSummary
from specwise.decision.conditions import Condition
from specwise.decision.verdict import Verdict
from specwise.domain import StudyData


@dataclass(frozen=True, slots=True)
class Assessment:
    """A study and all that follows from it; what the console, the page and the JSON show.

    ``warnings`` are sentences about the measurement itself: incomplete trials, a limited client,
    failures, a study that a simulation made.
    """

    study: StudyData
    summaries: tuple[ServingSummary, ...]
    acceptance: tuple[AcceptanceSummary, ...]
    effects: tuple[Effect, ...]
    noise_floors: tuple[NoiseFloor, ...]
    signatures: tuple[Signature, ...]
    crossovers: tuple[Crossover, ...]
    conditions: tuple[Condition, ...]
    verdict: Verdict
    warnings: tuple[str, ...]
