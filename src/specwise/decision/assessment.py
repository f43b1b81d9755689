"""One study in, everything that can be said about it out."""

from __future__ import annotations

from dataclasses import dataclass

from specwise.analysis.acceptance import AcceptanceSummary, summarise_acceptance
from specwise.analysis.cells import Cells, cells
from specwise.analysis.comparison import Effect, NoiseFloor, Signature, compare
from specwise.analysis.crossover import Crossover, find_crossovers
from specwise.analysis.experiment import Experiment, experiment_of
from specwise.analysis.latency import ServingSummary, summarise
from specwise.decision.conditions import Condition, check_conditions
from specwise.decision.evidence import Evidence
from specwise.decision.findings import Findings, counted, limited_trials, listed
from specwise.decision.verdict import Verdict, decide
from specwise.domain import Outcome, StudyData


@dataclass(frozen=True, slots=True)
class Assessment:
    """A study and all that follows from it; what the console, the page and the JSON show.

    ``warnings`` are sentences about the measurement itself: incomplete trials, a limited client,
    failures, a study that a simulation made. ``experiment`` is the result of the experiment that
    the study was designed as, None for a plain study.
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
    experiment: Experiment | None = None


def assess(study: StudyData, evidence: Evidence | None = None, *, seed: int = 0) -> Assessment:
    """Everything that can be said about ``study``. Pure; the same study and seed, the same answer.

    ``evidence`` is what `gather_evidence` knows beside the measurement. A study that is not
    finished, even an empty one, can be assessed: what is missing makes the
    verdict measure-more.
    """
    measured = cells(study)
    comparison = compare(study, measured, seed=seed)
    findings = Findings(
        study=study,
        summaries=summarise(study, measured),
        acceptance=summarise_acceptance(study, measured),
        effects=comparison.effects,
        noise_floors=comparison.noise_floors,
        signatures=comparison.signatures,
        crossovers=find_crossovers(comparison.effects, seed=seed),
    )
    conditions = check_conditions(findings, measured, evidence)
    return Assessment(
        study=study,
        summaries=findings.summaries,
        acceptance=findings.acceptance,
        effects=findings.effects,
        noise_floors=findings.noise_floors,
        signatures=findings.signatures,
        crossovers=findings.crossovers,
        conditions=conditions,
        verdict=decide(findings, conditions),
        warnings=_warnings(findings, measured),
        experiment=experiment_of(
            study, measured, comparison, findings.summaries, findings.acceptance, seed=seed
        ),
    )


def _warnings(findings: Findings, measured: Cells) -> tuple[str, ...]:
    """What a reader must know about the measurement before reading its figures."""
    study = findings.study
    found = []
    if study.predicted:
        found.append("A simulation made this study: every figure is a prediction.")
    done = {t.trial.trial_id for t in study.trials if t.complete}
    planned = [t.trial_id for t in study.design.trials if t.trial_id not in study.skipped]
    missing = [trial_id for trial_id in planned if trial_id not in done]
    if missing:
        found.append(
            f"{len(missing)} of {len(planned)} trials are not complete and were left "
            "out; `specwise measure` on the folder goes on with them."
        )
    for reason in dict.fromkeys(study.skipped.values()):
        number = sum(why == reason for why in study.skipped.values())
        found.append(f"{counted(number, 'trial')} did not have to be run: {reason}.")
    for segment, remarks in study.provenance.get("prompt_notes", {}).items():
        found += [f"Prompts of segment {segment}: {remark}" for remark in remarks]
    limited = limited_trials(measured)
    if limited:
        found.append(
            f"The load generator limited {counted(len(limited), 'trial')}: "
            + listed([f"{name} ({why})" for name, why in limited[:3]])
            + (" and more." if len(limited) > 3 else ".")
        )
    failed = sum(s.failed for s in findings.summaries if s.segment is None)
    requests = sum(s.requests for s in findings.summaries if s.segment is None)
    if failed:
        found.append(
            f"{failed} of {requests} requests failed; they count as misses in goodput and are "
            "shown by outcome."
        )
    uncounted = sum(
        r.outcome is Outcome.OK and r.output_tokens is None for t in study.trials for r in t.records
    )
    if uncounted:
        found.append(
            f"{counted(uncounted, 'request')} ended OK without a token count from the server and "
            "could not be compared."
        )
    if any(part.counters_reset for trial in study.trials for part in trial.parts):
        found.append("A server restarted during a trial: its counters of that stretch are unused.")
    if not any(e.trial_noise_known for e in findings.effects) and findings.effects:
        found.append("No repeats and no A/A trial: intervals hold only the requests' own noise.")
    return tuple(found)
