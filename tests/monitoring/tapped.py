"""A tap in a thread of the test, and plain sockets that show every byte of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvloop

from specwise.monitoring.tap import Tap, tap_settings
from specwise.monitoring.tap_records import TapRecord
from specwise.monitoring.tap_requests import Segments


class Tapped:
    """A running tap, what it recorded, and its event loop's open tasks."""

    def __init__(self, tap: Tap, loop: asyncio.AbstractEventLoop) -> None:
        self.tap = tap
        self.loop = loop
        self.records: list[TapRecord] = []
        self.errors: list[dict[str, object]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.tap.port}"

    def wait_records(self, count: int) -> list[TapRecord]:
        wait_until(lambda: len(self.records) >= count)
        return self.records

    def tasks(self) -> int:
        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(5)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@contextlib.contextmanager
def tapped(upstream: str, *, header: str | None = "X-Segment") -> Iterator[Tapped]:
    loop = uvloop.new_event_loop()
    records: list[TapRecord] = []
    tap = Tap(tap_settings(upstream, "127.0.0.1:0"), Segments(header=header), records.append)
    running = Tapped(tap, loop)
    running.records = records
    loop.set_exception_handler(lambda _, context: running.errors.append(context))
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        await tap.start()
        ready.set()
        await stop.wait()
        await tap.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield running
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()
    assert running.errors == []


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def exchange(url: str, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """Every byte that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=timeout_s) as sock:
        sock.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(1 << 16):
                received += data
    return received


def body_of(answer: bytes) -> bytes:
    """An answer's body without its framing, as far as it came."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    if not re.search(rb"(?i)transfer-encoding: *chunked", head):
        return rest
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        body += rest[:length]
        rest = rest[length + 2 :]
    return body


def head_of(answer: bytes) -> tuple[bytes, list[bytes]]:
    """Status line and header lines."""
    status, *headers = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return status, headers
