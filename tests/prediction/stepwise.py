"""vLLM's scheduling loop written down request by request and step by step: an oracle, and slow.

It shares nothing with `specwise.prediction.scheduler` but the random draws: no table, no leaps, no
arrays. One `Stepwise` request is one of vLLM's `Request`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specwise.prediction.costs import StepCosts, StepShape
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, draw_acceptance


@dataclass(eq=False)
class Stepwise:
    number: int
    prompt: int
    wanted: int
    arrival_s: float
    runs: list[int]
    hits: list[bool]
    cached: int
    output: int = 0
    computed: int = 0
    drafts: int = 0
    blocks: int = 0
    cursor: int = 0
    prefilling: bool = True
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


@dataclass
class StepwiseRun:
    requests: list[Stepwise]
    ends_s: list[float]
    preemptions: int


def simulate_stepwise(  # noqa: PLR0912 - the loop of vLLM's scheduler, in one piece
    requests: Sequence[SimRequest],
    costs: StepCosts,
    config: SchedulerConfig,
    *,
    rng: np.random.Generator,
    concurrency: int | None = None,
) -> StepwiseRun:
    runs, hits, offsets = draw_acceptance(requests, rng)
    everyone = []
    for i, r in enumerate(requests):
        at = slice(offsets[i], offsets[i + 1])
        has = [True] * r.output_tokens if hits is None else hits[at].tolist()
        limit = config.max_model_len or 10**9
        everyone.append(
            Stepwise(
                i,
                r.prompt_tokens,
                min(r.output_tokens, limit - r.prompt_tokens),
                r.arrival_s or 0.0,
                runs[at].tolist(),
                has,
                min(r.cached_prompt_tokens, r.prompt_tokens - 1)
                // config.block_size
                * config.block_size,
            )
        )
    if concurrency is None:
        coming = deque(sorted(everyone, key=lambda r: r.arrival_s))
        later: deque[Stepwise] = deque()
    else:
        coming, later = deque(everyone[:concurrency]), deque(everyone[concurrency:])
    waiting: deque[Stepwise] = deque()
    running: list[Stepwise] = []
    k_by_batch, slots = config.k_by_batch(), config.draft_slots
    now = duration = 0.0
    ends: list[float] = []
    preemptions = 0

    def allocate(r: Stepwise, tokens: int, whole: int = 0) -> bool:
        need = -(-(r.computed + tokens + config.lookahead) // config.block_size)
        free = config.blocks - sum(other.blocks for other in running if other is not r)
        if max(need, -(-whole // config.block_size), r.blocks) > free:
            return False
        r.blocks = max(r.blocks, need)
        return True

    k = k_by_batch[-1] if not config.schedule else 0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival_s)
        seen = now - duration if config.async_scheduling and running else now
        while coming and coming[0].arrival_s <= seen:
            waiting.append(coming.popleft())

        budget = room = config.max_num_batched_tokens
        scheduled: dict[Stepwise, int] = {}
        preempted = False
        i = 0
        while i < len(running) and budget > 0 and room > slots:
            r = running[i]
            new = min(r.tokens + r.drafts - r.computed, budget, room - slots)
            fits = allocate(r, new)
            while not fits:
                victim = running.pop()
                victim.computed = victim.drafts = victim.blocks = 0
                victim.prefilling = True
                waiting.appendleft(victim)
                preempted = True
                preemptions += 1
                if victim is r:
                    break
                fits = allocate(r, new)
            if not fits:
                break
            scheduled[r] = new
            budget -= new
            room -= new + slots
            i += 1
        while waiting and not preempted and budget > 0 and room > slots:
            if len(running) >= config.max_num_seqs:
                break
            r = waiting[0]
            r.computed = r.cached
            new = min(r.tokens - r.computed, budget, room - slots)
            if not allocate(r, new, whole=r.tokens):
                r.computed = 0
                break
            running.append(waiting.popleft())
            scheduled[r] = new
            budget -= new
            room -= new + slots

        assert sum(scheduled.values()) <= config.max_num_batched_tokens
        assert len(running) <= config.max_num_seqs
        assert sum(r.blocks for r in running) <= config.blocks
        k = k_by_batch[len(scheduled)]
        sampling = [r for r, new in scheduled.items() if r.computed + new >= r.tokens]
        context = sum(r.computed + new for r, new in scheduled.items())
        duration = float(
            costs.step_s(StepShape(sum(scheduled.values()), context, len(sampling), k))
        )
        now += duration
        ends.append(now)
        for r, new in scheduled.items():
            r.computed += new
            if r not in sampling:
                continue
            emitted = 1
            if not r.prefilling:
                verified = r.computed - r.tokens
                accepted = min(r.runs[r.cursor], verified)
                r.computed -= verified - accepted
                r.cursor += 1
                emitted += accepted
                if verified:
                    r.accepted.append(accepted)
            r.prefilling = False
            emitted = min(emitted, r.wanted - r.output)
            r.output += emitted
            r.chunk_s.append(now)
            r.chunk_tokens.append(emitted)
            if r.output == r.wanted:
                running.remove(r)
                if later:
                    following = later.popleft()
                    following.arrival_s = now
                    coming.append(following)
        # vLLM's drafter leaves a request that was passed over with its older drafts; with a
        # schedule these may be of another number. Here, as in the engine under test, all have k.
        for r in running:
            if not r.prefilling:
                r.drafts = k if r.hits[r.cursor] else 0
    return StepwiseRun(everyone, ends, preemptions)
