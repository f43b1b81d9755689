"""The reasoning behind a verdict, step by step, so that a colleague can check it by hand.

Everything here repeats in words and numbers what `verdict` did; sums are taken afresh from the raw
records, so that a figure that cannot be reproduced would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from specwise.analysis.cells import final_records
from specwise.analysis.comparison import Effect, t_quantile
from specwise.decision.assessment import Assessment
from specwise.decision.findings import (
    ERROR_RATE,
    Findings,
    Judgement,
    Place,
    counted,
    deciding_metrics,
    listed,
    metric_name,
)
from specwise.decision.rules import Condition
from specwise.domain import Outcome, RequestRecord, StudyData

_UNITS = {"output_tokens_per_s": (1.0, "tokens/s"), "goodput_per_s": (1.0, "requests/s")}


@dataclass(frozen=True, slots=True)
class Step:
    """One step: ``lines`` to read, ``figures`` to compute with (seconds, ratios, counts)."""

    title: str
    lines: tuple[str, ...]
    figures: Mapping[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the verdict is what it is.

    ``ruled_out`` are failing conditions that forbid "on", ``supports`` and ``against`` the others
    that hold or fail for the study and this arm, ``unknown`` those nobody can answer yet.
    ``recompute`` are shell commands over the raw records.
    """

    question: str
    answer: str
    steps: tuple[Step, ...]
    ruled_out: tuple[Condition, ...]
    supports: tuple[Condition, ...]
    against: tuple[Condition, ...]
    unknown: tuple[Condition, ...]
    recompute: tuple[str, ...]


def explain(assessment: Assessment) -> Explanation:
    """The steps from raw records to the verdict, for the arm that the verdict is about."""
    findings = _findings(assessment)
    design, verdict = findings.design, assessment.verdict
    load, whole = design.production_load, findings.production
    arm = verdict.arm or (findings.candidates[0].name if findings.candidates else "")
    steps = list(_steps(assessment, findings, arm))
    about = [c for c in assessment.conditions if c.scope.split("/")[0] in ("", arm, whole.workload)]
    failing = [c for c in about if c.status == "fail"]
    return Explanation(
        question=f"Should {whole.label} at {load.label} be served with {arm}?",
        answer=f"{verdict.decision.value}: {verdict.headline}",
        steps=tuple(steps),
        ruled_out=tuple(c for c in failing if c.veto),
        supports=tuple(c for c in about if c.status == "pass"),
        against=tuple(c for c in failing if not c.veto),
        unknown=tuple(c for c in about if c.status == "unknown"),
        recompute=_commands(findings.study, verdict.effect),
    )


def _findings(assessment: Assessment) -> Findings:
    return Findings(
        study=assessment.study,
        summaries=assessment.summaries,
        acceptance=assessment.acceptance,
        effects=assessment.effects,
        noise_floors=assessment.noise_floors,
        signatures=assessment.signatures,
        crossovers=assessment.crossovers,
    )


def _steps(assessment: Assessment, findings: Findings, arm: str) -> Iterator[Step]:
    design = findings.design
    load, whole = design.production_load, findings.production
    arms = len(findings.candidates)
    metrics = deciding_metrics(design, whole)
    yield Step(
        f"What decides: the service is bound by {design.slo.bound}",
        (
            f"{metric_name(metrics[0])} first; {listed([metric_name(m) for m in metrics[1:]])} "
            "must not be worse.",
            f"Chance of a false answer: {_percent(ERROR_RATE)}, shared by "
            f"{counted(arms, 'candidate arm')}: intervals of the whole are taken at "
            f"{_percent(1 - ERROR_RATE / max(1, arms))}.",
        ),
        {"bound": design.slo.bound, "candidate_arms": arms},
    )
    confidence = 1 - ERROR_RATE / max(1, arms)
    held = [e for m in metrics if (e := findings.effect(m, arm, whole, load)) is not None]
    if not held:
        yield Step("Nothing to compare", (f"{arm} and the baseline share no complete trial.",))
    others = max(1, sum(math.isfinite(e.se_log) for e in held[1:]))
    for effect in held:
        level = confidence if effect is held[0] else 1 - (1 - confidence) / others
        yield effect_step(findings.study, effect, level)
    judged = findings.judge(arm, whole, load, confidence=confidence)
    if judged is not None:
        yield Step("The whole", (_side(judged, whole),), {"direction": judged.direction})
    parts = findings.production_parts()
    if parts:
        surely = 1 - ERROR_RATE / max(1, arms * len(parts))
        yield Step(
            "Each segment of production, because an average can hide a loser",
            tuple(_segment_lines(findings, arm, parts, surely)),
            {"surely_at": surely},
        )
    yield Step(
        "The row of the table that fits (docs/concepts/verdict.md)",
        (assessment.verdict.rule or assessment.verdict.headline,),
        {"decision": assessment.verdict.decision.value},
    )


def effect_step(study: StudyData, effect: Effect, confidence: float) -> Step:
    """One effect: figures, formula, ratio, how its interval came about, what it is compared to."""
    name = metric_name(effect.metric)
    low, high = effect.strict_interval(confidence)
    lines = [*_figures(study, effect)]
    finite = math.isfinite(effect.se_log)
    if finite:
        lines += _error_lines(effect, confidence, (low, high))
        sides = {True: "below 1", False: "above 1"}
        side = "holds 1" if low <= 1 <= high else f"lies {sides[high < 1]}"
        good = "above" if effect.better == "higher" else "below"
        lines.append(f"Good is {good} 1: the interval {side}.")
    else:
        lines.append(
            f"{effect.note[0].upper()}{effect.note[1:]}." if effect.note else "No interval."
        )
    lines.append(f"Trials: {', '.join(effect.trial_ids)}.")
    return Step(
        f"{name} of {effect.arm} on {Place(effect.workload, effect.segment).label} at "
        f"{effect.load.label}",
        tuple(lines),
        {
            "metric": effect.metric,
            "requests": effect.pairs,
            "repeats": effect.repeats,
            "baseline": effect.baseline_value,
            "candidate": effect.candidate_value,
            "ratio": effect.ratio,
            "request_variance": effect.request_variance,
            "machine_variance": effect.machine_variance,
            "trial_variance": effect.trial_variance,
            "noise_dof": effect.noise_dof,
            "se_log": effect.se_log,
            "dof": effect.dof,
            "t": t_quantile(effect.dof, confidence) if finite else None,
            "confidence": confidence,
            "low": low,
            "high": high,
        },
    )


def _figures(study: StudyData, effect: Effect) -> Iterator[str]:
    names = ("baseline", effect.arm)
    values = (effect.baseline_value, effect.candidate_value)
    if effect.metric == "speedup":
        pairs = paired_records(study, effect)
        yield "Time per output token = sum(finished - intended) / sum(output tokens), over pairs."
        for name, side, value in zip(names, (0, 1), values, strict=True):
            records = [pair[side] for pair in pairs]
            total_s = sum(r.finished_s - r.intended_s for r in records)
            tokens = sum(r.output_tokens or 0 for r in records)
            yield (
                f"{name}: {total_s:.3f} s / {tokens:,} tokens = {value * 1e3:.3f} ms, "
                f"{counted(len(records), 'request')}"
            )
        yield f"Speedup = {values[0] * 1e3:.3f} / {values[1] * 1e3:.3f} = {effect.ratio:.4f}"
        return
    factor, unit = _UNITS.get(effect.metric, (1e3, "ms"))
    for name, value in zip(names, values, strict=True):
        yield f"{name}: {value * factor:.3f} {unit}, {counted(effect.pairs, 'request')}"
    yield f"Ratio = {values[1] * factor:.3f} / {values[0] * factor:.3f} = {effect.ratio:.4f}"


def _error_lines(effect: Effect, confidence: float, interval: tuple[float, float]) -> Iterator[str]:
    b2, m2 = effect.request_variance, effect.machine_variance
    yield (
        f"Requests: b2 = {b2:.3g}, the variance of log(ratio) when the {effect.pairs} pairs are "
        "drawn again (paired bootstrap)."
    )
    if effect.trial_noise_known:
        yield (
            f"Trials: m2 = {m2:.3g} of one pair of trials beyond its requests, from repeats and "
            f"A/A trials with {effect.noise_dof:.0f} degrees of freedom; {effect.repeats} repeats."
        )
        root = math.sqrt(b2 + m2 / effect.repeats)
        formula = f"sqrt(b2 + m2 / {effect.repeats})"
        if abs(root - effect.se_log) > 1e-9:
            formula = "the wider of it and the trials alone"
        yield f"Standard error of log(ratio) = {formula} = {effect.se_log:.4f}"
    else:
        yield f"Trials: unknown; standard error = sqrt(b2) = {effect.se_log:.4f}, a lower bound."
    t = t_quantile(effect.dof, confidence)
    own = effect.interval(confidence)
    yield (
        f"At {_percent(confidence)}: t = {t:.3f} ({effect.dof:.1f} degrees of freedom); "
        f"{effect.ratio:.4f} x exp(-+ {t:.3f} x {effect.se_log:.4f}) = [{own[0]:.4f}, {own[1]:.4f}]"
    )
    if own != interval:
        whole = t_quantile(effect.noise_dof, confidence)
        yield (
            f"Whole trials alone are wider: s2 = {effect.trial_variance:.3g}, t = {whole:.3f} "
            f"({effect.noise_dof:.0f} degrees of freedom), x exp(-+ {whole:.3f} x sqrt(s2 / "
            f"{effect.repeats})) = [{interval[0]:.4f}, {interval[1]:.4f}]"
        )


def paired_records(
    study: StudyData, effect: Effect
) -> tuple[tuple[RequestRecord, RequestRecord], ...]:
    """The raw pairs behind an effect: (baseline's, candidate's) records, ended OK in both."""
    baseline = study.design.arms[0].name
    sides: dict[str, dict[tuple[int, int], RequestRecord]] = {baseline: {}, effect.arm: {}}
    for measured in study.trials:
        if measured.trial.trial_id in effect.trial_ids and measured.trial.arm in sides:
            for record in final_records(measured.records):
                usable = record.outcome is Outcome.OK and record.output_tokens is not None
                if usable and effect.segment in (None, record.segment):
                    sides[measured.trial.arm][measured.trial.repeat, record.index] = record
    base, own = sides[baseline], sides[effect.arm]
    return tuple((base[key], own[key]) for key in sorted(base.keys() & own.keys()))


def _side(judged: Judgement, place: Place) -> str:
    effect = judged.effect
    words = {"better": "better", "worse": "worse", "undecided": "undecided: an interval holds 1"}
    text = f"{place.label} is {words[judged.direction]} ({metric_name(effect.metric)} decides)."
    if judged.missing:
        text += f" {metric_name(judged.missing)}, which should decide, has no interval."
    return text


def _segment_lines(
    findings: Findings, arm: str, parts: Sequence[Place], surely: float
) -> Iterator[str]:
    load = findings.design.production_load
    for place in parts:
        judged = findings.judge(arm, place, load)
        if judged is None:
            yield f"{place.label}: not measured"
            continue
        effect = judged.effect
        text = (
            f"{place.label}: {metric_name(effect.metric)} {effect.ratio:.3f} "
            f"[{effect.low:.3f}, {effect.high:.3f}] over {effect.pairs} pairs: {judged.direction}"
        )
        if judged.direction == "worse":
            sure = findings.judge(arm, place, load, confidence=surely)
            certain = sure is not None and sure.direction == "worse"
            text += f"; at {_percent(surely)} {'still worse' if certain else 'no longer certain'}"
        elif judged.direction == "undecided":
            room = "no room" if judged.harmless else "room"
            text += f", {room} for a loss of more than 5 %"
        yield text


def _commands(study: StudyData, effect: Effect | None) -> tuple[str, ...]:
    if effect is None:
        return (f"specwise decide {study.folder} --json",)
    jq = (
        'jq -s \'map(select(.outcome == "ok")) | (map(.finished_s - .intended_s) | add) / '
        "(map(.output_tokens) | add)'"
    )
    commands = []
    design = study.design
    for arm in (design.arms[0].name, effect.arm):
        files = [
            f"{study.folder}/trials/{m.trial.trial_id}/requests.jsonl"
            for m in study.trials
            if m.trial.trial_id in effect.trial_ids and m.trial.arm == arm
        ]
        commands.append(f"{jq} {' '.join(files)}")
    return (*commands, f"specwise decide {study.folder} --json")


def _percent(share: float) -> str:
    return f"{share * 100:.4g} %"
