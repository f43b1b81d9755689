"""Arm against baseline: paired effects with intervals that own up to trial-to-trial noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from specwise.analysis.cells import Cells, Floats, cells, segments_of
from specwise.analysis.latency import rates
from specwise.analysis.pairs import (
    FEWEST_PAIRS,
    RATE_METRICS,
    REQUEST_METRICS,
    SPEEDUP,
    UNKNOWN_NOISE,
    Block,
    Metric,
    PairKey,
    Pairs,
    TrialNoise,
    bootstrap_variances,
    log_ratio,
    match_pairs,
    noise_blocks,
    pair_trials,
    statistic,
    trial_noise,
    trial_variances,
)
from specwise.domain import LoadPoint, Purpose, StudyData

Direction = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Effect:
    """A ratio between a candidate arm and the baseline in one cell, with its interval.

    ``speedup`` is baseline / candidate time per output token (above 1 is good); every other metric
    is candidate / baseline. ``better`` says which side of 1 is good. ``baseline_value`` and
    ``candidate_value`` are the metric itself (seconds, tokens/s, requests/s; for ``speedup`` the
    time per output token). ``low`` and ``high`` bound the ratio at ``confidence``; they are NaN,
    like ``ratio``, where the metric has no value. ``se_log`` is the standard error of log(ratio)
    and ``dof`` the degrees of freedom of its t quantile. ``pairs`` are requests that ended OK in
    both arms. ``trial_noise_known`` is False where no repeat and no A/A trial could tell how much
    trials differ: the interval is then a lower bound on the uncertainty.

    What ``se_log`` is made of: ``request_variance`` of log(ratio) over resampled requests, plus
    ``machine_variance`` of one pair of trials / ``repeats``. ``trial_variance`` is the whole
    variance of one pair of trials, known with ``noise_dof`` degrees of freedom.
    """

    metric: str
    better: Literal["higher", "lower"]
    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    ratio: float
    low: float
    high: float
    confidence: float
    pairs: int
    repeats: int
    baseline_value: float
    candidate_value: float
    se_log: float
    dof: float
    trial_noise_known: bool
    note: str
    trial_ids: tuple[str, ...]
    request_variance: float = math.nan
    machine_variance: float = math.nan
    trial_variance: float = math.nan
    noise_dof: float = 0.0

    @property
    def direction(self) -> Direction:
        """Which side of 1 the whole interval lies on; "undecided" when it holds 1 or is NaN."""
        if self.low > 1.0:
            return "better" if self.better == "higher" else "worse"
        if self.high < 1.0:
            return "worse" if self.better == "higher" else "better"
        return "undecided"

    def interval(self, confidence: float) -> tuple[float, float]:
        """The interval of the ratio at another confidence: exp(log ratio -+ t se)."""
        if not (math.isfinite(self.se_log) and self.ratio > 0):
            return math.nan, math.nan
        half = t_quantile(self.dof, confidence) * self.se_log
        return self.ratio * math.exp(-half), self.ratio * math.exp(half)

    def strict_interval(self, confidence: float) -> tuple[float, float]:
        """The interval that verdicts rest on: the wider of `interval` and that of trials alone.

        ``machine_variance`` is a difference that is now and then too small by chance. At 95 % that
        averages out, at the higher confidences that a verdict asks for it does not; there the
        t interval of whole trials, sqrt(trial_variance / repeats), holds whatever the luck.
        """
        low, high = self.interval(confidence)
        if not (self.noise_dof and math.isfinite(low) and math.isfinite(self.trial_variance)):
            return low, high
        se = math.sqrt(self.trial_variance / self.repeats)
        half = t_quantile(self.noise_dof, confidence) * se
        return min(low, self.ratio * math.exp(-half)), max(high, self.ratio * math.exp(half))


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The A/A trial against the baseline it repeats: what "no difference" looks like here.

    The interval comes from the requests alone, so one that excludes 1 shows that trials differ by
    more than their requests do; the effects' own intervals take that into account.
    """

    load: LoadPoint
    workload: str
    metric: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Signature:
    """P50 better while P99 worse (req F3): the mark of a mix that speculation splits.

    ``metric`` is "tpot" or "e2e". ``present`` is True where both intervals say so, False where one
    of them excludes it, None where neither can be said.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    metric: str
    p50: Effect
    p99: Effect
    present: bool | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that compares arms in a study."""

    effects: tuple[Effect, ...]
    noise_floors: tuple[NoiseFloor, ...]
    signatures: tuple[Signature, ...]


CONFIDENCE = 0.95
METRICS = (*REQUEST_METRICS, *RATE_METRICS)
NOISE_FLOOR_METRICS = ("speedup", "ttft_p50", "tpot_p50", "tpot_p99")


def compare(study: StudyData, measured: Cells | None = None, *, seed: int = 0) -> Comparison:
    """Effects of every candidate arm in every cell and segment, noise floors and signatures.

    Deterministic for a given ``seed``, whatever the order of the cells. The statistics are
    explained in docs/concepts/statistics.md. ``measured`` are the study's `cells`, where the
    caller has them already.
    """
    measured = cells(study) if measured is None else measured
    baseline = study.design.arms[0].name
    views = {w.name: segments_of(study, w.name) for w in study.design.workloads}
    matched = match_pairs(measured, baseline, views)
    ordered = {key: matched[key] for key in sorted(matched, key=lambda key: _order(study, key))}
    effects = effects_of(ordered, noise_blocks(measured, baseline), seed=seed)
    return Comparison(
        effects=effects,
        noise_floors=_noise_floors(measured, baseline, seed=seed),
        signatures=find_signatures(effects),
    )


def speedup_effects(measured: Cells, baseline: str, *, seed: int = 0) -> tuple[Effect, ...]:
    """The speedup of every candidate in every whole workload: `compare` for that one metric."""
    matched = match_pairs(measured, baseline, {})
    request, noise = _variances(matched, noise_blocks(measured, baseline), (SPEEDUP,), seed=seed)
    return tuple(
        _effect(pairs, SPEEDUP, request[key]["speedup"], noise["speedup"][pairs.load])
        for key, pairs in matched.items()
    )


def effects_of(
    matched: Mapping[PairKey, Pairs], blocks: Sequence[Block], *, seed: int = 0
) -> tuple[Effect, ...]:
    """Every effect of pairs that are matched already, in their order, first side as the baseline.

    ``blocks`` are what trial-to-trial noise is read from. Rates of the server are for whole
    workloads only.
    """
    request, noise = _variances(matched, blocks, METRICS, seed=seed)
    return tuple(
        _effect(pairs, metric, request[key][metric.name], noise[metric.name][key[3]])
        for key, pairs in matched.items()
        for metric in (METRICS if key[2] is None else REQUEST_METRICS)
    )


def _variances(
    matched: Mapping[PairKey, Pairs],
    blocks: Sequence[Block],
    metrics: Sequence[Metric],
    *,
    seed: int,
) -> tuple[dict[PairKey, dict[str, float]], dict[str, dict[LoadPoint, TrialNoise]]]:
    """Request variance by cell and metric, and trial noise by metric and load."""
    request = {
        key: bootstrap_variances(pairs, metrics, seed=seed) for key, pairs in matched.items()
    }
    of_trials = {
        key: trial_variances(pairs, metrics, seed=seed)
        for key, pairs in matched.items()
        if pairs.segment is None
    }
    noise = {metric.name: trial_noise(blocks, metric, of_trials) for metric in metrics}
    return request, noise


def t_quantile(dof: float, confidence: float) -> float:
    """Two-sided Student t quantile: P(|T| <= t) = ``confidence``."""
    return float(stdtrit(max(dof, 1.0), 0.5 + confidence / 2))


def find_signatures(effects: Sequence[Effect]) -> tuple[Signature, ...]:
    """The P50/P99 signature on TPOT and E2E in every cell that has both percentiles."""
    by_key = {(e.arm, e.workload, e.segment, e.load, e.metric): e for e in effects}
    found = []
    for (arm, workload, segment, load, metric), p50 in by_key.items():
        if metric not in ("tpot_p50", "e2e_p50"):
            continue
        name = metric.removesuffix("_p50")
        p99 = by_key[arm, workload, segment, load, f"{name}_p99"]
        found.append(Signature(arm, workload, segment, load, name, p50, p99, _signature(p50, p99)))
    return tuple(found)


def _signature(p50: Effect, p99: Effect) -> bool | None:
    if p50.direction == "better" and p99.direction == "worse":
        return True
    if p50.direction == "worse" or p99.direction == "better":
        return False
    return None


def standard_error(pairs: Pairs, request_variance: float, noise: TrialNoise) -> tuple[float, float]:
    """Standard error of a log ratio over all its pairs, and its degrees of freedom.

    With R repeats, s2 the variance of one pair of trials, b2 the bootstrap variance over requests
    and m2 what of s2 the requests do not explain (`trial_noise`), it is sqrt(b2 + m2 / R). Where
    repeats share prompts it is sqrt(b2 + s2 / R), because repeats cannot average away what the
    choice of prompts leaves uncertain. Degrees of freedom: Satterthwaite (Biometrics Bulletin 2,
    1946), no fewer than s2 is known with. A pool of a single one is too often small by chance for
    that: the wider of it and sqrt(s2 / R) is given.

    Where nothing is known about trials it is sqrt(b2), a lower bound. NaN where b2 is.
    """
    clusters = int(pairs.cluster.max()) + 1
    if not math.isfinite(request_variance):
        return math.nan, 1.0
    if not noise.dof:
        return math.sqrt(request_variance), max(clusters - 1, 1)
    total = request_variance + _machine_variance(pairs, noise) / pairs.repeats
    doubt = noise.doubt / pairs.repeats**2 + 2 * request_variance**2 / max(clusters - 1, 1)
    fewest = min(noise.dof, noise.pair_dof)
    dof = max(2 * total**2 / doubt, fewest) if doubt else float(clusters)
    if noise.dof >= 2:
        return math.sqrt(total), dof
    answers = ((math.sqrt(noise.pair_variance / pairs.repeats), noise.dof), (math.sqrt(total), dof))
    return max(answers, key=lambda answer: t_quantile(answer[1], CONFIDENCE) * answer[0])


def _machine_variance(pairs: Pairs, noise: TrialNoise) -> float:
    return noise.pair_variance if pairs.shares_prompts else noise.machine_variance


def _effect(pairs: Pairs, metric: Metric, request_variance: float, noise: TrialNoise) -> Effect:
    values = _values(pairs, metric)
    log = float(log_ratio(metric, values[0], values[1]))
    se_log, dof = standard_error(pairs, request_variance, noise)
    notes = _notes(pairs, noise)
    known = int((~np.isnan(pairs.columns[metric.column])).all(0).sum())
    fewest = FEWEST_PAIRS.get(metric.kind, 0)
    if known < fewest:
        se_log = math.nan
        notes.append(
            f"no interval: {metric.kind.upper()} needs {fewest} requests in both arms, there are "
            f"{known}"
        )
    if metric.name == "goodput_per_s" and math.isnan(log):
        notes.append("no request met the SLO in one of the arms")
    if metric.column == "e2e_s" and metric.kind != "ratio":
        notes += _length_note(pairs)
    half = t_quantile(dof, CONFIDENCE) * se_log
    tables = (*pairs.base_tables, *pairs.arm_tables)
    return Effect(
        metric=metric.name,
        better=metric.better,
        arm=pairs.arm,
        workload=pairs.workload,
        segment=pairs.segment,
        load=pairs.load,
        ratio=math.exp(log),
        low=math.exp(log - half),
        high=math.exp(log + half),
        confidence=CONFIDENCE,
        pairs=known,
        repeats=pairs.repeats,
        baseline_value=float(values[0]),
        candidate_value=float(values[1]),
        se_log=se_log,
        dof=dof,
        trial_noise_known=noise.dof > 0,
        note="; ".join(notes),
        trial_ids=tuple(table.trial.trial_id for table in tables),
        request_variance=request_variance,
        machine_variance=_machine_variance(pairs, noise),
        trial_variance=noise.pair_variance if noise.dof else math.nan,
        noise_dof=noise.pair_dof,
    )


def _values(pairs: Pairs, metric: Metric) -> Floats:
    """The metric itself, baseline first: over the loaded windows for a rate, else over the pairs.

    NaN for a rate where no window holds a request that counts.
    """
    if metric.rate is None:
        per = pairs.columns[metric.per] if metric.per else None
        return statistic(pairs.columns[metric.column], per, metric.kind)
    sides = [rates(tables, None) for tables in (pairs.base_tables, pairs.arm_tables)]
    values = np.array([math.nan if side is None else side[metric.rate] for side in sides])
    return np.where(values > 0, values, math.nan)


def _notes(pairs: Pairs, noise: TrialNoise) -> list[str]:
    notes = []
    if not noise.dof:
        notes.append("no repeat and no A/A trial: how much trials differ is unknown")
    if any(pairs.failed):
        notes.append(
            f"failed requests: baseline {pairs.failed[0]}, {pairs.arm} {pairs.failed[1]}; "
            "only requests that ended OK in both are compared"
        )
    return notes


def _length_note(pairs: Pairs) -> list[str]:
    base, candidate = pairs.columns["output_tokens"].mean(1)
    if abs(candidate - base) <= 0.05 * base:
        return []
    return [f"outputs differ in length: {base:.0f} and {candidate:.0f} tokens on average"]


def tail_probability(failed: int, requests: int, base_failed: int, base_requests: int) -> float:
    """Fisher's exact test, one-sided: P(at least ``failed`` of all failures fall on this arm)."""
    total, failures = requests + base_requests, failed + base_failed
    ways = math.comb(total, failures)
    upper = min(requests, failures)
    hits = sum(
        math.comb(requests, n) * math.comb(base_requests, failures - n)
        for n in range(failed, upper + 1)
    )
    return hits / ways


def _noise_floors(measured: Cells, baseline: str, *, seed: int) -> tuple[NoiseFloor, ...]:
    """Every A/A cell against the baseline trials it repeats, candidate and baseline being one."""
    metrics = [m for m in REQUEST_METRICS if m.name in NOISE_FLOOR_METRICS]
    found = []
    for key in sorted(k for k in measured if k[3] is Purpose.NOISE_FLOOR):
        _, workload, load, _ = key
        base = measured.get((baseline, workload, load, Purpose.MEASURE), ())
        pairs = pair_trials(base, measured[key], (baseline, workload, None, load))
        if pairs is None:
            continue
        variances = bootstrap_variances(pairs, metrics, seed=seed)
        for metric in metrics:
            effect = _effect(pairs, metric, variances[metric.name], UNKNOWN_NOISE)
            found.append(
                NoiseFloor(load, workload, metric.name, effect.ratio, effect.low, effect.high)
            )
    return tuple(found)


def _order(study: StudyData, key: PairKey) -> tuple[int, int, LoadPoint, int]:
    """Sorts effects by workload, segment, load and arm as the study file lists them."""
    arm, workload, segment, load = key
    design = study.design
    return (
        [w.name for w in design.workloads].index(workload),
        segments_of(study, workload).index(segment),
        load,
        [a.name for a in design.arms].index(arm),
    )
