"""The answer of `specwise verify` in a terminal: verdict, what was seen, what could have been."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specwise.domain import (
    GreedyComparison,
    GreedyDifference,
    Losslessness,
    LosslessnessResult,
    SamplingComparison,
)
from specwise.reporting.wording import MISSING, number

_HEADS = {
    Losslessness.UNCHANGED: ("✓ UNCHANGED", "bold green"),
    Losslessness.CHANGED: ("✗ CHANGED", "bold red"),
    Losslessness.UNKNOWN: ("? CANNOT TELL", "bold yellow"),
}
_NEAR_TIE_WORDS = {True: "near-tie", False: "a change", None: "cannot tell"}
_ASCII = str.maketrans({"✓": "+", "✗": "x", "–": "-", "×": "x"})
_MOST_DIFFERENCES = 6


def print_losslessness(result: LosslessnessResult, console: Console | None = None) -> None:
    """Print one arm's result to ``console``, else to standard output."""
    _Printer(console or Console()).print_all(result)


class _Printer:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.unicode = "utf" in console.encoding.lower()

    def print_all(self, result: LosslessnessResult) -> None:
        head, style = _HEADS[result.verdict]
        self.console.print()
        title = self.text(head, style)
        title += self.text(f"   arm {result.arm} against the baseline, {result.model}")
        self.console.print(title, highlight=False)
        for reason in result.reasons:
            self.block(self.text(reason))
        facts = Table.grid(padding=(0, 2))
        facts.add_column(no_wrap=True)
        facts.add_column()
        for label, words in _facts(result):
            facts.add_row(self.text(label, "bold"), self.text(words))
        self.console.print()
        self.block(facts)
        if result.greedy and result.greedy.differences:
            head_row = ("outputs part at", "token", "gap on baseline", "on candidate", "")
            self.table(head_row, _difference_rows(result.greedy))
        if result.sampling:
            self.table(
                ("test", "statistic", "by chance", "p", "p (Holm)"), _test_rows(result.sampling)
            )
            self.table(
                ("token", "total variation", "equal servers show", ""),
                _position_rows(result.sampling),
            )

    def text(self, words: str, style: str = "") -> Text:
        if not self.unicode:
            words = words.translate(_ASCII).encode("ascii", "replace").decode()
        return Text(words, style=style)

    def block(self, body: RenderableType) -> None:
        self.console.print(Padding(body, (0, 0, 0, 2), expand=False), highlight=False)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table.grid(padding=(0, 3))
        for column in range(len(head)):
            table.add_column(justify="left" if column in (0, len(head) - 1) else "right")
        table.add_row(*(self.text(words, "dim") for words in head))
        for row in rows:
            table.add_row(*(self.text(words) for words in row))
        self.console.print()
        self.block(table)


def _facts(result: LosslessnessResult) -> list[tuple[str, str]]:
    facts = []
    if result.greedy:
        facts.append(("greedy", _greedy_line(result.greedy)))
    if result.sampling:
        facts.append(("sampling", _sampling_line(result.sampling)))
        facts.append(("power", _power_line(result.sampling)))
    facts.append(("drafts", _drafts_line(result)))
    return facts


def _greedy_line(greedy: GreedyComparison) -> str:
    parts = [f"{greedy.equal} of {greedy.prompts} outputs equal ({greedy.tokens:,} tokens)"]
    if greedy.self_differing is not None:
        same = greedy.prompts - greedy.self_differing
        parts.append(f"the baseline agrees with itself in {same}")
    if greedy.logprob_noise is not None:
        parts.append(f"logprob noise {number(greedy.logprob_noise, 2)} nats")
    return "; ".join(parts)


def _sampling_line(sampling: SamplingComparison) -> str:
    nucleus = f", top-p {sampling.top_p:g}" if sampling.top_p < 1 else ""
    return (
        f"{sampling.prompts} prompts × {sampling.samples} samples × {sampling.tokens} tokens from "
        f"each server, temperature {sampling.temperature:g}{nucleus}"
    )


def _power_line(sampling: SamplingComparison) -> str:
    smallest = ""
    if sampling.detectable is not None:
        smallest = f"; smallest found with {sampling.power_wanted:g}: {sampling.detectable:.2g}"
    return (
        f"total variation {sampling.effect:g} at every speculated token: found with probability "
        f"{sampling.power:.2f}{smallest}; false alarms {sampling.false_alarm_rate:.2g}"
    )


def _drafts_line(result: LosslessnessResult) -> str:
    if result.drafted_tokens is None:
        return "not told by the candidate's /metrics: make sure that it speculates"
    accepted = result.accepted_tokens or 0
    share = f" ({accepted / result.drafted_tokens:.0%})" if result.drafted_tokens else ""
    return f"{result.drafted_tokens:,} drafted, {accepted:,} accepted{share} during the check"


def _difference_rows(greedy: GreedyComparison) -> list[tuple[str, ...]]:
    """The weightiest differences first."""

    def weight(difference: GreedyDifference) -> tuple[bool, float]:
        return difference.near_tie is True, -(difference.baseline_gap or 0.0)

    rows: list[tuple[str, ...]] = [
        (
            difference.prompt_id,
            str(difference.position + 1),
            _nats(difference.baseline_gap),
            _nats(difference.candidate_gap),
            _NEAR_TIE_WORDS[difference.near_tie],
        )
        for difference in sorted(greedy.differences, key=weight)
    ]
    if len(rows) > _MOST_DIFFERENCES:
        more = f"and {len(rows) - _MOST_DIFFERENCES} more"
        rows = [*rows[:_MOST_DIFFERENCES], (more, "", "", "", "")]
    return rows


def _nats(gap: float | None) -> str:
    return MISSING if gap is None else f"{gap:.4f} nats"


def _test_rows(sampling: SamplingComparison) -> list[tuple[str, ...]]:
    return [
        (
            test.name,
            number(test.statistic),
            number(test.null_mean),
            f"{test.p_value:.2g}",
            f"{test.p_adjusted:.2g}"
            + (" differs" if test.p_adjusted <= sampling.false_alarm_rate else ""),
        )
        for test in sampling.tests
    ]


def _position_rows(sampling: SamplingComparison) -> list[tuple[str, ...]]:
    return [
        (
            str(at.position + 1),
            f"{at.distance:.3f}",
            f"{at.null_low:.3f} to {at.null_high:.3f}",
            ("above" if at.distance > at.null_high else "")
            + (" (no draft touches the first token)" if at.position == 0 else ""),
        )
        for at in sampling.positions
    ]
