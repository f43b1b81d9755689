"""What one replica did between two readings of its /metrics.

Everything is a difference: a figure of a window never holds what came before it. A replica that
restarts, vanishes, loses a metric or whose machine's clock jumps gives a window that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from specwise.vllm.metrics import Delta, Histogram, Snapshot, difference


class State(StrEnum):
    """What a window could be made of."""

    OK = "ok"
    FIRST = "first"  # nothing to compare with yet
    RESTARTED = "restarted"
    UNREACHABLE = "unreachable"
    NOT_VLLM = "not vllm"  # it answers, but with no metric of vLLM's


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a replica: the snapshot, or why there is none.

    ``at_s`` is Unix time, ``monotonic_s`` the clock that durations are taken from.
    """

    at_s: float
    monotonic_s: float
    snapshot: Snapshot | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """Mean and percentiles of a histogram's window, seconds; percentiles are read off buckets."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Window:
    """One replica between two readings. None is "not exported", never zero.

    ``positions[i]`` is the share of verify steps that accepted the draft at position i + 1.
    ``clock_jump_s`` is how far the wall clock moved beside the monotonic one: time stamps of this
    window are off by that, its rates are not.
    """

    state: State
    at_s: float
    duration_s: float
    error: str = ""
    generation: str | None = None
    speculative: bool | None = None
    drafted_tokens: float | None = None
    accepted_tokens: float | None = None
    verify_steps: float | None = None
    positions: tuple[float, ...] = ()
    output_tokens_per_s: float | None = None
    requests: float | None = None
    ttft_s: Timing | None = None
    tpot_s: Timing | None = None
    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None
    prefix_hit_rate: float | None = None
    preemptions: float | None = None
    clock_jump_s: float = 0.0

    @property
    def rate(self) -> float | None:
        """Accepted / drafted tokens; None where nothing was drafted."""
        if not self.drafted_tokens or self.accepted_tokens is None:
            return None
        return self.accepted_tokens / self.drafted_tokens

    @property
    def length(self) -> float | None:
        """1 + accepted / verify steps; None without verify steps."""
        if not self.verify_steps or self.accepted_tokens is None:
            return None
        return 1 + self.accepted_tokens / self.verify_steps


_JUMP_S = 2.0


def window(before: Reading | None, after: Reading) -> Window:
    """The window between two readings of one replica, oldest first.

    ``before`` is None for a replica that is seen for the first time; it may also be the last good
    reading from before an outage, whose counters then cover the outage.
    """
    if after.snapshot is None:
        return Window(State.UNREACHABLE, after.at_s, 0.0, error=after.error)
    snapshot = after.snapshot
    if snapshot.generation is None and not snapshot.counters:
        return Window(
            State.NOT_VLLM, after.at_s, 0.0, error="It answers, but exports no metric of vLLM's."
        )
    gauges = _Gauges(snapshot)
    if before is None or before.snapshot is None:
        return gauges.window(State.FIRST, after.at_s, 0.0, Delta(), 0.0)
    duration_s = after.monotonic_s - before.monotonic_s
    if duration_s <= 0:  # a reading kept from before the machine was started anew
        duration_s = after.at_s - before.at_s
    moved_s = (after.at_s - before.at_s) - duration_s
    jump_s = moved_s if abs(moved_s) > _JUMP_S else 0.0
    delta = difference(before.snapshot, snapshot)
    state = State.RESTARTED if delta.reset else State.OK
    return gauges.window(state, after.at_s, duration_s, delta, jump_s)


@dataclass(frozen=True, slots=True)
class _Gauges:
    """The snapshot at the end of a window, with what is made of it."""

    snapshot: Snapshot

    def window(
        self, state: State, at_s: float, duration_s: float, delta: Delta, jump_s: float
    ) -> Window:
        counted, gauges = delta.counters, self.snapshot.gauges
        accepted, steps = counted.get("spec_accepted_tokens"), counted.get("spec_drafts")
        queries, hits = counted.get("prefix_cache_queries"), counted.get("prefix_cache_hits")
        tokens = counted.get("generation_tokens")
        return Window(
            state=state,
            at_s=at_s,
            duration_s=duration_s,
            generation=self.snapshot.generation,
            speculative=self.snapshot.speculative,
            drafted_tokens=counted.get("spec_draft_tokens"),
            accepted_tokens=accepted,
            verify_steps=steps,
            positions=_positions(counted, steps),
            output_tokens_per_s=tokens / duration_s if tokens is not None and duration_s else None,
            requests=counted.get("request_success"),
            ttft_s=timing(delta.histograms.get("ttft_s")),
            tpot_s=timing(delta.histograms.get("tpot_s")),
            running=gauges.get("running"),
            waiting=gauges.get("waiting"),
            kv_use=gauges.get("kv_use"),
            prefix_hit_rate=hits / queries if queries and hits is not None else None,
            preemptions=counted.get("preemptions"),
            clock_jump_s=jump_s,
        )


def _positions(counted: Mapping[str, float], steps: float | None) -> tuple[float, ...]:
    found: list[float] = []
    while steps and (name := f"spec_accepted_pos_{len(found)}") in counted:
        found.append(counted[name] / steps)
    return tuple(found)


def timing(histogram: Histogram | None) -> Timing | None:
    """Mean (exact) and percentiles (read off the buckets); None without observations."""
    if histogram is None or histogram.count <= 0:
        return None
    p50, p95, p99 = (quantile(histogram, share) for share in (0.5, 0.95, 0.99))
    return Timing(round(histogram.count), histogram.total / histogram.count, p50, p95, p99)


def quantile(histogram: Histogram, share: float) -> float:
    """The value below which ``share`` of the observations lie, linear inside a bucket.

    As PromQL's histogram_quantile (prometheus, promql/quantile.go): the first bucket starts at 0,
    and what falls into the last, unbounded one is given that bucket's lower bound. NaN for none.
    """
    rank = share * histogram.count
    lower_bound, below = 0.0, 0.0
    for bound, at_most in zip(histogram.bounds, histogram.at_most, strict=True):
        if at_most >= rank and at_most > below:
            if math.isinf(bound):
                return lower_bound
            return lower_bound + (bound - lower_bound) * (rank - below) / (at_most - below)
        lower_bound, below = bound, at_most
    return math.nan


class Replica:
    """Follows one server: keeps the last good reading, so that a window spans an outage."""

    def __init__(self, last: Reading | None = None) -> None:
        self.last = last

    def read(self, reading: Reading) -> Window:
        """The window that ends with ``reading``."""
        found = window(self.last, reading)
        if found.state not in (State.UNREACHABLE, State.NOT_VLLM):
            self.last = reading
        return found
