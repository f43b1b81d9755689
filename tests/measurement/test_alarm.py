from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median

from specwise.measurement.alarm import Alarm


def times_of_calls(work: Callable[[Alarm], None], for_s: float) -> list[float]:
    """When, from the start, an alarm that ``work`` was done with has called back."""
    called_s: list[float] = []

    async def run() -> None:
        alarm = Alarm(lambda: called_s.append(time.perf_counter() - begun_s))
        begun_s = time.perf_counter()
        work(alarm)
        await asyncio.sleep(for_s)
        alarm.close()

    asyncio.run(run())
    return called_s


def test_it_calls_once_and_on_time() -> None:
    late_s = []
    for _ in range(10):
        (called_s,) = times_of_calls(lambda alarm: alarm.set(0.0034), 0.02)
        late_s.append(called_s - 0.0034)
    assert min(late_s) >= 0
    assert median(late_s) < 0.002


def test_no_time_to_wait_is_soon() -> None:
    assert len(times_of_calls(lambda alarm: alarm.set(0.0), 0.02)) == 1


def test_setting_it_anew_replaces_what_was_set() -> None:
    def set_twice(alarm: Alarm) -> None:
        alarm.set(0.001)
        alarm.set(0.02)

    (called_s,) = times_of_calls(set_twice, 0.05)
    assert called_s >= 0.02


def test_it_repeats_until_it_is_stopped() -> None:
    called_s = times_of_calls(lambda alarm: alarm.repeat(0.005), 0.1)
    assert 3 <= len(called_s) <= 20
    assert called_s[0] >= 0.005

    def stop_at_once(alarm: Alarm) -> None:
        alarm.repeat(0.005)
        time.sleep(0.01)  # it is due already, but the loop has not looked
        alarm.stop()

    assert times_of_calls(stop_at_once, 0.03) == []
