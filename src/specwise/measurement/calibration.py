"""A short plan of steps on a server, for the cost model: how long does a step of this shape take?

Each wave sends c equal requests at once and waits for all. One streamed chunk is one engine step
(vLLM 0.32, every concurrency tried), so the gaps between a request's chunks are step times,
whatever was accepted in them: neither the draft's quality nor the weights matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from specwise.domain import Api, Outcome, RequestRecord
from specwise.errors import ServerError
from specwise.measurement.load import PlannedRequest, Target, run_load
from specwise.prediction.fit import ObservedStep
from specwise.vllm.response import request_body


@dataclass(frozen=True, slots=True)
class Wave:
    """``concurrency`` requests of about ``prompt_words`` words and ``output_tokens`` each."""

    concurrency: int
    prompt_words: int
    output_tokens: int


BASELINE_WAVES = (
    Wave(1, 24, 24),
    Wave(2, 24, 20),
    Wave(4, 24, 20),
    Wave(8, 24, 16),
    Wave(16, 24, 12),
    Wave(32, 24, 10),
    Wave(2, 300, 12),
)
SPECULATING_WAVES = (
    Wave(1, 24, 60),
    Wave(2, 24, 40),
    Wave(4, 24, 40),
    Wave(8, 24, 32),
    Wave(16, 24, 28),
    Wave(2, 300, 24),
)


def observe(
    target: Target,
    waves: Sequence[Wave],
    *,
    k: int | None,
    note: Callable[[str], None] = lambda _: None,
    rounds: int = 2,
) -> tuple[ObservedStep, ...]:
    """The median step of each wave, and the first step of the smallest ones (prefill).

    ``k`` is the server's draft length, None for a baseline. Every wave runs ``rounds`` times after
    a warm-up, each with prompts of its own, so that no prefix cache answers. Raises ServerError
    when a wave has a failed request.
    """
    _run(target, waves[0], "warm-up")
    found = []
    for number, wave in enumerate(waves):
        gaps: list[float] = []
        firsts: list[float] = []
        contexts: list[float] = []
        prompts: list[float] = []
        for round_number in range(rounds):
            records = _run(target, wave, f"{number}-{round_number}")
            gaps += _gaps(records)
            firsts.append(max((r.first_token_s or 0.0) - r.sent_s for r in records))
            prompts.append(sum(r.prompt_tokens or 0 for r in records))
            contexts += [(r.prompt_tokens or 0) + (r.output_tokens or 0) / 2 for r in records]
        c = wave.concurrency
        if gaps:
            found.append(
                ObservedStep(
                    tokens=c * (1 + (k or 0)),
                    context_tokens=c * statistics.fmean(contexts),
                    requests=c,
                    k=k,
                    seconds=statistics.median(gaps),
                    steps=len(gaps),
                )
            )
        if c <= 2:
            # Few enough that they share the first step: what it computes is all their prompts.
            found.append(
                ObservedStep(
                    tokens=statistics.fmean(prompts),
                    context_tokens=0.0,
                    requests=c,
                    k=k,
                    seconds=statistics.median(firsts),
                    steps=len(firsts),
                    prefill=True,
                )
            )
        note(f"{c:>3} requests at once: {1000 * found[-1].seconds:.1f} ms a step")
    return tuple(found)


def _gaps(records: Sequence[RequestRecord]) -> list[float]:
    """Step times while all requests of the wave decode; without the last step, which may be cut."""
    begins = max(r.first_token_s or 0.0 for r in records)
    ends = min(r.chunk_s[-1] if r.chunk_s else 0.0 for r in records)
    found = []
    for record in records:
        counts = record.chunk_tokens or (1,) * len(record.chunk_s)
        times = [t for t, n in zip(record.chunk_s, counts, strict=True) if n]
        found += [
            after - before
            for before, after in pairwise(times[:-1])
            if before >= begins and after <= ends
        ]
    return found


def _run(target: Target, wave: Wave, name: str) -> list[RequestRecord]:
    plan = [
        PlannedRequest(
            index=index,
            prompt_id=f"{name}-{index}",
            segment="calibration",
            temperature=0.0,
            path="/v1/completions",
            body=request_body(
                Api.COMPLETIONS,
                model=target.model,
                prompt=_prompt(f"{name}-{index}", wave.prompt_words),
                max_tokens=wave.output_tokens,
                temperature=0.0,
                extra={"ignore_eos": True},
            ),
        )
        for index in range(wave.concurrency)
    ]
    records: list[RequestRecord] = []
    run_load(plan, target=target, concurrency=wave.concurrency, part=0, on_record=records.append)
    failed = [r for r in records if r.outcome is not Outcome.OK]
    if failed or len(records) < wave.concurrency:
        why = failed[0].error or failed[0].outcome.value if failed else "stopped"
        raise ServerError(
            f"{len(failed)} of {wave.concurrency} calibration requests failed: {why}.",
            "Look into the server's log; it needs max-model-len 512 or more.",
        )
    return records


def _prompt(name: str, words: int) -> str:
    """Text that no other request begins with."""
    return f"{name} " + " ".join(f"{(7919 * i) % 1000}" for i in range(words // 2))
