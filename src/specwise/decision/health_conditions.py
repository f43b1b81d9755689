"""Conditions on errors, memory pressure and output: what no speed makes good."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from specwise.analysis.cells import Cells
from specwise.analysis.comparison import tail_probability
from specwise.analysis.latency import ServingSummary
from specwise.decision.evidence import Evidence
from specwise.decision.findings import Findings
from specwise.decision.rules import Condition, by_sign, condition
from specwise.domain import Losslessness, Outcome, Purpose

_GIB = 2**30
LONG_CONTEXT_TOKENS, KV_FULL, GPU_FULL = 8192, 0.90, 0.98


def of_the_health(
    findings: Findings, arm: str, measured: Cells, evidence: Evidence
) -> Iterator[Condition]:
    """Failures, preemptions, prefix hits, GPU memory, long contexts, losslessness."""
    design, load, place = findings.design, findings.design.production_load, findings.production
    base = findings.summary(design.arms[0].name, place, load)
    own = findings.summary(arm, place, load)
    scope = f"{arm}/{place.workload}"
    yield _errors(scope, base, own)
    yield _preemptions(scope, base, own)
    yield _prefix_hits(scope, base, own)
    yield _gpu_memory(scope, own)
    yield _long_contexts(findings, arm, scope, measured, own)
    yield _same_output(findings, arm, measured, evidence)


def _errors(scope: str, base: ServingSummary | None, own: ServingSummary | None) -> Condition:
    if base is None or own is None:
        return condition("errors", scope, "not measured", "unknown")
    more = tail_probability(own.failed, own.requests, base.failed, base.requests)
    worse = own.failure_share > base.failure_share and more < 0.025
    return condition(
        "errors",
        scope,
        f"{own.failed} of {own.requests} failed (baseline {base.failed} of {base.requests})",
        "fail" if worse else "pass" if not own.failed else "unknown",
        evidence=own.trial_ids,
        veto=worse,
    )


def _preemptions(scope: str, base: ServingSummary | None, own: ServingSummary | None) -> Condition:
    if base is None or own is None or own.preemptions is None or base.preemptions is None:
        return condition("G4", scope, "not exported", "unknown")
    return condition(
        "G4",
        scope,
        f"{own.preemptions:.0f} preemptions (baseline {base.preemptions:.0f}), KV use up to "
        f"{_share(own.kv_use_max)} (baseline {_share(base.kv_use_max)})",
        by_sign(own.preemptions <= base.preemptions),
        evidence=own.trial_ids,
    )


def _prefix_hits(scope: str, base: ServingSummary | None, own: ServingSummary | None) -> Condition:
    before = base.prefix_hit_rate if base else None
    after = own.prefix_hit_rate if own else None
    if before is None or after is None or own is None:
        return condition("G4-prefix", scope, "not exported", "unknown")
    return condition(
        "G4-prefix",
        scope,
        f"{after:.0%} (baseline {before:.0%})",
        by_sign(after >= before - 0.05),
        evidence=own.trial_ids,
    )


def _gpu_memory(scope: str, own: ServingSummary | None) -> Condition:
    known = [
        (gpu, gpu.memory_used_max_bytes, gpu.memory_total_bytes)
        for gpu in (own.gpus if own else ())
        if gpu.memory_used_max_bytes is not None and gpu.memory_total_bytes
    ]
    if own is None or not known:
        why = own.gpu_note if own and own.gpu_note else "no GPU figures"
        return condition("G4-gpu", scope, why, "unknown")
    gpu, used, total = max(known, key=lambda item: item[1] / item[2])
    busy = "" if gpu.utilisation_mean is None else f", {gpu.utilisation_mean:.0%} busy"
    return condition(
        "G4-gpu",
        scope,
        f"GPU {gpu.index}: {used / _GIB:.1f} of {total / _GIB:.1f} GiB{busy}",
        by_sign(used < GPU_FULL * total),
        evidence=own.trial_ids,
    )


def _long_contexts(
    findings: Findings, arm: str, scope: str, measured: Cells, own: ServingSummary | None
) -> Condition:
    if own is None or own.kv_use_max is None:
        return condition("I3-memory", scope, "KV use not exported", "unknown")
    length = request_tokens(findings, arm, measured)
    pressed = own.kv_use_max >= KV_FULL or bool(own.preemptions)
    value = f"KV use up to {own.kv_use_max:.0%}, {own.preemptions or 0:.0f} preemptions"
    if length is not None:
        value += f", P95 of requests {length:,.0f} tokens"
    fits = True if not pressed else None if length is None else length < LONG_CONTEXT_TOKENS
    return condition("I3-memory", scope, value, by_sign(fits), evidence=own.trial_ids)


def request_tokens(findings: Findings, arm: str, measured: Cells) -> float | None:
    """P95 of prompt + output tokens of a request in production's trials; None if not reported."""
    design = findings.design
    key = (arm, design.production_workload, design.production_load, Purpose.MEASURE)
    lengths = [
        r.prompt_tokens + r.output_tokens
        for table in measured.get(key, ())
        for r in table.records
        if r.outcome is Outcome.OK and r.prompt_tokens is not None and r.output_tokens is not None
    ]
    return float(np.quantile(lengths, 0.95)) if lengths else None


def _share(value: float | None) -> str:
    return "not exported" if value is None else f"{value:.0%}"


def _same_output(findings: Findings, arm: str, measured: Cells, evidence: Evidence) -> Condition:
    """`specwise verify` if it was run, else greedy digests of arm and baseline over all loads."""
    result = evidence.losslessness.get(arm)
    same, total, trials = _digests(findings, arm, measured)
    shown = f"{same} of {total} greedy outputs identical" if total else "no greedy requests"
    if result is None or result.verdict is Losslessness.UNKNOWN:
        ran = "verify was not run" if result is None else "verify could not tell"
        alike = True if total and same == total else None
        return condition("G7", arm, f"{shown}; {ran}", by_sign(alike), evidence=trials)
    changed = result.verdict is Losslessness.CHANGED
    why = f": {result.reasons[0]}" if result.reasons else ""
    return condition(
        "G7",
        arm,
        f"verify says {result.verdict.value}{why}; {shown}",
        by_sign(not changed),
        source=f"specwise verify, {result.measured_at}",
        evidence=trials,
        veto=changed,
    )


def _digests(findings: Findings, arm: str, measured: Cells) -> tuple[int, int, tuple[str, ...]]:
    """(identical, compared, trials) of greedy outputs, by digest."""
    baseline = findings.design.arms[0].name
    same = total = 0
    trials: list[str] = []
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
                    trials.append(table.trial.trial_id)
    return same, total, tuple(dict.fromkeys(trials))
