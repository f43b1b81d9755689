"""What users waited for: TTFT, TPOT, E2E, throughput and goodput, recomputed from raw records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specwise.analysis.cells import (
    CellKey,
    Cells,
    Floats,
    TrialTable,
    cells,
    segments_of,
    token_arrivals,
)
from specwise.analysis.server_figures import NOT_MEASURED, GpuFigures, server_figures
from specwise.domain import LoadPoint, Outcome, Purpose, RequestRecord, StudyData


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution in five numbers; percentiles interpolate linearly between order statistics.

    With fewer than 100 values p99 is little more than the largest of them: ``count`` is shown.
    """

    count: int
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class ServingSummary:
    """One cell: an arm serving a workload (or one segment inside a mix) at one load point.

    ``segment`` is None for the whole workload. ``purpose`` tells the measured trials from the A/A
    trials of the noise floor. ``requests`` counts all requests, ``failures`` those that did not
    end OK, by outcome. Percentiles are over OK requests; a field is None where no request can
    give it. ``*_from_sent_s`` start at the socket write instead of the intended time.

    ``time_per_output_token_s`` is sum(E2E) / sum(output tokens) over OK requests: the base of the
    speedup. Rates are over the loaded window (see ``loaded_window``). ``slo_share`` is the share of
    all requests, failed ones included, that met every limit of the SLO.

    Server-wide figures (``prefix_hit_rate`` to ``preemptions``, ``kv_use_mean`` and what follows)
    are None or empty for a segment inside a mix, and where the server does not export them.
    ``queue_mean_s`` is the mean time a request waited in the server before its prefill.
    ``gpu_note`` says why there are no ``gpus``.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    purpose: Purpose
    repeats: int
    requests: int
    failures: Mapping[str, int]
    ttft_s: Percentiles | None
    ttft_from_sent_s: Percentiles | None
    tpot_s: Percentiles | None
    e2e_s: Percentiles | None
    e2e_from_sent_s: Percentiles | None
    inter_chunk_gap_s: Percentiles | None
    time_per_output_token_s: float | None
    output_tokens: int
    mean_output_tokens: float | None
    output_tokens_per_s: float | None
    requests_per_s: float | None
    goodput_per_s: float | None
    slo_share: float
    prefix_hit_rate: float | None
    kv_use_max: float | None
    running_mean: float | None
    waiting_max: float | None
    preemptions: float | None
    trial_ids: tuple[str, ...]
    kv_use_mean: float | None = None
    waiting_mean: float | None = None
    queue_mean_s: float | None = None
    gpus: tuple[GpuFigures, ...] = ()
    gpu_note: str = ""

    @property
    def failed(self) -> int:
        """Requests that did not end OK."""
        return sum(self.failures.values())

    @property
    def failure_share(self) -> float:
        """Failed requests over all requests; 0 for an empty cell."""
        return self.failed / self.requests if self.requests else 0.0


def summarise(study: StudyData, measured: Cells | None = None) -> tuple[ServingSummary, ...]:
    """A summary for each cell, and for each segment inside a mix, in the order of the design.

    ``measured`` are the study's `cells`, where the caller has them already.
    """
    measured = cells(study) if measured is None else measured
    return tuple(
        _summary(key, segment, tables)
        for key, tables in sorted(measured.items(), key=lambda item: design_order(study, item[0]))
        for segment in segments_of(study, key[1])
        if any(table.rows(segment).any() for table in tables)
    )


def design_order(study: StudyData, key: CellKey) -> tuple[int, LoadPoint, int, str]:
    """Sorts cells by workload, load and arm as the study file lists them."""
    arm, workload, load, purpose = key
    arms = [a.name for a in study.design.arms]
    workloads = [w.name for w in study.design.workloads]
    return workloads.index(workload), load, arms.index(arm), purpose.value


def percentiles(values: Floats) -> Percentiles | None:
    """The distribution of the values that are not NaN; None if there are none."""
    held = values[~np.isnan(values)]
    if not len(held):
        return None
    p50, p95, p99 = np.quantile(held, [0.50, 0.95, 0.99])
    return Percentiles(len(held), float(held.mean()), float(p50), float(p95), float(p99))


def time_per_output_token_s(e2e_s: Floats, output_tokens: Floats) -> float | None:
    """sum(E2E) / sum(output tokens) over requests that have both; None if there are none."""
    both = ~np.isnan(e2e_s) & (output_tokens > 0)
    return float(e2e_s[both].sum() / output_tokens[both].sum()) if both.any() else None


def rates(tables: Sequence[TrialTable], segment: str | None) -> tuple[float, float, float] | None:
    """(output tokens/s, requests/s, goodput/s) over the loaded windows; None without a window.

    A request counts by the share of its output that arrived inside the window: with few requests
    in flight, counting completions would depend on where the window happens to end. Goodput is
    the same count over the requests that met the SLO; a failed request adds nothing.
    """
    window_s = sum(table.window_s for table in tables)
    if not window_s > 0:
        return None
    tokens = requests = good = 0.0
    for table in tables:
        rows = table.rows(segment) & table.ok & (table.output_tokens > 0)
        share = table.window_tokens[rows] / table.output_tokens[rows]
        tokens += float(table.window_tokens[rows].sum())
        requests += float(share.sum())
        good += float(share[table.meets_slo[rows]].sum())
    return tokens / window_s, requests / window_s, good / window_s


def _summary(key: CellKey, segment: str | None, tables: tuple[TrialTable, ...]) -> ServingSummary:
    arm, workload, load, purpose = key
    rows = [table.rows(segment) for table in tables]

    def column(name: str) -> Floats:
        return np.concatenate([getattr(t, name)[r] for t, r in zip(tables, rows, strict=True)])

    records = [
        record
        for table, row in zip(tables, rows, strict=True)
        for record, inside in zip(table.records, row, strict=True)
        if inside
    ]
    tokens = column("output_tokens")
    has_tokens = ~np.isnan(tokens)
    in_window = rates(tables, segment)
    server = server_figures(p for t in tables for p in t.parts) if segment is None else NOT_MEASURED
    return ServingSummary(
        arm=arm,
        workload=workload,
        segment=segment,
        load=load,
        purpose=purpose,
        repeats=len(tables),
        requests=len(records),
        failures=dict(
            sorted(Counter(r.outcome.value for r in records if r.outcome is not Outcome.OK).items())
        ),
        ttft_s=percentiles(column("ttft_s")),
        ttft_from_sent_s=percentiles(column("ttft_from_sent_s")),
        tpot_s=percentiles(column("tpot_s")),
        e2e_s=percentiles(column("e2e_s")),
        e2e_from_sent_s=percentiles(column("e2e_from_sent_s")),
        inter_chunk_gap_s=percentiles(_gaps(records)),
        time_per_output_token_s=time_per_output_token_s(column("e2e_s"), tokens),
        output_tokens=int(tokens[has_tokens].sum()),
        mean_output_tokens=float(tokens[has_tokens].mean()) if has_tokens.any() else None,
        output_tokens_per_s=in_window[0] if in_window else None,
        requests_per_s=in_window[1] if in_window else None,
        goodput_per_s=in_window[2] if in_window else None,
        slo_share=float(column("meets_slo").mean()),
        prefix_hit_rate=server.prefix_hit_rate,
        kv_use_max=server.kv_use_max,
        running_mean=server.running_mean,
        waiting_max=server.waiting_max,
        preemptions=server.preemptions,
        trial_ids=tuple(table.trial.trial_id for table in tables),
        kv_use_mean=server.kv_use_mean,
        waiting_mean=server.waiting_mean,
        queue_mean_s=server.queue_mean_s,
        gpus=server.gpus,
        gpu_note=server.gpu_note,
    )


def _gaps(records: Sequence[RequestRecord]) -> Floats:
    """Gaps between chunks that carried output, over all OK requests."""
    gaps = [np.diff(token_arrivals(r)[0]) for r in records if r.outcome is Outcome.OK]
    return np.concatenate(gaps) if gaps else np.array([])
