"""Pairs: the article's bands and pairs, tokenizers, vLLM's vocabulary rule, methods by workload."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Checkpoint, Quantization
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.planning.advice import WORKLOADS, advise_methods, known_drafts, tokens_per_step
from specwise.planning.pairing import judge_pair, rank_pairs, ratio_band
from specwise.vllm.command import Version
from specwise.vllm.findings import ERROR


def model(name: str) -> Checkpoint:
    return load_checkpoint(name)


def rules(target: str, draft: str, version: str = "0.33.0") -> dict[str, str]:
    report = judge_pair(model(target), model(draft), Version.parse(version))
    return {f.rule: f.severity for f in report.findings}


@pytest.mark.parametrize(
    ("target", "draft", "nominal", "band"),
    [
        ("llama-3.1-70b", "llama-3.1-8b", 9, "good"),
        ("qwen2.5-72b", "qwen2.5-7b", 10, "good"),
        ("llama-3.1-70b", "llama-3.2-1b", 70, "too small"),
        ("llama-3.1-405b", "llama-3.1-8b", 50, "weak"),
    ],
)
def test_the_articles_pairs(target: str, draft: str, nominal: float, band: str) -> None:
    """req: A2"""
    report = judge_pair(model(target), model(draft))
    assert report.nominal_ratio == pytest.approx(nominal, rel=0.04)
    assert report.band.name == band


def test_ratios_come_from_real_counts() -> None:
    """req: A1"""
    renamed = replace(model("llama-3.1-8b"), name="tiny-0.1b")
    report = judge_pair(model("llama-3.1-70b"), renamed)
    assert report.ratio == pytest.approx(70.554 / 8.030, rel=1e-3)


@pytest.mark.parametrize(
    ("ratio", "band"),
    [(2, "too large"), (5, "large"), (8, "good"), (11.9, "good"), (20, "small"), (50, "weak"),
     (70, "too small"), (140, "too small")],
)  # fmt: skip
def test_bands(ratio: float, band: str) -> None:
    """req: A1"""
    assert ratio_band(ratio).name == band


def test_load_is_always_said_to_matter_more() -> None:
    """req: A5"""
    report = judge_pair(model("llama-3.1-70b"), model("llama-3.1-8b"))
    load = next(f for f in report.findings if f.rule == "load")
    assert "1:140" in load.why
    assert "calibration" in load.source


def test_the_qwen_trap() -> None:
    assert rules("qwen2.5-72b", "qwen2.5-3b")["vocab-size"] == "warning"
    assert rules("qwen2.5-72b", "qwen2.5-3b", "0.20.0")["vocab-size"] == "error"
    assert "vocab-size" not in rules("qwen2.5-72b", "qwen2.5-7b")


def test_families_contexts_and_quantisation() -> None:
    found = rules("qwen3-32b", "qwen2.5-3b")
    assert found["family"] == "warning"
    assert found["context"] == "advice"
    assert found["quantize-draft"] == "advice"
    assert found["tokenizer-unverified"] == "warning"
    quantised = replace(model("llama-3.1-70b"), quantization=Quantization("awq", 4))
    report = judge_pair(quantised, model("llama-3.1-8b"))
    assert "target-quantization" in {f.rule for f in report.findings}
    int8 = replace(model("llama-3.1-8b"), quantization=Quantization("compressed-tensors", 8))
    mixed = {f.rule for f in judge_pair(quantised, int8).findings}
    assert "mixed-quantization" in mixed
    assert "quantize-draft" not in mixed


def test_draft_parallelism_is_a_question_for_targets_that_span_gpus() -> None:
    """req: C6"""
    assert rules("llama-3.1-70b", "llama-3.1-8b")["draft-tp"] == "advice"
    assert "draft-tp" not in rules("llama-3.1-8b", "llama-3.2-1b")


def test_experts_cost_by_their_active_parameters() -> None:
    report = judge_pair(model("qwen3-235b-a22b"), model("qwen3-1.7b"))
    assert report.ratio > 100
    assert report.band.name == "small"
    assert any("active" in f.what for f in report.findings)


def test_versions_that_cannot_run_the_pair() -> None:
    assert rules("llama-3.1-70b", "llama-3.1-8b", "0.12.0")["method"] == "error"


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 3,
}  # fmt: skip


def folder(root: Path, name: str, vocabulary: list[str], layers: int, **changes: object) -> str:
    path = root / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers} | changes))
    vocab = {token: i for i, token in enumerate(vocabulary)}
    model_json = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}
    blank = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (path / "tokenizer.json").write_text(json.dumps({"model": model_json, **blank}))
    return str(path)


def test_tokenizers_decide(tmp_path: Path) -> None:
    """req: A3"""
    target = model(folder(tmp_path, "target", ["a", "b", "c"], 40))
    same = model(folder(tmp_path, "same", ["a", "b", "c"], 2))
    permuted = model(folder(tmp_path, "permuted", ["a", "c", "b"], 2))
    reports = rank_pairs([judge_pair(target, permuted), judge_pair(target, same)])
    assert [r.draft.name.rsplit("/", 1)[-1] for r in reports] == ["same", "permuted"]
    good, bad = reports
    assert good.tokenizers is not None
    assert good.tokenizers.verdict == "same"
    assert not bad.sensible
    assert any(f.rule == "tokenizer-different" and f.severity == ERROR for f in bad.findings)


def test_heads_are_judged_as_heads(tmp_path: Path) -> None:
    target = model(folder(tmp_path, "target", ["a", "b", "c"], 40))
    head = model(
        folder(tmp_path, "head", ["a"], 1, architectures=["LlamaForCausalLMEagle3"], vocab_size=9)
    )
    report = judge_pair(target, head)
    assert report.sensible
    assert {f.rule for f in report.findings} == {"head"}
    advice = advise_methods(target, "chat", [report])
    assert advice[0].method == "eagle3"


def test_methods_by_workload() -> None:
    """req: A6"""
    target = model("llama-3.1-70b")
    drafts = [judge_pair(target, model("llama-3.1-8b"))]
    for workload in WORKLOADS:
        methods = [a.method for a in advise_methods(target, workload, drafts)]
        if workload in {"summary", "rag", "document-qa", "editing", "extraction"}:
            assert methods == ["ngram", "draft_model"]
        elif workload != "mixed":
            assert methods == ["draft_model"]
    assert advise_methods(model("deepseek-v3"), "chat")[0].method == "mtp"
    old = advise_methods(target, "chat", drafts, Version(0, 12, 0))
    assert "draft_model" not in [a.method for a in old]
    with pytest.raises(InputError, match="workload"):
        advise_methods(target, "poetry")


def test_known_drafts_are_ranked() -> None:
    names = [r.draft.name for r in known_drafts(model("qwen2.5-72b"))]
    assert names[0] == "Qwen/Qwen2.5-7B-Instruct"
    assert len(names) == 6


def test_tokens_per_step() -> None:
    """req: A7. Leviathan eq. 1 for equal acceptance; the first EAGLE row of published traces."""
    assert tokens_per_step([0.75] * 7) == pytest.approx((1 - 0.75**8) / 0.25)
    assert tokens_per_step([1.0] * 5) == 6
    assert tokens_per_step([]) == 1
    assert tokens_per_step([0.675, 0.647, 0.640]) == pytest.approx(2.391, abs=0.005)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_tokens_per_step_stay_between_one_and_k_plus_one(acceptance: list[float]) -> None:
    assert 1 <= tokens_per_step(acceptance) <= len(acceptance) + 1
