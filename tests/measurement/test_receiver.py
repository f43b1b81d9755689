from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from statistics import median

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from specwise.measurement import receiver as receiver_module
from specwise.measurement.receiver import Receiver


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection; the second does not block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours.setblocking(False)
    return theirs, ours


class Taker:
    """Keeps what a receiver gives it."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.times_s: list[float] = []
        self.ends: list[OSError | None] = []

    def take(self, data: bytes, at_s: float) -> None:
        self.data.append(data)
        self.times_s.append(at_s)

    def add_to(self, receiver: Receiver, sock: socket.socket) -> None:
        fd = receiver.add(sock, self.take, lambda error: (self.ends.append(error), remove()))

        def remove() -> None:
            receiver.remove(fd)


async def until(true: Callable[[], object]) -> None:
    deadline_s = time.perf_counter() + 5
    while not true():
        assert time.perf_counter() < deadline_s, "it does not come"
        await asyncio.sleep(0.001)


def run(
    work: Callable[[Receiver, socket.socket, Taker], Awaitable[None]],
    clock: Callable[[], float] = time.perf_counter,
) -> Taker:
    """Do ``work`` with a receiver, the far end of a connection that it reads, and its taker."""
    theirs, ours = connected()
    taker = Taker()

    async def in_loop() -> None:
        receiver = Receiver(clock)
        taker.add_to(receiver, ours)
        await work(receiver, theirs, taker)
        receiver.close()

    with theirs, ours, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(in_loop())
    return taker


def test_a_late_look_does_not_make_a_time_late() -> None:
    late_s = []

    async def work(_receiver: Receiver, theirs: socket.socket, taker: Taker) -> None:
        await asyncio.sleep(0.01)
        for i in range(9):
            sent_s = time.perf_counter()
            theirs.send(b"chunk")
            time.sleep(0.02)  # the event loop cannot look
            await until(lambda count=i: len(taker.data) > count)
            late_s.append(taker.times_s[-1] - sent_s)

    run(work)
    assert min(late_s) > -0.001
    assert median(late_s) < 0.002


def test_a_time_lies_between_the_last_look_and_now_even_if_the_wall_clock_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall_s = time.time
    looked_s: list[float] = []

    async def work(_receiver: Receiver, theirs: socket.socket, taker: Taker) -> None:
        for i, ahead_s in enumerate([0.0, 3600.0, -3600.0, 0.02, 0.0]):
            monkeypatch.setattr(receiver_module.time, "time", lambda by=ahead_s: wall_s() + by)
            looked_s.append(time.perf_counter())
            theirs.send(b"chunk")
            await until(lambda count=i: len(taker.data) > count)

    begun_s = time.perf_counter()
    taker = run(work)
    # The last look before a chunk is the one that read the chunk before.
    earliest_s = [begun_s, *looked_s]
    latest_s = [*looked_s[1:], time.perf_counter()]
    for before_s, at_s, after_s in zip(earliest_s, taker.times_s, latest_s, strict=False):
        assert before_s <= at_s <= after_s


def test_without_stamps_a_time_is_that_of_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "_SO_TIMESTAMPNS", 9999)  # no such option
    before_s = time.perf_counter()

    async def work(receiver: Receiver, theirs: socket.socket, taker: Taker) -> None:
        for i in range(400):  # far more in a second than are read at fixed times
            theirs.send(b"chunk")
            await until(lambda count=i: len(taker.data) > count)
            assert not receiver._paced

    taker = run(work)
    assert taker.times_s == sorted(taker.times_s)
    assert before_s < taker.times_s[0] < taker.times_s[-1] < time.perf_counter()


def test_many_reads_are_made_at_fixed_times_and_few_at_once() -> None:
    paced = []

    async def work(receiver: Receiver, theirs: socket.socket, taker: Taker) -> None:
        over = threading.Event()

        def flood() -> None:
            while not over.is_set():
                theirs.send(b"x" * 50)
                time.sleep(0.0001)

        sender = threading.Thread(target=flood)
        sender.start()
        others = [connected() for _ in range(40)]
        for _, ours in others:
            Taker().add_to(receiver, ours)
        try:
            async with asyncio.timeout(5):
                while not receiver._paced:
                    for far, _ in others:
                        far.send(b"y")
                    await asyncio.sleep(0.002)
            paced.append(len(taker.data))
            await until(lambda: len(taker.data) > paced[0] + 5)
        finally:
            over.set()
            sender.join()
        await until(lambda: not receiver._paced)
        count = len(taker.data)
        theirs.send(b"last")
        await until(lambda: len(taker.data) > count)
        assert taker.data[-1] == b"last"
        for pair in others:
            for sock in pair:
                sock.close()

    run(work)
    assert paced


@given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=12), st.booleans())
@settings(deadline=None, max_examples=25)
def test_every_byte_comes_once_and_in_order_and_then_the_end(
    parts: list[bytes], reset: bool
) -> None:
    async def work(_receiver: Receiver, theirs: socket.socket, taker: Taker) -> None:
        for part in parts:
            theirs.sendall(part)
        await until(lambda: sum(map(len, taker.data)) == sum(map(len, parts)))
        if reset:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        await until(lambda: taker.ends)
        await asyncio.sleep(0.002)

    taker = run(work)
    assert b"".join(taker.data) == b"".join(parts)
    assert taker.times_s == sorted(taker.times_s)
    (end,) = taker.ends
    assert isinstance(end, ConnectionResetError) if reset else end is None


def test_what_is_removed_is_read_no_more_not_even_in_the_same_turn() -> None:
    read: list[str] = []

    async def work(receiver: Receiver, theirs: socket.socket, _taker: Taker) -> None:
        pairs = {name: connected() for name in "ab"}
        fds: dict[str, int] = {}

        def take(name: str) -> None:
            read.append(name)
            for fd in fds.values():
                receiver.remove(fd)

        for name, (_, ours) in pairs.items():
            fds[name] = receiver.add(
                ours, lambda _data, _at_s, name=name: take(name), lambda _error: None
            )
        for far, _ in pairs.values():
            far.send(b"chunk")
        await until(lambda: read)
        theirs.send(b"chunk")
        await asyncio.sleep(0.01)
        for pair in pairs.values():
            for sock in pair:
                sock.close()

    run(work)
    assert len(read) == 1
