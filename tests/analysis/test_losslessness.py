from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.analysis.losslessness import (
    NEAR_TIE_CEILING,
    NEAR_TIE_FLOOR,
    GreedyOutput,
    compare_greedy,
    first_difference,
    judge,
)
from specwise.domain import (
    GreedyComparison,
    GreedyDifference,
    Losslessness,
    PermutationTest,
    PositionDistance,
    SamplingComparison,
)

Tokens = st.lists(st.integers(0, 3), max_size=6)


@given(left=Tokens, right=Tokens)
def test_the_first_difference(left: list[int], right: list[int]) -> None:
    at = first_difference(left, right)
    assert (at is None) == (left == right)
    if at is not None:
        assert left[:at] == right[:at]
        assert left[at : at + 1] != right[at : at + 1]


def output(gap: float, noise: float, *, second: int = 8) -> GreedyOutput:
    """Two outputs that part at their second token, ``gap`` nats apart on the baseline."""
    decoded = ({7: -0.5, 1: -2.0}, {9: -1.0, 8: -1.0 - gap, 5: -6.0})
    scored = ({7: -0.5 - noise, 1: -2.0}, {9: -1.0, 8: -1.0 - gap + noise / 2, 5: -6.0})
    return GreedyOutput("p", (7, 9), (7, second), (7, 9), decoded, scored, scored)


@pytest.mark.parametrize(
    ("gap", "noise", "near"),
    [
        (0.015, 0.01, True),
        (0.025, 0.01, False),
        (NEAR_TIE_FLOOR * 0.9, 0.0, True),  # no noise seen: rounding is still rounding
        (NEAR_TIE_FLOOR * 1.1, 0.0, False),
        (NEAR_TIE_CEILING * 0.9, 3.0, True),
        (NEAR_TIE_CEILING * 1.1, 3.0, False),  # another model is not noise
    ],
)
def test_a_near_tie_is_within_twice_the_noise(gap: float, noise: float, near: bool) -> None:
    compared = compare_greedy([output(gap, noise)])
    (difference,) = compared.differences
    assert difference.near_tie is near
    assert (difference.position, difference.baseline_token, difference.candidate_token) == (1, 9, 8)
    assert difference.baseline_gap == pytest.approx(gap)
    assert difference.candidate_gap == pytest.approx(-gap + noise / 2)
    assert compared.logprob_noise == pytest.approx(noise)


def test_a_token_that_is_not_listed_is_at_least_as_far_as_the_last_one_listed() -> None:
    (difference,) = compare_greedy([output(0.001, 0.01, second=3)]).differences
    assert difference.baseline_gap == pytest.approx(5.0)
    assert difference.near_tie is False


def test_an_output_that_ends_early_cannot_be_a_near_tie_of_tokens() -> None:
    shorter = GreedyOutput("p", (7, 9), (7,), None, ({7: -0.1}, {9: -0.1}))
    (difference,) = compare_greedy([shorter]).differences
    assert (difference.position, difference.candidate_token) == (1, None)
    assert difference.near_tie is None


def test_counts() -> None:
    equal = GreedyOutput("a", (1, 2, 3), (1, 2, 3), (1, 2, 4))
    compared = compare_greedy([equal, output(1.0, 0.0)])
    assert (compared.prompts, compared.equal, compared.tokens) == (2, 1, 5)
    assert compared.self_differing == 1
    assert compare_greedy([GreedyOutput("a", (1,), (1,))]).self_differing is None
    assert compare_greedy([GreedyOutput("a", (1,), (1,))]).logprob_noise is None


# --- verdict ------------------------------------------------------------------------------------


def greedy(*near_ties: bool | None, position: int = 3) -> GreedyComparison:
    differences = tuple(GreedyDifference("p", position, 1, 2, 0.4, 0.1, near) for near in near_ties)
    return GreedyComparison(8, 100, 8 - len(near_ties), differences, 0.01, 0.02, 0)


def sampling(
    p: float = 0.5, power: float = 0.95, room: float = 0.5, name: str = "tokens"
) -> SamplingComparison:
    return SamplingComparison(
        prompts=4,
        samples=100,
        tokens=3,
        temperature=1.0,
        top_p=1.0,
        false_alarm_rate=0.01,
        tests=(PermutationTest(name, 5.0, 4.0, p, p), PermutationTest("pairs", 5, 5, 0.9, 0.9)),
        positions=(PositionDistance(0, 0.1, 0.1, 0.2), PositionDistance(1, 0.4, 0.1, 0.2)),
        effect=0.1,
        power=power,
        power_wanted=0.9,
        detectable=0.09,
        samples_needed=140,
        room=room,
    )


U, C, N = Losslessness.UNCHANGED, Losslessness.CHANGED, Losslessness.UNKNOWN


@pytest.mark.parametrize(
    ("of_greedy", "of_sampling", "drafted", "verdict", "said"),
    [
        (greedy(), sampling(), [9, 9], U, ["8 of 8 outputs are equal", "probability 0.95"]),
        (greedy(True), sampling(), [9, 9], U, ["1 part at near-ties", "no difference"]),
        (greedy(), None, [None], U, ["8 of 8"]),
        (greedy(True, False), sampling(), [9, 9], C, ["1 of 8 outputs part where"]),
        (greedy(False, position=0), None, [9], C, ["compare weights"]),
        (greedy(), sampling(p=0.01), [9, 9], C, ["tokens differ (p = 0.01", "0.40 where"]),
        (greedy(), sampling(p=0.011), [9, 9], U, ["8 of 8"]),
        (None, sampling(p=0.001, name="first token"), [9], C, ["differs too: compare weights"]),
        (greedy(False), sampling(p=0.001, power=0.1), [0, 0], C, ["greedy", "sampling"]),
        (greedy(None), sampling(), [9, 9], N, ["without logprobs"]),
        (greedy(), sampling(power=0.89), [9, 9], N, ["140 samples a prompt"]),
        (greedy(), sampling(room=0.05), [9, 9], N, ["nearly determined"]),
        (greedy(), sampling(), [9, 0], N, ["drafted nothing"]),
        (greedy(), sampling(), [None, None], U, ["8 of 8"]),
    ],
)
def test_the_verdict(
    of_greedy: GreedyComparison | None,
    of_sampling: SamplingComparison | None,
    drafted: list[int | None],
    verdict: Losslessness,
    said: list[str],
) -> None:
    found, reasons = judge(of_greedy, of_sampling, drafted)
    assert found is verdict
    for words in said:
        assert words in " ".join(reasons)
