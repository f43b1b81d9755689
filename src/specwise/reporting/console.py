"""The answer in a terminal, in ten seconds: verdict, why, a table, what next, where the report is.

Every judgement has a symbol or a word besides its colour, so that pipes, logs and colour-blind
readers lose nothing; a terminal without Unicode gets ASCII stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rich.box import Box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specwise.analysis.comparison import Effect
from specwise.analysis.experiment import Experiment
from specwise.decision.assessment import Assessment
from specwise.decision.schedule import ScheduleProposal
from specwise.decision.verdict import SegmentVerdict
from specwise.domain import AcceptanceSource, LoadPoint
from specwise.reporting.experiment_sheets import Sheet, findings_of
from specwise.reporting.wording import (
    DECISION_MARKS,
    DECISION_WORDS,
    MARKS,
    MISSING,
    cell_name,
    interval,
    load_phrase,
    percent,
    ratio,
)

COLOURS: Final[Mapping[str, str]] = {  # of decisions and judgements
    "on": "green",
    "on-with-schedule": "green",
    "off": "red",
    "measure-more": "yellow",
    "better": "green",
    "worse": "red",
    "undecided": "dim",
}
_ASCII: Final = str.maketrans(
    {"±": "+-", "▲": "+", "▼": "-", "○": "~", "–": "-", "›": ">", "…": "...", "’": "'", "≤": "<=",
     "≥": ">=", "∞": "inf"}
)  # fmt: skip
_MOST_ROWS: Final = 18  # a longer table is not read in ten seconds: the report has the rest
_INDENT: Final = 2
_NAME_WIDTH: Final = 18
_ARM_WIDTH: Final = 14
_CELL_WIDTH: Final = 20  # "▲ 2.21x [2.06, 2.37]"
_RULED: Final = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
_RULED_ASCII: Final = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

_Cell = tuple[str, str | None]  # workload, segment


def print_assessment(
    assessment: Assessment, console: Console | None = None, report: Path | None = None
) -> None:
    """Print the verdict and its evidence to ``console``, else to standard output.

    ``report`` is the page's path, named last.
    """
    _Printer(console or Console(), assessment).print_all(report)


def print_experiment(experiment: Experiment, console: Console | None = None) -> None:
    """Print what ``experiment`` found to ``console``, else to standard output."""
    console = console or Console()
    found = findings_of(experiment)
    console.print()
    print_indented(console, console_text(console, found.title, "bold"))
    for sentence in found.sentences:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(console_text(console, "–"), console_text(console, sentence))
        print_indented(console, grid)
    for sheet in found.sheets:
        console.print()
        print_indented(console, console_text(console, sheet.title, "bold"))
        print_indented(console, _sheet_table(console, sheet), 1)


def print_indented(console: Console, body: RenderableType, indent: int = _INDENT) -> None:
    """Print ``body`` with ``indent`` spaces before each line."""
    console.print(Padding(body, (0, 0, 0, indent), expand=False), highlight=False)


def print_answer(
    console: Console, answer: str, colour: str, *, about: str, predicted: bool, headline: str
) -> None:
    """Print what every answer begins with: a mark and its words, of what, and why in a sentence."""
    head = console_text(console, answer.upper(), f"bold {colour}")
    head += console_text(console, f"   {about}")
    if predicted:
        head += console_text(console, "   PREDICTED, not measured", "bold yellow")
    console.print()
    print_indented(console, head, 0)
    print_indented(console, console_text(console, headline, "bold"))


def _sheet_table(console: Console, sheet: Sheet) -> Table:
    table = ruled_table(console)
    for column, numeric in zip(sheet.columns, sheet.numeric, strict=True):
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    previous = ""
    for row in sheet.rows:
        first = "" if row[0] == previous and not sheet.numeric[0] else row[0]
        table.add_row(*(console_text(console, cell) for cell in (first, *row[1:])))
        previous = row[0]
    return table


def console_text(console: Console, words: str, style: str = "") -> Text:
    """``words`` as rich text without markup, in ASCII where the console has no Unicode."""
    if "utf" not in console.encoding.lower():
        words = words.translate(_ASCII).encode("ascii", "replace").decode()
    return Text(words, style=style)


def ruled_table(console: Console) -> Table:
    """A table with a rule under its head and nothing else."""
    return Table(
        box=_RULED if "utf" in console.encoding.lower() else _RULED_ASCII,
        padding=(0, 1),
        collapse_padding=True,
        show_edge=False,
        header_style="dim",
    )


class _Printer:
    """One assessment on its way to one console."""

    def __init__(self, console: Console, assessment: Assessment) -> None:
        self.console = console
        self.assessment = assessment
        self.verdict = assessment.verdict
        self.design = assessment.study.design

    def print_all(self, report: Path | None) -> None:
        self.print_verdict()
        self.print_warnings()
        self.print_speedups()
        if self.assessment.experiment is not None:
            print_experiment(self.assessment.experiment, self.console)
        self.print_next()
        if report is not None:
            self.console.print()
            # never wrapped: a path on two lines cannot be clicked or copied
            line = self.text("  Report   ", "bold") + self.text(str(report))
            self.console.print(line, highlight=False, soft_wrap=True)

    def text(self, words: str, style: str = "") -> Text:
        return console_text(self.console, words, style)

    def line(self, body: RenderableType, indent: int = _INDENT) -> None:
        print_indented(self.console, body, indent)

    def labelled(self, label: str, words: str) -> None:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=8, no_wrap=True)
        grid.add_column()
        grid.add_row(self.text(label, "bold"), self.text(words))
        self.line(grid)

    def print_verdict(self) -> None:
        verdict, design = self.verdict, self.design
        print_answer(
            self.console,
            f"{DECISION_MARKS[verdict.decision]} {DECISION_WORDS[verdict.decision]}",
            COLOURS[verdict.decision],
            about=f"{design.production_workload}, {load_phrase(design.production_load)}",
            predicted=self.assessment.study.predicted,
            headline=verdict.headline,
        )
        for reason in verdict.reasons[:2]:
            self.line(self.text(reason))
        if verdict.segments:
            self.console.print()
            grid = Table.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, max_width=self.console.width * 2 // 5)
            grid.add_column()
            inside = [s for s in verdict.segments if s.workload == design.production_workload]
            for segment in inside or verdict.segments:
                self._add_segment(grid, segment)
            self.line(grid)

    def _add_segment(self, grid: Table, segment: SegmentVerdict) -> None:
        mark = self.text(f"{DECISION_MARKS[segment.decision]} ", COLOURS[segment.decision])
        name = cell_name(segment.workload, segment.segment)
        words = DECISION_WORDS[segment.decision]
        arm = f" ({segment.arm})" if segment.arm and segment.decision != "off" else ""
        grid.add_row(
            mark + self.text(name),
            self.text(f"{words}{arm}", "bold") + self.text(f": {segment.reason}"),
        )

    def print_warnings(self) -> None:
        warnings = list(self.assessment.warnings)
        if self.verdict.client_limited:
            warnings.insert(
                0, "The load generator limited this measurement: no verdict rests on it."
            )
        if any(a.source is AcceptanceSource.CHUNKS for a in self.assessment.acceptance):
            warnings.append("Acceptance is an estimate from tokens per chunk for some arms.")
        if warnings:
            self.console.print()
        for warning in warnings:
            grid = Table.grid(padding=(0, 1))
            grid.add_row(self.text("!", "bold yellow"), self.text(warning))
            self.line(grid)

    def print_speedups(self) -> None:
        effects = {
            (e.workload, e.segment, e.arm, e.load): e
            for e in self.assessment.effects
            if e.metric == "speedup"
        }
        if not effects:
            return
        production = self.design.production_workload
        rows: list[tuple[_Cell, str]] = sorted(
            dict.fromkeys(((w, segment), arm) for w, segment, arm, _ in effects),
            key=lambda row: row[0][0] != production,
        )
        left_out = ""
        if len(rows) > _MOST_ROWS:
            own = [row for row in rows if row[0][0] == production]
            rows = (own or rows)[:_MOST_ROWS]
            left_out = "; the rest is in the report"
        loads = self._loads_that_fit(rows, {load for *_, load in effects})
        if len(loads) < len({load for *_, load in effects}):
            left_out = "; the rest is in the report"
        self.console.print()
        title = self.text("Speedup over the baseline, 95 % interval", "bold")
        if self.assessment.study.predicted:
            title += self.text(" (predicted)", "yellow")
        self.line(title)
        self.line(self._speedup_table(rows, loads, effects), 1)
        legend = "  ".join(f"{mark} {word}" for word, mark in MARKS.items())
        self.line(self.text(f"{legend} (interval holds 1)  * production{left_out}", "dim"))

    def _loads_that_fit(
        self, rows: list[tuple[_Cell, str]], measured: set[LoadPoint]
    ) -> list[LoadPoint]:
        """Production and the smallest load first, then the others, as the width allows."""
        names = min(_NAME_WIDTH, max(len(cell_name(*cell)) for cell, _ in rows))
        arms = min(_ARM_WIDTH, max(len(arm) for _, arm in rows))
        gap = 2
        room = max(
            1,
            (self.console.width - names - arms - len("100 %") - 3 * gap - 2) // (_CELL_WIDTH + gap),
        )
        ordered = sorted(measured)
        production = self.design.production_load
        wanted = [load for load in (production, ordered[0]) if load in measured]
        wanted += [load for load in reversed(ordered) if load not in wanted]
        return sorted(set(wanted[:room]))

    def _speedup_table(
        self,
        rows: list[tuple[_Cell, str]],
        loads: list[LoadPoint],
        effects: Mapping[tuple[str, str | None, str, LoadPoint], Effect],
    ) -> Table:
        table = ruled_table(self.console)
        table.add_column("Requests", no_wrap=True, max_width=_NAME_WIDTH)
        table.add_column("Arm", no_wrap=True, max_width=_ARM_WIDTH)
        table.add_column("Acc.", no_wrap=True, justify="right", min_width=len("100 %"))
        for load in loads:
            here = " *" if load == self.design.production_load else ""
            table.add_column(f"{load.label}{here}", no_wrap=True)
        accepted = self._acceptance()
        previous: _Cell | None = None
        for cell, arm in rows:
            table.add_row(
                self.text("" if cell == previous else cell_name(*cell)),
                self.text(arm),
                self.text(percent(accepted.get((*cell, arm)))),
                *(self._effect(effects.get((*cell, arm, load))) for load in loads),
            )
            previous = cell
        return table

    def _acceptance(self) -> Mapping[tuple[str, str | None, str], float | None]:
        """Rate by cell and arm: at the production load where measured, else at the highest."""
        ordered = sorted(
            self.assessment.acceptance,
            key=lambda a: (a.load == self.design.production_load, a.load),
        )
        return {(a.workload, a.segment, a.arm): a.rate for a in ordered}

    def _effect(self, effect: Effect | None) -> Text:
        if effect is None or math.isnan(effect.ratio):
            return self.text(MISSING, "dim")
        return (
            self.text(f"{MARKS[effect.direction]} ", COLOURS[effect.direction])
            + self.text(f"{ratio(effect.ratio)} ")
            + self.text(interval(effect.low, effect.high), "dim")
        )

    def print_next(self) -> None:
        if self.verdict.schedule is not None or self.verdict.next_trials:
            self.console.print()
        if self.verdict.schedule is not None:
            self.labelled("Schedule", _schedule_words(self.verdict.schedule))
        for place, trial in enumerate(self.verdict.next_trials[:3]):
            label = "Next" if place == 0 else ""
            self.labelled(label, f"{trial.what.rstrip('.')}. {trial.why}")


def _schedule_words(proposal: ScheduleProposal) -> str:
    rows = ", ".join(f"k={k} at {first}–{last} running" for first, last, k in proposal.rows)
    state = "" if proposal.confirmed else " (proposed, not measured yet)"
    return f"{proposal.arm}: {rows}{state}."
