"""What temperature does to acceptance, and what that says at production's temperature (req B1-B4).

A sweep sends the same prompts at every temperature, so the prompt is the unit: intervals come from
resampling prompts, and what is compared between temperatures is compared on the same prompts. The
bootstrap draws are shared by all temperatures of a line; a half width is Student's t (prompts - 1)
times the draws' standard deviation, corrected by sqrt(n / (n - 1)).
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.acceptance import counted_by_server, drafted_tokens
from specwise.analysis.cells import Cells, Floats, TrialTable
from specwise.analysis.comparison import CONFIDENCE, Effect, t_quantile
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Arm,
    LoadPoint,
    Outcome,
    Purpose,
    Segment,
    Speculation,
    StudyData,
)

Class = Literal["off", "break-even", "likely a win"]

OFF_BELOW, WIN_ABOVE = 0.5, 0.65
"""The article's lines on the acceptance rate; a rule of thumb that no measurement bows to."""

_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95 % interval; the bounds are NaN where nothing tells how sure it is."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TemperaturePoint:
    """Acceptance of one arm on one segment's prompts at one temperature.

    ``rate`` is accepted / drafted tokens; ``conditional[i]`` the share accepted at position i + 1
    where the earlier ones were, which can be compared across draft lengths as the rate cannot.
    ``length`` is tokens per verify step. ``klass`` is that of the rate, ``classes`` all that its
    interval touches. ``speedup`` is the effect against the baseline in the same window.
    """

    temperature: float
    workload: str
    production: bool
    source: AcceptanceSource
    requests: int
    steps: int
    rate: Share
    conditional: tuple[Share, ...]
    length: float
    klass: Class
    classes: tuple[Class, ...]
    speedup: Effect | None
    trial_ids: tuple[str, ...]

    @property
    def certain(self) -> bool:
        """Whether the whole interval lies in one class."""
        return len(self.classes) == 1


@dataclass(frozen=True, slots=True)
class TemperatureLine:
    """One arm on one segment over the temperatures, ascending.

    ``drop`` is the rate at the lowest temperature less that at the highest, on the same prompts;
    ``falls`` says whether it is above 0 (True), below (False) or neither can be said (None).
    ``monotone`` is False where the rate rises between neighbours by more than chance explains
    (95 % shared out over the pairs of neighbours), None where no interval could be given.
    """

    arm: str
    segment: str
    k: int
    points: tuple[TemperaturePoint, ...]
    drop: Share
    falls: bool | None
    monotone: bool | None

    @property
    def at_production(self) -> TemperaturePoint | None:
        """The point at the segment's own temperature, None where it was not measured."""
        return next((point for point in self.points if point.production), None)

    def flattering(self) -> tuple[TemperaturePoint, ...]:
        """Points with a better class than production's or surely a higher rate (req B3)."""
        own = self.at_production
        if own is None:
            return ()
        order: tuple[Class, ...] = ("off", "break-even", "likely a win")
        return tuple(
            p
            for p in self.points
            if order.index(p.klass) > order.index(own.klass) or p.rate.low > own.rate.high
        )


@dataclass(frozen=True, slots=True)
class TemperatureSweep:
    """The temperature experiment's result; ``warnings`` are sentences."""

    load: LoadPoint
    lines: tuple[TemperatureLine, ...]
    warnings: tuple[str, ...]


def classify(rate: float) -> Class:
    """The article's classes: below 0.5 off, to 0.65 break-even, above likely a win."""
    if rate < OFF_BELOW:
        return "off"
    return "break-even" if rate <= WIN_ABOVE else "likely a win"


def sweep(
    study: StudyData, measured: Cells, effects: Sequence[Effect], *, seed: int = 0
) -> TemperatureSweep:
    """The line of every arm and segment of a temperature experiment, at its production load."""
    design = study.design
    load = design.production_load
    speedups = {
        (e.arm, e.workload): e
        for e in effects
        if e.metric == "speedup" and e.segment is None and e.load == load
    }
    lines = []
    for segment in design.segments:
        if segment.same_prompts_as:
            continue
        family = [s for s in design.segments if segment.name in (s.name, s.same_prompts_as)]
        for arm in design.arms[1:]:
            line = _line(arm, segment, family, measured, load=load, speedups=speedups, seed=seed)
            if line is not None:
                lines.append(line)
    return TemperatureSweep(load, tuple(lines), tuple(_warnings(lines)))


def _line(
    arm: Arm,
    segment: Segment,
    family: Sequence[Segment],
    measured: Cells,
    *,
    load: LoadPoint,
    speedups: Mapping[tuple[str, str], Effect],
    seed: int,
) -> TemperatureLine | None:
    speculation = arm.speculation
    if speculation is None:
        return None
    windows = []
    for variant in sorted(family, key=lambda s: s.temperature):
        tables = measured.get((arm.name, variant.name, load, Purpose.MEASURE), ())
        window = _window(tables, speculation) if tables else None
        if window is not None:
            windows.append((variant, window))
    if not windows:
        return None
    rng = np.random.default_rng([seed, 5, zlib.crc32(f"{arm.name}/{segment.name}".encode())])
    units = sorted({unit for _, window in windows for unit in window.by_unit})
    times = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=_DRAWS)
    drawn = [window.resampled(units, times) for _, window in windows]
    points = tuple(
        _point(
            variant,
            window,
            own,
            production=variant.name == segment.name,
            speedup=speedups.get((arm.name, variant.name)),
        )
        for (variant, window), own in zip(windows, drawn, strict=True)
    )
    rates = [point.rate.value for point in points]
    count = len(units)
    gaps = [
        _share(
            rates[i] - rates[i + 1], drawn[i].rate - drawn[i + 1].rate, count, steps=len(rates) - 1
        )
        for i in range(len(rates) - 1)
    ]
    drop = _share(rates[0] - rates[-1], drawn[0].rate - drawn[-1].rate, count)
    known = math.isfinite(drop.low) and len(points) > 1
    return TemperatureLine(
        arm=arm.name,
        segment=segment.name,
        k=speculation.k,
        points=points,
        drop=drop,
        falls=(True if drop.low > 0 else False if drop.high < 0 else None) if known else None,
        monotone=not any(gap.high < 0 for gap in gaps) if known else None,
    )


def _point(
    variant: Segment, window: _Window, drawn: _Drawn, *, production: bool, speedup: Effect | None
) -> TemperaturePoint:
    count = len(window.by_unit)
    rate = _share(window.rate, drawn.rate, count, clip=True)
    conditional = tuple(
        _share(float(value), drawn.conditional[:, place], count, clip=True)
        for place, value in enumerate(window.conditional)
    )
    bounds = [b for b in (rate.low, rate.high) if math.isfinite(b)] or [rate.value]
    order: tuple[Class, ...] = ("off", "break-even", "likely a win")
    first, last = order.index(classify(bounds[0])), order.index(classify(bounds[-1]))
    unsure = not math.isfinite(rate.low)
    return TemperaturePoint(
        temperature=variant.temperature,
        workload=variant.name,
        production=production,
        source=window.source,
        requests=window.requests,
        steps=int(window.total[0]),
        rate=rate,
        conditional=conditional,
        length=window.length,
        klass=classify(rate.value),
        classes=order if unsure else order[first : last + 1],
        speedup=speedup,
        trial_ids=window.trial_ids,
    )


def _share(value: float, draws: Floats, units: int, *, clip: bool = False, steps: int = 1) -> Share:
    """``value`` with a t interval from bootstrap draws; ``steps`` shares 5 % out over as many."""
    held = draws[np.isfinite(draws)]
    if units < 2 or len(held) < 2 or not math.isfinite(value):
        return Share(value, math.nan, math.nan)
    spread = float(held.std(ddof=1)) * math.sqrt(units / (units - 1))
    half = t_quantile(units - 1, 1 - (1 - CONFIDENCE) / steps) * spread
    low, high = value - half, value + half
    return Share(value, max(0.0, low), min(1.0, high)) if clip else Share(value, low, high)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Bootstrap draws of one window: ``rate`` (draws), ``conditional`` (draws x positions)."""

    rate: Floats
    conditional: Floats


@dataclass(frozen=True, slots=True)
class _Window:
    """What one arm accepted in the trials at one temperature.

    ``by_unit[name]`` is (steps, steps that accepted >= 1, >= 2, ..., drafted tokens) summed over
    what is resampled as one: the requests of a prompt, or a whole repeat where the server tells no
    more. ``total`` is their sum.
    """

    source: AcceptanceSource
    requests: int
    by_unit: Mapping[str, Floats]
    total: Floats
    trial_ids: tuple[str, ...]

    @property
    def rate(self) -> float:
        return float(_rate(self.total))

    @property
    def length(self) -> float:
        return float(1 + self.total[1:-1].sum() / self.total[0])

    @property
    def conditional(self) -> Floats:
        return _conditional(self.total)

    def resampled(self, units: Sequence[str], times: NDArray[np.int64]) -> _Drawn:
        """The window under each draw of ``units``, of which row i holds how often each came up."""
        width = len(self.total)
        rows = np.array([self.by_unit.get(unit, np.zeros(width)) for unit in units])
        sums = times @ rows
        return _Drawn(_rate(sums), _conditional(sums))


def _rate(sums: Floats) -> Floats:
    accepted, drafted = sums[..., 1:-1].sum(-1), sums[..., -1]
    return np.asarray(
        np.divide(accepted, drafted, where=drafted > 0, out=np.full(np.shape(drafted), np.nan))
    )


def _conditional(sums: Floats) -> Floats:
    before, after = sums[..., :-2], sums[..., 1:-1]
    return np.asarray(np.divide(after, before, where=before > 0, out=np.full(after.shape, np.nan)))


def _window(tables: Sequence[TrialTable], speculation: Speculation) -> _Window | None:
    """The best source the window has: per request, else counters trial by trial, else chunks."""
    records = [(table, r) for table in tables for r in table.records if r.outcome is Outcome.OK]
    trial_ids = tuple(table.trial.trial_id for table in tables)

    def of(source: AcceptanceSource) -> _Window | None:
        held = [
            (r.prompt_id, r.acceptance)
            for _, r in records
            if r.acceptance is not None and r.acceptance.source is source and r.acceptance.steps
        ]
        return _gathered(source, held, len(records), speculation, trial_ids)

    counted = [
        (f"repeat {t.trial.repeat}", c) for t in tables if (c := counted_by_server([t])) is not None
    ]
    return (
        of(AcceptanceSource.PER_REQUEST)
        or _gathered(AcceptanceSource.COUNTERS, counted, len(records), speculation, trial_ids)
        or of(AcceptanceSource.CHUNKS)
    )


def _gathered(
    source: AcceptanceSource,
    held: Sequence[tuple[str, AcceptanceCounts]],
    requests: int,
    speculation: Speculation,
    trial_ids: tuple[str, ...],
) -> _Window | None:
    known = [(unit, c, d) for unit, c in held if (d := drafted_tokens(c, speculation))]
    if not known:
        return None
    positions = max(speculation.k, *(len(c.steps_by_accepted) - 1 for _, c, _ in known))
    by_unit: dict[str, Floats] = defaultdict(lambda: np.zeros(positions + 2))
    for unit, counts, drafted in known:
        exactly = np.zeros(positions + 1)
        exactly[: len(counts.steps_by_accepted)] = counts.steps_by_accepted
        by_unit[unit][:-1] += exactly[::-1].cumsum()[::-1]
        by_unit[unit][-1] += drafted
    total = np.sum(list(by_unit.values()), axis=0)
    return _Window(source, requests, dict(by_unit), total, trial_ids)


def _warnings(lines: Sequence[TemperatureLine]) -> list[str]:
    """What the sweep says about benchmarks at other temperatures (req B3), and about itself."""
    found = []
    for line in lines:
        own = line.at_production
        if own is None:
            found.append(
                f"{line.arm} on {line.segment}: production's temperature was not measured."
            )
            continue
        tempting = line.flattering()
        if tempting:
            best = max(tempting, key=lambda p: p.rate.value)
            found.append(
                f"{line.arm} on {line.segment}: a benchmark at T={best.temperature:g} shows "
                f"{best.rate.value:.2f} ({best.klass}); production's T={own.temperature:g} has "
                f"{own.rate.value:.2f} ({own.klass})."
            )
        if own.source is AcceptanceSource.CHUNKS:
            found.append(
                f"{line.arm} on {line.segment}: acceptance is estimated from tokens per chunk."
            )
        if not math.isfinite(own.rate.low):
            found.append(
                f"{line.arm} on {line.segment}: no interval, because too few windows or prompts "
                "tell how much acceptance varies; more repeats would."
            )
    return found
