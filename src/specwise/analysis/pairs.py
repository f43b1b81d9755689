"""The numerics under every comparison: pairs of requests, their resampling, trial-to-trial noise.

docs/concepts/statistics.md explains why an interval needs both: requests of one trial share its
steps and the machine's state, so resampling requests alone would claim too much.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells, Floats, TrialTable
from specwise.analysis.latency import rates
from specwise.domain import LoadPoint, Purpose

_QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_MAX_DRAWS, _TRIAL_DRAWS, _MAX_DRAWN_VALUES = 400, 150, 1_000_000
_FEWEST_DOF_BY_LOAD = 4
_TINY = 1e-12  # a variance of log ratios that is as good as none
FEWEST_PAIRS = {"p95": 20, "p99": 100}
"""Pairs below which a percentile is little more than the largest value, and gets no interval."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How one metric is computed from a column of requests (see `statistic`).

    ``per`` is the column whose sum divides, for kind "ratio". A rate of the server has a ``rate``,
    its place in what `latency.rates` returns: that is its value, and the ratio of sums is what
    requests are resampled into.
    """

    name: str
    column: str
    kind: str
    better: Literal["higher", "lower"]
    per: str = ""
    rate: int | None = None


SPEEDUP = Metric("speedup", "e2e_s", "ratio", "higher", per="output_tokens")
RATE_METRICS = (
    Metric("output_tokens_per_s", "output_tokens", "ratio", "higher", per="e2e_s", rate=0),
    Metric("goodput_per_s", "meets_slo", "ratio", "higher", per="e2e_s", rate=2),
)
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
    repeat: NDArray[np.int64]
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
_COLUMNS = ("ttft_s", "tpot_s", "e2e_s", "output_tokens", "meets_slo")


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
    repeat: list[int] = []
    per_repeat: list[set[str]] = []
    failed = [0, 0]
    for number, (a, b) in enumerate(both):
        rows_a, rows_b = common_rows((a, b), segment)
        for name in _COLUMNS:
            sides = (getattr(a, name)[rows_a], getattr(b, name)[rows_b])
            pair = np.stack(sides).astype(np.float64)
            pair[:, np.isnan(pair).any(0)] = np.nan
            columns[name].append(pair)
        names = [str(p) for p in a.prompt_id[rows_a]]
        prompts += names
        segments += [str(name) for name in a.segment[rows_a]]
        repeat += [number] * len(names)
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
        repeat=np.array(repeat, dtype=np.int64),
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


def statistic(values: Floats, per: Floats | None, kind: str) -> Floats:
    """One number for each row of ``values`` (rows x requests); NaN requests do not count.

    ratio: sum(values) / sum(per); mean; p50, p95, p99 by linear interpolation. NaN where no
    request has a value.
    """
    known = ~np.isnan(values)
    if kind in ("ratio", "mean"):
        divisor = known.sum(-1) if per is None else np.where(known, per, 0.0).sum(-1)
        return _over(np.where(known, values, 0.0).sum(-1), divisor)
    return _sorted_quantile(np.sort(values, axis=-1), known.sum(-1), _QUANTILES[kind])


def _over(total: Floats, per: Floats | NDArray[np.int64]) -> Floats:
    """total / per, NaN where ``per`` is 0."""
    return np.asarray(np.divide(total, per, where=per > 0, out=np.full(np.shape(total), np.nan)))


def _sorted_quantile(ordered: Floats, counts: NDArray[np.int64], q: float) -> Floats:
    """The q quantile of each sorted row, of which the first ``counts`` values are not NaN."""
    if counts.size and counts.min() == counts.max() > 0:  # the usual case, and much the faster
        place_of_all = q * (int(counts.flat[0]) - 1)
        first = int(place_of_all)
        then = min(first + 1, int(counts.flat[0]) - 1)
        step = ordered[..., then] - ordered[..., first]
        return np.asarray(ordered[..., first] + step * (place_of_all - first))
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
    signed = -ratio if metric == SPEEDUP else ratio
    return np.where(np.isfinite(signed), signed, np.nan)


def _draws(pairs: Pairs, rng: np.random.Generator, most: int) -> NDArray[np.int64]:
    """Resampled pair numbers, draws x pairs; -1 pads where prompts have unequally many pairs."""
    clusters = int(pairs.cluster.max()) + 1
    sizes = np.bincount(pairs.cluster, minlength=clusters)
    members = np.full((clusters, int(sizes.max())), -1, dtype=np.int64)
    order = np.argsort(pairs.cluster, kind="stable")
    starts = np.cumsum(sizes) - sizes
    members[pairs.cluster[order], np.arange(pairs.count) - np.repeat(starts, sizes)] = order
    draws = int(np.clip(_MAX_DRAWN_VALUES // members.size, 100, most))
    drawn = []
    for stratum in range(int(pairs.stratum.max()) + 1):
        inside = members[np.unique(pairs.cluster[pairs.stratum == stratum])]
        chosen = rng.integers(0, len(inside), size=(draws, len(inside)))
        drawn.append(inside[chosen].reshape(draws, -1))
    return np.concatenate(drawn, axis=1)


def bootstrap_variances(
    pairs: Pairs, metrics: Sequence[Metric], *, seed: int, draws: int = _MAX_DRAWS
) -> dict[str, float]:
    """Variance of each metric's log ratio over resampled prompts, pairs kept together.

    The paired cluster bootstrap (Davison & Hinkley 1997, sections 2.3 and 3.8): what the choice
    of requests alone leaves uncertain. Resampling n things gives (n - 1) / n of the variance of
    their mean; that is put right. NaN where fewer than two prompts give the metric.
    """
    clusters, strata = int(pairs.cluster.max()) + 1, int(pairs.stratum.max()) + 1
    missing = clusters / (clusters - strata) if clusters > strata else 1.0
    drawn = _draws(pairs, np.random.default_rng([seed, *pairs.seed_words]), draws)
    times = _times_drawn(drawn, pairs.count)
    resampled: dict[str, Floats] = {}
    variances: dict[str, float] = {}
    for column in dict.fromkeys(metric.column for metric in metrics):
        values = pairs.columns[column]
        known = ~np.isnan(values).any(0)
        if len(np.unique(pairs.cluster[known])) < 2:
            variances |= {m.name: math.nan for m in metrics if m.column == column}
            continue
        sums = np.where(known, values, 0.0) @ times.T
        counts = times @ known
        of_column = [m for m in metrics if m.column == column]
        if any(m.kind in _QUANTILES for m in of_column):
            padded = np.concatenate([values, np.full((2, 1), np.nan)], axis=1)
            ordered = np.sort(padded[:, drawn], axis=-1)
            whole = np.broadcast_to(counts.astype(np.int64), sums.shape)
        for metric in of_column:
            if metric.kind in _QUANTILES:
                resampled[metric.name] = _sorted_quantile(ordered, whole, _QUANTILES[metric.kind])
            elif metric.kind == "ratio":
                per = np.where(known, pairs.columns[metric.per], 0.0) @ times.T
                resampled[metric.name] = _over(sums, per)
            else:
                resampled[metric.name] = _over(sums, np.broadcast_to(counts, sums.shape))
    kinds = {metric.name: metric.kind for metric in metrics}
    for tail in (False, True):
        names = [name for name in resampled if (kinds[name] in _QUANTILES) == tail]
        if names:
            found = _spreads(np.stack([resampled[name] for name in names]), tail=tail)
            variances |= dict(zip(names, (found * missing).tolist(), strict=True))
    if "output_tokens_per_s" in variances:
        variances["output_tokens_per_s"] /= _share_inside(pairs)
    return variances


def _share_inside(pairs: Pairs) -> float:
    """The share of the output that arrived inside the loaded windows, which rates are over."""
    tables = (*pairs.base_tables, *pairs.arm_tables)
    inside = sum(float(np.nansum(t.window_tokens)) for t in tables)
    total = sum(float(np.nansum(t.output_tokens)) for t in tables)
    return inside / total if 0 < inside <= total else 1.0


def _spreads(values: Floats, *, tail: bool) -> Floats:
    """Variance over the draws of log(candidate / baseline), ``values`` metrics x 2 x draws.

    For percentiles (``tail``) that of the normal with the draws' middle 68 %: draws of a tail
    percentile jump to the next larger request now and then, and their variance, ruled by those
    jumps, is twice the estimate's own (docs/concepts/statistics.md). NaN where fewer than two draws
    have a value.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values[:, 1]) - np.log(values[:, 0])
    logs = np.where(np.isfinite(logs), logs, np.nan)
    found = np.full(len(logs), np.nan)
    for complete in (True, False):
        rows = np.isfinite(logs).all(-1) == complete
        if not complete:
            rows &= np.isfinite(logs).sum(-1) > 1
        if not rows.any():
            continue
        if tail:
            quantile = np.quantile if complete else np.nanquantile
            low, high = quantile(logs[rows], [0.1587, 0.8413], axis=-1)
            found[rows] = ((high - low) / 2) ** 2
        else:
            variance = np.var if complete else np.nanvar
            found[rows] = variance(logs[rows], axis=-1, ddof=1)
    return found


def trial_variances(pairs: Pairs, metrics: Sequence[Metric], *, seed: int) -> dict[str, float]:
    """What requests alone make one pair of trials differ by: `bootstrap_variances` of each repeat
    by itself, averaged. For a tail percentile that is more than ``repeats`` times the variance of
    all repeats together, because a trial's tail holds fewer requests."""
    each = [
        bootstrap_variances(_one_repeat(pairs, number), metrics, seed=seed, draws=_TRIAL_DRAWS)
        for number in np.unique(pairs.repeat)
    ]
    return {
        metric.name: float(np.mean([variances[metric.name] for variances in each]))
        for metric in metrics
    }


def _one_repeat(pairs: Pairs, number: int) -> Pairs:
    rows = pairs.repeat == number
    return replace(
        pairs,
        columns={name: values[:, rows] for name, values in pairs.columns.items()},
        repeat=pairs.repeat[rows],
        cluster=np.unique(pairs.cluster[rows], return_inverse=True)[1],
        stratum=np.unique(pairs.stratum[rows], return_inverse=True)[1],
    )


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

    ``machine_variance`` is the variance of log(candidate / baseline) of one pair of trials on the
    same requests beyond what the requests explain, ``doubt`` the variance of that estimate, and
    ``dof`` how many independent differences it rests on. With ``dof`` 0 nothing is known.
    ``pair_variance`` is the whole variance of one pair of trials here, requests included, known
    with ``pair_dof`` degrees of freedom.
    """

    machine_variance: float
    doubt: float
    dof: float
    pair_variance: float
    pair_dof: float


UNKNOWN_NOISE = TrialNoise(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Block:
    """Trials of one workload and load that served the same requests: what noise is read from.

    ``tables[i][j]`` is arm i in repeat j, ``rows`` the requests that ended OK in every arm of that
    repeat. ``again`` marks an A/A block: two trials of the baseline.
    """

    workload: str
    load: LoadPoint
    tables: tuple[tuple[TrialTable, ...], ...]
    rows: tuple[tuple[NDArray[np.int64], ...], ...]
    again: bool


def noise_blocks(measured: Cells, baseline: str) -> tuple[Block, ...]:
    """A block for every (workload, load) with repeats, and one for every A/A trial."""
    found = []
    for workload, load in sorted({(key[1], key[2]) for key in measured}):
        arms = [
            {t.trial.repeat: t for t in tables}
            for (_, w, at, purpose), tables in measured.items()
            if (w, at) == (workload, load) and purpose is Purpose.MEASURE
        ]
        repeats = sorted(set.intersection(*(set(held) for held in arms))) if arms else []
        if len(arms) > 1 and len(repeats) > 1:
            by_repeat = [[held[r] for held in arms] for r in repeats]
            found.append(_block(workload, load, by_repeat, again=False))
        base = {
            t.trial.repeat: t for t in measured.get((baseline, workload, load, Purpose.MEASURE), ())
        }
        found += [
            _block(workload, load, [[base[t.trial.repeat], t]], again=True)
            for t in measured.get((baseline, workload, load, Purpose.NOISE_FLOOR), ())
            if t.trial.repeat in base
        ]
    return tuple(found)


def _block(
    workload: str, load: LoadPoint, by_repeat: list[list[TrialTable]], *, again: bool
) -> Block:
    rows = [common_rows(tables, None) for tables in by_repeat]
    return Block(
        workload,
        load,
        tuple(zip(*by_repeat, strict=True)),
        tuple(zip(*rows, strict=True)),
        again,
    )


def trial_noise(
    blocks: Sequence[Block],
    metric: Metric,
    of_trials: Mapping[PairKey, Mapping[str, float]],
) -> dict[LoadPoint, TrialNoise]:
    """Trial noise of ``metric`` by load point, from repeats and A/A trials.

    Repeats: for each (workload, load) the arms x repeats table of the metric's log is a
    randomised block design; the mean square left after arm and repeat effects, with
    (arms - 1)(repeats - 1) degrees of freedom, estimates a single trial's variance (Montgomery,
    Design and Analysis of Experiments, section 4.1). A/A: half the squared log ratio of two
    baseline trials on the same requests estimates the same variance with one degree of freedom.
    Both are pooled over workloads at a load, and over all loads where a load has fewer than four.
    ``of_trials`` are the `trial_variances` of every cell with a baseline.
    """
    requests: dict[tuple[str, LoadPoint], list[float]] = defaultdict(list)
    of_load: dict[LoadPoint, list[float]] = defaultdict(list)
    for (_, workload, _, load), variances in of_trials.items():
        if np.isfinite(variances[metric.name]):
            requests[workload, load].append(variances[metric.name])
            of_load[load].append(variances[metric.name])
    squares = []
    for block in blocks:
        logs = _block_logs(block, metric)
        if not np.isfinite(logs).all():
            continue
        own = requests[block.workload, block.load] or of_load[block.load] or [0.0]
        if block.again:
            pair_square, dof = float((logs[0, 0] - logs[1, 0]) ** 2), 1
        else:
            residual = logs - logs.mean(0) - logs.mean(1, keepdims=True) + logs.mean()
            pair_square = 2 * float((residual**2).sum())
            dof = (logs.shape[0] - 1) * (logs.shape[1] - 1)
        squares.append(_Square(block.load, pair_square, dof, float(np.mean(own))))
    found = {}
    for load in {key[3] for key in of_trials}:
        pool = [square for square in squares if square.load == load]
        if sum(square.dof for square in pool) < _FEWEST_DOF_BY_LOAD:
            pool = squares
        found[load] = _machine_noise(pool, float(np.mean(of_load[load] or [0.0])))
    return found


class _Square(NamedTuple):
    """One block's sum of squares for pairs of trials: ``dof`` x their variance on average, of
    which their requests explain ``request_variance``."""

    load: LoadPoint
    total: float
    dof: int
    request_variance: float


def _machine_noise(pool: Sequence[_Square], request_variance: float) -> TrialNoise:
    """The machine's variance m2 behind blocks whose requests explain more here and less there.

    Block b has a sum of squares that is (m2 + r_b) times a chi-square of d_b degrees of freedom,
    r_b its requests' part. The likeliest m2 >= 0 has the variance 2 / sum w_b d_b,
    w_b = 1 / (m2 + r_b)^2. A plain difference of means would be ruled by the loads with the fewest
    requests, whose r_b is largest and tells least. Where the squares are smaller than the requests
    alone explain, m2 is 0 and the variance shrinks with them.
    """
    dof = float(sum(square.dof for square in pool))
    if not dof:
        return UNKNOWN_NOISE
    total = np.array([square.total for square in pool])
    d = np.array([float(square.dof) for square in pool])
    r = np.maximum([square.request_variance for square in pool], _TINY)
    m2 = _likeliest(total, d, r)
    weight = 1 / (m2 + r) ** 2
    seen = float((weight * total).sum() / (weight * d * (m2 + r)).sum())  # of what is expected
    variance = 2 / float((weight * d).sum())
    here = m2 + max(request_variance, _TINY)
    return TrialNoise(
        machine_variance=m2,
        doubt=min(seen, 1.0) ** 2 * variance,
        dof=dof,
        pair_variance=min(seen, 1.0) * here,
        pair_dof=2 * here**2 / variance,
    )


def _likeliest(total: Floats, dof: Floats, r: Floats) -> float:
    """The m2 >= 0 that makes sum d_b log(m2 + r_b) + total_b / (m2 + r_b) least, to 1 in 1,000."""
    top = max(float((total / dof - r).max()), 0.0)
    tried = np.append(0.0, np.geomspace(1e-6, 1.0, 40)) * top
    for _ in range(4):
        variance = tried[:, None] + r
        best = int(np.argmin((dof * np.log(variance) + total / variance).sum(1)))
        found = float(tried[best])
        tried = np.linspace(tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)], 41)
    return found


def _block_logs(block: Block, metric: Metric) -> Floats:
    """Log of the metric in each trial of a block, arms x repeats; NaN without a value."""
    values = np.array(
        [
            [_trial_value(table, rows, metric) for table, rows in zip(tables, held, strict=True)]
            for tables, held in zip(block.tables, block.rows, strict=True)
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Floats = np.log(values)
    return logs


def _trial_value(table: TrialTable, rows: NDArray[np.int64], metric: Metric) -> float:
    """The metric in one trial: a rate over its loaded window, else over the requests ``rows``."""
    if metric.rate is not None:
        held = rates((table,), None)
        return held[metric.rate] if held else math.nan
    if not len(rows):
        return math.nan
    per = getattr(table, metric.per)[rows] if metric.per else None
    return float(statistic(getattr(table, metric.column)[rows], per, metric.kind))
