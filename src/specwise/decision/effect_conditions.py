"""Conditions on what an arm does to latency and throughput at the production load."""

from __future__ import annotations

import math
from collections.abc import Iterator

from specwise.analysis.comparison import Direction, Effect
from specwise.decision.findings import ERROR_RATE, Findings, describe, listed
from specwise.decision.rules import Condition, Status, by_sign, condition
from specwise.domain import LoadPoint, Loop
from specwise.facts.published import similar_speedups

SIDE: dict[Direction, Status] = {"better": "pass", "worse": "fail", "undecided": "unknown"}
HARMLESS, TTFT_LIMIT = 1.10, 1.50  # candidate / baseline: no worse; too much without an SLO limit


def of_the_effects(findings: Findings, arm: str) -> Iterator[Condition]:
    """Effects, the SLO's limits, the crossover, other methods and published figures."""
    design, place = findings.design, findings.production
    load = design.production_load
    scope = f"{arm}/{place.workload}"

    def effect(metric: str) -> Effect | None:
        return findings.effect(metric, arm, place, load)

    yield _by_effect("speedup", scope, effect("speedup"))
    yield _by_effect("G2-tpot", scope, effect("tpot_mean"))
    yield _no_worse("G2-tpot-p99", scope, effect("tpot_p99"))
    ttft = effect("ttft_p50")
    too_much = (
        ttft is not None
        and ttft.low > TTFT_LIMIT
        and design.slo.ttft_s is None
        and design.slo.bound != "ttft"
    )
    yield _no_worse("G2-ttft", scope, ttft, veto=too_much)
    yield _no_worse("G2-ttft-p99", scope, effect("ttft_p99"))
    open_loop = "open loop: arrivals set the rate unless the server saturates"
    source = open_loop if load.loop is Loop.OPEN else ""
    yield _by_effect("G5", scope, effect("output_tokens_per_s"), source)
    yield _by_effect("G5-goodput", scope, effect("goodput_per_s"), source)
    yield from _limits(findings, arm, scope)
    yield _crossover(findings, arm, scope)
    yield _schedule(findings, arm, scope)
    yield _method(findings, arm, scope)
    yield _published(findings, arm, scope)


def _by_effect(rule: str, scope: str, effect: Effect | None, source: str = "") -> Condition:
    if effect is None:
        return condition(rule, scope, "not measured", "unknown")
    return condition(
        rule,
        scope,
        describe(effect),
        SIDE[effect.direction],
        evidence=effect.trial_ids,
        source=source,
    )


def _no_worse(rule: str, scope: str, effect: Effect | None, *, veto: bool = False) -> Condition:
    """A latency (candidate / baseline): passes where a loss of more than 10 % is excluded."""
    if effect is None:
        return condition(rule, scope, "not measured", "unknown")
    status: Status = "pass" if effect.high <= HARMLESS else SIDE[effect.direction]
    return condition(rule, scope, describe(effect), status, evidence=effect.trial_ids, veto=veto)


def _limits(findings: Findings, arm: str, scope: str) -> Iterator[Condition]:
    """The SLO's limits at P95: a veto where speculation breaks one that the baseline keeps."""
    design, load, place = findings.design, findings.design.production_load, findings.production
    base = findings.summary(design.arms[0].name, place, load)
    own = findings.summary(arm, place, load)
    limits = {
        name: limit_s
        for name, limit_s in (
            ("ttft", design.slo.ttft_s),
            ("tpot", design.slo.tpot_s),
            ("e2e", design.slo.e2e_s),
        )
        if limit_s is not None
    }
    surely = 1 - ERROR_RATE / max(1, 2 * len(limits) * len(findings.candidates))
    for name, limit_s in limits.items():
        before = getattr(base, f"{name}_s") if base else None
        after = getattr(own, f"{name}_s") if own else None
        threshold = f"{limit_s * 1e3:.0f} ms"
        if before is None or after is None:
            yield condition(f"slo-{name}", scope, "not measured", "unknown", threshold=threshold)
            continue
        effects = [findings.effect(f"{name}_{q}", arm, place, load) for q in ("p50", "p95")]
        proven = any(e is not None and e.strict_interval(surely)[0] > 1 for e in effects)
        over, was_over = after.p95 > limit_s, before.p95 > limit_s
        yield condition(
            f"slo-{name}",
            scope,
            f"{after.p95 * 1e3:.0f} ms (baseline {before.p95 * 1e3:.0f} ms)",
            ("fail" if proven or was_over else "unknown") if over else "pass",
            threshold=threshold,
            evidence=own.trial_ids if own else (),
            veto=over and proven and not was_over,
        )


def _crossover(findings: Findings, arm: str, scope: str) -> Condition:
    load = findings.design.production_load
    crossover = findings.crossover(arm, findings.production)
    threshold = f"above {load.label}"
    if crossover is None:
        return condition("I5", scope, "one load measured", "unknown", threshold=threshold)
    low, high = crossover.low, crossover.high
    status: Status = "unknown"
    if crossover.outcome == "always better" or (low is not None and load.value < low):
        status = "pass"
    elif crossover.outcome == "always worse" or (high is not None and load.value > high):
        status = "fail"
    value: str = crossover.outcome
    if crossover.load_value is not None:
        value = f"crossover {_number(crossover.load_value)} [{_number(low)}, {_number(high)}]"
    return condition(
        "I5",
        scope,
        value,
        status,
        threshold=threshold,
        source=f"interpolated between {len(crossover.loads)} measured loads",
        evidence=_speedup_trials(findings, arm),
    )


def _schedule(findings: Findings, arm: str, scope: str) -> Condition:
    speculation = findings.design.arm(arm).speculation
    crossover = findings.crossover(arm, findings.production)
    rows = speculation.schedule if speculation else ()
    if rows:
        shown = ", ".join(f"[{first}, {last}, {k}]" for first, last, k in rows)
        return condition("E4", scope, shown, "pass")
    status: Status = "unknown"
    if crossover is not None and crossover.outcome != "undecided":
        status = "fail" if crossover.outcome == "crosses" else "pass"
    value = f"fixed k; {crossover.outcome if crossover else 'one load measured'}"
    return condition("E4", scope, value, status, evidence=_speedup_trials(findings, arm))


def _method(findings: Findings, arm: str, scope: str) -> Condition:
    """The arm against the best arm of another method, on the production workload."""
    design, place = findings.design, findings.production
    gains: dict[str, float] = {}
    for other in findings.candidates:
        judged = findings.judge(other.name, place, design.production_load)
        if judged is not None and judged.effect.ratio > 0:
            sign = 1 if judged.effect.better == "higher" else -1
            gains[other.name] = sign * math.log(judged.effect.ratio)
    own = design.arm(arm).speculation
    method = own.method if own else "none"
    others = {
        name: gain
        for name, gain in gains.items()
        if (s := design.arm(name).speculation) is not None and s.method != method
    }
    if arm not in gains or not others:
        return condition("A6", scope, f"{method}; no other method was measured", "unknown")
    best = max(others, key=lambda name: others[name])
    return condition(
        "A6",
        scope,
        f"{method} {math.exp(gains[arm]):.2f}x, {best} {math.exp(others[best]):.2f}x",
        by_sign(gains[arm] >= others[best]),
        evidence=_speedup_trials(findings, arm),
    )


def _published(findings: Findings, arm: str, scope: str) -> Condition:
    """Other people's figures beside the user's own: agreement or not, never a verdict (req B4)."""
    load = findings.design.production_load
    speculation = findings.design.arm(arm).speculation
    effect = findings.effect("speedup", arm, findings.production, load)
    method = speculation.method if speculation else ""
    found = sorted(published_at(method, load))
    if not found or effect is None:
        return condition("B4", scope, f"nothing published for {method} at {load.label}", "unknown")
    low, high = found[0], found[-1]
    span = f"{low[0]:.2f}x" if low == high else f"{low[0]:.2f}x to {high[0]:.2f}x"
    sources = listed(list(dict.fromkeys(source for _, source in found)))
    same: bool | None = None
    if effect.direction != "undecided":
        better = effect.direction == "better"
        same = all((value > 1) == better for value, _ in found) or None
    return condition(
        "B4",
        scope,
        f"yours {describe(effect)}; published, another system: {span} ({sources})",
        by_sign(same),
        evidence=effect.trial_ids,
    )


def published_at(method: str, load: LoadPoint) -> list[tuple[float, str]]:
    """Published speedups of the method at a load up to twice or half as high, with their sources.

    A concurrency is held against published batch sizes, a rate against published rates.
    """
    axis = "batch" if load.loop is Loop.CLOSED else "qps"
    return [
        (speedup, series.source.reference)
        for series in similar_speedups(method)
        if series.load == axis
        for at, speedup in series.points
        if 0.5 <= at / load.value <= 2.0
    ]


def _speedup_trials(findings: Findings, arm: str) -> tuple[str, ...]:
    place = findings.production
    return tuple(
        dict.fromkeys(
            name
            for e in findings.effects
            if (e.metric, e.arm, e.workload, e.segment) == ("speedup", arm, place.workload, None)
            for name in e.trial_ids
        )
    )


def _number(value: float | None) -> str:
    return "outside the loads" if value is None else f"{value:.3g}"
