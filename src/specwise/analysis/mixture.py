"""The mix and its control: which segments lose in it, and whether the mix or speculation is why.

For each arm and segment three ratios to the baseline stand side by side: inside the mix, alone at
the same load (the homogeneous control, req F3), and the contrast of the two, in the mix over alone.
The mix and the control are trials of their own, so the contrast's variance is the sum of theirs
(degrees of freedom: Welch). Every claim is made at 1 - 0.05 / (arms x segments).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.comparison import Effect, Signature, t_quantile
from specwise.analysis.temperature import Class, classify
from specwise.domain import LoadPoint, StudyData

Cause = Literal["the mix", "speculation itself", "both", "no harm", "cannot tell yet"]

MARGIN = 0.95
"""A loss that is shown to stay within 5 % is no harm."""
DIAGNOSED = ("tpot_p95", "tpot_p99", "speedup")
"""The tail that users of the mix feel (F3), and the mean that the verdict rests on. P99 takes 100
requests of a segment to judge; P95 takes 20."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """How much better (above 1) or worse (below 1) an arm does in the mix than alone.

    The ratio of two effects, turned so that above 1 is good whatever the metric; the interval is
    at ``confidence``.
    """

    ratio: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One metric of one segment: in the mix, alone, and what their contrast says about the cause.

    ``reason`` is a sentence. ``alone`` and ``contrast`` are None where the control is missing.
    """

    arm: str
    segment: str
    metric: str
    in_mix: Effect
    alone: Effect | None
    contrast: Contrast | None
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentShare:
    """A segment inside the mix: its share of requests, its acceptance, its speedup."""

    segment: str
    share: float
    temperature: float
    acceptance: AcceptanceSummary | None
    speedup: Effect | None


@dataclass(frozen=True, slots=True)
class AggregateView:
    """What the average of the mix says beside what each segment says (req F4).

    ``klass`` is the article's class of the average acceptance rate. ``losing`` are the segments
    whose speedup is surely below 1, ``losing_share`` their share of the requests, and ``hidden``
    says that the average does not show it: the mix as a whole is not surely slower.
    """

    arm: str
    acceptance: AcceptanceSummary | None
    klass: Class | None
    speedup: Effect | None
    segments: tuple[SegmentShare, ...]
    losing: tuple[str, ...]
    losing_share: float
    hidden: bool


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixed experiment's result at the production load.

    ``signatures`` are those of the mix as a whole and of its segments: P50 better while P99 worse,
    tested by their intervals. ``sentences`` say it for people, the arm's diagnosis first.
    """

    workload: str
    load: LoadPoint
    signatures: tuple[Signature, ...]
    diagnoses: tuple[Diagnosis, ...]
    aggregates: tuple[AggregateView, ...]
    sentences: tuple[str, ...]


def diagnose(
    study: StudyData,
    effects: Sequence[Effect],
    acceptance: Sequence[AcceptanceSummary],
    signatures: Sequence[Signature],
) -> Mixture:
    """The mixed experiment of ``study``, from its effects, acceptance and signatures."""
    design = study.design
    load = design.production_load
    mix = design.workload(design.production_workload)
    here = [e for e in effects if e.load == load]
    arms = [arm.name for arm in design.arms[1:]]
    confidence = 1 - 0.05 / (len(arms) * len(mix.shares))
    diagnoses = []
    for arm in arms:
        for segment, _ in mix.shares:
            for metric in DIAGNOSED:
                in_mix = _find(here, metric, arm, mix.name, segment)
                alone = _find(here, metric, arm, segment, None)
                if in_mix is not None:
                    diagnoses.append(_diagnosis(in_mix, alone, segment, confidence))
    aggregates = tuple(
        _aggregate(study, arm, here, [a for a in acceptance if a.load == load], confidence)
        for arm in arms
    )
    own = tuple(s for s in signatures if (s.workload, s.load) == (mix.name, load))
    return Mixture(
        workload=mix.name,
        load=load,
        signatures=own,
        diagnoses=tuple(diagnoses),
        aggregates=aggregates,
        sentences=tuple(_sentences(arms, mix.name, own, diagnoses, aggregates)),
    )


def contrast(in_mix: Effect, alone: Effect, confidence: float) -> Contrast:
    """exp(gain in the mix - gain alone) with its Welch interval; NaN where an effect has none."""
    gain = _gain(in_mix) - _gain(alone)
    variances = in_mix.se_log**2, alone.se_log**2
    total = sum(variances)
    if not (math.isfinite(gain) and math.isfinite(total) and total > 0):
        return Contrast(
            math.exp(gain) if math.isfinite(gain) else math.nan, math.nan, math.nan, confidence
        )
    dof = total**2 / (variances[0] ** 2 / in_mix.dof + variances[1] ** 2 / alone.dof)
    half = t_quantile(dof, confidence) * math.sqrt(total)
    return Contrast(math.exp(gain), math.exp(gain - half), math.exp(gain + half), confidence)


def cause_of(
    in_mix: Effect, alone: Effect | None, between: Contrast | None, confidence: float
) -> Cause:
    """What harms a segment, from its effect in the mix, alone, and their contrast.

    No harm: in the mix it is surely better, or surely loses less than 5 %. Where it is surely worse
    in the mix: "speculation itself" if it is surely worse alone too, "the mix" if it is surely
    worse in the mix than alone, "both" if both hold. Anything less is "cannot tell yet".
    """
    low, high = _gain_interval(in_mix, confidence)
    if low >= MARGIN:
        return "no harm"
    if not high < 1 or alone is None or between is None:
        return "cannot tell yet"
    if not (in_mix.trial_noise_known and alone.trial_noise_known):
        return "cannot tell yet"
    alone_worse = _gain_interval(alone, confidence)[1] < 1
    mix_worsens = between.high < 1
    if alone_worse and mix_worsens:
        return "both"
    if alone_worse:
        return "speculation itself"
    return "the mix" if mix_worsens else "cannot tell yet"


def _diagnosis(in_mix: Effect, alone: Effect | None, segment: str, confidence: float) -> Diagnosis:
    between = contrast(in_mix, alone, confidence) if alone is not None else None
    cause = cause_of(in_mix, alone, between, confidence)
    return Diagnosis(
        arm=in_mix.arm,
        segment=segment,
        metric=in_mix.metric,
        in_mix=in_mix,
        alone=alone,
        contrast=between,
        cause=cause,
        reason=_reason(in_mix, alone, between, cause),
    )


def _reason(in_mix: Effect, alone: Effect | None, between: Contrast | None, cause: Cause) -> str:
    if alone is None or between is None:
        return "There is no control: this segment was not measured alone at this load."
    if not (in_mix.trial_noise_known and alone.trial_noise_known):
        return "How much trials differ by themselves is unknown: repeat them."
    if not math.isfinite(in_mix.se_log):
        return f"It cannot be judged: {in_mix.note or 'no interval'}."
    return {
        "no harm": "It is not harmed in the mix.",
        "speculation itself": "Alone, at the same load, it is harmed too.",
        "the mix": "Alone, at the same load, the harm is smaller or gone.",
        "both": "Alone it is harmed, and in the mix more so.",
        "cannot tell yet": "The intervals leave it open: more repeats.",
    }[cause]


def _aggregate(
    study: StudyData,
    arm: str,
    effects: Sequence[Effect],
    acceptance: Sequence[AcceptanceSummary],
    confidence: float,
) -> AggregateView:
    design = study.design
    mix = design.workload(design.production_workload)
    accepted = {a.segment: a for a in acceptance if (a.arm, a.workload) == (arm, mix.name)}
    segments = tuple(
        SegmentShare(
            segment=name,
            share=share,
            temperature=design.segment(name).temperature,
            acceptance=accepted.get(name),
            speedup=_find(effects, "speedup", arm, mix.name, name),
        )
        for name, share in mix.shares
    )
    whole = _find(effects, "speedup", arm, mix.name, None)
    losing = [
        s
        for s in segments
        if s.speedup is not None
        and s.speedup.trial_noise_known
        and s.speedup.interval(confidence)[1] < 1
    ]
    average = accepted.get(None)
    return AggregateView(
        arm=arm,
        acceptance=average,
        klass=classify(average.rate) if average is not None and average.rate is not None else None,
        speedup=whole,
        segments=segments,
        losing=tuple(s.segment for s in losing),
        losing_share=sum(s.share for s in losing),
        hidden=bool(losing) and (whole is None or whole.direction != "worse"),
    )


def _sentences(
    arms: Sequence[str],
    workload: str,
    signatures: Sequence[Signature],
    diagnoses: Sequence[Diagnosis],
    aggregates: Sequence[AggregateView],
) -> list[str]:
    found = []
    for arm in arms:
        view = next(a for a in aggregates if a.arm == arm)
        if view.hidden and view.speedup is not None:
            found.append(
                f"{arm}: the average of {workload} ({_interval(view.speedup)}) hides that "
                f"{' and '.join(view.losing)}, {view.losing_share:.0%} of the requests, "
                f"{'loses' if len(view.losing) == 1 else 'lose'}."
            )
        for signature in signatures:
            if (signature.arm, signature.segment, signature.metric) == (arm, None, "tpot"):
                found.append(f"{arm}: {_signature(signature)}")
        for d in diagnoses:
            if d.arm == arm and d.cause not in ("no harm", "cannot tell yet"):
                metric = "speed" if d.metric == "speedup" else d.metric.replace("_", " ").upper()
                found.append(
                    f"{arm}: {d.segment} loses {metric}, and the cause is {d.cause}. {d.reason}"
                )
    return found


def _signature(signature: Signature) -> str:
    said = {True: "is there", False: "is not there", None: "cannot be told yet"}[signature.present]
    return (
        f"the signature of a harmful mix (TPOT P50 better, P99 worse) {said}: P50 "
        f"{_interval(signature.p50)}, P99 {_interval(signature.p99)}."
    )


def _interval(effect: Effect) -> str:
    return f"{effect.ratio:.2f}x [{effect.low:.2f}, {effect.high:.2f}]"


def _find(
    effects: Sequence[Effect], metric: str, arm: str, workload: str, segment: str | None
) -> Effect | None:
    wanted = (metric, arm, workload, segment)
    return next((e for e in effects if (e.metric, e.arm, e.workload, e.segment) == wanted), None)


def _gain(effect: Effect) -> float:
    """log ratio, signed so that above 0 is good; NaN without a ratio."""
    if not effect.ratio > 0:
        return math.nan
    return math.log(effect.ratio) * (1 if effect.better == "higher" else -1)


def _gain_interval(effect: Effect, confidence: float) -> tuple[float, float]:
    """The interval turned so that above 1 is good."""
    low, high = effect.interval(confidence)
    return (low, high) if effect.better == "higher" else (1 / high, 1 / low)
