"""Tokenizers compared by content: every way in which two can differ is told apart. req: A3"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from specwise.errors import CheckpointError
from specwise.facts.tokenizer import CORPUS, TokenizerComparison, compare_tokenizers, read_tokenizer

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A byte-level BPE tokenizer as tokenizer.json has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    return data


def compare(
    trained: dict[str, Any], root: Path, change: Change, roles: dict[str, Any] | None = None
) -> TokenizerComparison:
    """The trained tokenizer against a changed copy."""
    changed = json.loads(json.dumps(trained))
    change(changed)
    read = []
    for name, data, config in (("one", trained, {}), ("other", changed, roles or {})):
        folder = root / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(data))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = read_tokenizer(folder)
        assert tokenizer is not None
        read.append(tokenizer)
    return compare_tokenizers(*read)


def _nothing(data: dict[str, Any]) -> None:
    """An unchanged copy."""


def kinds(comparison: TokenizerComparison) -> set[str]:
    return {d.kind for d in comparison.differences}


def test_identical(trained: dict[str, Any], tmp_path: Path) -> None:
    result = compare(trained, tmp_path, _nothing)
    assert result == TokenizerComparison("same", ())


def test_permuted_ids(trained: dict[str, Any], tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        words = list(vocabulary)[300:]
        for word, other in zip(words, reversed(words), strict=True):
            vocabulary[word] = trained["model"]["vocab"][other]

    result = compare(trained, tmp_path, change)
    assert result.verdict == "different"
    assert kinds(result) == {"ids"}
    assert result.round_trip is not None
    assert result.round_trip < 1
    assert "and" in result.differences[0].examples[0]


def test_one_added_token(trained: dict[str, Any], tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        token = dict(data["added_tokens"][0], id=420, content="<|tool|>")
        data["added_tokens"].append(token)

    result = compare(trained, tmp_path, change)
    assert result.verdict == "extended"
    assert kinds(result) == {"added"}
    assert "<|tool|>" in result.differences[0].examples[0]
    assert result.round_trip == 1


def test_different_merges(trained: dict[str, Any], tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["model"]["merges"].reverse()

    result = compare(trained, tmp_path, change)
    assert result.verdict == "different"
    assert kinds(result) == {"merges"}


def test_same_size_but_another_vocabulary(trained: dict[str, Any], tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        merged = data["model"]["merges"].pop()
        vocabulary["☃☃"] = vocabulary.pop("".join(merged))

    result = compare(trained, tmp_path, change)
    assert result.verdict == "different"
    assert kinds(result) == {"vocabulary", "merges"}


@pytest.mark.parametrize(
    ("change", "verdict", "kind"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "different", "normalizer"),
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "different", "pre_tokenizer"),
        (lambda d: d.update(decoder=None), "same", "decoder"),
        (lambda d: d["added_tokens"][0].update(special=False), "same", "special"),
    ],
)
def test_rules(
    trained: dict[str, Any], tmp_path: Path, change: Change, verdict: str, kind: str
) -> None:
    trained = trained | {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}  # fmt: skip  # noqa: E501
    result = compare(trained, tmp_path, change)
    assert (result.verdict, kinds(result)) == (verdict, {kind})


def test_roles_are_reported_and_harmless(trained: dict[str, Any], tmp_path: Path) -> None:
    roles = {"eos_token": {"content": "</s>"}}
    result = compare(trained, tmp_path, _nothing, roles)
    assert (result.verdict, kinds(result)) == ("same", {"roles"})


def test_unigram_vocabularies_are_lists(tmp_path: Path) -> None:
    data = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.vocabulary == {"a": 0, "b": 1}


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["model", "vocab", "merges", "added_tokens", "id", "content"]), x),
    max_leaves=8,
).map(lambda x: json.dumps(x).encode()))  # fmt: skip
def test_any_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = read_tokenizer(folder)
    except CheckpointError:
        return
    assert tokenizer is not None
    assert compare_tokenizers(tokenizer, tokenizer).verdict == "same"
