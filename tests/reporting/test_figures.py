"""Charts as SVG: themeable, self-contained, deterministic, and readable at any range of data."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tests.reporting import samples

from specwise.domain import Arm, Speculation
from specwise.reporting import wording
from specwise.reporting.figures import (
    LatencySample,
    _decades,
    _tail_curve,
    arm_styles,
    latency_chart,
    ratio_ticks,
    speedup_chart,
)
from specwise.reporting.svg import Chart


def chart() -> Chart:
    effects = [e for e in samples.assessment().effects if e.metric == "speedup"]
    drawn = speedup_chart(
        effects, (), arm_styles(samples.ARMS), samples.PRODUCTION, predicted=False
    )
    assert drawn is not None
    return drawn


def test_every_colour_is_a_variable_of_the_page() -> None:
    drawn = chart()
    for svg in (drawn.wide, drawn.narrow):
        assert not re.search(r"(?:fill|stroke): ?#", svg)
        assert {"var(--text)", "var(--muted)", "var(--arm-1)", "var(--arm-2)"} <= set(
            re.findall(r"var\(--[\w-]+\)", svg)
        )
        assert "font-family" not in svg
        assert "<style" not in svg


def test_wide_and_narrow_share_no_id() -> None:
    drawn = chart()
    ids = [set(re.findall(r'\sid="([^"]+)"', svg)) for svg in (drawn.wide, drawn.narrow)]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])
    assert all(each.startswith("speedup-") for each in ids[0] | ids[1])


def test_same_data_gives_the_same_bytes() -> None:
    assert chart() == chart()


def test_names_are_drawn_as_they_are() -> None:
    """A "$" is no formula and a "<" no tag."""
    styles = arm_styles((Arm("baseline"), Arm("a")))
    sample = LatencySample("a", np.array([0.1, 0.2, 0.3]), 0)
    drawn = latency_chart("x", 'a "b" <c>', {"$x_1$ & <i>": [sample]}, {}, styles, predicted=True)
    assert drawn is not None
    assert "$x_1$ &amp; &lt;i&gt;" in drawn.wide
    assert "<title>a &quot;b&quot; &lt;c&gt; (predicted)</title>" in drawn.wide


def test_an_arm_keeps_its_looks_whatever_else_is_shown() -> None:
    arms = (Arm("baseline"), *(Arm(f"a{i}", Speculation("ngram", 3)) for i in range(9)))
    styles = arm_styles(arms)
    assert styles["baseline"].index == 0
    assert len({(s.colour, s.marker, s.dashes) for s in styles.values()}) == len(arms)
    assert arm_styles(arms[:3])["a1"] == styles["a1"]


def test_nothing_to_draw_is_no_chart() -> None:
    styles = arm_styles(samples.ARMS)
    assert speedup_chart((), (), styles, samples.PRODUCTION, predicted=False) is None
    empty = {"TTFT": [LatencySample("ngram", np.array([]), 4)]}
    assert latency_chart("x", "x", empty, {}, styles, predicted=False) is None


@pytest.mark.parametrize("values", [[0.05], [0.05] * 30, [1e-4, 300.0], [0.1, 0.2, 0.3] * 400])
def test_any_distribution_can_be_drawn(values: list[float]) -> None:
    sample = LatencySample("ngram", np.array(values), failed=2)
    drawn = latency_chart(
        "x", "x", {"TPOT": [sample]}, {"TPOT": 0.1}, arm_styles(samples.ARMS), predicted=False
    )
    assert drawn is not None
    assert "nan" not in drawn.wide.lower()
    assert f"P50 {wording.number(float(np.median(values)) * 1000)} ms" in drawn.summary


@given(st.floats(1e-3, 1e5), st.floats(1.2, 1e6))
def test_time_axes_have_few_labels(low: float, factor: float) -> None:
    ticks = _decades(low, low * factor)
    assert len(ticks) <= 9
    assert all(low <= tick <= low * factor for tick in ticks)
    assert factor < 10 or ticks


@given(st.floats(0.05, 0.8), st.floats(1.25, 12))
def test_ratio_axes_always_show_one(low: float, high: float) -> None:
    ticks = ratio_ticks(low, high)
    assert 1 in ticks
    assert len(ticks) <= 14
    assert ticks == sorted(ticks)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_read_plainly(value: float) -> None:
    text = wording.number(value)
    assert "e" not in text
    assert "nan" not in text
    if math.isfinite(value) and value != 0 and abs(value) < 1e12:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=0.006)


@given(st.text(min_size=1, max_size=100), st.integers(80, 400))
def test_a_fitted_name_fits_and_keeps_both_ends(name: str, width: int) -> None:
    shown = wording.fitted(name, width)
    assert len(shown) * 7.9 <= width or shown == name
    assert shown[0] == name[0]
    assert shown[-1] == name[-1]


def test_failed_requests_end_a_curve_below_the_top() -> None:
    style = arm_styles(samples.ARMS)["ngram"]
    axis = Figure().add_subplot()
    _tail_curve(axis, LatencySample("ngram", np.linspace(0.1, 0.2, 50), failed=50), style)
    curve, marks = axis.get_lines()
    shares = 1 - 10 ** -np.asarray(curve.get_ydata())
    assert 0.48 < shares.max() < 0.5
    assert np.asarray(curve.get_xdata()).max() <= 200
    assert len(np.asarray(marks.get_ydata())) == 0  # half failed: there is no P50


def test_marks_are_the_percentiles_of_the_tables() -> None:
    values = np.random.default_rng(3).lognormal(-3, 0.5, 64)
    style = arm_styles(samples.ARMS)["ngram"]
    axis = Figure().add_subplot()
    _tail_curve(axis, LatencySample("ngram", values, failed=0), style)
    expected = np.quantile(values, [0.5, 0.95, 0.99]) * 1000
    assert np.asarray(axis.get_lines()[1].get_xdata()) == pytest.approx(expected)
