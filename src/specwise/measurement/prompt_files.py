"""Prompt files of the formats that people have, read one record at a time.

==============  ===================================================================================
jsonl           a JSON object a line (or a JSON list of them) with ``prompt`` or ``messages``
sharegpt        ShareGPT's conversations, ``{"conversations": [{"from": "human", "value": ...}]}``
spec-bench      Spec-Bench's and MT-Bench's questions: ``question_id``, ``category``, ``turns``
speed-bench     SPEED-Bench, from the hub (``turns``) or prepared (``messages``, one a turn)
articles        rows with an ``article`` column (CNN/DailyMail), or with those of a template
openai-batch    an OpenAI batch input: ``custom_id``, ``method``, ``url``, ``body``
vllm-log        what vLLM's request logger wrote (`specwise.vllm.request_log`)
text            one prompt a line, or a folder with one prompt a ``.txt`` file
==============  ===================================================================================

Rows come as JSON lines, a JSON list, CSV or Parquet. Where no format is named it is recognised by
content. At most `MAX_PROMPTS` prompts are kept, drawn evenly over the file, the same each time.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from specwise.domain import Api
from specwise.errors import PromptError
from specwise.vllm.request_log import LoggedRequest, RequestLog, looks_like_request_log

MAX_PROMPTS = 20_000
ARTICLE_TEMPLATE = "Summarize the following article.\n\n{article}"
MESSAGE_ROLES = ("system", "user", "assistant", "tool", "developer")
FORMATS = (
    "jsonl",
    "sharegpt",
    "spec-bench",
    "speed-bench",
    "articles",
    "openai-batch",
    "vllm-log",
    "text",
)

_PIECE_CHARS = 1 << 20
_LARGEST_ELEMENT_CHARS = 1 << 26
_SNIFFED_LINES = 20_000  # a server at DEBUG prints much before its first request
# What SPEED-Bench on the hub has in place of texts that its licence keeps elsewhere.
_SPEED_BENCH_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
# Of a request's body: sent, or without effect on what is generated.
_KNOWN_BODY_KEYS = {"model", "messages", "prompt", "stream", "stream_options", "user", "metadata"}
_SAMPLING_KEYS = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "seed"}

Row = Mapping[str, Any]
_Rows = Iterable[tuple[str, Row]]  # where the row stands, and the row


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: ``text``, or chat ``messages`` as (role, content) pairs; never both.

    ``max_tokens``, ``temperature``, ``top_p`` and ``api`` are what the source says it was sent
    with; of these only ``max_tokens`` is used, the others are compared with the segment's.
    ``not_sent`` names what else the source asked for. Only what is sent enters ``repr``.
    """

    prompt_id: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    max_tokens: int | None = None
    temperature: float | None = field(default=None, repr=False)
    top_p: float | None = field(default=None, repr=False)
    api: Api | None = field(default=None, repr=False)
    not_sent: tuple[str, ...] = field(default=(), repr=False)

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
class PromptSource:
    """What a source held: its ``prompts``, its ``format``, and what a user should know of them."""

    prompts: tuple[Prompt, ...]
    format: str
    notes: tuple[str, ...] = ()


def read_prompts(
    path: Path, named: str | None = None, *, categories: tuple[str, ...] = (), template: str = ""
) -> PromptSource:
    """The prompts of the file (or folder of texts) at ``path``.

    ``named`` is one of `FORMATS`, None to recognise the format. ``categories`` keeps rows whose
    ``category`` is one of them. ``template`` makes a prompt of a row's columns, ``{column}`` each.

    Raises PromptError that says where and what was expected: a file that is missing, of no or of
    two formats, or malformed; a category that is not in it; nothing usable.
    """
    if not path.exists():
        raise PromptError(
            f"Prompt file {path} does not exist.",
            "Paths in a study file count from the study file's folder.",
        )
    chosen = named or _recognise(path, template)
    if template and chosen != "articles":
        raise PromptError(
            f"{path} is read as {chosen}, which has no columns for a template.",
            f"Drop the template, or write articles:{path.name} to make prompts of columns.",
        )
    reading = _Reading(path, chosen, categories, template)
    try:
        prompts = _drawn(reading.prompts(), reading)
    except OSError as error:
        raise PromptError(f"Prompt file {path} cannot be read: {error.strerror}.") from error
    if not prompts:
        raise PromptError(
            f"{path}, read as {chosen}, holds no usable prompt.{reading.why_empty()}",
            "An empty segment measures nothing.",
        )
    return PromptSource(prompts, chosen, reading.notes(prompts))


def _drawn(prompts: Iterable[Prompt], reading: _Reading) -> tuple[Prompt, ...]:
    """All prompts, or `MAX_PROMPTS` of them with equal chances (reservoir sampling)."""
    kept: list[Prompt] = []
    rng = np.random.default_rng(0)
    for reading.count, prompt in enumerate(prompts, start=1):
        if reading.count <= MAX_PROMPTS:
            kept.append(prompt)
        elif (place := int(rng.integers(reading.count))) < MAX_PROMPTS:
            kept[place] = prompt
    return tuple(kept)


# --- recognising ---------------------------------------------------------------------------------


def _recognise(path: Path, template: str) -> str:
    """The format of ``path`` by its content; PromptError if it is none or could be two."""
    if path.is_dir():
        return "text"
    container = _container(path)
    if container is None:
        log = looks_like_request_log(islice(_lines(path), _SNIFFED_LINES))
        found = ["vllm-log"] if log else []
        first = next((line.strip() for line in _lines(path) if line.strip()), "")
        seen = f"It starts with {_shown(first)}." if first else ""
    else:
        row = next(iter(_rows(path, container)), None)
        keys = set(row[1]) if row is not None else set()
        found = ["articles"] if template else _formats_of(keys)
        seen = f"Its first record has the keys {_listed(sorted(keys))}." if row is not None else ""
    if not seen:
        raise PromptError(f"{path} is empty.", "An empty segment measures nothing.")
    if path.suffix.lower() == ".txt":
        found.append("text")
    if len(found) == 1:
        return found[0]
    if found:
        raise PromptError(
            f"{path} could be {' or '.join(found)}. {seen}",
            "Say which: " + " or ".join(f'prompts = "{name}:{path.name}"' for name in found) + ".",
        )
    raise PromptError(
        f"{path} is in no prompt format that specwise knows. {seen}",
        "Accepted are objects with prompt, messages, conversations, turns, article, or custom_id "
        "and body; CSV and Parquet with such columns; vLLM request logs. Name a format to insist "
        f'(prompts = "text:{path.name}"): docs/reference/study-file.md lists them. Any other '
        "columns: set the segment's template.",
    )


def _formats_of(keys: set[str]) -> list[str]:
    """The formats whose marks are among the keys of a record."""
    found = []
    if "turns" in keys:
        found.append("speed-bench" if {"src_id", "sub_category"} & keys else "spec-bench")
    elif {"question_id", "messages"} <= keys:
        found.append("speed-bench")
    elif {"prompt", "messages"} & keys:
        found.append("jsonl")
    if {"conversations", "conversation"} & keys:
        found.append("sharegpt")
    if {"custom_id", "body"} <= keys:
        found.append("openai-batch")
    if "article" in keys:
        found.append("articles")
    if {"levelname", "message"} <= keys:
        found.append("vllm-log")
    return found


def _container(path: Path) -> str | None:
    """How the rows of ``path`` are stored; None where it holds no rows."""
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptError(f"Prompt file {path} cannot be read: {error.strerror}.") from error
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise PromptError(f"{path} is compressed.", "Unpack it first.")
    start = head.lstrip()
    if start.startswith(b"{"):
        return "jsonl"
    if re.match(rb"\[\s*[{\]]", start):
        return "json"
    return {".csv": "csv", ".jsonl": "jsonl"}.get(path.suffix.lower())


# --- rows ----------------------------------------------------------------------------------------


def _rows(path: Path, container: str | None = None) -> _Rows:
    """Every row of ``path`` with its place, in whichever way it is stored."""
    container = container or _container(path)
    match container:
        case "parquet":
            return _parquet_rows(path)
        case "csv":
            return _csv_rows(path)
        case "json":
            return _array_rows(path)
        case _:
            return _json_lines(path)


def _lines(path: Path) -> Iterator[str]:
    """Lines ended by a newline only: JSON text may hold the other separators of str.splitlines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason}.") from error


def _json_lines(path: Path) -> _Rows:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            item = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise PromptError(f"{where} is not JSON: {error.msg}.", "One object a line.") from error
        yield where, _object(item, where)


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise PromptError(f"{where} is not a JSON object.", 'Write {"prompt": "..."}.')
    return item


def _array_rows(path: Path) -> _Rows:
    """The elements of a JSON list, decoded one by one from a window over the file."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        window = _next_piece(file, path).lstrip()[1:]
        for number in count(1):
            item, end = None, 0
            while not end:
                window = window.lstrip(" \t\r\n,")
                if window.startswith("]"):
                    return
                try:
                    item, end = decoder.raw_decode(window)
                except json.JSONDecodeError as error:
                    piece = _next_piece(file, path)
                    if not piece or len(window) > _LARGEST_ELEMENT_CHARS:
                        raise PromptError(
                            f"{path} element {number} is not JSON: {error.msg}."
                        ) from error
                    window += piece
            yield f"{path} element {number}", _object(item, f"{path} element {number}")
            window = window[end:]


def _next_piece(file: IO[str], path: Path) -> str:
    try:
        return file.read(_PIECE_CHARS)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error.reason}.") from error


def _csv_rows(path: Path) -> _Rows:
    csv.field_size_limit(_LARGEST_ELEMENT_CHARS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise PromptError(f"{where} has not as many fields as the header.")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise PromptError(f"{path} line {reader.line_num} is not CSV: {error}.") from error


def _parquet_rows(path: Path) -> _Rows:
    try:
        import pyarrow as pa  # noqa: PLC0415 (optional)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise PromptError(
            f"{path} is a Parquet file and pyarrow is not installed.",
            "Install it with `pip install 'specwise[parquet]'`, or convert the file to JSON lines.",
        ) from None
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pa.ArrowException as error:
        raise PromptError(f"{path} is a damaged Parquet file: {error}.") from error


# --- formats -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reading:
    """One pass over one source, and what is worth saying about it."""

    path: Path
    format: str
    categories: tuple[str, ...]
    template: str
    count: int = 0
    seen_categories: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    more_turns: int = 0

    def prompts(self) -> Iterator[Prompt]:
        """Every usable prompt of the source, in order."""
        if self.format in ("text", "vllm-log"):
            if self.categories:
                raise PromptError(
                    f"{self.path}, read as {self.format}, has no categories to choose from."
                )
            return self._texts() if self.format == "text" else self._logged()
        if self.path.is_dir():
            raise PromptError(f"{self.path} is a folder.", "Give a file; only text: takes folders.")
        return self._from_rows(
            {
                "jsonl": _plain,
                "sharegpt": self._conversation,
                "spec-bench": self._question,
                "speed-bench": self._question,
                "articles": self._article,
                "openai-batch": _batch_request,
            }[self.format]
        )

    def _from_rows(self, read: Callable[[Row, str, str], Prompt | None]) -> Iterator[Prompt]:
        for number, (where, row) in enumerate(_rows(self.path), start=1):
            if self.categories and not self._wanted(row, where):
                continue
            prompt = read(row, where, f"{self.path.stem}-{number}")
            if prompt is not None:
                yield prompt
        unknown = [c for c in self.categories if c not in self.seen_categories]
        if unknown:
            raise PromptError(
                f"{self.path} has no category {_listed(unknown)}.",
                f"It has {_listed(sorted(self.seen_categories))}.",
            )

    def _wanted(self, row: Row, where: str) -> bool:
        category = row.get("category")
        if not isinstance(category, str):
            raise PromptError(
                f"{where} has no category; it has {_listed(sorted(row))}.",
                f"Drop #{','.join(self.categories)} from the source.",
            )
        self.seen_categories[category] += 1
        return category in self.categories

    def _conversation(self, row: Row, where: str, default_id: str) -> Prompt | None:
        """The first human turn: what follows it was another model's answer."""
        turns = row.get("conversations") or row.get("conversation") or []
        if not isinstance(turns, list):
            raise PromptError(f"{where} has no list of turns.")
        human = [t for t in turns if isinstance(t, dict) and t.get("from") in ("human", "user")]
        text = human[0].get("value") if human else None
        if not isinstance(text, str) or not text.strip():
            self.skipped["conversations without a human turn"] += 1
            return None
        self.more_turns += len(human) > 1
        return Prompt(_id(row, "id", default_id), text=text)

    def _question(self, row: Row, where: str, default_id: str) -> Prompt | None:
        """The first turn of a Spec-Bench or SPEED-Bench question."""
        turns = row.get("turns")
        if turns is None and isinstance(row.get("messages"), list):
            turns = [m.get("content") for m in row["messages"] if isinstance(m, dict)]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise PromptError(
                f"{where} has no list of turns; it has {_listed(sorted(row))}.",
                'A question is {"question_id": 81, "category": "writing", "turns": ["..."]}.',
            )
        if turns[0].startswith(_SPEED_BENCH_PLACEHOLDER):
            raise PromptError(
                f"{where} holds a placeholder: SPEED-Bench on the hub leaves out texts of others.",
                "Fill them in with the prepare script that its dataset card names, and give the "
                "JSONL file that the script writes.",
            )
        self.more_turns += len(turns) > 1
        return Prompt(_id(row, "question_id", default_id), text=turns[0])

    def _article(self, row: Row, where: str, default_id: str) -> Prompt | None:
        template = self.template or ARTICLE_TEMPLATE
        columns = re.findall(r"\{(\w+)\}", template)
        if not columns:
            raise PromptError(
                f"Template {_shown(template)} names no column.", "For example {article}."
            )
        missing = [name for name in columns if not isinstance(row.get(name), str | int | float)]
        if missing:
            raise PromptError(
                f"{where} has no text in {_listed(missing)}; it has {_listed(sorted(row))}.",
                "Name the columns to use in the segment's template.",
            )
        if not all(str(row[name]).strip() for name in columns):
            self.skipped["rows with an empty column"] += 1
            return None
        text = re.sub(r"\{(\w+)\}", lambda found: str(row[found[1]]), template)
        return Prompt(_id(row, "id", default_id), text=text)

    def _texts(self) -> Iterator[Prompt]:
        if not self.path.is_dir():
            for number, line in enumerate(_lines(self.path), start=1):
                if line.strip():
                    yield Prompt(f"{self.path.stem}-{number}", text=line.strip("\r\n"))
            return
        for file in sorted(self.path.glob("*.txt")):
            try:
                text = file.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise PromptError(f"{file} is not UTF-8 text: {error.reason}.") from error
            if text:
                yield Prompt(file.stem, text=text)

    def _logged(self) -> Iterator[Prompt]:
        log = RequestLog(lambda: _lines(self.path))
        for number, request in enumerate(log.requests(), start=1):
            try:
                prompt = _logged_prompt(request, f"{self.path} request {number}", number)
            except PromptError:  # production's log has what it has: leave it out, and say so
                self.skipped["requests that are not text (images, tool calls, embeddings)"] += 1
                continue
            yield prompt
        self.skipped["requests without their prompt"] = log.without_prompt
        self.skipped["requests cut by --max-log-len"] = log.cut

    def why_empty(self) -> str:
        """What was there instead of prompts, as the end of a sentence."""
        if self.format == "vllm-log" and self.skipped["requests without their prompt"]:
            return (
                f" It names {self.skipped['requests without their prompt']} requests without their "
                "text: vLLM after 0.11.0 logs prompts with --enable-log-requests and "
                "VLLM_LOGGING_LEVEL=DEBUG only."
            )
        if self.format == "text" and self.path.is_dir():
            return " A folder's prompts are its .txt files."
        left_out = [f"{n} {what}" for what, n in self.skipped.items() if n]
        return f" Left out: {', '.join(left_out)}." if left_out else ""

    def notes(self, prompts: tuple[Prompt, ...]) -> tuple[str, ...]:
        """What a user should know about what was read; sentences."""
        notes = [f"{n} {what} were left out." for what, n in self.skipped.items() if n]
        if self.count > len(prompts):
            notes.append(
                f"{len(prompts):,} of {self.count:,} prompts are used, drawn evenly over the file."
            )
        if self.more_turns:
            notes.append(
                f"{self.more_turns} prompts have further turns, which are not sent: they would "
                "need the answers in between."
            )
        asked = Counter(name for prompt in prompts for name in prompt.not_sent)
        if asked:
            notes.append(
                "Not sent, although the source asks for it: "
                + ", ".join(f"{name} ({n} of {len(prompts)})" for name, n in asked.most_common())
                + "."
            )
        lengths = Counter(len(text) for text in {p.text for p in prompts if p.text is not None})
        if self.format == "vllm-log" and lengths and lengths[longest := max(lengths)] > 1:
            notes.append(
                f"{lengths[longest]} prompts have {longest} characters exactly, the most of all: "
                "--max-log-len probably cut them."
            )
        return tuple(notes)


def _plain(row: Row, where: str, default_id: str) -> Prompt:
    """A row of specwise's own format: prompt or messages, id, max_tokens."""
    text, messages = row.get("prompt"), row.get("messages")
    if not ((isinstance(text, str) and not messages) or (text is None and messages)):
        raise PromptError(
            f"{where} needs either a text 'prompt' or a list of 'messages'; it has "
            f"{_listed(sorted(row))}.",
            'Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.',
        )
    return Prompt(
        _id(row, "id", default_id),
        text=text,
        messages=_messages(messages, where) if messages else (),
        max_tokens=_limit(row.get("max_tokens"), where),
        temperature=_share(row.get("temperature")),
        top_p=_share(row.get("top_p")),
    )


def _batch_request(row: Row, where: str, default_id: str) -> Prompt:
    body, url = row.get("body"), row.get("url", "/v1/chat/completions")
    if not isinstance(body, dict):
        raise PromptError(
            f"{where} has no body; it has {_listed(sorted(row))}.",
            'A batch line is {"custom_id": "...", "method": "POST", '
            '"url": "/v1/chat/completions", "body": {...}}.',
        )
    if not str(url).endswith(("/chat/completions", "/completions")):
        raise PromptError(
            f"{where} is a request to {url}.",
            "Only /v1/chat/completions and /v1/completions can be measured.",
        )
    return _body_prompt(body, where, _id(row, "custom_id", default_id))


def _logged_prompt(request: LoggedRequest, where: str, number: int) -> Prompt:
    if request.body is not None:
        named = request.request_id != "N/A"
        return _body_prompt(request.body, where, request.request_id if named else f"log-{number}")
    limit = request.params.get("max_tokens")
    return Prompt(
        request.request_id,
        text=request.prompt,
        max_tokens=int(limit) if limit else None,
        temperature=request.params.get("temperature"),
        top_p=request.params.get("top_p"),
        api=Api.COMPLETIONS,
    )


def _body_prompt(body: Row, where: str, prompt_id: str) -> Prompt:
    """The prompt of an OpenAI request's body, chat or completion."""
    text, messages = body.get("prompt"), body.get("messages")
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str) and not messages:
        raise PromptError(
            f"{where} has neither messages nor one text as prompt; its body has "
            f"{_listed(sorted(body))}.",
            "Lists of prompts and token ids are not measured: write one text a request.",
        )
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return Prompt(
        prompt_id,
        text=None if messages else text,
        messages=_messages(messages, where) if messages else (),
        max_tokens=_limit(limit, where),
        temperature=_share(body.get("temperature")),
        top_p=_share(body.get("top_p")),
        api=Api.CHAT if messages else Api.COMPLETIONS,
        not_sent=tuple(
            key
            for key, value in body.items()
            if key not in _KNOWN_BODY_KEYS | _SAMPLING_KEYS and value not in (None, [], {}, "")
        ),
    )


def _messages(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list):
        raise PromptError(f"{where}: messages is not a list.")
    return tuple(_message(message, where) for message in messages)


def _message(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, dict) and message.get("role") in MESSAGE_ROLES:
        content = message.get("content")
        if isinstance(content, list):  # parts; only those of text can be measured
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            if texts and all(isinstance(text, str) for text in texts):
                content = "".join(str(text) for text in texts)
        if isinstance(content, str):
            return message["role"], content
    raise PromptError(
        f"{where} has a message without a known role and text content.",
        f"Roles are {', '.join(MESSAGE_ROLES)}; content is text.",
    )


def _limit(value: Any, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise PromptError(f"{where}: max_tokens must be a positive whole number.")
    return value


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _id(row: Row, key: str, default: str) -> str:
    value = row.get(key)
    return default if value is None or value == "" else str(value)


def _listed(names: Iterable[object]) -> str:
    """Names for an error message, the first twenty of them."""
    held = [str(name) for name in names]
    return ", ".join(held[:20]) + (", ..." if len(held) > 20 else "")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
