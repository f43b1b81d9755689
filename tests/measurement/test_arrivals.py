from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specwise.errors import InputError
from specwise.measurement.arrivals import intended_times, parse_trace


def gaps(times: tuple[float, ...]) -> np.ndarray:
    return np.diff([0.0, *times])


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_constant_is_evenly_spaced_from_zero() -> None:
    assert intended_times("constant", 4.0, 5, rng()) == (0.0, 0.25, 0.5, 0.75, 1.0)


@given(
    st.sampled_from(["constant", "poisson", "gamma", "trace"]),
    st.floats(0.01, 1e4),
    st.integers(0, 50),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_any_process_gives_count_ascending_times_and_the_seed_decides_them(
    process: str, rate: float, count: int, seed: int
) -> None:
    def draw() -> tuple[float, ...]:
        trace = np.cumsum(np.ones(50) * 3.5) + 1.7e9
        return intended_times(process, rate, count, np.random.default_rng(seed), trace=list(trace))

    times = draw()
    assert len(times) == count
    assert all(t >= 0 for t in times)
    assert list(times) == sorted(times)
    assert draw() == times


def test_poisson_gaps_are_exponential_and_independent() -> None:
    drawn = gaps(intended_times("poisson", 20.0, 20_000, rng()))
    assert stats.kstest(drawn, "expon", args=(0, 1 / 20)).pvalue > 0.01
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


def test_poisson_is_not_rescaled_to_the_nominal_rate() -> None:
    # The time of the n-th arrival of a true Poisson process is Erlang: sd = sqrt(n) / rate.
    last = [
        intended_times("poisson", 10.0, 100, np.random.default_rng(seed))[-1]
        for seed in range(2000)
    ]
    assert np.mean(last) == pytest.approx(10.0, rel=0.01)
    assert np.std(last) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_keeps_the_mean_and_sets_the_variation(burstiness: float) -> None:
    drawn = gaps(intended_times("gamma", 5.0, 50_000, rng(), burstiness=burstiness))
    assert drawn.mean() == pytest.approx(0.2, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_trace_is_replayed_from_zero_or_stretched_to_a_rate() -> None:
    trace = (100.0, 100.5, 103.0, 104.0)
    assert intended_times("trace", None, 3, rng(), trace=trace) == (0.0, 0.5, 3.0)
    stretched = intended_times("trace", 2.0, 4, rng(), trace=trace)
    assert stretched == pytest.approx((0.0, 0.1875, 1.125, 1.5))
    assert 3 / stretched[-1] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("process", "rate", "options", "complaint"),
    [
        ("poisson", 0.0, {}, "rate of 0.0"),
        ("poisson", float("nan"), {}, "rate of nan"),
        ("constant", None, {}, "rate of None"),
        ("gamma", 1.0, {"burstiness": 0.0}, "burstiness of 0.0"),
        ("weibull", 1.0, {}, "no arrival process 'weibull'"),
        ("trace", None, {"trace": (1.0,)}, "holds 1 arrivals"),
        ("trace", None, {"trace": (2.0, 1.0)}, "not ascending"),
        ("trace", 1.0, {"trace": (2.0, 2.0)}, "one moment"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(
    process: str, rate: float | None, options: dict, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        intended_times(process, rate, 2, rng(), **options)
    assert caught.value.next_step


def test_parse_trace_reads_one_time_a_line() -> None:
    assert parse_trace("# recorded on a Monday\n1.5\n\n 2e1 # busy\n20\n") == (1.5, 20.0, 20.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("1\nx\n", "line 2: 'x'"), ("1\nnan", "line 2"), ("2\n1", "line 2: 1.0"), ("#\n", "no times")],
)
def test_parse_trace_names_the_line_that_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parse_trace(text)
