"""Raw records as CSV, JSON lines and Parquet: one row a request, documented columns."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.reporting import samples

from specwise.domain import Outcome, StudyData
from specwise.errors import InputError, StoreError
from specwise.reporting.export import COLUMNS, export_records

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "report.md"


@pytest.fixture(scope="module")
def study() -> StudyData:
    return samples.study(requests=6, repeats=1)


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_request_is_a_row_and_every_value_survives(
    study: StudyData, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"records.{kind}"
    records = [(m, r) for m in study.trials for r in m.records]
    assert export_records(study, path, kind) == len(records)
    rows = read(path)
    assert len(rows) == len(records)
    for row, (measured, record) in zip(rows, records, strict=True):
        assert list(row) == [column.name for column in COLUMNS]
        assert row["trial_id"] == measured.trial.trial_id
        assert (row["index"], row["load"]) == (record.index, measured.trial.load.value)
        assert row["outcome"] == record.outcome.value
        assert tuple(row["chunk_s"]) == record.chunk_s
        if record.outcome is Outcome.OK:
            assert record.first_token_s is not None
            assert row["ttft_s"] == record.first_token_s - record.intended_s
            assert row["ttft_s"] == pytest.approx(row["ttft_from_sent_s"] + 0.0004)
            # the trailing usage chunk is not output: TPOT ends at the last token
            decoded_s = record.chunk_s[-1] - record.chunk_s[0]
            assert row["tpot_s"] == pytest.approx(decoded_s / (record.output_tokens - 1))
        if record.acceptance is not None:
            assert sum(row["steps_by_accepted"]) == row["verify_steps"]
            assert row["accepted_tokens"] == record.acceptance.accepted_tokens
            assert row["acceptance_source"] == "per_request"
        assert row["part_started_at"] == measured.parts[0].started_at


def test_csv_holds_the_same_with_lists_as_json(study: StudyData, tmp_path: Path) -> None:
    rows_written = export_records(study, tmp_path / "r.csv", "csv")
    export_records(study, tmp_path / "r.jsonl", "jsonl")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == rows_written
    for row, reference in zip(rows, read(tmp_path / "r.jsonl"), strict=True):
        assert float(row["e2e_s"]) == reference["e2e_s"]
        assert json.loads(row["chunk_s"]) == reference["chunk_s"]
        assert row["predicted"] == "false"
        assert (row["tpot_s"] == "") == (reference["tpot_s"] is None)


def test_output_text_is_there_only_where_it_was_asked_for(tmp_path: Path, study: StudyData) -> None:
    export_records(study, tmp_path / "without.jsonl", "jsonl")
    assert "output_text" not in read(tmp_path / "without.jsonl")[0]
    export_records(samples.crowded().study, tmp_path / "with.jsonl", "jsonl")
    rows = read(tmp_path / "with.jsonl")
    assert rows[0]["output_text"] == "THE MODEL SAID THIS"
    assert rows[0]["predicted"] is True


def test_parquet_without_pyarrow_names_the_extra(
    study: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'specwise\[parquet\]'"):
        export_records(study, tmp_path / "r.parquet", "parquet")
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_names_the_known_ones(study: StudyData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="csv, jsonl, parquet"):
        export_records(study, tmp_path / "r.xlsx", "xlsx")


def test_full_disk_is_one_clear_error_and_leaves_the_old_file(study: StudyData) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        export_records(study, Path("/proc/specwise/records.csv"), "csv")


def test_a_failed_export_leaves_the_old_file(
    study: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.csv"
    path.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        export_records(study, path, "csv")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_column_is_documented_with_its_type() -> None:
    documented = re.findall(r"^\| `(\w+)` \| `([\w<>]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert documented == [(column.name, column.kind) for column in COLUMNS] + [
        ("output_text", "string")
    ]
