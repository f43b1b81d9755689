"""The numerics under every comparison: pairs of requests, their resampling, trial-to-trial noise.

docs/concepts/statistics.md explains why an interval needs both: requests of one trial share its
steps and the machine's state, so resampling requests alone would claim too much.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells, Floats, TrialTable
from specwise.domain import LoadPoint, Purpose

_QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_MAX_DRAWS, _MAX_DRAWN_VALUES = 400, 1_000_000
_FEWEST_DOF_BY_LOAD = 4


@dataclass(frozen=True, slots=True)
class Metric:
    """How one metric is computed from a column of requests (see `statistic`)."""

    name: str
    column: str
    kind: str
    better: Literal["higher", "lower"]


SPEEDUP = Metric("speedup", "e2e_s", "per_token", "higher")
REQUEST_METRICS = (
    SPEEDUP,
    *(
        Metric(f"{name}_{kind}", f"{name}_s", kind, "lower")
        for name in ("ttft", "tpot", "e2e")
        for kind in ("mean", "p50", "p95", "p99")
    ),
)


# ---------------------------------------------------------------------------------------------
# Pairs: the same request in two arms


@dataclass(frozen=True, slots=True)
class Pairs:
    """Requests of one cell that ended OK in both arms, over all repeats that both have.

    ``columns[name]`` is a 2 x n array, baseline first; NaN in both rows where either arm cannot
    give the value. ``failed`` counts requests that did not end OK, baseline first.
    ``cluster`` numbers the prompts: a prompt that several repeats share is resampled as one,
    because its difficulty is common to them. ``stratum`` numbers each pair's segment: a mix has
    its shares by design, so requests are resampled within segments.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    columns: Mapping[str, Floats]
    cluster: NDArray[np.int64]
    stratum: NDArray[np.int64]
    shares_prompts: bool
    repeats: int
    base_tables: tuple[TrialTable, ...]
    arm_tables: tuple[TrialTable, ...]
    failed: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of pairs."""
        return len(self.cluster)

    @property
    def seed_words(self) -> tuple[int, int]:
        """What makes a cell's random stream its own: its names and its load, as numbers."""
        name = f"{self.arm}/{self.workload}/{self.segment}/{self.load.label}"
        return zlib.crc32(name.encode()), self.repeats


PairKey = tuple[str, str, str | None, LoadPoint]
_COLUMNS = ("ttft_s", "tpot_s", "e2e_s", "output_tokens")


def match_pairs(
    measured: Cells,
    baseline: str,
    views: Mapping[str, tuple[str | None, ...]],
) -> dict[PairKey, Pairs]:
    """The pairs of every candidate cell that has a baseline, by (arm, workload, segment, load)."""
    matched: dict[PairKey, Pairs] = {}
    for (arm, workload, load, purpose), tables in measured.items():
        base = measured.get((baseline, workload, load, Purpose.MEASURE))
        if arm == baseline or purpose is not Purpose.MEASURE or base is None:
            continue
        for segment in views.get(workload, (None,)):
            pairs = pair_trials(base, tables, (arm, workload, segment, load))
            if pairs is not None:
                matched[arm, workload, segment, load] = pairs
    return matched


def pair_trials(
    base: Sequence[TrialTable], candidate: Sequence[TrialTable], key: PairKey
) -> Pairs | None:
    """Pairs by (repeat, index); None if no request ended OK in both arms."""
    arm, workload, segment, load = key
    of_base = {table.trial.repeat: table for table in base}
    both = [(of_base[t.trial.repeat], t) for t in candidate if t.trial.repeat in of_base]
    columns: dict[str, list[Floats]] = {name: [] for name in _COLUMNS}
    prompts: list[str] = []
    segments: list[str] = []
    per_repeat: list[set[str]] = []
    failed = [0, 0]
    for a, b in both:
        rows_a, rows_b = common_rows((a, b), segment)
        for name in _COLUMNS:
            pair = np.stack([getattr(a, name)[rows_a], getattr(b, name)[rows_b]])
            pair[:, np.isnan(pair).any(0)] = np.nan
            columns[name].append(pair)
        names = [str(p) for p in a.prompt_id[rows_a]]
        prompts += names
        segments += [str(name) for name in a.segment[rows_a]]
        per_repeat.append(set(names))
        for side, table in enumerate((a, b)):
            failed[side] += int((table.rows(segment) & ~table.ok).sum())
    if not prompts:
        return None
    _, stratum = np.unique(np.array(segments), return_inverse=True)
    keys = [f"{name}\0{prompt}" for name, prompt in zip(segments, prompts, strict=True)]
    _, cluster = np.unique(np.array(keys), return_inverse=True)
    return Pairs(
        arm=arm,
        workload=workload,
        segment=segment,
        load=load,
        columns={name: np.concatenate(held, axis=1) for name, held in columns.items()},
        cluster=cluster,
        stratum=stratum,
        shares_prompts=sum(len(s) for s in per_repeat) > len(set().union(*per_repeat)),
        repeats=len(both),
        base_tables=tuple(a for a, _ in both),
        arm_tables=tuple(b for _, b in both),
        failed=(failed[0], failed[1]),
    )


def common_rows(tables: Sequence[TrialTable], segment: str | None) -> list[NDArray[np.int64]]:
    """Row numbers, one array a table, of the indexes that ended OK in all of them."""
    usable = [t.ok & ~np.isnan(t.output_tokens) & t.rows(segment) for t in tables]
    common = set(tables[0].index[usable[0]].tolist())
    for table, rows in zip(tables[1:], usable[1:], strict=True):
        common &= set(table.index[rows].tolist())
    return [
        np.array([i for i, n in enumerate(table.index.tolist()) if n in common], dtype=np.int64)
        for table in tables
    ]


# ---------------------------------------------------------------------------------------------
# Statistics of requests, and their resampling


def statistic(values: Floats, tokens: Floats, kind: str) -> Floats:
    """One number for each row of ``values`` (rows x requests); NaN requests do not count.

    per_token: sum(values) / sum(tokens); mean; p50, p95, p99 by linear interpolation. NaN where
    no request has a value.
    """
    known = ~np.isnan(values)
    if kind in ("per_token", "mean"):
        per = np.where(known, tokens, 0.0).sum(-1) if kind == "per_token" else known.sum(-1)
        return _over(np.where(known, values, 0.0).sum(-1), per)
    return _sorted_quantile(np.sort(values, axis=-1), known.sum(-1), _QUANTILES[kind])


def _over(total: Floats, per: Floats | NDArray[np.int64]) -> Floats:
    """total / per, NaN where ``per`` is 0."""
    return np.asarray(np.divide(total, per, where=per > 0, out=np.full(np.shape(total), np.nan)))


def _sorted_quantile(ordered: Floats, counts: NDArray[np.int64], q: float) -> Floats:
    """The q quantile of each sorted row, of which the first ``counts`` values are not NaN."""
    place = q * np.maximum(counts - 1, 0)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(counts - 1, 0))
    low = np.take_along_axis(ordered, below[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, above[..., None], -1)[..., 0]
    return np.asarray(low + (high - low) * (place - below))


def log_ratio(metric: Metric, base: Floats, candidate: Floats) -> Floats:
    """log(candidate / baseline), the other way round for the speedup; NaN without a value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(candidate) - np.log(base)
    signed = -ratio if metric.kind == "per_token" else ratio
    return np.where(np.isfinite(signed), signed, np.nan)


def _draws(pairs: Pairs, rng: np.random.Generator) -> NDArray[np.int64]:
    """Resampled pair numbers, draws x pairs; -1 pads where prompts have unequally many pairs."""
    clusters = int(pairs.cluster.max()) + 1
    sizes = np.bincount(pairs.cluster, minlength=clusters)
    members = np.full((clusters, int(sizes.max())), -1, dtype=np.int64)
    order = np.argsort(pairs.cluster, kind="stable")
    starts = np.cumsum(sizes) - sizes
    members[pairs.cluster[order], np.arange(pairs.count) - np.repeat(starts, sizes)] = order
    draws = int(np.clip(_MAX_DRAWN_VALUES // members.size, 100, _MAX_DRAWS))
    drawn = []
    for stratum in range(int(pairs.stratum.max()) + 1):
        inside = members[np.unique(pairs.cluster[pairs.stratum == stratum])]
        chosen = rng.integers(0, len(inside), size=(draws, len(inside)))
        drawn.append(inside[chosen].reshape(draws, -1))
    return np.concatenate(drawn, axis=1)


def bootstrap_variances(pairs: Pairs, metrics: Sequence[Metric], *, seed: int) -> dict[str, float]:
    """Variance of each metric's log ratio over resampled prompts, pairs kept together.

    The paired cluster bootstrap (Davison & Hinkley 1997, sections 2.3 and 3.8): what the choice
    of requests alone leaves uncertain. Resampling n things gives (n - 1) / n of the variance of
    their mean; that is put right. NaN where fewer than two prompts give the metric.
    """
    clusters, strata = int(pairs.cluster.max()) + 1, int(pairs.stratum.max()) + 1
    missing = clusters / (clusters - strata) if clusters > strata else 1.0
    drawn = _draws(pairs, np.random.default_rng([seed, *pairs.seed_words]))
    times = _times_drawn(drawn, pairs.count)
    variances: dict[str, float] = {}
    for column in dict.fromkeys(metric.column for metric in metrics):
        values = pairs.columns[column]
        known = ~np.isnan(values).any(0)
        enough = len(np.unique(pairs.cluster[known])) >= 2
        of_column = [m for m in metrics if m.column == column]
        sums = np.where(known, values, 0.0) @ times.T
        counts = times @ known
        if any(m.kind in _QUANTILES for m in of_column):
            padded = np.concatenate([values, np.full((2, 1), np.nan)], axis=1)
            ordered = np.sort(padded[:, drawn], axis=-1)
        for metric in of_column:
            if metric.kind in _QUANTILES:
                whole = np.broadcast_to(counts.astype(np.int64), sums.shape)
                statistics = _sorted_quantile(ordered, whole, _QUANTILES[metric.kind])
            elif metric.kind == "per_token":
                tokens = np.where(known, pairs.columns["output_tokens"], 0.0) @ times.T
                statistics = _over(sums, tokens)
            else:
                statistics = _over(sums, np.broadcast_to(counts, sums.shape))
            logs = log_ratio(metric, statistics[0], statistics[1])
            logs = logs[~np.isnan(logs)]
            variances[metric.name] = (
                float(logs.var(ddof=1)) * missing if enough and len(logs) > 1 else float("nan")
            )
    return variances


def _times_drawn(drawn: NDArray[np.int64], count: int) -> Floats:
    """How often each pair was drawn, draws x pairs: a sum over a draw is a matrix product."""
    width = count + 1  # the padding, -1, lands in a last column of its own
    flat = (np.arange(len(drawn))[:, None] * width + drawn % width).ravel()
    counted = np.bincount(flat, minlength=len(drawn) * width).reshape(len(drawn), width)
    return counted[:, :count].astype(np.float64)


# ---------------------------------------------------------------------------------------------
# Trial-to-trial noise


@dataclass(frozen=True, slots=True)
class TrialNoise:
    """Trial-to-trial noise of one metric at one load, pooled over workloads.

    ``pair_variance`` is the variance of log(candidate / baseline) of one pair of trials on the
    same requests; ``request_variance`` what the requests alone explain of it; ``dof`` how many
    independent differences it rests on. With ``dof`` 0 nothing is known.
    """

    pair_variance: float
    request_variance: float
    dof: float

    @property
    def machine_variance(self) -> float:
        """What is left for the machine when the requests' own noise is taken off, at least 0."""
        return max(0.0, self.pair_variance - self.request_variance)


UNKNOWN_NOISE = TrialNoise(0.0, 0.0, 0.0)


def trial_noise(
    measured: Cells,
    baseline: str,
    metric: Metric,
    matched: Mapping[PairKey, Pairs],
    bootstraps: Mapping[PairKey, Mapping[str, float]],
) -> dict[LoadPoint, TrialNoise]:
    """Trial noise of ``metric`` by load point, from repeats and A/A trials.

    Repeats: for each (workload, load) the arms x repeats table of the metric's log is a
    randomised block design; the mean square left after arm and repeat effects, with
    (arms - 1)(repeats - 1) degrees of freedom, estimates a single trial's variance (Montgomery,
    Design and Analysis of Experiments, section 4.1). A/A: half the squared log ratio of two
    baseline trials on the same requests estimates the same variance with one degree of freedom.
    Both are pooled over workloads at a load, and over all loads where a load has fewer than four.
    """
    squares: dict[LoadPoint, float] = defaultdict(float)
    dof: dict[LoadPoint, float] = defaultdict(float)
    loads = {key[2] for key in measured}
    for workload, load in sorted({(key[1], key[2]) for key in measured}):
        arms = [
            tables
            for (_, w, at, purpose), tables in measured.items()
            if (w, at) == (workload, load) and purpose is Purpose.MEASURE
        ]
        again = measured.get((baseline, workload, load, Purpose.NOISE_FLOOR), ())
        base = measured.get((baseline, workload, load, Purpose.MEASURE), ())
        for sum_of_squares, degrees in (
            _block_residual(arms, metric),
            _repeat_difference(base, again, metric),
        ):
            squares[load] += sum_of_squares
            dof[load] += degrees
    request_variance: dict[LoadPoint, list[float]] = defaultdict(list)
    for key, pairs in matched.items():
        variance = bootstraps[key][metric.name]
        if pairs.segment is None and np.isfinite(variance):
            request_variance[pairs.load].append(variance * pairs.repeats)
    found = {}
    for load in loads:
        if dof[load] >= _FEWEST_DOF_BY_LOAD:
            total, degrees, own = squares[load], dof[load], request_variance[load]
        else:
            total, degrees = sum(squares.values()), sum(dof.values())
            own = [v for held in request_variance.values() for v in held]
        found[load] = (
            TrialNoise(2 * total / degrees, float(np.mean(own)) if own else 0.0, degrees)
            if degrees
            else UNKNOWN_NOISE
        )
    return found


def _block_residual(arms: Sequence[Sequence[TrialTable]], metric: Metric) -> tuple[float, float]:
    """Residual sum of squares and its degrees of freedom in the arms x repeats table of logs."""
    by_repeat = [{t.trial.repeat: t for t in tables} for tables in arms]
    repeats = sorted(set.intersection(*(set(r) for r in by_repeat))) if by_repeat else []
    if len(arms) < 2 or len(repeats) < 2:
        return 0.0, 0.0
    logs = np.array([_trial_logs([held[r] for held in by_repeat], metric) for r in repeats])
    if np.isnan(logs).any():
        return 0.0, 0.0
    residual = logs - logs.mean(0) - logs.mean(1, keepdims=True) + logs.mean()
    return float((residual**2).sum()), float((len(arms) - 1) * (len(repeats) - 1))


def _repeat_difference(
    base: Sequence[TrialTable], again: Sequence[TrialTable], metric: Metric
) -> tuple[float, float]:
    """Half the squared log ratio of each A/A trial to the trial it repeats, and their number."""
    of_base = {t.trial.repeat: t for t in base}
    total, count = 0.0, 0
    for table in again:
        if table.trial.repeat in of_base:
            first, second = _trial_logs([of_base[table.trial.repeat], table], metric)
            if np.isfinite(first - second):
                total += float((first - second) ** 2 / 2)
                count += 1
    return total, float(count)


def _trial_logs(tables: Sequence[TrialTable], metric: Metric) -> Floats:
    """Log of the metric in each table, over the requests that ended OK in all of them."""
    rows = common_rows(tables, None)
    values = [
        float(statistic(getattr(t, metric.column)[r], t.output_tokens[r], metric.kind))
        if len(r)
        else float("nan")
        for t, r in zip(tables, rows, strict=True)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Floats = np.log(np.array(values, dtype=np.float64))
    return logs
