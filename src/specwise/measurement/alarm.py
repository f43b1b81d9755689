"""A timer for the event loop that keeps time to the microsecond: loops round theirs to 1 ms."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from collections.abc import Callable

_SETTING = struct.Struct("@llll")
_LIBC = ctypes.CDLL(None, use_errno=True)


class Alarm:
    """Calls ``on_time``, once or again and again; made and used inside a running event loop.

    A Linux timerfd, by way of the C library where Python (before 3.13) has no call for it.
    """

    def __init__(self, on_time: Callable[[], None]) -> None:
        self._on_time = on_time
        self._loop = asyncio.get_running_loop()
        self._fd = _LIBC.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._loop.add_reader(self._fd, self._fire)

    def set(self, delay_s: float) -> None:
        """Call back ``delay_s`` seconds (at least a microsecond) from now, once."""
        self._set(max(1000, int(delay_s * 1e9)), 0)

    def repeat(self, period_s: float) -> None:
        """Call back every ``period_s`` seconds until ``stop``."""
        period_ns = max(1000, int(period_s * 1e9))
        self._set(period_ns, period_ns)

    def stop(self) -> None:
        """Do not call back."""
        self._set(0, 0)

    def close(self) -> None:
        """Release the timer."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _set(self, delay_ns: int, period_ns: int) -> None:
        setting = _SETTING.pack(*divmod(period_ns, 10**9), *divmod(delay_ns, 10**9))
        if _LIBC.timerfd_settime(self._fd, 0, setting, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # stopped or set anew since it was due
        self._on_time()
