"""HTTP/1.1 connections that time-stamp what arrives: an asyncio protocol and a keep-alive pool.

A chunk of a stream costs three things when it arrives: a look at the clock, the HTTP parser's pass
over it, and an entry in each of two lists. The parser is a library's, in C, and puts the pieces of
the body straight into their list. Nothing is interpreted here beyond HTTP's own framing: reading
the stream waits until it costs no one else's time stamp.
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
from specwise.measurement.receiver import Clock, Receiver

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
        self._receiver: Receiver | None = None
        self._received_as = -1
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._on_end: Callable[[], None] | None = None
        self._feed: Callable[[bytes], None] = self._refuse
        self._times_s: list[float] = []
        self._pieces: list[bytes] = []
        self._room_bytes = 0
        self._needs_attention = False
        self._decoder: Any = None
        self._decoded = 0
        self._fault: tuple[Outcome, str] | None = None
        self._keep_alive = True
        self._acked_before = -1
        self._served = 0
        self.idle_since_s = clock()

    # --- use -------------------------------------------------------------------------------

    def send(self, exchange: Exchange, request: bytes, on_end: Callable[[], None]) -> None:
        """Send ``request``; call ``on_end`` when ``exchange`` holds the answer or its fault."""
        self._exchange = exchange
        self._on_end = on_end
        self._times_s, self._pieces = exchange.times_s, exchange.pieces
        # The parser looks this up once: body pieces go to their list without a call of ours.
        self.on_body = exchange.pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data
        self._room_bytes = _MAX_BODY_BYTES
        self._needs_attention = False
        self._decoder = None
        self._decoded = 0
        self._fault = None
        self._acked_before = self._acknowledged_bytes() if self._served else -1
        exchange.sent_s = self._clock()
        if self._transport.is_closing():
            self.connection_lost(None)
        else:
            self._write(request)

    def _write(self, request: bytes) -> None:
        taken = 0
        if self._receiver is not None and self._transport.get_write_buffer_size() == 0:
            # At once: the transport writes only at the end of the event loop's turn.
            with contextlib.suppress(OSError):  # which the transport will meet as well
                taken = self._socket.send(request)
        if taken < len(request):
            self._transport.write(request[taken:])

    def read_by(self, receiver: Receiver) -> None:
        """Have what arrives read by ``receiver`` from now on, instead of the event loop."""
        if not self._transport.is_closing():
            self._transport.pause_reading()
            self._receiver = receiver
            self._received_as = receiver.add(self._socket, self.receive, self._closed)

    def give_up(self) -> None:
        """Close at once, and never call ``on_end``."""
        self._exchange = self._on_end = None
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
        self._leave_receiver()
        self._transport.abort()

    def _leave_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.remove(self._received_as)
            self._receiver = None

    # --- asyncio ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with each read."""
        self.receive(data, self._clock())

    def receive(self, data: bytes, at_s: float) -> None:
        """Take the bytes that arrived at ``at_s``."""
        feed = self._feed  # called as an attribute, it would be looked up anew each time
        try:
            feed(data)
        except httptools.HttpParserUpgrade:
            self._fail("the server switched to another protocol")
        except httptools.HttpParserError:
            # Nothing may follow an answer, but what does cannot spoil it.
            self._keep_alive = False
            if self._exchange is not None and not self._exchange.complete:
                self._fail("the answer is not valid HTTP/1.1")
        times_s, pieces = self._times_s, self._pieces
        while len(times_s) < len(pieces):
            times_s.append(at_s)
        self._room_bytes -= len(data)
        if self._needs_attention or self._room_bytes < 0:
            self._attend(at_s)

    def _attend(self, at_s: float) -> None:
        """What few reads need: decoding, and the end of an exchange."""
        exchange = self._exchange
        if exchange is None:
            return
        if self._decoder is not None:
            self._decode(exchange.pieces)
        if self._room_bytes < 0:
            exchange.times_s.clear()
            exchange.pieces.clear()
            self._fail("the answer exceeds 256 MiB")
        if exchange.complete or self._fault is not None:
            self._end(at_s)

    def _decode(self, pieces: list[bytes]) -> None:
        for i in range(self._decoded, len(pieces)):
            compressed, pieces[i] = pieces[i], b""
            try:
                pieces[i] = self._decoder.decompress(compressed, _MAX_BODY_BYTES)
            except zlib.error:
                self._fail("the compressed answer is corrupt")
            self._room_bytes -= len(pieces[i])
        self._decoded = len(pieces)

    def _refuse(self, _data: bytes) -> None:
        """Nothing was asked: this peer is out of step."""
        self.abort()

    def _closed(self, error: OSError | None) -> None:
        """Called by the receiver: the peer sends no more."""
        self.connection_lost(error)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop when the connection is gone."""
        now_s = self._clock()
        self._keep_alive = False
        self._leave_receiver()
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.until_close and exc is None:
            exchange.complete = True
            self._end(now_s)
            return
        if exchange.status is not None:
            where = "before the answer was complete"
        elif self._acked_before < 0:
            where = "before any answer"
        else:
            # Closed while idle, with our bytes still under way: they were never taken in.
            exchange.unreached = self._acknowledged_bytes() == self._acked_before
            where = "before any answer, on a connection kept alive from the request before"
        self._fault = (Outcome.CUT, f"the server closed the connection {where}")
        self._end(now_s)

    # --- httptools -------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        exchange = self._exchange
        if exchange is None or exchange.complete:
            return
        exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        exchange = self._exchange
        if exchange is None or exchange.complete:
            return
        status = self._parser.get_status_code()
        headers = exchange.headers
        if status < 200:
            headers.clear()
            return
        exchange.status = status
        framed = b"transfer-encoding" in headers or b"content-length" in headers
        exchange.until_close = not framed
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding in (b"gzip", b"x-gzip", b"deflate"):
            # 47: zlib or gzip, told by the header.
            self._decoder = zlib.decompressobj(47)
            self._needs_attention = True
        elif encoding not in (b"identity", b""):
            name = encoding.decode("ascii", "replace")[:20]
            self._fail(f"the answer is compressed with {name!r} although none was asked for")

    def on_message_begin(self) -> None:
        """Called by the parser at the start of an answer."""
        if self._exchange is not None and self._exchange.complete:
            # A second answer to one request: this peer is out of step.
            self._keep_alive = False
            raise ValueError("an answer that nothing asked for")

    def on_message_complete(self) -> None:
        """Called by the parser at the end of an answer, interim (1xx) ones included."""
        exchange = self._exchange
        if exchange is None or exchange.status is None or exchange.complete:
            return
        exchange.complete = self._needs_attention = True
        exchange.until_close = False
        self._keep_alive = self._keep_alive and self._parser.should_keep_alive()

    # --- ends ------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self._fault = self._fault or (Outcome.STREAM_ERROR, reason)
        self._needs_attention = True

    def _end(self, at_s: float) -> None:
        exchange, on_end = self._exchange, self._on_end
        self._exchange = self._on_end = None
        self._feed = self._refuse
        self._served += 1
        self.idle_since_s = at_s
        if exchange is None or on_end is None:
            return
        exchange.finished_s = at_s
        if self._fault is not None:
            exchange.fault = self._fault
            self.abort()
        on_end()

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
        self._receiver: Receiver | None = None
        self._tls: ssl.SSLContext | None = None
        if origin.tls:
            self._tls = ssl.create_default_context()
            if not verify_tls:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE

    async def warm_up(self, count: int) -> None:
        """Open ``count`` connections; failures are left for the requests to meet and record."""
        await asyncio.gather(*(self._open_spare() for _ in range(count)))

    def take(self) -> Connection | None:
        """An idle connection that is alive as far as this machine can know, if there is one."""
        now_s = self._clock()
        taken = None
        while self._idle and taken is None:
            connection = self._idle.pop()
            if connection.reusable(now_s):
                taken = connection
            else:
                self.discard(connection)
        if self._spare:
            for _ in range(self._spare - len(self._idle) - len(self._openers)):
                task = asyncio.get_running_loop().create_task(self._open_spare())
                self._openers.add(task)
                task.add_done_callback(self._openers.discard)
        return taken

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
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        # Transports close in the event loop's next iterations.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _open_spare(self) -> None:
        with contextlib.suppress(OSError):
            self._idle.append(await self.open())

    async def open(self) -> Connection:
        """A fresh connection; OSError (TimeoutError included) if none opens."""
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
        if self._tls is None:
            if self._receiver is None:
                self._receiver = Receiver(self._clock)
            connection.read_by(self._receiver)
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
