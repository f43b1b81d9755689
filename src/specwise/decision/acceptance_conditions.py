"""Conditions on acceptance, and on what a mix's averages hide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from specwise.analysis.acceptance import AcceptanceSummary, break_even_rate, counted_by_server
from specwise.analysis.cells import Cells
from specwise.decision.effect_conditions import SIDE
from specwise.decision.findings import (
    Findings,
    Place,
    deciding_metrics,
    describe,
    listed,
    metric_name,
)
from specwise.decision.rules import Condition, Status, by_sign, condition
from specwise.domain import AcceptanceSource, Purpose

_SOURCES = {
    AcceptanceSource.PER_REQUEST: "per-request figures",
    AcceptanceSource.COUNTERS: "server counters",
    AcceptanceSource.CHUNKS: "estimated from chunks",
}


def of_the_acceptance(findings: Findings, arm: str, measured: Cells) -> Iterator[Condition]:
    """Where acceptance came from, its level in every place, its break-even, the counters."""
    whole = findings.production
    yield _source(findings, arm)
    for place in (whole, *findings.parts()):
        accepted = findings.accepted(arm, place, findings.design.production_load)
        if accepted is None and place != whole:
            continue
        scope = _scope(arm, place)
        yield _level(scope, accepted)
        yield _spread(scope, accepted)
        yield _break_even(findings, arm, place, accepted)
    yield _counters(findings, arm, measured)


def _source(findings: Findings, arm: str) -> Condition:
    load = findings.design.production_load
    accepted = findings.accepted(arm, findings.production, load)
    scope = _scope(arm, findings.production)
    if accepted is None:
        return condition("B1", scope, "no acceptance was seen", "unknown")
    shares = findings.design.workload(findings.design.production_workload).shares
    at = listed([f"{findings.design.segment(name).temperature:g}" for name, _ in shares])
    return condition(
        "B1",
        scope,
        f"{_SOURCES[accepted.source]} of {accepted.requests} requests at T = {at}",
        "unknown" if accepted.source is AcceptanceSource.CHUNKS else "pass",
        evidence=accepted.trial_ids,
    )


def _level(scope: str, accepted: AcceptanceSummary | None) -> Condition:
    if accepted is None or accepted.rate is None:
        return condition("B2", scope, "rate not known", "unknown")
    status: Status = "pass" if accepted.rate > 0.65 else "unknown"
    return condition(
        "B2",
        scope,
        f"{accepted.rate:.2f} ({_SOURCES[accepted.source]})",
        "fail" if accepted.rate < 0.5 else status,
        evidence=accepted.trial_ids,
    )


def _spread(scope: str, accepted: AcceptanceSummary | None) -> Condition:
    if accepted is None or accepted.per_request is None:
        return condition("G1", scope, "no figures for single requests", "unknown")
    spread = accepted.per_request
    return condition(
        "G1",
        scope,
        f"P10 {spread.p10:.2f}, P50 {spread.p50:.2f}, P90 {spread.p90:.2f}; "
        f"{spread.below_half:.0%} of requests below 0.5",
        by_sign(spread.p10 >= 0.5),
        evidence=accepted.trial_ids,
    )


def _break_even(
    findings: Findings, arm: str, place: Place, accepted: AcceptanceSummary | None
) -> Condition:
    load, scope = findings.design.production_load, _scope(arm, place)
    summary = findings.summary(arm, place, load)
    effect = findings.effect("tpot_mean", arm, place, load)
    unknown = condition("B5", scope, "tokens per step not known", "unknown")
    if summary is None or effect is None or accepted is None or accepted.rate is None:
        return unknown
    # Counters also hold failed requests: their tokens cannot be told apart.
    if not effect.ratio > 0 or accepted.source is AcceptanceSource.COUNTERS:
        return unknown
    # Every step emits one token that was not drafted, so steps = tokens after the first - accepted.
    after_first = summary.output_tokens - (summary.requests - summary.failed)
    steps = after_first - accepted.accepted
    if steps <= 0:
        return unknown
    per_step = after_first / steps
    needed = break_even_rate(rate=accepted.rate, tokens_per_step=per_step, tpot_ratio=effect.ratio)
    if math.isnan(needed):
        return unknown
    return condition(
        "B5",
        scope,
        f"{accepted.rate:.2f} of {max(needed, 0.0):.2f} needed; {per_step:.2f} tokens a step that "
        f"costs {per_step * effect.ratio:.2f} of the baseline's",
        SIDE[effect.direction],
        threshold=f"{max(needed, 0.0):.2f}"
        + (" (out of reach: more than 1)" if needed > 1 else ""),
        evidence=accepted.trial_ids,
    )


def _counters(findings: Findings, arm: str, measured: Cells) -> Condition:
    design = findings.design
    key = (arm, design.production_workload, design.production_load, Purpose.MEASURE)
    counted = counted_by_server(measured.get(key, ()))
    scope = f"{arm}/{design.production_workload}"
    if counted is None or not counted.drafted_tokens:
        return condition("G6", scope, "no draft counters seen", "unknown")
    rate = counted.accepted_tokens / counted.drafted_tokens
    return condition(
        "G6",
        scope,
        f"{counted.drafted_tokens:,} drafted, {counted.accepted_tokens:,} accepted, {rate:.2f}",
        "pass" if rate >= 0.7 else "fail" if rate < 0.5 else "unknown",
        evidence=tuple(t.trial.trial_id for t in measured[key]),
    )


# ---------------------------------------------------------------------------------------------
# What a mix hides


def of_the_mix(findings: Findings, arm: str) -> Iterator[Condition]:
    """The signature on TPOT and E2E, and whether averages speak for every segment."""
    design, load, whole = findings.design, findings.design.production_load, findings.production
    scope = _scope(arm, whole)
    for metric in ("tpot", "e2e"):
        seen = [
            s
            for s in findings.signatures
            if (s.arm, s.workload, s.segment, s.load, s.metric)
            == (arm, whole.workload, None, load, metric)
        ]
        if not seen:
            yield condition(f"F3-{metric}", scope, "not measured", "unknown")
            continue
        found = seen[0]
        yield condition(
            f"F3-{metric}",
            scope,
            f"{describe(found.p50)}; {describe(found.p99)}",
            by_sign(None if found.present is None else not found.present),
            evidence=found.p50.trial_ids,
        )
    mix = design.workload(design.production_workload)
    if not mix.is_mix:
        for rule in ("I2-mix", "F4", "F4-acceptance"):
            yield condition(rule, scope, "one segment", "pass")
        return
    inside = [Place(mix.name, name) for name, _ in mix.shares]
    yield _same_answer(findings, arm, inside)
    yield _aggregate_acceptance(findings, arm, inside)
    yield _aggregate_effect(findings, arm, inside)


def _same_answer(findings: Findings, arm: str, inside: list[Place]) -> Condition:
    load = findings.design.production_load
    scope = _scope(arm, findings.production)
    judged = [(p, j) for p in inside if (j := findings.judge(arm, p, load)) is not None]
    sides = {j.direction for _, j in judged}
    if len(judged) < len(inside):
        return condition("I2-mix", scope, "not every segment was measured", "unknown")
    same: bool | None = None
    if {"better", "worse"} <= sides:
        same = False
    elif len(sides) == 1 and "undecided" not in sides:
        same = True
    return condition(
        "I2-mix",
        scope,
        listed([f"{p.segment} {j.direction}" for p, j in judged]),
        by_sign(same),
        evidence=judged[0][1].effect.trial_ids,
    )


def _aggregate_acceptance(findings: Findings, arm: str, inside: list[Place]) -> Condition:
    load, whole = findings.design.production_load, findings.production
    scope = _scope(arm, whole)
    average = findings.accepted(arm, whole, load)
    each = [(p, findings.accepted(arm, p, load)) for p in inside]
    known = [(p, a.rate) for p, a in each if a is not None and a.rate is not None]
    if average is None or average.rate is None or len(known) < 2:
        return condition("F4-acceptance", scope, "not known by segment", "unknown")
    low = [p for p, rate in known if rate < 0.5]
    return condition(
        "F4-acceptance",
        scope,
        f"average {average.rate:.2f}; " + listed([f"{p.segment} {rate:.2f}" for p, rate in known]),
        by_sign(not (low and average.rate >= 0.5)),
        evidence=average.trial_ids,
    )


def _aggregate_effect(findings: Findings, arm: str, inside: list[Place]) -> Condition:
    load, whole = findings.design.production_load, findings.production
    scope = _scope(arm, whole)
    average = findings.judge(arm, whole, load)
    judged = [(p, j) for p in inside if (j := findings.judge(arm, p, load)) is not None]
    if average is None or not judged:
        return condition("F4", scope, "not measured", "unknown")
    losing = [p for p, j in judged if j.direction == "worse"]
    open_ones = [p for p, j in judged if j.direction == "undecided" and not j.harmless]
    hidden = bool(losing) and average.direction != "worse"
    return condition(
        "F4",
        scope,
        f"average {describe(average.effect)}; "
        + listed([f"{p.segment} {describe(j.effect)}" for p, j in judged]),
        "fail" if hidden else "unknown" if open_ones else "pass",
        source=f"measured in the mix at {load.label}; deciding metric "
        + metric_name(deciding_metrics(findings.design, whole)[0]),
        evidence=average.effect.trial_ids,
    )


def _scope(arm: str, place: Place) -> str:
    parts = (arm, place.workload, place.segment)
    return "/".join(part for part in parts if part is not None)
