from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specwise.decision.belief import Belief, Candidate, Observed, believe, regret, worth
from specwise.domain import LoadPoint, Loop, Workload

C1, C8 = LoadPoint(Loop.CLOSED, 1), LoadPoint(Loop.CLOSED, 8)
JSON = Workload("json", (("json", 1.0),))
PROSE = Workload("prose", (("prose", 1.0),))
MIX = Workload("mix", (("json", 0.5), ("prose", 0.5)))
WORKLOADS = {w.name: w for w in (JSON, PROSE, MIX)}
CELLS = tuple((name, load) for name in WORKLOADS for load in (C1, C8))
ARMS = (
    Candidate("d-k2", "d", "draft_model", 2),
    Candidate("d-k4", "d", "draft_model", 4),
    Candidate("n-k4", "n", "ngram", 4),
)
CELL = ("mix", C1)


def belief(*observed: Observed, predicted: float = 0.0, known: str = "itself") -> Belief:
    return believe(
        ARMS,
        CELLS,
        workloads=WORKLOADS,
        predicted={(c.arm, *cell): predicted for c in ARMS for cell in CELLS},
        rests_on=dict.fromkeys(("d", "n"), known),  # type: ignore[arg-type]
        observed=observed,
    )


def trial(arm: str | None, value: float, repeat: int = 0, cell: tuple[str, LoadPoint] = CELL):
    return Observed(arm, cell, repeat, value, 1e-6)


def gain(found: Belief, arm: str, cell: tuple[str, LoadPoint] = CELL) -> tuple[float, float]:
    row = [c.arm for c in found.candidates].index(arm)
    column = found.cells.index(cell)
    return float(found.mean[row, column]), float(found.deviation[row, column])


def test_without_trials_it_is_the_prediction() -> None:
    found = belief(predicted=0.3)
    mean, deviation = gain(found, "d-k2")
    assert mean == pytest.approx(0.3)
    assert 0.05 < deviation < 0.12


def test_exact_trials_of_one_block_tell_the_gain() -> None:
    seen = [trial(a, v, r) for r in range(4) for a, v in ((None, 2.0), ("d-k2", 2.2))]
    mean, deviation = gain(belief(*seen), "d-k2")
    assert mean == pytest.approx(0.2, abs=0.01)
    assert deviation < 0.015


@settings(deadline=None, max_examples=30)
@given(level=st.floats(-5, 5), value=st.floats(-0.4, 0.4))
def test_the_level_of_a_block_says_nothing(level: float, value: float) -> None:
    at = belief(trial(None, level), trial("d-k2", level + value))
    reference = belief(trial(None, 0.0), trial("d-k2", value))
    np.testing.assert_allclose(at.mean, reference.mean, atol=2e-3)


def test_trials_of_different_blocks_are_not_compared() -> None:
    found = belief(trial(None, 1.0, repeat=0), trial("d-k2", 9.0, repeat=1))
    assert gain(found, "d-k2")[0] == pytest.approx(0.0, abs=0.02)


def test_two_arms_without_the_baseline_tell_which_is_better() -> None:
    found = belief(trial("d-k2", 5.0), trial("d-k4", 5.2))
    assert gain(found, "d-k4")[0] - gain(found, "d-k2")[0] > 0.05


def test_alike_arms_and_cells_learn_from_each_other_and_others_little() -> None:
    found = belief(*[trial(a, v, r) for r in range(3) for a, v in ((None, 0.0), ("d-k2", 0.2))])
    own = gain(found, "d-k2")[0]
    near = gain(found, "d-k4")[0]
    far = gain(found, "n-k4", ("prose", C8))[0]
    assert own > near > far
    assert near > 0.05
    assert far < 0.06


def test_a_family_that_was_not_measured_is_less_sure() -> None:
    assert gain(belief(known="its method"), "d-k2")[1] > gain(belief(), "d-k2")[1]
    assert gain(belief(known="nothing"), "d-k2")[1] > 0.3


def test_an_arm_that_idles_is_expected_to_cost_a_little() -> None:
    arms = (Candidate("d-idle", "d", "draft_model", 0), Candidate("n-idle", "n", "ngram", 0))
    found = believe(
        arms, CELLS, workloads=WORKLOADS, predicted={}, rests_on={"d": "itself", "n": "itself"},
        observed=(),
    )  # fmt: skip
    draft, lookup = gain(found, "d-idle"), gain(found, "n-idle")
    assert -0.05 < draft[0] < -0.01
    assert lookup[0] < draft[0]  # no asynchronous scheduling: that costs more, and less surely
    assert lookup[1] > draft[1]


def drifting(seed: int, *, known_times: bool) -> tuple[Belief, np.ndarray]:
    """A search on a machine whose pace drifts by 10 %: the baseline everywhere, then the arms.

    Two trials a minute; the true gains are drawn from the prior.
    """
    rng = np.random.default_rng(seed)
    prior = belief()
    truth = prior.draws(1, rng)[0][1:]
    pace, observed, at_s = 0.1 * rng.standard_normal(), [], 0.0
    for repeat in range(2):
        for row in (None, 0, 1, 2):
            for column, cell in enumerate(CELLS):
                at_s += 30.0
                kept = math.exp(-30.0 / 120.0)
                pace = kept * pace + 0.1 * math.sqrt(1 - kept**2) * rng.standard_normal()
                value = pace + (0.0 if row is None else truth[row, column])
                arm = None if row is None else ARMS[row].arm
                time_s = at_s if known_times else None
                observed.append(Observed(arm, cell, repeat, value, 1e-6, time_s))
    return belief(*observed), truth


def test_what_drifts_is_told_from_what_an_arm_gains() -> None:
    found, errors = [], {True: [], False: []}
    for seed in range(20):
        for known in (True, False):
            after, truth = drifting(seed, known_times=known)
            errors[known].append(np.sqrt(((after.mean - truth) ** 2).mean()))
            if known:
                found.append((np.abs(after.mean - truth) < 1.96 * after.deviation).mean())
                assert after.drift_deviation > 0.03
    assert np.mean(found) > 0.88
    assert np.mean(errors[True]) < 0.9 * np.mean(errors[False])


def test_a_calm_machine_is_not_said_to_drift() -> None:
    rng = np.random.default_rng(3)
    seen = [
        Observed(
            arm, cell, r, 0.004 * rng.standard_normal() + (0.1 if arm else 0.0), 1e-6, 30.0 * number
        )
        for number, (r, arm, cell) in enumerate(
            (r, arm, cell) for r in range(2) for arm in (None, "d-k2") for cell in CELLS
        )
    ]
    assert belief(*seen).drift_deviation < 0.008


def test_repeats_that_disagree_make_it_doubt_the_machine() -> None:
    calm = [trial(a, v, r) for r in range(4) for a, v in ((None, 0.0), ("d-k2", 0.1))]
    wild = [
        trial(a, v + (-1) ** r * (0.1 if a else -0.1), r)
        for r in range(4)
        for a, v in ((None, 0.0), ("d-k2", 0.1))
    ]
    assert belief(*wild).machine_deviation > 4 * belief(*calm).machine_deviation


def exact(means: list[list[float]], deviations: list[list[float]]) -> Belief:
    """Independent gains of two arms in cells of one workload."""
    flat = np.diag(np.array(deviations).ravel() ** 2)
    cells = tuple(("mix", load) for load in (C1, C8))[: len(means[0])]
    return Belief(ARMS[: len(means)], cells, np.array(means), flat, 0.01)


def test_regret_of_two_normals_is_the_textbook_one() -> None:
    """One arm with gain N(m, s) against off: choosing by the mean loses E[(-g)+] if m > 0."""
    m, s = 0.02, 0.05
    found = regret(exact([[m]], [[s]]), np.random.default_rng(1), draws=60_000)
    z = m / s
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below = 0.5 * math.erfc(z / math.sqrt(2))
    expected = s * density - m * below  # of a log ratio: small, so nearly the share
    assert found.mean == pytest.approx(expected, rel=0.05)
    assert found.best_probability[:, 0].tolist() == pytest.approx([below, 1 - below], abs=0.01)


def test_nothing_is_lost_where_everything_is_known() -> None:
    found = regret(exact([[0.2], [0.1]], [[1e-9], [1e-9]]), np.random.default_rng(1))
    assert found.mean_bound == pytest.approx(0.0, abs=1e-4)


def test_worth_is_the_knowledge_gradient_of_one_arm() -> None:
    """E[max(0, m + s' Z)] - max(0, m), s' the deviation of the mean that a look would move."""
    m, s, noise = -0.03, 0.08, 0.0
    found = exact([[m]], [[s]])
    value = worth(found, np.full((1, 1), noise))[0, 0]
    move = s**2 / math.sqrt(s**2 + (noise + 2 * 0.01**2) / 3)
    z = m / move
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    above = 0.5 * math.erfc(-z / math.sqrt(2))
    assert value == pytest.approx(move * density + m * above, rel=0.12)


def test_it_is_worth_more_to_look_where_the_choice_is_open() -> None:
    found = exact([[0.0, 0.5], [-0.4, 0.0]], [[0.1, 0.1], [0.1, 0.1]])
    value = worth(found, np.zeros((2, 2)))
    assert value[0, 0] > 5 * value[0, 1]
    assert value[0, 0] > 5 * value[1, 0]
