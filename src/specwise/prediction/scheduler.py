"""Continuous batching with speculation, step by step, without a GPU: vLLM's scheduler in miniature.

`SimulatedEngine` follows vLLM 0.32's ``v1/core/sched/scheduler.py`` (``schedule`` and
``update_from_output``) and ``v1/core/kv_cache_manager.py`` (``allocate_slots``):

1. A step has one budget of tokens. Running requests come first, in the order of their admission;
   then, unless one had to be preempted, waiting ones in the order of arrival, while a seat
   (``max_num_seqs``), budget and cache last. Decodes and chunks of prompts share the step.
2. A decode takes 1 + drafts of the budget; with a draft model each request takes a slot more.
3. Admission asks for cache blocks for the whole prompt (and, after a preemption, for what was
   generated), although only the first chunk's are taken. Speculation with a cache of its own takes
   k more slots per request. vLLM keeps one block for itself.
4. A request that gets no block preempts the last running one, which loses its cache and its drafts
   and starts again from its prompt and output, at the head of the queue.
5. Rejected drafts cost their compute; their slots are used again.
6. Drafts exist from the step after the prompt's last chunk on. How many is decided by the number
   of requests in the step that made them; schedule rows carry forward, and k limits them.
7. With asynchronous scheduling a step is planned while the one before it runs, so a request that
   arrives during a step is seen one step later.

What is left out: priorities, sharing of cached blocks between requests (each counts its own),
sliding windows, LoRA, several engines, and the trimmed drafts at the very end of the context.

Time comes from a `StepCosts`. Between arrivals, completions that others wait for, preemptions and
changes of k nothing happens but equal steps, so that `SimulatedEngine.leap` takes them all at once:
every request's future, step for step, is added to a table when it begins to decode.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specwise.errors import InputError
from specwise.prediction.costs import StepCosts, StepShape
from specwise.prediction.live_request import Ints, LiveRequest, Piece, Plan

Floats = NDArray[np.float64]

LONGEST_LEAP = 512
_TABLE_STEPS = 8192
# Methods whose drafter keeps its own KV cache: `VllmConfig.num_lookahead_tokens`, vLLM 0.32.
_WITH_CACHE = ("draft_model", "eagle", "eagle3", "mtp", "dspark")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The limits of one engine, under vLLM's names.

    ``kv_tokens`` is the pool ("GPU KV cache size" in vLLM's log), None for one that is never full.
    ``method`` is None without speculation. ``schedule`` holds (first batch size, last, k) rows.
    Raises InputError for limits under which nothing could run.
    """

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    kv_tokens: int | None = None
    block_size: int = 16
    max_model_len: int | None = None
    method: str | None = None
    k: int = 0
    schedule: tuple[tuple[int, int, int], ...] = ()
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        if min(self.max_num_batched_tokens - self.draft_slots, self.max_num_seqs) < 1:
            raise InputError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens} and max_num_seqs = "
                f"{self.max_num_seqs} leave no room for a single token.",
                "Raise them: vLLM's defaults are 8192 and 256 or more.",
            )
        if self.block_size < 1 or (self.kv_tokens is not None and self.blocks < 1):
            raise InputError(
                f"A KV pool of {self.kv_tokens} tokens has no usable block of {self.block_size}.",
                "Give the pool in tokens, as in vLLM's log: GPU KV cache size.",
            )
        if self.method is not None and self.k < 1:
            raise InputError(f"Method {self.method} with k = {self.k}.", "Give a k of 1 or more.")
        if self.schedule and min(first for first, _, _ in self.schedule) != 1:
            raise InputError("A schedule must start at batch size 1.", "Add a row [1, n, k].")

    @property
    def draft_slots(self) -> int:
        """Slots of the budget a request takes beyond its tokens."""
        by_method = {"draft_model": 1, "dflash": self.k, "dspark": self.k - 1}
        return by_method.get(self.method or "", 0)

    @property
    def lookahead(self) -> int:
        """Cache slots a request takes beyond its tokens, for the drafter to write to."""
        if self.method == "dflash":
            return self.k + 1
        return self.k if self.method in _WITH_CACHE else 0

    @property
    def blocks(self) -> int:
        """Usable blocks of the pool: one is vLLM's null block."""
        if self.kv_tokens is None:
            return 2**62
        return self.kv_tokens // self.block_size - 1

    def k_by_batch(self) -> tuple[int, ...]:
        """The draft length for each number of scheduled requests, 0 to ``max_num_seqs``.

        Rows carry forward over gaps and past the last one, and never exceed k, as vLLM 0.32's
        ``v1/spec_decode/dynamic/utils.py`` does it.
        """
        k = self.k if self.method is not None else 0
        if not self.schedule or k == 0:
            return (k,) * (self.max_num_seqs + 1)
        lookup, last = [0], 0
        rows = sorted(self.schedule)
        for batch in range(1, self.max_num_seqs + 1):
            while rows and rows[0][0] <= batch:
                last = min(rows.pop(0)[2], k)
            lookup.append(last)
        return tuple(lookup)


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What each step did, one array entry a step; for tests and figures.

    ``requests`` were scheduled, ``sampled`` of them got output and then ``k`` drafts each.
    ``blocks`` is the cache held, ``running`` the requests admitted, ``waiting`` those that were
    waiting when the step was planned.
    """

    end_s: Floats
    duration_s: Floats
    tokens: Ints
    prefill_tokens: Ints
    context_tokens: Ints
    requests: Ints
    sampled: Ints
    k: Ints
    blocks: Ints
    running: Ints
    waiting: Ints
    preempted: Ints


class SimulatedEngine:
    """The state machine: `submit` requests, then `step` or `leap` while it is ``busy``.

    ``now_s`` is when the last step ended, ``step_number`` the number of the next one. Requests that
    ended stand in ``finished`` until the caller takes them out. ``ends_s`` has the end of every
    step by number, if ``keep_ends``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        costs: StepCosts,
        *,
        keep_ends: bool = True,
        trace: bool = False,
    ) -> None:
        self.config = config
        self.costs = costs
        self.now_s = 0.0
        self.step_number = 0
        self.preemptions = 0
        self.finished: list[LiveRequest] = []
        self.waiting: deque[LiveRequest] = deque()
        self.running: dict[LiveRequest, None] = {}  # in the order of admission
        self._last_step_s = 0.0
        self._partial: LiveRequest | None = None  # in prefill after a first chunk: the last running
        self._blocked = False  # no seat or no cache for who waits first, until somebody leaves
        self._pool, self._limited = config.blocks, config.kv_tokens is not None
        self._draft_slots, self._lookahead = config.draft_slots, config.lookahead
        self._lookup = np.array(config.k_by_batch())
        self._scheduled = bool(config.schedule)
        self._k = int(self._lookup[-1])  # drafts to verify in the next step
        self._ends: list[Floats] | None = [] if keep_ends else None
        self._trace: list[tuple[Any, ...]] | None = [] if trace else None
        self._completions: list[tuple[int, int, LiveRequest]] = []
        self._tickets = 0
        self._passed_over: list[LiveRequest] = []  # running, without budget in this step
        # The futures of all decoding requests, added up; index 0 is step number `_base`.
        self._base = self._horizon = 0
        self._table = np.zeros((4, _TABLE_STEPS), np.int64)

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self.waiting)

    @property
    def seen_until_s(self) -> float:
        """Arrivals up to this moment take part in the next step."""
        if self.config.async_scheduling and self.running:
            return self.now_s - self._last_step_s
        return self.now_s

    @property
    def kv_use(self) -> float:
        """Share of the cache that the last step held, 0 to 1; 0 for a pool that is never full."""
        if self.config.kv_tokens is None:
            return 0.0
        return sum(self._held(live) for live in self.running) / self._pool

    def submit(self, live: LiveRequest) -> None:
        """Put a request into the queue; InputError if it could never be served."""
        self.check(live)
        self.waiting.append(live)

    def check(self, live: LiveRequest) -> None:
        """Cut a request to max_model_len; InputError if it could never be served."""
        config = self.config
        if config.max_model_len is not None:
            if live.prompt >= config.max_model_len:
                raise InputError(
                    f"A prompt of {live.prompt} tokens does not fit max_model_len = "
                    f"{config.max_model_len}.",
                    "Shorten it or raise the limit.",
                )
            live.output = min(live.output, config.max_model_len - live.prompt)
        if self._slots(live.prompt + live.output - 1 + config.k) > self._pool:
            raise InputError(
                f"A request of {live.prompt} + {live.output} tokens does not fit a KV pool of "
                f"{config.kv_tokens} tokens.",
                "Give the pool more tokens, or the requests fewer.",
            )
        # A hit covers whole blocks and leaves a token to compute.
        live.cached = min(live.cached, live.prompt - 1) // config.block_size * config.block_size

    def cancel(self, live: LiveRequest) -> None:
        """Drop a request in whatever state it is."""
        if live in self.running:
            self._close(live)
            self._leave(live)
        elif live in self.waiting:
            self.waiting.remove(live)
            self._blocked = False

    def idle_until(self, at_s: float) -> None:
        """Let time pass without work."""
        self.now_s = max(self.now_s, at_s)

    def ends_s(self) -> Floats:
        """When each step ended, by its number."""
        return np.concatenate(self._ends) if self._ends else np.empty(0)

    def trace(self) -> StepTrace:
        """Every step so far; empty without ``trace``."""
        if not self._trace:
            empty = np.empty(0, np.int64)
            return StepTrace(np.empty(0), np.empty(0), *[empty] * 10)
        columns = zip(*self._trace, strict=True)
        return StepTrace(self.ends_s(), *(np.concatenate(column) for column in columns))

    def step(self) -> None:
        """Plan and run one step, whatever it brings; there must be work."""
        budget = self.config.max_num_batched_tokens
        waiting, preempted = len(self.waiting), 0
        self._reserve(1)
        requests, tokens, context, blocks = self._table[:, self.step_number - self._base].tolist()
        decodes: list[tuple[LiveRequest, int]] | None = None
        chunks: list[tuple[LiveRequest, int]] = []
        left = budget - tokens - requests * self._draft_slots
        needed = 0
        if partial := self._partial:
            chunk = max(min(partial.target - partial.computed, left - self._draft_slots), 0)
            needed = max(partial.held, self._slots(partial.computed + chunk) if chunk else 0)
            blocks += needed
            if chunk:
                chunks.append((partial, chunk))
        if left < 0 or blocks > self._pool:
            decodes, chunks, preempted = self._walk()
            blocks = sum(live.held for live in self.running)
            requests = len(decodes)
            tokens = sum(new for _, new in decodes)
            context = sum(live.target - 1 + new for live, new in decodes)
        elif chunks:
            chunks[0][0].held = needed
        decoding = requests
        for live, new in chunks:
            requests, tokens, context = requests + 1, tokens + new, context + live.computed + new
        if not preempted:
            for live, new in self._admit(requests, tokens, blocks):
                chunks.append((live, new))
                requests, tokens = requests + 1, tokens + new
                context, blocks = context + live.computed + new, blocks + live.held
        k = int(self._lookup[requests])
        sampled = decoding + sum(live.computed + new == live.target for live, new in chunks)
        duration_s = float(self.costs.step_s(StepShape(tokens, context, sampled, k)))
        self._last_step_s = duration_s
        self.now_s += duration_s
        prefill = sum(new for _, new in chunks)
        self._record(
            np.array([self.now_s]),
            (duration_s, tokens, prefill, context, requests, sampled, k, blocks),
            (len(self.running), waiting, preempted),
        )
        number = self.step_number
        self.step_number += 1
        self._complete(number, (self.now_s,))
        self._use_k(k)
        for live, new in decodes or ():
            self._verify(live, new - 1, number)
        for live in self._passed_over:
            self._open(live)
        self._passed_over = []
        for live, new in chunks:
            live.computed += new
            if live.computed < live.target:
                self._partial = live
            else:
                self._partial = None if self._partial is live else self._partial
                self._emit(live, 1, number)

    def leap(self, until_s: float, *, stop_at_completion: bool = False) -> bool:
        """Take as many equal steps at once as possible, the last being one that ends at ``until_s``
        or later, or (if asked) with a completion. False, and nothing done, if `step` is needed.
        """
        waiting = len(self.waiting)
        if self._partial is not None or not self.running or (waiting and not self._blocked):
            return False
        here = self.step_number - self._base
        last = self._horizon
        if waiting or stop_at_completion:
            last = min(last, self._next_completion())
        expected: float = LONGEST_LEAP
        if self._last_step_s > 0:
            expected = min(1.2 * (until_s - self.now_s) / self._last_step_s + 3, LONGEST_LEAP)
        columns = self._table[:, here : min(last - self._base, here + int(expected))]
        columns = columns[:, : self._equal_steps(columns)]
        requests, tokens, context, blocks = columns
        if not len(requests):
            return False
        k = self._lookup[requests]
        if self._scheduled:
            # The step that changes the number of drafts is the last before they count as tokens.
            changes = np.flatnonzero(k != self._k)
            if len(changes):
                requests, tokens, context, blocks = columns[:, : changes[0] + 1]
                k = k[: changes[0] + 1]
        shape = StepShape(tokens, context, requests, k if self._scheduled else self._k)
        durations_s = self._durations_s(shape)
        ends_s = durations_s.copy()
        ends_s[0] += self.now_s
        ends_s = ends_s.cumsum()
        taken = min(int(ends_s.searchsorted(until_s)) + 1, len(ends_s))
        ends_s, number = ends_s[:taken], self.step_number
        if self._trace is not None:
            none = np.zeros(len(k), np.int64)
            each = (durations_s, tokens, none, context, requests, requests, k, blocks)
            self._record(ends_s, tuple(a[:taken] for a in each), (requests[:taken], waiting, 0))
        else:
            self._record(ends_s)
        self._last_step_s = float(durations_s[taken - 1])
        self.now_s = float(ends_s[-1])
        self.step_number += taken
        self._complete(number, ends_s)
        if self._scheduled:
            self._use_k(int(k[taken - 1]))
        return True

    def _durations_s(self, shape: StepShape) -> Floats:
        durations_s: Any = self.costs.step_s(shape)
        if isinstance(durations_s, np.ndarray):
            return durations_s
        return np.full(np.shape(shape.tokens), float(durations_s))

    def _equal_steps(self, columns: Ints) -> int:
        """How many of the next steps take all decoding requests, without a limit being reached."""
        requests, tokens, _, blocks = columns
        count: int = columns.shape[1]
        most = len(self.running) * (1 + self._k + self._draft_slots)
        if most > self.config.max_num_batched_tokens:
            slots = tokens + requests * self._draft_slots
            count = _first(slots > self.config.max_num_batched_tokens, count)
        if self._limited and count and blocks.max() > self._pool:
            count = _first(blocks > self._pool, count)
        if count and requests[count - 1] == 0:
            count = _first(requests == 0, count)
        return count

    def _walk(self) -> tuple[list[tuple[LiveRequest, int]], list[tuple[LiveRequest, int]], int]:
        """Schedule the running requests one by one, where budget or cache do not last for all.

        Closes all plans. Returns the decodes and the prompt chunk with their tokens, and how many
        requests were preempted.
        """
        config = self.config
        for live in self.running:
            if live.plan is not None:
                self._close(live)
        order = list(self.running)
        used = sum(live.held for live in order)
        budget = slots_left = config.max_num_batched_tokens
        decodes: list[tuple[LiveRequest, int]] = []
        chunks: list[tuple[LiveRequest, int]] = []
        preempted = index = 0
        while index < len(order) and budget > 0 and slots_left > self._draft_slots:
            live = order[index]
            prefill = live is self._partial
            computed = live.computed if prefill else live.target - 1
            wanted = live.target - computed + (0 if prefill else self._drafts(live))
            new = min(wanted, budget, slots_left - self._draft_slots)
            held = max(live.held, self._slots(computed + new))
            while used - live.held + held > self._pool and order[-1] is not live:
                victim = order.pop()
                used -= victim.held
                self._preempt(victim)
                preempted += 1
            if used - live.held + held > self._pool:
                self._preempt(order.pop())
                preempted += 1
                break
            used += held - live.held
            live.held = held
            (chunks if prefill else decodes).append((live, new))
            budget -= new
            slots_left -= new + self._draft_slots
            index += 1
        taken = {live for live, _ in decodes}
        self._passed_over = [
            live for live in self.running if live not in taken and live is not self._partial
        ]
        return decodes, chunks, preempted

    def _admit(self, requests: int, tokens: int, blocks: int) -> list[tuple[LiveRequest, int]]:
        """Admit waiting requests beside what is scheduled already; each with its first chunk."""
        config, admitted = self.config, []
        budget = config.max_num_batched_tokens - tokens
        slots_left = budget - requests * self._draft_slots
        self._blocked = False
        while self.waiting and budget > 0 and slots_left > self._draft_slots:
            live = self.waiting[0]
            new = min(live.target - live.cached, budget, slots_left - self._draft_slots)
            held = self._slots(live.cached + new)
            whole = -(-live.target // config.block_size)
            no_seat = len(self.running) >= config.max_num_seqs
            if no_seat or blocks + max(held, whole) > self._pool:
                self._blocked = True
                break
            self.waiting.popleft()
            self.running[live] = None
            live.computed, live.held = live.cached, held
            if live.admitted_s < 0:
                live.admitted_s = self.now_s
            admitted.append((live, new))
            blocks += held
            budget -= new
            slots_left -= new + self._draft_slots
        return admitted

    def _slots(self, tokens: int) -> int:
        """Cache blocks for that many tokens and what the drafter writes beyond them."""
        return -(-(tokens + self._lookahead) // self.config.block_size)

    def _drafts(self, live: LiveRequest) -> int:
        """Drafts of a request (without a plan) in the next step."""
        return self._k if live.hits is None or live.hits[live.cursor] else 0

    def _held(self, live: LiveRequest) -> int:
        plan = live.plan
        if plan is None or plan.blocks is None or plan.start == self.step_number:
            return live.held
        return int(plan.blocks[self.step_number - 1 - plan.start])

    def _verify(self, live: LiveRequest, drafts: int, number: int) -> None:
        """What a single decode step gives a request without a plan."""
        accepted = min(int(live.runs[live.cursor]), drafts)
        live.cursor += 1
        self._emit(live, min(1 + accepted, live.output - live.done), number, drafts, accepted)

    def _emit(
        self, live: LiveRequest, tokens: int, number: int, drafts: int = 0, accepted: int = 0
    ) -> None:
        verified = np.array([accepted]) if drafts else None
        live.pieces.append(Piece(number, np.array([tokens]), verified, drafts))
        live.done += tokens
        if live.done < live.output:
            self._open(live)
        else:
            live.finished_s = self.now_s
            self._leave(live)
            self.finished.append(live)

    def _open(self, live: LiveRequest) -> None:
        """Add a decoding request's future to the table."""
        remaining, k = live.output - live.done, self._k
        runs = live.runs[live.cursor : live.cursor + remaining]
        emitted = np.minimum(runs, k) + 1
        drafts: Ints | int = k
        if live.hits is not None:
            drafts = np.where(live.hits[live.cursor : live.cursor + remaining], k, 0)
            emitted = np.where(drafts, emitted, 1)
        output = emitted.cumsum()
        steps = int(output.searchsorted(remaining)) + 1
        emitted, output = emitted[:steps], output[:steps]
        emitted[-1] -= output[-1] - remaining
        output[-1] = remaining
        if not isinstance(drafts, int):
            drafts = drafts[:steps]
        context = output - emitted
        context += live.target + drafts
        blocks = None
        self._reserve(steps)
        first = self.step_number - self._base
        columns = self._table[:, first : first + steps]
        columns[0] += 1
        columns[1] += drafts + 1
        columns[2] += context
        if self._limited:
            size = self.config.block_size
            blocks = (context + (self._lookahead + size - 1)) // size
            if blocks[0] < live.held or live.hits is not None:
                blocks[0] = max(int(blocks[0]), live.held)
                blocks = np.maximum.accumulate(blocks)
            columns[3] += blocks
        live.plan = Plan(self.step_number, k, emitted, output, drafts + 1, context, blocks)
        self._tickets += 1
        live.ticket = self._tickets
        end = self.step_number + steps
        heapq.heappush(self._completions, (end, live.ticket, live))
        self._horizon = max(self._horizon, end)

    def _close(self, live: LiveRequest) -> None:
        """Take what was not reached yet out of the table; the request stands where it is now."""
        plan = live.plan
        if plan is None:
            return
        steps = len(plan.emitted)
        taken = min(self.step_number - plan.start, steps)
        if taken < steps:
            first = self.step_number - self._base
            columns = self._table[:, first : first + steps - taken]
            columns[0] -= 1
            columns[1] -= plan.tokens if isinstance(plan.tokens, int) else plan.tokens[taken:]
            columns[2] -= plan.context[taken:]
            if plan.blocks is not None:
                columns[3] -= plan.blocks[taken:]
        if taken:
            accepted = None
            if plan.k:
                accepted = np.minimum(live.runs[live.cursor : live.cursor + taken], plan.k)
                if live.hits is not None:
                    accepted[~live.hits[live.cursor : live.cursor + taken]] = -1
            live.pieces.append(Piece(plan.start, plan.emitted[:taken], accepted, plan.k))
            live.cursor += taken
            live.done += int(plan.output[taken - 1])
            if plan.blocks is not None:
                live.held = int(plan.blocks[taken - 1])
        live.plan = None
        live.ticket = 0

    def _preempt(self, live: LiveRequest) -> None:
        """Back to the head of the queue, without cache; the request has no open plan."""
        self._leave(live)
        live.held = live.computed = 0
        live.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(live)

    def _leave(self, live: LiveRequest) -> None:
        del self.running[live]
        if self._partial is live:
            self._partial = None
        self._blocked = False

    def _complete(self, first: int, ends_s: Sequence[float] | Floats) -> None:
        """Finish the requests whose plans ended in these steps."""
        limit = first + len(ends_s)
        while self._completions and self._completions[0][0] <= limit:
            end, ticket, live = heapq.heappop(self._completions)
            if live.ticket == ticket:
                live.finished_s = float(ends_s[end - 1 - first])
                self._close(live)
                self._leave(live)
                self.finished.append(live)

    def _next_completion(self) -> int:
        heap = self._completions
        while heap[0][2].ticket != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0]

    def _use_k(self, k: int) -> None:
        """The drafts made in the last step are verified in the next: plan anew if k changed."""
        if k == self._k:
            return
        planned = [live for live in self.running if live.plan is not None]
        for live in planned:
            self._close(live)
        self._k = k
        for live in planned:
            self._open(live)

    def _reserve(self, steps: int) -> None:
        """Make room for that many steps from here on; what is past is forgotten."""
        here, size = self.step_number - self._base, self._table.shape[1]
        if here + steps <= size:
            return
        ahead = self._horizon - self.step_number
        table = np.zeros((4, max(size, 2 * (ahead + steps))), np.int64)
        if ahead > 0:
            table[:, :ahead] = self._table[:, here : here + ahead]
        self._table, self._base = table, self.step_number

    def _record(
        self, ends_s: Floats, columns: tuple[Any, ...] = (), more: tuple[Any, ...] = ()
    ) -> None:
        if self._ends is not None:
            self._ends.append(ends_s)
        if self._trace is not None:
            self._trace.append(tuple(np.broadcast_to(c, ends_s.shape) for c in (*columns, *more)))


def _first(condition: NDArray[np.bool_], limit: int) -> int:
    """Index of the first True, or ``limit``."""
    where = condition.nonzero()[0]
    return min(int(where[0]), limit) if len(where) else limit
