"""Reads all plain connections of a run together, with the kernel's own times of arrival.

Linux stamps what arrives on a socket when it arrives (``SO_TIMESTAMPNS``, socket(7)) and hands the
stamp over with the bytes (``recvmsg``). So a read may come late without making a time late: under
many chunks a second, the connections are looked at once a millisecond instead of once a chunk,
which saves the event loop most of its wake-ups, and a client that is held up keeps true times.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable

from specwise.measurement.alarm import Alarm

Clock = Callable[[], float]
_Receive = Callable[[int, int], tuple[bytes, list[tuple[int, int, bytes]], int, object]]
_OnData = Callable[[bytes, float], None]
_OnEnd = Callable[[OSError | None], None]

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; the socket module has no name for it
_TIMESPEC = struct.Struct("@ll")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)
_READ_BYTES = 8192
_READS_A_TURN = 16
_PERIOD_S = 0.001
_WINDOW_S = 0.01
_MANY_PER_S = 3000.0
_SMALL_DOUBT_S = 20e-6


class Receiver:
    """Made and used inside a running event loop; ``clock`` counts seconds at the usual speed.

    A read's time is the kernel's stamp of its last byte. Where there is none, it is when the read
    was made, and the connections are looked at whenever something arrives.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._readers: dict[int, tuple[_Receive, _OnData, _OnEnd]] = {}
        self._alarm = Alarm(self._read)
        self._paced = False
        self._looked_s = self._window_s = clock()
        self._reads = 0
        self._unstamped = 0
        self._offset_s = 0.0
        self._loop.add_reader(self._epoll.fileno(), self._read)

    def add(self, sock: socket.socket, on_data: _OnData, on_end: _OnEnd) -> int:
        """Give ``on_data`` what arrives and when it did, ``on_end`` the end: None or an error.

        Returns what to ``remove`` it by, at its end at the latest. The socket must not block.
        """
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        fd = sock.fileno()
        self._readers[fd] = (sock.recvmsg, on_data, on_end)
        self._epoll.register(fd, select.EPOLLIN)
        return fd

    def remove(self, fd: int) -> None:
        """Read no more from it; to be called before it is closed."""
        if self._readers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # closed already: the kernel has let go of it
                self._epoll.unregister(fd)

    def close(self) -> None:
        """Read nothing more."""
        if not self._paced:
            self._loop.remove_reader(self._epoll.fileno())
        self._alarm.close()
        self._epoll.close()

    def _read(self) -> None:
        """Read from each connection that has something, as many as one turn may take."""
        clock = self._clock
        before_s, now_s = self._looked_s, clock()
        self._looked_s = now_s
        self._compare_clocks(now_s)
        offset_s = self._offset_s
        readers, stamp_of = self._readers, _TIMESPEC.unpack
        events = self._epoll.poll(0, _READS_A_TURN)
        for fd, _ in events:
            reader = readers.get(fd)
            if reader is None:
                continue  # removed in this very turn
            receive, on_data, on_end = reader
            try:
                data, ancillary, _, _ = receive(_READ_BYTES, _ANCILLARY_BYTES)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                on_end(error)
                continue
            if not data:
                on_end(None)
                continue
            if ancillary:
                seconds, nanoseconds = stamp_of(ancillary[0][2])
                at_s = seconds + nanoseconds * 1e-9 + offset_s
                # What had arrived by the last look was read then. This also bounds what a wall
                # clock can do that is set while bytes wait.
                if at_s < before_s:
                    at_s = before_s
                elif at_s > now_s:
                    at_s = min(at_s, clock())
            else:
                self._unstamped += 1
                at_s = clock()
            on_data(data, at_s)
        self._reads += len(events)
        if now_s - self._window_s > _WINDOW_S:
            self._pace(now_s)
        if self._paced and len(events) == _READS_A_TURN:
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._paced:
            self._read()

    def _compare_clocks(self, now_s: float) -> None:
        """Keep the difference between the clock and the wall clock, which the kernel stamps with.

        The longer a comparison took, the less it tells: then it serves only to find the known
        difference wrong, as it is once the wall clock has been set.
        """
        wall_s = time.time()
        doubt_s = self._clock() - now_s
        low_s = now_s - wall_s
        if doubt_s < _SMALL_DOUBT_S or not low_s <= self._offset_s <= low_s + doubt_s:
            self._offset_s = low_s + doubt_s / 2

    def _pace(self, now_s: float) -> None:
        """At the end of a window: look when something arrives, or at fixed times if much does."""
        many = self._reads > _MANY_PER_S * (now_s - self._window_s) and not self._unstamped
        if many and not self._paced:
            self._loop.remove_reader(self._epoll.fileno())
            self._alarm.repeat(_PERIOD_S)
        elif self._paced and not many:
            self._alarm.stop()
            self._loop.add_reader(self._epoll.fileno(), self._read)
        self._paced = many
        self._window_s = now_s
        self._reads = self._unstamped = 0
