"""What is believed about every arm in every cell, given a prediction and the trials so far.

The gains g (log goodput over the baseline's) of all (arm, cell) pairs are jointly normal: their
mean is the prediction, their covariance says how its errors hang together. A trial of arm a in
block b (a cell and a repeat: the same requests for every arm) shows

    y = g[a, cell] + level[b] + drift(t) + noise,        g[baseline] = 0,

where nothing is known of the block's level. So trials of one block are compared with each other
and with nothing else: the paired design, without choosing which trials to pair. The drift is the
machine's, the same for all that runs at time t: what else it does, how warm it is. Two trials a
minute apart share most of it, two that are ten minutes apart none. Conditioning is that of a
Gaussian process (Rasmussen and Williams 2006, eq. 2.23 and 2.24).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.steps import LOOKUPS
from specwise.analysis.sweep_forecast import Known
from specwise.domain import LoadPoint, Workload

Floats = NDArray[np.float64]
Cell = tuple[str, LoadPoint]

_LEVEL_VARIANCE = 25.0  # of a block's level: as good as unknown
_OWN_ERROR = 0.012  # of one cell's prediction, shared with no other
_ERRORS: Mapping[Known, float] = {"itself": 0.07, "its method": 0.14, "nothing": 0.35}
"""Standard deviation of log(measured / predicted) by what the prediction rests on. The first is
what the embedded engine and the simulator showed (docs/concepts/tuning.md)."""
_IDLE_ERROR = 0.6  # of that, for an arm that idles: acceptance and verifying are not in it
_ERROR_SCALES = (0.6, 1.0, 1.6)
_MACHINE_DEVIATIONS = (0.003, 0.006, 0.0125, 0.025, 0.05, 0.1)
_USUAL_MACHINE, _SPREAD = 0.015, 0.8  # log-normal prior of a trial's own deviation
_LIKELY = 4.0  # of the grid, what is at least exp(-4) times as likely as the likeliest
_DRIFTS = (0.0, 0.02, 0.04, 0.08, 0.16)
_USUAL_DRIFT = 0.03  # mean of an exponential prior
_DRIFT_LASTS_S = 120.0
"""Of a drift, exp(-t / that) is left after t. On two virtual cores one to two minutes were the
likeliest of half a minute to 15, in a search and in a sweep (docs/concepts/tuning.md)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A speculating arm, as far as beliefs go. ``k`` is 0 for the arm that idles."""

    arm: str
    family: str
    method: str
    k: int


@dataclass(frozen=True, slots=True)
class Observed:
    """One finished trial: log goodput of ``arm`` (None: the baseline) in ``cell``.

    ``request_variance`` is what its choice of requests leaves uncertain once trials of the same
    ``repeat`` are compared; what the machine adds is inferred. ``at_s`` is the middle of the trial
    on any clock, None where it is not known.
    """

    arm: str | None
    cell: Cell
    repeat: int
    value: float
    request_variance: float
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Belief:
    """Joint normal over gains: ``mean[i, j]`` of candidate i in cell j; ``covariance`` over the
    same pairs, flattened row by row. ``machine_deviation`` is what one trial's log goodput
    differs by for no reason of its own, ``drift_deviation`` the part of it that trials close in
    time share."""

    candidates: tuple[Candidate, ...]
    cells: tuple[Cell, ...]
    mean: Floats
    covariance: Floats
    machine_deviation: float
    drift_deviation: float = 0.0

    @property
    def deviation(self) -> Floats:
        """Standard deviation of each gain, candidates x cells."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0)).reshape(self.mean.shape)

    def draws(self, count: int, rng: np.random.Generator) -> Floats:
        """``count`` joint draws, draws x (1 + candidates) x cells; row 0 is the baseline's 0."""
        jitter = 1e-10 * np.eye(len(self.covariance))
        root = np.linalg.cholesky(self.covariance + jitter)
        flat = self.mean.ravel() + rng.standard_normal((count, len(root))) @ root.T
        gains = flat.reshape(count, *self.mean.shape)
        return np.concatenate([np.zeros((count, 1, len(self.cells))), gains], axis=1)

    def best(self) -> NDArray[np.int64]:
        """For each cell the row of the largest mean: 0 the baseline, else 1 + candidate."""
        return np.asarray(np.argmax(np.vstack([np.zeros(len(self.cells)), self.mean]), axis=0))


def believe(
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    *,
    workloads: Mapping[str, Workload],
    predicted: Mapping[tuple[str, str, LoadPoint], float],
    rests_on: Mapping[str, Known],
    observed: Sequence[Observed],
) -> Belief:
    """The belief after ``observed``.

    How wrong predictions are, how much the machine drifts and how much a trial varies beside that
    are averaged over a small grid by prior times likelihood, as a mixture of normals with the
    mixture's own mean and covariance: few trials leave open which it is, and that is part of what
    is not known. A cell without a prediction is expected to win or lose
    nothing, give or take a third.
    """
    mean = np.array([[predicted.get((c.arm, *cell), 0.0) for cell in cells] for c in candidates])
    # With lookups vLLM (0.32, on a CPU) schedules a step only when the one before is done: an arm
    # that idles pays for that, and the prediction does not know how much.
    scale = np.array(
        [
            _ERRORS[rests_on.get(c.family, "nothing")]
            * (1.0 if c.k or c.method in LOOKUPS else _IDLE_ERROR)
            for c in candidates
        ]
    )
    for row, candidate in enumerate(candidates):
        if not candidate.k:  # it does what the baseline does and some more: it costs a little
            mean[row] = np.minimum(mean[row], -scale[row])
    shared = _covariance(candidates, cells, workloads, scale)
    own = _OWN_ERROR**2 * np.eye(len(shared))
    if not observed:
        return Belief(tuple(candidates), tuple(cells), mean, shared + own, _USUAL_MACHINE)
    shown = _shown(candidates, cells, observed)
    residuals = np.array([o.value for o in observed]) - np.append(mean, 0.0)[shown]
    levels = _levels(observed)
    requests = np.array([o.request_variance for o in observed])
    joint = _at(shared, shown, shown), _at(own, shown, shown)

    shared_drift = _shared_drift(observed)
    drifts = _DRIFTS if shared_drift is not None else (0.0,)
    if shared_drift is None:
        shared_drift = np.eye(len(observed))

    def covariance(error: float, machine: float, drift: float) -> Floats:
        own_noise = np.diag(requests + machine**2)
        return error**2 * joint[0] + joint[1] + levels + drift**2 * shared_drift + own_noise

    fits = {}
    for error, machine, drift in product(_ERROR_SCALES, _MACHINE_DEVIATIONS, drifts):
        fit = _log_likelihood(residuals, covariance(error, machine, drift))
        fit -= (math.log(machine / _USUAL_MACHINE) / _SPREAD) ** 2 / 2 + math.log(error) ** 2
        fits[error, machine, drift] = fit - drift / _USUAL_DRIFT
    most = max(fits.values())
    weights = {at: math.exp(fit - most) for at, fit in fits.items() if fit > most - _LIKELY}
    total = sum(weights.values())
    everything = np.arange(len(shared))
    parts = []
    for (error, machine, drift), weight in weights.items():
        prior = error**2 * shared + own
        cross = _at(prior, everything, shown)
        gain = np.linalg.solve(covariance(error, machine, drift), cross.T).T
        parts.append((weight / total, mean.ravel() + gain @ residuals, prior - gain @ cross.T))
    after = np.sum([weight * at for weight, at, _ in parts], axis=0)
    left = np.sum([w * (c + np.outer(m - after, m - after)) for w, m, c in parts], axis=0)
    drift2 = sum(weight * at[2] ** 2 for at, weight in weights.items()) / total
    machine2 = sum(weight * at[1] ** 2 for at, weight in weights.items()) / total
    return Belief(
        tuple(candidates),
        tuple(cells),
        after.reshape(mean.shape),
        (left + left.T) / 2,
        math.sqrt(machine2 + drift2),
        math.sqrt(drift2),
    )


def _shown(
    candidates: Sequence[Candidate], cells: Sequence[Cell], observed: Sequence[Observed]
) -> NDArray[np.int64]:
    """Which gain each trial shows, as a place in the flattened means; -1 for the baseline's 0."""
    row = {c.arm: i for i, c in enumerate(candidates)}
    column = {cell: j for j, cell in enumerate(cells)}
    return np.array(
        [-1 if o.arm is None else row[o.arm] * len(cells) + column[o.cell] for o in observed]
    )


def _at(covariance: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
    """Those rows and columns; 0 for the baseline, whose gain is certain."""
    known = np.outer(rows >= 0, columns >= 0)
    return np.where(known, covariance[np.ix_(rows, columns)], 0.0)


def _levels(observed: Sequence[Observed]) -> Floats:
    """Covariance of the blocks' levels: one vague number for all trials of a block."""
    numbers: dict[tuple[Cell, int], int] = {}
    block = np.array([numbers.setdefault((o.cell, o.repeat), len(numbers)) for o in observed])
    return np.asarray(_LEVEL_VARIANCE * (block[:, None] == block))


def _shared_drift(observed: Sequence[Observed]) -> Floats | None:
    """How much of the machine's drift two trials share; None where a time is not known.

    exp(-t / `_DRIFT_LASTS_S`): an Ornstein-Uhlenbeck process, which has no memory but its state.
    """
    at_s = np.array([math.nan if o.at_s is None else o.at_s for o in observed])
    if np.isnan(at_s).any():
        return None
    return np.asarray(np.exp(-np.abs(at_s[:, None] - at_s) / _DRIFT_LASTS_S))


def _log_likelihood(residuals: Floats, covariance: Floats) -> float:
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, residuals)
    return float(-0.5 * white @ white - np.log(np.diag(root)).sum())


def _covariance(
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    workloads: Mapping[str, Workload],
    scale: Floats,
) -> Floats:
    """How prediction errors of all pairs hang together: alike arms, workloads and loads err alike.

    A product of correlations, each of which is a valid kernel by itself: an exponential of the
    distance between draft lengths, log2(k + 1), and between loads, log2; a constant part and the
    common share for workloads; a constant part for arms of the same method or family.
    """
    lengths = np.array([math.log2(c.k + 1) for c in candidates])
    by_k = np.exp(-np.abs(lengths[:, None] - lengths) / 1.5)
    kin = np.array([[_kinship(a, b) for b in candidates] for a in candidates])
    arms = scale[:, None] * scale * kin * by_k
    loads = np.array([math.log2(load.value) for _, load in cells])
    by_load = np.exp(-np.abs(loads[:, None] - loads) / 3)
    shares = [dict(workloads[name].shares) for name, _ in cells]
    common = np.array(
        [[sum(min(v, b.get(name, 0.0)) for name, v in a.items()) for b in shares] for a in shares]
    )
    return np.asarray(np.kron(arms, by_load * (0.5 + 0.5 * common)))


def _kinship(a: Candidate, b: Candidate) -> float:
    if a.family == b.family:
        return 1.0
    return 0.6 if a.method == b.method else 0.2


# ---------------------------------------------------------------------------------------------
# Regret, and what another trial is worth


@dataclass(frozen=True, slots=True)
class Regret:
    """What choosing the best of each cell by the mean may lose: shares of goodput.

    ``expected`` and ``bound`` (95 %) for each cell, ``mean`` and ``mean_bound`` for the average
    over cells: the remaining regret of the whole tuning. ``best_probability`` is (1 + candidates)
    x cells.
    """

    expected: Floats
    bound: Floats
    mean: float
    mean_bound: float
    best_probability: Floats


def regret(belief: Belief, rng: np.random.Generator, *, draws: int = 1000) -> Regret:
    """Regret of `Belief.best`, by joint draws: 1 - exp(g[chosen] - max g)."""
    gains = belief.draws(draws, rng)
    chosen = belief.best()
    lost = 1 - np.exp(gains[:, chosen, np.arange(len(belief.cells))] - gains.max(axis=1))
    winners = gains.argmax(axis=1)
    share = np.stack([(winners == row).mean(axis=0) for row in range(gains.shape[1])])
    average = lost.mean(axis=1)
    return Regret(
        expected=lost.mean(axis=0),
        bound=np.quantile(lost, 0.95, axis=0),
        mean=float(average.mean()),
        mean_bound=float(np.quantile(average, 0.95)),
        best_probability=share,
    )


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_LOOK_AHEAD = 3  # trials a look is worth: one alone may be too noisy to change any choice


def worth(belief: Belief, request_variance: Floats) -> Floats:
    """Expected rise of the cells' summed best mean by trying each pair, candidates x cells.

    The knowledge gradient with correlated beliefs (Frazier, Powell and Dayanik 2009, eq. 13), its
    maximum integrated by Gauss-Hermite nodes; as if each were tried `_LOOK_AHEAD` times, which
    keeps it from standing still where one trial cannot change a choice (their KG(*)).
    ``request_variance`` is that of a trial of each pair, compared to the baseline's.
    """
    rows, columns = belief.mean.shape
    noise = (request_variance.ravel() + 2 * belief.machine_deviation**2) / _LOOK_AHEAD
    variance = np.maximum(np.diag(belief.covariance), 1e-12)
    steps = belief.covariance / np.sqrt(variance + noise)  # column x: how all means move by it
    means = np.vstack([np.zeros(columns), belief.mean])
    now = means.max(axis=0).sum()
    found = np.zeros(rows * columns)
    for index in range(rows * columns):
        move = np.vstack([np.zeros(columns), steps[:, index].reshape(rows, columns)])
        ahead = (means[:, :, None] + move[:, :, None] * _NODES).max(axis=0)
        found[index] = (ahead @ _WEIGHTS).sum() / math.sqrt(2 * math.pi) - now
    return np.maximum(found, 0.0).reshape(rows, columns)
