"""specwise's own findings as Prometheus metrics, for those who have an alert manager already."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import start_http_server
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specwise.errors import InputError
from specwise.monitoring.standing import Health, ReplicaStanding
from specwise.monitoring.windows import State


class Exporter(Collector):
    """The newest round as metrics; what a replica does not tell has no sample."""

    def __init__(self) -> None:
        self._standings: Sequence[ReplicaStanding] = ()
        self._lock = threading.Lock()

    def show(self, standings: Sequence[ReplicaStanding]) -> None:
        """Replace what is exported by the findings of a new round."""
        with self._lock:
            self._standings = tuple(standings)

    def collect(self) -> Iterator[Metric]:
        """Metrics of every replica of the newest round."""
        with self._lock:
            standings = self._standings
        gauges = {
            name: GaugeMetricFamily(f"specwise_watch_{name}", text, labels=["replica", *more])
            for name, text, more in (
                ("reachable", "1 where the replica answered with vLLM's metrics.", ()),
                ("acceptance_rate", "Accepted / drafted tokens over the recent windows.", ()),
                ("acceptance_length", "Tokens per verify step over the recent windows.", ()),
                ("health", "1 for the replica's health, 0 for the others.", ("health",)),
                ("drift_alarm", "1 while the drift test says that acceptance fell.", ()),
                ("verdict_stands", "0 where the study's verdict no longer holds.", ()),
                ("observation", "1 for what is worth saying now.", ("code", "level")),
            )
        }
        for standing in standings:
            url = standing.url
            answered = standing.window.state not in (State.UNREACHABLE, State.NOT_VLLM)
            gauges["reachable"].add_metric([url], float(answered))
            if standing.rate is not None:
                gauges["acceptance_rate"].add_metric([url], standing.rate)
            if standing.length is not None:
                gauges["acceptance_length"].add_metric([url], standing.length)
            for health in Health:
                gauges["health"].add_metric([url, health], float(standing.health is health))
            gauges["drift_alarm"].add_metric([url], float(standing.drift.alarm_at_s is not None))
            if standing.verdict_stands is not None:
                gauges["verdict_stands"].add_metric([url], float(standing.verdict_stands))
            for seen in standing.observations:
                gauges["observation"].add_metric([url, seen.code, seen.level], 1.0)
        yield from gauges.values()


@contextmanager
def serving(exporter: Exporter, *, host: str, port: int) -> Iterator[int]:
    """Serve ``exporter`` at http://host:port/metrics meanwhile; gives the port (0 asks for any).

    Raises InputError when the address cannot be bound.
    """
    registry = CollectorRegistry()
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InputError(
            f"The exporter cannot listen on {host}:{port}: {error}.", "Give another --exporter."
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
