"""Whether a replica still behaves as the study said, and whether the verdict still stands.

Classes are the article's (req H1: 0.7 and up healthy, below 0.5 unhealthy) unless the study
measured its own break-even rate, which then decides. Every observation gives the figure, what it is
compared with and what to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from specwise.decision.verdict import Decision
from specwise.monitoring.drift import DriftState, DriftTest, drift_test, step
from specwise.monitoring.expectations import FULL_KV_USE, HEALTHY_RATE, Expectations
from specwise.monitoring.windows import Reading, Replica, State, Window


class Health(StrEnum):
    """How a replica is."""

    HEALTHY = "healthy"
    WATCH = "watch"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"  # not reachable, no traffic, or nothing to judge by


class Level(StrEnum):
    """How much an observation matters."""

    NOTE = "note"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Observation:
    """Something worth saying about a replica.

    ``against_verdict`` is True for what the study's verdict cannot stand with.
    """

    code: str
    level: Level
    text: str
    next_step: str
    against_verdict: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaStanding:
    """One replica after its newest window.

    ``rate`` and ``length`` are over the recent windows together, ``drafted_tokens`` their number
    of drafts; ``drift`` is the sequential test's state.
    """

    url: str
    health: Health
    window: Window
    rate: float | None
    length: float | None
    drafted_tokens: float
    drift: DriftState
    observations: tuple[Observation, ...]

    @property
    def verdict_stands(self) -> bool | None:
        """False where an observation contradicts the verdict, None where nothing can be said."""
        if any(o.against_verdict for o in self.observations):
            return False
        return None if self.health is Health.UNKNOWN else True


_RECENT = 15
"""Windows that are judged together: one minute of a quiet server says little."""
_FEW_REQUESTS = 20.0
_TPOT_SLACK = 1.05


@dataclass(frozen=True, slots=True)
class Memory:
    """All that following a replica has to remember: enough to go on in another process.

    ``pending`` are (seconds, drafted, accepted) not yet given to the drift test, whose windows are
    longer than the time between two readings.
    """

    url: str
    last: Reading | None = None
    recent: tuple[Window, ...] = ()
    drift: DriftState = field(default_factory=DriftState)
    pending: tuple[float, float, float] = (0.0, 0.0, 0.0)


class Watched:
    """Follows one replica: windows, the drift test, and what they add up to.

    ``memory`` goes on where another `Watched` stopped. Without ``expected`` there is no drift test
    and the classes are the article's.
    """

    def __init__(
        self, memory: Memory, expected: Expectations | None, *, false_alarm_rate: float = 0.01
    ) -> None:
        self.url = memory.url
        self._replica = Replica(memory.last)
        self._recent = deque(memory.recent, maxlen=_RECENT)
        self._drift = memory.drift
        self._pending = memory.pending
        self._expected = expected
        self._test: DriftTest | None = None
        if expected is not None:
            self._test = drift_test(expected, false_alarm_rate=false_alarm_rate)

    @property
    def memory(self) -> Memory:
        """What to keep for the next process."""
        return Memory(self.url, self._replica.last, tuple(self._recent), self._drift, self._pending)

    def read(self, reading: Reading) -> ReplicaStanding:
        """The replica's standing after one more reading."""
        window = self._replica.read(reading)
        if window.state is State.OK:
            self._recent.append(window)
            self._test_drift(window)
        return self._standing(window)

    def _test_drift(self, window: Window) -> None:
        duration_s, drafted, accepted = self._pending
        duration_s += window.duration_s
        drafted += window.drafted_tokens or 0.0
        accepted += window.accepted_tokens or 0.0
        if self._test is not None and duration_s >= self._test.window_s:
            self._drift = step(
                self._test,
                self._drift,
                at_s=window.at_s,
                drafted_tokens=drafted,
                accepted_tokens=accepted,
            )
            duration_s = drafted = accepted = 0.0
        self._pending = (duration_s, drafted, accepted)

    def _standing(self, window: Window) -> ReplicaStanding:
        drafted = sum(w.drafted_tokens or 0.0 for w in self._recent)
        accepted = sum(w.accepted_tokens or 0.0 for w in self._recent)
        steps = sum(w.verify_steps or 0.0 for w in self._recent)
        rate = accepted / drafted if drafted else None
        found = (*self._of_the_window(window), *self._of_the_recent(rate, drafted))
        return ReplicaStanding(
            url=self.url,
            health=self._health(window, rate, found),
            window=window,
            rate=rate,
            length=1 + accepted / steps if steps else None,
            drafted_tokens=drafted,
            drift=self._drift,
            observations=tuple(found),
        )

    def _health(self, window: Window, rate: float | None, found: tuple[Observation, ...]) -> Health:
        if window.state in (State.UNREACHABLE, State.NOT_VLLM) or rate is None:
            return Health.UNKNOWN
        if any(o.level is Level.CRITICAL for o in found):
            return Health.UNHEALTHY
        if any(o.level is Level.WARNING for o in found):
            return Health.WATCH
        healthy = HEALTHY_RATE if self._expected is None else self._expected.low_rate
        return Health.HEALTHY if rate >= healthy else Health.WATCH

    def _of_the_window(self, window: Window) -> Iterator[Observation]:
        if window.state in (State.UNREACHABLE, State.NOT_VLLM):
            yield Observation(
                window.state.value.replace(" ", "-"),
                Level.WARNING,
                window.error,
                "Check that the server is up and that the address is right.",
            )
            return
        if window.state is State.RESTARTED:
            yield Observation(
                "restarted",
                Level.NOTE,
                "The server restarted; what it counted in this window is lost.",
                "If this was not you: look into the server's log.",
            )
        if window.clock_jump_s:
            yield Observation(
                "clock",
                Level.NOTE,
                f"This machine's clock jumped by {window.clock_jump_s:+.0f} s; rates do not "
                "depend on it, time stamps do.",
                "Check the machine's time service.",
            )
        if window.speculative is False:
            yield Observation(
                "no-speculation",
                Level.CRITICAL if self._speculation_expected else Level.NOTE,
                "The server exports no speculation metrics: it does not speculate.",
                "Check its --speculative-config."
                if self._speculation_expected
                else "Nothing to do if that is meant.",
                against_verdict=self._speculation_expected,
            )

    @property
    def _speculation_expected(self) -> bool:
        return self._expected is not None and self._expected.decision in (
            Decision.ON,
            Decision.SCHEDULE,
        )

    def _of_the_recent(self, rate: float | None, drafted: float) -> Iterator[Observation]:
        expected = self._expected
        enough = drafted >= _FEW_REQUESTS * self._drafted_per_request
        if rate is not None and enough:
            low = 0.5 if expected is None else expected.low_rate
            measured = expected is not None and expected.break_even is not None
            if rate < low:
                yield Observation(
                    "acceptance-low",
                    Level.CRITICAL,
                    f"Acceptance is {rate:.2f}, below "
                    + (f"the measured break-even rate {low:.2f}." if measured else "0.5 (rule)."),
                    "Turn speculation off here, then find the segment that lost it.",
                    against_verdict=True,
                )
            elif expected is None and rate < HEALTHY_RATE:
                yield Observation(
                    "acceptance-middling",
                    Level.WARNING,
                    f"Acceptance is {rate:.2f}, between 0.5 and 0.7 (rule): neither clearly good "
                    "nor bad.",
                    "Measure against a baseline: specwise measure.",
                )
        if expected is None:
            return
        yield from self._of_the_drift(expected)
        yield from self._of_the_latency(expected)

    @property
    def _drafted_per_request(self) -> float:
        return 100.0 if self._test is None else self._test.drafted_per_request

    def _of_the_drift(self, expected: Expectations) -> Iterator[Observation]:
        test, drift = self._test, self._drift
        if test is None or drift.alarm_at_s is None or drift.rate is None:
            return
        yield Observation(
            "drift",
            Level.WARNING,
            f"Acceptance fell from {expected.rate:.2f} (study) to {drift.rate:.2f}; this began "
            f"about {_ago(drift.alarm_at_s, drift.since_s)} before it was certain. False-alarm "
            f"rate: {test.false_alarm_rate:g} in {test.horizon_s / 86400:g} days.",
            "Look for a change of prompts, temperatures, model or quantisation since then; "
            "measure again before trusting the verdict.",
            against_verdict=True,
        )

    def _of_the_latency(self, expected: Expectations) -> Iterator[Observation]:
        windows = [w for w in self._recent if w.running is not None]
        if not windows:
            return
        running = sum(w.running or 0.0 for w in windows) / len(windows)
        drafting = any(w.drafted_tokens for w in windows)
        at_most = expected.running is None or running <= expected.running
        tpot, count = _mean_of(windows, "tpot_s")
        ceiling = expected.baseline_tpot_s.mean
        judged = at_most and drafting and count >= _FEW_REQUESTS
        if judged and tpot is not None and tpot > ceiling * _TPOT_SLACK:
            yield Observation(
                "slower-than-baseline",
                Level.CRITICAL,
                f"Mean TPOT is {tpot * 1000:.1f} ms with {running:.0f} requests running; the "
                f"study measured {ceiling * 1000:.1f} ms without speculation.",
                "Turn speculation off, then look for the cause.",
                against_verdict=True,
            )
        ttft, count = _mean_of(windows, "ttft_s")
        late = ttft is not None and ttft > expected.ttft_limit_s
        if ttft is not None and late and count >= _FEW_REQUESTS and at_most:
            yield Observation(
                "ttft",
                Level.WARNING,
                f"Mean TTFT is {ttft * 1000:.0f} ms; the study measured "
                f"{expected.ttft_s.mean * 1000:.0f} ms at its production load.",
                "Check queue and prompt lengths: drafting slows prefill.",
            )
        crossover = expected.crossover_running
        if crossover is not None and drafting and running > crossover:
            yield Observation(
                "above-crossover",
                Level.WARNING,
                f"{running:.0f} requests are running; speculation stopped paying at "
                f"{crossover:.1f}.",
                "Add replicas, or shorten drafts with a schedule by batch size.",
                against_verdict=expected.decision is Decision.ON,
            )
        kv_use = max((w.kv_use for w in windows if w.kv_use is not None), default=None)
        preempted = sum(w.preemptions or 0.0 for w in windows)
        if kv_use is not None and kv_use > FULL_KV_USE and preempted:
            yield Observation(
                "kv-squeeze",
                Level.WARNING,
                f"The KV cache was {kv_use:.0%} full and {preempted:.0f} requests were preempted.",
                "The draft takes memory from the cache: see `specwise memory`.",
            )


def _ago(alarm_at_s: float, since_s: float | None) -> str:
    """How long the fall went on before it was certain."""
    minutes = 0.0 if since_s is None else (alarm_at_s - since_s) / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _mean_of(windows: list[Window], name: str) -> tuple[float | None, int]:
    timings = [t for w in windows if (t := getattr(w, name)) is not None]
    count = sum(t.count for t in timings)
    if not count:
        return None, 0
    return sum(t.mean * t.count for t in timings) / count, count
