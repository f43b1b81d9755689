from __future__ import annotations

from itertools import pairwise, product

import numpy as np
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

from specwise.decision.schedule import Lengths, compose, losers, propose, takes_schedule
from specwise.domain import Arm, Speculation
from specwise.vllm.flags import schedule_problems

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


def lengths(
    gains: dict[int, list[float]], batches: tuple[int, ...] = (1, 4, 16), *, deviation: float = 0.0
) -> Lengths:
    rng = np.random.default_rng(7)
    return Lengths(
        batches,
        gains,
        {k: np.array(v) + deviation * rng.standard_normal((400, len(v))) for k, v in gains.items()},
    )


def test_each_load_gets_its_best_length_and_the_change_lies_where_they_cross() -> None:
    found = compose(lengths({4: [0.5, 0.2, -0.4], 2: [0.3, 0.3, -0.1], 0: [-0.1, -0.1, -0.05]}))
    assert found.lengths == (4, 2, 0)
    # k = 4 leads by 0.2 at 1 and trails by 0.1 at 4: the line over log batch crosses at 4^(2/3).
    assert found.rows[0] == (1, 2, 4)
    # k = 2 leads by 0.4 at 4 and trails by 0.05 at 16: 4 * 4^(8/9) = 13.7.
    assert found.rows[1] == (3, 13, 2)
    assert found.rows[2][0] == 14
    assert found.rows[2][2] == 0
    assert found.gain == pytest.approx((0.5 + 0.3 - 0.05) / 3)


def test_idling_costs_its_price_so_a_small_loss_may_be_the_better() -> None:
    found = compose(lengths({2: [0.3, 0.1, -0.02], 0: [-0.05, -0.05, -0.06]}))
    assert found.lengths == (2, 2, 2)


def test_lengths_do_not_grow_unless_the_data_refuse() -> None:
    growing = {4: [0.1, 0.1, 0.3], 1: [0.2, 0.15, 0.0]}
    unsure = compose(lengths(growing, deviation=0.5))
    assert unsure.monotone
    assert list(unsure.lengths) == sorted(unsure.lengths, reverse=True)
    sure = compose(lengths(growing, deviation=0.001))
    assert not sure.monotone
    assert sure.lengths == (1, 1, 4)


@settings(deadline=None, max_examples=80)
@given(
    batches=st.lists(st.integers(1, 300), min_size=1, max_size=6, unique=True).map(sorted),
    data=st.data(),
)
def test_what_is_composed_is_valid_and_no_other_monotone_choice_is_better(
    batches: list[int], data: st.DataObject
) -> None:
    value = st.lists(st.floats(-1, 1), min_size=len(batches), max_size=len(batches))
    gains = {k: data.draw(value) for k in (0, 1, 3)}
    found = compose(
        lengths(gains, tuple(batches), deviation=100.0)
    )  # so unsure that it is monotone
    assert schedule_problems([list(row) for row in found.rows]) == []
    for (_, last, _), (first, _, _) in pairwise(found.rows):
        assert first == last + 1
    for batch, k in zip(batches, found.lengths, strict=True):
        assert next(row[2] for row in found.rows if row[0] <= batch <= row[1]) == k
    others = [
        c for c in product((0, 1, 3), repeat=len(batches)) if list(c) == sorted(c, reverse=True)
    ]
    best = max(sum(gains[k][j] for j, k in enumerate(c)) for c in others)
    assert found.gain * len(batches) == pytest.approx(best, abs=1e-9)


def test_nothing_to_compose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a load"):
        compose(Lengths((), {}, {}))
