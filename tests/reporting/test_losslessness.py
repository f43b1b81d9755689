from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from specwise.domain import (
    GreedyComparison,
    GreedyDifference,
    Losslessness,
    LosslessnessResult,
    PermutationTest,
    PositionDistance,
    SamplingComparison,
)
from specwise.reporting.losslessness import print_losslessness

GREEDY = GreedyComparison(
    prompts=24,
    tokens=1152,
    equal=15,
    differences=(
        *(GreedyDifference(f"prose/{i}", 4, 9, 8, 0.0004, -0.0001, True) for i in range(7)),
        GreedyDifference("prose/bad", 11, 9, 8, 1.25, -1.2, False),
        GreedyDifference("prose/untold", 2, 9, 8, None, None, None),
    ),
    logprob_noise=0.00031,
    tolerance=0.001,
    self_differing=1,
)
SAMPLING = SamplingComparison(
    prompts=12,
    samples=200,
    tokens=3,
    temperature=1.0,
    top_p=0.9,
    false_alarm_rate=0.01,
    tests=(
        PermutationTest("first token", 99.6, 100.1, 0.5, 1.0),
        PermutationTest("tokens", 1793.4, 715.0, 0.0005, 0.002),
    ),
    positions=(PositionDistance(0, 0.1, 0.09, 0.12), PositionDistance(1, 0.447, 0.16, 0.2)),
    effect=0.1,
    power=0.97,
    power_wanted=0.9,
    detectable=0.085,
    samples_needed=200,
    room=0.6,
)
RESULT = LosslessnessResult(
    arm="draft",
    model="target",
    verdict=Losslessness.CHANGED,
    reasons=("sampling: tokens differ",),
    greedy=GREEDY,
    sampling=SAMPLING,
    drafted_tokens=3000,
    accepted_tokens=60,
    baseline_version="0.32.0",
    candidate_version="0.32.0",
    seed=0,
    measured_at="2026-11-22T00:00:00Z",
)


def shown(result: LosslessnessResult, *, width: int = 100, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_losslessness(result, Console(file=stream, width=width))
    stream.flush()
    stream.seek(0)
    return stream.read()


def test_everything_that_was_seen_is_said() -> None:
    lines = shown(RESULT).splitlines()
    text = "\n".join(lines)
    assert "✗ CHANGED   arm draft against the baseline, target" in text
    assert "15 of 24 outputs equal (1,152 tokens); the baseline agrees with itself in 23" in text
    assert "12 prompts × 200 samples × 3 tokens" in text
    assert "top-p 0.9" in text
    assert "3,000 drafted, 60 accepted (2%)" in text
    assert "found with" in text
    assert "smallest found with 0.9: 0.085" in " ".join(text.split())
    row = next(line for line in lines if line.strip().startswith("tokens"))
    assert row.split() == ["tokens", "1,793", "715", "0.0005", "0.002", "differs"]
    row = next(line for line in lines if line.split()[:2] == ["2", "0.447"])
    assert row.split()[-1] == "above"


def test_the_weightiest_difference_comes_first_and_the_rest_is_counted() -> None:
    lines = shown(RESULT).splitlines()
    start = next(i for i, line in enumerate(lines) if "outputs part at" in line)
    weightiest = ["prose/bad", "12", "1.2500", "nats", "-1.2000", "nats", "a", "change"]
    assert lines[start + 1].split() == weightiest
    assert lines[start + 2].split() == ["prose/untold", "3", "–", "–", "cannot", "tell"]
    assert lines[start + 7].split() == ["and", "3", "more"]


@pytest.mark.parametrize("verdict", list(Losslessness))
def test_halves_that_were_left_out_are_left_out(verdict: Losslessness) -> None:
    text = shown(replace(RESULT, verdict=verdict, greedy=None, sampling=None, drafted_tokens=None))
    assert "greedy" not in text
    assert "power" not in text
    assert "make sure that it speculates" in text
    assert {"unchanged": "✓", "changed": "✗", "unknown": "?"}[verdict] in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    shown(RESULT, encoding="ascii").encode("ascii")
    assert max(map(len, shown(RESULT, width=80).splitlines())) <= 80
