from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.monitoring.test_alerts import EXPECTED

from specwise.monitoring.drift import DAY_S, DriftState, DriftTest, drift_test, step

TEST = drift_test(EXPECTED)


def follow(test: DriftTest, rates: np.ndarray, drafted: np.ndarray | float) -> DriftState:
    """The state after all windows, or at the first alarm."""
    state = DriftState()
    for number, (rate, tokens) in enumerate(
        zip(rates, np.broadcast_to(drafted, rates.shape), strict=True)
    ):
        state = step(
            test,
            state,
            at_s=(number + 1) * test.window_s,
            drafted_tokens=float(tokens),
            accepted_tokens=float(rate * tokens),
        )
        if state.alarm_at_s is not None:
            break
    return state


def windows(
    rng: np.random.Generator, true_rate: np.ndarray, requests: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rates and drafted tokens of windows with beta-distributed requests of gamma lengths.

    Lengths with a squared variation of 1/4 make the rate as noisy as 1 + 1/4 times the variance.
    """
    deviation = TEST.deviation / math.sqrt(1.25)
    rates, drafted = np.zeros(len(true_rate)), np.zeros(len(true_rate))
    concentration = EXPECTED.rate * (1 - EXPECTED.rate) / deviation**2 - 1
    for number, (mean, count) in enumerate(zip(true_rate, requests, strict=True)):
        if count == 0:
            continue
        single = rng.beta(mean * concentration, (1 - mean) * concentration, size=count)
        tokens = rng.gamma(4.0, TEST.drafted_per_request / 4, size=count)
        drafted[number] = tokens.sum()
        rates[number] = (single * tokens).sum() / tokens.sum()
    return rates, drafted


def test_thirty_healthy_days_raise_no_alarm() -> None:
    """Traffic with a day's rhythm, requests of uneven length, and a mix that wanders a little."""
    rng = np.random.default_rng(1)
    minutes = np.arange(int(30 * DAY_S / 60))
    daily = np.sin(2 * np.pi * minutes / 1440)
    requests = rng.poisson(20 * (1 + 0.8 * daily))
    true_rate = EXPECTED.rate + 0.01 * daily + rng.normal(0, 0.01, len(minutes))
    rates, drafted = windows(rng, true_rate, requests)
    assert follow(TEST, rates, drafted).alarm_at_s is None


@pytest.mark.parametrize("requests_per_minute", [6, 20, 100])
def test_a_slow_decay_is_flagged_within_an_hour_of_crossing_its_threshold(
    requests_per_minute: int,
) -> None:
    """0.1 of acceptance lost over six hours."""
    crossed_s = 6 * 3600 * (EXPECTED.rate - (TEST.expected - TEST.drop)) / 0.1
    for seed in range(20):
        rng = np.random.default_rng(seed)
        minutes = np.arange(360)
        requests = rng.poisson(requests_per_minute, len(minutes))
        true_rate = EXPECTED.rate - 0.1 * minutes / 360
        state = follow(TEST, *windows(rng, true_rate, requests))
        assert state.alarm_at_s is not None
        assert state.alarm_at_s <= crossed_s + 3600
        assert state.rate is not None
        assert state.rate < EXPECTED.rate - 0.02


def test_the_false_alarm_bound_holds_where_it_can_be_counted() -> None:
    """With a bound of 10 % over 200 windows, at most that share of healthy runs may alarm."""
    test = dataclasses.replace(TEST, false_alarm_rate=0.1, horizon_s=200 * TEST.window_s)
    drafted = 10 * TEST.drafted_per_request
    deviation = math.sqrt(test.window_variance(drafted))
    alarms, runs = 0, 1000
    rng = np.random.default_rng(2)
    for rates in rng.normal(test.expected, deviation, (runs, 200)):
        alarms += follow(test, rates, drafted).alarm_at_s is not None
    assert alarms / runs <= 0.1


def test_the_delay_after_a_sudden_fall_is_about_as_stated() -> None:
    rng = np.random.default_rng(3)
    drafted = 5 * TEST.drafted_per_request
    deviation = math.sqrt(TEST.window_variance(drafted))
    delays = []
    for rates in rng.normal(TEST.expected - TEST.drop, deviation, (200, 400)):
        at_s = follow(TEST, rates, drafted).alarm_at_s
        assert at_s is not None
        delays.append(at_s)
    stated = TEST.expected_delay_s(drafted / TEST.window_s)
    assert np.mean(delays) == pytest.approx(stated, rel=0.25)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e5)), max_size=60),
    st.floats(0, 0.2),
)
def test_better_acceptance_never_brings_an_alarm_nearer(
    seen: list[tuple[float, float]], better: float
) -> None:
    rates = np.array([rate for rate, _ in seen])
    drafted = np.array([tokens for _, tokens in seen])
    worse = follow(TEST, rates, drafted)
    improved = follow(TEST, np.minimum(rates + better, 1.0), drafted)
    if improved.alarm_at_s is not None:
        assert worse.alarm_at_s is not None
        assert worse.alarm_at_s <= improved.alarm_at_s


def test_it_forgets_when_acceptance_comes_back() -> None:
    drafted = 1000 * TEST.drafted_per_request
    state = DriftState()
    for at in range(100):
        state = step(TEST, state, at_s=at, drafted_tokens=drafted, accepted_tokens=0.5 * drafted)
    assert state.alarm_at_s == 0
    for at in range(100, 110):
        state = step(TEST, state, at_s=at, drafted_tokens=drafted, accepted_tokens=0.77 * drafted)
    assert state == DriftState()


def test_an_idle_server_says_nothing() -> None:
    state = DriftState(evidence=3.0, since_s=1.0, drafted_tokens=10, accepted_tokens=1)
    assert step(TEST, state, at_s=2, drafted_tokens=0, accepted_tokens=0) is state


def test_a_segment_has_a_test_of_its_own() -> None:
    test = drift_test(EXPECTED, segment="prose")
    assert (test.measured, test.deviation) == (0.6, 0.1)
    with pytest.raises(KeyError):
        drift_test(EXPECTED, segment="other")
