"""What a request says about itself: sampling, segment and temperature bucket, never its text."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from specwise.errors import InputError

DEFAULT_TEMPERATURE = "default"
"""Bucket of a request that gives no temperature: the server's default applies."""
UNREAD = "unread"
"""Bucket of a request whose body is too large, compressed, or not JSON."""
OTHER = "other"
_MAX_SEGMENTS = 50
_MAX_SEGMENT_CHARACTERS = 64


def temperature_bucket(temperature: float | None) -> str:
    """The label of a temperature: "0", "0-0.5", "0.5-0.7", "0.7-1", "1+"; None is "default".

    A bucket holds its upper bound: 0.5 is in "0-0.5", and 1 in "0.7-1".
    """
    if temperature is None:
        return DEFAULT_TEMPERATURE
    if temperature <= 0:
        return "0"
    for upper, label in ((0.5, "0-0.5"), (0.7, "0.5-0.7"), (1.0, "0.7-1")):
        if temperature <= upper:
            return label
    return "1+"


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A completion request without its text; a field is None where the request does not give it.

    ``read`` is False where the body could not be read, which leaves every field None.
    """

    path: str
    read: bool = False
    model: str | None = None
    stream: bool = False
    temperature: float | None = None
    max_tokens: int | None = None
    response_format: str | None = None

    @property
    def bucket(self) -> str:
        """The request's temperature bucket."""
        return temperature_bucket(self.temperature) if self.read else UNREAD


def request_facts(path: str, body: bytes | None) -> RequestFacts:
    """The facts of a request to ``path``; ``body`` is None where it was not kept."""
    try:
        message = orjson.loads(body) if body else None
    except orjson.JSONDecodeError:
        message = None
    if not isinstance(message, dict):
        return RequestFacts(path)
    limit = message.get("max_completion_tokens")
    if limit is None:
        limit = message.get("max_tokens")
    shape = message.get("response_format")
    kind = shape.get("type") if isinstance(shape, dict) else None
    return RequestFacts(
        path,
        read=True,
        model=_text(message.get("model")),
        stream=message.get("stream") is True,
        temperature=_number(message.get("temperature")),
        max_tokens=limit if type(limit) is int else None,
        response_format=_text(kind),
    )


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None


class _Rule(BaseModel):
    """One [[rule]] of a rules file: every condition that it gives must hold."""

    model_config = ConfigDict(extra="forbid")

    segment: str
    model: str | None = None
    path: str | None = None
    temperature: tuple[float, float] | None = None
    max_tokens: tuple[int, int] | None = None
    response_format: str | None = None

    def matches(self, facts: RequestFacts) -> bool:
        """Whether ``facts`` meet every condition; ranges hold both ends."""
        equal = (
            (self.model, facts.model),
            (self.path, facts.path),
            (self.response_format, facts.response_format),
        )
        within = ((self.temperature, facts.temperature), (self.max_tokens, facts.max_tokens))
        return all(wanted is None or wanted == is_ for wanted, is_ in equal) and all(
            wanted is None or (is_ is not None and wanted[0] <= is_ <= wanted[1])
            for wanted, is_ in within
        )


class _Rules(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rule: tuple[_Rule, ...]


class Segments:
    """Names the segment of each request: by its header, else by the first rule that matches.

    At most 50 names ever appear, those seen first; the rest is "other". ``header`` is a header's
    name, in any case; without one, or where a request lacks it, the rules decide; what no rule
    matches is "default".
    """

    def __init__(self, *, header: str | None = None, rules: Path | None = None) -> None:
        self.header = header.lower().encode("latin-1") if header else None
        self._rules: Sequence[_Rule] = read_rules(rules) if rules is not None else ()
        # A rule's segment has its place even before its first request.
        self._known = dict.fromkeys(_label(rule.segment) for rule in self._rules)
        if len(self._known) > _MAX_SEGMENTS:
            raise InputError(
                f"{rules} names {len(self._known)} segments; {_MAX_SEGMENTS} are the most.",
                "Merge some: each segment is a set of Prometheus series.",
            )

    def name(self, facts: RequestFacts, header_value: bytes | None) -> str:
        """The segment of a request; ``header_value`` is that of the segment header, if sent."""
        wanted = _label((header_value or b"").decode("utf-8", "replace"))
        if not wanted:
            wanted = next((_label(r.segment) for r in self._rules if r.matches(facts)), "default")
        if wanted not in self._known:
            if len(self._known) >= _MAX_SEGMENTS:
                return OTHER
            self._known[wanted] = None
        return wanted


def read_rules(path: Path) -> tuple[_Rule, ...]:
    """The rules of a TOML file, in its order; InputError if it is none."""
    try:
        content: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return _Rules.model_validate(content).rule
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "Give a rules file."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}.", "Correct it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {place}: {first['msg']}.",
            "A rule has a segment and any of model, path, temperature, max_tokens (ranges as "
            "[low, high]) and response_format.",
        ) from error


def _label(text: str) -> str:
    """A segment's name as a label: printable, one line, short."""
    shown = "".join(c for c in text.strip() if c.isprintable())
    return shown[:_MAX_SEGMENT_CHARACTERS]
