from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer

from specwise.errors import CheckpointError
from specwise.facts import bundled
from specwise.facts.bundled import (
    SEGMENTS,
    bundled_draft,
    bundled_prompts,
    bundled_target,
    check_padding,
    common_prefix,
    padded_target,
)
from specwise.facts.llama import ReferenceLlama, load_bfloat16, save_tensors

ROOT = Path(__file__).resolve().parents[2]
SPECIALS = {"<|user|>": 0, "<|assistant|>": 1, "<|end|>": 2}


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus", ROOT / "training" / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["corpus"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(bundled_target() / "tokenizer.json"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padded_target(tmp_path_factory.mktemp("padded"))


def prompts(segment: str) -> list[dict[str, Any]]:
    lines = bundled_prompts(segment).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("segment", SEGMENTS)
def test_prompts_are_many_distinct_and_short_enough(segment: str, tokenizer: Tokenizer) -> None:
    records = prompts(segment)
    assert len(records) >= 200
    assert len({r["id"] for r in records}) == len(records)
    contents = [r["messages"][0]["content"] for r in records]
    assert len(set(contents)) == len(contents)
    assert all(r["segment"] == segment and r["max_tokens"] >= 64 for r in records)
    assert max(len(tokenizer.encode(content).ids) for content in contents) <= 200


@pytest.mark.parametrize("segment", SEGMENTS)
def test_prompts_come_from_the_held_out_side_of_the_split(segment: str, corpus: ModuleType) -> None:
    for record in prompts(segment):
        split_by = record["messages"][0]["content"] if segment == "json" else record["source"]
        assert corpus.is_held_out(split_by)


def test_the_split_keeps_most_text_for_training(corpus: ModuleType) -> None:
    held_out = sum(corpus.is_held_out(f"Lib/file{i}.py") for i in range(4000))
    assert 200 <= held_out <= 300


def test_unknown_segment_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="json, copy, code, prose"):
        bundled_prompts("poetry")


def test_the_pair_shares_one_vocabulary(tokenizer: Tokenizer) -> None:
    files = [folder / "tokenizer.json" for folder in (bundled_target(), bundled_draft())]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert tokenizer.get_vocab_size() == 4096
    assert {token: tokenizer.token_to_id(token) for token in SPECIALS} == SPECIALS
    for folder in (bundled_target(), bundled_draft()):
        config = json.loads((folder / "config.json").read_text())
        assert config["vocab_size"] == 4096
        assert config["eos_token_id"] == SPECIALS["<|end|>"]


@pytest.mark.parametrize("folder", [bundled_target(), bundled_draft()], ids=["target", "draft"])
def test_weights_have_the_shapes_that_the_config_promises(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    shapes = {n: t.shape for n, t in load_bfloat16(folder / "model.safetensors").items()}
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    assert len(shapes) == 2 + 9 * layers
    assert shapes["model.embed_tokens.weight"] == (4096, hidden)
    for layer in range(layers):
        attention = shapes[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert attention == (config["num_attention_heads"] * config["head_dim"], hidden)
        down = shapes[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert down == (hidden, config["intermediate_size"])


@given(text=st.text(max_size=60))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template_renders_what_the_pair_was_trained_on() -> None:
    template = json.loads((bundled_target() / "tokenizer_config.json").read_text())["chat_template"]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rendered = (
        Environment(autoescape=True)
        .from_string(template)
        .render(messages=messages, add_generation_prompt=True)
    )
    assert rendered == "<|user|>a<|assistant|>b<|end|><|user|>c<|assistant|>"


def test_everything_that_ships_is_small() -> None:
    files = [f for f in bundled_target().parent.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 14_000_000


def test_the_target_fills_a_record_it_never_saw(tokenizer: Tokenizer) -> None:
    target = ReferenceLlama.load(bundled_target())
    asked = next(r for r in prompts("json") if "unknown" not in r["messages"][0]["content"])
    content = asked["messages"][0]["content"]
    answer = target.greedy(tokenizer.encode(f"<|user|>{content}<|assistant|>").ids, 128)
    assert answer[-1] == SPECIALS["<|end|>"]
    record = json.loads(tokenizer.decode(answer))
    assert record["kind"] == content.split()[3]


def test_the_reference_model_is_causal() -> None:
    draft = ReferenceLlama.load(bundled_draft())
    logits, changed = draft.logits([5, 6, 7, 8, 9]), draft.logits([5, 6, 7, 100, 200])
    np.testing.assert_allclose(logits[:3], changed[:3], atol=1e-5)
    assert abs(logits[3] - changed[3]).max() > 1e-2


def test_padding_costs_100_million_parameters_and_changes_no_token(padded: Path) -> None:
    tensors = load_bfloat16(padded / "model.safetensors")
    assert 95e6 < sum(t.size for t in tensors.values()) < 105e6
    check = check_padding(padded)
    assert check.same
    assert check.prompts == 4
    assert check.tokens >= 60
    assert check.largest_logit_difference < 1e-3


def test_the_larger_padding_costs_300_million_parameters_and_changes_no_token(
    tmp_path: Path,
) -> None:
    larger = padded_target(tmp_path, "300m")
    tensors = load_bfloat16(larger / "model.safetensors")
    assert 295e6 < sum(t.size for t in tensors.values()) < 310e6
    assert check_padding(larger, prompts=2, max_tokens=6).same


def test_padding_that_does_something_is_found(padded: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(padded, broken)
    tensors = load_bfloat16(broken / "model.safetensors")
    name = "model.layers.5.mlp.down_proj.weight"
    tensors[name] = tensors["model.layers.1.mlp.down_proj.weight"]
    save_tensors(broken / "model.safetensors", tensors)
    check = check_padding(broken)
    assert not check.same
    assert check.largest_logit_difference > 0.1


def test_padded_config_says_that_it_is_padded(padded: Path) -> None:
    assert "padded" in padded.name
    config = json.loads((padded / "config.json").read_text())
    assert "2 trained layers" in config["specwise_padded"]
    assert (padded / "tokenizer.json").read_bytes() == (
        bundled_target() / "tokenizer.json"
    ).read_bytes()


def test_a_finished_copy_is_kept_and_nothing_else_is_left(padded: Path) -> None:
    before = (padded / "model.safetensors").stat().st_mtime_ns
    assert padded_target(padded.parent) == padded
    assert (padded / "model.safetensors").stat().st_mtime_ns == before
    assert [f.name for f in padded.parent.iterdir()] == [padded.name]


def test_a_half_written_copy_is_replaced_and_other_weights_get_another_folder(
    padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundled_target(), tmp_path / "target")
    tensors = load_bfloat16(tmp_path / "target" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.uint16(1)
    save_tensors(tmp_path / "target" / "model.safetensors", tensors)
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path)
    first = padded_target(tmp_path / "out")
    assert first.name != padded.name
    (first / "padding.json").unlink()
    (first / "model.safetensors").write_bytes(b"torn")
    assert padded_target(tmp_path / "out") == first
    assert (first / "model.safetensors").stat().st_size > 190_000_000


def test_no_room_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundled, "save_tensors", full)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        padded_target(tmp_path / "full")
    assert "256 MB" in raised.value.next_step
    assert list((tmp_path / "full").iterdir()) == []


def test_torn_weights_are_one_clear_error(tmp_path: Path) -> None:
    torn = tmp_path / "model.safetensors"
    torn.write_bytes((bundled_draft() / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_bfloat16(torn)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
