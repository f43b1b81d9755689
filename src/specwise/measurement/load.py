"""The load generator: sends a plan of requests, open or closed loop, and records each one.

A run answers for itself: it measures how late it sent, how late its own timer ran and how much of
its core it used, and says so when that, not the server, shaped the times (``client_limits``).
Nothing is ever sent twice, with one exception that cannot be one: a kept-alive connection that
proves to have been closed before the server's machine took in a byte of the request.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import gc
import os
import resource
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import orjson
import uvloop

from specwise.domain import ClientHealth, Outcome, RequestRecord
from specwise.errors import InputError
from specwise.measurement.connection import (
    Clock,
    ConnectionPool,
    Exchange,
    parse_origin,
    request_head,
)
from specwise.vllm.response import Fault, StreamedResponse, StreamReader, error_message

_LAG_PERIOD_S = 0.01
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


class _Run:
    """The state of one run; ``execute`` is its only coroutine to start."""

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
        self._ended: deque[tuple[PlannedRequest, float, Exchange]] = deque()
        self._something_ended = asyncio.Event()
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
        loop = asyncio.get_running_loop()
        await self._pool.warm_up(min(len(self._plan), self._concurrency or _MAX_SPARE))
        cpu_before_s = time.thread_time()
        self._started_at = datetime.now(UTC).isoformat()
        self._start_s = self._clock()
        sender = loop.create_task(
            self._send_on_schedule() if self._concurrency is None else self._send_in_turn()
        )
        recorder = loop.create_task(self._record_ended())
        watcher = loop.create_task(self._watch(sender))
        try:
            await self._until_any_done(sender, recorder)
            if self.interrupted:
                sender.cancel()
                await asyncio.wait((sender,))
            if sender.done() and not sender.cancelled():
                sender.result()
            self._all_sent = True
            self._something_ended.set()
            await self._until_any_done(recorder)
            recorder.result()
        finally:
            self._end_s = self._clock()
            self._cpu_s = time.thread_time() - cpu_before_s
            for task in (sender, recorder, watcher):
                task.cancel()
            await asyncio.gather(sender, recorder, watcher, return_exceptions=True)
            await self._pool.close()

    async def _until_any_done(self, *tasks: asyncio.Task[None]) -> None:
        """Wait for one of the tasks; Ctrl-C ends the wait for more to be sent, not the records."""
        while True:
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return
            except asyncio.CancelledError:
                self.interrupted = True
                if len(tasks) > 1:
                    return

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

    async def _send_on_schedule(self) -> None:
        alarm = _Alarm()
        tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        try:
            for request in self._plan:
                due_s = self._start_s + (request.intended_s or 0.0)
                wait_s = due_s - self._clock()
                if wait_s > 0:
                    await alarm.sleep(wait_s)
                task = loop.create_task(self._perform(request, due_s))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)
        finally:
            alarm.close()
            in_flight = tuple(tasks)
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    async def _send_in_turn(self) -> None:
        waiting = iter(self._plan)
        loop = asyncio.get_running_loop()
        clients = [
            loop.create_task(self._be_client(waiting))
            for _ in range(min(self._concurrency or 1, len(self._plan)))
        ]
        try:
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _be_client(self, waiting: Iterator[PlannedRequest]) -> None:
        for request in waiting:
            await self._perform(request, self._clock())

    async def _perform(self, request: PlannedRequest, intended_s: float) -> None:
        """One request from its due time to its end; whatever happens becomes its exchange."""
        exchange = Exchange()
        began_s = self._clock()
        connected_s = began_s
        payload = b"%b%d\r\n\r\n%b" % (self._heads[request.path], len(request.body), request.body)
        try:
            async with asyncio.timeout(self._target.timeout_s):
                for fresh in (False, True):
                    connection = await self._pool.acquire(fresh=fresh)
                    connected_s = self._clock()
                    try:
                        await connection.perform(exchange, payload)
                    finally:
                        self._pool.release(connection)
                    if not exchange.unreached:
                        break
                    exchange = Exchange()
        except TimeoutError as error:
            self._fault(exchange, Outcome.TIMEOUT, str(error) or self._timeout_reason(exchange))
        except asyncio.CancelledError:
            self._fault(exchange, Outcome.CANCELLED, "the run was stopped")
            raise
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or "handshake failed"
            self._fault(exchange, Outcome.REFUSED, f"no TLS connection: {reason}")
        except OSError as error:
            # uvloop's own text hides the errno's; a failed name lookup has a text of its own.
            known = isinstance(error, ConnectionError) and error.errno
            reason = os.strerror(error.errno or 0) if known else error.strerror or str(error)
            self._fault(exchange, Outcome.REFUSED, f"no connection: {reason}")
        finally:
            if exchange.sent_s is None:
                exchange.sent_s = self._clock()
            else:
                own_s = exchange.sent_s - intended_s - (connected_s - began_s)
                self._lateness.append(max(0.0, own_s))
            self._ended.append((request, intended_s, exchange))
            self._something_ended.set()

    def _fault(self, exchange: Exchange, outcome: Outcome, reason: str) -> None:
        exchange.fault = (outcome, reason)
        exchange.finished_s = self._clock()

    def _timeout_reason(self, exchange: Exchange) -> str:
        came = "nothing came" if exchange.status is None else "the answer was not complete"
        return f"{came} within {self._target.timeout_s:g} s"

    # --- recording -------------------------------------------------------------------------

    async def _record_ended(self) -> None:
        """Read and record what ended, in slices short enough not to delay a time stamp."""
        pieces_read = 0
        while True:
            while self._ended:
                request, intended_s, exchange = self._ended.popleft()
                reader = StreamReader(speculative=self._target.speculative)
                times_s, pieces = exchange.times_s, exchange.pieces
                for i in range(0, len(pieces), _SLICE_PIECES):
                    reader.feed_all(times_s[i : i + _SLICE_PIECES], pieces[i : i + _SLICE_PIECES])
                    pieces_read += min(_SLICE_PIECES, len(pieces) - i)
                    if pieces_read >= _SLICE_PIECES:
                        pieces_read = 0
                        await asyncio.sleep(0)
                self._keep(request, intended_s, exchange, reader.finish(exchange.finished_s))
                pieces_read += _SLICE_PIECES // 4
            if self._all_sent:
                return
            self._something_ended.clear()
            await self._something_ended.wait()

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
        outcome, error = _outcome(exchange, response)
        if error is not None:
            error = _presentable(error, self._target.headers, request.body)
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

    async def _watch(self, sender: asyncio.Task[None]) -> None:
        """Measure how late a timer runs, and ask now and then whether to stop."""
        alarm = _Alarm()
        ticks = 0
        try:
            while True:
                due_s = self._clock() + _LAG_PERIOD_S
                await alarm.sleep(_LAG_PERIOD_S)
                self._lags.append(max(0.0, self._clock() - due_s))
                ticks += 1
                if ticks % 10 == 0 and not self.interrupted and self._stop():
                    self.interrupted = True
                    sender.cancel()
        finally:
            alarm.close()


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


class _Alarm:
    """Sleeps to the microsecond: event loops round their timers to a millisecond.

    A Linux timerfd, by way of the C library where Python (before 3.13) has no call for it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = _LIBC.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(self._fd, self._fire)

    async def sleep(self, delay_s: float) -> None:
        """Return ``delay_s`` seconds (at least a microsecond) from now."""
        nanoseconds = max(1000, int(delay_s * 1e9))
        setting = struct.pack("@llll", 0, 0, *divmod(nanoseconds, 10**9))
        self._waiter = self._loop.create_future()
        if _LIBC.timerfd_settime(self._fd, 0, setting, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        await self._waiter

    def close(self) -> None:
        """Release the timer."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fire(self) -> None:
        os.read(self._fd, 8)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_LIBC = ctypes.CDLL(None, use_errno=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _outcome(exchange: Exchange, response: StreamedResponse) -> tuple[Outcome, str | None]:
    """How a request ended, and the reason (not yet redacted) if not well."""
    status = exchange.status
    if status is not None and status != 200:
        return Outcome.HTTP_ERROR, f"HTTP {status}: {_http_reason(exchange, status)}"
    stopped = exchange.fault is not None and exchange.fault[0] is not Outcome.CUT
    if response.fault is not None and not stopped:
        return Outcome.STREAM_ERROR, _fault_reason(response.fault)
    if exchange.fault is not None:
        return exchange.fault
    if exchange.until_close and not response.done:
        return Outcome.CUT, "the server closed the connection before the stream was complete"
    if not response.done and (response.finish_reason is None or response.incomplete):
        kind = exchange.headers.get(b"content-type", b"?").decode("latin-1").split(";")[0]
        reason = (
            "the stream ended without a finish reason or [DONE]"
            if response.chunk_s
            else f"the answer ({kind}) is not a stream of completion chunks"
        )
        return Outcome.STREAM_ERROR, reason
    return Outcome.OK, None


def _fault_reason(fault: Fault) -> str:
    if not fault.by_server:
        return fault.message
    return f"the server reported an error in the stream: {fault.message or 'no message'}"


def _http_reason(exchange: Exchange, status: int) -> str:
    if 300 <= status < 400:
        place = exchange.headers.get(b"location", b"?").decode("latin-1").split("?")[0]
        return f"redirect to {place} not followed: give the final address"
    body = b"".join(exchange.pieces[:64])[:65536]
    try:
        message = error_message(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = ""
    return message or body[:200].decode("utf-8", "replace").strip() or "no message"


def _presentable(message: str, headers: Mapping[str, str], request_body: bytes) -> str:
    """A message fit for a study: one line, short, without header values or parts of the prompt."""
    text = " ".join(message.split())[:2000]
    for value in headers.values():
        for secret in (value, *value.split()):
            if len(secret) > 5:
                text = text.replace(secret, "[redacted]")
    sent = " ".join(request_body.decode("utf-8", "replace").replace("\\n", " ").split())
    width = 24
    hidden = [False] * len(text)
    for i in range(len(text) - width + 1):
        if text[i : i + width] in sent:
            hidden[i : i + width] = [True] * width
    shown: list[str] = []
    for character, hide in zip(text, hidden, strict=True):
        if not hide:
            shown.append(character)
        elif not shown or shown[-1] != "[request text]":
            shown.append("[request text]")
    short = "".join(shown)
    return short if len(short) <= 300 else short[:299] + "…"
