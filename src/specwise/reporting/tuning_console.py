"""A tuning in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from specwise.decision.confirmation import Confirmation, ConfirmedLoad
from specwise.decision.deployment import Tuned
from specwise.decision.findings import counted
from specwise.decision.standing import ArmStanding
from specwise.decision.ways import KEPT
from specwise.reporting.console import (
    COLOURS,
    console_text,
    print_answer,
    print_indented,
    ruled_table,
)
from specwise.reporting.tuning_view import (
    HOLDS_WORDS,
    STOPPED_WORDS,
    TuningView,
    batch_span,
    holds,
    minutes,
    slowed_words,
)
from specwise.reporting.wording import (
    DECISION_MARKS,
    DECISION_WORDS,
    MARKS,
    MISSING,
    interval,
    percent,
    ratio,
)


def print_tuning(tuned: Tuned, console: Console | None = None, report: Path | None = None) -> None:
    """Print the answer, the schedule, a line for each load, what is left to lose, and what next.

    ``report`` is the page's path.
    """
    _Printer(console or Console(), TuningView(tuned)).print_all(report)


class _Printer:
    """One tuning on its way to one console."""

    def __init__(self, console: Console, view: TuningView) -> None:
        self.console = console
        self.view = view
        self.tuned = view.tuned

    def text(self, words: str, style: str = "") -> Text:
        return console_text(self.console, words, style)

    def line(self, body: RenderableType, indent: int = 2) -> None:
        print_indented(self.console, body, indent)

    def print_all(self, report: Path | None) -> None:
        view, answer = self.view, self.tuned.recommendation
        print_answer(
            self.console,
            f"{DECISION_MARKS[answer.decision]} {DECISION_WORDS[answer.decision]}",
            COLOURS[answer.decision],
            about=f"{view.production}, {view.loads[0].label} to {view.loads[-1].label}",
            predicted=self.tuned.search.predicted,
            headline=answer.headline,
        )
        for reason in answer.reasons[:3]:
            self.line(self.text(reason))
        if answer.routing:
            self.line(self.text(answer.routing))
        if answer.schedule:
            self._schedule(answer.schedule)
        if view.deployed is not None:
            self._confirmed(view.deployed)
        else:
            self._believed()
        self.console.print()
        facts = Table.grid(padding=(0, 1))
        facts.add_column(width=8, no_wrap=True)
        facts.add_row(self.text("Regret", "bold"), self.text(_regret_words(view)))
        facts.add_row(self.text("Time", "bold"), self.text(_time_words(view)))
        if self.tuned.standing.slowed:
            words = slowed_words(self.tuned.standing)
            facts.add_row(self.text("Left out", "bold"), self.text(words))
        self.line(facts)
        for place, command in enumerate(view.next_steps(view.folder(report))):
            self.labelled("" if place else "Next", command)
        if report is not None:
            self.labelled("Report", str(report))

    def labelled(self, label: str, words: str) -> None:
        # never wrapped: a path or command on two lines cannot be clicked or copied
        line = self.text(f"  {label:<8} ", "bold") + self.text(words)
        self.console.print(line, highlight=False, soft_wrap=True)

    def _schedule(self, rows: Sequence[tuple[int, int, int]]) -> None:
        table = ruled_table(self.console)
        table.add_column(self.text("Running requests"), no_wrap=True)
        for first, last, _ in rows:
            table.add_column(self.text(batch_span(first, last)), justify="right", no_wrap=True)
        table.add_row(self.text("Draft length k"), *(self.text(str(k)) for *_, k in rows))
        self.console.print()
        self.line(table, 1)

    def _confirmed(self, deployed: Confirmation) -> None:
        static = deployed.static_arm if deployed.schedule else None
        table = ruled_table(self.console)
        table.add_column("Load", no_wrap=True)
        table.add_column("Off", no_wrap=True)
        if static is not None:
            table.add_column(self.text(static), no_wrap=True)
        table.add_column(self.text(deployed.arm), no_wrap=True)
        table.add_column(self.text(f"Keeps {KEPT:g}"), no_wrap=True)
        for row in self.view.rows:
            cells = [self.text(row.load.label), self.text("1.00")]
            if static is not None:
                cells.append(self._effect(row.static))
            cells.append(self._effect(row.deployed))
            held = holds(row.deployed) if row.deployed is not None else ""
            cells.append(
                self.text(f"{MARKS[held]} {HOLDS_WORDS[held]}", COLOURS[held])
                if held
                else self.text("not measured", "dim")
            )
            table.add_row(*cells)
        self.console.print()
        self.line(self.text("Speed against off, on new requests, 95 % interval", "bold"))
        self.line(table, 1)

    def _effect(self, cell: ConfirmedLoad | None) -> Text:
        if cell is None or math.isnan(cell.to_baseline.ratio):
            return self.text(MISSING, "dim")
        effect = cell.to_baseline
        return (
            self.text(f"{MARKS[effect.direction]} ", COLOURS[effect.direction])
            + self.text(f"{ratio(effect.ratio)} ")
            + self.text(interval(effect.low, effect.high), "dim")
        )

    def _believed(self) -> None:
        table = ruled_table(self.console)
        for name in ("Load", "Best so far", "Gain over off", "May lose", "Rests on"):
            table.add_column(name, no_wrap=True)
        for cell in self.view.ours:
            best = next(a for a in cell.arms if a.arm == cell.best)
            is_off = best.arm == self.view.design.arms[0].name
            span = "" if is_off else f" {interval(best.low, best.high)}"
            table.add_row(
                self.text(cell.load.label),
                self.text(cell.best),
                self.text(ratio(best.gain) + span),
                self.text(f"at most {percent(cell.regret_bound, 1)}"),
                self.text("off itself", "dim") if is_off else self.text(*_rests(best)),
            )
        self.console.print()
        self.line(self.text("What the search believes; nothing is confirmed", "bold"))
        self.line(table, 1)


def _rests(standing: ArmStanding) -> tuple[str, str]:
    """What an arm's figure in a cell rests on, and its style in a terminal."""
    if standing.trials == 0:
        return "predicted, not run", "yellow"
    return f"{counted(standing.trials, 'trial')} here", ""


def _regret_words(view: TuningView) -> str:
    tuned = view.tuned
    return (
        f"at most {percent(tuned.standing.regret_bound, 1)} of goodput, averaged over "
        f"{len(view.cells)} cells (tolerance {percent(tuned.tolerance, 1)}); "
        f"{STOPPED_WORDS[tuned.stopped]}"
    )


def _time_words(view: TuningView) -> str:
    time = view.time
    words = (
        f"{minutes(time.search_s)} for {counted(len(view.steps), 'trial')} and "
        f"{counted(time.starts, 'server start')} ({minutes(time.starts_s)}), "
        f"{percent(time.share)} of the whole sweep (about {minutes(time.sweep_s)})"
    )
    if time.confirming:
        words += (
            f"; then {minutes(time.confirming_s)} for {counted(time.confirming, 'trial')} "
            "that confirm"
        )
    return words
