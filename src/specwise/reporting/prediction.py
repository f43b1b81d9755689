"""A forecast: in the terminal, as JSON and as one self-contained page; "predicted" everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from rich.padding import Padding

from specwise.analysis.comparison import Effect
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import ServingSummary
from specwise.decision.assessment import Assessment
from specwise.prediction.forecast import AtBatch, Candidate, Question, Unknown
from specwise.prediction.speedup import constant_alpha, tokens_per_step
from specwise.reporting import wording
from specwise.reporting.console import console_text, ruled_table
from specwise.reporting.export import whole_file
from specwise.reporting.figures import ArmStyle, arm_styles, panel_title, speedup_chart
from specwise.reporting.html import page_template
from specwise.reporting.json_export import SCHEMA_VERSION, json_types
from specwise.reporting.svg import Chart, draw_chart, panels
from specwise.reporting.wording import MARKS, MISSING, interval, milliseconds, number, ratio

GOODPUT: Final = "requests/s that met the limits"
CAUTION: Final = (
    "Predicted, not measured. Use it to choose what to measure: acceptance is an assumption here "
    "until you measure it."
)
_MANY: Final = 3
EXTRAPOLATED: Final = (
    "Predicted, not measured. Costs and acceptance are the study's own; the further a load or a "
    "draft length lies from what it ran, the less this is worth."
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Everything that `specwise predict` shows."""

    scenario: Question
    assessment: Assessment
    batches: tuple[AtBatch, ...]
    unknowns: tuple[Unknown, ...]
    unknowns_at: float

    @property
    def speedups(self) -> tuple[Effect, ...]:
        """Speedup of every candidate at every load, of each segment inside a mix too."""
        return tuple(e for e in self.assessment.effects if e.metric == "speedup")

    @property
    def rows(self) -> tuple[tuple[ServingSummary, Effect | None], ...]:
        """Every arm at every load, the whole traffic, with its speedup (None: the baseline)."""
        whole = {(e.arm, e.load): e for e in self.speedups if e.segment is None}
        return tuple(
            (found, whole.get((found.arm, load)))
            for load in self.scenario.loads
            for found in self.assessment.summaries
            if found.load == load and found.segment is None
        )


def crossover_words(crossover: Crossover) -> str:
    """``stops paying at 52 [45, 60]``, or that it never does over the loads that were simulated."""
    unit = "concurrent requests" if crossover.loop.value == "closed" else "requests/s"
    low, high = crossover.loads[0], crossover.loads[-1]
    if crossover.load_value is not None:
        ends = tuple(
            "?" if end is None else f"{end:.3g}" for end in (crossover.low, crossover.high)
        )
        return f"stops paying at {crossover.load_value:.3g} [{ends[0]}, {ends[1]}] {unit}"
    if crossover.outcome == "always better":
        return f"pays at every load from {low:g} to {high:g} {unit}"
    if crossover.outcome == "always worse":
        return f"pays at no load from {low:g} to {high:g} {unit}"
    return f"cannot be told from no speculation between {low:g} and {high:g} {unit}"


def equal_acceptance(candidate: Candidate) -> float:
    """What is assumed of ``candidate`` as one acceptance alike at all positions.

    The one that emits as many tokens a step: comparable with the break-even acceptance, which a
    mean over the positions is not (a lookup's first position is low, its later ones high).
    """
    k = candidate.speculation.k
    return constant_alpha(min(tokens_per_step(candidate.acceptance.positions(k)), k + 1.0), k)


def forecast_to_dict(forecast: Forecast) -> dict[str, Any]:
    """The forecast as JSON types; times in seconds."""
    scenario = forecast.scenario
    return {
        "schema_version": SCHEMA_VERSION,
        "predicted": True,
        "target": scenario.name,
        "machine": scenario.machine,
        "notes": scenario.notes,
        "gpu": scenario.gpu.name if scenario.gpu else None,
        "gpus": scenario.gpus,
        "prompt_tokens": scenario.prompt_tokens,
        "output_tokens": scenario.output_tokens,
        "candidates": [
            {
                "name": c.name,
                "method": c.speculation.method,
                "k": c.speculation.k,
                "draft": c.draft.name if c.draft else None,
                "acceptance": c.acceptance.positions(c.speculation.k),
                "equal_acceptance": equal_acceptance(c),
                "drafted_share": c.acceptance.drafted_share,
                "acceptance_from": c.acceptance.source,
            }
            for c in scenario.candidates
        ],
        "speedups": json_types(forecast.speedups),
        "crossovers": json_types([c for c in forecast.assessment.crossovers if c.segment is None]),
        "serving": json_types(forecast.assessment.summaries),
        "by_batch": [asdict(row) for row in forecast.batches],
        "sensitivity": [
            asdict(u) | {"swing": u.swing, "decides": u.decides} for u in forecast.unknowns
        ],
    }


def print_forecast(forecast: Forecast, console: Console | None = None) -> None:
    """Print speedups by load, crossovers, and what moves the answer most."""
    out = console or Console()
    scenario = forecast.scenario

    def line(words: str, style: str = "", indent: int = 0) -> None:
        text = console_text(out, words, style)
        out.print(Padding(text, (0, 0, 0, indent), expand=False), highlight=False)

    line(f"PREDICTED   {scenario.name} on {scenario.machine}", "bold yellow")
    line(f"{scenario.prompt_tokens} prompt and {scenario.output_tokens} output tokens on average")
    for candidate in scenario.candidates:
        given = ", ".join(
            f"{a:.2f}" for a in candidate.acceptance.positions(candidate.speculation.k)
        )
        line(f"{candidate.name}: acceptance {given} ({candidate.acceptance.source})", "dim")
    out.print()
    table = ruled_table(out)
    table.add_column("Load", no_wrap=True)
    table.add_column("Arm", no_wrap=True)
    names = ["Speedup", "TPOT P50", "P99", "TTFT P50", "P99", "Out tok/s", *_goodput(scenario)]
    longest = max(len(found.arm) for found, _ in forecast.rows)
    shown = list(range(len(names)))
    if out.width < longest + 66 + 9 * len(_goodput(scenario)):
        shown = [place for place in shown if names[place] != "P99"]
    for place in shown:
        table.add_column(names[place], justify="right", no_wrap=True)
    for found, effect in forecast.rows:
        figures = [MISSING if effect is None else _marked(effect), *_figures(scenario, found)]
        cells = [found.load.label, found.arm, *(figures[place] for place in shown)]
        table.add_row(*(console_text(out, cell) for cell in cells))
    out.print(table)
    line("TPOT and TTFT in ms" + (f"; Good/s: {GOODPUT}" if _goodput(scenario) else ""), "dim")
    for crossover in forecast.assessment.crossovers:
        if crossover.segment is None:
            line(f"{crossover.arm} {crossover_words(crossover)}.", "bold")
    out.print()
    line(f"At {forecast.unknowns_at:g} running requests the answer hangs on:")
    for unknown in forecast.unknowns[:4]:
        decides = "  <- decides the sign" if unknown.decides else ""
        line(
            f"{unknown.candidate}, {unknown.name}: {unknown.low} {ratio(unknown.speedup_low)}, "
            f"{unknown.high} {ratio(unknown.speedup_high)}{decides}",
            indent=2,
        )
    out.print()
    for note in scenario.notes:
        line(note, "dim")
    line(_caution(scenario), "yellow")


def _caution(scenario: Question) -> str:
    return EXTRAPOLATED if scenario.notes else CAUTION


def _acceptance_is(scenario: Question) -> str:
    return "measured" if scenario.notes else "assumed"


def _marked(effect: Effect) -> str:
    return f"{MARKS[effect.direction]} {ratio(effect.ratio)}"


def _goodput(scenario: Question) -> tuple[str, ...]:
    """The column of goodput, where a limit says what is good."""
    slo = scenario.slo
    limited = (slo.ttft_s, slo.tpot_s, slo.e2e_s) != (None, None, None)
    return ("Good/s",) if limited else ()


def _limits(scenario: Question) -> str:
    limits = {"TTFT": scenario.slo.ttft_s, "TPOT": scenario.slo.tpot_s, "E2E": scenario.slo.e2e_s}
    return ", ".join(f"{n} at most {milliseconds(s)} ms" for n, s in limits.items() if s)


def _figures(scenario: Question, summary: ServingSummary) -> list[str]:
    cells = []
    for timing in (summary.tpot_s, summary.ttft_s):
        cells += [
            MISSING if timing is None else milliseconds(timing.p50),
            MISSING if timing is None else milliseconds(timing.p99),
        ]
    rate = summary.output_tokens_per_s
    cells.append(MISSING if rate is None else number(rate))
    if _goodput(scenario):
        good = summary.goodput_per_s
        cells.append(MISSING if good is None else number(good))
    return cells


# ---------------------------------------------------------------------------------------------
# Page


def write_forecast(forecast: Forecast, path: Path) -> None:
    """Write the page to ``path``; StoreError when it cannot be written."""
    page = render_forecast(forecast)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_forecast(forecast: Forecast) -> str:
    """The page as text: speedup against load, break-even and best k, what is not known."""
    assessment, scenario = forecast.assessment, forecast.scenario
    styles = arm_styles(assessment.study.design.arms)
    production = scenario.production
    here = [e for e in forecast.speedups if e.load == production and e.segment is None]
    headline = "; ".join(f"{e.arm} {ratio(e.ratio)}" for e in here)
    if len(here) > _MANY:
        best = max(here, key=lambda e: e.ratio)
        headline = f"{best.arm} {ratio(best.ratio)}, the best of {len(here)},"
    return page_template("prediction.html").render(
        w=wording,
        scenario=scenario,
        caution=_caution(scenario),
        headline=f"{headline} at {wording.load_phrase(production)}"
        + ("" if scenario.notes else ", if acceptance is as assumed"),
        crossovers=[
            f"{c.arm} {crossover_words(c)}" for c in assessment.crossovers if c.segment is None
        ],
        speedup=speedup_chart(
            forecast.speedups, assessment.crossovers, styles, production, predicted=True
        ),
        break_even=_break_even_chart(forecast, styles),
        arms=assessment.study.design.arms,
        styles=styles,
        goodput=bool(_goodput(scenario)),
        limits=_limits(scenario),
        equal_acceptance=equal_acceptance,
        rows=[(found.load, found, e, _figures(scenario, found)) for found, e in forecast.rows],
        batches=forecast.batches,
        unknowns=forecast.unknowns,
        unknowns_at=forecast.unknowns_at,
        interval=interval,
        marked=_marked,
        costs=_cost_notes(scenario),
        acceptance_is=_acceptance_is(scenario),
    )


def _cost_notes(scenario: Question) -> list[str]:
    if scenario.notes:
        return list(scenario.notes)
    price = scenario.baseline_costs()
    notes = [f"Step costs: {type(price).__name__}."]
    for name in ("efficiency", "overheads"):
        constants = getattr(price, name, None)
        if constants is not None:
            given = asdict(constants)
            source = given.pop("source")
            notes.append(
                f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in given.items()) + f" ({source})"
            )
    return notes


def _break_even_chart(forecast: Forecast, styles: Mapping[str, ArmStyle]) -> Chart | None:
    """Break-even acceptance against running requests, beside what is assumed or was measured.

    Where no acceptance suffices the line ends: a point at 100 % would read as one that does.
    """
    names = [c.name for c in forecast.scenario.candidates]
    rows = {name: [b for b in forecast.batches if b.candidate == name] for name in names}

    def draw(width: int) -> Figure:
        figure, axes = panels(
            len(names), width=width, columns=min(3, max(2, len(names))), height=150
        )
        for axis, candidate in zip(axes, forecast.scenario.candidates, strict=True):
            held, style = rows[candidate.name], styles[candidate.name]
            needed = [math.nan if b.break_even is None else b.break_even for b in held]
            axis.plot(
                [b.batch for b in held],
                needed,
                color=style.colour,
                marker=style.marker,
                markersize=6,
            )
            axis.axhline(
                equal_acceptance(candidate),
                color=style.colour,
                linestyle=(0, (3, 3)),
                linewidth=1.5,
            )
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(_spaced([b.batch for b in held])))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
            axis.set_ylim(-0.03, 1.03)
            axis.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
            axis.set_yticklabels(["0 %", "50 %", "100 %"])
            axis.set_xlabel("running requests")
            panel_title(axis, candidate.name)
        return figure

    summary = "; ".join(
        f"{b.candidate} at {b.batch}: "
        + ("out of reach" if b.break_even is None else wording.percent(b.break_even))
        for b in forecast.batches
    )
    title = f"Acceptance that is needed, and (dashed) {_acceptance_is(forecast.scenario)}"
    return draw_chart("breakeven", title, summary, draw, predicted=True)


def _spaced(values: Sequence[int]) -> list[int]:
    """Every second tick where there are many."""
    step = max(1, (len(values) + 4) // 5)
    return list(values[::step])
