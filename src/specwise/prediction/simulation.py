"""Traffic through the simulated engine: requests in, times and acceptance of each of them out."""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from specwise.errors import InputError
from specwise.prediction.costs import StepCosts
from specwise.prediction.live_request import Ints, LiveRequest
from specwise.prediction.scheduler import Floats, SchedulerConfig, SimulatedEngine, StepTrace


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request to simulate.

    ``arrival_s`` is None in a closed loop. ``acceptance[i]`` is the probability that draft i + 1
    is accepted given that all before it were; empty without speculation. ``draft_probability`` is
    the share of steps that find something to propose (below 1 for n-gram), ``cached_prompt_tokens``
    what a prefix cache already holds.
    """

    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    segment: str = ""
    temperature: float = 0.0
    acceptance: tuple[float, ...] = ()
    draft_probability: float = 1.0
    cached_prompt_tokens: int = 0


def draw_acceptance(
    requests: Sequence[SimRequest], rng: np.random.Generator
) -> tuple[Ints, NDArray[np.bool_] | None, Ints]:
    """What the verify steps of all requests will accept, one after another in one array.

    Returns (drafts accepted by each step if enough are drafted, whether it has drafts at all or
    None if always, where each request's stretch begins). A request with n output tokens has n
    entries. The draws depend on the requests and ``rng`` alone, never on the schedule.
    """
    lengths = np.array([request.output_tokens for request in requests], np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    total = int(offsets[-1])
    runs = np.zeros(total, np.int64)
    longest = max((len(request.acceptance) for request in requests), default=0)
    if not longest:
        return runs, None, offsets
    conditional = np.zeros((len(requests), longest))
    for row, request in zip(conditional, requests, strict=True):
        row[: len(request.acceptance)] = request.acceptance
    unconditional = np.cumprod(conditional, axis=1)
    uniform = rng.random(total)
    for position in range(longest):
        runs += uniform < np.repeat(unconditional[:, position], lengths)
    found = np.array([request.draft_probability for request in requests])
    hits = rng.random(total) < np.repeat(found, lengths) if (found < 1).any() else None
    return runs, hits, offsets


@dataclass(frozen=True)
class SimRun:
    """What became of the requests, in the order they were given.

    ``ends_s`` has the end of every step; ``trace`` is there if it was asked for. Times are seconds
    from the start of the simulation. ``k`` is the configured draft length, 0 without speculation;
    ``pool_blocks`` the size of the cache.
    """

    requests: tuple[SimRequest, ...]
    served: tuple[LiveRequest, ...]
    ends_s: Floats
    preemptions: int
    k: int
    pool_blocks: int
    trace: StepTrace | None = None

    @property
    def duration_s(self) -> float:
        """From 0 to the end of the last step."""
        return float(self.ends_s[-1]) if len(self.ends_s) else 0.0

    @cached_property
    def arrival_s(self) -> Floats:
        """When each request arrived (closed loop: when its client became free)."""
        return np.array([live.arrival_s for live in self.served])

    @cached_property
    def first_token_s(self) -> Floats:
        """When each request's first token came."""
        return self.ends_s[[live.pieces[0].first for live in self.served]]

    @cached_property
    def finished_s(self) -> Floats:
        """When each request's last token came."""
        return np.array([live.finished_s for live in self.served])

    @cached_property
    def output_tokens(self) -> Ints:
        """Tokens generated for each request."""
        return np.array([live.output for live in self.served], np.int64)

    @property
    def ttft_s(self) -> Floats:
        """Time to first token, from arrival."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Time per output token after the first; NaN for requests of one token."""
        more = np.where(self.output_tokens > 1, self.output_tokens - 1.0, np.nan)
        return (self.finished_s - self.first_token_s) / more

    def chunks(self, index: int) -> tuple[Floats, Ints]:
        """Request ``index``'s chunks: when each came and how many tokens it brought."""
        pieces = self.served[index].pieces
        times = [self.ends_s[piece.first : piece.first + len(piece.tokens)] for piece in pieces]
        return np.concatenate(times), np.concatenate([piece.tokens for piece in pieces])


def simulate(
    requests: Sequence[SimRequest],
    costs: StepCosts,
    config: SchedulerConfig,
    *,
    rng: np.random.Generator,
    concurrency: int | None = None,
    spacing_s: float = 0.0,
    trace: bool = False,
    leaps: bool = True,
) -> SimRun:
    """Serve ``requests`` from an idle engine to the last token.

    Open loop (``concurrency`` None): every request has an ``arrival_s``, in any order. Closed loop:
    ``concurrency`` clients, each sending the next request, in the order given, when its last one
    ended; the requests that are sent at one moment arrive after ``spacing_s``, twice ``spacing_s``
    and so on, so that they miss the step that begins then, and an idle engine starts with the first
    alone. The result depends on the arguments only; without ``leaps`` every step is taken by
    itself, to the same result. Raises InputError for requests that could never be served.
    """
    if not requests:
        raise InputError("There are no requests to simulate.", "Give one or more.")
    runs, hits, offsets = draw_acceptance(requests, rng)
    lives = [
        LiveRequest(
            number,
            prompt=request.prompt_tokens,
            output=request.output_tokens,
            arrival_s=request.arrival_s or 0.0,
            runs=runs[offsets[number] : offsets[number + 1]],
            hits=None if hits is None else hits[offsets[number] : offsets[number + 1]],
            cached=request.cached_prompt_tokens,
        )
        for number, request in enumerate(requests)
    ]
    engine = SimulatedEngine(config, costs, trace=trace)
    if concurrency is None:
        _open_loop(engine, requests, lives, leaps)
    else:
        _closed_loop(engine, lives, concurrency, spacing_s, leaps)
    return SimRun(
        tuple(requests),
        tuple(lives),
        engine.ends_s(),
        engine.preemptions,
        config.k if config.method is not None else 0,
        config.blocks,
        engine.trace() if trace else None,
    )


def _open_loop(
    engine: SimulatedEngine,
    requests: Sequence[SimRequest],
    lives: Sequence[LiveRequest],
    leaps: bool,
) -> None:
    if any(request.arrival_s is None for request in requests):
        raise InputError(
            "An open loop needs the arrival time of every request.",
            "Give arrival_s, or a concurrency for a closed loop.",
        )
    coming = deque(sorted(lives, key=lambda live: live.arrival_s))
    while coming or engine.busy:
        if not engine.busy:
            engine.idle_until(coming[0].arrival_s)
        while coming and coming[0].arrival_s <= engine.seen_until_s:
            engine.submit(coming.popleft())
        # Who comes while others wait already changes nothing until somebody leaves.
        until_s = coming[0].arrival_s if coming and not engine.waiting else math.inf
        if not leaps or not engine.leap(until_s):
            engine.step()
        engine.finished.clear()


def _arrival_s(live: LiveRequest) -> float:
    return live.arrival_s


def _closed_loop(
    engine: SimulatedEngine,
    lives: Sequence[LiveRequest],
    concurrency: int,
    spacing_s: float,
    leaps: bool,
) -> None:
    if concurrency < 1:
        raise InputError(f"A closed loop of {concurrency} clients.", "Give 1 or more.")
    coming = deque(lives)
    sent: deque[LiveRequest] = deque()
    for place in range(min(concurrency, len(coming))):
        coming[0].arrival_s += place * spacing_s
        sent.append(coming.popleft())
    while sent or engine.busy:
        if not engine.busy:
            engine.idle_until(sent[0].arrival_s)
        while sent and sent[0].arrival_s <= engine.seen_until_s:
            engine.submit(sent.popleft())
        until_s = sent[0].arrival_s if sent else math.inf
        if not leaps or not engine.leap(until_s, stop_at_completion=bool(coming)):
            engine.step()
        for place, done in enumerate(engine.finished[: len(coming)]):
            following = coming.popleft()
            following.arrival_s = done.finished_s + (place + 1) * spacing_s
            insort(sent, following, key=_arrival_s)
        engine.finished.clear()
