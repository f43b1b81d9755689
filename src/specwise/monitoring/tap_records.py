"""Tap's records: one line a request, without text, in a folder that rotates.

    FOLDER/
      manifest.json             schema version, provenance; written by the newest tap
      records-<time>-<pid>.jsonl    one TapRecord a line; a new file every 64 MiB, the oldest go

A line reaches the operating system when its request ends. Several taps may write into one folder:
each has files of its own. A line torn by a crash is skipped on reading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from pydantic import TypeAdapter, ValidationError

from specwise import __version__
from specwise.domain import AcceptanceCounts, Outcome, RequestRecord
from specwise.errors import StoreError

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class TapRecord:
    """One completion request as it passed through tap.

    ``at`` is when its head arrived, Unix seconds; durations count from there. ``ttft_s`` is None
    for an answer that was not streamed, ``tpot_s`` also where the server gave no usage.
    ``temperature`` is None where the request gave none; ``bucket`` is the label of the metrics.
    Token counts are the server's usage.
    """

    at: float
    segment: str
    bucket: str
    path: str
    stream: bool
    outcome: Outcome
    e2e_s: float
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    response_format: str | None = None
    status: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    last_token_s: float | None = None
    chunks: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    acceptance: AcceptanceCounts | None = None

    @property
    def rate(self) -> float | None:
        """Accepted / drafted tokens of this request; None where the server did not say."""
        counts = self.acceptance
        if counts is None or not counts.drafted_tokens:
            return None
        return counts.accepted_tokens / counts.drafted_tokens

    def request_record(self, index: int, start: float) -> RequestRecord:
        """The same as analysis reads it, times from ``start`` (Unix seconds).

        Tap keeps the first and the last chunk's time of a stream only, so there are no gaps.
        A request without a temperature counts as OpenAI's default of 1.
        """
        sent_s = self.at - start
        chunk_s = [sent_s + s for s in (self.ttft_s, self.last_token_s) if s is not None]
        return RequestRecord(
            index=index,
            prompt_id="",
            segment=self.segment,
            temperature=1.0 if self.temperature is None else self.temperature,
            part=0,
            intended_s=sent_s,
            sent_s=sent_s,
            chunk_s=tuple(chunk_s),
            chunk_tokens=None,
            finished_s=sent_s + self.e2e_s,
            outcome=self.outcome,
            status=self.status,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            finish_reason=self.finish_reason,
            acceptance=self.acceptance,
        )


_RECORD = TypeAdapter(TapRecord)


class RecordWriter:
    """Appends records to a folder; raises StoreError only when it is opened.

    A disk that fills up later must not stop the traffic: such records are counted in ``lost`` and
    tap goes on. At most ``keep_bytes`` stay in the folder, the oldest files go first.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Mapping[str, Any],
        *,
        rotate_bytes: int = 64 * 2**20,
        keep_bytes: int = 4 * 2**30,
    ) -> None:
        self._folder = folder
        self._rotate_bytes = rotate_bytes
        self._keep_bytes = keep_bytes
        self._file: BinaryIO | None = None
        self._written_bytes = 0
        self._number = 0
        self.lost = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"manifest.{os.getpid()}.new"
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "kind": "tap",
                "provenance": {"specwise": __version__, **provenance},
            }
            temporary.write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            temporary.replace(folder / "manifest.json")
            self._file = self._open()
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written: {error.strerror}.", "Choose another --records folder."
            ) from error

    def write(self, record: TapRecord) -> None:
        """Append one record."""
        line = orjson.dumps(record) + b"\n"
        try:
            if self._file is None or self._written_bytes + len(line) > self._rotate_bytes:
                self._file = self._open()
            if self._file.write(line) != len(line):
                self.close()  # a torn line: the next record starts a file of its own
                self.lost += 1
            self._written_bytes += len(line)
        except OSError:
            self.lost += 1

    def close(self) -> None:
        """Close the file; what was written is with the operating system already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self.close()
        self._number += 1
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        name = f"records-{stamp}-{os.getpid()}-{self._number:04d}.jsonl"
        file = (self._folder / name).open("ab", buffering=0)
        self._written_bytes = 0
        files = sorted(self._folder.glob("records-*.jsonl"))
        total_bytes = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if total_bytes <= self._keep_bytes:
                break
            total_bytes -= path.stat().st_size
            with suppress(FileNotFoundError):  # another tap was faster
                path.unlink()
        return file


def read_records(folder: Path, *, since: float | None = None) -> tuple[TapRecord, ...]:
    """The records in ``folder``, oldest first, from ``since`` (Unix seconds) on if given.

    Raises StoreError if it is no folder of tap's records, of another schema, or holds none.
    """
    try:
        manifest = orjson.loads((folder / "manifest.json").read_bytes())
        kind, version = manifest.get("kind"), manifest.get("schema_version")
    except (OSError, orjson.JSONDecodeError, AttributeError):
        kind = version = None
    if kind != "tap":
        raise StoreError(
            f"{folder} is not a folder of tap's records.",
            "Give the folder that `specwise tap --records FOLDER` writes.",
        )
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{folder} has schema {version}; this specwise reads {SCHEMA_VERSION}.",
            "Use the specwise that wrote it.",
        )
    found = [r for r in _lines(folder) if since is None or r.at >= since]
    if not found:
        raise StoreError(f"{folder} holds no records yet.", "Send requests through the tap.")
    return tuple(sorted(found, key=lambda record: record.at))


def _lines(folder: Path) -> Iterator[TapRecord]:
    for path in sorted(folder.glob("records-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line:
                continue
            try:
                yield _RECORD.validate_json(line)
            except ValidationError as error:
                if not line.endswith(b"}"):
                    continue  # torn by a crash
                raise StoreError(
                    f"{path} line {number} is not a record: {error.errors()[0]['msg']}.",
                    "Remove that line to go on without the request.",
                ) from error
