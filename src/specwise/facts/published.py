"""Other people's measurements (``data/published.toml``), with their conditions.

They calibrate prediction and stand beside a user's own figures, labelled as published; nothing here
is evidence about another system, and no verdict rests on it (architecture rule 7).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """Where a published figure stands and what it was measured on."""

    title: str
    reference: str
    engine: str
    hardware: str
    metric: str


@dataclass(frozen=True, slots=True)
class PublishedWorkload:
    """A public data set as it was sent: mean prompt and output tokens of a request."""

    name: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class PublishedAcceptance:
    """Tokens per verify step with ``k`` drafts, greedy.

    ``length`` is over all steps together; ``request_mean_length`` the mean over requests of each
    one's own length, which is what a mean of requests' throughputs follows. ``conditional`` are
    a_1 to a_k over all steps, empty where only the length is known.
    """

    source: Source
    target: str
    method: str
    k: int
    workload: str
    length: float
    request_mean_length: float
    conditional: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PublishedTrace:
    """The requests behind a `PublishedAcceptance`, in groups of like length and output tokens.

    One entry a group in each tuple: how many ``requests``, their mean prompt and output tokens,
    their own ``length``, and the share of steps in which there was a draft to verify (1 but for
    lookups).
    """

    source: Source
    target: str
    method: str
    k: int
    workload: str
    requests: tuple[int, ...]
    prompt_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    length: tuple[float, ...]
    drafted_share: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PublishedFinding:
    """A single published figure or row: ``quantity`` at each value of ``by``."""

    source: Source
    target: str
    method: str
    quantity: str
    by: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class PublishedSpeedups:
    """Speculative / baseline throughput by load; ``load`` is "batch" or "qps".

    From latencies (``qps``) it is baseline / speculative mean end-to-end latency.
    """

    source: Source
    target: str
    method: str
    draft: str | None
    k: int
    workload: str
    load: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class KSweep:
    """Length and TPOT by draft length at batch 1, beside the TPOT without speculation."""

    source: Source
    target: str
    method: str
    workload: PublishedWorkload
    baseline_tpot_s: float
    points: tuple[tuple[int, float, float], ...]  # k, length, TPOT in seconds


@dataclass(frozen=True, slots=True)
class TemperatureShape:
    """Acceptance rate by temperature as the article expects it: a shape, not a promise."""

    source: Source
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Published:
    """Everything in the table."""

    workloads: Mapping[str, PublishedWorkload]
    acceptance: tuple[PublishedAcceptance, ...]
    traces: tuple[PublishedTrace, ...]
    findings: tuple[PublishedFinding, ...]
    speedups: tuple[PublishedSpeedups, ...]
    k_sweep: KSweep
    temperature_shape: TemperatureShape


@functools.cache
def published() -> Published:
    """The table, read once."""
    text = resources.files("specwise.facts").joinpath("data/published.toml").read_text()
    table = tomllib.loads(text)
    sources = {name: Source(**entry) for name, entry in table["source"].items()}
    workloads = {
        name: PublishedWorkload(name, **entry) for name, entry in table["workload"].items()
    }
    acceptance = tuple(
        PublishedAcceptance(
            **entry | {"source": sources[entry["source"]]} | _tuples(entry, "conditional")
        )
        for entry in table["acceptance"]
    )
    traces = tuple(
        PublishedTrace(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
            | {"source": sources[entry["source"]]}
            | {"drafted_share": tuple(entry.get("drafted_share", [1.0] * len(entry["length"])))}
        )
        for entry in table["trace"]
    )
    findings = tuple(
        PublishedFinding(
            source=sources[entry["source"]],
            target=entry["target"],
            method=entry["method"],
            quantity=entry["quantity"],
            by=entry["by"],
            points=tuple(zip(entry["at"], entry["value"], strict=True)),
        )
        for entry in table["finding"]
    )
    speedups = [
        _speedups(entry, sources, entry["load"], entry["at"], entry["speedup"])
        for entry in table["speedups"]
    ]
    for entry in table["latencies"]:
        times = zip(entry["baseline_s"], entry["speculative_s"], strict=True)
        ratios = [baseline_s / speculative_s for baseline_s, speculative_s in times]
        speedups.append(_speedups(entry, sources, "qps", entry["qps"], ratios))
    sweep = table["k_sweep"]
    shape = table["temperature_shape"]
    return Published(
        workloads=workloads,
        acceptance=acceptance,
        traces=traces,
        findings=findings,
        speedups=tuple(speedups),
        k_sweep=KSweep(
            source=sources[sweep["source"]],
            target=sweep["target"],
            method=sweep["method"],
            workload=PublishedWorkload(
                sweep["workload"], sweep["prompt_tokens"], sweep["output_tokens"]
            ),
            baseline_tpot_s=sweep["baseline_tpot_ms"] / 1000,
            points=tuple(
                (k, length, tpot_ms / 1000)
                for k, length, tpot_ms in zip(
                    sweep["k"], sweep["length"], sweep["tpot_ms"], strict=True
                )
            ),
        ),
        temperature_shape=TemperatureShape(
            sources[shape["source"]],
            tuple(zip(shape["temperatures"], shape["rates"], strict=True)),
        ),
    )


def similar_speedups(method: str) -> tuple[PublishedSpeedups, ...]:
    """What others published for a method, to be shown as calibration beside measured effects."""
    return tuple(series for series in published().speedups if series.method == method)


def _tuples(entry: Mapping[str, Any], *names: str) -> dict[str, tuple[float, ...]]:
    return {name: tuple(entry[name]) for name in names}


def _speedups(
    entry: Mapping[str, Any],
    sources: Mapping[str, Source],
    load: str,
    at: list[float],
    speedups: list[float],
) -> PublishedSpeedups:
    return PublishedSpeedups(
        source=sources[entry["source"]],
        target=entry["target"],
        method=entry["method"],
        draft=entry.get("draft"),
        k=entry["k"],
        workload=entry["workload"],
        load=load,
        points=tuple(zip(at, speedups, strict=True)),
    )
