"""Streamed answers of vLLM's OpenAI endpoints: the request body, and the SSE bytes as typed events.

Written against vLLM 0.32 (``entrypoints/openai/{chat_completion,completion}/serving.py``): one
chunk is one engine step; chat puts a role chunk without tokens before the first; with
``continuous_usage_stats`` every chunk carries the running token count; the last chunk before
``[DONE]`` has no choices, the final usage and, where the server was asked to,
``metrics.speculative_decoding`` (``v1/metrics/stats.py``, ``RequestSpecDecodeMetrics``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple, cast

import orjson

from specwise.domain import AcceptanceCounts, AcceptanceSource, Api

_PATHS = {Api.CHAT: "/v1/chat/completions", Api.COMPLETIONS: "/v1/completions"}
_MAX_EVENT_BYTES = 8 * 2**20
_MAX_LEARNT = 4


def endpoint(api: Api) -> str:
    """The path that requests of this API are posted to."""
    return _PATHS[api]


def request_body(
    api: Api,
    *,
    model: str,
    prompt: str | Sequence[Mapping[str, Any]],
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The JSON of one streaming request, usage and running token counts asked for.

    ``prompt`` is text or, for chat, a list of messages; text becomes one user message there.
    ``extra`` adds or replaces fields, but cannot switch streaming or its usage reports off.
    """
    body: dict[str, Any] = {"model": model}
    if api is Api.CHAT:
        body["messages"] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
    elif isinstance(prompt, str):
        body["prompt"] = prompt
    else:
        raise TypeError("the completions API takes a prompt of text, not a list of messages")
    body |= {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        body["seed"] = seed
    body |= dict(extra or {})
    body |= {
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return orjson.dumps(body)


class Delta(NamedTuple):
    """A chunk with a choice: what the model wrote in one step.

    ``text`` is content, reasoning and tool-call arguments alike, in the order of arrival.
    ``output_tokens`` and ``prompt_tokens`` are the server's counts so far, None where it gives
    none. ``opens`` marks chat's role chunk, which carries no token.
    """

    text: str
    finish_reason: str | None
    output_tokens: int | None
    prompt_tokens: int | None
    opens: bool


class Summary(NamedTuple):
    """The trailing chunk without choices: the final counts and the figures on speculation."""

    output_tokens: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    acceptance: AcceptanceCounts | None


class Fault(NamedTuple):
    """An error that the server put into the stream, or an event that cannot be understood."""

    message: str
    by_server: bool


class Done(NamedTuple):
    """``[DONE]``: the server has said everything."""


Event = Delta | Summary | Fault | Done


def parse_event(payload: bytes) -> Event:
    """One SSE event's data as a typed event; what cannot be understood becomes a Fault."""
    try:
        message = orjson.loads(payload)
    except orjson.JSONDecodeError:
        if payload.strip() == b"[DONE]":
            return Done()
        return Fault("an event of the stream is not JSON", by_server=False)
    try:
        choices = message.get("choices")
        if choices:
            choice = choices[0]
            delta = choice.get("delta")
            opens = False
            if delta is None:
                text = choice.get("text") or ""
            else:
                text = delta.get("content") or ""
                if len(delta) > 1 or not text:
                    text = _uncommon_text(delta) + text
                    opens = not text and bool(delta.get("role"))
            usage = message.get("usage")
            output_tokens = prompt_tokens = None
            if usage is not None:
                output_tokens = usage.get("completion_tokens")
                prompt_tokens = usage.get("prompt_tokens")
                if type(output_tokens) is not int or type(prompt_tokens) is not int:
                    output_tokens, prompt_tokens = _count(output_tokens), _count(prompt_tokens)
            if type(text) is not str:
                raise TypeError(text)
            return Delta(text, choice.get("finish_reason"), output_tokens, prompt_tokens, opens)
        if message.get("error") or message.get("object") == "error":
            return Fault(error_message(message), by_server=True)
        return _summary(message)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError):
        return Fault("an event of the stream has not the shape of a completion chunk", False)


def _uncommon_text(delta: dict[str, Any]) -> str:
    """Reasoning, under its new or its old name, and the arguments of tool calls."""
    text = delta.get("reasoning") or delta.get("reasoning_content") or ""
    for call in delta.get("tool_calls") or ():
        text += (call.get("function") or {}).get("arguments") or ""
    return text


def _summary(message: dict[str, Any]) -> Summary:
    usage = message.get("usage") or {}
    return Summary(
        _count(usage.get("completion_tokens")),
        _count(usage.get("prompt_tokens")),
        _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
        _acceptance(message.get("metrics")),
    )


def whole_answer(body: bytes) -> tuple[Summary, str | None] | None:
    """Counts and finish reason of an answer that was not streamed; None if it is none."""
    try:
        message = orjson.loads(body)
        return _summary(message), message["choices"][0].get("finish_reason")
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError, LookupError):
        return None


def error_message(message: Any) -> str:
    """The text of an error in OpenAI's or vLLM's form (already decoded JSON); "" if none is there.

    The text is the server's and may repeat parts of the request.
    """
    if not isinstance(message, dict):
        return ""
    error = message.get("error", message)
    if isinstance(error, str):
        return error
    if isinstance(error, dict):
        text = error.get("message") or error.get("detail")
        if isinstance(text, str) and text:
            return text
    detail = message.get("detail")
    return detail if isinstance(detail, str) else ""


@dataclass(frozen=True, slots=True)
class StreamedResponse:
    """A stream read to its end (or to where it broke).

    ``chunk_s`` are the arrival times of the chunks that carried output: role and usage chunks are
    not among them. ``chunk_tokens`` are the output tokens of each, None if the server gave no
    running counts. ``output_sha256`` is of the text's UTF-8. ``fault`` is the first error event or
    malformed event; ``done`` whether ``[DONE]`` came, ``incomplete`` whether the bytes stop inside
    an event.
    """

    chunk_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...] | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    acceptance: AcceptanceCounts | None
    text: str
    output_sha256: str | None
    fault: Fault | None
    done: bool
    incomplete: bool


class StreamReader:
    """Reads one answer's bytes, in whatever pieces they came, each with its arrival time.

    An event's time is that of the piece that completed it. The outcome does not depend on where
    the pieces were cut. ``speculative`` permits the estimate from tokens per chunk
    (``acceptance_from_chunks``) where the server gives no figures of its own.
    """

    def __init__(self, *, speculative: bool = False) -> None:
        self._speculative = speculative
        self._rest = b""
        self._skip_line_feed = False
        self._started = False
        self._chunk_s: list[float] = []
        self._tokens: list[int | None] = []
        self._running_tokens = 0
        self._texts: list[str] = []
        self._prompt_tokens: int | None = None
        self._output_tokens: int | None = None
        self._cached_tokens: int | None = None
        self._finish_reason: str | None = None
        self._acceptance: AcceptanceCounts | None = None
        self._fault: Fault | None = None
        self._done = False
        self._form: _ChunkForm | None = None
        self._learnt = 0

    def feed(self, at_s: float, data: bytes) -> None:
        """Take the bytes that arrived at ``at_s``."""
        self.feed_all((at_s,), (data,))

    def feed_all(self, times_s: Sequence[float], pieces: Sequence[bytes]) -> None:
        """Take several pieces: ``pieces[i]`` arrived at ``times_s[i]``."""
        i = 0
        while i < len(pieces):
            if self._rest or self._skip_line_feed:
                self._feed_any(times_s[i], pieces[i])
            else:
                if self._form is not None:
                    i += self._feed_alike(times_s, pieces, i)
                    if i == len(pieces):
                        return
                self._feed_whole(times_s[i], pieces[i])
            i += 1

    def _feed_alike(self, times_s: Sequence[float], pieces: Sequence[bytes], start: int) -> int:
        """Take the pieces from ``start`` on that are events of the known form; returns how many.

        What they differ in is cut out and read as one JSON list of texts and one of counts.
        Nothing is taken, and the form forgotten, if one of them proves not to be of that form.
        """
        form = self._form
        if form is None or self._done:
            return 0
        head, middle, between, end = form.head, form.middle, form.between, form.end
        head_bytes = len(head)
        texts, counts = [], []
        for data in islice(pieces, start, None):
            if data[:head_bytes] != head:
                break
            text, found, rest = data[head_bytes:].partition(middle)
            if not found:
                break
            texts.append(text)
            counts.append(rest)
        if not texts:
            return 0
        all_texts = b'["%b"]' % b'","'.join(texts)
        numbers = b"".join(counts).replace(end, b",").split(between)
        try:
            read_texts = orjson.loads(all_texts)
            read_counts = orjson.loads(b"[%b0]" % b",".join(numbers))
        except orjson.JSONDecodeError:
            read_texts = read_counts = []
        if (
            # A backslash before a quote of ours could make two texts one.
            b'\\","' in all_texts
            or len(read_texts) != len(texts)
            or len(numbers) != len(texts) + 1
            or set(map(type, read_texts)) != {str}
            or len(read_counts) != 2 * len(texts) + 1
            or set(map(type, read_counts)) != {int}
        ):
            self._form = None
            return 0
        self._take_alike(
            times_s[start : start + len(texts)], read_texts, read_counts[1::2], form.prompt_tokens
        )
        return len(texts)

    def _take_alike(
        self,
        times_s: Sequence[float],
        texts: list[str],
        output_tokens: list[int],
        prompt_tokens: int | None,
    ) -> None:
        """What ``_take`` does, for Deltas that have counts and no finish reason."""
        tokens = [now - before for before, now in pairwise((self._running_tokens, *output_tokens))]
        self._running_tokens = self._output_tokens = output_tokens[-1]
        self._prompt_tokens = prompt_tokens
        if not all(texts) and not all(tokens):
            carrying = [i for i, text in enumerate(texts) if text or tokens[i]]
            times_s = [times_s[i] for i in carrying]
            texts = [texts[i] for i in carrying]
            tokens = [tokens[i] for i in carrying]
        self._chunk_s.extend(times_s)
        self._tokens.extend(tokens)
        self._texts.extend(texts)

    def _feed_whole(self, at_s: float, data: bytes) -> None:
        """Take a piece before which no event is unfinished."""
        payload = data[6:-2]
        if not (
            data.startswith(b"data: ")
            and data.endswith(b"\n\n")
            and 10 not in payload
            and 13 not in payload
        ):
            self._feed_any(at_s, data)
            return
        # One whole event, as nearly every piece of vLLM's is: nothing to take apart.
        self._started = True
        event = Done() if payload == b"[DONE]" else parse_event(payload)
        self._take(at_s, event)
        if self._form is None and self._learnt < _MAX_LEARNT and type(event) is Delta:
            self._form = _form_of(data, event)
            self._learnt += self._form is not None

    def _feed_any(self, at_s: float, data: bytes) -> None:
        if self._skip_line_feed and data:
            self._skip_line_feed = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            # A line feed that follows in the next piece belongs to this carriage return.
            self._skip_line_feed = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        rest = self._rest + data
        if not self._started and rest:
            if len(rest) < 3 and b"\xef\xbb\xbf".startswith(rest):
                self._rest = rest
                return
            self._started = True
            rest = rest.removeprefix(b"\xef\xbb\xbf")
        *blocks, self._rest = rest.split(b"\n\n")
        for block in blocks:
            payload = _data_of(block)
            if payload:
                self._take(at_s, parse_event(payload))
        if len(self._rest) > _MAX_EVENT_BYTES:
            self._rest = b""
            self._take(at_s, Fault("an event of the stream exceeds 8 MiB", by_server=False))

    def finish(self, at_s: float) -> StreamedResponse:
        """What the stream said; ``at_s`` is when it ended."""
        incomplete = False
        if self._rest.strip():
            payload = _data_of(self._rest)
            # Some servers leave out the blank line after the last event.
            event = parse_event(payload) if payload else None
            if isinstance(event, Done | Summary):
                self._take(at_s, event)
            else:
                incomplete = payload is not None
        self._rest = b""
        text = "".join(self._texts)
        tokens = self._tokens_per_chunk()
        acceptance = self._acceptance
        if acceptance is None and self._speculative and tokens:
            acceptance = acceptance_from_chunks(tokens, finished=self._finish_reason is not None)
        return StreamedResponse(
            chunk_s=tuple(self._chunk_s),
            chunk_tokens=tokens,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            cached_tokens=self._cached_tokens,
            finish_reason=self._finish_reason,
            acceptance=acceptance,
            text=text,
            output_sha256=(
                hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                if self._chunk_s
                else None
            ),
            fault=self._fault,
            done=self._done,
            incomplete=incomplete,
        )

    def _take(self, at_s: float, event: Event) -> None:
        if self._done:
            return
        if type(event) is Delta:
            text, finish_reason, output_tokens, prompt_tokens, opens = event
            tokens = None
            if output_tokens is not None:
                tokens = output_tokens - self._running_tokens
                self._running_tokens = self._output_tokens = output_tokens
                self._prompt_tokens = prompt_tokens
            if finish_reason:
                self._finish_reason = finish_reason
            if text or (tokens if tokens is not None else not opens):
                self._chunk_s.append(at_s)
                self._tokens.append(tokens)
                self._texts.append(text)
        elif isinstance(event, Summary):
            if event.output_tokens is not None:
                self._output_tokens = event.output_tokens
                self._prompt_tokens = event.prompt_tokens
            if event.cached_tokens is not None:
                self._cached_tokens = event.cached_tokens
            if event.acceptance is not None:
                self._acceptance = event.acceptance
        elif isinstance(event, Fault):
            self._fault = self._fault or event
        else:
            self._done = True

    def _tokens_per_chunk(self) -> tuple[int, ...] | None:
        if not self._tokens or None in self._tokens:
            return None
        counts = cast("list[int]", self._tokens)
        return tuple(counts) if min(counts) >= 0 else None


class _ChunkForm(NamedTuple):
    """What the chunks of one answer have in common: all but their text and two token counts.

    A chunk is ``head`` text ``middle`` total tokens ``between`` output tokens ``end``.
    """

    head: bytes
    middle: bytes
    between: bytes
    end: bytes
    prompt_tokens: int | None


def _form_of(data: bytes, event: Delta) -> _ChunkForm | None:
    """The form of ``data``, an SSE event whose meaning is ``event``; None if it cannot serve.

    What stands in the three places cannot change the meaning of the rest, so long as it is the
    inside of a JSON string and two JSON integers. That these are the places which matter is
    tried out: with other values in them, the event must read as just these values.
    """
    if not event.text or event.output_tokens is None or event.finish_reason is not None:
        return None
    text = orjson.dumps(event.text)[1:-1]
    for name in (b'"content":"', b'"text":"'):
        head, found, rest = data.partition(name + text + b'"')
        if found:
            break
    else:
        return None
    middle, found, rest = rest.partition(b'"total_tokens":')
    _, comma, rest = rest.partition(b",")
    between, found_too, end = rest.partition(b'"completion_tokens":%d' % event.output_tokens)
    if not (found and comma and found_too):
        return None
    form = _ChunkForm(
        head + name,
        b'"' + middle + found,
        comma + between + b'"completion_tokens":',
        end,
        event.prompt_tokens,
    )
    trial = form.head + b"trial" + form.middle + b"7" + form.between + b"9" + form.end
    expected = Delta("trial", None, 9, event.prompt_tokens, opens=False)
    return form if parse_event(trial[6:-2]) == expected else None


def read_stream(data: bytes, *, at_s: float = 0.0, speculative: bool = False) -> StreamedResponse:
    """A whole stream that is at hand already."""
    reader = StreamReader(speculative=speculative)
    reader.feed(at_s, data)
    return reader.finish(at_s)


def acceptance_from_chunks(
    chunk_tokens: Sequence[int], *, finished: bool
) -> AcceptanceCounts | None:
    """Verify steps estimated from the tokens per chunk of a speculating server; None if none.

    A chunk of n tokens is a step that accepted n - 1 drafts. The first chunk comes from the prompt
    pass. The last chunk of a finished answer is left out too, since max_tokens, the end-of-text
    token or a stop string cut it short. That omission makes the estimate slightly low: a long step
    is likelier than a short one to be the one that reaches the end; the bias is of the order of
    one step in the number of steps. Steps in which no draft was proposed count as rejections, and
    a server that merges steps into one chunk (a slow reader, a stream that falls behind its engine,
    a stream interval above 1, a parser that withholds text) makes it high. The number of drafts
    proposed cannot be told.
    """
    steps = [n - 1 for n in chunk_tokens[1 : len(chunk_tokens) - bool(finished)] if n > 0]
    if not steps:
        return None
    histogram = [0] * (max(steps) + 1)
    for accepted in steps:
        histogram[accepted] += 1
    return AcceptanceCounts(AcceptanceSource.CHUNKS, tuple(histogram), None)


def _data_of(block: bytes) -> bytes | None:
    """The joined ``data`` lines of an SSE event; None if it has none (comments, other fields)."""
    lines = []
    for line in block.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _acceptance(metrics: Any) -> AcceptanceCounts | None:
    figures = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
    if figures is None:
        return None
    histogram = tuple(_count(n) or 0 for n in figures["acceptance_histogram"])
    return AcceptanceCounts(
        AcceptanceSource.PER_REQUEST, histogram, _count(figures.get("num_draft_tokens"))
    )
