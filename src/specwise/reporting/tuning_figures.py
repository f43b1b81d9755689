"""The charts of a tuning: gain against load, and what is still to lose against minutes spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specwise.decision.confirmation import ConfirmedLoad
from specwise.decision.standing import ArmStanding
from specwise.decision.ways import KEPT
from specwise.domain import LoadPoint
from specwise.reporting.figures import (
    ArmStyle,
    effect_marker,
    load_scale,
    panel_title,
    ratio_range,
    ratio_scale,
    sideways,
)
from specwise.reporting.svg import Chart, Ink, draw_chart, panels
from specwise.reporting.wording import interval, percent, ratio

STATIC_STYLE: Final = ArmStyle(2, Ink.ARMS[2], "D", (0, (4.0, 2.0)))
DEPLOYED_STYLE: Final = ArmStyle(1, Ink.ARMS[1], "o", "solid")
BELIEF_STYLE: Final = ArmStyle(0, Ink.ARMS[0], "s", (0, (1.0, 2.0)))

_SHARES: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One load of the production workload: what each confirmed arm gives there against off.

    ``static`` and ``scheduled`` are None where that arm was not confirmed there; ``deployed`` is
    the one of them that the answer is about. ``believed`` is what the search expected of it.
    """

    load: LoadPoint
    static: ConfirmedLoad | None
    scheduled: ConfirmedLoad | None
    deployed: ConfirmedLoad | None
    believed: ArmStanding


def loads_chart(rows: Sequence[LoadRow], *, predicted: bool) -> Chart:
    """Ratio to the baseline against load: the confirmed arms with their intervals over the search's
    belief (a band), the lines at 1 and at `KEPT`. A panel for each loop that the loads have.

    ``predicted`` says that a simulation made the studies; without any confirmation the chart is of
    beliefs, and it says so when no trial is behind any of them.
    """
    loops = list(dict.fromkeys(row.load.loop for row in rows))
    effects = [c.to_baseline for r in rows for c in (r.static, r.scheduled) if c is not None]
    beliefs = [row.believed for row in rows]
    low, high = ratio_range(effects) if effects else (0.8, 1.25)
    low = min(low, *(max(b.low, b.gain / 2) / 1.05 for b in beliefs))
    high = max(high, *(min(b.high, b.gain * 2) * 1.05 for b in beliefs))

    def draw(width: int) -> Figure:
        figure, axes = panels(len(loops), width=width, columns=1, height=250, top=36, right=20)
        for axis, loop in zip(axes, loops, strict=True):
            _loads_panel(axis, [r for r in rows if r.load.loop is loop], (low, high))
            if len(loops) > 1:
                panel_title(axis, f"{loop.value} loop")
        return figure

    words = []
    for row in rows:
        for name, cell in (("scheduled", row.scheduled), ("static", row.static)):
            if cell is not None:
                e = cell.to_baseline
                words.append(
                    f"{row.load.label}, {name}: {ratio(e.ratio)} {interval(e.low, e.high)}"
                )
        b = row.believed
        source = "" if b.trials else ", predicted"
        words.append(
            f"{row.load.label}, the search for {b.arm}: {ratio(b.gain)} "
            f"{interval(b.low, b.high)}{source}"
        )
    return draw_chart(
        "loads",
        "Gain over the baseline against load",
        "; ".join(words),
        draw,
        predicted=predicted or not (effects or any(b.trials for b in beliefs)),
    )


def _loads_panel(axis: Axes, rows: Sequence[LoadRow], limits: tuple[float, float]) -> None:
    loads = [row.load.value for row in rows]
    ratio_scale(axis, limits)
    axis.axhspan(limits[0], 1, color=Ink.LOSS, linewidth=0, zorder=0)
    axis.axhline(1, color=Ink.MUTED, linewidth=1.2, zorder=1)
    axis.axhline(KEPT, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    load_scale(axis, loads, rows[0].load.loop)
    beliefs = [row.believed for row in rows]
    axis.fill_between(
        loads,
        [b.low for b in beliefs],
        [b.high for b in beliefs],
        color=BELIEF_STYLE.colour,
        alpha=0.16,
        linewidth=0,
        zorder=1,
    )
    axis.plot(
        loads,
        [b.gain for b in beliefs],
        color=BELIEF_STYLE.colour,
        linestyle=BELIEF_STYLE.dashes,
        zorder=2,
    )
    axis.plot(
        [row.load.value for row in rows if not row.believed.trials],
        [row.believed.gain for row in rows if not row.believed.trials],
        color=BELIEF_STYLE.colour,
        marker="+",
        markersize=9,
        markeredgewidth=1.6,
        linestyle="none",
        zorder=5,
    )
    both = all(any(getattr(row, name) for row in rows) for name in ("static", "scheduled"))
    for place, name in enumerate(("static", "scheduled")):
        held = [(row, cell) for row in rows if (cell := getattr(row, name)) is not None]
        if not held:
            continue
        deployed = any(row.deployed is cell for row, cell in held)
        style = DEPLOYED_STYLE if deployed else STATIC_STYLE
        shift = sideways(loads, place, 2) if both else 1.0
        xs = [row.load.value * shift for row, _ in held]
        shown = [cell.to_baseline for _, cell in held]
        axis.plot(
            xs, [e.ratio for e in shown], color=style.colour, linestyle=style.dashes, zorder=3
        )
        axis.vlines(
            xs, [e.low for e in shown], [e.high for e in shown], color=style.colour, linewidth=1.6
        )
        for x, effect in zip(xs, shown, strict=True):
            effect_marker(axis, x, effect.ratio, effect, style)


@dataclass(frozen=True, slots=True)
class BoundAt:
    """What could be lost (95 %) after ``minutes`` of searching; ``start``: a server came up."""

    minutes: float
    bound: float
    start: bool


def bound_chart(
    points: Sequence[BoundAt],
    tolerance: float,
    budget_minutes: float | None,
    *,
    predicted: bool,
) -> Chart | None:
    """The bound on the remaining regret against minutes spent, and the tolerance; None without a
    trial. A tick below marks the start of a server."""
    if len(points) < 2:
        return None
    xs = [p.minutes for p in points]
    ys = [max(p.bound, 1e-4) for p in points]
    low, high = min(*ys, tolerance) / 1.6, max(*ys, tolerance) * 1.3
    last = xs[-1]
    if budget_minutes is not None and budget_minutes <= 1.5 * last:
        last = max(last, budget_minutes)

    def draw(width: int) -> Figure:
        figure, (axis,) = panels(1, width=width, columns=1, height=190, top=20, left=48, right=20)
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        ticks = [share for share in _SHARES if low <= share <= high]
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_yticklabels([f"{share * 100:g} %" for share in ticks])
        axis.set_xlim(-0.02 * last, 1.03 * last)
        axis.set_xlabel("minutes spent")
        axis.axhline(tolerance, color=Ink.MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axis.annotate(
            f"tolerance {percent(tolerance, 1)}",
            (0, tolerance),
            xytext=(4, 4),
            textcoords="offset points",
            color=Ink.MUTED,
        )
        if budget_minutes is not None and budget_minutes <= last:
            axis.axvline(budget_minutes, color=Ink.MUTED, linewidth=1, linestyle=(0, (1, 3)))
        axis.plot(xs, ys, color=DEPLOYED_STYLE.colour, drawstyle="steps-post", zorder=3)
        axis.plot(xs[-1:], ys[-1:], color=DEPLOYED_STYLE.colour, marker="o", markersize=7, zorder=4)
        axis.plot(
            [p.minutes for p in points if p.start],
            [0.03] * sum(p.start for p in points),
            color=Ink.MUTED,
            marker="|",
            markersize=9,
            markeredgewidth=1.4,
            linestyle="none",
            transform=axis.get_xaxis_transform(),
        )
        return figure

    shown = [points[0], points[len(points) // 2], points[-1]]
    summary = "; ".join(f"{p.minutes:.0f} min: {percent(p.bound, 1)}" for p in shown)
    if not all(math.isfinite(p.bound) for p in points):
        return None
    return draw_chart(
        "bound",
        "What choosing now could lose, against minutes spent",
        f"{summary}; tolerance {percent(tolerance, 1)}",
        draw,
        predicted=predicted,
    )
