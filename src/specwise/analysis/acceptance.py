"""How much of what was drafted was accepted, per cell, position and request.

Definitions are vLLM's own (0.32, v1/metrics/stats.py and v1/spec_decode/metrics.py): a verify step
is an engine step that checked at least one draft of a request; rate = accepted / drafted;
length = 1 + accepted / verify steps; u_i = share of verify steps that accepted at least i drafts.
The conditional a_i = u_i / u_(i-1) is what can be compared across draft lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from specwise.analysis.cells import Cells, TrialTable, cells, segments_of
from specwise.analysis.latency import design_order
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    LoadPoint,
    Outcome,
    Purpose,
    RequestRecord,
    Speculation,
    StudyData,
)


@dataclass(frozen=True, slots=True)
class RequestSpread:
    """Acceptance rate per request: a distribution, because the mean hides the losing requests.

    ``below_half`` is the share of requests with a rate below 0.5.
    """

    requests: int
    source: AcceptanceSource
    p10: float
    p50: float
    p90: float
    below_half: float


@dataclass(frozen=True, slots=True)
class AcceptanceSummary:
    """Acceptance of one cell (``segment`` None: the whole workload).

    ``rate`` is accepted / drafted tokens, None where the source cannot tell what was drafted;
    ``length`` is 1 + accepted / verify steps. ``unconditional[i]`` is the share of verify steps
    that accepted at least i + 1 drafts; ``conditional[i]`` the same among those that accepted i.
    Both are empty for an arm whose draft length follows the batch size: its positions are not
    drafted equally often, so only ``rate`` and ``length`` mean something (``note`` says so).
    ``temperature`` is None where the cell's requests differ in it.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    source: AcceptanceSource
    requests: int
    steps: int
    drafted: int | None
    accepted: int
    rate: float | None
    length: float | None
    unconditional: tuple[float, ...]
    conditional: tuple[float, ...]
    per_request: RequestSpread | None
    k: int | None
    temperature: float | None
    note: str
    trial_ids: tuple[str, ...]


def summarise_acceptance(
    study: StudyData, measured: Cells | None = None
) -> tuple[AcceptanceSummary, ...]:
    """Acceptance of every cell of the speculating arms, and of each segment inside a mix.

    The source of a cell is the best it has: the server's per-request figures, else the counters'
    differences over its trials (whole workload only: counters cannot be split by segment), else
    the tokens per streamed chunk. Cells with none of these are left out. ``measured`` are the
    study's `cells`, where the caller has them already.
    """
    found = []
    measured = cells(study) if measured is None else measured
    for key in sorted(measured, key=lambda key: design_order(study, key)):
        arm, workload, load, purpose = key
        speculation = study.design.arm(arm).speculation
        if speculation is None or purpose is not Purpose.MEASURE:
            continue
        for segment in segments_of(study, workload):
            records = _records(measured[key], segment)
            counted = _counts(measured[key], records, segment, speculation)
            if counted is None or not records:
                continue
            found.append(
                _summary(
                    (arm, workload, segment, load),
                    speculation,
                    records,
                    counted,
                    tuple(table.trial.trial_id for table in measured[key]),
                )
            )
    return tuple(found)


def unconditional_acceptance(steps_by_accepted: Sequence[int]) -> tuple[float, ...]:
    """u_i for i = 1..k from the histogram of drafts accepted per verify step; empty if no steps.

    u_i = sum(steps_by_accepted[i:]) / sum(steps_by_accepted); their sum is length - 1.
    """
    steps = sum(steps_by_accepted)
    if not steps:
        return ()
    return tuple(sum(steps_by_accepted[i:]) / steps for i in range(1, len(steps_by_accepted)))


def conditional_acceptance(unconditional: Sequence[float]) -> tuple[float, ...]:
    """a_i = u_i / u_(i-1) with u_0 = 1; NaN where no step came that far."""
    return tuple(
        after / before if before > 0 else float("nan")
        for before, after in pairwise((1.0, *unconditional))
    )


def break_even_rate(*, rate: float, tokens_per_step: float, tpot_ratio: float) -> float:
    """The acceptance rate at which this cell's TPOT would equal the baseline's (req B5).

    A decode step of the arm costs c = tokens_per_step x tpot_ratio baseline steps, where
    tpot_ratio is candidate / baseline. It pays from c tokens a step. Tokens beyond the first are
    accepted drafts, in proportion to the rate at a given draft length, so

        break-even rate = rate x (c - 1) / (tokens_per_step - 1).

    Above 1 no acceptance can make it pay; NaN where nothing was accepted.
    """
    if tokens_per_step <= 1:
        return math.nan
    cost = tokens_per_step * tpot_ratio
    return rate * (cost - 1) / (tokens_per_step - 1)


def merge(counts: Iterable[AcceptanceCounts], positions: int) -> AcceptanceCounts | None:
    """The sum of counts of one source, padded to ``positions`` drafts; None if there are none."""
    held = list(counts)
    if not held:
        return None
    longest = max(positions + 1, *(len(c.steps_by_accepted) for c in held))
    total = [0] * longest
    for count in held:
        for accepted, steps in enumerate(count.steps_by_accepted):
            total[accepted] += steps
    drafted = [c.drafted_tokens for c in held]
    known = [d for d in drafted if d is not None]
    return AcceptanceCounts(
        source=held[0].source,
        steps_by_accepted=tuple(total),
        drafted_tokens=sum(known) if len(known) == len(held) else None,
    )


def _records(tables: Sequence[TrialTable], segment: str | None) -> list[RequestRecord]:
    return [
        record
        for table in tables
        for record in table.records
        if record.outcome is Outcome.OK and segment in (None, record.segment)
    ]


def counts_from(
    record: RequestRecord, source: AcceptanceSource, speculation: Speculation
) -> AcceptanceCounts | None:
    """What ``source`` says of one request of an arm; None if it says nothing.

    Chunks that accepted more drafts than a step of the arm has are left out: vLLM puts all that was
    generated since the last chunk into the next one (0.32, v1/engine/output_processor.py,
    RequestOutputCollector), so a server whose streams fall behind its engine, and be it for one
    pass of the garbage collector, merges steps.
    """
    counts = record.acceptance
    if counts is None or counts.source is not source:
        return None
    if source is AcceptanceSource.CHUNKS:
        counts = replace(counts, steps_by_accepted=counts.steps_by_accepted[: speculation.k + 1])
    return counts if counts.steps else None


def _of_source(
    records: Iterable[RequestRecord], source: AcceptanceSource, speculation: Speculation
) -> list[AcceptanceCounts]:
    held = (counts_from(record, source, speculation) for record in records)
    return [counts for counts in held if counts is not None]


def _counts(
    tables: Sequence[TrialTable],
    records: Sequence[RequestRecord],
    segment: str | None,
    speculation: Speculation,
) -> AcceptanceCounts | None:
    """The cell's counts from the best source it has."""
    per_request = merge(_of_source(records, AcceptanceSource.PER_REQUEST, speculation), 0)
    if per_request is not None:
        return per_request
    counters = counted_by_server(tables) if segment is None else None
    return counters or merge(_of_source(records, AcceptanceSource.CHUNKS, speculation), 0)


def counted_by_server(tables: Sequence[TrialTable]) -> AcceptanceCounts | None:
    """Counts from the server's counters; positions come from its per-position counters.

    Parts in which the server restarted are left out. None if it exports no draft counters, none
    by position, or if nothing was drafted.
    """
    parts = [p for t in tables for p in t.parts if not p.counters_reset]
    parts = [p for p in parts if "spec_drafts" in p.counters]
    steps = round(sum(p.counters["spec_drafts"] for p in parts))
    if not steps:
        return None
    at_least = [float(steps)]
    while any(f"spec_accepted_pos_{len(at_least) - 1}" in p.counters for p in parts):
        name = f"spec_accepted_pos_{len(at_least) - 1}"
        at_least.append(sum(p.counters.get(name, 0.0) for p in parts))
    if len(at_least) == 1:
        return None
    exactly = [round(a - b) for a, b in pairwise((*at_least, 0.0))]
    return AcceptanceCounts(
        source=AcceptanceSource.COUNTERS,
        steps_by_accepted=tuple(exactly),
        drafted_tokens=round(sum(p.counters.get("spec_draft_tokens", 0.0) for p in parts)),
    )


def _summary(
    key: tuple[str, str, str | None, LoadPoint],
    speculation: Speculation,
    records: Sequence[RequestRecord],
    counts: AcceptanceCounts,
    trial_ids: tuple[str, ...],
) -> AcceptanceSummary:
    arm, workload, segment, load = key
    notes = []
    k = None if speculation.schedule else speculation.k
    padded = merge([counts], k or 0) or counts
    drafted = drafted_tokens(counts, speculation)
    unconditional: tuple[float, ...] = ()
    if k is None:
        notes.append("draft length follows the batch size: compare length and rate only")
    else:
        unconditional = unconditional_acceptance(padded.steps_by_accepted)
    if counts.source is AcceptanceSource.CHUNKS:
        notes.append("estimated from tokens per chunk; steps without a draft count as steps")
    elif counts.source is AcceptanceSource.COUNTERS:
        notes.append("from the server's counters: right only if nothing else used the server")
    if _may_draft_less(speculation) and k is not None:
        notes.append("a proposal shorter than k lowers the later positions")
    temperatures = {r.temperature for r in records}
    return AcceptanceSummary(
        arm=arm,
        workload=workload,
        segment=segment,
        load=load,
        source=counts.source,
        requests=len(records),
        steps=counts.steps,
        drafted=drafted,
        accepted=counts.accepted_tokens,
        rate=counts.accepted_tokens / drafted if drafted else None,
        length=1 + counts.accepted_tokens / counts.steps if counts.steps else None,
        unconditional=unconditional,
        conditional=conditional_acceptance(unconditional),
        per_request=_spread(records, speculation),
        k=k,
        temperature=temperatures.pop() if len(temperatures) == 1 else None,
        note="; ".join(notes),
        trial_ids=trial_ids,
    )


def drafted_tokens(counts: AcceptanceCounts, speculation: Speculation) -> int | None:
    """Drafted tokens: as counted, else steps x k where every step drafts k, else unknown."""
    if counts.drafted_tokens is not None:
        return counts.drafted_tokens
    if speculation.schedule or _may_draft_less(speculation):
        return None
    return counts.steps * speculation.k


def _may_draft_less(speculation: Speculation) -> bool:
    """Whether a step may propose fewer than k drafts: lookup methods propose what they find."""
    return speculation.method in ("ngram", "suffix")


def _spread(records: Sequence[RequestRecord], speculation: Speculation) -> RequestSpread | None:
    """The distribution of the per-request rate, from the best source the records have."""
    for source in (AcceptanceSource.PER_REQUEST, AcceptanceSource.CHUNKS):
        counted = _of_source(records, source, speculation)
        drafted = [(c, drafted_tokens(c, speculation)) for c in counted]
        rates = np.array([c.accepted_tokens / d for c, d in drafted if d])
        if len(rates):
            p10, p50, p90 = np.quantile(rates, [0.1, 0.5, 0.9])
            return RequestSpread(
                requests=len(rates),
                source=source,
                p10=float(p10),
                p50=float(p50),
                p90=float(p90),
                below_half=float((rates < 0.5).mean()),
            )
    return None
