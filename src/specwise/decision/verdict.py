"""The decision: on, on with a schedule, off, or measure more, and why.

docs/concepts/verdict.md draws the table that `_decide_arm` follows. Two rules stand above it: an
interval that holds 1 decides nothing, and a segment of the production workload that loses at the
production load rules a plain "on" out, however good the average is. A losing segment that was
measured but is not production's is named in the headline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from specwise.analysis.comparison import Effect
from specwise.decision import next_trials
from specwise.decision.conditions import Condition
from specwise.decision.findings import (
    ERROR_RATE,
    Findings,
    Judgement,
    Place,
    counted,
    describe,
    listed,
)
from specwise.decision.next_trials import NextTrial
from specwise.decision.schedule import (
    IDLE_PRICE,
    ScheduleProposal,
    losers,
    propose,
    takes_schedule,
)
from specwise.domain import LoadPoint


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
class Verdict:
    """The answer for the production workload at the production load.

    ``arm`` is the candidate it is about, None where there is none. ``effect`` is the deciding
    effect of that arm. ``reasons`` are sentences, the most important first. ``rule`` is the row of
    the table in docs/concepts/verdict.md that decided.
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
    rule: str = ""


def exit_code(decision: Decision) -> int:
    """0 for an answer that turns speculation on, 1 for off, 3 where it takes more measuring."""
    return {
        Decision.ON: 0,
        Decision.SCHEDULE: 0,
        Decision.OFF: 1,
        Decision.MEASURE_MORE: 3,
    }[decision]


@dataclass(frozen=True, slots=True)
class _Case:
    """The decision about one arm, before the arms are compared."""

    arm: str
    decision: Decision
    headline: str
    reasons: tuple[str, ...]
    judged: Judgement | None
    schedule: ScheduleProposal | None = None
    next_trials: tuple[NextTrial, ...] = ()
    rule: str = ""
    certain: bool = False  # no better measurement could change it

    @property
    def gain(self) -> float:
        """log of the deciding effect, above 0 for good; -inf where there is none."""
        if self.judged is None or not self.judged.effect.ratio > 0:
            return -math.inf
        log = math.log(self.judged.effect.ratio)
        return log if self.judged.effect.better == "higher" else -log


_RANK = {Decision.ON: 3, Decision.SCHEDULE: 2, Decision.MEASURE_MORE: 1, Decision.OFF: 0}


def decide(findings: Findings, conditions: Sequence[Condition]) -> Verdict:
    """The verdict on a study. ``conditions`` with a veto that failed bind it.

    Each arm is decided by itself; `ERROR_RATE` is shared out over the candidate arms (Bonferroni),
    so that trying many arms finds no winner by chance. The best decision, then the largest gain,
    wins.
    """
    segments = tuple(_segment_verdict(findings, place) for place in findings.parts())
    failed = {c.id: c for c in conditions if c.veto and c.status == "fail" and not c.scope}
    cases = [
        _decide_arm(
            findings, arm.name, [c for c in conditions if c.scope.split("/")[0] == arm.name]
        )
        for arm in findings.candidates
    ]
    best = max(cases, key=lambda case: (_RANK[case.decision], case.gain))
    if failed:
        best = _refuse(findings, best, failed)
    others = [case for case in cases if case.arm != best.arm]
    reasons = [*best.reasons]
    routing = _routing(segments)
    if routing and best.decision in (Decision.SCHEDULE, Decision.OFF):
        reasons.append(routing)
    if best.decision is not Decision.MEASURE_MORE or not failed:
        reasons += [f"{case.arm} instead: {case.decision}. {case.headline}" for case in others]
    return Verdict(
        decision=best.decision,
        arm=best.arm,
        headline=best.headline,
        reasons=tuple(reasons),
        effect=best.judged.effect if best.judged else None,
        segments=segments,
        schedule=best.schedule,
        next_trials=(*best.next_trials, *_control(findings, best.arm)),
        client_limited="client" in failed,
        rule=best.rule,
    )


def _refuse(findings: Findings, best: _Case, failed: dict[str, Condition]) -> _Case:
    """Measure-more, because the measurement itself does not carry a decision."""
    if best.judged is None or best.certain:
        return best
    trials: list[NextTrial] = []
    if "client" in failed:
        trials.append(next_trials.calm_client(findings, failed["client"].value))
    if "repeats" in failed:
        trials.append(next_trials.learn_noise(findings))
    if "pairs" in failed:
        trials.append(next_trials.more_requests(findings, best.judged.effect.pairs))
    reasons = [f"{c.question} No: {c.value} (asked for: {c.threshold})." for c in failed.values()]
    return _Case(
        best.arm,
        Decision.MEASURE_MORE,
        f"Not decided: {listed([_FAILING[name] for name in failed if name in _FAILING])}.",
        (*reasons, f"What was seen so far: {best.headline}"),
        best.judged,
        next_trials=tuple(trials),
        rule="the measurement does not carry a decision: " + listed(list(failed)),
    )


_FAILING = {
    "client": "the load generator limited the measurement",
    "repeats": "nothing tells how much trials differ by themselves",
    "pairs": "too few requests were compared",
}


_RULED_OUT = {
    "errors": "more of its requests fail",
    "slo-ttft": "it breaks the TTFT limit, which the baseline keeps",
    "slo-tpot": "it breaks the TPOT limit, which the baseline keeps",
    "slo-e2e": "it breaks the E2E limit, which the baseline keeps",
    "G2-ttft": "TTFT is worse by more than half",
    "G7": "its output is not what it would be without speculation",
    "C2": "it does not fit its GPUs",
    "I2-memory": "the draft crowds out the KV cache",
    "E3": "its acceptance is synthetic",
}


def _decide_arm(findings: Findings, arm: str, conditions: Sequence[Condition]) -> _Case:
    """The table of docs/concepts/verdict.md, for one arm."""
    design = findings.design
    load, whole = design.production_load, findings.production
    arms = len(findings.candidates)
    parts = findings.production_parts()
    judged = findings.judge(arm, whole, load, confidence=1 - ERROR_RATE / arms)
    vetoes = [c for c in conditions if c.veto and c.status == "fail"]
    if vetoes:
        return _Case(
            arm,
            Decision.OFF,
            f"Leave it off: {arm} is ruled out at {load.label}: "
            f"{listed([_RULED_OUT[c.id] for c in vetoes])}.",
            tuple(f"{c.question} No: {c.value}; asked for: {c.threshold}." for c in vetoes),
            judged,
            rule=f"ruled out, whatever the effects say: {listed([c.id for c in vetoes])}",
            certain=any(c.id in ("G7", "C2", "E3") for c in vetoes),
        )
    if judged is None:
        return _Case(
            arm,
            Decision.MEASURE_MORE,
            f"Not decided: {arm} and the baseline were not both measured on {whole.label} at "
            f"{load.label}.",
            (),
            None,
            next_trials=(next_trials.measure_production(findings, arm),),
            rule="not measured at production's load",
        )
    losing = losers(findings, arm, load)
    surely = 1 - ERROR_RATE / max(1, arms * len(parts))
    sure_losers = tuple(
        place
        for place in losing
        if (j := findings.judge(arm, place, load, confidence=surely)) and j.direction == "worse"
    )
    wins_below = tuple(
        lighter
        for lighter in findings.lighter_loads()
        if (j := findings.judge(arm, whole, lighter)) is not None
        and j.direction == "better"
        and not losers(findings, arm, lighter)
    )
    speculation = design.arm(arm).speculation
    if speculation is not None and speculation.schedule:
        kept = judged.direction == "better" or (judged.harmless and bool(wins_below))
        if kept and not losing:
            return _scheduled_arm(findings, arm, judged, wins_below)
    if judged.direction == "better" and not losing:
        doubtful = [
            place
            for place in parts
            if (j := findings.judge(arm, place, load)) is not None
            and j.direction == "undecided"
            and not j.harmless
        ]
        return _win(findings, arm, judged, doubtful)
    if judged.direction == "worse" or sure_losers:
        return _loss(findings, arm, judged, losing, wins_below)
    return _open(findings, arm, judged, losing)


def _win(findings: Findings, arm: str, judged: Judgement, doubtful: Sequence[Place]) -> _Case:
    load, whole = findings.design.production_load, findings.production
    won = f"{arm} serves {whole.label} at {load.label} {_better(judged.effect)}"
    if not doubtful:
        outside = [
            p
            for p in findings.parts()
            if p not in findings.production_parts()
            and (j := findings.judge(arm, p, load)) is not None
            and j.direction == "worse"
        ]
        but = f" Keep {listed([p.label for p in outside])} away from it: it loses there."
        return _Case(
            arm,
            Decision.ON,
            f"Turn speculation on: {won}.{but if outside else ''}",
            (
                f"{_sentence(judged.effect)} No segment of {whole.label} loses at {load.label}.",
                *(_sentence(_deciding(findings, arm, p, load)) for p in outside),
                *_crossover_reason(findings, arm),
            ),
            judged,
            rule="better, and no segment that loses or may lose more than 5 %: on",
        )
    effects = [_deciding(findings, arm, place, load) for place in doubtful]
    return _Case(
        arm,
        Decision.MEASURE_MORE,
        f"Not decided: {won}, but {listed([p.label for p in doubtful])} may lose.",
        (
            _sentence(judged.effect),
            *(
                f"{p.label}: {describe(e)} leaves room for a loss of more than 5 %."
                for p, e in zip(doubtful, effects, strict=True)
            ),
        ),
        judged,
        next_trials=tuple(next_trials.repeat(findings, e) for e in effects),
        rule="better, but a segment may lose more than 5 %: measure-more",
    )


def _scheduled_arm(
    findings: Findings, arm: str, judged: Judgement, wins_below: Sequence[LoadPoint]
) -> _Case:
    load, whole = findings.design.production_load, findings.production
    where = [*wins_below, *([load] if judged.direction == "better" else [])]
    return _Case(
        arm,
        Decision.SCHEDULE,
        f"Turn speculation on with the schedule that {arm} ran: {describe(judged.effect)} on "
        f"{whole.label} at {load.label}.",
        (
            f"{_sentence(judged.effect)} It wins at {listed([at.label for at in where])}, and no "
            f"segment loses at {load.label}.",
        ),
        judged,
        propose(findings, arm),
        rule="the arm ran a schedule, which wins or costs nothing here: on-with-schedule",
    )


def _loss(
    findings: Findings,
    arm: str,
    judged: Judgement,
    losing: Sequence[Place],
    wins_below: Sequence[LoadPoint],
) -> _Case:
    design = findings.design
    load, whole = design.production_load, findings.production
    reasons = [_sentence(judged.effect)]
    for place in losing:
        effect = _deciding(findings, arm, place, load)
        reasons.append(f"{place.label} loses at {load.label}: {_sentence(effect)}")
    reasons += _crossover_reason(findings, arm)
    lost = listed([p.label for p in losing]) or whole.label
    if judged.direction == "worse":
        lost = whole.label if not losing else f"{whole.label} ({lost})"
    speculation = design.arm(arm).speculation
    proposal = propose(findings, arm) if wins_below else None
    if proposal is not None and speculation is not None and not speculation.schedule:
        won = listed([at.label for at in wins_below])
        return _Case(
            arm,
            Decision.SCHEDULE,
            f"Not as it is: {arm} loses on {lost} at {load.label} and wins at {won}. Let k follow "
            "the batch size.",
            (
                *reasons,
                f"The schedule keeps what is won at {won} and is idle at {load.label}: worth it "
                "only if the load is often that low. A schedule cannot tell segments apart.",
                IDLE_PRICE,
            ),
            judged,
            proposal,
            (next_trials.confirm_schedule(findings, proposal),),
            rule="worse, or a segment surely loses, but it wins at a lower load: on-with-schedule",
        )
    if wins_below and speculation is not None and not takes_schedule(speculation):
        reasons.append(
            f"It wins at {listed([at.label for at in wins_below])}, but {speculation.method} takes "
            "no schedule."
        )
    headline = f"Leave speculation off: {arm} loses on {lost} at {load.label}"
    if judged.direction != "worse":
        headline += f", whatever the average ({describe(judged.effect)}) says"
    return _Case(
        arm,
        Decision.OFF,
        f"{headline}.",
        tuple(reasons),
        judged,
        rule="worse, or a segment surely loses, and no schedule can help: off",
    )


def _open(findings: Findings, arm: str, judged: Judgement, losing: Sequence[Place]) -> _Case:
    load, whole = findings.design.production_load, findings.production
    effects = [judged.effect] if judged.direction == "undecided" else []
    effects += [_deciding(findings, arm, place, load) for place in losing]
    reasons = [_sentence(judged.effect)]
    for place in losing:
        effect = _deciding(findings, arm, place, load)
        reasons.append(
            f"{place.label}: {describe(effect)} looks like a loss, but not once every segment that "
            "was looked at is allowed for."
        )
    return _Case(
        arm,
        Decision.MEASURE_MORE,
        f"Not decided: {arm} on {whole.label} at {load.label} is {describe(judged.effect)}.",
        tuple(reasons),
        judged,
        next_trials=(
            *(
                (next_trials.more_requests(findings, judged.effect.pairs),)
                if judged.missing
                else ()
            ),
            *(next_trials.repeat(findings, effect) for effect in effects),
        ),
        rule="undecided, or a segment probably loses: measure-more",
    )


def _segment_verdict(findings: Findings, place: Place) -> SegmentVerdict:
    """The best arm for one segment at the production load."""
    load = findings.design.production_load
    judged = [
        (arm.name, j)
        for arm in findings.candidates
        if (j := findings.judge(arm.name, place, load)) is not None
    ]
    effects = tuple(j.effect for _, j in judged)
    name = findings.segment_name(place)
    known = all(e.trial_noise_known for e in effects)
    if not judged or not known:
        why = "trial-to-trial noise is unknown" if judged else "not measured at production's load"
        arm = judged[0][0] if judged else None
        return SegmentVerdict(name, place.workload, arm, Decision.MEASURE_MORE, why, effects)
    winners = [(arm, j) for arm, j in judged if j.direction == "better"]
    undecided = [(arm, j) for arm, j in judged if j.direction == "undecided"]
    for held, decision, word in (
        (winners, Decision.ON, "wins"),
        (undecided, Decision.MEASURE_MORE, "holds 1"),
        (judged, Decision.OFF, "loses"),
    ):
        if held:
            arm, j = max(held, key=lambda item: _gain(item[1].effect))
            reason = f"{arm} {word}: {describe(j.effect)} at {load.label}"
            return SegmentVerdict(name, place.workload, arm, decision, reason, effects)
    raise AssertionError("judged is not empty")


def _gain(effect: Effect) -> float:
    log = math.log(effect.ratio) if effect.ratio > 0 else -math.inf
    return log if effect.better == "higher" else -log


def _routing(segments: Sequence[SegmentVerdict]) -> str:
    """Where to send each segment, if they differ; a mix's figures come before a pure run's."""
    decided: dict[str, SegmentVerdict] = {}
    for verdict in segments:
        decided.setdefault(verdict.segment, verdict)
    on = [v for v in decided.values() if v.decision is Decision.ON]
    off = [v for v in decided.values() if v.decision is Decision.OFF]
    if not on or not off:
        return ""
    with_arm = listed([f"{v.segment} with {v.arm}" for v in on])
    return (
        f"If requests can be routed: serve {with_arm}, and "
        f"{listed([v.segment for v in off])} from a server without speculation. vLLM cannot switch "
        "it off for a single request."
    )


def _control(findings: Findings, arm: str) -> tuple[NextTrial, ...]:
    """The homogeneous control run (req F3), where the signature was seen and no control exists."""
    load = findings.design.production_load
    mix = findings.design.workload(findings.design.production_workload)
    seen = any(
        s.present
        for s in findings.signatures
        if (s.arm, s.workload, s.segment, s.load) == (arm, mix.name, None, load)
    )
    alone = {p.workload for p in findings.parts() if p.segment is None}
    missing = tuple(name for name, _ in mix.shares if name not in alone)
    if not (seen and mix.is_mix and missing):
        return ()
    return (next_trials.control_run(findings, missing),)


def _deciding(findings: Findings, arm: str, place: Place, load: LoadPoint) -> Effect:
    judged = findings.judge(arm, place, load)
    if judged is None:
        raise KeyError(f"{arm} was not measured on {place.label} at {load.label}")
    return judged.effect


def _better(effect: Effect) -> str:
    if effect.metric == "speedup":
        return f"{effect.ratio:.2f} times as fast [{effect.low:.2f}, {effect.high:.2f}]"
    return f"better ({describe(effect)})"


def _sentence(effect: Effect) -> str:
    """An effect as a sentence about what users see."""
    side = {"better": "better", "worse": "worse", "undecided": "not told from 1"}
    where = Place(effect.workload, effect.segment).label
    return (
        f"{effect.arm} on {where} at {effect.load.label}: {describe(effect)}, "
        f"{side[effect.direction]}, over {effect.pairs} pairs of requests and "
        f"{counted(effect.repeats, 'repeat')}."
    )


def _crossover_reason(findings: Findings, arm: str) -> list[str]:
    crossover = findings.crossover(arm, findings.production)
    if crossover is None or crossover.outcome != "crosses" or crossover.load_value is None:
        return []
    unit = "requests in flight" if crossover.loop.value == "closed" else "requests/s"
    low = "below the loads" if crossover.low is None else f"{crossover.low:.1f}"
    high = "above the loads" if crossover.high is None else f"{crossover.high:.1f}"
    return [
        f"On {crossover.workload} it stops paying at about {crossover.load_value:.1f} {unit} "
        f"[{low}, {high}]."
    ]
