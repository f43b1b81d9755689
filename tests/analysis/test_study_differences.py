"""Which differences make a comparison invalid, which spoil its times, which are the change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.analysis.synthetic import C16, demo_design, demo_study

from specwise.analysis.study_differences import (
    draft_bits,
    find_differences,
    identical,
    pair_arms,
    shared_segments,
    target_bits,
)
from specwise.domain import Api, Arm, Deployment, Segment, Slo, Speculation, StudyData
from specwise.errors import InputError


def drafting(name: str = "spec", model: str = "big", **options: Any) -> Arm:
    speculation = Speculation(**({"method": "draft_model", "k": 3, "draft": "small"} | options))
    return Arm(name, speculation, deployment=Deployment(model, arguments=("--dtype", "float32")))


def made(*arms: Arm, folder: str = "a", **provenance: Any) -> StudyData:
    base = Arm("baseline", deployment=Deployment("big", arguments=("--dtype", "float32")))
    design = demo_design(arms=(base, *arms), loads=(C16,), requests=4, repeats=1)
    truth_free = replace(demo_study(demo_design(requests=1, repeats=1, loads=(C16,))), trials=())
    return replace(truth_free, design=design, folder=folder, provenance=provenance)


def told(before: StudyData, after: StudyData) -> dict[str, tuple[str, str, str]]:
    found = find_differences(before, after, pair_arms(before, after))
    return {f"{d.where}, {d.what}": (d.before, d.after, d.effect) for d in found}


def test_arms_are_paired_by_name_else_the_only_candidates() -> None:
    a, b = made(drafting("one"), drafting("two")), made(drafting("two"), drafting("three"))
    assert [p.name for p in pair_arms(a, b)] == ["baseline", "two"]
    renamed = pair_arms(made(drafting("old")), made(drafting("new")))
    assert [p.name for p in renamed] == ["baseline", "old → new"]


def test_no_arm_in_common_is_one_clear_error() -> None:
    a, b = made(drafting("one"), drafting("two")), made(drafting("three"), drafting("four"))
    with pytest.raises(InputError, match=r"one, two in a.*three, four") as raised:
        pair_arms(a, b)
    assert "same name" in raised.value.next_step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.4}, "temperature 0 before, 0.4 after"),
        ({"top_p": 0.9}, "top_p 1 before, 0.9 after"),
        ({"api": Api.COMPLETIONS}, "sent to chat before, completions after"),
    ],
)
def test_sampled_otherwise_is_refused(change: dict[str, Any], words: str) -> None:
    a = made(drafting())
    changed = tuple(replace(s, **change) if s.name == "json" else s for s in a.design.segments)
    b = replace(a, design=replace(a.design, segments=changed))
    with pytest.raises(InputError) as raised:
        shared_segments(a, b)
    assert f"segment 'json': {words}" in raised.value.what


def test_other_prompts_are_refused_and_every_obstacle_is_named() -> None:
    a = made(drafting(), prompts={"json": "1", "prose": "2", "copy": "3"})
    b = made(drafting(), prompts={"json": "1", "prose": "x", "copy": "y"})
    with pytest.raises(InputError) as raised:
        shared_segments(a, b)
    assert "'prose': other prompts" in raised.value.what
    assert "'copy': other prompts" in raised.value.what
    assert "'json'" not in raised.value.what
    assert shared_segments(a, made(drafting(), prompts={})) == ("json", "prose", "copy")


def test_no_segment_in_common_is_one_clear_error() -> None:
    a = made(drafting())
    b = replace(a, design=replace(a.design, segments=(Segment("chat", "x.jsonl"),)))
    with pytest.raises(InputError, match="no segment in common"):
        shared_segments(a, b)


def test_the_change_itself_is_told_with_its_weights() -> None:
    def served(digest: str, bits: float) -> dict[str, Any]:
        checkpoint = {
            "weight_bits": bits,
            "weights_bytes": int(bits * 1e9 / 8),
            "config_and_headers_sha256": digest,
        }
        return {"spec": {"checkpoint": checkpoint, "vllm": "0.32.0"}}

    a = made(drafting(), arms=served("abcdef0123", 16))
    b = made(drafting(model="big-int4"), arms=served("9876543210", 4))
    found = told(a, b)
    assert found["arm spec, target"] == (
        "big (16-bit, 2,000 MB, sha256 abcdef01)",
        "big-int4 (4-bit, 500 MB, sha256 98765432)",
        "change",
    )
    assert "arm spec, vLLM" not in found
    assert target_bits(b, b.design.arm("spec")) == 4
    assert target_bits(b, b.design.arm("baseline")) is None
    assert draft_bits(b, b.design.arm("spec")) is None


def test_speculation_version_and_flags_are_changes() -> None:
    a = made(drafting(), arms={"spec": {"vllm": "0.28.0"}})
    other = drafting(k=5, method="ngram", draft=None, options={"prompt_lookup_min": 2})
    deployment = replace(other.deployment or Deployment(""), arguments=("--dtype", "bfloat16"))
    b = made(replace(other, deployment=deployment), arms={"spec": {"vllm": "0.32.0"}})
    found = told(a, b)
    assert found["arm spec, vLLM"] == ("0.28.0", "0.32.0", "change")
    assert found["arm spec, k"][:2] == ("3", "5")
    assert found["arm spec, draft"][:2] == ("small", "–")
    assert found["arm spec, method"][:2] == ("draft_model", "ngram")
    assert found["arm spec, options"][1] == "prompt_lookup_min=2"
    assert found["arm spec, arguments"][:2] == ("--dtype float32", "--dtype bfloat16")


def test_a_variable_is_named_and_its_value_is_not_shown() -> None:
    def with_environment(**values: str) -> StudyData:
        arm = drafting()
        assert arm.deployment is not None
        return made(replace(arm, deployment=replace(arm.deployment, environment=values)))

    found = told(
        with_environment(HF_TOKEN="hf_secret1", SAME="1"),
        with_environment(HF_TOKEN="hf_secret2", SAME="1", NEW="2"),
    )
    assert found["arm spec, variable HF_TOKEN"][:2] == ("set", "another value")
    assert found["arm spec, variable NEW"][:2] == ("not set", "set")
    assert len(found) == 2
    assert "secret" not in str(found)


def test_the_machine_spoils_times_and_the_software_is_noted() -> None:
    here = {"processor": "A", "cores": 2, "gpus": [], "system": "Linux 6.1", "specwise": "0.1.0"}
    a, b = made(drafting(), **here), made(drafting(), **here | {"gpus": ["H100"], "system": "L"})
    found = told(a, b)
    assert found["machine, GPUs"] == ("–", "H100", "times")
    assert found["machine, system"][2] == "caution"
    assert len(found) == 2
    assert told(a, made(drafting())) == {}  # a study that noted nothing contradicts nothing


def test_what_was_asked_of_the_studies_is_noted() -> None:
    a = made(drafting())
    design = replace(
        a.design,
        seed=9,
        slo=Slo(ttft_s=1),
        segments=(*a.design.segments[:2], Segment("chat", "x.jsonl")),
    )
    found = told(a, replace(a, design=design))
    assert found["study, seed"] == ("1", "9", "caution")
    assert "study, SLO" in found
    assert found["study, segment chat"][:2] == ("not measured", "measured")
    assert found["study, segment copy"][:2] == ("measured", "not measured")


def test_an_arm_served_the_same_in_both_is_a_control() -> None:
    a, b = made(drafting(k=3)), made(drafting(k=4))
    pairs = pair_arms(a, b)
    assert [identical(a, b, pair) for pair in pairs] == [True, False]
