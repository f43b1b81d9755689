"""Tap's figures as Prometheus metrics, by segment and temperature bucket (`promql.tap_figures`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from specwise.errors import InputError
from specwise.monitoring.tap_records import TapRecord

_RATE_BUCKETS = tuple(i / 20 for i in range(1, 21))
_TTFT_BUCKETS = tuple(
    0.001 * x for x in (5, 10, 20, 50, 100, 200, 300, 500, 750, 1e3, 2e3, 5e3, 1e4, 3e4, 6e4)
)
_TPOT_BUCKETS = tuple(
    0.001 * x for x in (1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 500, 1e3)
)


class TapMetrics:
    """Counts each record once; ``registry`` is what Prometheus scrapes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by = ("segment", "temperature")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"specwise_tap_{name}", text, (*by, *more), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"specwise_tap_{name}", text, by, buckets=buckets, registry=self.registry
            )

        self._requests = counter("requests", "Completion requests by how they ended.", "outcome")
        self._drafted = counter("draft_tokens", "Draft tokens, as the server told per request.")
        self._accepted = counter("accepted_tokens", "Draft tokens that were accepted.")
        self._steps = counter("verify_steps", "Engine steps that checked drafts.")
        self._rate = histogram(
            "acceptance_rate", "Accepted / drafted tokens of each request.", _RATE_BUCKETS
        )
        self._ttft = histogram(
            "ttft_seconds", "From the request's head to its first output.", _TTFT_BUCKETS
        )
        self._tpot = histogram(
            "tpot_seconds", "Time per output token after the first.", _TPOT_BUCKETS
        )
        # Looking a child up by its labels costs more than counting it.
        self._children = lru_cache(maxsize=None)(self._of_labels)

    def _of_labels(self, segment: str, bucket: str) -> tuple[Any, ...]:
        metrics = (self._drafted, self._accepted, self._steps, self._rate, self._ttft, self._tpot)
        return tuple(metric.labels(segment, bucket) for metric in metrics)

    def count(self, record: TapRecord) -> None:
        """Add one request."""
        self._requests.labels(record.segment, record.bucket, record.outcome.value).inc()
        drafted, accepted, steps, rate, ttft, tpot = self._children(record.segment, record.bucket)
        counts = record.acceptance
        if counts is not None and counts.drafted_tokens is not None:
            drafted.inc(counts.drafted_tokens)
            accepted.inc(counts.accepted_tokens)
            steps.inc(counts.steps)
            if record.rate is not None:
                rate.observe(record.rate)
        if record.ttft_s is not None:
            ttft.observe(record.ttft_s)
        if record.tpot_s is not None:
            tpot.observe(record.tpot_s)


@contextmanager
def serving_metrics(metrics: TapMetrics, *, host: str, port: int) -> Iterator[int]:
    """Serve ``metrics`` at http://host:port/metrics meanwhile; gives the port (0 asks for any).

    Raises InputError when the address cannot be bound.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise InputError(
            f"The metrics cannot be served on {host}:{port}: {error}.",
            "Give another --metrics-listen.",
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
