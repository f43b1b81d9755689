"""What tap's records alone can decide, and what they cannot.

They tell how much of what was drafted is accepted, for whom, and whether that is still what a study
measured. They cannot tell what the requests would have taken without speculation: nobody served
them that way. So there is no verdict "on" from records alone, however good acceptance looks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specwise.analysis.latency import Percentiles, percentiles
from specwise.decision.verdict import Decision
from specwise.domain import Outcome
from specwise.monitoring.expectations import (
    HEALTHY_RATE,
    MEANINGFUL_DROP,
    UNHEALTHY_RATE,
    Expectations,
    request_spread,
)
from specwise.monitoring.tap_records import TapRecord

_FEW = 30
"""Fewer requests than this say little about a P10."""
_WIN_RATE = 0.65  # req B2: above, likely a win; between 0.5 and it, break-even


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one kind. ``kind`` is "all", "segment" or "temperature" (bucket).

    ``rate`` is accepted / drafted tokens over the ``with_acceptance`` requests that tell it, with
    its 95 % interval (ratio estimator, see `monitoring.expectations.Spread`); ``p10`` to ``p90``
    are of the single requests' rates and ``below_half`` the share of them under 0.5 (req G1). All
    are None where no request tells. ``expected_rate`` is the study's; ``advice`` says what to do.
    """

    kind: str
    name: str
    requests: int
    failed: int
    with_acceptance: int
    drafted_tokens: int
    accepted_tokens: int
    rate: float | None
    low: float | None
    high: float | None
    p10: float | None
    p50: float | None
    p90: float | None
    below_half: float | None
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    temperature: float | None
    expected_rate: float | None
    health: str
    advice: str


@dataclass(frozen=True, slots=True)
class Production:
    """The judgement: ``holds`` is True or False where a study's verdict stands or fell, else None.

    ``answer`` is one sentence, ``next_study`` what to measure, a line each. ``in_flight`` is the
    mean number of requests in the server (Little's law over the recorded span).
    """

    groups: tuple[Group, ...]
    span_s: float
    requests_per_s: float
    in_flight: float
    study: str | None
    holds: bool | None
    answer: str
    next_study: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 the study's verdict stands, 1 it does not, 3 not decidable from records alone."""
        return {True: 0, False: 1, None: 3}[self.holds]


def judge_production(
    records: Sequence[TapRecord], expected: Expectations | None = None
) -> Production:
    """What ``records`` say, against a study where ``expected`` is given."""
    segments = {s.segment: s.rate for s in expected.segments} if expected else {}
    groups = [_group("all", "all", records, expected.rate if expected else None, expected)]
    for kind, key in _KINDS:
        names = Counter(key(record) for record in records)
        for name, _ in names.most_common():
            held = [record for record in records if key(record) == name]
            of_study = segments.get(name) if kind == "segment" else None
            groups.append(_group(kind, name, held, of_study, expected))
    begin = min(r.at for r in records)
    span_s = max(r.at + r.e2e_s for r in records) - begin
    holds, answer = _answer(groups, expected)
    rate_per_s = len(records) / span_s if span_s > 0 else 0.0
    in_flight = sum(r.e2e_s for r in records) / span_s if span_s > 0 else 0.0
    return Production(
        groups=tuple(groups),
        span_s=span_s,
        requests_per_s=rate_per_s,
        in_flight=in_flight,
        study=expected.study if expected else None,
        holds=holds,
        answer=answer,
        next_study=() if holds else _next_study(groups, rate_per_s, in_flight),
    )


_KINDS: tuple[tuple[str, Callable[[TapRecord], str]], ...] = (
    ("segment", lambda record: record.segment),
    ("temperature", lambda record: record.bucket),
)


def _group(
    kind: str,
    name: str,
    records: Sequence[TapRecord],
    expected_rate: float | None,
    expected: Expectations | None,
) -> Group:
    counts = [r.acceptance for r in records if r.rate is not None and r.acceptance is not None]
    drafted = sum(c.drafted_tokens or 0 for c in counts)
    accepted = sum(c.accepted_tokens for c in counts)
    rate = accepted / drafted if drafted else None
    spread = request_spread(r.request_record(i, r.at) for i, r in enumerate(records))
    margin = 1.96 * spread.deviation / math.sqrt(spread.requests) if spread else None
    rates = np.array([r.rate for r in records if r.rate is not None], float)
    p10, p50, p90 = np.quantile(rates, [0.1, 0.5, 0.9]) if len(rates) else (None, None, None)
    below_half = float((rates < UNHEALTHY_RATE).mean()) if len(rates) else None
    low = max(0.0, rate - margin) if rate is not None and margin is not None else None
    high = min(1.0, rate + margin) if rate is not None and margin is not None else None
    temperatures = [r.temperature for r in records if r.temperature is not None]
    return Group(
        kind=kind,
        name=name,
        requests=len(records),
        failed=sum(r.outcome not in (Outcome.OK, Outcome.CANCELLED) for r in records),
        with_acceptance=len(rates),
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        rate=rate,
        low=low,
        high=high,
        p10=_float(p10),
        p50=_float(p50),
        p90=_float(p90),
        below_half=below_half,
        ttft_s=percentiles(_column(r.ttft_s for r in records)),
        tpot_s=percentiles(_column(r.tpot_s for r in records)),
        temperature=float(np.median(temperatures)) if temperatures else None,
        expected_rate=expected_rate,
        health=_health(rate),
        advice=_advice(
            rate,
            (low, high) if low is not None and high is not None else None,
            below_half or 0.0,
            told=len(rates),
            break_even=expected.low_rate if expected else UNHEALTHY_RATE,
            expected_rate=expected_rate,
        ),
    )


def _column(values: Iterable[float | None]) -> Any:
    return np.array([math.nan if v is None else v for v in values], float)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _health(rate: float | None) -> str:
    if rate is None:
        return "unknown"
    if rate < UNHEALTHY_RATE:
        return "unhealthy"
    return "healthy" if rate >= HEALTHY_RATE else "middling"


def _advice(
    rate: float | None,
    interval: tuple[float, float] | None,
    below_half: float,
    *,
    told: int,
    break_even: float,
    expected_rate: float | None,
) -> str:
    if rate is None:
        return "no request told its acceptance"
    if interval is None or told < _FEW:
        return f"only {told} requests told: wait for more"
    low, high = interval
    fallen = expected_rate is not None and high < expected_rate - MEANINGFUL_DROP
    cases = (
        (high < break_even, "below break-even: serve it without speculation"),
        (fallen, f"fell from {expected_rate or 0.0:.2f}: measure it again"),
        (low <= break_even, "at break-even: measure before trusting it"),
        (below_half > 0.1, f"{below_half:.0%} of requests below 0.5: split it further"),
        (low > _WIN_RATE, "likely a win: confirm against a baseline"),
    )
    otherwise = "break-even to a win: measure P99 at this load"
    return next((text for applies, text in cases if applies), otherwise)


def _answer(  # noqa: PLR0911 - one case after the other
    groups: Sequence[Group], expected: Expectations | None
) -> tuple[bool | None, str]:
    whole = groups[0]
    if expected is None:
        return None, (
            "Measure more: these requests were never served without speculation, "
            "so no effect can be claimed."
        )
    if expected.decision not in (Decision.ON, Decision.SCHEDULE):
        return None, f"Study {expected.study} itself does not say on: there is nothing to uphold."
    if whole.low is None or whole.high is None or whole.with_acceptance < _FEW:
        return None, (
            f"Measure more: {whole.with_acceptance} requests told their acceptance, "
            f"{_FEW} are the least."
        )
    fell = f"acceptance {whole.rate:.2f} against {expected.rate:.2f} measured"
    if whole.high < expected.low_rate:
        return False, (
            f"Off: {fell}, below the break-even of {expected.low_rate:.2f}; the verdict of "
            f"{expected.study} no longer holds."
        )
    if whole.high < expected.drifted_rate:
        return False, f"Measure again: {fell}; the verdict of {expected.study} no longer holds."
    if whole.low >= expected.drifted_rate:
        return True, f"The verdict of {expected.study} stands: {fell}."
    return None, (
        f"Measure more: acceptance is between {whole.low:.2f} and {whole.high:.2f}, "
        f"{expected.study} measured {expected.rate:.2f}; more records will tell."
    )


def _next_study(
    groups: Sequence[Group], requests_per_s: float, in_flight: float
) -> tuple[str, ...]:
    whole = groups[0]
    lines = [
        "arms: a baseline without speculation, and production's own flags",
        f"load: {requests_per_s:,.3g} requests/s in an open loop, or {max(1, round(in_flight))} in "
        "flight; and half and twice that",
    ]
    for group in groups:
        if group.kind == "segment":
            heat = "" if group.temperature is None else f", temperature {group.temperature:g}"
            lines.append(f"segment {group.name}: {group.requests / whole.requests:.0%}{heat}")
    if whole.with_acceptance < whole.requests:
        lines.append(
            f"{whole.requests - whole.with_acceptance} of {whole.requests} requests told no "
            "acceptance: start vLLM with --per-request-spec-decode-metrics summary; streamed "
            "answers need stream_options.include_usage from the client"
        )
    return tuple(lines)
