"""What a folder given on the command line stands for: a study, or the study a tuning rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specwise.cli.tune import read_tuning
from specwise.decision.assessment import Assessment, assess
from specwise.decision.deployment import Recommendation, Tuned
from specwise.decision.evidence import gather_evidence
from specwise.decision.schedule import ScheduleProposal
from specwise.domain import StudyData
from specwise.measurement.store import read_study


def is_tuning(path: Path) -> bool:
    """Whether ``path`` is what `specwise tune` wrote, which holds studies and is none itself."""
    return not (path / "manifest.json").exists() and (path / "search" / "manifest.json").exists()


def read_assessment(path: Path) -> tuple[Path, Assessment]:
    """The study folder that ``path`` stands for, and what is to be done by it.

    A study is its own folder. Of a tuning it is the confirmation that its answer rests on, and the
    answer is the verdict. Raises StoreError for a folder that is neither.
    """
    if not is_tuning(path):
        study = read_study(path)
        return path, assess(study, gather_evidence(study))
    tuned = read_tuning(path)
    study = _rests_on(tuned)
    assessment = assess(study, gather_evidence(study))
    return Path(study.folder), with_recommendation(assessment, tuned.recommendation)


def _rests_on(tuned: Tuned) -> StudyData:
    """The study in which a tuning confirmed what it recommends, else what else it measured."""
    confirmed_by = tuned.recommendation.confirmed_by
    if confirmed_by is not None:
        return tuned.confirming[confirmed_by - 1]
    return (*tuned.confirming, tuned.search)[0]


def with_recommendation(assessment: Assessment, recommended: Recommendation) -> Assessment:
    """The confirmation of a tuning with the tuning's answer as its verdict.

    The tuning asks more than a study: that no load loses, not only production's.
    """
    schedule = None
    if recommended.arm is not None and recommended.schedule:
        schedule = ScheduleProposal(
            recommended.arm, recommended.schedule, "confirmed by the tuning", confirmed=True
        )
    verdict = replace(
        assessment.verdict,
        decision=recommended.decision,
        arm=recommended.arm,
        headline=recommended.headline,
        reasons=recommended.reasons,
        schedule=schedule,
        next_trials=(),
    )
    return replace(assessment, verdict=verdict)
