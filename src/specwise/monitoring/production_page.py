"""What production's records say, as tables for the terminal and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from specwise.analysis.latency import Percentiles
from specwise.monitoring.production import Group, Production


def print_production(production: Production, console: Console | None = None) -> None:
    """Print the answer, the groups and what to measure next."""
    console = console or Console()
    whole = production.groups[0]
    console.print(f"[bold]{production.answer}[/bold]", highlight=False)
    console.print(
        f"{whole.requests:,} requests in {_span(production.span_s)}, {whole.failed} failed, "
        f"{production.requests_per_s:,.4g}/s, {production.in_flight:.3g} in flight; acceptance "
        f"known for {whole.with_acceptance:,}.",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for name in (
        "",
        "requests",
        "rate (95 %)",
        "P10",
        "P50",
        "P90",
        "TTFT p50/p99",
        "TPOT p50/p99",
    ):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    table.add_column("advice", ratio=1)
    for group in production.groups:
        table.add_row(*_row(group))
    console.print(table, highlight=False)
    if production.next_study:
        console.print("Next study (specwise measure):", highlight=False)
        for line in production.next_study:
            console.print(f"  {line}", highlight=False, markup=False)


def _row(group: Group) -> tuple[str, ...]:
    name = group.name if group.kind != "temperature" else f"T {group.name}"
    interval = ""
    if group.rate is not None:
        interval = f"{group.rate:.2f}"
        if group.low is not None and group.high is not None:
            interval += f" ({group.low:.2f}-{group.high:.2f})"
    shares = ("-" if v is None else f"{v:.2f}" for v in (group.p10, group.p50, group.p90))
    return (
        name,
        f"{group.requests:,}",
        interval or "-",
        *shares,
        _times(group.ttft_s),
        _times(group.tpot_s),
        group.advice,
    )


def _times(values: Percentiles | None) -> str:
    return "-" if values is None else f"{_ms(values.p50)}/{_ms(values.p99)} ms"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.02 else f"{seconds * 1e3:,.0f}"


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def production_to_dict(production: Production) -> dict[str, Any]:
    """Everything, in JSON's types."""
    return {"schema": "specwise-production", "version": 1, **asdict(production)}
