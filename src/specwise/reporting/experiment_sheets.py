"""What an experiment found, as sentences and small tables for terminal and page alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specwise.analysis.comparison import Effect
from specwise.analysis.crossover import Crossover
from specwise.analysis.experiment import Experiment
from specwise.analysis.ladder import Ladder
from specwise.analysis.mixture import Contrast, Mixture
from specwise.analysis.temperature import (
    Share,
    TemperatureLine,
    TemperaturePoint,
    TemperatureSweep,
)
from specwise.facts.published import published
from specwise.reporting.wording import (
    MARKS,
    MISSING,
    interval,
    load_axis,
    metric_words,
    number,
    percent,
    ratio,
)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of texts; ``numeric`` says which columns are set flush right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """An experiment's answer: its name, sentences (the most important first), then the evidence."""

    title: str
    sentences: tuple[str, ...]
    sheets: tuple[Sheet, ...]


def findings_of(experiment: Experiment) -> Findings:
    """The answer of ``experiment`` in sentences and tables that fit a terminal."""
    if isinstance(experiment, TemperatureSweep):
        return Findings(
            "Acceptance by temperature",
            tuple(_sweep_sentences(experiment)),
            (_sweep_sheet(experiment),) if experiment.lines else (),
        )
    if isinstance(experiment, Ladder):
        arms = list(dict.fromkeys(e.arm for rung in experiment.rungs for e in rung.effects))
        return Findings(
            "The load ladder",
            tuple(_ladder_sentences(experiment)),
            tuple(_ladder_sheet(experiment, arm) for arm in arms),
        )
    return Findings(
        "The mix and its control",
        experiment.sentences or ("Nothing in the mix is shown to be harmed.",),
        (*_aggregate_sheets(experiment), *_cause_sheets(experiment)),
    )


# ---------------------------------------------------------------------------------------------
# Temperature


def class_words(point: TemperaturePoint) -> str:
    """The class by the rule of thumb; all that the interval touches where it is not certain."""
    if point.certain:
        return point.klass
    return f"{point.klass}, not sure: {' or '.join(point.classes)}"


def share_words(share: Share) -> str:
    """``0.71 [0.66, 0.76]``."""
    if not math.isfinite(share.low):
        return f"{share.value:.2f}" if math.isfinite(share.value) else MISSING
    return f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"


def _short(share: Share) -> str:
    """``0.71±0.05``: for a table of many temperatures in a terminal."""
    if not math.isfinite(share.low):
        return f"{share.value:.2f}"
    return f"{share.value:.2f}±{(share.high - share.low) / 2:.2f}"


def trend_words(line: TemperatureLine) -> str:
    """What a line does over the temperatures."""
    if line.falls is None:
        return "does not fall or rise for sure" if line.monotone is not None else "not known"
    word = "falls" if line.falls else "rises"
    ends = f"{line.points[0].temperature:g} to {line.points[-1].temperature:g}"
    drop = Share(abs(line.drop.value), *sorted((abs(line.drop.low), abs(line.drop.high))))
    steady = "" if line.monotone else ", but not at every step"
    return f"{word} by {share_words(drop)} from T={ends}{steady}"


def _sweep_sentences(experiment: TemperatureSweep) -> list[str]:
    found = []
    for line in experiment.lines:
        own = line.at_production
        if own is None:
            continue
        found.append(
            f"{line.segment}, {line.arm}: {share_words(own.rate)} at production's "
            f"T={own.temperature:g}: {class_words(own)}{_next_step(own)}. It {trend_words(line)}."
        )
    return [*found, *experiment.warnings]


def _next_step(point: TemperaturePoint) -> str:
    measured = ""
    if point.speedup is not None and math.isfinite(point.speedup.ratio):
        effect = point.speedup
        measured = (
            f"; measured here {ratio(effect.ratio)} {interval(effect.low, effect.high)} "
            f"{effect.direction}"
        )
    rule = {
        "off": "",
        "break-even": " (measure P99 at production's load first)",
        "likely a win": " (confirm against a baseline)",
    }[point.klass]
    return f"{rule}{measured}"


def published_shape() -> tuple[tuple[float, float], ...]:
    """Acceptance by temperature as it was published: calibration, never a prediction."""
    return published().temperature_shape.points


def published_words() -> str:
    """The published shape, said to be what it is."""
    return ", ".join(f"{rate:.2f} at T={t:g}" for t, rate in published_shape())


def _sweep_sheet(experiment: TemperatureSweep) -> Sheet:
    temperatures = sorted({p.temperature for line in experiment.lines for p in line.points})
    rows = []
    for line in experiment.lines:
        held = {p.temperature: p for p in line.points}
        cells = [
            f"{_short(p.rate)}{'*' if p.production else ''}" if (p := held.get(t)) else MISSING
            for t in temperatures
        ]
        rows.append((line.segment, line.arm, *cells))
    rows.append(("published", "elsewhere", *(_published_at(t) for t in temperatures)))
    return Sheet(
        "Accepted / drafted tokens, * at production's temperature; published: calibration only",
        ("Requests", "Arm", *(f"T={t:g}" for t in temperatures)),
        tuple(rows),
        (False, False, *(True for _ in temperatures)),
    )


def _published_at(temperature: float) -> str:
    known = dict(published_shape())
    return f"{known[temperature]:.2f}" if temperature in known else MISSING


def temperature_sheet(experiment: TemperatureSweep) -> Sheet:
    """Every point with its intervals: for the page."""
    rows = [
        (
            line.segment,
            line.arm,
            f"{p.temperature:g}{' (production)' if p.production else ''}",
            share_words(p.rate),
            f"{p.length:.2f}",
            "  ".join(share_words(share) for share in p.conditional),
            class_words(p),
            effect_words(p.speedup),
        )
        for line in experiment.lines
        for p in line.points
    ]
    return Sheet(
        "Every temperature as numbers",
        (
            "Requests", "Arm", "T", "Acceptance", "Length", "By position, given the earlier ones",
            "Rule of thumb", "Speedup",
        ),
        tuple(rows),
        (False, False, True, False, True, False, False, False),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Ladder


def effect_words(effect: Effect | None) -> str:
    """``▲ 1.21x [1.10, 1.33]``; a dash where there is none."""
    if effect is None or not math.isfinite(effect.ratio):
        return MISSING
    bounds = interval(effect.low, effect.high)
    return f"{MARKS[effect.direction]} {ratio(effect.ratio)} {bounds or 'no interval'}"


def crossover_words(crossover: Crossover) -> str:
    """Where an arm stops being better, in a phrase."""
    first, last = crossover.loads[0], crossover.loads[-1]
    if crossover.load_value is None:
        return {
            "always better": f"better at every load climbed ({first:g} to {last:g})",
            "always worse": f"worse at every load climbed ({first:g} to {last:g})",
        }.get(crossover.outcome, f"undecided from {first:g} to {last:g}")
    low = f"below {first:g}" if crossover.low is None else number(crossover.low)
    high = f"above {last:g}" if crossover.high is None else number(crossover.high)
    word = "stops being better" if crossover.outcome == "crosses" else "may stop being better"
    unit = load_axis(crossover.loop)
    return f"{word} at {number(crossover.load_value)} {unit} [{low}, {high}]"


def _ladder_sentences(ladder: Ladder) -> list[str]:
    found = [f"{c.arm}: {crossover_words(c)}." for c in ladder.crossovers.get("speedup", ())]
    if ladder.skipped:
        loads = ", ".join(load.label for load in ladder.skipped)
        found.append(f"The climb ended early, without {loads}: {ladder.reason}.")
    else:
        found.append(f"{ladder.reason[0].upper()}{ladder.reason[1:]}.")
    found += [
        f"{s.arm} is saturated at {s.load.label}: {s.reason}."
        for rung in ladder.rungs
        for s in rung.saturated
        if s.reason not in ladder.reason
    ]
    return found


def _ladder_sheet(ladder: Ladder, arm: str) -> Sheet:
    metrics = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99")
    return Sheet(
        f"{arm} / baseline on {ladder.workload}, below 1 is better",
        ("Load", *(metric_words(m) for m in metrics)),
        tuple(
            (rung.load.label, *(effect_words(rung.effect(arm, m)) for m in metrics))
            for rung in ladder.rungs
        ),
        (True, *(False for _ in metrics)),
    )


def ladder_sheets(ladder: Ladder) -> tuple[Sheet, ...]:
    """For the page: the values of every arm, their ratios with intervals, the crossovers."""
    arms = list(dict.fromkeys(e.arm for rung in ladder.rungs for e in rung.effects))
    kinds = ("p50", "p95", "p99")
    headings = [f"{m} {k.upper()}, ms" for m in ("TTFT", "TPOT") for k in kinds]
    values = []
    for rung in ladder.rungs:
        full = {s.arm for s in rung.saturated}
        for s in rung.summaries:
            cells = [
                number(getattr(held, kind) * 1000) if held is not None else MISSING
                for held in (s.ttft_s, s.tpot_s)
                for kind in kinds
            ]
            mark = "saturated" if s.arm in full else ""
            tokens = number(s.output_tokens_per_s)
            values.append((rung.load.label, s.arm, tokens, *cells, percent(s.failure_share), mark))
    sheets = [
        Sheet(
            "Each load as numbers",
            ("Load", "Arm", "Tokens/s", *headings, "Failed", ""),
            tuple(values),
            (True, False, *(True for _ in range(8)), False),
        )
    ]  # fmt: skip
    for metric in ("ttft", "tpot"):
        sheets.append(
            Sheet(
                f"{metric.upper()} against the baseline, below 1 is better",
                ("Load", "Arm", *(f"{metric.upper()} {k.upper()}" for k in kinds)),
                tuple(
                    (
                        rung.load.label,
                        arm,
                        *(effect_words(rung.effect(arm, f"{metric}_{k}")) for k in kinds),
                    )
                    for rung in ladder.rungs
                    for arm in arms
                ),
                (True, *(False for _ in range(4))),
            )
        )
    crossings = [
        (metric_words(metric), c.arm, crossover_words(c))
        for metric, held in ladder.crossovers.items()
        for c in held
    ]
    if crossings:
        sheets.append(
            Sheet(
                "Where each arm stops being better, with its 95 % interval",
                ("Metric", "Arm", "Crossover"),
                tuple(crossings),
                (False, False, False),
            )
        )
    return tuple(sheets)


# ---------------------------------------------------------------------------------------------
# Mixed


def contrast_words(contrast: Contrast | None) -> str:
    """``0.81x [0.70, 0.94]``, below 1 is worse in the mix than alone."""
    if contrast is None or not math.isfinite(contrast.ratio):
        return MISSING
    bounds = interval(contrast.low, contrast.high)
    return f"{ratio(contrast.ratio)} {bounds or 'no interval'}"


def _aggregate_sheets(mixture: Mixture) -> Sequence[Sheet]:
    rows = []
    for view in mixture.aggregates:
        rate = view.acceptance.rate if view.acceptance else None
        rows.append(
            (
                view.arm,
                "all together",
                percent(1),
                MISSING,
                percent(rate),
                effect_words(view.speedup),
            )
        )
        rows += [
            (
                view.arm,
                s.segment,
                percent(s.share),
                f"{s.temperature:g}",
                percent(s.acceptance.rate if s.acceptance else None),
                effect_words(s.speedup),
            )
            for s in view.segments
        ]
    return [
        Sheet(
            f"The average of {mixture.workload} at {mixture.load.label}, and each segment of it",
            ("Arm", "Requests", "Share", "T", "Acc.", "Speedup"),
            tuple(rows),
            (False, False, True, True, True, False),
        )
    ]


def _cause_sheets(mixture: Mixture) -> Sequence[Sheet]:
    arms = list(dict.fromkeys(d.arm for d in mixture.diagnoses))
    return [
        Sheet(
            f"{arm} against the baseline; mix / alone: below 1 the mix adds harm",
            ("Requests", "Metric", "In the mix", "Alone", "Mix / alone", "Cause of harm"),
            tuple(
                (
                    d.segment,
                    metric_words(d.metric),
                    effect_words(d.in_mix),
                    effect_words(d.alone),
                    contrast_words(d.contrast),
                    d.cause,
                )
                for d in mixture.diagnoses
                if d.arm == arm
            ),
            (False, False, False, False, False, False),
        )
        for arm in arms
    ]
