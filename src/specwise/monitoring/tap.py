"""A transparent reverse proxy that measures each completion request on its way.

Every client connection has an upstream connection of its own: tap opens it on accepting the client,
so that it stands by the time the first request comes, and they end together. So connection headers,
keep-alive, idle timeouts, half-read answers and upgrades mean what they mean without tap, no
request is ever sent twice, and there is no pool whose connections could go stale. Heads are parsed
and written again as they were; bodies pass on piece by piece, in both directions, as fast as the
slower side takes them. Framing is written anew from what the parser (llhttp, by way of httptools)
understood, so that both sides agree on where a message ends.

Written on asyncio protocols and not on an HTTP framework because a burst is the normal case: an
engine step ends for 200 streams at once, and what each costs adds up in the TTFT of the last.
Within a burst, requests and the first pieces of answers go before the chunks of running streams:
these are passed on when all that has arrived has been looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import httptools

from specwise.domain import Outcome
from specwise.errors import InputError
from specwise.measurement.connection import Origin, parse_origin
from specwise.monitoring.tap_reading import Answer, ReadingQueue
from specwise.monitoring.tap_records import TapRecord
from specwise.monitoring.tap_requests import RequestFacts, Segments, request_facts

_MEASURED = (b"/chat/completions", b"/completions")
_MAX_HEAD_BYTES = 2**20
_MAX_READ_BODY_BYTES = 2**20
_BUFFER_BYTES = 256 * 2**10
_CONNECT_TIMEOUT_S = 20.0
_IDLE_S = 60.0
_LINGER_S = 600.0
_FIRST_PIECES = 4  # of an answer: chat's role chunk and the first output are among them
_SMALL_BYTES = 16 * 2**10
_BAD_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"connection: close\r\n\r\nInvalid HTTP request received."
)
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)
_NO_UPSTREAM_BODY = (
    b'{"error":{"message":"The server behind specwise tap cannot be reached.",'
    b'"type":"upstream_unreachable","param":null,"code":502}}'
)
_NO_UPSTREAM = (
    b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%b" % (len(_NO_UPSTREAM_BODY), _NO_UPSTREAM_BODY)
)

_PIPELINED, _UPLOAD, _CONNECTING = 1, 2, 4  # reasons not to read from the client


@dataclass(frozen=True, slots=True)
class TapSettings:
    """Where tap listens and what it passes to; port 0 asks for any."""

    upstream: Origin
    host: str = "127.0.0.1"
    port: int = 9000


def tap_settings(upstream: str, listen: str) -> TapSettings:
    """Settings from a base URL and HOST:PORT; InputError for either."""
    origin = parse_origin(upstream)
    if origin.prefix:
        raise InputError(
            f"--upstream {upstream} has a path.", "Give http://host:port: paths pass unchanged."
        )
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise InputError(f"{listen!r} is not [HOST:]PORT.", "For example 127.0.0.1:9000.")
    return TapSettings(origin, host.strip("[]") or "127.0.0.1", int(port))


class Tap:
    """The proxy: ``start``, then traffic, then ``stop``; all on one event loop.

    ``on_record`` gets one record for each completion request, soon after its answer has ended.
    """

    def __init__(
        self,
        settings: TapSettings,
        segments: Segments,
        on_record: Callable[[TapRecord], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.segments = segments
        self.clock = clock
        self.wall_clock = wall_clock
        self.reading = ReadingQueue(on_record)
        self.clients: set[_Client] = set()
        self.tls = ssl.create_default_context() if settings.upstream.tls else None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen; InputError if the address cannot be bound."""
        self.loop = asyncio.get_running_loop()
        _make_room_for_connections()
        try:
            self._server = await self.loop.create_server(
                lambda: _Client(self), self.settings.host, self.settings.port, backlog=4096
            )
        except OSError as error:
            raise InputError(
                f"tap cannot listen on {self.settings.host}:{self.settings.port}: {error}.",
                "Give another --listen.",
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweep()

    async def stop(self) -> None:
        """Close everything; requests in flight are recorded as cancelled."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._server is not None:
            self._server.close()
        for client in tuple(self.clients):
            client.abort()
        await asyncio.sleep(0)
        if self._server is not None:
            await self._server.wait_closed()
        await asyncio.sleep(0)
        self.reading.finish()

    def _sweep(self) -> None:
        """Close connections that never send a request, or never take the last of an answer."""
        now_s = self.clock()
        for client in tuple(self.clients):
            allowed_s = _LINGER_S if client.closing else _IDLE_S
            if (client.silent or client.closing) and client.since_s < now_s - allowed_s:
                client.abort()
        self._sweeper = self.loop.call_later(_IDLE_S / 4, self._sweep)


class _Exchange:
    """One request and its answer."""

    __slots__ = (
        "answer",
        "answered",
        "chunked",
        "head",
        "kept",
        "kept_bytes",
        "method",
        "pending",
        "pending_bytes",
        "requested",
        "segment_header",
        "target",
    )

    def __init__(self) -> None:
        self.target = b""
        self.method = b""
        self.head = b""
        self.chunked = False
        self.segment_header: bytes | None = None
        self.pending: list[bytes] = []  # of the body, while it cannot be sent yet
        self.pending_bytes = 0
        self.kept: list[bytes] | None = None  # of the body, to be read when it is whole
        self.kept_bytes = 0
        self.requested = False  # the request is whole
        self.answered = False  # the answer is whole
        self.answer: Answer | None = None


class _Client(asyncio.Protocol):
    """A client's connection: parses requests and passes them on."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.transport: asyncio.Transport
        self.parser: Any = httptools.HttpRequestParser(self)
        self.upstream: _Upstream | None = None
        self.exchanges: deque[_Exchange] = deque()  # the first is being answered
        self.since_s = tap.clock()
        self.silent = True  # no request has begun
        self.tunnel = False
        self.closing = False
        self._connecting: asyncio.Task[None] | None = None
        self._holds = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._in_head = True

    # --- the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        self.tap.clients.add(self)
        self._connecting = self.tap.loop.create_task(self._connect())

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        if self.tunnel:
            self._send(data)
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # From here on both sides may speak another protocol: bytes pass as they are.
            if len(self.exchanges) > 1:
                self._refuse(_BAD_REQUEST)
                return
            self.tunnel = True
            self.exchanges[0].answer = None
            rest = data[upgrade.args[0] :]
            if rest:
                self._send(rest)
        except httptools.HttpParserError:
            self._refuse(_BAD_REQUEST)
            return
        if self._in_head and self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse(_HEAD_TOO_LARGE)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.tap.clients.discard(self)
        self.closing = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self.upstream is not None:
            self.upstream.transport.abort()
        self.end_all(Outcome.CANCELLED)
        self.upstream = self.parser = None  # cycles: memory returns now, not at a collection

    def pause_writing(self) -> None:
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()

    # --- the parser --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.silent = False
        self.exchanges.append(_Exchange())
        self._in_head = True
        self._headers = []
        if len(self.exchanges) > 1:
            self.hold(_PIPELINED)

    def on_url(self, url: bytes) -> None:
        self.exchanges[-1].target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        exchange = self.exchanges[-1]
        exchange.method = self.parser.get_method()
        parts = [
            b"%b %b HTTP/%b\r\n"
            % (exchange.method, exchange.target, self.parser.get_http_version().encode("ascii"))
        ]
        json_body = True
        for name, value in self._headers:
            parts.append(b"%b: %b\r\n" % (name, value))
            lower = name.lower()
            if lower == b"transfer-encoding":
                exchange.chunked = True
            elif lower == b"content-encoding":
                json_body = value.lower() == b"identity"
            if lower == self.tap.segments.header:
                exchange.segment_header = value
        parts.append(b"\r\n")
        exchange.head = b"".join(parts)
        self._headers = []
        if exchange.method == b"POST" and exchange.target.partition(b"?")[0].endswith(_MEASURED):
            exchange.answer = Answer(at=self.tap.wall_clock(), began_s=self.tap.clock())
            exchange.kept = [] if json_body else None
        if len(self.exchanges) == 1:
            self._begin(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self.exchanges[-1]
        if exchange.kept is not None:
            exchange.kept.append(body)
            exchange.kept_bytes += len(body)
            if exchange.kept_bytes > _MAX_READ_BODY_BYTES:
                exchange.kept = None
        self._send_body(exchange, b"%x\r\n%b\r\n" % (len(body), body) if exchange.chunked else body)

    def on_message_complete(self) -> None:
        exchange = self.exchanges[-1]
        if exchange.chunked:
            trailers = b"".join(b"%b: %b\r\n" % header for header in self._headers)
            self._send_body(exchange, b"0\r\n%b\r\n" % trailers)
        exchange.requested = True
        self._in_head = True
        if exchange.answer is not None:
            # Read when it is on its way already: the upstream does not wait for it.
            path = exchange.target.partition(b"?")[0].decode("latin-1")
            kept = exchange.kept
            facts = request_facts(path, b"".join(kept)) if kept else RequestFacts(path)
            exchange.kept = None
            exchange.answer.facts = facts
            exchange.answer.segment = self.tap.segments.name(facts, exchange.segment_header)
        self.end_if_whole(exchange)

    # --- passing on --------------------------------------------------------------------------

    def hold(self, reason: int) -> None:
        """Read nothing from the client until `release`."""
        if not self._holds and not self.transport.is_closing():
            self.transport.pause_reading()
        self._holds |= reason

    def release(self, reason: int) -> None:
        """Read on, unless another reason holds."""
        if self._holds & reason:
            self._holds &= ~reason
            if not self._holds and not self.transport.is_closing():
                self.transport.resume_reading()

    def _begin(self, exchange: _Exchange) -> None:
        upstream = self.upstream
        if upstream is None:
            if self._connecting is None:  # it failed before there was a request: try once more
                self._connecting = self.tap.loop.create_task(self._connect())
            return
        upstream.begin(exchange)
        upstream.transport.write(exchange.head + b"".join(exchange.pending))
        exchange.pending.clear()

    def _send_body(self, exchange: _Exchange, data: bytes) -> None:
        if exchange is self.exchanges[0] and self.upstream is not None:
            self.upstream.transport.write(data)
            return
        exchange.pending.append(data)
        exchange.pending_bytes += len(data)
        if exchange.pending_bytes > _BUFFER_BYTES:
            self.hold(_CONNECTING)

    def _send(self, data: bytes) -> None:
        """Bytes of a connection that was upgraded."""
        if self.upstream is not None:
            self.upstream.transport.write(data)
        elif self.exchanges:
            self.exchanges[0].pending.append(data)

    async def _connect(self) -> None:
        origin = self.tap.settings.upstream
        upstream = _Upstream(self)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self.tap.loop.create_connection(
                    lambda: upstream,
                    origin.host,
                    origin.port,
                    ssl=self.tap.tls,
                    server_hostname=origin.host if self.tap.tls else None,
                )
        except (OSError, TimeoutError):
            upstream.forget()
            if self._has_request:
                self.end_all(Outcome.REFUSED, status=502)
                self._refuse(_NO_UPSTREAM)
            return
        except asyncio.CancelledError:
            upstream.forget()
            raise
        finally:
            self._connecting = None
        if self.closing:
            upstream.transport.abort()
            return
        self.upstream = upstream
        if self._has_request:
            self._begin(self.exchanges[0])
        self.release(_CONNECTING)

    @property
    def _has_request(self) -> bool:
        """Whether the head of the request to be answered next is here."""
        return bool(self.exchanges and self.exchanges[0].head)

    def _refuse(self, answer: bytes) -> None:
        """Answer in the upstream's place and close."""
        self.closing = True
        if self.upstream is not None and self.upstream.exchange is not None:
            self.transport.abort()  # it cannot stand in the middle of another answer
            return
        self.transport.write(answer)
        self.close()

    # --- the end -----------------------------------------------------------------------------

    def end_if_whole(self, exchange: _Exchange) -> None:
        """Go on to the next request once request and answer are both over."""
        if not (exchange.requested and exchange.answered):
            return
        self.end(exchange, Outcome.OK)
        self.exchanges.popleft()
        if self.upstream is not None:
            self.upstream.exchange = None
            if self.upstream.last:
                self.close()
                return
        if len(self.exchanges) <= 1:
            self.release(_PIPELINED)
        if self._has_request:
            self._begin(self.exchanges[0])
            self.release(_CONNECTING)

    def end(self, exchange: _Exchange, outcome: Outcome) -> None:
        """Hand an exchange's answer to the readers, if it is measured."""
        answer = exchange.answer
        if answer is None:
            return
        if answer.facts is None:  # the request did not come whole
            answer.facts = RequestFacts(exchange.target.partition(b"?")[0].decode("latin-1"))
            answer.segment = self.tap.segments.name(answer.facts, exchange.segment_header)
        if outcome is Outcome.OK and answer.status != 200:
            outcome = Outcome.HTTP_ERROR
        self.tap.reading.ended(answer, outcome, self.tap.clock())

    def end_all(self, outcome: Outcome, *, status: int | None = None) -> None:
        """End what is in flight; it did not come to its end."""
        for exchange in self.exchanges:
            if exchange.answer is not None and status is not None:
                exchange.answer.status = status
            self.end(exchange, outcome)
        self.exchanges.clear()

    def close(self) -> None:
        """Close both sides once what is written has gone out."""
        self.closing = True
        self.since_s = self.tap.clock()
        self.transport.close()
        if self.upstream is not None:
            self.upstream.transport.abort()

    def abort(self) -> None:
        """Close both sides at once."""
        self.closing = True
        self.transport.abort()


class _Upstream(asyncio.Protocol):
    """The upstream connection of one client: parses answers and passes them on."""

    def __init__(self, client: _Client) -> None:
        self.client = client
        self.transport: asyncio.Transport
        self.exchange: _Exchange | None = None
        self.last = False  # the connection ends with this answer
        self.parser: Any = httptools.HttpResponseParser(self)
        self._out: list[bytes] = []
        self._body: list[bytes] = []
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._in_head = True
        self._chunked = False
        self._until_close = False
        self._renew = False
        self._passed_pieces = 0  # of an answer that is measured
        self._held: bytes | None = None
        self._held_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_BUFFER_BYTES)

    def forget(self) -> None:
        """Break the cycles of a connection that was given up in the making.

        The event loop does not call `connection_lost` for it, not even after `connection_made`.
        """
        self.parser = None
        self.__dict__.pop("transport", None)

    def begin(self, exchange: _Exchange) -> None:
        """Expect the answer to ``exchange``."""
        self.exchange = exchange
        self._in_head = True
        self._passed_pieces = 0

    def data_received(self, data: bytes) -> None:
        tap = self.client.tap
        if self._held is not None:
            self._pass_held()
        elif self._passed_pieces >= _FIRST_PIECES and len(data) < _SMALL_BYTES:
            # The event loop calls back in order: before the next poll, and before connection_lost.
            self._held, self._held_s = data, tap.clock()
            tap.loop.call_soon(self._pass_held)
            return
        self._pass(data, tap.clock())

    def _pass_held(self) -> None:
        data, self._held = self._held, None
        if data is not None:
            self._pass(data, self._held_s)

    def _pass(self, data: bytes, now_s: float) -> None:
        client = self.client
        if client.closing:
            return
        exchange = self.exchange
        if exchange is None:
            client.close()  # an answer to nothing
            return
        if client.tunnel:
            client.transport.write(data)
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._flush(exchange, now_s)
            if exchange.answered:
                self.last = True  # what follows the answer is not HTTP
            else:
                client.end_all(Outcome.CUT)
                client.close()
                return
        self._flush(exchange, now_s)
        if self._renew:
            self.parser = httptools.HttpResponseParser(self)
            self._renew = False
        if exchange.answered:
            client.end_if_whole(exchange)

    def _flush(self, exchange: _Exchange, at_s: float) -> None:
        out = self._out
        if out:
            self.client.transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()
        answer = exchange.answer
        if answer is not None and self._body:
            self._passed_pieces += len(self._body)
            for piece in self._body:
                answer.passed(at_s, piece)
            self.client.tap.reading.passed(answer)
        self._body.clear()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        client = self.client
        exchange = self.exchange
        self.parser = self.exchange = None
        if client.closing:
            return
        whole = self._until_close and not self._in_head
        if exchange is not None and (whole or exchange.answered):
            client.end(exchange, Outcome.OK)
        # What the upstream left unfinished stays so for the client: it sees the same end.
        client.end_all(Outcome.CUT)
        client.close()

    def pause_writing(self) -> None:
        self.client.hold(_UPLOAD)

    def resume_writing(self) -> None:
        self.client.release(_UPLOAD)

    # --- the parser --------------------------------------------------------------------------

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        version = self.parser.get_http_version().encode("ascii")
        self._out.append(b"HTTP/%b %d %b\r\n" % (version, status, self._reason))
        self._chunked = sized = False
        streamed, plain = False, True
        for name, value in self._headers:
            self._out.append(b"%b: %b\r\n" % (name, value))
            lower = name.lower()
            if lower == b"transfer-encoding":
                self._chunked = value.lower().endswith(b"chunked")
            elif lower == b"content-length":
                sized = True
            elif lower == b"content-type":
                streamed = value.lower().startswith(b"text/event-stream")
            elif lower == b"content-encoding":
                plain = value.lower() == b"identity"
        self._out.append(b"\r\n")
        self._headers = []
        self._reason = b""
        if status < 200 and status != 101:
            return  # the answer proper is still to come
        exchange = self.exchange
        if exchange is None:
            return
        self._in_head = False
        bodiless = exchange.method == b"HEAD" or status in (204, 304)
        self._until_close = not (self._chunked or sized or bodiless or status == 101)
        self.last = self._until_close or not self.parser.should_keep_alive()
        if exchange.answer is not None:
            exchange.answer.status = status
            exchange.answer.streamed = streamed
            exchange.answer.plain = plain
        if exchange.method == b"HEAD":
            # The parser would wait for the body that the length promises.
            exchange.answered = True
            self._renew = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._out.append(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def on_message_complete(self) -> None:
        exchange = self.exchange
        if self._in_head or exchange is None or exchange.answered:
            return  # an interim answer, or one to HEAD
        if self._chunked:
            self._out.append(b"0\r\n")
            self._out += [b"%b: %b\r\n" % header for header in self._headers]
            self._out.append(b"\r\n")
            self._headers = []
        exchange.answered = True


def _make_room_for_connections() -> None:
    """Each request takes two file descriptors: raise the soft limit to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Keep this process punctual: no full collections amid traffic, short turns for threads."""
    interval_s = sys.getswitchinterval()
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)
    sys.setswitchinterval(min(interval_s, 0.0005))
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        gc.set_threshold(*threshold)
        gc.unfreeze()
