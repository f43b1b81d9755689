"""A Grafana dashboard over the recorded figures, with the study's own figures as lines (req H2).

The JSON is Grafana's dashboard model, schema version 39 (Grafana 10 and later); it asks for a
Prometheus data source when it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specwise.monitoring.alerts import check_selector
from specwise.monitoring.expectations import Expectations
from specwise.monitoring.promql import Figure, per_position, plain_figures, tap_figures

_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(expected: Expectations, *, selector: str = "", tap: bool = False) -> dict[str, Any]:
    """The dashboard as Grafana's JSON model; queries the series that `alert_rules` records.

    Raises InputError for a selector that PromQL would not read.
    """
    selector = check_selector(selector)
    panels = [*_panels(expected, plain_figures(selector))]
    panels.append(
        _timeseries(
            "Acceptance by draft position",
            [(per_position(selector), "{{instance}} position {{position}}")],
            "percentunit",
            "Share of verify steps that accepted the draft at this position.",
        )
    )
    if tap:
        panels += _panels(expected, tap_figures(""))
    for number, panel in enumerate(panels):
        column, row = number * _WIDTH % _COLUMNS, number * _WIDTH // _COLUMNS
        panel["id"] = number + 1
        panel["gridPos"] = {"x": column, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
    return {
        "title": f"Speculation: {expected.study}",
        "description": (
            f"Made by specwise from study {expected.study}, arm {expected.arm}, measured at "
            f"{expected.production_load.label}. Needs the recording rules of `specwise alerts`."
        ),
        "schemaVersion": 39,
        "tags": ["vllm", "specwise"],
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "type": "datasource",
                    "query": "prometheus",
                    "label": "Prometheus",
                }
            ]
        },
        "panels": panels,
    }


def _panels(expected: Expectations, figures: Sequence[Figure]) -> Iterator[dict[str, Any]]:
    for figure in figures:
        lines = _lines(expected, figure.record)
        measured = "; ".join(f"{label} {value:.4g}" for label, value in lines)
        legend = {
            "specwise:tap": "{{segment}}{{temperature}}",
        }.get(figure.record[:12], "{{instance}}")
        queries = [(figure.record, legend)]
        queries += [(f"vector({value:.6g})", label) for label, value in lines]
        yield _timeseries(
            figure.title, queries, figure.unit, f"Measured: {measured}." * bool(lines)
        )


def _lines(expected: Expectations, record: str) -> list[tuple[str, float]]:
    """The study's own figures that belong beside a recorded series."""
    name = record.split(":")[1]
    if name == "acceptance_rate":
        return [("study", expected.rate), ("unhealthy below", expected.low_rate)]
    if name == "acceptance_length":
        return [("study", expected.length)]
    if name == "tpot_s":
        return [
            ("study", expected.tpot_s.mean),
            ("study, no speculation", expected.baseline_tpot_s.mean),
        ]
    if name == "ttft_s":
        return [
            ("study", expected.ttft_s.mean),
            ("study, no speculation", expected.baseline_ttft_s.mean),
        ]
    if name == "running" and expected.crossover_running is not None:
        return [("crossover", expected.crossover_running)]
    return []


def _timeseries(
    title: str, queries: Sequence[tuple[str, str]], unit: str, description: str
) -> dict[str, Any]:
    custom = {"drawStyle": "line", "lineWidth": 1, "showPoints": "never", "spanNulls": False}
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "expr": expression,
                "legendFormat": legend,
                "datasource": _SOURCE,
            }
            for number, (expression, legend) in enumerate(queries)
        ],
    }
