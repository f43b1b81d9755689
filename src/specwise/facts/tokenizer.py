"""Two tokenizers compared by content: vocabulary, merges, rules, special tokens, a round trip.

vLLM compares vocabulary *sizes* only. Two tokenizers of one size may number other words, and then
every draft is noise; two of different sizes may agree on every token a text can produce.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

import orjson

from specwise.errors import CheckpointError

# Enough kinds of text to reach the rules for case, digits, spaces, scripts and code.
CORPUS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog. It's 7:45 am, isn't it?",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\tif x >= 10_000:\n        pass",
    '{"name": "Zoë", "ids": [1, 23, 456, 7890], "ok": true, "note": null}',
    "  leading, trailing and   inner   spaces  \n\n\n",
    "Größe café naïve e\u0301 ﬁ Ⅷ",
    "数据中心的推理服务 ข้อมูล данные بيانات",
    "https://example.org/a?b=c&d=%20 <html><b>x</b></html> $\\frac{1}{2}$ 3.14159e-10 🙂👩🏽‍💻",
)
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What tokenizer.json and tokenizer_config.json say. ``vocabulary`` includes added tokens."""

    path: Path
    kind: str
    vocabulary: Mapping[str, int]
    merges: Sequence[Any]  # "left right" or [left, right], as the file has them
    added: Mapping[str, bool]  # token -> whether it is special
    rules: Mapping[str, str]  # rule -> its JSON
    roles: Mapping[str, str]  # bos_token and its kin -> token


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two tokenizers differ, with the first cases of it.

    ``kind`` is vocabulary, ids, added, special, merges, model, roles or the name of a rule.
    """

    kind: str
    what: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenizerComparison:
    """How two tokenizers differ.

    ``verdict`` is "same" (nothing that changes a token), "extended" (one only knows further added
    tokens: every text without them encodes alike) or "different". ``round_trip`` is the share of
    the corpus' texts that both encode to the same ids, None where it was not needed.
    """

    verdict: str
    differences: tuple[Difference, ...]
    round_trip: float | None = None


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None if it has no tokenizer.json.

    Raises CheckpointError for a file that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    data = _object(path)
    model = data.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = _vocabulary(model.get("vocab"))
    merges = model.get("merges")
    added: dict[str, bool] = {}
    tokens = data.get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            content = str(token.get("content"))
            added[content] = bool(token.get("special"))
            vocabulary[content] = token["id"]
    config = folder / "tokenizer_config.json"
    roles = _object(config) if config.is_file() else {}
    return Tokenizer(
        path=path,
        kind=str(model.get("type", "")),
        vocabulary=vocabulary,
        merges=merges if isinstance(merges, list) else [],
        added=added,
        rules={rule: json.dumps(data.get(rule), sort_keys=True) for rule in _RULES},
        roles={role: _content(roles.get(role)) for role in _ROLES if roles.get(role)},
    )


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; large ones are read without collecting garbage meanwhile."""
    collecting = gc.isenabled()
    gc.disable()  # 400,000 small objects are made and none dropped: three times as fast
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Download it again.") from error
    finally:
        if collecting:
            gc.enable()
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", "Download it again.")
    return value


def _vocabulary(vocab: Any) -> dict[str, int]:
    """Token -> id: a mapping (BPE, WordPiece), or Unigram's list of [token, score]."""
    if isinstance(vocab, dict):
        if all(type(number) is int for number in vocab.values()):
            return vocab
        return {token: number for token, number in vocab.items() if isinstance(number, int)}
    if isinstance(vocab, list):
        return {str(row[0]): i for i, row in enumerate(vocab) if isinstance(row, list) and row}
    return {}


def _merge(merge: Any) -> str:
    """A merge as ``left right``, whichever of the two spellings the file has."""
    return " ".join(map(str, merge)) if isinstance(merge, list) else str(merge)


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


ROUND_TRIP_LIMIT = 50_000  # entries; the library needs a second for two tokenizers of 128,000


def compare_tokenizers(
    one: Tokenizer, other: Tokenizer, *, round_trip: bool = False
) -> TokenizerComparison:
    """What differs, worst first.

    Where something does, the corpus is encoded by both, unless they are large; ``round_trip`` has
    it encoded in any case.
    """
    found = tuple(_differences(one, other))
    harmful = [d for d in found if d.kind not in {"roles", "post_processor", "decoder", "special"}]
    if not harmful:
        return TokenizerComparison("same", found)
    alike = None
    if round_trip or len(one.vocabulary) <= ROUND_TRIP_LIMIT:
        alike = _round_trip(one.path, other.path)
    only_added = all(d.kind == "added" for d in harmful)
    verdict = "extended" if only_added and alike in {None, 1.0} else "different"
    return TokenizerComparison(verdict, found, alike)


def _differences(one: Tokenizer, other: Tokenizer) -> Iterator[Difference]:
    a, b = one.vocabulary, other.vocabulary
    if one.kind != other.kind:
        yield Difference("model", f"{one.kind or 'unnamed'} against {other.kind or 'unnamed'}")
    only_a = [t for t in a if t not in b]
    only_b = [t for t in b if t not in a]
    plain_a = [t for t in only_a if t not in one.added]
    plain_b = [t for t in only_b if t not in other.added]
    if plain_a or plain_b:
        examples = (*_sample("only in the first", plain_a), *_sample("only in the second", plain_b))
        what = f"{len(plain_a)} and {len(plain_b)} tokens are in one vocabulary only"
        yield Difference("vocabulary", what, examples)
    moved = [t for t in a if t in b and a[t] != b[t]]
    if moved:
        examples = tuple(f"{t!r}: {a[t]} and {b[t]}" for t in nsmallest(3, moved, a.__getitem__))
        yield Difference("ids", f"{len(moved)} tokens have other ids", examples)
    added_a = [t for t in only_a if t in one.added]
    added_b = [t for t in only_b if t in other.added]
    if added_a or added_b:
        examples = (*_sample("only in the first", added_a), *_sample("only in the second", added_b))
        count = len(added_a) + len(added_b)
        yield Difference("added", f"{count} added token(s) are in one only", examples)
    if one.merges != other.merges:
        pairs = zip(one.merges, other.merges, strict=False)
        first = next((i for i, (x, y) in enumerate(pairs) if _merge(x) != _merge(y)), None)
        counts = (len(one.merges), len(other.merges))
        if first is None and counts[0] != counts[1]:
            first = min(counts)
        if first is not None:
            texts = [_merge(m.merges[first]) if first < len(m.merges) else "" for m in (one, other)]
            example = f"merge {first}: {texts[0]!r} and {texts[1]!r}"
            what = f"merges differ from number {first} on ({counts[0]} and {counts[1]})"
            yield Difference("merges", what, (example,))
    for rule in _RULES:
        if one.rules[rule] != other.rules[rule]:
            texts = [m.rules[rule][:80] for m in (one, other)]
            yield Difference(rule, f"the {rule} differs", (f"{texts[0]} and {texts[1]}",))
    special = [t for t in one.added if t in other.added and one.added[t] != other.added[t]]
    if special:
        yield Difference(
            "special", f"{len(special)} tokens are special in one only", tuple(special[:3])
        )
    roles = [r for r in _ROLES if one.roles.get(r) != other.roles.get(r)]
    if roles:
        examples = tuple(f"{r}: {one.roles.get(r)!r} and {other.roles.get(r)!r}" for r in roles)
        yield Difference("roles", "beginning, end or padding tokens differ", examples)


def _sample(where: str, tokens: list[str]) -> tuple[str, ...]:
    return (f"{where}: {', '.join(map(repr, tokens[:3]))}",) if tokens else ()


def _round_trip(one: Path, other: Path) -> float | None:
    """Share of the corpus that both encode to the same ids; None if a file is not loadable."""
    import tokenizers  # noqa: PLC0415 (only where contents differ)

    try:
        pair = [tokenizers.Tokenizer.from_file(str(path)) for path in (one, other)]
        encoded = [[t.encode(text, add_special_tokens=False).ids for text in CORPUS] for t in pair]
    except Exception:  # noqa: BLE001 (the library raises bare Exception for any malformed file)
        return None
    same = sum(1 for x, y in zip(*encoded, strict=True) if x == y)
    return same / len(CORPUS)
