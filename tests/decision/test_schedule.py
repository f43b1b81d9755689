from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis.synthetic import C1, C4, C16
from tests.decision.situations import (
    BASELINE,
    DRAFT,
    SCHEDULED,
    SUFFIX,
    Cell,
    effect,
    situation,
)

from specwise.decision.schedule import losers, propose, takes_schedule
from specwise.domain import Arm, Speculation

K2 = Arm("k2", Speculation("draft_model", 2, draft="d"), url="http://127.0.0.1:3")
gains = st.floats(0.5, 2.0)


def curve(one: float, four: float, sixteen: float) -> dict[Cell, float]:
    return {("mix", None, C1): one, ("mix", None, C4): four, ("mix", None, C16): sixteen}


def test_it_speculates_where_it_won_and_idles_beyond_the_crossover() -> None:
    found = propose(situation(curve(1.5, 1.2, 0.8)), "draft")
    assert found is not None
    (first, second) = found.rows
    assert first[0] == 1
    assert 4 <= first[1] < 16
    assert (first[2], second[2]) == (4, 0)
    assert not found.confirmed


def test_a_losing_segment_ends_the_row_even_if_the_average_wins() -> None:
    prose = {("mix", "prose", load): gain for load, gain in ((C1, 1.1), (C4, 0.8), (C16, 0.7))}
    found = propose(situation({**curve(1.5, 1.3, 1.1), **prose}), "draft")
    assert found is not None
    assert found.rows[0][1] < 4
    assert found.rows[-1][2] == 0


def test_arms_that_differ_in_k_only_share_one_schedule() -> None:
    longer = tuple(
        effect("speedup", gain, cell, arm="k2") for cell, gain in curve(1.2, 1.3, 1.1).items()
    )
    found = propose(
        situation(curve(1.5, 1.2, 0.8), arms=(BASELINE, DRAFT, K2), others=longer), "draft"
    )
    assert found is not None
    assert [k for _, _, k in found.rows] == [4, 2]


@pytest.mark.parametrize(
    "values", [(1.5, 1.4, 1.3), (0.8, 0.7, 0.6), (1.0, 0.9, 0.8)], ids=["all", "none", "open"]
)
def test_no_schedule_where_one_length_serves_or_nothing_wins(
    values: tuple[float, float, float],
) -> None:
    assert propose(situation(curve(*values)), "draft") is None


def test_a_measured_schedule_is_its_own_proposal() -> None:
    found = propose(situation(curve(1.5, 1.2, 1.0), arms=(BASELINE, SCHEDULED)), "draft")
    assert found is not None
    assert found.confirmed


def test_methods_that_take_none_get_none() -> None:
    assert propose(situation(curve(1.5, 1.2, 0.8), arms=(BASELINE, SUFFIX)), "draft") is None
    assert takes_schedule(Speculation("ngram", 3))
    assert not takes_schedule(Speculation("suffix", 3))


@settings(deadline=None, max_examples=60)
@given(st.tuples(gains, gains, gains), st.tuples(gains, gains, gains))
def test_rows_are_what_the_engine_accepts(
    own: tuple[float, float, float], shorter: tuple[float, float, float]
) -> None:
    """From 1, without gaps or overlaps, never growing in k, up to a large batch."""
    others = tuple(
        effect("speedup", gain, cell, arm="k2") for cell, gain in curve(*shorter).items()
    )
    found = propose(situation(curve(*own), arms=(BASELINE, DRAFT, K2), others=others), "draft")
    if found is None:
        return
    assert found.rows[0][0] == 1
    assert found.rows[-1][1] >= 1024
    assert all(first <= last for first, last, _ in found.rows)
    for (_, last, k), (first, _, next_k) in pairwise(found.rows):
        assert first == last + 1
        assert next_k < k
    assert found.rows[0][2] > 0


def test_losers_are_found_in_the_mix_and_alone() -> None:
    places: dict[Cell, float] = {
        ("mix", "json", C16): 1.2,
        ("mix", "prose", C16): 0.8,
        ("prose", None, C16): 0.8,
        ("copy", None, C16): 0.5,
    }
    found = losers(situation({**curve(1.5, 1.2, 1.1), **places}), "draft", C16)
    assert [place.label for place in found] == ["prose in mix", "prose"]
