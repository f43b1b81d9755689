"""What users waited for: TTFT, TPOT, E2E, throughput and goodput, recomputed from raw records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specwise.domain import LoadPoint, Purpose


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

    Server-wide figures (``prefix_hit_rate`` to ``preemptions``) are None for a segment inside a
    mix, and where the server does not export them.
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

    @property
    def failed(self) -> int:
        """Requests that did not end OK."""
        return sum(self.failures.values())

    @property
    def failure_share(self) -> float:
        """Failed requests over all requests; 0 for an empty cell."""
        return self.failed / self.requests if self.requests else 0.0
