"""A change, before and after: in the terminal, as JSON and as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specwise.analysis.before_after import DROP, AcceptanceChange, BeforeAfter
from specwise.analysis.comparison import Effect
from specwise.decision.change import (
    EXIT_CODES,
    RULE,
    ChangeVerdict,
    Outcome,
    points,
)
from specwise.domain import StudyData
from specwise.reporting import wording
from specwise.reporting.console import (
    console_text,
    print_answer,
    print_indented,
    ruled_table,
)
from specwise.reporting.export import whole_file
from specwise.reporting.html import page_template
from specwise.reporting.json_export import SCHEMA_VERSION, json_types, without_secrets
from specwise.reporting.wording import MARKS, MISSING, cell_name, interval, load_phrase, ratio

OUTCOME_WORDS: Final[Mapping[Outcome, str]] = {
    Outcome.FELL: "Acceptance fell",
    Outcome.SLOWER: "Slower",
    Outcome.CANNOT_TELL: "Cannot tell yet",
    Outcome.NO_HARM: "No harm",
}
OUTCOME_MARKS: Final[Mapping[Outcome, str]] = {
    Outcome.FELL: MARKS["worse"],
    Outcome.SLOWER: MARKS["worse"],
    Outcome.CANNOT_TELL: MARKS["undecided"],
    Outcome.NO_HARM: MARKS["better"],
}
_COLOURS: Final = {0: "green", 1: "red", 3: "yellow"}
_DIRECTIONS: Final = {"fell": "worse", "held": "better", "cannot tell": "undecided"}
VERDICT_WORDS: Final = {"fell": "yes", "held": "no", "cannot tell": "cannot tell"}
TIMES: Final = (  # metric, how it reads; each is after / before but the first
    ("speedup", "Speed"),
    ("ttft_p50", "TTFT P50"),
    ("ttft_p99", "TTFT P99"),
    ("tpot_p50", "TPOT P50"),
    ("tpot_p99", "TPOT P99"),
    ("output_tokens_per_s", "Output tokens/s"),
    ("goodput_per_s", "Goodput"),
)


def change_to_dict(change: BeforeAfter, verdict: ChangeVerdict) -> dict[str, Any]:
    """Everything that `compare` found, as JSON types; no prompt, no output, no secret."""
    return {
        "schema_version": SCHEMA_VERSION,
        "predicted": change.before.predicted or change.after.predicted,
        "outcome": verdict.outcome.value,
        "exit_code": EXIT_CODES[verdict.outcome],
        "headline": verdict.headline,
        "reasons": list(verdict.reasons),
        "advice": list(verdict.advice),
        "rule": RULE,
        "before": _study(change.before),
        "after": _study(change.after),
        "acceptance": [
            json_types(a)
            | {"estimate": json_types(a.estimate) | {"difference": a.estimate.difference}}
            for a in change.acceptance
        ],
        "effects": json_types(change.effects),
        "speedups": [json_types(s) | {"direction": s.direction} for s in change.speedups],
        "controls": list(change.controls),
        "differences": without_secrets(json_types(change.differences)),
        "cautions": list(change.cautions),
    }


def _study(study: StudyData) -> dict[str, Any]:
    return {
        "folder": study.folder,
        "name": study.design.name,
        "started_at": study.provenance.get("started_at"),
        "specwise": study.provenance.get("specwise"),
    }


# ---------------------------------------------------------------------------------------------
# Terminal


def print_change(
    change: BeforeAfter,
    verdict: ChangeVerdict,
    console: Console | None = None,
    page: Path | None = None,
) -> None:
    """Print verdict and evidence to ``console``, else to standard output; ``page`` named last."""
    _Printer(console or Console(), change, verdict).print_all(page)


@dataclass(frozen=True, slots=True)
class _Printer:
    """One change on its way to one console."""

    console: Console
    change: BeforeAfter
    verdict: ChangeVerdict

    def print_all(self, page: Path | None) -> None:
        change, verdict = self.change, self.verdict
        print_answer(
            self.console,
            f"{OUTCOME_MARKS[verdict.outcome]} {OUTCOME_WORDS[verdict.outcome]}",
            _COLOURS[EXIT_CODES[verdict.outcome]],
            about=f"{change.before.design.name} to {change.after.design.name}",
            predicted=change.before.predicted or change.after.predicted,
            headline=verdict.headline,
        )
        self.listed("Do", verdict.advice)
        self.print_acceptance()
        self.print_times()
        self.listed("!", change.cautions, style="bold yellow")
        self.listed("Changed", changes(change) or ["nothing that the manifests know"])
        if page is not None:
            self.console.print()
            line = self.text("  Page     ", "bold") + self.text(str(page))
            self.console.print(line, highlight=False, soft_wrap=True)

    def text(self, words: str, style: str = "") -> Text:
        return console_text(self.console, words, style)

    def line(self, body: Text | Table, indent: int = 2) -> None:
        print_indented(self.console, body, indent)

    def listed(self, label: str, sentences: Sequence[str], style: str = "bold") -> None:
        if sentences:
            self.console.print()
        for place, words in enumerate(sentences):
            grid = Table.grid(padding=(0, 1))
            grid.add_column(width=8, no_wrap=True)
            grid.add_column()
            shown = label if place == 0 or label == "!" else ""
            grid.add_row(self.text(shown, style), self.text(words))
            self.line(grid)

    def print_acceptance(self) -> None:
        shown = self.change.acceptance
        arms = list(dict.fromkeys(a.arm for a in shown))
        units = {a.unit for a in shown}
        self.console.print()
        of = f" of {arms[0]}" if len(arms) == 1 else ""
        title = f"Acceptance{of}, accepted / drafted tokens, 95 % interval"
        self.line(self.text(title, "bold"))
        table = ruled_table(self.console)
        table.add_column("Segment", no_wrap=True, max_width=16)
        if not of:
            table.add_column("Arm", no_wrap=True, max_width=14)
        table.add_column("Before", no_wrap=True, justify="right")
        table.add_column("After", no_wrap=True, justify="right")
        table.add_column("Points", no_wrap=True)
        table.add_column(f"Drop > {DROP * 100:.0f}?", no_wrap=True)
        table.add_column(units.pop().title() if len(units) == 1 else "n", justify="right")
        table.add_column("Same out.", no_wrap=True, justify="right")
        for a in shown:
            direction = _DIRECTIONS[a.verdict]
            cells = [
                self.text(a.segment),
                *([] if of else [self.text(a.arm)]),
                self.text(wording.percent(a.estimate.before, 1)),
                self.text(wording.percent(a.estimate.after, 1)),
                self.text(points_with_interval(a)),
                self.text(f"{MARKS[direction]} {VERDICT_WORDS[a.verdict]}", _style(direction)),
                self.text(str(a.units)),
                self.text(
                    MISSING if a.same_outputs is None else "{} of {}".format(*a.same_outputs)
                ),
            ]
            table.add_row(*cells)
        self.line(table, 1)
        for note in dict.fromkeys(a.note for a in shown if a.note):
            self.line(self.text(f"{note[0].upper()}{note[1:]}.", "dim"))

    def print_times(self) -> None:
        rows = production_effects(self.change)
        if not rows:
            return
        design = self.change.after.design
        self.console.print()
        place = f"{design.production_workload}, {load_phrase(design.production_load)}"
        self.line(self.text(f"Times, after / before: {place}", "bold"))
        table = ruled_table(self.console)
        table.add_column("Metric", no_wrap=True)
        for arm in rows:
            table.add_column(self.text(arm), no_wrap=True)
        for metric, label in TIMES:
            effects = [held.get(metric) for held in rows.values()]
            table.add_row(self.text(label), *(self._effect(e) for e in effects))
        self.line(table, 1)
        legend = "Speed: time per output token before / after; above 1 is faster"
        self.line(self.text(legend, "dim"))
        for s in self.change.speedups:
            if (s.workload, s.load) == (design.production_workload, design.production_load):
                words = (
                    f"{s.arm} over its own baseline (free of drift): {ratio(s.before.ratio)} "
                    f"before, {ratio(s.after.ratio)} after, {ratio(s.ratio)} "
                    f"{interval(s.low, s.high)} {MARKS[s.direction]} {s.direction}"
                )
                self.line(self.text(words))

    def _effect(self, effect: Effect | None) -> Text:
        if effect is None or math.isnan(effect.ratio):
            return self.text(MISSING, "dim")
        words = f"{MARKS[effect.direction]} {effect.ratio:.2f} "
        return self.text(words, _style(effect.direction)) + self.text(
            interval(effect.low, effect.high), "dim"
        )


def _style(direction: str) -> str:
    return {"better": "green", "worse": "red"}.get(direction, "dim")


def points_with_interval(change: AcceptanceChange) -> str:
    """``-7.3 [-9.1, -5.5]``, in percentage points."""
    e = change.estimate
    words = points(e.difference)
    return words if math.isnan(e.low) else f"{words} [{points(e.low)}, {points(e.high)}]"


def changes(change: BeforeAfter) -> list[str]:
    """Each thing that changed, once, with the arms it changed for."""
    arms: dict[tuple[str, str, str], list[str]] = {}
    for d in change.differences:
        if d.effect == "change":
            arms.setdefault((d.what, d.before, d.after), []).append(d.where.removeprefix("arm "))
    return [
        str(without_secrets(f"{what}: {before} to {after} ({', '.join(names)})"))
        for (what, before, after), names in arms.items()
    ]


def production_effects(change: BeforeAfter) -> dict[str, dict[str, Effect]]:
    """Effects of the second study's production cell, by arm and metric."""
    design = change.after.design
    wanted = (design.production_workload, None, design.production_load)
    found: dict[str, dict[str, Effect]] = {}
    for e in change.effects:
        if (e.workload, e.segment, e.load) == wanted:
            found.setdefault(e.arm, {})[e.metric] = e
    return found


# ---------------------------------------------------------------------------------------------
# Page


@dataclass(frozen=True, slots=True)
class _Strip:
    """One row of the interval chart, in percent of its width."""

    low: float
    high: float
    middle: float


def write_change(change: BeforeAfter, verdict: ChangeVerdict, path: Path) -> None:
    """Write the page of a change to ``path``; StoreError when it cannot be written."""
    page = render_change(change, verdict)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_change(change: BeforeAfter, verdict: ChangeVerdict) -> str:
    """The page as text: the answer, what to do, the evidence, what changed."""
    design = change.after.design
    edges = _edges(change.acceptance)
    cells = dict.fromkeys((e.workload, e.segment, e.load, e.arm) for e in change.effects)
    by_cell = {(e.workload, e.segment, e.load, e.arm, e.metric): e for e in change.effects}
    return page_template("compare.html").render(
        w=wording,
        change=change,
        verdict=verdict,
        outcome_words=OUTCOME_WORDS,
        outcome_marks=OUTCOME_MARKS,
        badge={0: "on", 1: "off", 3: "measure-more"}[EXIT_CODES[verdict.outcome]],
        rule=RULE,
        predicted=change.before.predicted or change.after.predicted,
        directions=_DIRECTIONS,
        verdict_words=VERDICT_WORDS,
        points=points,
        points_with_interval=points_with_interval,
        strips=[_strip(a, edges) for a in change.acceptance],
        zero=_place(0.0, edges),
        line=_place(-DROP, edges),
        edges=edges,
        production=production_effects(change),
        times=TIMES,
        place=f"{design.production_workload} at {load_phrase(design.production_load)}",
        cells=[
            (
                cell_name(workload, segment),
                load,
                arm,
                [by_cell.get((workload, segment, load, arm, metric)) for metric, _ in TIMES],
            )
            for workload, segment, load, arm in cells
        ],
        studies=[_study(study) for study in (change.before, change.after)],
        hidden=without_secrets,
    )


def _edges(acceptance: Sequence[AcceptanceChange]) -> tuple[float, float]:
    """The chart's range: 0 and the rule's line inside it, every interval too where it is sane."""
    ends = [0.02, -2 * DROP]
    for a in acceptance:
        ends += [e for e in (a.estimate.low, a.estimate.high) if math.isfinite(e)]
    low, high = max(-1.0, min(ends)), min(1.0, max(ends))
    margin = (high - low) * 0.04
    return low - margin, high + margin


def _place(value: float, edges: tuple[float, float]) -> float:
    low, high = edges
    return 100 * (min(max(value, low), high) - low) / (high - low)


def _strip(change: AcceptanceChange, edges: tuple[float, float]) -> _Strip | None:
    e = change.estimate
    if math.isnan(e.low):
        return None
    return _Strip(_place(e.low, edges), _place(e.high, edges), _place(e.difference, edges))
