"""A round as people read it: a terminal page, or JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from specwise.monitoring.drift import DriftTest, drift_test
from specwise.monitoring.expectations import Expectations
from specwise.monitoring.standing import Health, Level, ReplicaStanding
from specwise.monitoring.windows import Timing

SCHEMA_VERSION = 1
_MARKS = {
    Health.HEALTHY: ("●", "green"),
    Health.WATCH: ("▲", "yellow"),
    Health.UNHEALTHY: ("▼", "red"),
    Health.UNKNOWN: ("○", "dim"),
}
_COLOURS = {Level.NOTE: "dim", Level.WARNING: "yellow", Level.CRITICAL: "red"}


def page(
    standings: Sequence[ReplicaStanding], expected: Expectations | None, *, at_s: float
) -> RenderableType:
    """The newest round: what is expected, a line a replica, and what is to be done."""
    parts: list[RenderableType] = [_heading(standings, expected, at_s)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Replica", overflow="fold", min_width=14)
    table.add_column("Health", no_wrap=True, min_width=11)
    for name in ("Acc.", "Len", "TPOT", "TTFT P99", "KV", "Run", "Wait", "Hits"):
        table.add_column(name, justify="right", no_wrap=True)
    for standing in standings:
        window = standing.window
        mark, colour = _MARKS[standing.health]
        ttft = window.ttft_s
        table.add_row(
            standing.url.removeprefix("http://"),
            Text(f"{mark} {standing.health}", style=colour),
            _share(standing.rate),
            _number(standing.length, "{:.2f}"),
            _milliseconds(None if window.tpot_s is None else window.tpot_s.mean),
            _milliseconds(None if ttft is None else ttft.p99),
            _share(window.kv_use),
            _number(window.running, "{:.0f}"),
            _number(window.waiting, "{:.0f}"),
            _share(window.prefix_hit_rate),
        )
    parts.append(table)
    for standing in standings:
        for seen in standing.observations:
            parts.append(
                Text.assemble(
                    (f"{standing.url.removeprefix('http://')}  ", "bold"),
                    (seen.text, _COLOURS[seen.level]),
                    f" -> {seen.next_step}",
                )
            )
    return Group(*parts)


def _heading(
    standings: Sequence[ReplicaStanding], expected: Expectations | None, at_s: float
) -> RenderableType:
    clock = time.strftime("%H:%M:%S", time.localtime(at_s))
    if expected is None:
        return Text(f"{clock}  no study to compare with (--against STUDY): rules of thumb only")
    stands = [s.verdict_stands for s in standings]
    verdict = f"verdict “{expected.decision}”"
    if False in stands:
        count = stands.count(False)
        text = Text(f"{verdict} no longer holds on {count} of {len(stands)}", style="bold red")
    elif True in stands:
        text = Text(f"{verdict} holds", style="bold green")
    else:
        text = Text(f"{verdict}: nothing can be said yet", style="bold")
    return Group(
        Text.assemble(f"{clock}  ", text),
        Text(
            f"study {expected.study}, {expected.arm}: acceptance {expected.rate:.2f}"
            f", TPOT {expected.tpot_s.mean * 1000:.1f} ms"
            f" ({expected.baseline_tpot_s.mean * 1000:.1f} ms without speculation)"
            f" at {expected.production_load.label}. {_promise(standings, expected)}",
            style="dim",
        ),
    )


def _promise(standings: Sequence[ReplicaStanding], expected: Expectations) -> str:
    """What the drift test can do at the traffic of the busiest replica."""
    test: DriftTest = drift_test(expected)
    traffic = [
        s.window.drafted_tokens / s.window.duration_s
        for s in standings
        if s.window.drafted_tokens and s.window.duration_s
    ]
    if not traffic:
        return ""
    delay_s = test.expected_delay_s(max(traffic))
    return f"A fall below {test.expected - test.drop:.2f} is seen in about {_duration(delay_s)}."


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.0f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def round_to_dict(
    standings: Sequence[ReplicaStanding], expected: Expectations | None, *, at_s: float
) -> dict[str, Any]:
    """The round as JSON-ready values; absent figures are null, times are seconds."""
    return {
        "schema_version": SCHEMA_VERSION,
        "at_s": at_s,
        "against": None
        if expected is None
        else {
            "study": expected.study,
            "arm": expected.arm,
            "decision": expected.decision.value,
            "acceptance_rate": expected.rate,
            "break_even_rate": expected.break_even,
            "tpot_s": expected.tpot_s.mean,
            "baseline_tpot_s": expected.baseline_tpot_s.mean,
        },
        "replicas": [_replica(standing) for standing in standings],
    }


def _replica(standing: ReplicaStanding) -> dict[str, Any]:
    window = standing.window
    return {
        "url": standing.url,
        "health": standing.health.value,
        "verdict_stands": standing.verdict_stands,
        "acceptance_rate": standing.rate,
        "acceptance_length": standing.length,
        "drafted_tokens": standing.drafted_tokens,
        "drift": asdict(standing.drift),
        "observations": [asdict(o) for o in standing.observations],
        "window": {
            "state": window.state.value,
            "at_s": window.at_s,
            "duration_s": window.duration_s,
            "generation": window.generation,
            "acceptance_rate": window.rate,
            "positions": window.positions,
            "ttft_s": _timing(window.ttft_s),
            "tpot_s": _timing(window.tpot_s),
            "output_tokens_per_s": window.output_tokens_per_s,
            "requests": window.requests,
            "running": window.running,
            "waiting": window.waiting,
            "kv_use": window.kv_use,
            "prefix_hit_rate": window.prefix_hit_rate,
            "preemptions": window.preemptions,
        },
    }


def _timing(timing: Timing | None) -> dict[str, Any] | None:
    return None if timing is None else asdict(timing)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
