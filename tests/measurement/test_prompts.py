from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import LoadPoint, Loop, Segment, Workload
from specwise.errors import PromptError
from specwise.measurement.prompts import Prompt, PromptPlan, apportion, digest, load_prompts

SEGMENTS = (Segment("a", "a.jsonl"), Segment("b", "b.jsonl"))
MIX = Workload("mix", (("a", 0.75), ("b", 0.25)))
C1, C4 = LoadPoint(Loop.CLOSED, 1), LoadPoint(Loop.CLOSED, 4)


def prompts(name: str, count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{name}{i}", text=f"{name} {i}") for i in range(count))


def plan(count: int = 100, warmup: int = 2) -> PromptPlan:
    sources = {"a": prompts("a", count), "b": prompts("b", count)}
    return PromptPlan(sources, SEGMENTS, seed=5, warmup=warmup)


def test_every_arm_gets_the_same_prompts_and_cells_get_different_ones() -> None:
    deals = plan()
    first = deals.deal(MIX, C1, 0, 20)
    assert deals.deal(MIX, C1, 0, 20) == first
    other = deals.deal(MIX, C4, 0, 20)
    repeat = deals.deal(MIX, C1, 1, 20)
    ids = [{c.prompt.prompt_id for c in cell} for cell in (first, other, repeat)]
    assert len(set.union(*ids)) == sum(map(len, ids))
    assert deals.reused == ()


def test_a_second_sitting_deals_the_same() -> None:
    assert [plan().deal(MIX, C1, 0, 20)] == [plan().deal(MIX, C1, 0, 20)]


def test_shares_hold_exactly_and_segments_interleave() -> None:
    cell = plan().deal(MIX, C1, 0, 20)
    names = [c.segment.name for c in cell]
    assert names.count("a") == 15
    assert names != sorted(names)
    assert [c.index for c in cell] == list(range(20))


def test_warmup_prompts_are_never_measured() -> None:
    deals = plan(count=10, warmup=3)
    warm = {c.prompt.prompt_id for c in deals.warmup(MIX)}
    assert len(warm) == 6
    measured = {c.prompt.prompt_id for c in deals.deal(MIX, C1, 0, 40)}
    assert not warm & measured
    assert deals.reused == ("a", "b")


def test_too_few_prompts_for_the_warmup() -> None:
    with pytest.raises(PromptError, match="'a' has 2 prompts; 2 are kept for warm-up"):
        plan(count=2, warmup=2)


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    st.integers(0, 500),
)
def test_apportion_adds_up_and_is_within_one(weights: list[float], count: int) -> None:
    shares = [(str(i), w / sum(weights)) for i, w in enumerate(weights)]
    parts = apportion(shares, count)
    assert sum(parts) == count
    assert all(
        abs(n - share * count) < 1 + 1e-6 for n, (_, share) in zip(parts, shares, strict=True)
    )


def test_jsonl_with_text_messages_ids_and_limits(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one"},
        {"id": "x", "messages": [{"role": "user", "content": "two"}], "max_tokens": 9},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    one, two = load_prompts("p.jsonl", tmp_path)
    assert (one.prompt_id, one.as_text()) == ("p-1", "one")
    assert one.as_messages() == [{"role": "user", "content": "one"}]
    assert (two.prompt_id, two.max_tokens, two.as_text()) == ("x", 9, "two")


def test_sharegpt_takes_the_first_human_turn(tmp_path: Path) -> None:
    conversations = [
        {"id": "c1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt"}]},
        {"id": "c2", "conversations": [{"from": "gpt", "value": "no human"}]},
        {"id": "c3", "conversations": None},
    ]
    (tmp_path / "s.json").write_text(json.dumps(conversations))
    (only,) = load_prompts("sharegpt:s.json", tmp_path)
    assert (only.prompt_id, only.text) == ("c1", "hi")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no usable prompt"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"text": "x"}', "line 1 needs either"),
        ('{"prompt": "x", "max_tokens": 0}', "positive whole number"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "without a known role"),
    ],
)
def test_a_bad_prompt_file_says_where_and_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(PromptError, match=message):
        load_prompts("p.jsonl", tmp_path)


def test_missing_file_and_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts("none.jsonl", tmp_path)
    with pytest.raises(PromptError, match="is not known"):
        load_prompts("prompts.parquet", tmp_path)


def test_digest_sees_a_changed_prompt() -> None:
    assert digest(prompts("a", 3)) == digest(prompts("a", 3))
    assert digest(prompts("a", 3)) != digest(prompts("b", 3))
