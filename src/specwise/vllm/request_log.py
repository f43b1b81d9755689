"""Requests out of a vLLM server's log, as its request logger has written them over the versions.

Read off ``RequestLogger.log_inputs`` and its predecessors in ``AsyncLLMEngine.add_request``:

- up to 0.4: ``Received request ID: prompt: '...', sampling_params: SamplingParams(...), ...``
- up to 0.11.0: ``Received request ID: prompt: '...', params: SamplingParams(...), ...``
- since: ``Request ID details: prompt: '...', ...`` at level DEBUG, followed at level INFO by
  ``Received request ID: params: SamplingParams(...), ...``
- recent ones, at DEBUG, besides: ``Request ID JSON body: {...}``

A logged prompt is what the engine got: the chat template is in it. A JSON body is what the client
sent. Lines may carry any prefix and colours; structured logs hold them under "message".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

_RECEIVED = re.compile(r"Received request (\S+): (?=prompt: |params: |sampling_params: )")
_DETAILS = re.compile(r"Request (\S+) details: (?=prompt: )")
_BODY = re.compile(r"Request (\S+) JSON body: (\{.*)")
_PROMPT = re.compile(r"prompt: ('[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\")")
_PARAM = re.compile(r"\b(temperature|top_p|max_tokens)=([-+.\deE]+)")
_POOLING = "params: PoolingParams("
_MARKS = ("Received request ", " details: prompt: ", " JSON body: {")


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request: the ``prompt`` that the engine got or the ``body`` that the client sent.

    ``params`` holds temperature, top_p and max_tokens, as far as the log has them.
    """

    request_id: str
    prompt: str | None = None
    body: Mapping[str, Any] | None = None
    params: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RequestLog:
    """The requests of one log. ``lines`` opens it anew; it is read twice, a line at a time.

    After `requests` was exhausted, ``without_prompt`` counts the requests whose prompt the log does
    not hold and ``cut`` the JSON bodies that were cut short (``--max-log-len``).
    """

    lines: Callable[[], Iterable[str]]
    without_prompt: int = 0
    cut: int = 0

    def requests(self) -> Iterator[LoggedRequest]:
        """Each request once: from the JSON bodies if any is whole, else from the prompts."""
        self.without_prompt = self.cut = 0
        bodies = False
        for line in self._messages():
            found = _BODY.search(line)
            if found is None:
                continue
            body = _json_object(found[2])
            if body is None:
                self.cut += 1
                continue
            bodies = True
            yield LoggedRequest(found[1], body=body)
        if not bodies:
            yield from self._prompts()

    def _prompts(self) -> Iterator[LoggedRequest]:
        waiting: dict[str, str] = {}  # prompts whose parameters stand in a later line
        for line in self._messages():
            details = _DETAILS.search(line)
            if details is not None:
                prompt, _ = _prompt(line, details.end())
                if prompt is not None:
                    waiting[details[1]] = prompt
                continue
            received = _RECEIVED.search(line)
            if received is None:
                continue
            prompt, end = _prompt(line, received.end())
            prompt = waiting.pop(received[1], prompt)
            if _POOLING in line[end : end + 40]:
                continue  # an embedding or a score, not a generation
            if prompt is None:
                self.without_prompt += 1
            else:
                yield LoggedRequest(received[1], prompt=prompt, params=_params(line, end))
        for request_id, prompt in waiting.items():
            yield LoggedRequest(request_id, prompt=prompt)

    def _messages(self) -> Iterator[str]:
        """The lines that may tell of a request, without the envelope of a structured log."""
        for line in self.lines():
            if not any(mark in line for mark in _MARKS):
                continue
            record = _json_object(line) if line.startswith("{") else None
            message = record.get("message") if record is not None else None
            yield message if isinstance(message, str) else line.rstrip("\r\n")


def looks_like_request_log(lines: Iterable[str]) -> bool:
    """Whether one of the ``lines`` is one of the request logger's."""
    return any(
        _RECEIVED.search(line) or _DETAILS.search(line) or _BODY.search(line) for line in lines
    )


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        found = orjson.loads(text.rstrip())
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _prompt(line: str, start: int) -> tuple[str | None, int]:
    """The prompt printed with ``%r`` at ``start``, and where it ends; None where there is none."""
    found = _PROMPT.match(line, start)
    if found is None:
        return None, start
    try:
        value = ast.literal_eval(found[1])
    except (SyntaxError, ValueError):
        return None, found.end()
    return value, found.end()


def _params(line: str, start: int) -> dict[str, float]:
    at = line.find("SamplingParams(", start)
    if at < 0:
        return {}
    return {name: float(value) for name, value in _PARAM.findall(line, at)}
