from __future__ import annotations

from dataclasses import replace

import pytest

from specwise.analysis.server_figures import NOT_MEASURED, server_figures
from specwise.domain import ClientHealth, GaugeSample, GpuSeries, TrialPart

BARE = TrialPart("2026-01-01T00:00:00Z", 1.0, ClientHealth(0, 0, 0, 0))
COUNTED = replace(
    BARE,
    counters={
        "prefix_cache_queries": 200.0,
        "prefix_cache_hits": 50.0,
        "preemptions": 2.0,
        "queue_s": 3.0,
        "queued_requests": 4.0,
    },
    gauges=(
        GaugeSample(1, 2, 0, 0.25),
        GaugeSample(2, 4, 3, 0.75),
        GaugeSample(3, None, None, None),
    ),
)


def gpu(index: int, used: tuple[int | None, ...], busy: tuple[float | None, ...]) -> GpuSeries:
    at_s = tuple(float(i) for i in range(len(used)))
    return GpuSeries(index, f"gpu{index}", 100, at_s, used, busy)


def test_counters_add_up_over_parts_and_gauges_pool() -> None:
    quiet = replace(
        COUNTED,
        counters={"prefix_cache_queries": 200.0, "prefix_cache_hits": 150.0, "preemptions": 0.0},
        gauges=(GaugeSample(1, 0, 0, 0.2),),
    )
    found = server_figures((COUNTED, quiet))
    assert found.prefix_hit_rate == 0.5
    assert found.preemptions == 2
    assert found.queue_mean_s == 0.75
    assert (found.kv_use_max, found.kv_use_mean) == (0.75, pytest.approx(0.4))
    assert (found.running_mean, found.waiting_max, found.waiting_mean) == (2, 3, 1)


def test_a_restart_voids_the_counters_not_the_gauges() -> None:
    found = server_figures((replace(COUNTED, counters_reset=True),))
    assert (found.preemptions, found.prefix_hit_rate, found.queue_mean_s) == (None, None, None)
    assert found.kv_use_max == 0.75


def test_absent_is_not_zero() -> None:
    assert server_figures((BARE,)) == NOT_MEASURED
    assert server_figures(()) == NOT_MEASURED
    idle = replace(BARE, counters={"prefix_cache_queries": 0.0, "prefix_cache_hits": 0.0})
    assert server_figures((idle,)).prefix_hit_rate is None, "0 of 0 is no rate"


def test_each_gpu_over_all_parts() -> None:
    first = replace(BARE, gpus=(gpu(1, (50, 70), (0.5, 1.0)), gpu(0, (None,), (None,))))
    second = replace(BARE, gpus=(gpu(1, (60,), (0.0,)),), gpu_note="")
    nothing = replace(BARE, gpu_note="the trial was over before the first sample")
    silent, busy = server_figures((first, second, nothing)).gpus
    assert (busy.index, busy.memory_used_max_bytes, busy.utilisation_mean) == (1, 70, 0.5)
    assert busy.samples == 3
    assert (silent.memory_used_max_bytes, silent.utilisation_mean) == (None, None)
    assert server_figures((first, nothing)).gpu_note == ""


def test_why_there_is_no_gpu() -> None:
    found = server_figures((BARE, replace(BARE, gpu_note="no NVIDIA driver")))
    assert (found.gpus, found.gpu_note) == ((), "no NVIDIA driver")
