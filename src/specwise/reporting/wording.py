"""How numbers, loads and judgements read: the same words in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from specwise.domain import AcceptanceSource, LoadPoint, Loop, Speculation

MISSING = "–"

# Each judgement has a symbol and a word, so that neither colour nor a font is needed to read it.
MARKS: Mapping[str, str] = {"better": "▲", "worse": "▼", "undecided": "○"}
STATUS_MARKS: Mapping[str, str] = {"pass": "✓", "fail": "✗", "unknown": "?"}
STATUS_WORDS: Mapping[str, str] = {"pass": "met", "fail": "not met", "unknown": "unknown"}
DECISION_WORDS: Mapping[str, str] = {
    "on": "Turn it on",
    "on-with-schedule": "Turn it on, with a schedule",
    "off": "Leave it off",
    "measure-more": "Measure more",
}
DECISION_MARKS: Mapping[str, str] = {
    "on": "▲",
    "on-with-schedule": "▲",
    "off": "▼",
    "measure-more": "○",
}
SOURCE_WORDS: Mapping[AcceptanceSource, str] = {
    AcceptanceSource.PER_REQUEST: "the server's figures for each request",
    AcceptanceSource.COUNTERS: "the server's counters, differences over the trial",
    AcceptanceSource.CHUNKS: "estimated from tokens per streamed chunk",
}


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, thousands separated, never in powers of ten."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def ratio(value: float | None) -> str:
    """A ratio with two decimals: ``1.34x``."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}x"


def interval(low: float | None, high: float | None) -> str:
    """An interval of ratios: ``[1.21, 1.49]``; empty when there is none."""
    if low is None or high is None or not (math.isfinite(low) or math.isfinite(high)):
        return ""
    return f"[{_bound(low)}, {_bound(high)}]"


def _bound(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def milliseconds(value_s: float | None) -> str:
    """Seconds as milliseconds without the unit, three significant digits or whole."""
    return number(None if value_s is None else value_s * 1000)


def percent(share: float | None, decimals: int = 0) -> str:
    """A share as ``81 %``."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{share * 100:.{decimals}f} %"


def load_phrase(load: LoadPoint) -> str:
    """A load point in words: ``16 concurrent clients`` or ``2.5 requests/s (poisson)``."""
    if load.loop is Loop.CLOSED:
        return f"{load.value:g} concurrent client{'' if load.value == 1 else 's'}"
    return f"{load.value:g} requests/s" + (f" ({load.arrivals})" if load.arrivals else "")


def load_axis(loop: Loop) -> str:
    """What a load axis of this loop counts."""
    return "concurrent clients" if loop is Loop.CLOSED else "requests per second"


def cell_name(workload: str, segment: str | None) -> str:
    """A workload, or one segment inside it: ``mix`` or ``mix › json``."""
    return workload if segment is None or segment == workload else f"{workload} › {segment}"


def speculation_phrase(speculation: Speculation | None) -> str:
    """How an arm speculates, in a few words."""
    if speculation is None:
        return "no speculation"
    words = f"{speculation.method}, k={speculation.k}"
    return f"{words}, scheduled" if speculation.schedule else words


def metric_words(metric: str) -> str:
    """A metric's name for people: ``ttft_p99`` reads "TTFT P99"."""
    kind, _, statistic = metric.partition("_")
    if kind in ("ttft", "tpot", "e2e"):
        return f"{kind.upper()} {statistic.upper() if statistic != 'mean' else 'mean'}"
    return {"output_tokens_per_s": "output tokens/s"}.get(metric, metric.replace("_", " "))


def fitted(text: str, width_px: float, *, bold: bool = False) -> str:
    """``text`` with its middle left out so that it fits ``width_px`` at the charts' font size.

    Judged by a wide typeface, because the reader's is unknown.
    """
    room = int(width_px / (8.8 if bold else 7.9))
    if len(text) <= room:
        return text
    head = (room - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"
