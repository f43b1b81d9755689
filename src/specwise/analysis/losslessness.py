"""Is the output unchanged? Greedy outputs compared token by token, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from specwise.analysis.two_sample import FIRST_TOKEN, PromptSamples, codes_of, compare_samples
from specwise.domain import (
    GreedyComparison,
    GreedyDifference,
    Losslessness,
    LosslessnessResult,
    SamplingComparison,
)
from specwise.measurement.verification import BaselineAnswers, CandidateAnswers, VerifyPlan

NEAR_TIE_FLOOR: Final = 0.001  # nats: float32 rounding through a few layers
NEAR_TIE_CEILING: Final = 0.5  # nats: bfloat16 logits above 16 are 0.125 apart


def evaluate(
    plan: VerifyPlan,
    baseline: BaselineAnswers,
    candidate: CandidateAnswers,
    *,
    arm: str,
    model: str,
    measured_at: str,
    versions: tuple[str | None, str | None] = (None, None),
) -> LosslessnessResult:
    """The verdict on one candidate from its answers and the baseline's.

    ``versions`` are the baseline's and the candidate's.
    """
    greedy = compare_greedy(greedy_outputs(baseline, candidate)) if baseline.greedy else None
    sampling = None
    if baseline.samples:
        sampling = compare_samples(
            [
                PromptSamples(
                    codes_of(ours, plan.sample_tokens),
                    codes_of(candidate.samples[name], plan.sample_tokens),
                )
                for name, ours in baseline.samples.items()
            ],
            effect=plan.effect,
            false_alarm_rate=plan.false_alarm_rate,
            temperature=plan.temperature,
            top_p=plan.top_p,
            rng=np.random.default_rng([plan.seed, 12]),
        )
    phases = []
    if greedy:
        phases.append(candidate.greedy_drafting)
    if sampling:
        phases.append(candidate.sampling_drafting)
    drafted = [phase.drafted_tokens for phase in phases]
    accepted = [phase.accepted_tokens for phase in phases]
    verdict, reasons = judge(greedy, sampling, drafted)
    return LosslessnessResult(
        arm=arm,
        model=model,
        verdict=verdict,
        reasons=reasons,
        greedy=greedy,
        sampling=sampling,
        drafted_tokens=_total(drafted),
        accepted_tokens=_total(accepted),
        baseline_version=versions[0],
        candidate_version=versions[1],
        seed=plan.seed,
        measured_at=measured_at,
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class GreedyOutput:
    """The greedy outputs of one prompt, and logprobs along the *baseline's* output.

    ``baseline`` and ``candidate`` are token codes. ``repeated`` is what the baseline answered when
    asked again. ``decoded`` are the logprobs (token code -> nats) at each position as the baseline
    computed them while it generated; ``scored`` and ``candidate_scored`` those of the two servers
    for the same text read as a prompt. Empty where a server refused.
    """

    prompt_id: str
    baseline: tuple[int, ...]
    candidate: tuple[int, ...]
    repeated: tuple[int, ...] | None = None
    decoded: tuple[Mapping[int, float], ...] = ()
    scored: tuple[Mapping[int, float], ...] = ()
    candidate_scored: tuple[Mapping[int, float], ...] = ()


def greedy_outputs(
    baseline: BaselineAnswers, candidate: CandidateAnswers
) -> tuple[GreedyOutput, ...]:
    """Both servers' greedy answers side by side, prompt by prompt."""
    return tuple(
        GreedyOutput(
            prompt_id=name,
            baseline=output.tokens,
            candidate=candidate.greedy[name],
            repeated=baseline.repeated.get(name),
            decoded=output.logprobs,
            scored=baseline.scored.get(name, ()),
            candidate_scored=candidate.scored.get(name, ()),
        )
        for name, output in baseline.greedy.items()
    )


def compare_greedy(outputs: Sequence[GreedyOutput]) -> GreedyComparison:
    """Token equality and, where the outputs part, whether the first difference is a near-tie.

    A difference is a near-tie if the baseline's logprobs of the two tokens lie within twice the
    numerical noise: each of the two may be off by that much.
    """
    noise = _logprob_noise(outputs)
    tolerance = (
        None if noise is None else float(np.clip(2 * noise, NEAR_TIE_FLOOR, NEAR_TIE_CEILING))
    )
    differences = tuple(
        _difference(output, tolerance) for output in outputs if output.baseline != output.candidate
    )
    repeated = [o for o in outputs if o.repeated is not None]
    return GreedyComparison(
        prompts=len(outputs),
        tokens=sum(len(output.baseline) for output in outputs),
        equal=len(outputs) - len(differences),
        differences=differences,
        logprob_noise=noise,
        tolerance=tolerance,
        self_differing=sum(o.repeated != o.baseline for o in repeated) if repeated else None,
    )


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position at which two outputs differ, in length if nothing else; None if equal."""
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _logprob_noise(outputs: Sequence[GreedyOutput]) -> float | None:
    """Largest difference between two computations of the logprob of a token the baseline chose."""
    gaps = [
        abs(own[token] - other[token])
        for output in outputs
        for others in (output.scored, output.candidate_scored)
        for token, own, other in zip(output.baseline, output.decoded, others, strict=False)
        if token in own and token in other
    ]
    return max(gaps) if gaps else None


def _difference(output: GreedyOutput, tolerance: float | None) -> GreedyDifference:
    position = first_difference(output.baseline, output.candidate)
    assert position is not None  # noqa: S101 - only called where they differ
    ours = _at(output.baseline, position)
    theirs = _at(output.candidate, position)
    gap = _gap(output.decoded, position, ours, theirs)
    return GreedyDifference(
        prompt_id=output.prompt_id,
        position=position,
        baseline_token=ours,
        candidate_token=theirs,
        baseline_gap=gap,
        candidate_gap=_gap(output.candidate_scored, position, theirs, ours),
        near_tie=None if gap is None or tolerance is None else gap <= tolerance,
    )


def _at(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None


def _gap(
    logprobs: Sequence[Mapping[int, float]], position: int, own: int | None, other: int | None
) -> float | None:
    """Logprob of ``own`` less that of ``other``, which is at most the least one listed."""
    if own is None or other is None or position >= len(logprobs) or not logprobs[position]:
        return None
    listed = logprobs[position]
    least = min(listed.values())
    return listed.get(own, least) - listed.get(other, least)


# --- verdict --------------------------------------------------------------------------------------


def judge(
    greedy: GreedyComparison | None,
    sampling: SamplingComparison | None,
    drafted_tokens: Sequence[int | None],
) -> tuple[Losslessness, tuple[str, ...]]:
    """The verdict and its reasons: a change that was seen outweighs everything that was not.

    ``drafted_tokens`` are the candidate's, one entry for each half of the check.
    """
    changed = [*_greedy_changes(greedy), *_sampling_changes(sampling)]
    if changed:
        return Losslessness.CHANGED, tuple(changed)
    unknown = [*_greedy_doubts(greedy), *_sampling_doubts(sampling)]
    if 0 in drafted_tokens:
        unknown.insert(
            0,
            "the candidate drafted nothing, so nothing was tested: check its speculative "
            "configuration, or lower --concurrency if k depends on the batch size",
        )
    if unknown:
        return Losslessness.UNKNOWN, tuple(unknown)
    return Losslessness.UNCHANGED, tuple(_confirmations(greedy, sampling))


def _greedy_changes(greedy: GreedyComparison | None) -> list[str]:
    real = [d for d in greedy.differences if d.near_tie is False] if greedy else []
    if not greedy or not real:
        return []
    widest = max(d.baseline_gap or 0.0 for d in real)
    reason = (
        f"greedy: {len(real)} of {greedy.prompts} outputs part where the baseline was not "
        f"undecided (logprobs up to {widest:.3g} nats apart, noise {greedy.logprob_noise or 0:.2g})"
    )
    if any(d.position == 0 for d in real):
        reason += "; some at the first token, which no draft touches: compare weights and settings"
    return [reason]


def _sampling_changes(sampling: SamplingComparison | None) -> list[str]:
    if sampling is None or not sampling.changed:
        return []
    rejected = [t for t in sampling.tests if t.p_adjusted <= sampling.false_alarm_rate]
    least = min(t.p_adjusted for t in rejected)
    worst = max(sampling.positions, key=lambda p: p.distance - p.null_high)
    reason = (
        f"sampling: {', '.join(t.name for t in rejected)} differ (p = {least:.2g} after Holm); at "
        f"token {worst.position + 1} the total variation is {worst.distance:.2f} where equal "
        f"servers show {worst.null_low:.2f} to {worst.null_high:.2f}"
    )
    if any(t.name == FIRST_TOKEN for t in rejected):
        reason += (
            "; the first token, which no draft touches, differs too: compare weights, sampling "
            "defaults and chat templates"
        )
    return [reason]


def _greedy_doubts(greedy: GreedyComparison | None) -> list[str]:
    untold = [d for d in greedy.differences if d.near_tie is None] if greedy else []
    if not greedy or not untold:
        return []
    return [
        f"greedy: {len(untold)} of {greedy.prompts} outputs part, and without logprobs it cannot "
        "be told whether at near-ties"
    ]


def _sampling_doubts(sampling: SamplingComparison | None) -> list[str]:
    if sampling is None:
        return []
    if sampling.room < sampling.effect:
        return [
            f"sampling: the outputs are nearly determined (all tokens but the likeliest have "
            f"{sampling.room:.2f} of the probability): use prompts with open answers or a higher "
            "--temperature"
        ]
    if sampling.power >= sampling.power_wanted:
        return []
    needed = (
        f"{sampling.samples_needed} samples a prompt would (--samples)"
        if sampling.samples_needed
        else "use more prompts"
    )
    return [
        f"sampling: nothing was seen, but a total variation of {sampling.effect:g} would have been "
        f"found with probability {sampling.power:.2f} only, {sampling.power_wanted:g} is wanted: "
        f"{needed}"
    ]


def _confirmations(
    greedy: GreedyComparison | None, sampling: SamplingComparison | None
) -> list[str]:
    said = []
    if greedy:
        near = f", {len(greedy.differences)} part at near-ties" if greedy.differences else ""
        said.append(f"greedy: {greedy.equal} of {greedy.prompts} outputs are equal{near}")
    if sampling:
        said.append(
            f"sampling: no difference; a total variation of {sampling.effect:g} at the speculated "
            f"tokens would have been found with probability {sampling.power:.2f}"
        )
    return said
