"""The charts of the report, each made from results alone and each drawn wide and narrow.

An arm keeps its colour, marker and place in every chart (`ArmStyle`). A hollow marker is an effect
whose interval contains 1: undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.comparison import Effect
from specwise.analysis.crossover import Crossover
from specwise.domain import Arm, LoadPoint, Loop
from specwise.reporting.svg import NARROW_PX, WIDE_PX, Chart, Ink, draw_chart, panels
from specwise.reporting.wording import (
    cell_name,
    fitted,
    interval,
    load_axis,
    number,
    percent,
    ratio,
)

_RATIO_TICKS: Final = (  # from fine to coarse
    (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2),
    (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16),
    (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
_CURVE_POINTS: Final = 160
_TAIL_SHARES: Final = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm looks everywhere: stand-in colour, matplotlib marker, dashes, CSS index."""

    index: int
    colour: str
    marker: str
    dashes: str | tuple[int, tuple[float, ...]]


def arm_styles(arms: Sequence[Arm]) -> Mapping[str, ArmStyle]:
    """A style per arm name: the baseline grey, candidates in order; past four, dashes tell more."""
    candidates = [arm for arm in arms if not arm.is_baseline]
    styles = {}
    for arm in arms:
        if arm.is_baseline:
            styles[arm.name] = ArmStyle(0, Ink.ARMS[0], "s", "solid")
            continue
        place = candidates.index(arm)
        cycle, index = divmod(place, len(Ink.ARMS) - 1)
        styles[arm.name] = ArmStyle(
            index + 1,
            Ink.ARMS[index + 1],
            "oD^v"[index],
            "solid" if cycle == 0 else (0, (4.0, 2.0 * cycle)),
        )
    return styles


def speedup_chart(
    effects: Sequence[Effect],
    crossovers: Sequence[Crossover],
    styles: Mapping[str, ArmStyle],
    production: LoadPoint,
    *,
    predicted: bool,
) -> Chart | None:
    """Speedup against load, a panel for each workload and segment; None without any effect.

    ``effects`` are those of the metric "speedup". All panels share one logarithmic axis, so that
    twice as fast and half as fast look equally far from the line at 1.
    """
    cells = _cells(effects)
    if not cells:
        return None
    low, high = ratio_range(effects)

    def draw(width: int) -> Figure:
        columns = 1 if width == NARROW_PX else (3 if len(cells) in (3, 5, 6, 9) else 4)
        figure, axes = panels(
            len(cells), width=width, columns=min(columns, max(2, len(cells))), height=168
        )
        for axis, cell in zip(axes, cells, strict=True):
            own = [e for e in effects if (e.workload, e.segment, e.load.loop) == cell]
            crossing = [c for c in crossovers if (c.workload, c.segment, c.loop) == cell]
            speedup_panel(
                axis,
                effects=own,
                crossovers=crossing,
                styles=styles,
                production=production,
                limits=(low, high),
            )
            panel_title(axis, cell_name(*cell[:2]))
        return figure

    summary = "; ".join(
        f"{cell_name(e.workload, e.segment)}, {e.arm} at {e.load.label}: {ratio(e.ratio)} "
        f"{interval(e.low, e.high)}"
        for e in effects
        if e.load == production or all(other.load != production for other in effects)
    )
    return draw_chart("speedup", "Speedup against load", summary, draw, predicted=predicted)


def panel_title(axis: Axes, name: str) -> None:
    """The name above a panel, shortened to its width."""
    width_px = axis.get_window_extent().width
    axis.set_title(fitted(name, width_px, bold=True), pad=10, fontweight="bold")


def _cells(effects: Iterable[Effect]) -> list[tuple[str, str | None, Loop]]:
    return list(dict.fromkeys((e.workload, e.segment, e.load.loop) for e in effects))


def ratio_range(effects: Iterable[Effect]) -> tuple[float, float]:
    """Axis limits that hold every ratio, and intervals as far as they stay readable."""
    ratios = [e.ratio for e in effects if math.isfinite(e.ratio) and e.ratio > 0] or [1.0]
    lows = [e.low for e in effects if math.isfinite(e.low) and e.low > 0]
    highs = [e.high for e in effects if math.isfinite(e.high) and e.high > 0]
    low = max(min([*lows, *ratios, 0.8]), min(ratios) / 2)
    high = min(max([*highs, *ratios, 1.25]), max(ratios) * 2)
    return low / 1.08, high * 1.08


def speedup_panel(
    axis: Axes,
    *,
    effects: Sequence[Effect],
    crossovers: Sequence[Crossover],
    styles: Mapping[str, ArmStyle],
    production: LoadPoint,
    limits: tuple[float, float],
) -> None:
    """One cell's ratios against load with their intervals; the side that loses is shaded."""
    loads = sorted({e.load.value for e in effects})
    loop = effects[0].load.loop
    ratio_scale(axis, limits)
    axis.axhspan(limits[0], 1, color=Ink.LOSS, linewidth=0, zorder=0)
    axis.axhline(1, color=Ink.MUTED, linewidth=1.2, zorder=1)
    load_scale(axis, loads, loop)
    if production.loop is loop and production.value in loads:
        axis.axvline(production.value, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
    arms = [name for name in styles if any(e.arm == name for e in effects)]
    for place, arm in enumerate(arms):
        style = styles[arm]
        own = sorted((e for e in effects if e.arm == arm), key=lambda e: e.load)
        # a few pixels apart, so that intervals of two arms at one load stay apart
        shift = sideways(loads, place, len(arms))
        xs = [e.load.value * shift for e in own]
        axis.plot(xs, [e.ratio for e in own], color=style.colour, linestyle=style.dashes, zorder=3)
        axis.vlines(
            xs, [e.low for e in own], [e.high for e in own], color=style.colour, linewidth=1.6
        )
        for x, effect in zip(xs, own, strict=True):
            effect_marker(axis, x, effect.ratio, effect, style)
        for crossing in (c for c in crossovers if c.arm == arm):
            if crossing.outcome == "crosses" and crossing.load_value is not None:
                axis.plot(
                    [crossing.load_value], [1], marker="x", color=style.colour, markersize=8,
                    markeredgewidth=2, zorder=5,
                )  # fmt: skip


def effect_marker(axis: Axes, x: float, y: float, effect: Effect, style: ArmStyle) -> None:
    """An arm's mark, hollow where the effect is undecided."""
    axis.plot(
        [x],
        [y],
        marker=style.marker,
        markersize=7,
        color=style.colour,
        markerfacecolor=Ink.PAPER if effect.direction == "undecided" else style.colour,
        markeredgewidth=1.8,
        linestyle="none",
        zorder=4,
    )


def sideways(loads: Sequence[float], place: int, count: int) -> float:
    """A factor that moves arm ``place`` of ``count`` sideways on the logarithmic load axis."""
    span = max(loads) / min(loads) if len(loads) > 1 else 4.0
    return float(span ** (0.018 * (place - (count - 1) / 2)))


def ratio_scale(axis: Axes, limits: tuple[float, float]) -> None:
    """A vertical logarithmic axis of ratios."""
    axis.set_yscale("log")
    axis.set_ylim(*limits)
    ticks = ratio_ticks(*limits)
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_yticklabels([f"{t:g}x" for t in ticks])


def ratio_columns(axis: Axes, limits: tuple[float, float], label: str) -> None:
    """A horizontal logarithmic axis of ratios; the losing side of 1 is shaded."""
    low, high = limits
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = ratio_ticks(low, high)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{t:g}x" for t in ticks])
    axis.set_xlabel(label)
    axis.axvspan(low, 1, color=Ink.LOSS, linewidth=0, zorder=0)
    axis.axvline(1, color=Ink.MUTED, linewidth=1.2, zorder=1)


def ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios between ``low`` and ``high``: the finest steps that leave at most seven."""
    for steps in _RATIO_TICKS:
        ticks = [t for t in steps if low <= t <= high]
        if len(ticks) <= 7 and steps[0] <= low * 1.5 and steps[-1] >= high / 1.5:
            break
    return ticks


def load_scale(axis: Axes, loads: Sequence[float], loop: Loop) -> None:
    """A horizontal logarithmic axis of the ``loads`` (ascending)."""
    axis.set_xscale("log")
    axis.set_xlim(min(loads) / 1.25, max(loads) * 1.25)
    if len(loads) > 1:
        margin = (max(loads) / min(loads)) ** 0.09
        axis.set_xlim(min(loads) / margin, max(loads) * margin)
    axis.xaxis.set_major_locator(FixedLocator(_apart(loads)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{load:g}" for load in _apart(loads)])
    axis.set_xlabel(load_axis(loop))


def _apart(loads: Sequence[float]) -> list[float]:
    """The loads whose labels fit beside each other: the last always, others a tenth apart."""
    span = math.log(max(loads) / min(loads)) if len(loads) > 1 else 1.0
    kept: list[float] = []
    for load in reversed(loads):
        if not kept or math.log(kept[-1] / load) >= span * 0.1:
            kept.append(load)
    return kept[::-1]


@dataclass(frozen=True, slots=True)
class LatencySample:
    """What the latency chart draws of one arm: seconds of its OK requests, and how many failed."""

    arm: str
    values_s: NDArray[np.float64]
    failed: int


def latency_chart(
    name: str,
    title: str,
    samples: Mapping[str, Sequence[LatencySample]],
    limits_s: Mapping[str, float | None],
    styles: Mapping[str, ArmStyle],
    *,
    predicted: bool,
) -> Chart | None:
    """Distribution of each metric in ``samples`` ("TTFT", "TPOT"), one curve an arm.

    The vertical axis is the share of requests answered within x, stretched towards the tail so
    that P99 is as visible as P50; failed requests count as never answered, which ends a curve below
    the top. ``limits_s`` holds the SLO per metric. None without any value.
    """
    shown = {m: [s for s in group if len(s.values_s)] for m, group in samples.items()}
    shown = {metric: group for metric, group in shown.items() if group}
    if not shown:
        return None

    def draw(width: int) -> Figure:
        figure, axes = panels(
            len(shown), width=width, columns=2 if width == WIDE_PX else 1, height=230, left=52
        )
        for axis, (metric, group) in zip(axes, shown.items(), strict=True):
            _tail_axis(axis, max(len(s.values_s) + s.failed for s in group))
            for sample in group:
                _tail_curve(axis, sample, styles[sample.arm])
            _time_axis(axis, np.concatenate([s.values_s for s in group]), limits_s.get(metric))
            panel_title(axis, metric)
        return figure

    summary = "; ".join(
        f"{metric}, {s.arm}: "
        + ", ".join(
            f"P{share * 100:g} {number(float(np.quantile(s.values_s, share)) * 1000)} ms"
            for share in (0.5, 0.95, 0.99)
        )
        for metric, group in shown.items()
        for s in group
    )
    return draw_chart(name, title, summary, draw, predicted=predicted)


def _tail(share: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Stretches shares towards 1: 0 to 0, 90 % to 1, 99 % to 2."""
    stretched: NDArray[np.float64] = -np.log10(1 - np.asarray(share))
    return stretched


def _tail_axis(axis: Axes, requests: int) -> None:
    ticks = [share for share in _TAIL_SHARES if (1 - share) * requests >= 0.5] or [0.5]
    axis.yaxis.set_major_locator(FixedLocator([0.0, *(float(_tail(t)) for t in ticks)]))
    axis.set_yticklabels(["0 %", *(f"{t * 100:g} %" for t in ticks)])
    axis.set_ylim(0, float(_tail(max(*ticks, 1 - 0.4 / requests))))


def _tail_curve(axis: Axes, sample: LatencySample, style: ArmStyle) -> None:
    """The quantiles of one arm over all its requests, the failed ones beyond the right edge.

    Without failures the marks are the percentiles that the tables give.
    """
    answered = len(sample.values_s)
    total = answered + sample.failed
    top = (answered - 0.5) / total
    marks = np.array([share for share in (0.5, 0.95, 0.99) if share <= top])
    even = 1 - 10 ** -np.linspace(0, float(_tail(top)), _CURVE_POINTS)
    shares = np.unique(np.concatenate([even, marks]))

    def value_ms(share: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.quantile(sample.values_s, np.minimum(share * total / answered, 1)) * 1000

    axis.plot(
        value_ms(shares),
        _tail(shares),
        color=style.colour,
        linestyle=style.dashes,
        linewidth=2.6 if style.index == 0 else 2,
        zorder=2 if style.index == 0 else 3,
    )
    axis.plot(
        value_ms(marks),
        _tail(marks),
        marker=style.marker,
        markersize=6,
        color=style.colour,
        linestyle="none",
        zorder=4,
    )


def _time_axis(axis: Axes, values_s: NDArray[np.float64], limit_s: float | None) -> None:
    low, high = float(values_s.min()) * 1000, float(values_s.max()) * 1000
    low = max(low, high / 1e5, 1e-3)
    margin = (high / low) ** 0.05 * 1.02
    axis.set_xscale("log")
    axis.set_xlim(low / margin, high * margin)
    ticks = _decades(low / margin, high * margin)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{t:,g}" for t in ticks])
    axis.set_xlabel("milliseconds")
    if limit_s is not None and low / margin < limit_s * 1000 < high * margin:
        axis.axvline(limit_s * 1000, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
        axis.annotate(
            "SLO",
            (limit_s * 1000, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=Ink.MUTED,
        )


def _decades(low: float, high: float) -> list[float]:
    """At most seven round values between ``low`` and ``high``, the finest steps that fit."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks


def acceptance_chart(
    summaries: Sequence[AcceptanceSummary],
    styles: Mapping[str, ArmStyle],
    *,
    predicted: bool,
) -> Chart | None:
    """Acceptance rate per segment: a mark for the rate, a line from P10 to P90 of requests.

    The faint line at 50 % is the rule of thumb below which speculation rarely pays. Rows without a
    rate (a source that cannot tell) are left out; None when none is left.
    """
    rows = [s for s in summaries if s.rate is not None]
    if not rows:
        return None
    labels = list(dict.fromkeys((s.workload, s.segment) for s in rows))
    names = [cell_name(*label) for label in labels]

    def draw(width: int) -> Figure:
        return row_chart(
            names,
            width=width,
            marks=lambda axis, y_of: _acceptance_marks(axis, rows, labels, styles, y_of),
            arms=[name for name in styles if any(r.arm == name for r in rows)],
        )

    summary = "; ".join(
        f"{cell_name(s.workload, s.segment)}, {s.arm}: {percent(s.rate)}" for s in rows
    )
    return draw_chart("acceptance", "Acceptance by segment", summary, draw, predicted=predicted)


def row_chart(
    names: Sequence[str],
    *,
    width: int,
    arms: Sequence[str],
    marks: Callable[[Axes, Callable[[int, str], float]], None],
) -> Figure:
    """One axes of named rows, arms stacked inside each row; ``marks`` draws on it."""
    narrow = width == NARROW_PX
    row_height = 20 * len(arms) + 18
    longest = max(len(name) for name in names)
    left = 14 if narrow else min(300, 30 + 8 * longest)
    extra = 18 if narrow else 0  # narrow: names stand above their rows
    figure, (axis,) = panels(
        1,
        width=width,
        columns=1,
        height=(row_height + extra) * len(names),
        left=left,
        right=28,
        top=8,
    )
    axis.set_ylim(len(names) * (row_height + extra), 0)
    axis.yaxis.set_major_locator(NullLocator())
    axis.grid(visible=False, axis="y")
    axis.grid(visible=True, axis="x")

    def y_of(row: int, arm: str) -> float:
        return row * (row_height + extra) + extra + 19 + 20 * arms.index(arm)

    for row, name in enumerate(names):
        top = row * (row_height + extra)
        if row:
            axis.axhline(top, color=Ink.GRID, linewidth=1)
        axis.annotate(
            fitted(name, (width if narrow else left) - 28),
            (0, top + (19 if narrow else row_height / 2)),
            xycoords=("axes fraction", "data"),
            xytext=(0 if narrow else -left, 0),
            textcoords="offset points",
            ha="left",
            va="baseline" if narrow else "center",
            annotation_clip=False,
        )
    marks(axis, y_of)
    return figure


def _acceptance_marks(
    axis: Axes,
    rows: Sequence[AcceptanceSummary],
    labels: Sequence[tuple[str, str | None]],
    styles: Mapping[str, ArmStyle],
    y_of: Callable[[int, str], float],
) -> None:
    axis.set_xlim(-0.015, 1.015)
    axis.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axis.set_xticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_xlabel("accepted / drafted tokens")
    axis.axvline(0.5, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
    for summary in rows:
        style = styles[summary.arm]
        y = y_of(labels.index((summary.workload, summary.segment)), summary.arm)
        spread = summary.per_request
        if spread is not None:
            axis.hlines(y, spread.p10, spread.p90, color=style.colour, linewidth=2, alpha=0.55)
        axis.plot(summary.rate or 0.0, y, marker=style.marker, markersize=8, color=style.colour)


def position_chart(
    summaries: Sequence[AcceptanceSummary],
    styles: Mapping[str, ArmStyle],
    *,
    predicted: bool,
) -> Chart | None:
    """Conditional acceptance by draft position, a panel for each segment; None without any."""
    rows = [s for s in summaries if s.conditional]
    if not rows:
        return None
    labels = list(dict.fromkeys((s.workload, s.segment) for s in rows))
    longest = max(len(s.conditional) for s in rows)

    def draw(width: int) -> Figure:
        columns = (3 if len(labels) in (3, 5, 6, 9) else 4) if width == WIDE_PX else 2
        figure, axes = panels(
            len(labels), width=width, columns=min(columns, max(2, len(labels))), height=120, gap=18
        )
        for axis, label in zip(axes, labels, strict=True):
            for summary in (r for r in rows if (r.workload, r.segment) == label):
                style = styles[summary.arm]
                axis.plot(
                    range(1, len(summary.conditional) + 1),
                    summary.conditional,
                    color=style.colour,
                    linestyle=style.dashes,
                    marker=style.marker,
                    markersize=6,
                )
            axis.set_ylim(-0.03, 1.03)
            axis.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
            axis.set_yticklabels(["0 %", "50 %", "100 %"])
            axis.set_xlim(0.6, longest + 0.4)
            step = max(1, longest // 5)
            axis.xaxis.set_major_locator(FixedLocator(list(range(1, longest + 1, step))))
            axis.set_xlabel("draft position")
            panel_title(axis, cell_name(*label))
        return figure

    summary = "; ".join(
        f"{cell_name(s.workload, s.segment)}, {s.arm}: "
        + ", ".join(percent(a) for a in s.conditional)
        for s in rows
    )
    return draw_chart(
        "position", "Acceptance by draft position", summary, draw, predicted=predicted
    )


def aggregate_chart(
    name: str,
    effects: Sequence[Effect],
    styles: Mapping[str, ArmStyle],
    *,
    predicted: bool,
) -> Chart | None:
    """The mix and its segments at one load: speedup with interval, a row each, the mix first.

    ``effects`` are speedups of one workload at one load. None unless a segment is among them.
    """
    segments = list(dict.fromkeys(e.segment for e in effects if e.segment is not None))
    if not segments:
        return None
    order: list[str | None] = [None, *segments]
    names = ["All requests together", *segments]
    low, high = ratio_range(effects)

    def marks(axis: Axes, y_of: Callable[[int, str], float]) -> None:
        ratio_columns(axis, (low, high), "speedup against the baseline")
        for effect in effects:
            style = styles[effect.arm]
            y = y_of(order.index(effect.segment), effect.arm)
            axis.hlines(y, effect.low, effect.high, color=style.colour, linewidth=2)
            effect_marker(axis, effect.ratio, y, effect, style)

    def draw(width: int) -> Figure:
        arms = [arm for arm in styles if any(e.arm == arm for e in effects)]
        return row_chart(names, width=width, arms=arms, marks=marks)

    summary = "; ".join(
        f"{e.segment or 'all requests'}, {e.arm}: {ratio(e.ratio)} {interval(e.low, e.high)}"
        for e in effects
    )
    title = f"The aggregate beside its segments: {effects[0].workload} at {effects[0].load.label}"
    return draw_chart(name, title, summary, draw, predicted=predicted)
