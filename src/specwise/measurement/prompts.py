"""Prompt sources, and which prompts each trial sends.

A source is named in the study file:

- ``bundled:json`` - a held-out segment that ships with specwise (json, copy, code, prose);
- ``prompts.jsonl`` - one object a line with ``prompt`` (text) or ``messages`` (chat), and
  optionally ``id`` and ``max_tokens``;
- ``sharegpt:FILE.json`` - ShareGPT's list of conversations; the first human turn is the prompt.

Every arm of a cell gets the same prompts in the same order. Different cells get different prompts
as long as the source lasts, so that one trial does not warm the prefix cache for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specwise.domain import LoadPoint, Segment, Workload
from specwise.errors import PromptError

MESSAGE_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: ``text``, or chat ``messages`` as (role, content) pairs; never both."""

    prompt_id: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    max_tokens: int | None = None

    def as_messages(self) -> list[dict[str, str]]:
        """The prompt as a chat; plain text becomes one user message."""
        messages = self.messages or (("user", self.text or ""),)
        return [{"role": role, "content": content} for role, content in messages]

    def as_text(self) -> str:
        """The prompt as plain text for /v1/completions; a chat's contents joined by newlines."""
        if self.text is not None:
            return self.text
        return "\n".join(content for _, content in self.messages)


@dataclass(frozen=True, slots=True)
class ChosenPrompt:
    """A prompt in its place in a trial."""

    index: int
    segment: Segment
    prompt: Prompt


def load_prompts(
    source: str, base: Path, bundled: Callable[[str], Path] | None = None
) -> tuple[Prompt, ...]:
    """The prompts of ``source``; relative paths count from ``base``.

    ``bundled`` gives the file of a bundled segment. Raises PromptError if the source is missing,
    malformed or empty.
    """
    if source.startswith("bundled:"):
        if bundled is None:
            raise PromptError(f"{source}: bundled prompts are not available here.")
        prompts = tuple(_read_jsonl(bundled(source.removeprefix("bundled:"))))
    elif source.startswith("sharegpt:"):
        prompts = tuple(_read_sharegpt(base / source.removeprefix("sharegpt:")))
    elif source.endswith(".jsonl"):
        prompts = tuple(_read_jsonl(base / source))
    else:
        raise PromptError(
            f"Prompt source {source!r} is not known.",
            "Use bundled:NAME, a .jsonl file, or sharegpt:FILE.json.",
        )
    if not prompts:
        raise PromptError(
            f"Prompt source {source!r} holds no usable prompt.",
            "An empty segment measures nothing.",
        )
    return prompts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PromptError(
            f"Prompt file {path} does not exist.",
            "Paths in a study file count from the study file's folder.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"Prompt file {path} cannot be read: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where} is not JSON: {error.msg}.", "One object a line.") from error
        yield _prompt_from(item, where, default_id=f"{path.stem}-{number}")


def _prompt_from(item: Any, where: str, default_id: str) -> Prompt:
    if not isinstance(item, dict):
        raise PromptError(f"{where} is not a JSON object.", 'Write {"prompt": "..."}.')
    prompt_id = str(item.get("id", default_id))
    max_tokens = item.get("max_tokens")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise PromptError(f"{where}: max_tokens must be a positive whole number.")
    text = item.get("prompt")
    messages = item.get("messages")
    if isinstance(text, str) and not messages:
        return Prompt(prompt_id, text=text, max_tokens=max_tokens)
    if text is None and isinstance(messages, list) and messages:
        pairs = tuple(_message(message, where) for message in messages)
        return Prompt(prompt_id, messages=pairs, max_tokens=max_tokens)
    raise PromptError(
        f"{where} needs either a text 'prompt' or a list of 'messages'.",
        'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.',
    )


def _message(message: Any, where: str) -> tuple[str, str]:
    if (
        isinstance(message, dict)
        and message.get("role") in MESSAGE_ROLES
        and isinstance(message.get("content"), str)
    ):
        return message["role"], message["content"]
    raise PromptError(
        f"{where} has a message without a known role and text content.",
        f"Roles are {', '.join(MESSAGE_ROLES)}; content is text.",
    )


def _read_sharegpt(path: Path) -> Iterator[Prompt]:
    try:
        conversations = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise PromptError(f"{path} is not JSON: {error.msg}.") from error
    if not isinstance(conversations, list):
        raise PromptError(f"{path} is not ShareGPT's list of conversations.")
    for number, conversation in enumerate(conversations):
        if not isinstance(conversation, dict):
            raise PromptError(f"{path}: conversation {number} is not an object.")
        turns = conversation.get("conversations") or conversation.get("conversation") or []
        if not isinstance(turns, list):
            raise PromptError(f"{path}: conversation {number} has no list of turns.")
        first = next((t for t in turns if isinstance(t, dict) and t.get("from") == "human"), None)
        if first is not None and isinstance(first.get("value"), str) and first["value"].strip():
            yield Prompt(str(conversation.get("id", number)), text=first["value"])


def digest(prompts: Sequence[Prompt]) -> str:
    """A short hash of a source's prompts: shows that a file changed between two sittings."""
    return hashlib.sha256(repr(tuple(prompts)).encode()).hexdigest()[:16]


class PromptPlan:
    """Deals prompts to cells: each segment's source is shuffled once and handed out in turn.

    The first ``warmup`` prompts of each segment are set aside and never measured. When a source
    runs out it starts again, and ``reused`` names its segment.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Prompt]],
        segments: Sequence[Segment],
        *,
        seed: int,
        warmup: int,
    ) -> None:
        self._segments = {segment.name: segment for segment in segments}
        self._warmup: dict[str, list[Prompt]] = {}
        self._measured: dict[str, list[Prompt]] = {}
        self._dealt: dict[str, int] = {}
        self._cells: dict[tuple[str, LoadPoint, int], tuple[ChosenPrompt, ...]] = {}
        self._seed = seed
        for number, segment in enumerate(segments):
            order = np.random.default_rng([seed, 1, number]).permutation(len(sources[segment.name]))
            shuffled = [sources[segment.name][i] for i in order]
            if len(shuffled) <= warmup:
                raise PromptError(
                    f"Segment {segment.name!r} has {len(shuffled)} prompts; "
                    f"{warmup} are kept for warm-up and at least one must remain.",
                    "Give it more prompts or lower load.warmup.",
                )
            self._warmup[segment.name] = shuffled[:warmup]
            self._measured[segment.name] = shuffled[warmup:]
            self._dealt[segment.name] = 0

    @property
    def reused(self) -> tuple[str, ...]:
        """Segments whose prompts had to be used more than once."""
        return tuple(
            name for name, dealt in self._dealt.items() if dealt > len(self._measured[name])
        )

    def warmup(self, workload: Workload) -> tuple[ChosenPrompt, ...]:
        """The warm-up requests of a workload, its segments in turn."""
        chosen = [
            (self._segments[name], prompt)
            for name, _ in workload.shares
            for prompt in self._warmup[name]
        ]
        return tuple(ChosenPrompt(i, segment, prompt) for i, (segment, prompt) in enumerate(chosen))

    def deal(
        self, workload: Workload, load: LoadPoint, repeat: int, count: int
    ) -> tuple[ChosenPrompt, ...]:
        """The ``count`` requests of a cell, the same at every call for that cell.

        Calls for different cells must come in the same order each time the study is opened; the
        design's trial order sees to that.
        """
        key = (workload.name, load, repeat)
        if key not in self._cells:
            rng = np.random.default_rng([self._seed, 2, len(self._cells)])
            names = [
                name
                for (name, _), n in zip(
                    workload.shares, apportion(workload.shares, count), strict=True
                )
                for _ in range(n)
            ]
            order = rng.permutation(count)
            self._cells[key] = tuple(
                ChosenPrompt(i, self._segments[names[j]], self._next(names[j]))
                for i, j in enumerate(order)
            )
        return self._cells[key]

    def _next(self, segment: str) -> Prompt:
        prompts = self._measured[segment]
        prompt = prompts[self._dealt[segment] % len(prompts)]
        self._dealt[segment] += 1
        return prompt


def apportion(shares: Sequence[tuple[str, float]], count: int) -> tuple[int, ...]:
    """``count`` requests split by ``shares`` (largest remainder); the parts add up to ``count``."""
    exact = [share * count for _, share in shares]
    floors = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: floors[i] - exact[i])
    for i in by_remainder[: count - sum(floors)]:
        floors[i] += 1
    return tuple(floors)
