"""The server's own condition beside the latencies: KV cache, queue, preemptions, GPUs (req: G4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from specwise.domain import GpuSeries, TrialPart


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """One GPU of the server's machine; a figure that no sample gives is None.

    Memory is what all processes on the GPU hold, utilisation the mean share of time in which a
    kernel ran. vLLM takes its share of the memory at the start: memory tells what is left to
    others, KV use how much of what vLLM took is needed.
    """

    index: int
    name: str
    memory_total_bytes: int | None
    memory_used_max_bytes: int | None
    utilisation_mean: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """Counters and gauges over some trial parts; None where the server does not export them.

    Shares are 0 to 1. ``queue_mean_s`` is the mean time that a request waited in the server before
    its prefill, ``running`` and ``waiting`` count requests. Gauges are sampled once a second, so a
    peak between two samples is missed. ``gpu_note`` says why there are no ``gpus``.
    """

    prefix_hit_rate: float | None = None
    preemptions: float | None = None
    queue_mean_s: float | None = None
    kv_use_max: float | None = None
    kv_use_mean: float | None = None
    running_mean: float | None = None
    waiting_max: float | None = None
    waiting_mean: float | None = None
    gpus: tuple[GpuFigures, ...] = ()
    gpu_note: str = ""


NOT_MEASURED = ServerFigures()


def server_figures(parts: Iterable[TrialPart]) -> ServerFigures:
    """The figures over ``parts``. Parts in which the server restarted lend their gauges only."""
    held = list(parts)
    queries, hits = _counter(held, "prefix_cache_queries"), _counter(held, "prefix_cache_hits")
    queued, queue_s = _counter(held, "queued_requests"), _counter(held, "queue_s")
    by_index: dict[int, list[GpuSeries]] = defaultdict(list)
    for part in held:
        for series in part.gpus:
            by_index[series.index].append(series)
    return ServerFigures(
        prefix_hit_rate=hits / queries if queries and hits is not None else None,
        preemptions=_counter(held, "preemptions"),
        queue_mean_s=queue_s / queued if queued and queue_s is not None else None,
        kv_use_max=_gauge(held, "kv_use", max),
        kv_use_mean=_gauge(held, "kv_use", fmean),
        running_mean=_gauge(held, "running", fmean),
        waiting_max=_gauge(held, "waiting", max),
        waiting_mean=_gauge(held, "waiting", fmean),
        gpus=tuple(_gpu(by_index[index]) for index in sorted(by_index)),
        gpu_note="" if by_index else next((p.gpu_note for p in held if p.gpu_note), ""),
    )


def _counter(parts: Iterable[TrialPart], name: str) -> float | None:
    values = [p.counters[name] for p in parts if not p.counters_reset and name in p.counters]
    return sum(values) if values else None


def _gauge(
    parts: Iterable[TrialPart], name: str, combine: Callable[[list[float]], float]
) -> float | None:
    samples = (getattr(sample, name) for part in parts for sample in part.gauges)
    values = [value for value in samples if value is not None]
    return combine(values) if values else None


def _gpu(held: Sequence[GpuSeries]) -> GpuFigures:
    used = [value for series in held for value in series.memory_used_bytes if value is not None]
    busy = [value for series in held for value in series.utilisation if value is not None]
    return GpuFigures(
        index=held[0].index,
        name=held[0].name,
        memory_total_bytes=held[0].memory_total_bytes,
        memory_used_max_bytes=max(used, default=None),
        utilisation_mean=fmean(busy) if busy else None,
        samples=sum(len(series.at_s) for series in held),
    )
