"""Which method to test first for a workload, and which known drafts for a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specwise.domain import Checkpoint
from specwise.errors import InputError
from specwise.facts.checkpoint import from_table, known_models
from specwise.planning.pairing import PairReport, judge_pair, rank_pairs
from specwise.vllm.command import Version, names
from specwise.vllm.flags import method_problem

# What share of the output repeats the prompt decides for or against n-gram (req: A6).
_ECHOING = {"summary", "rag", "document-qa", "editing", "extraction"}
_OPEN = {"chat", "code", "reasoning", "creative"}
WORKLOADS: tuple[str, ...] = (*sorted(_ECHOING), *sorted(_OPEN), "mixed")


@dataclass(frozen=True, slots=True)
class MethodAdvice:
    """A method to test, with the reason; ``draft`` is a draft's name where one is needed."""

    method: str
    draft: str | None
    reason: str


def advise_methods(
    target: Checkpoint,
    workload: str,
    drafts: Sequence[PairReport] = (),
    version: Version | None = None,
) -> tuple[MethodAdvice, ...]:
    """Methods in the order to test them for a workload; never a promise of a speedup.

    Raises InputError for a workload that is none of WORKLOADS.
    """
    if workload not in WORKLOADS:
        raise InputError(f"No workload is called {workload!r}.", f"Known: {', '.join(WORKLOADS)}.")
    version = version or names().newest
    found: list[MethodAdvice] = []
    if target.mtp_layers:
        reason = f"the target has {target.mtp_layers} MTP layer(s) of its own: no draft to choose"
        found.append(MethodAdvice("mtp", None, reason))
    for report in drafts:
        if report.draft.head_method and report.sensible:
            reason = "a head trained on the target's hidden states: little memory, high acceptance"
            found.append(MethodAdvice(report.draft.head_method, report.draft.name, reason))
    ngram = MethodAdvice(
        "ngram",
        None,
        "no memory and no draft pass; wins where the output repeats the prompt"
        if workload in _ECHOING
        else "costs nothing to test, but open-ended output repeats its prompt too rarely to pay",
    )
    models = [
        MethodAdvice(
            "draft_model",
            report.draft.name,
            f"1:{report.ratio:.3g} of the target, {report.band.name}",
        )
        for report in rank_pairs(drafts)
        if report.sensible and not report.draft.head_method
    ]
    if workload in _ECHOING:
        found += [ngram, *models]
    elif workload == "mixed":
        found += [*models, ngram]
    else:
        found += models or [ngram]
    return tuple(a for a in found if method_problem(a.method, version) is None)


def known_drafts(target: Checkpoint, version: Version | None = None) -> tuple[PairReport, ...]:
    """Built-in models of the target's tokenizer that are smaller, ranked as what to test."""
    candidates = [from_table(name) for name in known_models()]
    reports = [
        judge_pair(target, draft, version)
        for draft in candidates
        if draft.tokenizer_family == target.tokenizer_family != ""
        and draft.active_parameters * 2 < target.active_parameters
    ]
    return rank_pairs(reports)


def tokens_per_step(acceptance: Sequence[float]) -> float:
    """Mean tokens emitted by a verify step: 1 + the sum of the products of ``acceptance``.

    ``acceptance[i]`` is P(draft i accepted | all before it accepted); Leviathan et al. 2023 eq. 1
    is the case of equal values (req: A7).
    """
    total, reached = 1.0, 1.0
    for value in acceptance:
        reached *= value
        total += reached
    return total
