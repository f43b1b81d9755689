from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Api, LoadPoint, Loop, Segment, Workload
from specwise.errors import InputError, PromptError
from specwise.measurement.design import bundled_study, parse_study
from specwise.measurement.prompts import (
    Prompt,
    PromptPlan,
    PromptSource,
    apportion,
    check_inputs,
    digest,
    load_prompts,
    load_source,
    remarks,
)

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
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"prompt": "x"}\n{"text": "x"}', "line 2 needs either .* it has text"),
        ('{"prompt": "x", "max_tokens": 0}', "positive whole number"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "without a known role"),
    ],
)
def test_a_bad_prompt_file_says_where_and_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(PromptError, match=message):
        load_prompts("p.jsonl", tmp_path)


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts("none.jsonl", tmp_path)
    with pytest.raises(PromptError, match="not known: sharegtp") as caught:
        load_prompts("sharegtp:x.json", tmp_path)
    assert "sharegpt, spec-bench" in caught.value.next_step


def test_categories_stand_behind_the_file(tmp_path: Path) -> None:
    questions = [
        {"question_id": i, "category": name, "turns": [name]}
        for i, name in enumerate(["coding", "qa", "math", "coding"])
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(q) for q in questions))
    assert [p.prompt_id for p in load_prompts("spec-bench:q.jsonl#coding", tmp_path)] == ["0", "3"]
    assert [p.text for p in load_prompts("q.jsonl#qa, math", tmp_path)] == ["qa", "math"]


def test_remarks_on_sampling_that_is_not_the_segments(tmp_path: Path) -> None:
    source = PromptSource(
        (
            Prompt("a", text="x", temperature=0.7, max_tokens=900),
            Prompt("b", text="x", temperature=0.7, top_p=1.0),
            Prompt("c", text="x"),
        ),
        "jsonl",
        notes=("A note.",),
    )
    note, temperature, length = remarks(Segment("s", "x", temperature=0.0), source)
    assert note == "A note."
    assert temperature.startswith(
        "Measured at temperature 0, but the source asks for 0.7 (2 of 3)."
    )
    assert length.startswith("1 of 3 requests allowed longer answers (up to 900 tokens)")
    assert remarks(Segment("s", "x", temperature=0.7, max_tokens=900), source) == ("A note.",)


def test_remarks_on_the_wrong_endpoint() -> None:
    completions = PromptSource((Prompt("a", text="x", api=Api.COMPLETIONS),), "vllm-log")
    chats = PromptSource((Prompt("a", messages=(("user", "x"),), api=Api.CHAT),), "openai-batch")
    (log,) = remarks(Segment("s", "x", api=Api.CHAT), completions)
    assert "chat applies it again" in log
    assert 'api to "completions"' in log
    (batch,) = remarks(Segment("s", "x", api=Api.COMPLETIONS), chats)
    assert "without the model's template" in batch
    assert remarks(Segment("s", "x", api=Api.CHAT), chats) == ()


def test_a_design_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    design = parse_study(bundled_study("demo"), name="demo")
    check_inputs(design, tmp_path)
    missing = replace(design, segments=(replace(design.segments[0], prompts="none.jsonl"),))
    with pytest.raises(PromptError, match="does not exist"):
        check_inputs(missing, tmp_path)
    (tmp_path / "few.jsonl").write_text('{"prompt": "x"}\n')
    few = replace(design, segments=(replace(design.segments[0], prompts="few.jsonl"),))
    with pytest.raises(PromptError, match="are kept for warm-up"):
        check_inputs(few, tmp_path)
    load = replace(design.loads[0], loop=Loop.OPEN, arrivals="trace", trace="times.txt")
    traced = replace(design, loads=(load,))
    with pytest.raises(PromptError, match=r"Trace file .*times.txt cannot be read"):
        check_inputs(traced, tmp_path)
    (tmp_path / "times.txt").write_text("0\nnever\n")
    with pytest.raises(InputError, match="line 2"):
        check_inputs(traced, tmp_path)


def test_digest_sees_a_changed_prompt() -> None:
    assert digest(prompts("a", 3)) == digest(prompts("a", 3))
    assert digest(prompts("a", 3)) != digest(prompts("b", 3))


def test_short_answers_to_bundled_prompts_are_nobodys_mistake() -> None:
    segment = Segment("json", "bundled:json", max_tokens=8)
    assert remarks(segment, load_source(segment.prompts, Path())) == ()
