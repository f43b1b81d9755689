"""Raw records as one flat table: CSV, JSON lines or Parquet, one row a request."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from specwise.analysis.cells import tpot_s
from specwise.analysis.server_figures import server_figures
from specwise.domain import MeasuredTrial, RequestRecord, StudyData, TrialPart
from specwise.errors import InputError, StoreError

_ROWS_AT_ONCE = 5000  # bounds the memory that a Parquet export of a large study takes


class ExportFormat(StrEnum):
    """What `export_records` can write."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the export: its name, Arrow type and meaning."""

    name: str
    kind: str
    meaning: str


COLUMNS: tuple[Column, ...] = (
    Column("study", "string", "name of the study"),
    Column("predicted", "bool", "true when a simulation made the row"),
    Column("trial_id", "string", "trial, numbered in order of execution"),
    Column("arm", "string", "serving configuration"),
    Column("workload", "string", "what the trial sent"),
    Column("loop", "string", "closed or open"),
    Column("load", "float64", "clients (closed loop) or requests per second (open loop)"),
    Column("arrivals", "string", "process of the open loop"),
    Column("repeat", "int64", "repeat of the cell"),
    Column("purpose", "string", "measure or noise_floor (A/A)"),
    Column("part", "int64", "uninterrupted stretch of the trial; times count from its start"),
    Column("part_started_at", "string", "wall clock at the start of the part, ISO 8601"),
    Column("part_prefix_hit_rate", "float64", "prompt tokens found in the prefix cache, share"),
    Column("part_preemptions", "int64", "preemptions during the part"),
    Column("part_queue_mean_s", "float64", "mean wait in the server before prefill"),
    Column("part_kv_use_max", "float64", "fullest KV cache seen, share"),
    Column("part_waiting_max", "float64", "most requests seen waiting in the server"),
    Column("part_gpu_memory_max_bytes", "int64", "most memory seen in use on one GPU"),
    Column("part_gpu_utilisation", "float64", "share of time a kernel ran, mean over GPUs"),
    Column("index", "int64", "place of the request in the trial"),
    Column("prompt_id", "string", "which prompt"),
    Column("segment", "string", "which segment"),
    Column("temperature", "float64", "sampling temperature"),
    Column("outcome", "string", "how it ended; ok is success"),
    Column("status", "int64", "HTTP status"),
    Column("error", "string", "what went wrong"),
    Column("intended_s", "float64", "when the schedule wanted it sent"),
    Column("sent_s", "float64", "when it was sent"),
    Column("first_token_s", "float64", "arrival of the first output"),
    Column("finished_s", "float64", "end of the response"),
    Column("ttft_s", "float64", "first_token_s - intended_s"),
    Column("ttft_from_sent_s", "float64", "first_token_s - sent_s"),
    Column("tpot_s", "float64", "time per output token after the first"),
    Column("e2e_s", "float64", "finished_s - intended_s"),
    Column("e2e_from_sent_s", "float64", "finished_s - sent_s"),
    Column("prompt_tokens", "int64", "the server's usage"),
    Column("output_tokens", "int64", "the server's usage"),
    Column("cached_tokens", "int64", "prompt tokens found in the prefix cache"),
    Column("finish_reason", "string", "the server's"),
    Column("acceptance_source", "string", "per_request, counters or chunks (an estimate)"),
    Column("verify_steps", "int64", "steps that checked drafts"),
    Column("drafted_tokens", "int64", "tokens proposed"),
    Column("accepted_tokens", "int64", "tokens accepted"),
    Column("steps_by_accepted", "list<int64>", "verify steps that accepted 0, 1, 2, ... drafts"),
    Column("chunk_s", "list<float64>", "arrival of each chunk"),
    Column("chunk_tokens", "list<int64>", "output tokens in each chunk"),
    Column("output_sha256", "string", "hash of the output text"),
)

_TEXT = Column("output_text", "string", "the output, in a study that was asked to keep it")


def _part_columns(part: TrialPart) -> dict[str, Any]:
    """The columns that all requests of a part share."""
    figures = server_figures((part,))
    used = [m for gpu in figures.gpus if (m := gpu.memory_used_max_bytes) is not None]
    busy = [u for gpu in figures.gpus if (u := gpu.utilisation_mean) is not None]
    return {
        "part_started_at": part.started_at,
        "part_prefix_hit_rate": figures.prefix_hit_rate,
        "part_preemptions": None if figures.preemptions is None else round(figures.preemptions),
        "part_queue_mean_s": figures.queue_mean_s,
        "part_kv_use_max": figures.kv_use_max,
        "part_waiting_max": figures.waiting_max,
        "part_gpu_memory_max_bytes": max(used, default=None),
        "part_gpu_utilisation": fmean(busy) if busy else None,
    }


_PART_COLUMNS = [column.name for column in COLUMNS if column.name.startswith("part_")]


def _row(
    study: StudyData, measured: MeasuredTrial, record: RequestRecord, part: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of `COLUMNS` and `_TEXT` for one request; ``part`` are those of its part."""
    trial, accepted = measured.trial, record.acceptance
    first_s = record.first_token_s
    return {
        "study": study.design.name,
        "predicted": study.predicted,
        "trial_id": trial.trial_id,
        "arm": trial.arm,
        "workload": trial.workload,
        "loop": trial.load.loop.value,
        "load": trial.load.value,
        "arrivals": trial.load.arrivals,
        "repeat": trial.repeat,
        "purpose": trial.purpose.value,
        "part": record.part,
        **part,
        "index": record.index,
        "prompt_id": record.prompt_id,
        "segment": record.segment,
        "temperature": record.temperature,
        "outcome": record.outcome.value,
        "status": record.status,
        "error": record.error,
        "intended_s": record.intended_s,
        "sent_s": record.sent_s,
        "first_token_s": first_s,
        "finished_s": record.finished_s,
        "ttft_s": None if first_s is None else first_s - record.intended_s,
        "ttft_from_sent_s": None if first_s is None else first_s - record.sent_s,
        "tpot_s": tpot_s(record),
        "e2e_s": record.finished_s - record.intended_s,
        "e2e_from_sent_s": record.finished_s - record.sent_s,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached_tokens": record.cached_tokens,
        "finish_reason": record.finish_reason,
        "acceptance_source": accepted.source.value if accepted else None,
        "verify_steps": accepted.steps if accepted else None,
        "drafted_tokens": accepted.drafted_tokens if accepted else None,
        "accepted_tokens": accepted.accepted_tokens if accepted else None,
        "steps_by_accepted": list(accepted.steps_by_accepted) if accepted else None,
        "chunk_s": list(record.chunk_s),
        "chunk_tokens": None if record.chunk_tokens is None else list(record.chunk_tokens),
        "output_sha256": record.output_sha256,
        "output_text": record.output_text,
    }


def export_records(study: StudyData, path: Path, export_format: ExportFormat | str) -> int:
    """Write every raw record of ``study`` to ``path``, one row a request; returns the row count.

    The columns are `COLUMNS`; ``output_text`` joins them only where a record carries it. Lists are
    JSON text in CSV. The file appears whole or not at all.

    Raises InputError for an unknown format or Parquet without pyarrow, StoreError when the file
    cannot be written.
    """
    try:
        chosen = ExportFormat(export_format)
    except ValueError:
        raise InputError(
            f"{export_format!r} is not an export format.",
            f"Choose one of {', '.join(each.value for each in ExportFormat)}.",
        ) from None
    write = {
        ExportFormat.CSV: _write_csv,
        ExportFormat.JSONL: _write_jsonl,
        ExportFormat.PARQUET: _write_parquet,
    }[chosen]
    keeps_text = any(r.output_text is not None for m in study.trials for r in m.records)
    columns = (*COLUMNS, _TEXT) if keeps_text else COLUMNS
    with whole_file(path) as temporary:
        return write(study, columns, temporary)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` at the end: the file appears whole or not at all.

    Raises StoreError when the disk says no.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}.",
            "Choose another place for it, or make room; the study itself is untouched.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _rows(study: StudyData, columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    unknown = dict.fromkeys(_PART_COLUMNS)
    for measured in study.trials:
        parts = {part.number: _part_columns(part) for part in measured.parts}
        for record in measured.records:
            row = _row(study, measured, record, parts.get(record.part, unknown))
            yield {column.name: row[column.name] for column in columns}


def _write_csv(study: StudyData, columns: Sequence[Column], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column.name for column in columns])
        for count, row in enumerate(_rows(study, columns), start=1):  # noqa: B007 (returned)
            writer.writerow([_csv_cell(value) for value in row.values()])
    return count


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value


def _write_jsonl(study: StudyData, columns: Sequence[Column], path: Path) -> int:
    count = 0
    with path.open("wb") as file:
        for count, row in enumerate(_rows(study, columns), start=1):  # noqa: B007 (returned)
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return count


def _write_parquet(study: StudyData, columns: Sequence[Column], path: Path) -> int:
    try:
        import pyarrow as pa  # noqa: PLC0415 (optional)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise InputError(
            "Parquet export needs pyarrow, which is not installed.",
            "Install it with `pip install 'specwise[parquet]'`, or export csv or jsonl.",
        ) from None
    types: Mapping[str, Any] = {
        "string": pa.string(),
        "bool": pa.bool_(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "list<int64>": pa.list_(pa.int64()),
        "list<float64>": pa.list_(pa.float64()),
    }
    schema = pa.schema(
        [
            pa.field(column.name, types[column.kind], metadata={"meaning": column.meaning})
            for column in columns
        ]
    )
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for row in _rows(study, columns):
            batch.append(row)
            count += 1
            if len(batch) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch.clear()
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    return count
