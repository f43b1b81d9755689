"""Conditions on the deployment: draft, memory, quantisation, launch arguments (req I2, I4).

All of it comes from metadata (`Evidence`), so it ranks below what was measured; the exceptions,
which rule an arm out, are memory that is proven not to suffice and acceptance that is made up.
"""

from __future__ import annotations

from collections.abc import Iterator

from specwise.analysis.cells import Cells
from specwise.decision.evidence import ArmFacts, Evidence
from specwise.decision.findings import Findings, listed
from specwise.decision.health_conditions import request_tokens
from specwise.decision.rules import Condition, Status, by_sign, condition
from specwise.domain import Loop
from specwise.planning.memory import GIB
from specwise.vllm.findings import ADVICE, WARNING
from specwise.vllm.flags import WITHOUT_DRAFT

_LOSSLESS = frozenset({None, "standard", "strict", "probabilistic", "block", "rejection_sampler"})


def of_the_deployment(
    findings: Findings, arm: str, measured: Cells, evidence: Evidence
) -> Iterator[Condition]:
    """The draft checklist, memory, quantisation and flags of one arm."""
    facts = evidence.of(arm)
    speculation = findings.design.arm(arm).speculation
    method = speculation.method if speculation else ""
    draftless = method in WITHOUT_DRAFT
    yield from _draft(arm, facts, f"{method} needs no draft model" if draftless else "")
    yield from _memory(findings, arm, facts, measured, draftless=draftless)
    yield from _quantisation(arm, facts)
    yield _flags(arm, facts)
    yield _acceptance_method(arm, facts)


def _draft(arm: str, facts: ArmFacts, without: str) -> Iterator[Condition]:
    rules = ("A1", "A3-family", "A3-tokenizer", "A4")
    pair = facts.pair
    if without or pair is None:
        for rule in rules:
            yield condition(rule, arm, without or facts.note, "pass" if without else "unknown")
        return
    if pair.draft.head_method:
        for rule in rules:
            yield condition(rule, arm, f"an {pair.draft.head_method} head", "pass")
        return
    found = {f.rule: f for f in pair.findings}
    status: Status = "fail" if pair.band.severity == WARNING else "pass"
    yield condition(
        "A1",
        arm,
        f"1:{pair.active_ratio:.3g} ({_last(pair.target.name)} to {_last(pair.draft.name)}): "
        f"{pair.band.name}",
        "unknown" if pair.band.severity == ADVICE else status,
    )
    families = (pair.target.family, pair.draft.family)
    same = None if not all(families) else families[0] == families[1]
    shown = f"{families[0] or 'unknown'} and {families[1] or 'unknown'}"
    yield condition("A3-family", arm, shown, by_sign(same))
    alike: bool | None = None
    if "tokenizer-different" in found or "vocab-size" in found:
        alike = False
    elif "tokenizer" in found or "tokenizer-extended" in found:
        alike = True
    words = [
        f.what for rule, f in found.items() if rule.startswith("tokenizer") or rule == "vocab-size"
    ]
    yield condition("A3-tokenizer", arm, " ".join(words) or "not compared", by_sign(alike))
    left = same is False and pair.draft.quantization is None
    yield condition(
        "A4",
        arm,
        f"{shown}; draft {'quantised' if pair.draft.quantization else 'not quantised'}",
        by_sign(False if left else True if same else None),
    )


def _last(name: str) -> str:
    """A hub id without its owner, a folder without the path to it."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def _memory(
    findings: Findings, arm: str, facts: ArmFacts, measured: Cells, *, draftless: bool
) -> Iterator[Condition]:
    plan, alone = facts.memory, facts.memory_without_draft
    design, load = findings.design, findings.design.production_load
    own = findings.summary(arm, findings.production, load)
    base = findings.summary(design.arms[0].name, findings.production, load)
    shares = {rule.name: rule for rule in facts.memory_rules}
    if plan is None or alone is None:
        why = facts.memory_note or facts.note
        for rule in ("C2", "C3", "C5-target"):
            yield condition(rule, arm, why, "unknown")
    else:
        never = plan.concurrency.high < 1
        ran = own is not None and own.requests > own.failed
        yield condition(
            "C2",
            arm,
            f"room for {plan.concurrency.low:.1f} to {plan.concurrency.high:.1f} requests of "
            f"{plan.plan.context:,} tokens" + ("; yet it ran" if never and ran else ""),
            ("unknown" if ran else "fail") if never else by_sign(plan.fits or None),
            veto=never and not ran,
        )
        tokens = request_tokens(findings, arm, measured)
        running = load.value if load.loop is Loop.CLOSED else own.running_mean if own else None
        needed = tokens * running if tokens and running else None
        holds: bool | None = None
        if needed is not None:
            holds = True if plan.tokens.low >= needed else None
            holds = False if plan.tokens.high < needed else holds
        yield condition(
            "C3",
            arm,
            f"{plan.tokens.likely:,.0f} tokens of KV cache ({alone.tokens.likely:,.0f} without a "
            "draft)" + (f", {needed:,.0f} in use at production's load" if needed else ""),
            by_sign(holds),
        )
        target = shares["target-share"]
        yield condition("C5-target", arm, f"{target.value:.0%}", by_sign(target.holds))
    draft = shares.get("draft-share")
    if draftless or draft is None:
        value = "no draft model" if draftless else facts.memory_note or facts.note
        for rule in ("I2-memory", "C6"):
            yield condition(rule, arm, value, "pass" if draftless else "unknown")
        return
    pressed = (
        own is not None
        and base is not None
        and (own.preemptions or 0) > (base.preemptions or 0)
        and not draft.holds
    )
    yield condition(
        "I2-memory",
        arm,
        f"draft {draft.value:.0%} of GPU memory" + ("; preempting more" if pressed else ""),
        by_sign(draft.holds),
        evidence=own.trial_ids if own is not None and pressed else (),
        veto=pressed,
        kind="measured" if pressed else None,
    )
    if plan is not None:
        ranks, copies = plan.plan.gpus, plan.plan.draft_tensor_parallel
        size = next((t.bytes.likely for t in plan.terms if t.name == "draft weights"), 0.0)
        yield condition(
            "C6",
            arm,
            f"{size / GIB:.1f} GiB of draft on each of {ranks} GPUs, draft TP {copies}",
            "pass" if ranks == copies else "unknown",
        )


def _quantisation(arm: str, facts: ArmFacts) -> Iterator[Condition]:
    target, draft = facts.target, facts.draft
    if target is None:
        for rule in ("D1", "D2", "D3"):
            yield condition(rule, arm, facts.note, "unknown")
        return
    bits = target.quantization.weight_bits if target.quantization else None
    shown = f"target {bits:g} bits" if bits else "target not quantised"
    yield condition("D1", arm, shown, by_sign(bits is None or bits >= 8))
    quantised = bool(bits) or bool(draft and draft.quantization)
    yield condition(
        "D2",
        arm,
        f"{shown}; no comparison in this study" if quantised else "nothing is quantised",
        "unknown" if quantised else "pass",
    )
    other = draft.quantization.weight_bits if draft and draft.quantization else None
    same = bits is None or other is None or abs(bits - other) <= 1
    levels = f"{shown}, draft {f'{other:g} bits' if other else 'not quantised'}"
    yield condition("D3", arm, levels, by_sign(same))


def _flags(arm: str, facts: ArmFacts) -> Condition:
    if facts.lint is None:
        return condition("E2", arm, "launch arguments not known", "unknown")
    wrong = [f for f in facts.lint.findings if f.severity != ADVICE]
    value = listed([f"{f.what} [{f.rule}]" for f in wrong[:3]]) or "nothing to object to"
    return condition("E2", arm, f"vLLM {facts.lint.version}: {value}", by_sign(not wrong))


def _acceptance_method(arm: str, facts: ArmFacts) -> Condition:
    config = facts.configuration
    if not config:
        return condition("E3", arm, "speculative configuration not known", "unknown")
    method = config.get("rejection_sample_method", config.get("acceptance_method"))
    return condition(
        "E3",
        arm,
        f"{method or 'standard'} rejection sampling",
        by_sign(method in _LOSSLESS),
        veto=method == "synthetic",
    )
