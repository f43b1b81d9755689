"""The requests of a trial as columns, and trials gathered into cells.

A cell is (arm, workload, load, purpose). Every figure of `analysis` starts from these columns, so
a definition (what TTFT starts from, which window a rate is over) stands here once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specwise.domain import (
    LoadPoint,
    Loop,
    MeasuredTrial,
    Outcome,
    Purpose,
    RequestRecord,
    Slo,
    StudyData,
    Trial,
    TrialPart,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
CellKey = tuple[str, str, LoadPoint, Purpose]


@dataclass(frozen=True, slots=True)
class TrialTable:
    """One trial, one row a request, in the order of ``index`` (as are ``records``).

    ``index`` and ``prompt_id`` pair rows across arms and repeats. Other columns are seconds, NaN
    where the request did not end OK or cannot give the value. Headline ``ttft_s`` and ``e2e_s``
    count from the intended time: under open loop the queueing that a slow server causes must show.
    ``window_tokens`` are the output tokens that arrived inside the loaded window of ``window_s``
    seconds (NaN where there is none).
    """

    trial: Trial
    records: tuple[RequestRecord, ...]
    parts: tuple[TrialPart, ...]
    index: NDArray[np.int64]
    prompt_id: NDArray[np.object_]
    segment: NDArray[np.object_]
    ok: Bools
    meets_slo: Bools
    ttft_s: Floats
    ttft_from_sent_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    e2e_from_sent_s: Floats
    output_tokens: Floats
    window_tokens: Floats
    window_s: float

    def rows(self, segment: str | None) -> Bools:
        """Which rows belong to ``segment``; all of them for None."""
        if segment is None:
            return np.ones(len(self.index), dtype=np.bool_)
        return np.asarray(self.segment == segment, dtype=np.bool_)


Cells = Mapping[CellKey, tuple[TrialTable, ...]]


def cells(study: StudyData) -> Cells:
    """Complete trials by cell, each cell's trials by repeat. Interrupted trials are left out."""
    gathered: dict[CellKey, list[TrialTable]] = defaultdict(list)
    for measured in study.trials:
        if measured.complete and measured.records:
            trial = measured.trial
            key = (trial.arm, trial.workload, trial.load, trial.purpose)
            gathered[key].append(table_of(measured, study.design.slo))
    return {
        key: tuple(sorted(tables, key=lambda table: table.trial.repeat))
        for key, tables in gathered.items()
    }


def segments_of(study: StudyData, workload: str) -> tuple[str | None, ...]:
    """The views of a workload: None for the whole, then each segment if it is a mix."""
    mix = study.design.workload(workload)
    return (None, *(name for name, _ in mix.shares)) if mix.is_mix else (None,)


def final_records(records: Iterable[RequestRecord]) -> tuple[RequestRecord, ...]:
    """One record for each index, in index order: the last that was not cancelled, if any.

    A resumed trial sends the requests again that were in flight when it was stopped, so an index
    may have a cancelled record and a finished one.
    """
    chosen: dict[int, RequestRecord] = {}
    for record in records:
        held = chosen.get(record.index)
        if held is None or _rank(record) >= _rank(held):
            chosen[record.index] = record
    return tuple(chosen[index] for index in sorted(chosen))


def _rank(record: RequestRecord) -> tuple[bool, int]:
    return record.outcome is not Outcome.CANCELLED, record.part


def tpot_s(record: RequestRecord) -> float | None:
    """(last token - first token) / (output tokens - 1); None below two tokens.

    The last token's arrival is that of the last chunk that carried tokens, where the server says
    which did, else the end of the stream: the usage chunk that trails it is not output.
    """
    first = record.first_token_s
    if first is None or record.output_tokens is None or record.output_tokens < 2:
        return None
    return (_last_token_s(record) - first) / (record.output_tokens - 1)


def _last_token_s(record: RequestRecord) -> float:
    if record.chunk_tokens is None:
        return record.finished_s
    carrying = [t for t, n in zip(record.chunk_s, record.chunk_tokens, strict=True) if n]
    return carrying[-1] if carrying else record.finished_s


def token_arrivals(record: RequestRecord) -> tuple[Floats, Floats]:
    """When output arrived and how many tokens each time; spread evenly where chunks do not say."""
    times = np.asarray(record.chunk_s, dtype=np.float64)
    if record.chunk_tokens is not None:
        tokens = np.asarray(record.chunk_tokens, dtype=np.float64)
        return times[tokens > 0], tokens[tokens > 0]
    if not len(times) or record.output_tokens is None:
        return times, np.zeros(len(times))
    return times, np.full(len(times), record.output_tokens / len(times))


def loaded_window(records: Iterable[RequestRecord], load: LoadPoint) -> tuple[float, float]:
    """The stretch of one part over which rates are computed, (start, end) in part seconds.

    Closed loop: from the first send to the first completion after the last send, when the first
    client runs out of work: all clients were busy throughout. Open loop: the span of the arrivals,
    so that the drain, in which no load is offered, does not dilute the rate.
    """
    held = list(records)
    start = min(r.intended_s for r in held)
    if load.loop is Loop.CLOSED:
        last_sent = max(r.sent_s for r in held)
        return start, min(r.finished_s for r in held if r.finished_s >= last_sent)
    end = max(r.intended_s for r in held)
    return start, end if end > start else max(r.finished_s for r in held)


def table_of(measured: MeasuredTrial, slo: Slo) -> TrialTable:
    """The columns of one trial."""
    records = final_records(measured.records)
    ok = np.array([r.outcome is Outcome.OK for r in records], dtype=np.bool_)
    first = _column((r.first_token_s for r in records), ok)
    finished = _column((r.finished_s for r in records), ok)
    intended = np.array([r.intended_s for r in records])
    sent = np.array([r.sent_s for r in records])
    tpot = _column((tpot_s(r) for r in records), ok)
    ttft, e2e = first - intended, finished - intended
    window_tokens, window_s = _in_window(records, measured.trial.load)
    return TrialTable(
        trial=measured.trial,
        records=records,
        parts=measured.parts,
        index=np.array([r.index for r in records], dtype=np.int64),
        prompt_id=np.array([r.prompt_id for r in records], dtype=np.object_),
        segment=np.array([r.segment for r in records], dtype=np.object_),
        ok=ok,
        meets_slo=ok
        & _within(ttft, slo.ttft_s)
        & (_within(tpot, slo.tpot_s) | np.isnan(tpot))
        & _within(e2e, slo.e2e_s),
        ttft_s=ttft,
        ttft_from_sent_s=first - sent,
        tpot_s=tpot,
        e2e_s=e2e,
        e2e_from_sent_s=finished - sent,
        output_tokens=_column((r.output_tokens for r in records), ok),
        window_tokens=window_tokens,
        window_s=window_s,
    )


def _column(values: Iterable[float | None], ok: Bools) -> Floats:
    column = np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)
    column[~ok] = np.nan
    return column


def _within(column: Floats, limit: float | None) -> Bools:
    if limit is None:
        return np.ones(len(column), dtype=np.bool_)
    return np.less_equal(column, limit, where=~np.isnan(column), out=np.zeros(len(column), bool))


def _in_window(records: tuple[RequestRecord, ...], load: LoadPoint) -> tuple[Floats, float]:
    """Tokens of each OK request inside the loaded windows of the parts, and their total length."""
    tokens = np.zeros(len(records))
    total_s = 0.0
    by_part: dict[int, list[RequestRecord]] = defaultdict(list)
    for record in records:
        by_part[record.part].append(record)
    windows = {part: loaded_window(held, load) for part, held in by_part.items()}
    for start, end in windows.values():
        total_s += end - start
    for row, record in enumerate(records):
        if record.outcome is Outcome.OK:
            start, end = windows[record.part]
            times, counts = token_arrivals(record)
            tokens[row] = counts[(times >= start) & (times <= end)].sum()
    return tokens, total_s if total_s > 0 else float("nan")
