from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2_contingency, ncx2

from specwise.analysis import two_sample
from specwise.analysis.two_sample import (
    ENDED,
    FIRST_TOKEN,
    PAIRS,
    SEQUENCE,
    TESTS,
    TOKENS,
    PromptSamples,
    codes_of,
    compare_samples,
    critical_value,
    p_value,
    permutation_tests,
)
from specwise.domain import PermutationTest, SamplingComparison

Codes = np.ndarray[Any, np.dtype[np.int64]]
Model = list[list[np.ndarray[Any, np.dtype[np.float64]]]]


def model(rng: np.random.Generator, prompts: int, positions: int, vocabulary: int = 6) -> Model:
    """A distribution for each position of each prompt, tokens independent of one another."""
    return [
        [rng.dirichlet(np.full(vocabulary, 2.0)) for _ in range(positions)] for _ in range(prompts)
    ]


def draw(rng: np.random.Generator, truth: Model, samples: int) -> list[Codes]:
    return [
        np.stack([rng.choice(len(p), size=samples, p=p) for p in prompt], axis=1)
        for prompt in truth
    ]


def halves_shifted(truth: Model, effect: float) -> Model:
    """Mass ``effect`` moved in proportion into about half of each speculated distribution."""

    def shifted(p: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        order = np.argsort(-p)
        gaining = order[: int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1]
        inside = np.isin(np.arange(len(p)), gaining)
        share = p[inside].sum()
        return np.where(inside, p * (1 + effect / share), p * (1 - effect / (1 - share)))

    return [[prompt[0], *(shifted(p) for p in prompt[1:])] for prompt in truth]


def pair_up(baseline: list[Codes], candidate: list[Codes]) -> list[PromptSamples]:
    return [PromptSamples(a, b) for a, b in zip(baseline, candidate, strict=True)]


def compared(samples: list[PromptSamples], effect: float = 0.2) -> SamplingComparison:
    rng = np.random.default_rng(1)
    return compare_samples(samples, effect=effect, false_alarm_rate=0.01, temperature=1.0, rng=rng)


def by_name(tests: tuple[PermutationTest, ...]) -> dict[str, PermutationTest]:
    return {test.name: test for test in tests}


# --- the tests are exact ------------------------------------------------------------------------


def test_p_values_are_those_of_all_deals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences against five: 252 deals, each one's statistics computed the plain way."""
    monkeypatch.setattr(two_sample, "RARE", 1)
    rng = np.random.default_rng(3)
    pooled = rng.integers(0, 3, size=(10, 3))
    sample = PromptSamples(pooled[:5], pooled[5:])

    def chi_square(ours: Codes, theirs: Codes) -> float:
        values = np.unique(np.concatenate([ours, theirs]))
        table = np.array([[np.sum(side == value) for value in values] for side in (ours, theirs)])
        return 0.0 if len(values) == 1 else float(chi2_contingency(table, correction=False)[0])

    frequency = np.array(
        [[np.mean(pooled[:, j] == pooled[i, j]) for j in range(3)] for i in range(10)]
    )
    scores = np.log(frequency[:, 1:]).mean(axis=1)
    joined = pooled[:, :-1] * 3 + pooled[:, 1:]

    def statistics(chosen: tuple[int, ...]) -> list[float]:
        ours = np.isin(np.arange(10), chosen)
        return [
            chi_square(pooled[ours, 0], pooled[~ours, 0]),
            sum(chi_square(pooled[ours, j], pooled[~ours, j]) for j in (1, 2)),
            sum(chi_square(joined[ours, j], joined[~ours, j]) for j in (0, 1)),
            abs(float(scores[ours].mean() - scores[~ours].mean())),
        ]

    everything = np.array([statistics(chosen) for chosen in combinations(range(10), 5)])
    tested = by_name(permutation_tests([sample], rng=rng, deals=20_000).tests)
    for column, name in enumerate(TESTS):
        observed = statistics((0, 1, 2, 3, 4))[column]
        assert tested[name].statistic == pytest.approx(observed)
        exact = np.mean(everything[:, column] >= observed - 1e-9)
        assert tested[name].p_value == pytest.approx(exact, abs=4 * 0.5 / np.sqrt(20_000))
        assert tested[name].null_mean == pytest.approx(everything[:, column].mean(), rel=0.03)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """1,000 comparisons of equal servers: every test's p-value is uniform, Holm's is not above."""
    rng = np.random.default_rng(11)
    studies, level = 1000, 0.05
    raw = dict.fromkeys(TESTS, 0)
    alarms = 0
    for _ in range(studies):
        truth = model(rng, prompts=2, positions=3)
        samples = pair_up(draw(rng, truth, 30), draw(rng, truth, 30))
        tests = permutation_tests(samples, rng=rng, deals=199).tests
        for test in tests:
            raw[test.name] += test.p_value <= level
        alarms += any(test.p_adjusted <= level for test in tests)
    low, high = binom.ppf([0.0005, 0.9995], studies, level)
    # Ties make a discrete statistic's level smaller than stated, never larger.
    assert all(count <= high for count in raw.values()), raw
    assert raw[TOKENS] >= low
    assert raw[SEQUENCE] >= low
    assert 0 < alarms <= high


def test_whole_sequences_are_dealt_so_that_dependence_raises_no_alarm() -> None:
    """Tokens that repeat the first one would fool a test that took them as independent."""
    rng = np.random.default_rng(12)
    studies, level = 300, 0.05
    alarms = 0
    for _ in range(studies):
        chain = rng.integers(0, 4, size=(60, 1)) + np.zeros((60, 6), dtype=np.int64)
        tests = permutation_tests([PromptSamples(chain[:30], chain[30:])], rng=rng, deals=199).tests
        alarms += by_name(tests)[TOKENS].p_value <= level
    assert alarms <= binom.ppf(0.9995, studies, level)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_neither_names_nor_order_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = model(rng, prompts=2, positions=3, vocabulary=4)
    first, second = draw(rng, truth, 25), draw(rng, truth, 25)

    def statistics(samples: list[PromptSamples]) -> list[float]:
        tests = permutation_tests(samples, rng=np.random.default_rng(0), deals=9).tests
        return [test.statistic for test in tests]

    plain = statistics(pair_up(first, second))
    assert statistics(pair_up(second, first)) == pytest.approx(plain)
    # In their order: rare tokens are put into lots by frequency, then by token id.
    renamed = pair_up([7 * a + 3 for a in first], [7 * b + 3 for b in second])
    assert statistics(renamed) == pytest.approx(plain)
    shuffled = pair_up([rng.permutation(a) for a in first], [rng.permutation(b) for b in second])
    assert statistics(shuffled) == pytest.approx(plain)


def test_rare_tokens_are_lumped_so_that_none_is_lost_and_no_lot_is_small() -> None:
    rng = np.random.default_rng(4)
    for concentration in (0.02, 0.2, 5.0):
        codes = rng.choice(300, size=400, p=rng.dirichlet(np.full(300, concentration)))
        indicators = two_sample._indicators(codes)
        assert (indicators.sum(axis=1) == 1).all()
        sizes = indicators.sum(axis=0)
        frequent = np.unique(codes, return_counts=True)[1] >= two_sample.RARE
        assert (sizes[: frequent.sum()] >= two_sample.RARE).all()
        assert (sizes[frequent.sum() : -1] >= 0.1 * 400).all()
        assert len(sizes) <= frequent.sum() + 11


def test_holm() -> None:
    tests = [PermutationTest(str(p), 0, 0, p, 1.0) for p in (0.01, 0.04, 0.03, 0.005)]
    adjusted = [test.p_adjusted for test in two_sample._holm(tests)]
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979, worked by hand


def test_the_critical_value_is_where_the_p_value_reaches_the_level() -> None:
    null = np.random.default_rng(5).normal(size=999)
    for level in (0.01, 0.05, 0.2):
        critical = critical_value(null, level)
        assert p_value(critical + 1e-6, null) <= level
        assert p_value(critical - 1e-6, null) > level
    assert critical_value(null, 0.0005) == np.inf


# --- each test sees its kind of change ----------------------------------------------------------


def rejected(samples: list[PromptSamples]) -> set[str]:
    return {test.name for test in compared(samples).tests if test.p_adjusted <= 0.01}


def test_a_change_of_the_first_token_alone_is_told_apart() -> None:
    rng = np.random.default_rng(6)
    truth = model(rng, prompts=4, positions=4)
    other = [[np.roll(prompt[0], 1), *prompt[1:]] for prompt in truth]
    assert rejected(pair_up(draw(rng, truth, 200), draw(rng, other, 200))) == {FIRST_TOKEN, PAIRS}


def test_sequences_that_swap_tokens_have_the_right_marginals_and_are_seen() -> None:
    """What a server does that mixes up the rows of a batch."""
    rng = np.random.default_rng(7)
    chain = rng.integers(0, 4, size=(400, 1)) + np.zeros((400, 4), dtype=np.int64)
    mixed = np.stack([rng.permutation(column) for column in chain.T], axis=1)
    assert rejected([PromptSamples(chain, mixed)]) == {PAIRS}


def test_a_wrong_temperature_is_seen_by_the_sequence_statistic_first() -> None:
    rng = np.random.default_rng(8)
    truth = model(rng, prompts=8, positions=6, vocabulary=12)

    def cooled(p: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        sharper = p ** (1 / 0.85)
        return np.asarray(sharper / sharper.sum())

    other = [[prompt[0], *(cooled(p) for p in prompt[1:])] for prompt in truth]
    found = compared(pair_up(draw(rng, truth, 150), draw(rng, other, 150)))
    tests = by_name(found.tests)
    assert tests[SEQUENCE].p_adjusted <= 0.01
    assert tests[SEQUENCE].p_value <= tests[TOKENS].p_value


def test_distances_are_those_of_the_tokens_and_the_null_range_holds_equal_servers() -> None:
    rng = np.random.default_rng(9)
    truth = [[np.array([0.5, 0.5]), np.array([0.5, 0.5])]]
    other = [[np.array([0.5, 0.5]), np.array([0.9, 0.1])]]
    found = compared(pair_up(draw(rng, truth, 500), draw(rng, other, 500)))
    equal, changed = found.positions
    assert equal.distance <= equal.null_high
    assert changed.distance == pytest.approx(0.4, abs=0.05)
    assert changed.distance > changed.null_high
    assert found.room == pytest.approx(0.3, abs=0.05)


def test_a_sequence_that_ends_early_differs_from_one_that_goes_on() -> None:
    codes = codes_of([[1, 2], [1, 2, 3, 4]], positions=3)
    assert codes.tolist() == [[1, 2, ENDED], [1, 2, 3]]
    long = codes_of([[1, 2, 3]] * 50, 3)
    short = codes_of([[1, 2]] * 50, 3)
    assert rejected([PromptSamples(long, short)]) >= {TOKENS}
    assert rejected([PromptSamples(long, long)]) == set()


# --- power --------------------------------------------------------------------------------------


def test_power_is_that_of_the_noncentral_chi_square() -> None:
    """Independent tokens of even distributions: the textbook's answer is known."""
    samples, prompts, positions, effect = 200, 3, 4, 0.15
    truth = [[np.full(8, 1 / 8)] * positions for _ in range(prompts)]
    rng = np.random.default_rng(10)
    found = compared(pair_up(draw(rng, truth, samples), draw(rng, truth, samples)), effect)
    cells = prompts * (positions - 1)
    dof = cells * 7
    # Two halves: sum of d_c^2 / p_c = 4 effect^2, and two samples of n have n / 2 in one.
    noncentral = cells * (samples / 2) * 4 * effect**2
    critical = ncx2.ppf(1 - 0.01 / len(TESTS), dof, 1e-9)
    assert found.power == pytest.approx(ncx2.sf(critical, dof, noncentral), abs=0.08)


def tokens_statistic(samples: list[PromptSamples]) -> float:
    rng = np.random.default_rng(0)
    return by_name(permutation_tests(samples, rng=rng, deals=1).tests)[TOKENS].statistic


def critical_of(samples: list[PromptSamples]) -> float:
    """The 1 % level shared by the tests: hardly another for other samples of like servers."""
    null = permutation_tests(samples, rng=np.random.default_rng(0), deals=1999).null_tokens
    return critical_value(null, 0.01 / len(TESTS))


@pytest.mark.parametrize("samples", [60, 90])
def test_shifts_of_the_stated_size_are_found_as_often_as_stated(samples: int) -> None:
    rng = np.random.default_rng(samples)
    truth = model(rng, prompts=3, positions=4)
    effect, studies = 0.2, 300
    changed = halves_shifted(truth, effect)
    null = [pair_up(draw(rng, truth, samples), draw(rng, truth, samples)) for _ in range(4)]
    stated = np.mean([compared(data, effect).power for data in null])
    critical = critical_of(null[0])
    found = sum(
        tokens_statistic(pair_up(draw(rng, truth, samples), draw(rng, changed, samples))) > critical
        for _ in range(studies)
    )
    assert 0.2 < stated < 0.995
    assert found / studies == pytest.approx(stated, abs=0.12)


def test_no_shift_of_that_size_is_harder_to_find_than_stated() -> None:
    """Random directions of one total variation: each is found at least as often as stated."""
    rng = np.random.default_rng(14)
    truth = model(rng, prompts=3, positions=4)
    samples, effect, studies = 80, 0.15, 300

    def turned(p: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        while True:
            step = rng.normal(size=len(p))
            step -= step.mean()
            step *= effect / (np.abs(step).sum() / 2)
            if (p + step).min() > 0.005:
                return np.asarray(p + step)

    roomy = [[0.6 * p + 0.4 / len(p) for p in prompt] for prompt in truth]
    equal = pair_up(draw(rng, roomy, samples), draw(rng, roomy, samples))
    stated, critical = compared(equal, effect).power, critical_of(equal)
    found = 0
    for _ in range(studies):
        other = [[prompt[0], *(turned(p) for p in prompt[1:])] for prompt in roomy]
        data = pair_up(draw(rng, roomy, samples), draw(rng, other, samples))
        found += tokens_statistic(data) > critical
    assert found / studies >= stated - 0.08


def test_the_samples_it_asks_for_are_enough_and_the_detectable_effect_is_detected() -> None:
    rng = np.random.default_rng(15)
    truth = model(rng, prompts=3, positions=4)
    few = compared(pair_up(draw(rng, truth, 40), draw(rng, truth, 40)), 0.15)
    assert few.power < 0.9
    assert few.samples_needed is not None
    assert few.samples_needed > 40
    assert few.detectable is not None
    assert few.detectable > 0.15
    n = few.samples_needed
    enough = compared(pair_up(draw(rng, truth, n), draw(rng, truth, n)), 0.15)
    assert enough.power >= 0.8
    assert enough.detectable == pytest.approx(0.15, abs=0.03)
    again = compared(pair_up(draw(rng, truth, 40), draw(rng, truth, 40)), few.detectable)
    assert again.power == pytest.approx(0.9, abs=0.12)


def test_a_change_among_rare_tokens_is_seen() -> None:
    """Hundreds of equally rare tokens, of which the changed server never says half."""
    rng = np.random.default_rng(17)
    full = rng.integers(0, 400, size=(300, 4))
    half = rng.integers(0, 200, size=(300, 4))
    assert rejected([PromptSamples(full, half)]) >= {TOKENS}
    other = rng.integers(0, 400, size=(300, 4))
    assert rejected([PromptSamples(full, other)]) == set()


def test_outputs_without_choice_leave_no_room() -> None:
    same = codes_of([[1, 2, 3, 4]] * 100, 4)
    found = compared([PromptSamples(same, same)])
    assert found.room == 0
    assert not found.changed
    # A token never seen before would show at once: it is power on other prompts that is lacking.
    assert found.power == 1.0


def test_the_same_seed_gives_the_same_answer() -> None:
    rng = np.random.default_rng(16)
    truth = model(rng, prompts=2, positions=3)
    data = pair_up(draw(rng, truth, 40), draw(rng, truth, 40))
    assert compared(data) == compared(data)
