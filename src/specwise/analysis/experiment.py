"""The result of the experiment that a study was designed as."""

from __future__ import annotations

from collections.abc import Sequence

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.cells import Cells
from specwise.analysis.comparison import Comparison
from specwise.analysis.ladder import Ladder, climb
from specwise.analysis.latency import ServingSummary
from specwise.analysis.mixture import Mixture, diagnose
from specwise.analysis.temperature import TemperatureSweep, sweep
from specwise.domain import StudyData

Experiment = TemperatureSweep | Ladder | Mixture


def experiment_of(
    study: StudyData,
    measured: Cells,
    comparison: Comparison,
    summaries: Sequence[ServingSummary],
    acceptance: Sequence[AcceptanceSummary],
    *,
    seed: int = 0,
) -> Experiment | None:
    """What ``study.design.experiment`` found so far; None for a plain study."""
    match study.design.experiment:
        case "temperature":
            return sweep(study, measured, comparison.effects, seed=seed)
        case "ladder":
            return climb(study, measured, summaries, comparison.effects, seed=seed)
        case "mixed":
            return diagnose(study, comparison.effects, acceptance, comparison.signatures)
    return None
