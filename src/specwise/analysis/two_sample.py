"""Do two servers sample from one distribution? Exact tests, and what they could have seen.

Sampled outputs are compared prompt by prompt. Under the hypothesis that both servers sample from
one distribution, the labels "baseline" and "candidate" of a prompt's sequences are exchangeable, so
dealing them out anew gives the exact null distribution of any statistic (Fisher; Lehmann and
Romano, Testing Statistical Hypotheses, section 15.2). Whole sequences are dealt: the dependence
between their tokens is kept. The p-value (1 + reached) / (1 + deals) is valid at every number of
deals (Phipson and Smyth 2010).

Four statistics share the false-alarm rate by Holm's method:

- ``first token``: Pearson's chi-square of the first tokens, summed over prompts. No draft touches
  them, so a difference here is one in more than speculation;
- ``tokens``: the same over every later position: what rejection sampling decided;
- ``pairs``: the same over pairs of neighbouring tokens, which sees mixed-up sequences too;
- ``sequence``: the difference of the mean log frequency of a sequence's tokens: one number that
  moves when outputs become more, or less, typical (a wrong temperature, a lossy acceptance rule).

Tokens seen fewer than `RARE` times in both samples of a prompt together are lumped, in the order of
their frequency, into lots of a share `LOT` of the sample. That choice depends on the pooled sample
only, which keeps the tests exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from specwise.domain import PermutationTest, PositionDistance, SamplingComparison

ENDED: Final = -1  # the token code after the end of a sequence
RARE: Final = 10
LOT: Final = 0.1
DEALS: Final = 1999
SIMULATIONS: Final = 300
POWER_WANTED: Final = 0.9

FIRST_TOKEN, TOKENS, PAIRS, SEQUENCE = "first token", "tokens", "pairs", "sequence"
TESTS: Final = (FIRST_TOKEN, TOKENS, PAIRS, SEQUENCE)

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """Token codes sampled for one prompt: (samples, positions) arrays, `ENDED` after the end."""

    baseline: Codes
    candidate: Codes


def codes_of(sequences: Sequence[Sequence[int]], positions: int) -> Codes:
    """Token lists as a (sequences, positions) array, cut or filled with `ENDED`."""
    codes = np.full((len(sequences), positions), ENDED, dtype=np.int64)
    for row, tokens in enumerate(sequences):
        kept = tokens[:positions]
        codes[row, : len(kept)] = kept
    return codes


@dataclass(frozen=True, slots=True)
class _Cells:
    """The pooled sequences of one prompt as indicator columns.

    ``indicators`` is (sequences, columns): one column for each category of each cell. A cell is a
    position, or a pair of positions; its columns are ``first[c]`` up to ``first[c + 1]``.
    """

    indicators: Floats
    first: tuple[int, ...]

    @property
    def cells(self) -> Iterable[slice]:
        return (slice(a, b) for a, b in pairwise(self.first))


@dataclass(frozen=True, slots=True)
class Tested:
    """The tests of one comparison, and the null distribution of the ``tokens`` statistic."""

    tests: tuple[PermutationTest, ...]
    positions: tuple[PositionDistance, ...]
    null_tokens: Floats


def compare_samples(
    samples: Sequence[PromptSamples],
    *,
    effect: float,
    false_alarm_rate: float,
    temperature: float,
    top_p: float = 1.0,
    rng: np.random.Generator,
) -> SamplingComparison:
    """The four tests, the distance at each position, and what the samples could have shown.

    ``samples`` holds one entry a prompt, all of one shape with at least two positions. ``effect``
    is the total variation at every speculated token that must not go unseen.
    """
    sequences, positions = samples[0].baseline.shape
    # Enough deals for p-values well below the false-alarm rate.
    deals = max(DEALS, math.ceil(5 * len(TESTS) / false_alarm_rate) - 1)
    tested = permutation_tests(samples, rng=rng, deals=deals)
    shifts = [_Shifts.of(_token_cells(sample)) for sample in samples]
    # Each test's least share of the false-alarm rate: Holm's method only ever grants more.
    critical = critical_value(tested.null_tokens, false_alarm_rate / len(TESTS))
    power = _Power(shifts, critical, rng)
    draws = power.draw(sequences)
    return SamplingComparison(
        prompts=len(samples),
        samples=sequences,
        tokens=positions,
        temperature=temperature,
        top_p=top_p,
        false_alarm_rate=false_alarm_rate,
        tests=tested.tests,
        positions=tested.positions,
        effect=effect,
        power=power.of(effect, draws),
        power_wanted=POWER_WANTED,
        detectable=power.detectable(draws),
        samples_needed=power.samples_needed(effect, draws),
        room=float(np.mean([_room(sample) for sample in samples])),
    )


def permutation_tests(
    samples: Sequence[PromptSamples], *, rng: np.random.Generator, deals: int = DEALS
) -> Tested:
    """The four tests with ``deals`` random deals of the labels within each prompt."""
    positions = samples[0].baseline.shape[1]
    observed = np.zeros((len(TESTS), 1))
    null = np.zeros((len(TESTS), deals))
    distance, null_distance = np.zeros((positions, 1)), np.zeros((positions, deals))
    for sample in samples:
        tokens, pairs = _token_cells(sample), _pair_cells(sample)
        scores = _typicality(tokens)
        first, total = len(sample.baseline), len(tokens.indicators)
        given = (np.arange(total) < first)[None, :].astype(float)
        dealt = _deal(total, first, deals, rng)
        for labels, statistics in ((given, observed), (dealt, null)):
            by_position = _chi_square(labels, tokens)
            statistics[0] += by_position[0]
            statistics[1] += by_position[1:].sum(axis=0)
            statistics[2] += _chi_square(labels, pairs).sum(axis=0)
            statistics[3] += _mean_difference(labels, scores)
        distance += _distance(given, tokens) / len(samples)
        null_distance += _distance(dealt, tokens) / len(samples)
    observed[3], null[3] = np.abs(observed[3]), np.abs(null[3])
    tests = [
        PermutationTest(
            name=name,
            statistic=float(observed[i, 0]),
            null_mean=float(null[i].mean()),
            p_value=p_value(float(observed[i, 0]), null[i]),
            p_adjusted=1.0,
        )
        for i, name in enumerate(TESTS)
    ]
    return Tested(
        tests=_holm(tests),
        positions=tuple(
            PositionDistance(
                j, float(distance[j, 0]), *map(float, np.quantile(row, (0.025, 0.975)))
            )
            for j, row in enumerate(null_distance)
        ),
        null_tokens=null[1],
    )


def _room(sample: PromptSamples) -> float:
    """Mean share of all but the most frequent token at the positions after the first."""
    pooled = np.concatenate([sample.baseline, sample.candidate])
    tops = [np.unique(column, return_counts=True)[1].max() for column in pooled.T[1:]]
    return float(1 - np.mean(tops) / len(pooled))


def p_value(observed: float, null: Floats) -> float:
    """Share of deals that reach ``observed``, the data's own deal among them."""
    # Sums in another order differ in their last bits: a tie must count as reached.
    reached = np.count_nonzero(null >= observed - 1e-9 * max(1.0, abs(observed)))
    return float((1 + reached) / (1 + len(null)))


def critical_value(null: Floats, level: float) -> float:
    """The statistic that must be exceeded for a p-value of at most ``level``; inf if none does."""
    allowed = math.floor(level * (1 + len(null)) + 1e-9) - 1
    if allowed < 0:
        return math.inf
    return float(np.sort(null)[-1 - allowed])


def _holm(tests: Sequence[PermutationTest]) -> tuple[PermutationTest, ...]:
    """The tests with Holm's step-down p-values, in the order given."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, test in enumerate(sorted(tests, key=lambda test: test.p_value)):
        running = max(running, min(1.0, (len(tests) - rank) * test.p_value))
        adjusted[test.name] = running
    return tuple(replace(test, p_adjusted=adjusted[test.name]) for test in tests)


# --- statistics, for many deals at once -------------------------------------------------------


def _deal(total: int, first: int, deals: int, rng: np.random.Generator) -> Floats:
    """(deals, total) rows of labels: ``first`` ones (the baseline's) in random places."""
    order = np.argsort(rng.random((deals, total)), axis=1)
    return (order < first).astype(float)


def _token_cells(sample: PromptSamples) -> _Cells:
    """One cell for each position."""
    pooled = np.concatenate([sample.baseline, sample.candidate])
    return _cells([pooled[:, j] for j in range(pooled.shape[1])])


def _pair_cells(sample: PromptSamples) -> _Cells:
    """One cell for each pair of neighbouring positions."""
    pooled = np.concatenate([sample.baseline, sample.candidate])
    return _cells([_paired(pooled[:, j], pooled[:, j + 1]) for j in range(pooled.shape[1] - 1)])


def _cells(columns: Sequence[Codes]) -> _Cells:
    """Indicator columns of each column's categories; the last of each cell takes what is left."""
    blocks = [_indicators(codes) for codes in columns]
    widths = np.cumsum([0, *(block.shape[1] for block in blocks)])
    return _Cells(np.concatenate(blocks, axis=1), tuple(int(width) for width in widths))


def _indicators(codes: Codes) -> Floats:
    """(sequences, categories): each frequent code on its own, the others in lots of like size."""
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    place = np.empty(len(counts), dtype=np.int64)
    category, held = 0, 0
    for code in np.argsort(-counts, kind="stable"):
        place[code] = category
        held += counts[code]
        if counts[code] >= RARE or held >= max(RARE, len(codes) * LOT):
            category, held = category + 1, 0
    indicators = np.zeros((len(codes), category + 1))
    indicators[np.arange(len(codes)), place[inverse.reshape(-1)]] = 1
    return indicators


def _paired(left: Codes, right: Codes) -> Codes:
    """One code for each pair of codes."""
    _, codes = np.unique(np.stack([left, right]), axis=1, return_inverse=True)
    return np.asarray(codes, dtype=np.int64).reshape(-1)


def _typicality(cells: _Cells) -> Floats:
    """Mean log frequency, in the pooled sample, of each sequence's tokens after the first."""
    counts = cells.indicators.sum(axis=0)
    logs = np.log(np.maximum(counts, 1) / len(cells.indicators))
    columns = cells.first[1]
    speculated = len(cells.first) - 2
    return np.asarray(cells.indicators[:, columns:] @ logs[columns:] / speculated)


def _chi_square(labels: Floats, cells: _Cells) -> Floats:
    """Pearson's chi-square of each cell's 2 x categories table: (cells, deals)."""
    total = len(cells.indicators)
    baseline = float(labels[0].sum())
    margin = cells.indicators.sum(axis=0)
    deviation = labels @ cells.indicators - margin * (baseline / total)
    weight = np.divide(total**2, margin, out=np.zeros_like(margin), where=margin > 0)
    terms = deviation**2 * (weight / (baseline * (total - baseline)))
    return np.add.reduceat(terms, cells.first[:-1], axis=1).T


def _distance(labels: Floats, cells: _Cells) -> Floats:
    """Total variation between the two labels' frequencies in each cell: (cells, deals)."""
    baseline = float(labels[0].sum())
    margin = cells.indicators.sum(axis=0)
    ours = labels @ cells.indicators
    theirs = margin - ours
    gaps = np.abs(ours / baseline - theirs / (len(cells.indicators) - baseline))
    return np.add.reduceat(gaps, cells.first[:-1], axis=1).T / 2


def _mean_difference(labels: Floats, scores: Floats) -> Floats:
    """Mean score of the baseline's sequences less that of the candidate's, for each deal."""
    baseline = float(labels[0].sum())
    ours = labels @ scores
    return np.asarray(ours / baseline - (scores.sum() - ours) / (len(scores) - baseline))


# --- power --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shifts:
    """One prompt's speculated cells, and which of their categories a change moves mass between.

    For a total variation d the chi-square divergence sum (p - q)^2 / p is at least d^2 (1 / P(S) +
    1 / (1 - P(S))), where S are the categories that gain: Cauchy-Schwarz, with equality if each
    side gains or loses in proportion. It is least, 4 d^2, at P(S) = 1/2. So the change that is
    hardest to see moves mass in proportion between two halves. ``heavy`` marks the likeliest
    categories that make up at least half; mass moves into them or out of them.
    """

    indicators: Floats
    first: tuple[int, ...]
    probabilities: tuple[Floats, ...]
    heavy: tuple[NDArray[np.bool_], ...]

    @classmethod
    def of(cls, cells: _Cells) -> _Shifts:
        skip = cells.first[1]
        indicators = cells.indicators[:, skip:]
        first = tuple(column - skip for column in cells.first[1:])
        frequencies = indicators.mean(axis=0)
        probabilities = tuple(frequencies[a:b] for a, b in pairwise(first))
        return cls(indicators, first, probabilities, tuple(map(_heavy, probabilities)))


def _heavy(p: Floats) -> NDArray[np.bool_]:
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    heavy = np.zeros(len(p), dtype=bool)
    heavy[order[before < 0.5]] = True
    return heavy


@dataclass(frozen=True, slots=True)
class _Draws:
    """Simulated counts before any change: one (simulations, columns) pair of arrays a prompt."""

    samples: int
    counts: tuple[tuple[Floats, Floats], ...]


@dataclass(frozen=True, slots=True)
class _Power:
    """How often the ``tokens`` statistic of simulated samples exceeds its critical value.

    Both sides are drawn from the pooled sequences; then mass is moved in every speculated cell of
    the candidate's.
    """

    prompts: Sequence[_Shifts]
    critical: float
    rng: np.random.Generator

    def draw(self, samples: int) -> _Draws:
        """Simulated samples of that size on both sides."""
        return _Draws(
            samples, tuple((self._one(p, samples), self._one(p, samples)) for p in self.prompts)
        )

    def of(self, effect: float, draws: _Draws) -> float:
        """Power against ``effect``, into the heavy halves or out of them, whichever is less.

        A cell that has not that much to move inwards moves it outwards.
        """
        found = []
        for inwards in (True, False):
            statistic = np.zeros(SIMULATIONS)
            for prompt, (ours, theirs) in zip(self.prompts, draws.counts, strict=True):
                statistic += _statistic(ours, self._changed(prompt, theirs, effect, inwards))
            found.append(float(np.mean(statistic > self.critical)))
        return min(found)

    def detectable(self, draws: _Draws) -> float | None:
        """The smallest effect found with `POWER_WANTED`, to 0.005; None if not even 1 is."""
        low, high = 0.0, 1.0
        if self.of(high, draws) < POWER_WANTED:
            return None
        while high - low > 0.005:
            middle = (low + high) / 2
            if self.of(middle, draws) < POWER_WANTED:
                low = middle
            else:
                high = middle
        return high

    def samples_needed(self, effect: float, draws: _Draws) -> int | None:
        """Samples per prompt that find ``effect`` with `POWER_WANTED`, the present ones if they do.

        The null distribution of chi-square hardly depends on the sample size, so the critical
        value is kept. Steps of a fifth; None beyond a hundredfold.
        """
        needed = float(draws.samples)
        while self.of(effect, draws) < POWER_WANTED:
            needed *= 1.2
            if needed > 100 * len(self.prompts[0].indicators):
                return None
            draws = self.draw(math.ceil(needed))
        return draws.samples

    def _one(self, prompt: _Shifts, samples: int) -> Floats:
        sequences = len(prompt.indicators)
        drawn = self.rng.integers(0, sequences, size=(SIMULATIONS, samples))
        rows = np.arange(SIMULATIONS)[:, None] * sequences
        times = np.bincount((drawn + rows).reshape(-1), minlength=SIMULATIONS * sequences)
        return np.asarray(times.reshape(SIMULATIONS, sequences) @ prompt.indicators)

    def _changed(self, prompt: _Shifts, counts: Floats, effect: float, inwards: bool) -> Floats:
        changed = np.empty_like(counts)
        cells = zip(pairwise(prompt.first), prompt.probabilities, prompt.heavy, strict=True)
        for (a, b), p, heavy in cells:
            gaining = heavy if inwards and p[~heavy].sum() >= effect else ~heavy
            changed[:, a:b] = _moved(counts[:, a:b], p, gaining, effect, self.rng)
        return changed


def _statistic(ours: Floats, theirs: Floats) -> Floats:
    """Chi-square over all cells, for samples of equal size."""
    both = ours + theirs
    terms = np.divide((ours - theirs) ** 2, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(terms.sum(axis=1))


def _moved(
    counts: Floats, p: Floats, gaining: NDArray[np.bool_], effect: float, rng: np.random.Generator
) -> Floats:
    """``counts`` (simulations, categories) after a share ``effect`` of the mass moved."""
    losing = float(p[~gaining].sum())
    leave = np.zeros_like(counts)
    share = min(1.0, effect / losing) if losing else 0.0
    leave[:, ~gaining] = rng.binomial(counts[:, ~gaining].astype(np.int64), share)
    gain = p * gaining
    # Nothing ever seen on the gaining side: what moves is new, and lands in the last category.
    gain = gain / gain.sum() if gain.any() else np.eye(len(p))[-1]
    arrive = rng.multinomial(leave.sum(axis=1).astype(np.int64), gain)
    return np.asarray(counts - leave + arrive)
