"""Each rule as a condition: measured value, threshold, where it came from, pass or fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from specwise.analysis.acceptance import AcceptanceSummary, break_even_rate, counted_by_server
from specwise.analysis.cells import Cells
from specwise.analysis.comparison import Direction, Effect, tail_probability
from specwise.decision.findings import (
    Findings,
    Place,
    counted,
    deciding_metrics,
    describe,
    limited_trials,
    listed,
    metric_name,
)
from specwise.domain import AcceptanceSource, Loop, Purpose

Status = Literal["pass", "fail", "unknown"]
Kind = Literal["measured", "rule of thumb", "published"]


@dataclass(frozen=True, slots=True)
class Condition:
    """One rule applied to this study.

    ``id`` is the requirement's (G2) or the rule's own short name. ``scope`` names what it was
    applied to: "" for the study, otherwise "arm", "arm/workload" or "arm/workload/segment".
    ``kind`` ranks it: a rule of thumb or a published figure never outranks a measurement.
    ``veto`` is True where failing rules "on" out, whatever the effects say.
    ``evidence`` are the ids of the trials it was computed from.
    """

    id: str
    question: str
    value: str
    threshold: str
    source: str
    status: Status
    scope: str
    evidence: tuple[str, ...]
    kind: Kind
    veto: bool = False


ARTICLE = "Speculative Decoding on vLLM: A Configuration and Decision Framework, July 2026"
_STATUS: dict[Direction, Status] = {"better": "pass", "worse": "fail", "undecided": "unknown"}


def check_conditions(findings: Findings, measured: Cells) -> tuple[Condition, ...]:
    """Every condition that this study can answer, or that only the user can, in a fixed order.

    ``measured`` are the study's `cells`. First the measurement itself, then the service, then
    each candidate arm at the production load.
    """
    found = [
        *_of_the_measurement(findings, measured),
        *_of_the_service(findings),
    ]
    for arm in findings.candidates:
        found += _of_the_latency(findings, arm.name)
        found += _of_the_acceptance(findings, arm.name, measured)
        found += _of_the_mix(findings, arm.name)
        found += _of_the_health(findings, arm.name, measured)
    return tuple(found)


# ---------------------------------------------------------------------------------------------
# The measurement


def _of_the_measurement(findings: Findings, measured: Cells) -> Iterator[Condition]:
    design = findings.design
    production = design.production_load
    at_production = {t.trial_id for t in design.trials if t.load == production}
    limits = tuple(
        sorted(limited_trials(measured), key=lambda found: (found[0] not in at_production, found))
    )
    touched = any(name in at_production for name, _ in limits)
    yield Condition(
        id="client",
        question="Did the load generator keep up, so that the times are the server's?",
        value=_limited(limits),
        threshold="lag at most 5 % of the median TTFT (or 5 ms), at most 85 % of a core",
        source="specwise: the client's own lag, lateness and processor share",
        status="fail" if touched else "unknown" if limits else "pass",
        scope="",
        evidence=tuple(name for name, _ in limits),
        kind="measured",
        veto=touched,
    )
    whole = [
        e
        for arm in findings.candidates
        if (e := findings.effect("speedup", arm.name, findings.production, production))
    ]
    known = bool(whole) and all(e.trial_noise_known for e in whole)
    yield Condition(
        id="repeats",
        question="Is it known how much one trial differs from the next?",
        value=counted(max((e.repeats for e in whole), default=0), "repeat")
        + ", "
        + counted(sum(f.metric == "speedup" for f in findings.noise_floors), "A/A trial"),
        threshold="2 repeats, or an A/A trial",
        source="specwise: without it an interval only holds the requests' own noise",
        status="pass" if known else "fail",
        scope="",
        evidence=_ids(whole),
        kind="measured",
        veto=True,
    )
    pairs = min((e.pairs for e in whole), default=0)
    yield Condition(
        id="pairs",
        question="Were enough requests compared at the production load?",
        value=f"{pairs} pairs",
        threshold="at least 20; P99 needs 100",
        source="specwise: below 20 the resampling itself is unreliable",
        status="pass" if pairs >= 20 else "fail",
        scope="",
        evidence=_ids(whole),
        kind="measured",
        veto=True,
    )
    for floor in findings.noise_floors:
        if floor.metric == "speedup" and floor.load == production:
            yield Condition(
                id="A/A",
                question="Does the baseline equal itself when it is measured again?",
                value=f"{floor.ratio:.2f}x [{floor.low:.2f}, {floor.high:.2f}]",
                threshold="within 5 %, or the interval holds 1",
                source="A/A trial; its interval is of the requests alone, the effects' are wider",
                status="pass"
                if floor.low <= 1 <= floor.high or 0.95 <= floor.ratio <= 1 / 0.95
                else "fail",
                scope=floor.workload,
                evidence=_cell_ids(
                    measured, design.arms[0].name, floor.workload, Purpose.NOISE_FLOOR, findings
                ),
                kind="measured",
            )
    loads = sorted({e.load for e in findings.effects})
    yield Condition(
        id="G3",
        question="Was it measured at several loads up to production's?",
        value=f"{listed([load.label for load in loads]) or 'none'}; production is "
        f"{production.label}",
        threshold="production's load and at least one below it",
        source=ARTICLE,
        status="pass" if production in loads and findings.lighter_loads() else "fail",
        scope="",
        evidence=_ids(whole),
        kind="measured",
    )


def _limited(limits: tuple[tuple[str, str], ...]) -> str:
    if not limits:
        return "no limit met"
    name, why = limits[0]
    more = f", and {len(limits) - 1} more trials" if len(limits) > 1 else ""
    return f"{name}: {why}{more}"


# ---------------------------------------------------------------------------------------------
# The service


def _of_the_service(findings: Findings) -> Iterator[Condition]:
    design = findings.design
    shares = design.workload(design.production_workload).shares
    temperatures = [(design.segment(name).temperature, share) for name, share in shares]
    spread = max(t for t, _ in temperatures) - min(t for t, _ in temperatures)
    cool = sum(share for t, share in temperatures if t <= 0.5)
    median = _weighted_median(temperatures)
    rule = Condition(
        id="I2",
        question="Are temperatures alike, and mostly 0.5 or less?",
        value=f"{_temperatures(temperatures)}: {cool:.0%} at 0.5 or less",
        threshold="spread at most 0.5, half of the requests at 0.5 or less",
        source=ARTICLE,
        status="pass" if spread <= 0.5 and cool >= 0.5 else "fail",
        scope=design.production_workload,
        evidence=(),
        kind="rule of thumb",
    )
    yield rule
    yield replace(
        rule,
        id="I3",
        question="Is the median temperature low enough?",
        value=f"{median:g}",
        threshold="at most 0.7",
        status="fail" if median > 0.7 else "pass",
    )
    greedy = all(t == 0 for t, _ in temperatures)
    yield replace(
        rule,
        id="B3",
        question="Was it measured at production's temperature?",
        value="every request at T = 0" if greedy else _temperatures(temperatures),
        threshold="the temperatures that production uses",
        source="the study file; greedy benchmarks flatter acceptance",
        status="unknown" if greedy else "pass",
        kind="measured",
    )
    bound = design.slo.bound
    yield replace(
        rule,
        id="I2-slo",
        question="Is the service bound by TPOT or throughput, which speculation can help?",
        value=f"bound by {bound}",
        threshold="TPOT or throughput",
        status="fail" if bound == "ttft" else "pass",
        scope="",
    )
    yield replace(
        rule,
        id="I3-monitoring",
        question="Will production's acceptance be watched?",
        value="not something a study can see",
        threshold="acceptance scraped and alerted on",
        status="unknown",
        scope="",
    )
    yield replace(
        rule,
        id="I2-memory",
        question="Does the draft fit without eating the KV cache?",
        value="not measured here: `specwise memory` computes it",
        threshold="draft at most ~15 % of GPU memory",
        status="unknown",
        scope="",
    )


def _weighted_median(values: list[tuple[float, float]]) -> float:
    """The smallest value at or below which half of the weight lies."""
    total = 0.0
    for value, weight in sorted(values):
        total += weight
        if total >= 0.5 - 1e-9:
            return value
    return values[-1][0]


def _temperatures(values: list[tuple[float, float]]) -> str:
    return "T = " + listed([f"{t:g}" for t in sorted({t for t, _ in values})])


# ---------------------------------------------------------------------------------------------
# An arm's latency and throughput at production


def _of_the_latency(findings: Findings, arm: str) -> Iterator[Condition]:
    load, place = findings.design.production_load, findings.production
    scope = f"{arm}/{place.workload}"

    def by_effect(metric: str, name: str, question: str) -> Condition:
        effect = findings.effect(metric, arm, place, load)
        worth = "above 1" if metric in ("speedup", "output_tokens_per_s") else "below 1"
        return Condition(
            id=name,
            question=question,
            value=describe(effect) if effect else "not measured",
            threshold=f"whole interval {worth}",
            source=f"measured at {load.label}, against the baseline on the same prompts",
            status=_STATUS[effect.direction] if effect else "unknown",
            scope=scope,
            evidence=effect.trial_ids if effect else (),
            kind="measured",
        )

    yield by_effect("speedup", "speedup", "Does a token take less time, all told?")
    yield by_effect("tpot_mean", "G2-tpot", "Is TPOT better?")
    ttft = by_effect("ttft_p50", "G2-ttft", "Is TTFT no worse?")
    effect = findings.effect("ttft_p50", arm, place, load)
    if effect is not None and effect.direction == "undecided" and effect.high <= 1.10:
        ttft = replace(ttft, status="pass")
    yield replace(ttft, threshold="not worse by more than 10 %")
    throughput = by_effect(
        "output_tokens_per_s", "G5", "Does the server emit more tokens/s at production's load?"
    )
    if load.loop is Loop.OPEN:
        throughput = replace(
            throughput,
            source="open loop: arrivals set the rate unless the server saturates",
        )
    yield throughput
    yield from _limits(findings, arm, scope)
    crossover = findings.crossover(arm, place)
    if crossover is not None:
        low, high = crossover.low, crossover.high
        status: Status = "unknown"
        if crossover.outcome == "always better" or (low is not None and load.value < low):
            status = "pass"
        elif crossover.outcome == "always worse" or (high is not None and load.value > high):
            status = "fail"
        span = (
            f"{_number(crossover.load_value)} [{_number(low)}, {_number(high)}]"
            if crossover.load_value is not None
            else crossover.outcome
        )
        yield Condition(
            id="I5",
            question="Is production's load below the crossover?",
            value=f"crossover {span}" if crossover.load_value is not None else span,
            threshold=f"above {load.label}",
            source=f"interpolated between {len(crossover.loads)} measured loads",
            status=status,
            scope=scope,
            evidence=_ids(
                [
                    e
                    for e in findings.effects
                    if (e.metric, e.arm, e.workload, e.segment)
                    == ("speedup", arm, place.workload, None)
                ]
            ),
            kind="measured",
        )


def _limits(findings: Findings, arm: str, scope: str) -> Iterator[Condition]:
    """The SLO's limits at P95: a veto where speculation breaks one that the baseline keeps."""
    design, load, place = findings.design, findings.design.production_load, findings.production
    base = findings.summary(design.arms[0].name, place, load)
    own = findings.summary(arm, place, load)
    for name, limit_s in (
        ("ttft", design.slo.ttft_s),
        ("tpot", design.slo.tpot_s),
        ("e2e", design.slo.e2e_s),
    ):
        if limit_s is None or base is None or own is None:
            continue
        before, after = getattr(base, f"{name}_s"), getattr(own, f"{name}_s")
        if before is None or after is None:
            continue
        effects = [findings.effect(f"{name}_{q}", arm, place, load) for q in ("p50", "p95")]
        proven = any(e is not None and e.direction == "worse" for e in effects)
        over, was_over = after.p95 > limit_s, before.p95 > limit_s
        yield Condition(
            id=f"slo-{name}",
            question=f"Does {name.upper()} P95 stay within the SLO?",
            value=f"{after.p95 * 1e3:.0f} ms (baseline {before.p95 * 1e3:.0f} ms)",
            threshold=f"{limit_s * 1e3:.0f} ms",
            source="the study file's [slo]",
            status=("fail" if proven or was_over else "unknown") if over else "pass",
            scope=scope,
            evidence=own.trial_ids,
            kind="measured",
            veto=over and proven and not was_over,
        )


def _number(value: float | None) -> str:
    return "outside the loads" if value is None else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------
# An arm's acceptance


def _of_the_acceptance(findings: Findings, arm: str, measured: Cells) -> Iterator[Condition]:
    load = findings.design.production_load
    for place in (findings.production, *findings.parts()):
        accepted = findings.accepted(arm, place, load)
        if accepted is None:
            continue
        scope = _scope(arm, place)
        if accepted.rate is not None:
            yield Condition(
                id="B2",
                question="Is acceptance at production's temperature in the winning range?",
                value=f"{accepted.rate:.2f} ({_source(accepted)})",
                threshold="above 0.65 likely a win, 0.5 to 0.65 break-even, below 0.5 off",
                source=ARTICLE,
                status=_by_thumb(accepted.rate),
                scope=scope,
                evidence=accepted.trial_ids,
                kind="rule of thumb",
            )
        if accepted.per_request is not None:
            spread = accepted.per_request
            yield Condition(
                id="G1",
                question="Do nearly all requests accept enough?",
                value=f"P10 {spread.p10:.2f}, P50 {spread.p50:.2f}, P90 {spread.p90:.2f}; "
                f"{spread.below_half:.0%} of requests below 0.5",
                threshold="P10 at least 0.5",
                source=ARTICLE,
                status="pass" if spread.p10 >= 0.5 else "fail",
                scope=scope,
                evidence=accepted.trial_ids,
                kind="rule of thumb",
            )
        yield from _break_even(findings, arm, place, accepted)
    yield from _counters(findings, arm, measured)


def _by_thumb(rate: float) -> Status:
    if rate > 0.65:
        return "pass"
    return "unknown" if rate >= 0.5 else "fail"


def _break_even(
    findings: Findings, arm: str, place: Place, accepted: AcceptanceSummary
) -> Iterator[Condition]:
    load = findings.design.production_load
    summary = findings.summary(arm, place, load)
    effect = findings.effect("tpot_mean", arm, place, load)
    if summary is None or effect is None or accepted.rate is None or not effect.ratio > 0:
        return
    if accepted.source is AcceptanceSource.COUNTERS:
        return  # counters also hold failed requests: their tokens cannot be told apart
    # Every step emits one token that was not drafted, so steps = tokens after the first - accepted.
    after_first = summary.output_tokens - (summary.requests - summary.failed)
    steps = after_first - accepted.accepted
    if steps <= 0:
        return
    needed = break_even_rate(
        rate=accepted.rate, tokens_per_step=after_first / steps, tpot_ratio=effect.ratio
    )
    if math.isnan(needed):
        return
    yield Condition(
        id="B5",
        question="Is acceptance above what this load's step costs ask for?",
        value=f"{accepted.rate:.2f} of {max(needed, 0.0):.2f} needed",
        threshold=f"{max(needed, 0.0):.2f}"
        + (" (out of reach: more than 1)" if needed > 1 else ""),
        source="measured: cost of a step = tokens per step x TPOT ratio; rule of thumb: ~0.5",
        status=_STATUS[effect.direction],
        scope=_scope(arm, place),
        evidence=accepted.trial_ids,
        kind="measured",
    )


def _counters(findings: Findings, arm: str, measured: Cells) -> Iterator[Condition]:
    design = findings.design
    key = (arm, design.production_workload, design.production_load, Purpose.MEASURE)
    counted = counted_by_server(measured.get(key, ()))
    scope = f"{arm}/{design.production_workload}"
    if counted is None or not counted.drafted_tokens:
        yield Condition(
            id="G6",
            question="Do the server's own counters look healthy?",
            value="no draft counters seen",
            threshold="0.7 and up healthy, below 0.5 unhealthy",
            source=ARTICLE,
            status="unknown",
            scope=scope,
            evidence=(),
            kind="rule of thumb",
        )
        return
    rate = counted.accepted_tokens / counted.drafted_tokens
    yield Condition(
        id="G6",
        question="Do the server's own counters look healthy?",
        value=f"{counted.drafted_tokens:,} drafted, {counted.accepted_tokens:,} accepted, "
        f"{rate:.2f}",
        threshold="0.7 and up healthy, below 0.5 unhealthy",
        source=ARTICLE,
        status="pass" if rate >= 0.7 else "fail" if rate < 0.5 else "unknown",
        scope=scope,
        evidence=tuple(t.trial.trial_id for t in measured[key]),
        kind="rule of thumb",
    )


# ---------------------------------------------------------------------------------------------
# What a mix hides


def _of_the_mix(findings: Findings, arm: str) -> Iterator[Condition]:
    design, load = findings.design, findings.design.production_load
    for signature in findings.signatures:
        place = Place(signature.workload, signature.segment)
        if (signature.arm, signature.load, place) != (arm, load, findings.production):
            continue
        status: Status = "unknown"
        if signature.present is not None:
            status = "fail" if signature.present else "pass"
        yield Condition(
            id=f"F3-{signature.metric}",
            question=f"Is {signature.metric.upper()} free of the P50-better, P99-worse signature?",
            value=f"{describe(signature.p50)}; {describe(signature.p99)}",
            threshold="not P50 better with P99 worse",
            source=ARTICLE,
            status=status,
            scope=_scope(arm, place),
            evidence=signature.p50.trial_ids,
            kind="measured",
        )
    mix = design.workload(design.production_workload)
    if not mix.is_mix:
        return
    inside = [Place(mix.name, name) for name, _ in mix.shares]
    yield from _aggregate_acceptance(findings, arm, inside)
    yield from _aggregate_effect(findings, arm, inside)


def _aggregate_acceptance(findings: Findings, arm: str, inside: list[Place]) -> Iterator[Condition]:
    load, whole = findings.design.production_load, findings.production
    average = findings.accepted(arm, whole, load)
    each = [(p, findings.accepted(arm, p, load)) for p in inside]
    known = [(p, a.rate) for p, a in each if a is not None and a.rate is not None]
    if average is None or average.rate is None or len(known) < 2:
        return
    low = [p for p, rate in known if rate < 0.5]
    yield Condition(
        id="F4-acceptance",
        question="Does the average acceptance speak for every segment?",
        value=f"average {average.rate:.2f}; "
        + listed([f"{p.segment} {rate:.2f}" for p, rate in known]),
        threshold="no segment below 0.5 under an average of 0.5 or more",
        source=ARTICLE,
        status="fail" if low and average.rate >= 0.5 else "pass",
        scope=_scope(arm, whole),
        evidence=average.trial_ids,
        kind="rule of thumb",
    )


def _aggregate_effect(findings: Findings, arm: str, inside: list[Place]) -> Iterator[Condition]:
    load, whole = findings.design.production_load, findings.production
    average = findings.judge(arm, whole, load)
    each = [(p, findings.judge(arm, p, load)) for p in inside]
    judged = [(p, j) for p, j in each if j is not None]
    if average is None or not judged:
        return
    losing = [p for p, j in judged if j.direction == "worse"]
    open_ones = [p for p, j in judged if j.direction == "undecided" and not j.harmless]
    hidden = bool(losing) and average.direction != "worse"
    yield Condition(
        id="F4",
        question="Does the average effect speak for every segment?",
        value=f"average {describe(average.effect)}; "
        + listed([f"{p.segment} {describe(j.effect)}" for p, j in judged]),
        threshold="no segment worse under an average that is not",
        source=f"measured in the mix at {load.label}; deciding metric "
        + metric_name(deciding_metrics(findings.design, whole)[0]),
        status="fail" if hidden else "unknown" if open_ones else "pass",
        scope=_scope(arm, whole),
        evidence=average.effect.trial_ids,
        kind="measured",
    )


# ---------------------------------------------------------------------------------------------
# Health: errors, memory pressure, output


def _of_the_health(findings: Findings, arm: str, measured: Cells) -> Iterator[Condition]:
    design, load, place = findings.design, findings.design.production_load, findings.production
    base = findings.summary(design.arms[0].name, place, load)
    own = findings.summary(arm, place, load)
    scope = f"{arm}/{place.workload}"
    if base is not None and own is not None:
        more = tail_probability(own.failed, own.requests, base.failed, base.requests)
        worse = own.failure_share > base.failure_share and more < 0.025
        yield Condition(
            id="errors",
            question="Do requests fail no more often than without speculation?",
            value=f"{own.failed} of {own.requests} failed (baseline {base.failed} of "
            f"{base.requests})",
            threshold="not significantly more (Fisher's exact test, 2.5 %)",
            source="specwise: failed requests are never dropped from a comparison in silence",
            status="fail" if worse else "pass" if not own.failed else "unknown",
            scope=scope,
            evidence=own.trial_ids,
            kind="measured",
            veto=worse,
        )
        if own.preemptions is not None and base.preemptions is not None:
            yield Condition(
                id="G4",
                question="Is there KV cache to spare beside the draft?",
                value=f"{own.preemptions:.0f} preemptions (baseline {base.preemptions:.0f}), KV "
                f"use up to {_share(own.kv_use_max)} (baseline {_share(base.kv_use_max)}), "
                f"prefix hits {_share(own.prefix_hit_rate)}",
                threshold="no preemptions that the baseline does not have",
                source="the server's counters and gauges",
                status="fail" if own.preemptions > base.preemptions else "pass",
                scope=scope,
                evidence=own.trial_ids,
                kind="measured",
            )
    yield from _same_output(findings, arm, measured)


def _share(value: float | None) -> str:
    return "not exported" if value is None else f"{value:.0%}"


def _same_output(findings: Findings, arm: str, measured: Cells) -> Iterator[Condition]:
    """Greedy outputs of the arm and the baseline, compared by their digests over all loads."""
    baseline = findings.design.arms[0].name
    same = total = 0
    evidence: list[str] = []
    for (name, workload, load, purpose), tables in measured.items():
        if name != arm or purpose is not Purpose.MEASURE:
            continue
        base = {
            (t.trial.repeat, r.index): r.output_sha256
            for t in measured.get((baseline, workload, load, purpose), ())
            for r in t.records
        }
        for table in tables:
            for record in table.records:
                other = base.get((table.trial.repeat, record.index))
                if record.temperature == 0 and record.output_sha256 and other:
                    total += 1
                    same += record.output_sha256 == other
                    evidence.append(table.trial.trial_id)
    yield Condition(
        id="G7",
        question="Is greedy output the same as without speculation?",
        value=f"{same} of {total} identical" if total else "no greedy requests to compare",
        threshold="all, in float32; bfloat16 near-ties may differ",
        source="digests of the outputs; `specwise verify` tells near-ties from errors",
        status="pass" if total and same == total else "unknown",
        scope=arm,
        evidence=tuple(dict.fromkeys(evidence)),
        kind="measured",
    )


# ---------------------------------------------------------------------------------------------


def _scope(arm: str, place: Place) -> str:
    parts = (arm, place.workload, place.segment)
    return "/".join(part for part in parts if part is not None)


def _source(accepted: AcceptanceSummary) -> str:
    return {
        AcceptanceSource.PER_REQUEST: "per-request figures",
        AcceptanceSource.COUNTERS: "server counters",
        AcceptanceSource.CHUNKS: "estimated from chunks",
    }[accepted.source]


def _ids(effects: list[Effect]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for effect in effects for name in effect.trial_ids))


def _cell_ids(
    measured: Cells,
    arm: str,
    workload: str,
    purpose: Purpose,
    findings: Findings,
) -> tuple[str, ...]:
    key = (arm, workload, findings.design.production_load, purpose)
    return tuple(table.trial.trial_id for table in measured.get(key, ()))
