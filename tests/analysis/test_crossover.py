from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression
from tests.analysis.synthetic import C1, C4, C16, demo_study
from tests.analysis.test_comparison import effect

from specwise.analysis.comparison import compare
from specwise.analysis.crossover import Crossover, falling, find_crossovers, locate
from specwise.domain import LoadPoint, Loop

KEY = ("a", "mix", None, Loop.CLOSED)
LOADS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


def find(gains: list[float] | np.ndarray, se: float = 0.01, loads: np.ndarray = LOADS) -> Crossover:
    count = len(loads)
    return locate(
        KEY,
        loads,
        np.asarray(gains, dtype=np.float64),
        se=np.full(count, se),
        dof=np.full(count, 10.0),
        rng=np.random.default_rng(0),
    )


@settings(deadline=None, max_examples=50)
@given(st.floats(1.2, 28.0), st.floats(0.1, 0.6))
def test_a_straight_line_crosses_where_it_is_made_to(truth: float, slope: float) -> None:
    gains = slope * (math.log2(truth) - np.log2(LOADS))
    found = find(gains, se=1e-6)
    assert found.outcome == "crosses"
    assert found.load_value == pytest.approx(truth, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.02, 0.5), st.booleans())
def test_a_gain_that_never_changes_sign_does_not_cross(gain: float, wins: bool) -> None:
    sign = 1 if wins else -1
    found = find(sign * (gain + np.linspace(0.3, 0.0, 6)[:: sign or 1]), se=0.005)
    assert found.outcome == ("always better" if wins else "always worse")
    assert found.load_value is None


def test_noise_around_nothing_is_undecided() -> None:
    found = find([0.01, -0.01, 0.0, 0.01, -0.01, 0.0], se=0.05)
    assert found.outcome == "undecided"


def test_a_crossing_that_only_one_end_shows_has_an_open_bound() -> None:
    found = find([0.4, 0.3, 0.2, 0.1, 0.05, -0.01], se=0.03)
    assert found.outcome == "undecided"
    assert found.low is not None
    assert found.high is None


def test_a_crossing_below_the_loads_is_open_below() -> None:
    found = find([0.01, -0.1, -0.2, -0.3, -0.4, -0.5], se=0.03)
    assert found.outcome == "undecided"
    assert found.low is None
    assert found.high is not None
    assert found.high < 4


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    slope, se, covered = 0.25, 0.04, []
    for _ in range(250):
        truth = float(np.exp2(rng.uniform(1.0, 4.0)))
        gains = slope * (math.log2(truth) - np.log2(LOADS)) + rng.normal(0, se, len(LOADS))
        found = find(gains, se=se)
        low, high = found.low or 0.0, found.high or math.inf
        covered.append(low <= truth <= high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_a_wider_error_gives_a_wider_interval() -> None:
    gains = 0.3 * (math.log2(6.0) - np.log2(LOADS))
    narrow, wide = find(gains, se=0.01), find(gains, se=0.05)
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < narrow.low < 6.0 < narrow.high < wide.high


def test_a_bump_inside_the_noise_is_smoothed_and_a_real_one_is_noted() -> None:
    assert find([0.3, 0.2, 0.21, -0.1, -0.2, -0.3], se=0.02).note == ""
    assert "rises again" in find([0.3, -0.1, 0.2, -0.1, -0.2, -0.3], se=0.02).note


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=7),
    st.integers(0, 1000),
)
def test_falling_is_isotonic_regression(values: list[float], seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, len(values))
    expected = isotonic_regression(values, weights=weights, increasing=False).x
    found = falling(np.array([values]), weights)[0]
    assert found == pytest.approx(expected, abs=1e-9)


def test_open_and_closed_loops_are_kept_apart_and_one_load_is_no_curve() -> None:
    rate = LoadPoint(Loop.OPEN, 2.0, "poisson")
    closed = [effect(metric="speedup", better="higher", load=load) for load in (C1, C4, C16)]
    found = find_crossovers([*closed, replace(closed[0], load=rate)])
    assert [(c.loop, c.loads) for c in found] == [(Loop.CLOSED, (1.0, 4.0, 16.0))]


def test_the_demo_story_is_read_off_its_study() -> None:
    found = {
        (c.arm, c.workload, c.segment): c for c in find_crossovers(compare(demo_study()).effects)
    }
    assert found["draft_model", "json", None].outcome == "always better"
    prose = found["draft_model", "prose", None]
    assert prose.outcome == "crosses"
    assert prose.load_value is not None
    assert 1 < prose.load_value < 4
