"""The page of an experiment in the report: its answer, its figures, its tables.

Wording and tables are those of `experiment_sheets`; this module adds the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specwise.analysis.comparison import Effect
from specwise.analysis.crossover import Crossover
from specwise.analysis.experiment import Experiment
from specwise.analysis.ladder import Ladder
from specwise.analysis.mixture import Mixture
from specwise.analysis.temperature import (
    OFF_BELOW,
    WIN_ABOVE,
    TemperatureLine,
    TemperatureSweep,
)
from specwise.domain import LoadPoint
from specwise.reporting.experiment_sheets import (
    Sheet,
    findings_of,
    ladder_sheets,
    published_shape,
    published_words,
    share_words,
    temperature_sheet,
)
from specwise.reporting.figures import (
    ArmStyle,
    effect_marker,
    panel_title,
    ratio_columns,
    ratio_range,
    row_chart,
    speedup_panel,
)
from specwise.reporting.svg import NARROW_PX, Chart, Ink, draw_chart, panels
from specwise.reporting.wording import interval, metric_words, ratio

_LADDER_METRICS = ("ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p95", "tpot_p99")


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart and what its caption says; ``hollow`` adds the key of undecided effects."""

    chart: Chart
    caption: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class ExperimentPage:
    """What the template shows: ``intro`` says what was done, ``folded`` sheets stand closed."""

    title: str
    intro: str
    sentences: tuple[str, ...]
    pictures: tuple[Picture, ...]
    sheets: tuple[Sheet, ...]
    folded: tuple[Sheet, ...]


def experiment_page(
    experiment: Experiment | None,
    styles: Mapping[str, ArmStyle],
    production: LoadPoint,
    *,
    predicted: bool,
) -> ExperimentPage | None:
    """The page of ``experiment``; None for a plain study."""
    if experiment is None:
        return None
    found = findings_of(experiment)
    folded: tuple[Sheet, ...] = ()
    if isinstance(experiment, TemperatureSweep):
        intro = (
            f"The same prompts at every temperature, at {experiment.load.label}; each figure is of "
            "its own window. The rule of thumb: below 0.5 off, 0.5 to 0.65 break-even, above 0.65 "
            "likely a win. It never outranks the measured speedup beside it."
        )
        charts = [temperature_chart(experiment, styles, predicted=predicted)]
        captions = [
            "Accepted over drafted tokens with 95 % intervals over prompts. Dotted vertical: "
            "production's temperature; dotted horizontal: 0.5 and 0.65. Grey dashes: a published "
            f"shape ({published_words()}) of another model, for calibration only."
        ]
        folded = (temperature_sheet(experiment),)
    elif isinstance(experiment, Ladder):
        intro = (
            f"{experiment.workload} load by load, each against the baseline on the same prompts. A "
            "load that was begun is finished, so that stopping early shifts no figure."
        )
        charts = [ladder_chart(experiment, styles, production, predicted=predicted)]
        captions = [
            "Baseline / arm for each percentile, with 95 % intervals: above 1x the arm answers "
            "sooner, the shaded side is later. The dotted line is the production load, a cross "
            "where the arm stops being better."
        ]
        folded = ladder_sheets(experiment)
    else:
        intro = (
            f"{experiment.workload} at {experiment.load.label}, and each of its segments alone at "
            "the same load. Harm that shrinks alone comes from the mix; harm that stays comes from "
            "speculation itself."
        )
        charts = [
            mixture_chart(experiment, metric, styles, predicted=predicted)
            for metric in ("speedup", "tpot_p95", "tpot_p99")
        ]
        captions = [
            "Speedup with 95 % interval: all requests of the mix, then each segment in the mix and "
            "alone at the same load.",
            "The same for the TPOT P95, baseline / arm: above 1x the tail is shorter.",
            "The same for the TPOT P99. It takes 100 requests of a segment to have an interval.",
        ]
    pictures = tuple(
        Picture(chart, caption, hollow=not isinstance(experiment, TemperatureSweep))
        for chart, caption in zip(charts, captions, strict=True)
        if chart is not None
    )
    return ExperimentPage(found.title, intro, found.sentences, pictures, found.sheets, folded)


def temperature_chart(
    experiment: TemperatureSweep, styles: Mapping[str, ArmStyle], *, predicted: bool
) -> Chart | None:
    """Acceptance against temperature, a panel for each segment; None without any line."""
    segments = list(dict.fromkeys(line.segment for line in experiment.lines))
    if not segments:
        return None
    hottest = max(p.temperature for line in experiment.lines for p in line.points)

    def draw(width: int) -> Figure:
        columns = 1 if width == NARROW_PX else max(2, min(len(segments), 4))
        figure, axes = panels(len(segments), width=width, columns=columns, height=190)
        for axis, segment in zip(axes, segments, strict=True):
            own = [line for line in experiment.lines if line.segment == segment]
            _temperature_panel(axis, own, styles, hottest)
            panel_title(axis, segment)
        return figure

    summary = "; ".join(
        f"{line.segment}, {line.arm}: "
        + ", ".join(f"T={p.temperature:g} {share_words(p.rate)}" for p in line.points)
        for line in experiment.lines
    )
    return draw_chart(
        "temperature", "Acceptance by temperature", summary, draw, predicted=predicted
    )


def _temperature_panel(
    axis: Axes, lines: Sequence[TemperatureLine], styles: Mapping[str, ArmStyle], hottest: float
) -> None:
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axis.set_yticklabels(["0", "0.25", "0.5", "0.75", "1"])
    axis.set_xlim(-0.07, max(hottest, 1.0) + 0.07)
    axis.xaxis.set_major_locator(FixedLocator([0, 0.5, 1] + ([hottest] if hottest > 1.2 else [])))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels(["0", "0.5", "1"] + ([f"{hottest:g}"] if hottest > 1.2 else []))
    axis.set_xlabel("temperature")
    for level in (OFF_BELOW, WIN_ABOVE):
        axis.axhline(level, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
    own = next((line.at_production for line in lines if line.at_production), None)
    if own is not None:
        axis.axvline(own.temperature, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
    axis.plot(*zip(*published_shape(), strict=True), color=Ink.MUTED, linewidth=1.2, linestyle="--")
    for place, line in enumerate(lines):
        style = styles[line.arm]
        shift = 0.012 * (place - (len(lines) - 1) / 2)  # intervals of two arms stay apart
        xs = [p.temperature + shift for p in line.points]
        axis.plot(
            xs, [p.rate.value for p in line.points], color=style.colour, linestyle=style.dashes,
            marker=style.marker, markersize=6, zorder=3,
        )  # fmt: skip
        bounded = [(x, p.rate) for x, p in zip(xs, line.points, strict=True)]
        bounded = [(x, rate) for x, rate in bounded if math.isfinite(rate.low)]
        axis.vlines(
            [x for x, _ in bounded],
            [rate.low for _, rate in bounded],
            [rate.high for _, rate in bounded],
            color=style.colour,
            linewidth=1.6,
        )


def gain_of(effect: Effect) -> Effect:
    """The effect turned so that above 1 is good: baseline / arm for a metric that should be low."""
    if effect.better == "higher" or not effect.ratio > 0:
        return effect
    return replace(
        effect,
        ratio=1 / effect.ratio,
        low=1 / effect.high,
        high=1 / effect.low,
        better="higher",
    )


def ladder_chart(
    ladder: Ladder, styles: Mapping[str, ArmStyle], production: LoadPoint, *, predicted: bool
) -> Chart | None:
    """Gain of TTFT and TPOT at P50, P95 and P99 against load; None without any effect."""
    gains = {
        metric: [
            gain_of(e)
            for rung in ladder.rungs
            for e in rung.effects
            if e.metric == metric and math.isfinite(e.ratio)
        ]
        for metric in _LADDER_METRICS
    }
    shown = {metric: held for metric, held in gains.items() if held}
    if not shown:
        return None
    limits = ratio_range([e for held in shown.values() for e in held])

    def draw(width: int) -> Figure:
        columns = 1 if width == NARROW_PX else 3
        figure, axes = panels(len(shown), width=width, columns=columns, height=150)
        for axis, (metric, held) in zip(axes, shown.items(), strict=True):
            speedup_panel(
                axis,
                effects=held,
                crossovers=_crosses(ladder.crossovers.get(metric, ())),
                styles=styles,
                production=production,
                limits=limits,
            )
            panel_title(axis, metric_words(metric))
        return figure

    summary = "; ".join(
        f"{metric_words(metric)}, {e.arm} at {e.load.label}: {ratio(e.ratio)} "
        f"{interval(e.low, e.high)}"
        for metric, held in shown.items()
        for e in held
    )
    title = "TTFT and TPOT against the baseline, load by load"
    return draw_chart("ladder", title, summary, draw, predicted=predicted)


def _crosses(crossovers: Sequence[Crossover]) -> list[Crossover]:
    return [c for c in crossovers if c.outcome == "crosses"]


def mixture_chart(
    mixture: Mixture, metric: str, styles: Mapping[str, ArmStyle], *, predicted: bool
) -> Chart | None:
    """``metric`` of each segment in the mix and alone, turned so that above 1 is good."""
    rows: list[tuple[str, Effect]] = []
    if metric == "speedup":
        rows += [("All of the mix", v.speedup) for v in mixture.aggregates if v.speedup is not None]
    for d in mixture.diagnoses:
        if d.metric == metric:
            rows.append((f"{d.segment} in the mix", gain_of(d.in_mix)))
            if d.alone is not None:
                rows.append((f"{d.segment} alone", gain_of(d.alone)))
    rows = [(name, e) for name, e in rows if math.isfinite(e.ratio)]
    if not rows:
        return None
    names = list(dict.fromkeys(name for name, _ in rows))
    effects = [e for _, e in rows]
    low, high = ratio_range(effects)

    def marks(axis: Axes, y_of: Callable[[int, str], float]) -> None:
        ratio_columns(axis, (low, high), "baseline / arm, above 1x is better")
        for name, effect in rows:
            style, y = styles[effect.arm], y_of(names.index(name), effect.arm)
            if math.isfinite(effect.low):
                axis.hlines(y, effect.low, effect.high, color=style.colour, linewidth=2)
            effect_marker(axis, effect.ratio, y, effect, style)

    def draw(width: int) -> Figure:
        arms = [arm for arm in styles if any(e.arm == arm for e in effects)]
        return row_chart(names, width=width, arms=arms, marks=marks)

    summary = "; ".join(
        f"{name}, {e.arm}: {ratio(e.ratio)} {interval(e.low, e.high)}" for name, e in rows
    )
    title = "Speedup" if metric == "speedup" else metric_words(metric)
    return draw_chart(
        f"mixture-{metric.replace('_', '-')}",
        f"{title} in the mix and alone at {mixture.load.label}",
        summary,
        draw,
        predicted=predicted,
    )
