"""The study folder: what was designed, where it ran, and one raw record for each request.

    STUDY/
      manifest.json               schema version, design, provenance; replaced atomically
      study.toml                  the user's file, as it was
      trials/<trial_id>/
        requests.jsonl            one RequestRecord a line, written as each request ends
        parts.jsonl               one TrialPart a line, written as each uninterrupted stretch ends
        complete                  an empty file: the trial needs nothing more
        skipped                   instead: why the study decided not to run the trial
      logs/<arm>.log              output of servers that specwise started
      picks.jsonl                 a tuning only: one PickRecord a line, why each trial was chosen

A record reaches the operating system as soon as its request ends, so killing specwise loses the
requests in flight and nothing else. A torn last line (power loss, full disk) is skipped on reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from specwise.domain import (
    MeasuredTrial,
    Outcome,
    PickRecord,
    RequestRecord,
    StudyData,
    StudyDesign,
    Trial,
    TrialPart,
    TuneSettings,
)
from specwise.errors import StoreError

SCHEMA_VERSION = 1

_Line = TypeVar("_Line")

_RECORD = TypeAdapter(RequestRecord)
_PART = TypeAdapter(TrialPart)
_PICK = TypeAdapter(PickRecord)
_DESIGN = TypeAdapter(StudyDesign)


class StudyFolder:
    """A study folder open for measuring; one process at a time (see `locked`)."""

    def __init__(self, path: Path, design: StudyDesign, provenance: Mapping[str, Any]) -> None:
        self.path = path
        self.design = design
        self.provenance = dict(provenance)

    @classmethod
    def create(
        cls, path: Path, design: StudyDesign, provenance: Mapping[str, Any], study_toml: str
    ) -> StudyFolder:
        """A new folder at ``path``; StoreError if it holds anything or cannot be written."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(
                f"{path} exists and is not an unfinished study.",
                "Choose another folder with --out, or remove it.",
            )
        folder = cls(path, design, provenance)
        with _disk_errors(path):
            (path / "trials").mkdir(parents=True, exist_ok=True)
            (path / "logs").mkdir(exist_ok=True)
            (path / "study.toml").write_text(study_toml, encoding="utf-8")
            folder._write_manifest()
        return folder

    @classmethod
    def open(cls, path: Path) -> StudyFolder:
        """The folder at ``path``; StoreError if it is missing, damaged or of another schema."""
        manifest_path = path / "manifest.json"
        try:
            raw = manifest_path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{path} is not a study folder: it has no manifest.json.",
                "Give the folder that `specwise measure` printed, or measure a study file first.",
            ) from None
        except OSError as error:
            raise StoreError(f"{manifest_path} cannot be read: {error.strerror}.") from error
        try:
            manifest = orjson.loads(raw)
            version = manifest["schema_version"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise StoreError(
                f"{manifest_path} is damaged: {error}.",
                "The raw records in trials/ are intact; restore the manifest from a copy.",
            ) from error
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"{path} was written with study schema {version}; "
                f"this specwise reads {SCHEMA_VERSION}.",
                f"Use the specwise that wrote it ({manifest.get('provenance', {}).get('specwise')})"
                ", or measure again into a new folder.",
            )
        try:
            design = _DESIGN.validate_python(manifest["design"])
        except (KeyError, ValidationError) as error:
            raise StoreError(
                f"{manifest_path} is damaged: the design cannot be read ({error}).",
                "The raw records in trials/ are intact; restore the manifest from a copy.",
            ) from error
        return cls(path, design, manifest.get("provenance", {}))

    def add_provenance(self, values: Mapping[str, Any]) -> None:
        """Merge ``values`` into the manifest's provenance and replace the file atomically."""
        self.provenance.update(values)
        with _disk_errors(self.path):
            self._write_manifest()

    def _write_manifest(self) -> None:
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "provenance": self.provenance,
            "design": self.design,
        }
        temporary = self.path / "manifest.json.new"
        with temporary.open("wb") as file:
            file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "manifest.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; StoreError if another one is measuring into it."""
        with _disk_errors(self.path), (self.path / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"Another specwise is measuring into {self.path}.",
                    "Wait for it, or stop it; the study resumes where it stopped.",
                ) from None
            yield

    def log_path(self, arm: str) -> Path:
        """Where the server of ``arm`` logs."""
        return self.path / "logs" / f"{arm}.log"

    def trial_folder(self, trial: Trial) -> Path:
        """The folder of one trial; it may not exist yet."""
        return self.path / "trials" / trial.trial_id

    @contextmanager
    def recording(self, trial: Trial) -> Iterator[TrialWriter]:
        """Append to one trial's files; disk errors become StoreError."""
        folder = self.trial_folder(trial)
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _end_torn_line(folder / "requests.jsonl")
            with (folder / "requests.jsonl").open("ab", buffering=0) as requests:
                yield TrialWriter(folder, requests)

    def is_complete(self, trial: Trial) -> bool:
        """Whether the trial needs nothing more."""
        return (self.trial_folder(trial) / "complete").exists()

    def skip(self, trial: Trial, reason: str) -> None:
        """Record that ``trial`` will not be run, and why; the study counts it as finished."""
        folder = self.trial_folder(trial)
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "skipped").write_text(f"{reason}\n", encoding="utf-8")

    def skipped(self, trial: Trial) -> str:
        """Why the study decided not to run ``trial``; empty if it did not."""
        try:
            return (self.trial_folder(trial) / "skipped").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def is_over(self, trial: Trial) -> bool:
        """Whether nothing is left to do for the trial: it is complete, or was skipped."""
        return self.is_complete(trial) or bool(self.skipped(trial))

    def unskip(self) -> None:
        """Take back every decision not to run a trial: a tuning that was over goes on."""
        for trial in self.design.trials:
            (self.trial_folder(trial) / "skipped").unlink(missing_ok=True)

    def change_settings(self, settings: TuneSettings | None) -> None:
        """Go on with a tuning under other settings: what it skipped is open again."""
        self._change(replace(self.design, tune=settings))

    def add_repeats(self, trials: tuple[Trial, ...]) -> None:
        """Go on with more repeats: ``trials`` begins with those of the design.

        What was skipped is open again. Raises ValueError for other trials.
        """
        held = self.design.trials
        if trials[: len(held)] != held:
            raise ValueError("more repeats leave the trials before them as they are")
        self._change(replace(self.design, trials=trials))

    def _change(self, design: StudyDesign) -> None:
        self.design = design
        with _disk_errors(self.path):
            self._write_manifest()
            self.unskip()

    def note_pick(self, pick: PickRecord) -> None:
        """Add a line to the journal of a tuning."""
        path = self.path / "picks.jsonl"
        with _disk_errors(path):
            _end_torn_line(path)
            with path.open("ab", buffering=0) as file:
                _write_all(file, orjson.dumps(pick) + b"\n")

    def picks(self) -> tuple[PickRecord, ...]:
        """The journal of a tuning, in order; empty for any other study."""
        return tuple(_read_lines(self.path / "picks.jsonl", _PICK))

    def read_trial(self, trial: Trial) -> MeasuredTrial:
        """What was measured of ``trial`` so far; empty if nothing was.

        A request that was cancelled and later sent again counts once, as its last record.
        """
        folder = self.trial_folder(trial)
        last: dict[int, RequestRecord] = {}
        for record in _read_lines(folder / "requests.jsonl", _RECORD):
            last[record.index] = record
        return MeasuredTrial(
            trial=trial,
            records=tuple(last[index] for index in sorted(last)),
            parts=tuple(_read_lines(folder / "parts.jsonl", _PART)),
            complete=self.is_complete(trial),
        )

    def read(self) -> StudyData:
        """The study as measured so far: every trial that has at least one record."""
        trials = (self.read_trial(trial) for trial in self.design.trials)
        return StudyData(
            design=self.design,
            provenance=self.provenance,
            trials=tuple(measured for measured in trials if measured.records),
            folder=str(self.path),
            skipped={t.trial_id: why for t in self.design.trials if (why := self.skipped(t))},
        )


def remaining(measured: MeasuredTrial) -> set[int]:
    """Indices of requests that were not sent, or were cancelled before they ended."""
    ended = {r.index for r in measured.records if r.outcome is not Outcome.CANCELLED}
    return set(range(measured.trial.requests)) - ended


class TrialWriter:
    """Appends to the files of one trial while it runs."""

    def __init__(self, folder: Path, requests: BinaryIO) -> None:
        self._folder = folder
        self._requests = requests

    def request(self, record: RequestRecord) -> None:
        """Write one record; it is with the operating system when this returns."""
        _write_all(self._requests, orjson.dumps(record) + b"\n")

    def part(self, part: TrialPart) -> None:
        """Write the figures of one uninterrupted stretch."""
        path = self._folder / "parts.jsonl"
        _end_torn_line(path)
        with path.open("ab", buffering=0) as file:
            _write_all(file, orjson.dumps(part) + b"\n")

    def complete(self) -> None:
        """Mark the trial as needing nothing more."""
        (self._folder / "complete").touch()


def read_study(path: Path) -> StudyData:
    """The study in folder ``path``; StoreError if it is none, damaged, or holds no records."""
    study = StudyFolder.open(path).read()
    if not study.trials:
        raise StoreError(
            f"{path} holds no measured requests yet.",
            f"Run `specwise measure --resume {path}`.",
        )
    return study


def _write_all(file: BinaryIO, line: bytes) -> None:
    """An unbuffered write may be short (a disk that fills up): finish it or raise."""
    view = memoryview(line)
    while view:
        view = view[file.write(view) :]


def _end_torn_line(path: Path) -> None:
    """End a line that a crash left unfinished, so that the next record starts on its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _is_torn(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    return False


def _read_lines(path: Path, adapter: TypeAdapter[_Line]) -> Iterator[_Line]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield adapter.validate_json(line)
        except ValidationError as error:
            if _is_torn(line):
                continue  # by a crash; the request counts as not sent
            raise StoreError(
                f"{path} line {number} is not a record of this schema: {error.errors()[0]['msg']}.",
                "Remove that line to go on without the request.",
            ) from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EROFS,
            errno.EIO,
            errno.EFBIG,
        ):
            raise
        raise StoreError(
            f"{path} cannot be written: {os.strerror(error.errno)}.",
            "What was measured so far is kept. Make room or fix the permissions, then resume with "
            "`specwise measure --resume`.",
        ) from error
