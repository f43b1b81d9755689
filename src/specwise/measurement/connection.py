"""HTTP/1.1 connections that time-stamp what arrives: an asyncio protocol and a keep-alive pool.

Nothing is interpreted here beyond HTTP's own framing: the pieces of a body are kept as they came,
each with the time of the socket read that brought it, so that reading the stream can wait until
it costs no one else's time stamp.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import struct
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from specwise.domain import Outcome
from specwise.errors import InputError

Clock = Callable[[], float]

# uvicorn, which serves vLLM, closes a connection after 5 s without a request: stay clear of that.
_MAX_IDLE_S = 3.0
_MAX_BODY_BYTES = 256 * 2**20
_CONNECT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a base URL points: scheme, host, port, and the path in front of every request's."""

    tls: bool
    host: str
    port: int
    prefix: str

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_origin(url: str) -> Origin:
    """The origin of a base URL; InputError if it is not http(s) or carries credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            "The server's URL is not one of the form http://host:port or https://host.",
            "Give the base URL that vLLM listens on, for example http://127.0.0.1:8000.",
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"The URL of {parts.hostname} carries a user name, password, query or fragment.",
            "Give the bare base URL; name the environment variable of an API key with api_key_env.",
        )
    tls = parts.scheme == "https"
    return Origin(tls, parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"))


def request_head(origin: Origin, path: str, headers: Mapping[str, str]) -> bytes:
    """The head of a POST of JSON up to the value of Content-Length; InputError for a bad header."""
    fields = {
        "Host": origin.authority,
        "User-Agent": "specwise",
        "Accept": "text/event-stream, application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    for name, value in headers.items():
        if not name or not name.isascii() or any(c in name for c in "\r\n\0: "):
            raise InputError(f"{name!r} cannot be the name of an HTTP header.", "Correct it.")
        if any(c in value for c in "\r\n\0") or not value.isascii():
            raise InputError(
                f"The value of the HTTP header {name} holds a line break or a non-ASCII character.",
                "Check the environment variable or file that it comes from.",
            )
        fields[name] = value.strip()
    lines = [f"POST {origin.prefix}{path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return ("\r\n".join([*lines, "Content-Length: "])).encode("ascii")


@dataclass(slots=True, eq=False)
class Exchange:
    """One request's way over the wire: when it was sent, and what came back, as it came.

    ``pieces[i]`` of the (decoded) body arrived at ``times_s[i]`` on the clock. ``complete`` says
    that the HTTP message ended as its framing promised; ``fault`` why it did not. ``unreached``
    says that the connection proved closed before the server's machine took in a byte.
    """

    sent_s: float | None = None
    finished_s: float = 0.0
    status: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    complete: bool = False
    until_close: bool = False
    unreached: bool = False
    fault: tuple[Outcome, str] | None = None


class Connection(asyncio.Protocol):
    """One connection that carries one request at a time."""

    def __init__(self, clock: Clock, sock: socket.socket) -> None:
        self._clock = clock
        self._socket = sock
        self._poller = select.poll()
        self._poller.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
        self._transport: Any = None
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None
        self._decoder: Any = None
        self._now = 0.0
        self._body_bytes = 0
        self._keep_alive = True
        self._framed = False
        self._acked_before = -1
        self._served = 0
        self.idle_since_s = clock()

    # --- use -------------------------------------------------------------------------------

    async def perform(self, exchange: Exchange, request: bytes) -> None:
        """Send ``request`` and wait until ``exchange`` holds the answer or the reason for none."""
        loop = asyncio.get_running_loop()
        self._exchange = exchange
        self._ended = ended = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._decoder = None
        self._framed = False
        self._body_bytes = 0
        self._acked_before = self._acknowledged_bytes() if self._served else -1
        try:
            exchange.sent_s = self._clock()
            if self._transport.is_closing():
                self.connection_lost(None)
            else:
                self._transport.write(request)
            await ended
        finally:
            if not ended.done() or ended.cancelled():
                self._exchange = None
                self.abort()

    @property
    def kept_alive(self) -> bool:
        """Whether the last answer left it open, and nothing has closed it since."""
        return self._keep_alive and self._exchange is None and not self._transport.is_closing()

    def reusable(self, now_s: float) -> bool:
        """Whether another request may go out on it: alive as far as this machine can know."""
        if not self.kept_alive:
            return False
        if self._served and now_s - self.idle_since_s > _MAX_IDLE_S:
            return False
        # The event loop may not have looked since the server closed: ask the kernel.
        return not self._poller.poll(0)

    def abort(self) -> None:
        """Close at once."""
        self._keep_alive = False
        self._transport.abort()

    # --- asyncio ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with each read."""
        self._now = self._clock()
        if self._exchange is None:
            # Nothing was asked: this peer is out of step.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(Outcome.STREAM_ERROR, "the server switched to another protocol")
        except httptools.HttpParserError:
            self._fail(Outcome.STREAM_ERROR, "the answer is not valid HTTP/1.1")

    def eof_received(self) -> bool:
        """Called by the event loop when the server will send no more; the transport closes."""
        self._now = self._clock()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop when the connection is gone."""
        self._keep_alive = False
        exchange = self._exchange
        if exchange is None:
            return
        self._now = self._clock()
        if exchange.until_close and exc is None:
            exchange.complete = True
            self._end()
            return
        if exchange.status is not None:
            where = "before the answer was complete"
        elif self._acked_before < 0:
            where = "before any answer"
        else:
            # Closed while idle, with our bytes still under way: they were never taken in.
            exchange.unreached = self._acknowledged_bytes() == self._acked_before
            where = "before any answer, on a connection kept alive from the request before"
        self._fail(Outcome.CUT, f"the server closed the connection {where}")

    # --- httptools -------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if self._exchange is None:
            return
        name = name.lower()
        self._exchange.headers[name] = value
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        exchange = self._exchange
        if exchange is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            exchange.headers.clear()
            return
        exchange.status = status
        exchange.until_close = not self._framed
        encoding = exchange.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding in (b"gzip", b"x-gzip", b"deflate"):
            # 47: zlib or gzip, told by the header.
            self._decoder = zlib.decompressobj(47)
        elif encoding not in (b"identity", b""):
            name = encoding.decode("ascii", "replace")[:20]
            self._fail(
                Outcome.STREAM_ERROR,
                f"the answer is compressed with {name!r} although none was asked for",
            )

    def on_body(self, data: bytes) -> None:
        """Called by the parser with each piece of the body."""
        exchange = self._exchange
        if exchange is None:
            self._keep_alive = False
            return
        if self._decoder is not None:
            try:
                data = self._decoder.decompress(data, _MAX_BODY_BYTES)
            except zlib.error:
                self._fail(Outcome.STREAM_ERROR, "the compressed answer is corrupt")
                return
        self._body_bytes += len(data)
        if self._body_bytes > _MAX_BODY_BYTES:
            self._fail(Outcome.STREAM_ERROR, "the answer exceeds 256 MiB")
            return
        exchange.times_s.append(self._now)
        exchange.pieces.append(data)

    def on_message_complete(self) -> None:
        """Called by the parser at the end of an answer, interim (1xx) ones included."""
        exchange = self._exchange
        if exchange is None:
            self._keep_alive = False
            return
        if exchange.status is None:
            return
        exchange.complete = True
        exchange.until_close = False
        self._keep_alive = self._keep_alive and self._parser.should_keep_alive()
        self._end()

    # --- ends ------------------------------------------------------------------------------

    def _fail(self, outcome: Outcome, reason: str) -> None:
        if self._exchange is None:
            return
        self._exchange.fault = (outcome, reason)
        self._end()
        self.abort()

    def _end(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.finished_s = self._now
        self._served += 1
        self.idle_since_s = self._now
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _acknowledged_bytes(self) -> int:
        """Bytes that the peer's kernel has taken in on this connection; -1 if it cannot be told.

        ``tcpi_bytes_acked`` of ``struct tcp_info`` (linux/tcp.h), offset 120.
        """
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            return int(struct.unpack_from("=Q", info, 120)[0])
        except (OSError, struct.error):
            return -1


class ConnectionPool:
    """Connections to one origin: the idle one used last goes out first, fresh ones on demand.

    With ``spare`` > 0 that many idle ones are kept ready, so that a request that is due need not
    wait for a handshake.
    """

    def __init__(self, origin: Origin, *, verify_tls: bool, clock: Clock, spare: int = 0) -> None:
        self._origin = origin
        self._clock = clock
        self._spare = spare
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._openers: set[asyncio.Task[None]] = set()
        self._addresses: list[tuple[int, Any]] = []
        self._tls: ssl.SSLContext | None = None
        if origin.tls:
            self._tls = ssl.create_default_context()
            if not verify_tls:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE

    async def warm_up(self, count: int) -> None:
        """Open ``count`` connections; failures are left for the requests to meet and record."""
        await asyncio.gather(*(self._open_spare() for _ in range(count)))

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """A connection that is alive as far as this machine can know; OSError if none opens."""
        now_s = self._clock()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.reusable(now_s):
                break
            self.discard(connection)
        else:
            connection = await self._open()
        missing = self._spare - len(self._idle) - len(self._openers)
        for _ in range(missing):
            task = asyncio.get_running_loop().create_task(self._open_spare())
            self._openers.add(task)
            task.add_done_callback(self._openers.discard)
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back; it is kept if the server keeps it."""
        if connection.kept_alive:
            self._idle.append(connection)
        else:
            self.discard(connection)

    def discard(self, connection: Connection) -> None:
        """Close a connection and forget it."""
        self._all.discard(connection)
        connection.abort()

    async def close(self) -> None:
        """Close all of them."""
        for task in tuple(self._openers):
            task.cancel()
        await asyncio.gather(*self._openers, return_exceptions=True)
        for connection in tuple(self._all):
            self.discard(connection)
        self._idle.clear()
        # Transports close in the event loop's next iterations.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _open_spare(self) -> None:
        with contextlib.suppress(OSError):
            self._idle.append(await self._open())

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        origin = self._origin
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                if not self._addresses:
                    found = await loop.getaddrinfo(
                        origin.host, origin.port, type=socket.SOCK_STREAM
                    )
                    self._addresses = [(family, address) for family, _, _, _, address in found]
                sock = await self._connect()
                try:
                    _, connection = await loop.create_connection(
                        lambda: Connection(self._clock, sock),
                        sock=sock,
                        ssl=self._tls,
                        server_hostname=origin.host if self._tls else None,
                    )
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise TimeoutError(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        self._all.add(connection)
        return connection

    async def _connect(self) -> socket.socket:
        """A connected socket: the address that worked last is tried first."""
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        for family_address in tuple(self._addresses):
            family, address = family_address
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
                continue
            except BaseException:
                sock.close()
                raise
            if family_address != self._addresses[0]:
                self._addresses.remove(family_address)
                self._addresses.insert(0, family_address)
            return sock
        raise failure or OSError("the host name has no address")
