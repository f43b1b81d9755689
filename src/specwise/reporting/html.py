"""The report: one self-contained HTML file that answers first and shows its evidence after.

The page has no script and asks for nothing: a content security policy in it says so to the browser.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.cells import TrialTable, cells
from specwise.analysis.comparison import Effect
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import ServingSummary
from specwise.decision.assessment import Assessment
from specwise.decision.conditions import Condition
from specwise.decision.explanation import explain
from specwise.domain import AcceptanceSource, LoadPoint, MeasuredTrial, Outcome, Purpose
from specwise.reporting import wording
from specwise.reporting.experiments import experiment_page
from specwise.reporting.export import whole_file
from specwise.reporting.figures import (
    ArmStyle,
    LatencySample,
    acceptance_chart,
    aggregate_chart,
    arm_styles,
    latency_chart,
    position_chart,
    speedup_chart,
)
from specwise.reporting.json_export import assessment_to_dict
from specwise.reporting.server_section import server_section
from specwise.reporting.svg import Chart
from specwise.reporting.wording import cell_name, milliseconds, number, percent

# metric, label, unit, factor from the stored unit to the shown one
_PRODUCTION_METRICS: Final = (
    ("speedup", "Time per output token", "ms", 1000.0),
    ("ttft_p50", "TTFT P50", "ms", 1000.0),
    ("ttft_p99", "TTFT P99", "ms", 1000.0),
    ("tpot_p50", "TPOT P50", "ms", 1000.0),
    ("tpot_p99", "TPOT P99", "ms", 1000.0),
    ("e2e_p99", "E2E P99", "ms", 1000.0),
    ("output_tokens_per_s", "Output", "tokens/s", 1.0),
    ("goodput_per_s", "Goodput", "requests/s", 1.0),
)


_STATUS_ORDER: Final = ("fail", "unknown", "pass")
_FEW: Final = 4  # sentences that stand unfolded


@dataclass(frozen=True, slots=True)
class Link:
    """A raw-record file: its short name, and its relative URL, None where the file is missing."""

    text: str
    href: str | None
    title: str


def write_report(assessment: Assessment, path: Path) -> None:
    """Write the report of ``assessment`` to ``path``, usually ``report.html`` in the study folder.

    Links to raw records are relative to ``path``. Raises StoreError when it cannot be written.
    """
    page = render_report(assessment, path.parent)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_report(assessment: Assessment, beside: Path) -> str:
    """The report as text, its links relative to the folder ``beside`` in which it will lie."""
    study = assessment.study
    design = study.design
    styles = arm_styles(design.arms)
    load = design.production_load
    links = {m.trial.trial_id: _raw_link(m, Path(study.folder), beside) for m in study.trials}
    shown_acceptance = _acceptance_at(assessment.acceptance, load)
    page = experiment_page(assessment.experiment, styles, load, predicted=study.predicted)
    return page_template("report.html").render(
        w=wording,
        study=study,
        design=design,
        assessment=assessment,
        verdict=assessment.verdict,
        styles=styles,
        candidates=[arm for arm in design.arms if not arm.is_baseline],
        baseline=next((arm for arm in design.arms if arm.is_baseline), None),
        experiment=page,
        deciding=_deciding_effects(assessment),
        production=_production_rows(assessment),
        notes=_production_notes(assessment),
        speedup=speedup_chart(
            [e for e in assessment.effects if e.metric == "speedup"],
            assessment.crossovers,
            styles,
            load,
            predicted=study.predicted,
        ),
        speedup_rows=_speedup_rows(assessment),
        crossovers=[
            (cell_name(c.workload, c.segment), c.arm, _crossover_words(c))
            for c in assessment.crossovers
        ],
        headline_crossovers=[
            (cell_name(c.workload, c.segment), c.arm, _crossover_words(c))
            for c in assessment.crossovers
            if c.workload == design.production_workload
            and c.arm == (assessment.verdict.arm or c.arm)
        ][:_FEW],
        aggregates=_aggregates(assessment, styles),
        latencies=_latency_charts(assessment, styles),
        signatures=[s for s in assessment.signatures if s.present],
        acceptance_chart=acceptance_chart(shown_acceptance, styles, predicted=study.predicted),
        position_chart=position_chart(shown_acceptance, styles, predicted=study.predicted),
        acceptance_rows=shown_acceptance,
        acceptance_estimated=any(
            a.source is AcceptanceSource.CHUNKS for a in assessment.acceptance
        ),
        condition_groups=_condition_groups(assessment, links),
        explanation=explain(assessment) if assessment.effects else None,
        summaries=[s for s in assessment.summaries if s.purpose is Purpose.MEASURE],
        trials=[_trial_row(m, links[m.trial.trial_id]) for m in study.trials],
        planned=len(design.trials) - len(study.skipped),
        provenance=_flat(assessment_to_dict(assessment)["provenance"]),
        setup=_setup_rows(assessment),
        server=server_section(assessment),
    )


@cache
def page_template(name: str) -> Template:
    """A page of `reporting/templates`, with escaping on and no silent gaps."""
    environment = Environment(
        loader=PackageLoader("specwise.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _raw_link(measured: MeasuredTrial, folder: Path, beside: Path) -> Link:
    trial_id = measured.trial.trial_id
    raw = folder / "trials" / trial_id / "requests.jsonl"
    href = quote(os.path.relpath(raw, beside)) if raw.exists() else None
    return Link(trial_id.partition("-")[0], href, trial_id)


def _deciding_effects(assessment: Assessment) -> list[tuple[str, Effect]]:
    """What the verdict rests on, in large print: the whole workload, then its segments.

    All of the arm that the verdict is about, so that the figures can be compared.
    """
    verdict = assessment.verdict
    workload = assessment.study.design.production_workload
    shown = [] if verdict.effect is None else [(f"{workload}, all requests", verdict.effect)]
    inside = [s for s in verdict.segments if s.workload == workload and s.segment != workload]
    for segment in inside or [s for s in verdict.segments if s.segment != workload]:
        effect = next((e for e in segment.effects if e.arm == (verdict.arm or segment.arm)), None)
        if effect is not None and effect != verdict.effect:
            where = "alone" if segment.workload == segment.segment else f"inside {segment.workload}"
            shown.append((f"{segment.segment} {where}", effect))
    return shown


@dataclass(frozen=True, slots=True)
class ProductionRow:
    """One metric at the production cell: the baseline's value and each candidate's effect."""

    label: str
    unit: str
    baseline: str
    effects: tuple[tuple[str, str, Effect | None], ...]  # arm, value, effect


def _production_effects(assessment: Assessment) -> dict[tuple[str, str], Effect]:
    """Effects on the whole production workload at the production load, by metric and arm."""
    design = assessment.study.design
    wanted = (design.production_workload, None, design.production_load)
    return {
        (e.metric, e.arm): e
        for e in assessment.effects
        if (e.workload, e.segment, e.load) == wanted
    }


def _production_notes(assessment: Assessment) -> list[str]:
    """What the effects of the production table say about themselves, each remark once."""
    metrics = [metric for metric, *_ in _PRODUCTION_METRICS]
    notes = [e.note for e in _production_effects(assessment).values() if e.metric in metrics]
    return list(dict.fromkeys(note for note in notes if note))


def _production_rows(assessment: Assessment) -> list[ProductionRow]:
    design = assessment.study.design
    held = _production_effects(assessment)
    candidates = [arm.name for arm in design.arms if not arm.is_baseline]
    rows = []
    for metric, label, unit, factor in _PRODUCTION_METRICS:
        effects = [(arm, held.get((metric, arm))) for arm in candidates]
        first = next((e for _, e in effects if e is not None), None)
        if first is None:
            continue
        rows.append(
            ProductionRow(
                label,
                unit,
                number(first.baseline_value * factor),
                tuple((a, number(e.candidate_value * factor) if e else "", e) for a, e in effects),
            )
        )
    return rows


def _speedup_rows(assessment: Assessment) -> list[tuple[str, LoadPoint, list[Effect | None]]]:
    """One row a cell: its name, its load, and the speedup of every candidate in design order."""
    arms = [arm.name for arm in assessment.study.design.arms if not arm.is_baseline]
    held = {
        (e.workload, e.segment, e.load, e.arm): e
        for e in assessment.effects
        if e.metric == "speedup"
    }
    keys = dict.fromkeys(key[:3] for key in held)
    return [
        (cell_name(w, segment), load, [held.get((w, segment, load, arm)) for arm in arms])
        for w, segment, load in keys
    ]


def _crossover_words(crossing: Crossover) -> str:
    """Where an arm stops paying on a cell, in a phrase."""
    loads = f"{crossing.loads[0]:g} to {crossing.loads[-1]:g}" if crossing.loads else "none"
    if crossing.load_value is None:
        found = {
            "always better": f"faster at every load measured ({loads})",
            "always worse": f"slower at every load measured ({loads})",
        }.get(crossing.outcome, f"undecided over the loads measured ({loads})")
    else:
        first, last = crossing.loads[0], crossing.loads[-1]
        low = f"below {first:g}" if crossing.low is None else f"{crossing.low:.3g}"
        high = f"above {last:g}" if crossing.high is None else f"{crossing.high:.3g}"
        stops = "stops paying" if crossing.outcome == "crosses" else "may stop paying"
        unit = wording.load_axis(crossing.loop)
        found = f"{stops} at about {crossing.load_value:.3g} {unit} [{low}, {high}]"
    return f"{found}; {crossing.note}" if crossing.note else found


@dataclass(frozen=True, slots=True)
class AggregateRow:
    """One line under the aggregate chart: a segment's share, acceptance and effect for one arm."""

    arm: str
    segment: str | None
    share: float
    acceptance: AcceptanceSummary | None
    effect: Effect | None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A mix beside its segments at the load that the verdict is about."""

    workload: str
    load: LoadPoint
    chart: Chart
    rows: tuple[AggregateRow, ...]


def _aggregates(assessment: Assessment, styles: Mapping[str, ArmStyle]) -> list[Aggregate]:
    study = assessment.study
    found: list[Aggregate] = []
    for workload in study.design.workloads:
        speedups = [
            e for e in assessment.effects if e.metric == "speedup" and e.workload == workload.name
        ]
        load = _nearest_load((e.load for e in speedups), study.design.production_load)
        if not workload.is_mix or load is None:
            continue
        speedups = [e for e in speedups if e.load == load]
        chart = aggregate_chart(
            f"aggregate-{len(found)}", speedups, styles, predicted=study.predicted
        )
        if chart is None:
            continue
        accepted = {
            (a.arm, a.segment): a
            for a in assessment.acceptance
            if (a.workload, a.load) == (workload.name, load)
        }
        shares: dict[str | None, float] = {None: 1.0, **dict(workload.shares)}
        rows = tuple(
            AggregateRow(e.arm, e.segment, shares[e.segment], accepted.get((e.arm, e.segment)), e)
            for e in sorted(
                speedups, key=lambda e: (list(styles).index(e.arm), list(shares).index(e.segment))
            )
        )
        found.append(Aggregate(workload.name, load, chart, rows))
    return found


def _nearest_load(loads: Iterable[LoadPoint], wanted: LoadPoint) -> LoadPoint | None:
    """``wanted`` if it was measured, else the highest load of its loop, else the highest."""
    held = sorted(set(loads), key=lambda load: (load == wanted, load.loop is wanted.loop, load))
    return held[-1] if held else None


def _acceptance_at(
    summaries: Sequence[AcceptanceSummary], production: LoadPoint
) -> list[AcceptanceSummary]:
    """The summaries of each workload at the production load, or the nearest one measured."""
    shown = []
    for workload in dict.fromkeys(s.workload for s in summaries):
        own = [s for s in summaries if s.workload == workload]
        load = _nearest_load((s.load for s in own), production)
        shown += [s for s in own if s.load == load]
    return shown


@dataclass(frozen=True, slots=True)
class Latency:
    """TTFT and TPOT of one workload: the chart and the percentiles under it."""

    workload: str
    load: LoadPoint
    chart: Chart
    summaries: tuple[ServingSummary, ...]


def _latency_charts(assessment: Assessment, styles: Mapping[str, ArmStyle]) -> list[Latency]:
    """A chart per workload at the production load or the nearest, its own workload first."""
    study = assessment.study
    design = study.design
    tables = {
        (arm, workload, load): held
        for (arm, workload, load, purpose), held in cells(study).items()
        if purpose is Purpose.MEASURE
    }
    names = [w.name for w in design.workloads]
    names.sort(key=lambda name: name != design.production_workload)
    charts: list[Latency] = []
    for name in names:
        load = _nearest_load((key[2] for key in tables if key[1] == name), design.production_load)
        if load is None:
            continue
        arms = [arm for arm in styles if (arm, name, load) in tables]
        chart = latency_chart(
            f"latency-{len(charts)}",
            f"TTFT and TPOT: {name} at {load.label}",
            {
                "TTFT": [_sample(arm, tables[arm, name, load], "ttft_s") for arm in arms],
                "TPOT": [_sample(arm, tables[arm, name, load], "tpot_s") for arm in arms],
            },
            {"TTFT": design.slo.ttft_s, "TPOT": design.slo.tpot_s},
            styles,
            predicted=study.predicted,
        )
        if chart is not None:
            own = [
                s
                for s in assessment.summaries
                if (s.workload, s.load, s.purpose) == (name, load, Purpose.MEASURE)
            ]
            segments = list(dict.fromkeys([None, *(s.segment for s in own)]))
            own.sort(key=lambda s: segments.index(s.segment))
            charts.append(Latency(name, load, chart, tuple(own)))
    return charts


def _sample(arm: str, tables: Sequence[TrialTable], column: str) -> LatencySample:
    values = np.concatenate([getattr(table, column) for table in tables])
    failed = int(sum((~table.ok).sum() for table in tables))
    return LatencySample(arm, values[np.isfinite(values) & (values > 0)], failed)


@dataclass(frozen=True, slots=True)
class ConditionGroup:
    """Conditions shown together, the failing first; ``title`` is empty for those of the verdict."""

    title: str
    tally: str
    rows: tuple[tuple[Condition, tuple[Link, ...]], ...]


def _condition_groups(assessment: Assessment, links: Mapping[str, Link]) -> list[ConditionGroup]:
    """What the verdict is about first, in one group; then a group for each other scope."""
    arm = assessment.verdict.arm
    workload = assessment.study.design.production_workload
    own = ("", workload, arm, f"{arm}/{workload}")
    grouped: dict[str, list[Condition]] = {}
    for condition in assessment.conditions:
        title = "" if condition.scope in own else condition.scope.replace("/", " › ")
        grouped.setdefault(title, []).append(condition)
    groups = []
    for title in sorted(grouped, key=lambda title: title != ""):
        held = sorted(grouped[title], key=lambda c: _STATUS_ORDER.index(c.status))
        counts = [(s, sum(c.status == s for c in held)) for s in _STATUS_ORDER]
        groups.append(
            ConditionGroup(
                title,
                ", ".join(f"{count} {wording.STATUS_WORDS[s]}" for s, count in counts if count),
                tuple((c, _evidence(c, links)) for c in held),
            )
        )
    return groups


def _evidence(condition: Condition, links: Mapping[str, Link]) -> tuple[Link, ...]:
    return tuple(
        links.get(trial_id, Link(trial_id.partition("-")[0], None, trial_id))
        for trial_id in condition.evidence
    )


def _trial_row(measured: MeasuredTrial, link: Link) -> dict[str, Any]:
    return {
        "trial": measured.trial,
        "link": link,
        "recorded": len(measured.records),
        "failed": sum(r.outcome is not Outcome.OK for r in measured.records),
        "complete": measured.complete,
        "lateness_ms": milliseconds(
            max((part.client.lateness_s_p99 for part in measured.parts), default=None)
        ),
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as (dotted key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            rows += _flat(item, f"{name}.")
        elif isinstance(item, list):
            rows.append((name, " ".join(str(each) for each in item)))
        elif item is not None:
            rows.append((name, str(item)))
    return rows


def _setup_rows(assessment: Assessment) -> list[tuple[str, str]]:
    """What was compared, in words: arms, segments, loads, SLO."""
    design = assessment.study.design
    slo = [
        f"{name} ≤ {milliseconds(limit)} ms"
        for name, limit in (
            ("TTFT", design.slo.ttft_s),
            ("TPOT", design.slo.tpot_s),
            ("E2E", design.slo.e2e_s),
        )
        if limit is not None
    ]
    return [
        *((f"arm {a.name}", wording.speculation_phrase(a.speculation)) for a in design.arms),
        *(
            (f"segment {s.name}", f"temperature {s.temperature:g}, up to {s.max_tokens} tokens")
            for s in design.segments
        ),
        *(
            (
                f"workload {w.name}",
                ", ".join(f"{percent(share)} {name}" for name, share in w.shares),
            )
            for w in design.workloads
        ),
        ("loads", "; ".join(wording.load_phrase(load) for load in design.loads)),
        ("SLO", ", ".join(slo) or "none"),
        ("bound by", {"ttft": "TTFT", "tpot": "TPOT"}.get(design.slo.bound, design.slo.bound)),
        ("seed", str(design.seed)),
    ]
