"""The load generator: sends a plan of requests, open or closed loop, and records each one.

A run answers for itself: it measures how late it sent, how late its own timer ran and how much of
its core it used, and says so when that, not the server, shaped the times (``client_limits``).
Nothing is ever sent twice, with one exception that cannot be one: a kept-alive connection that
proves to have been closed before the server's machine took in a byte of the request.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import resource
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import uvloop

from specwise.domain import ClientHealth, Outcome, RequestRecord
from specwise.errors import InputError
from specwise.measurement.alarm import Alarm
from specwise.measurement.connection import (
    Connection,
    ConnectionPool,
    Exchange,
    parse_origin,
    request_head,
)
from specwise.measurement.outcome import outcome_of, presentable
from specwise.measurement.receiver import Clock
from specwise.vllm.response import StreamedResponse, StreamReader

_TICK_S = 0.01
_SLICE_PIECES = 128
_MAX_SPARE = 4
_OTHER_FILES = 256
_MAX_FILES = 65536

LIMIT_SHARE_OF_TTFT = 0.05
LIMIT_FLOOR_S = 0.005
LIMIT_CPU_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. ``url`` is the base, ``timeout_s`` bounds a whole request.

    ``headers`` (Authorization above all) never show in a repr. ``speculative`` says that the
    server is known to speculate, which permits estimates from tokens per chunk.
    """

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 600.0
    verify_tls: bool = True
    speculative: bool = False


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request as it will go out: ``body`` is the complete JSON (``response.request_body``).

    ``intended_s`` counts from the start of the run; None in a closed loop.
    """

    index: int
    prompt_id: str
    segment: str
    temperature: float
    path: str
    body: bytes = field(repr=False)
    intended_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What a run says about itself.

    ``started_at`` is the wall-clock moment (ISO 8601, UTC) of time 0; ``finished`` how many
    requests were recorded, cancelled ones included; ``stopped`` whether Ctrl-C or ``stop`` ended
    it early. ``limits`` says, in words, what in the client limited the run; empty when nothing
    did.
    """

    started_at: str
    duration_s: float
    client: ClientHealth
    finished: int
    stopped: bool
    limits: tuple[str, ...]

    @property
    def client_limited(self) -> bool:
        """Whether the client, not the server, may have shaped the latencies."""
        return bool(self.limits)


def run_load(
    plan: Sequence[PlannedRequest],
    *,
    target: Target,
    concurrency: int | None,
    part: int,
    on_record: Callable[[RequestRecord], None],
    keep_text: bool = False,
    stop: Callable[[], bool] = lambda: False,
    clock: Clock = time.perf_counter,
) -> LoadRun:
    """Send ``plan`` and block until every request has ended.

    ``concurrency`` clients in a closed loop take the requests in order, each as soon as its last
    one ended; with ``concurrency`` None every request goes out at its ``intended_s``, however many
    are in flight. ``on_record`` is called, on this thread, soon after each request ends; what it
    raises ends the run and is raised from here. When ``stop`` returns True (asked about every
    0.1 s) or Ctrl-C is pressed, requests in flight are recorded CANCELLED, those not yet sent are
    not recorded, and the run returns with ``stopped`` set.

    Raises InputError for a plan or target that cannot be used.
    """
    run = _Run(
        plan,
        target=target,
        concurrency=concurrency,
        part=part,
        on_record=on_record,
        keep_text=keep_text,
        stop=stop,
        clock=clock,
    )
    _make_room_for_connections(len(plan) if concurrency is None else concurrency)
    collected = gc.isenabled()
    gc.collect()
    gc.disable()  # a pass over a long run's records would hold up every stream for milliseconds
    switch_interval_s = sys.getswitchinterval()
    # Other threads (progress, metrics) must hand the interpreter back soon: 5 ms is the default.
    sys.setswitchinterval(min(switch_interval_s, 0.0005))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run.execute())
    finally:
        sys.setswitchinterval(switch_interval_s)
        if collected:
            gc.enable()
    return run.result()


def client_limits(
    health: ClientHealth, ttft_p50_s: float | None, *, open_loop: bool
) -> tuple[str, ...]:
    """Why the client limited a run, in words; empty if it did not.

    Its loop lag (p99) and, in an open loop, its lateness (p99) may reach 5 % of the median TTFT,
    or 5 ms where that is more; a worker may use 85 % of a core.
    """
    allowed_s = max(LIMIT_FLOOR_S, LIMIT_SHARE_OF_TTFT * (ttft_p50_s or 0.0))
    limits = []
    if health.loop_lag_s_p99 > allowed_s:
        limits.append(
            f"its timer ran {health.loop_lag_s_p99 * 1e3:.1f} ms late (p99; "
            f"{allowed_s * 1e3:.1f} ms allowed)"
        )
    if open_loop and health.lateness_s_p99 > allowed_s:
        limits.append(
            f"it sent requests {health.lateness_s_p99 * 1e3:.1f} ms after their time (p99; "
            f"{allowed_s * 1e3:.1f} ms allowed)"
        )
    if health.cpu_share > LIMIT_CPU_SHARE:
        limits.append(f"it used {health.cpu_share:.0%} of a core ({LIMIT_CPU_SHARE:.0%} allowed)")
    return tuple(limits)


@dataclass(slots=True, eq=False)
class _Flight:
    """One request on its way: from when it was due to when its exchange has ended."""

    request: PlannedRequest
    intended_s: float
    began_s: float
    exchange: Exchange
    connected_s: float = 0.0
    connection: Connection | None = None
    opening: asyncio.Task[None] | None = None


class _Run:
    """The state of one run; ``execute`` is its only coroutine to start.

    A request costs no task of its own: it is sent from the schedule (open loop) or from the end of
    the one before (closed loop), ends in a call from its connection, and is read and recorded from
    a queue, a slice of an answer at a time.
    """

    def __init__(
        self,
        plan: Sequence[PlannedRequest],
        *,
        target: Target,
        concurrency: int | None,
        part: int,
        on_record: Callable[[RequestRecord], None],
        keep_text: bool,
        stop: Callable[[], bool],
        clock: Clock,
    ) -> None:
        if concurrency is not None and concurrency < 1:
            raise InputError(f"A concurrency of {concurrency} sends nothing.", "Give 1 or more.")
        if not target.timeout_s > 0:
            raise InputError(
                f"A timeout of {target.timeout_s} s ends every request.", "Give more than 0."
            )
        if concurrency is None and any(request.intended_s is None for request in plan):
            raise InputError(
                "An open loop needs a send time for every request.",
                "Schedule them with arrivals.intended_times, or give a concurrency.",
            )
        self._plan: Sequence[PlannedRequest] = (
            sorted(plan, key=lambda request: request.intended_s or 0.0)
            if concurrency is None
            else plan
        )
        self._target = target
        self._concurrency = concurrency
        self._part = part
        self._on_record = on_record
        self._keep_text = keep_text
        self._stop = stop
        self._clock = clock
        origin = parse_origin(target.url)
        self._heads = {
            path: request_head(origin, path, target.headers)
            for path in {request.path for request in plan}
        }
        self._pool = ConnectionPool(
            origin,
            verify_tls=target.verify_tls,
            clock=clock,
            spare=_MAX_SPARE if concurrency is None else 0,
        )
        self._next = 0  # in the plan
        self._in_flight: dict[_Flight, None] = {}  # the oldest first
        self._ended: deque[_Flight] = deque()
        self._slices = self._record_in_slices()
        self._recording = False
        self._tick_due_s = 0.0
        self._all_sent = False
        self._start_s = 0.0
        self._end_s = 0.0
        self._cpu_s = 0.0
        self._started_at = ""
        self._lateness: list[float] = []
        self._lags: list[float] = []
        self._ttfts: list[float] = []
        self._finished = 0
        self.interrupted = False

    # --- the run ---------------------------------------------------------------------------

    async def execute(self) -> None:
        """Send everything, record everything, close everything."""
        self._loop = loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        await self._pool.warm_up(min(len(self._plan), self._concurrency or _MAX_SPARE))
        cpu_before_s = time.thread_time()
        self._started_at = datetime.now(UTC).isoformat()
        self._start_s = self._clock()
        self._tick_alarm = Alarm(partial(self._guard, self._tick))
        self._send_alarm = Alarm(partial(self._guard, self._send_due))
        self._set_tick()
        if self._concurrency is None:
            self._send_due()
        else:
            for _ in range(self._concurrency):
                self._send_next()
        try:
            while not self._over.done():
                try:
                    await asyncio.wait((self._over,))
                except asyncio.CancelledError:  # Ctrl-C
                    self._interrupt()
            self._over.result()
        finally:
            self._end_s = self._clock()
            self._cpu_s = time.thread_time() - cpu_before_s
            self._tick_alarm.close()
            self._send_alarm.close()
            await self._pool.close()

    def _guard(self, work: Callable[..., None], *arguments: _Flight) -> None:
        """Do ``work``, called by the event loop; what it raises ends the run."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 - raised again by execute
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def _interrupt(self) -> None:
        """Send nothing more and record what is in flight as cancelled."""
        self.interrupted = True
        self._all_sent = True
        for flight in tuple(self._in_flight):
            self._give_up(flight, Outcome.CANCELLED, "the run was stopped")
        self._end_if_done()

    def _end_if_done(self) -> None:
        done = self._all_sent and not self._in_flight and not self._recording
        if done and not self._over.done():
            self._over.set_result(None)

    def result(self) -> LoadRun:
        """What the run says about itself."""
        duration_s = self._end_s - self._start_s
        health = ClientHealth(
            lateness_s_p50=percentile(self._lateness, 0.50),
            lateness_s_p99=percentile(self._lateness, 0.99),
            loop_lag_s_p99=percentile(self._lags, 0.99),
            cpu_share=self._cpu_s / duration_s if duration_s > 0 else 0.0,
        )
        ttft_p50_s = percentile(self._ttfts, 0.50) if self._ttfts else None
        return LoadRun(
            started_at=self._started_at,
            duration_s=duration_s,
            client=health,
            finished=self._finished,
            stopped=self.interrupted,
            limits=client_limits(health, ttft_p50_s, open_loop=self._concurrency is None),
        )

    # --- sending ---------------------------------------------------------------------------

    def _send_due(self) -> None:
        """In an open loop: every request whose time has come; then wait for the next."""
        while not self._all_sent:
            request = self._plan[self._next] if self._next < len(self._plan) else None
            if request is None:
                self._all_sent = True
                self._end_if_done()
                return
            due_s = self._start_s + (request.intended_s or 0.0)
            wait_s = due_s - self._clock()
            if wait_s > 0:
                self._send_alarm.set(wait_s)
                return
            self._next += 1
            self._begin(request, due_s)

    def _send_next(self) -> None:
        """In a closed loop: the next request, by a client that has just become free."""
        if not self._all_sent and self._next < len(self._plan):
            self._next += 1
            self._begin(self._plan[self._next - 1], self._clock())
        else:
            self._all_sent = True
            self._end_if_done()

    def _begin(self, request: PlannedRequest, intended_s: float) -> None:
        flight = _Flight(request, intended_s, self._clock(), Exchange())
        self._in_flight[flight] = None
        connection = self._pool.take()
        if connection is not None:
            self._send(flight, connection)
        else:
            self._open_for(flight)

    def _open_for(self, flight: _Flight) -> None:
        """Send a request on a connection of its own."""
        flight.opening = self._loop.create_task(self._open(flight))
        flight.opening.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._fail(error)

    async def _open(self, flight: _Flight) -> None:
        outcome = Outcome.REFUSED
        try:
            connection = await self._pool.open()
        except TimeoutError as error:
            outcome, reason = Outcome.TIMEOUT, str(error)
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or "handshake failed"
            reason = f"no TLS connection: {reason}"
        except OSError as error:
            # uvloop's own text hides the errno's; a failed name lookup has a text of its own.
            known = isinstance(error, ConnectionError) and error.errno
            reason = os.strerror(error.errno or 0) if known else error.strerror or str(error)
            reason = f"no connection: {reason}"
        else:
            flight.opening = None
            self._send(flight, connection)
            return
        flight.opening = None
        self._give_up(flight, outcome, reason)

    def _send(self, flight: _Flight, connection: Connection) -> None:
        request = flight.request
        body = request.body
        flight.connected_s = self._clock()
        flight.connection = connection
        connection.send(
            flight.exchange,
            b"%b%d\r\n\r\n%b" % (self._heads[request.path], len(body), body),
            partial(self._guard, self._answered, flight),
        )

    def _answered(self, flight: _Flight) -> None:
        """A connection says that a request's exchange has ended."""
        connection, flight.connection = flight.connection, None
        if connection is not None:
            self._pool.release(connection)
        if flight.exchange.unreached:
            flight.exchange = Exchange()
            self._open_for(flight)
        else:
            self._finish(flight)

    def _give_up(self, flight: _Flight, outcome: Outcome, reason: str) -> None:
        """End a request from this side."""
        if flight.opening is not None:
            flight.opening.cancel()
        if flight.connection is not None:
            flight.connection.give_up()
            self._pool.discard(flight.connection)
        flight.exchange.fault = (outcome, reason)
        flight.exchange.finished_s = self._clock()
        self._finish(flight)

    def _finish(self, flight: _Flight) -> None:
        """Hand a request whose exchange has ended to the recorder."""
        exchange = flight.exchange
        if exchange.sent_s is None:
            exchange.sent_s = self._clock()
        else:
            waited_s = flight.connected_s - flight.began_s
            self._lateness.append(max(0.0, exchange.sent_s - flight.intended_s - waited_s))
        del self._in_flight[flight]
        self._ended.append(flight)
        if not self._recording:
            self._recording = True
            self._loop.call_soon(self._guard, self._record_slice)
        if self._concurrency is not None:
            self._send_next()

    # --- recording -------------------------------------------------------------------------

    def _record_slice(self) -> None:
        next(self._slices)
        if self._recording:
            self._loop.call_soon(self._guard, self._record_slice)
        else:
            self._end_if_done()

    def _record_in_slices(self) -> Iterator[None]:
        """Read and record what ended; pauses often enough not to delay a time stamp."""
        pieces_read = 0
        while True:
            while self._ended:
                flight = self._ended.popleft()
                exchange = flight.exchange
                reader = StreamReader(speculative=self._target.speculative)
                times_s, pieces = exchange.times_s, exchange.pieces
                for i in range(0, len(pieces), _SLICE_PIECES):
                    reader.feed_all(times_s[i : i + _SLICE_PIECES], pieces[i : i + _SLICE_PIECES])
                    pieces_read += min(_SLICE_PIECES, len(pieces) - i)
                    if pieces_read >= _SLICE_PIECES:
                        pieces_read = 0
                        yield
                response = reader.finish(exchange.finished_s)
                self._keep(flight.request, flight.intended_s, exchange, response)
                pieces_read += _SLICE_PIECES // 4
            self._recording = False
            yield

    def _keep(
        self,
        request: PlannedRequest,
        intended_s: float,
        exchange: Exchange,
        response: StreamedResponse,
    ) -> None:
        record = self._record(request, intended_s, exchange, response)
        first_token_s = record.first_token_s
        if first_token_s is not None:
            self._ttfts.append(first_token_s - record.intended_s)
        self._finished += 1
        self._on_record(record)

    def _record(
        self,
        request: PlannedRequest,
        intended_s: float,
        exchange: Exchange,
        response: StreamedResponse,
    ) -> RequestRecord:
        start_s = self._start_s
        outcome, error = outcome_of(exchange, response)
        if error is not None:
            error = presentable(error, self._target.headers, request.body)
        return RequestRecord(
            index=request.index,
            prompt_id=request.prompt_id,
            segment=request.segment,
            temperature=request.temperature,
            part=self._part,
            intended_s=intended_s - start_s,
            sent_s=(exchange.sent_s or 0.0) - start_s,
            chunk_s=tuple([at_s - start_s for at_s in response.chunk_s]),
            chunk_tokens=response.chunk_tokens,
            finished_s=exchange.finished_s - start_s,
            outcome=outcome,
            status=exchange.status,
            error=error,
            prompt_tokens=response.prompt_tokens,
            output_tokens=response.output_tokens,
            cached_tokens=response.cached_tokens,
            finish_reason=response.finish_reason,
            acceptance=response.acceptance,
            output_sha256=response.output_sha256,
            output_text=response.text if self._keep_text else None,
        )

    # --- watching --------------------------------------------------------------------------

    def _set_tick(self) -> None:
        self._tick_due_s = self._clock() + _TICK_S
        self._tick_alarm.set(_TICK_S)

    def _tick(self) -> None:
        """Measure how late a timer runs; see to what no event brings about."""
        now_s = self._clock()
        self._lags.append(max(0.0, now_s - self._tick_due_s))
        if len(self._lags) % 10 == 0 and not self.interrupted and self._stop():
            self._interrupt()
        self._give_up_late(now_s)
        self._set_tick()

    def _give_up_late(self, now_s: float) -> None:
        timeout_s = self._target.timeout_s
        late = []
        for flight in self._in_flight:
            if now_s - flight.began_s < timeout_s:
                break
            late.append(flight)
        for flight in late:
            came = (
                "nothing came" if flight.exchange.status is None else "the answer was not complete"
            )
            self._give_up(flight, Outcome.TIMEOUT, f"{came} within {timeout_s:g} s")


def _make_room_for_connections(count: int) -> None:
    """Raise the limit on open files as far as allowed, and have the kernel grow their table now.

    The kernel doubles the table when it is full. In a process with threads that waits for every
    core to pass a quiescent state (``expand_fdtable``): 10 ms on an idle machine, seconds on a
    busy one, in which no request is sent and no time stamp taken.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard >= wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    elif wanted > hard > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    last = min(wanted, limit if limit != resource.RLIM_INFINITY else wanted, _MAX_FILES) - 1
    read_end, write_end = os.pipe()
    try:
        os.close(fcntl.fcntl(read_end, fcntl.F_DUPFD_CLOEXEC, last))
    except OSError:
        pass  # the descriptors up there are taken: the table has grown already
    finally:
        os.close(read_end)
        os.close(write_end)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
