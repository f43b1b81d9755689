"""Prompt sources, and which prompts each trial sends.

A source is named in the study file as ``[FORMAT:]FILE[#CATEGORY,...]`` or ``bundled:NAME``, a
held-out segment that ships with specwise (json, copy, code, prose). The formats are those of
`prompt_files`; without a name the format is recognised by content.

Every arm of a cell gets the same prompts in the same order. Different cells get different prompts
as long as the source lasts, so that one trial does not warm the prefix cache for another.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specwise.domain import Api, LoadPoint, Segment, StudyDesign, Workload
from specwise.errors import PromptError
from specwise.facts.bundled import bundled_prompts
from specwise.measurement.arrivals import parse_trace
from specwise.measurement.prompt_files import FORMATS, Prompt, PromptSource, read_prompts

__all__ = [
    "ChosenPrompt",
    "Prompt",
    "PromptPlan",
    "PromptSource",
    "apportion",
    "check_inputs",
    "digest",
    "load_prompts",
    "load_source",
    "read_trace",
    "remarks",
]


@dataclass(frozen=True, slots=True)
class ChosenPrompt:
    """A prompt in its place in a trial."""

    index: int
    segment: Segment
    prompt: Prompt


def load_source(
    source: str,
    base: Path,
    *,
    template: str = "",
    bundled: Callable[[str], Path] = bundled_prompts,
) -> PromptSource:
    """What ``source`` holds, as `read_prompts` gives it; relative paths count from ``base``.

    ``template`` makes prompts of a row's columns. ``bundled`` gives the file of a bundled segment.
    Raises PromptError if the source is missing, unknown, malformed or empty.
    """
    prefix, colon, rest = source.partition(":")
    if prefix == "bundled" and colon:
        return read_prompts(bundled(rest), "jsonl", template=template)
    if colon and prefix in FORMATS:
        named: str | None = prefix
    elif colon and re.fullmatch(r"[a-z][a-z0-9_-]*", prefix):
        raise PromptError(
            f"Prompt source {source!r} names a format that is not known: {prefix}.",
            f"Formats are bundled, {', '.join(FORMATS)}; without one the content decides.",
        )
    else:
        named, rest = None, source
    file, _, chosen = rest.partition("#")
    categories = tuple(name.strip() for name in chosen.split(",") if name.strip())
    return read_prompts(base / file, named, categories=categories, template=template)


def load_prompts(
    source: str, base: Path, bundled: Callable[[str], Path] = bundled_prompts
) -> tuple[Prompt, ...]:
    """The prompts of ``source`` alone; see `load_source`."""
    return load_source(source, base, bundled=bundled).prompts


def check_inputs(design: StudyDesign, base: Path) -> None:
    """Read every file that ``design`` sends from: prompts, and traces of arrivals.

    Raises PromptError or InputError if one cannot be used as designed.
    """
    segments = [segment for segment in design.segments if not segment.same_prompts_as]
    sources = {s.name: load_source(s.prompts, base, template=s.template).prompts for s in segments}
    PromptPlan(sources, segments, seed=design.seed, warmup=design.warmup)
    for load in design.loads:
        if load.trace:
            read_trace(base, load.trace)


def read_trace(base: Path, name: str) -> tuple[float, ...]:
    """The times in the trace file ``name``, relative to ``base``; see `arrivals.parse_trace`.

    Raises PromptError if it cannot be read, InputError for what is no trace.
    """
    path = base / name
    try:
        return parse_trace(path.read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"Trace file {path} cannot be read: {error}.",
            "Correct load.trace: it counts from the study file's folder.",
        ) from error


def remarks(segment: Segment, source: PromptSource) -> tuple[str, ...]:
    """What a user should know before measuring ``segment`` with these prompts; sentences.

    Besides the source's own notes: where the source was sampled otherwise than the segment is. An
    acceptance measured at another temperature than production's is not production's (req: B3).
    """
    prompts = source.prompts
    found = list(source.notes)
    for name, value in (("temperature", segment.temperature), ("top_p", segment.top_p)):
        asked = Counter(x for p in prompts if (x := getattr(p, name)) is not None)
        if any(abs(each - value) > 1e-6 for each in asked):
            found.append(
                f"Measured at {name} {value:g}, but the source asks for {_tally(asked, prompts)}. "
                f"Acceptance depends on it: set the segment's {name} to production's."
            )
    over = [n for p in prompts if (n := p.max_tokens or 0) > segment.max_tokens]
    # The bundled prompts only say how long their answers can get; no production stands behind it.
    if over and not segment.prompts.startswith("bundled:"):
        found.append(
            f"{len(over)} of {len(prompts)} requests allowed longer answers (up to {max(over)} "
            f"tokens) than the segment's max_tokens, {segment.max_tokens}."
        )
    other = sum(p.api not in (None, segment.api) for p in prompts)
    if other and segment.api is Api.CHAT:
        why = (
            "a log holds prompts with the chat template applied, and chat applies it again"
            if source.format == "vllm-log"
            else "chat puts the model's template around them"
        )
        found.append(
            f"{other} of {len(prompts)} prompts are completions, sent as chat: {why}. "
            'Set the segment\'s api to "completions".'
        )
    elif other:
        found.append(
            f"{other} of {len(prompts)} prompts are chats, sent as plain text without the model's "
            'template. Set the segment\'s api to "chat".'
        )
    return tuple(found)


def _tally(values: Counter[float], prompts: Sequence[Prompt]) -> str:
    shown = [f"{value:g} ({n} of {len(prompts)})" for value, n in values.most_common(4)]
    return ", ".join(shown) + (", ..." if len(values) > 4 else "")


def digest(prompts: Iterable[Prompt]) -> str:
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
