"""The benchmark's simulations, small: coverage, the crossover's interval, verdicts on equal arms.

Bounds are three binomial standard deviations around the bar; benchmarks/intervals.py runs 1,000.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.intervals import (
    CLIMB,
    CROSSOVER_AT,
    EQUAL,
    SHOWN,
    coverage,
    coverage_by_load,
    crossovers,
    equal_arms,
)
from tests.analysis.known_truth import simulate, true_ratios


def margin(share: float, studies: int) -> float:
    return 3 * math.sqrt(share * (1 - share) / studies)


def test_every_effect_shown_covers_its_truth() -> None:
    studies = 80
    held = coverage("twice: 2 arms, 1 mix, 2 x 64", studies, seed=1)
    assert {metric for metric, place in held if place == "mix"} == set(SHOWN)
    for key, hits in held.items():
        assert np.mean(hits) >= 0.93 - margin(0.93, studies), key
    whole = [hit for (_, place), hits in held.items() if place == "mix" for hit in hits]
    assert np.mean(whole) <= 0.99


def test_where_loads_differ_in_requests_each_load_covers_its_truth() -> None:
    studies = 80
    held = coverage_by_load("uneven: 2 arms, 1 mix, 3 loads, 2 x 12 to 192", studies, seed=5)
    assert set(held) == {1, 4, 16}
    for load, hits in held.items():
        assert np.mean(hits) >= 0.93 - margin(0.93, studies), load
        assert np.mean(hits) <= 0.999, load


def test_the_crossovers_interval_covers_the_truth() -> None:
    studies = 25
    held = crossovers(studies, seed=2)
    assert np.mean(held["whole"]) >= 0.93 - margin(0.93, studies)
    assert np.mean(held["whole: bounded"]) > 0.8


def test_equal_arms_are_rarely_told_apart() -> None:
    studies = 80
    for (bound, wrong), hits in equal_arms("twice, 1 equal candidate", studies, seed=3).items():
        assert np.mean(hits) <= 0.05 + margin(0.05, studies), (bound, wrong)


def test_the_simulated_truth_is_the_one_that_was_put_in() -> None:
    """Pure TPOT effects are known in closed form: exp(-gain), whatever the noise."""
    world = next(iter(EQUAL.values()))
    world = replace(world, gain={"draft": {"json": {16: 0.3}, "prose": {16: -0.1}}})
    truth = true_ratios(replace(world, reaction_sd=0.0), "draft", 16)
    assert truth["tpot_mean", "json", None] == pytest.approx(math.exp(-0.3), rel=1e-9)
    assert truth["tpot_p99", "prose", None] == pytest.approx(math.exp(0.1), rel=1e-9)
    slopes = CLIMB.gain["draft"]["json"]
    assert math.log2(CROSSOVER_AT) == pytest.approx(
        np.interp(0, [slopes[8], slopes[4]], [3.0, 2.0]), abs=1e-9
    )


def test_simulated_clients_keep_the_concurrency_they_are_given() -> None:
    world = next(iter(EQUAL.values()))
    _, measured = simulate(world, np.random.default_rng(0))
    for (_, _, load, _), tables in measured.items():
        for table in tables:
            busy_s = float(np.sum(table.e2e_s))
            assert load.value * 0.4 <= busy_s / table.window_s
            assert 0 < float(np.sum(table.window_tokens)) <= float(np.sum(table.output_tokens))
