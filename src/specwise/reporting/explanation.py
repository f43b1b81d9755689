"""The explanation of a verdict in a terminal: numbered steps, conditions, commands."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding

from specwise.decision.explanation import Explanation
from specwise.decision.rules import Condition
from specwise.reporting.console import console_text
from specwise.reporting.wording import STATUS_MARKS

_STYLES = {"pass": "green", "fail": "red", "unknown": "yellow"}


def print_explanation(found: Explanation, console: Console | None = None) -> None:
    """Print ``found`` to ``console``, else to standard output."""
    console = console or Console()

    def line(words: str, indent: int = 2, style: str = "") -> None:
        body = Padding(console_text(console, words, style), (0, 0, 0, indent), expand=False)
        console.print(body, highlight=False)

    console.print()
    line(found.question, 0, "bold")
    for number, step in enumerate(found.steps, 1):
        line(f"{number}. {step.title}", 0, "bold")
        for words in step.lines:
            line(words, 3)
    line(f"Answer: {found.answer}", 0, "bold")
    for title, conditions in groups(found):
        console.print()
        line(f"{title} ({len(conditions)})", 0, "bold")
        for held in conditions:
            _condition(console, held)
    console.print()
    line("Recompute it from the raw records", 0, "bold")
    for command in found.recompute:
        # never wrapped: a command on two lines cannot be pasted
        console.print(console_text(console, f"  {command}"), highlight=False, soft_wrap=True)


def groups(found: Explanation) -> list[tuple[str, Sequence[Condition]]]:
    """The conditions under their headings, empty groups left out."""
    named: list[tuple[str, Sequence[Condition]]] = [
        ("Ruled out by", found.ruled_out),
        ("Against", found.against),
        ("Nobody knows yet", found.unknown),
        ("For", found.supports),
    ]
    return [(title, held) for title, held in named if held]


def _condition(console: Console, held: Condition) -> None:
    mark = STATUS_MARKS[held.status]
    scope = f" ({held.scope})" if held.scope else ""
    words = console_text(console, f"{mark} ", _STYLES[held.status])
    words += console_text(console, f"{held.id}{scope} ", "bold")
    words += console_text(console, f"{held.question} {held.value}; asked for: {held.threshold}.")
    if held.kind != "measured":
        words += console_text(console, f" [{held.kind}]", "dim")
    if held.advice:
        words += console_text(console, f" -> {held.advice}", "dim")
    console.print(Padding(words, (0, 0, 0, 2), expand=False), highlight=False)
