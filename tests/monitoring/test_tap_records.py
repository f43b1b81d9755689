"""Tap's record folder: what was written is read again, whatever happened in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specwise.domain import AcceptanceCounts, AcceptanceSource, Outcome
from specwise.errors import StoreError
from specwise.monitoring.tap_records import RecordWriter, TapRecord, read_records

COUNTS = AcceptanceCounts(AcceptanceSource.PER_REQUEST, (1, 2, 3), 12)
RECORD = TapRecord(
    at=1_790_000_000.0,
    segment="chat",
    bucket="0-0.5",
    path="/v1/chat/completions",
    stream=True,
    outcome=Outcome.OK,
    e2e_s=1.5,
    temperature=0.4,
    status=200,
    ttft_s=0.5,
    tpot_s=0.1,
    last_token_s=1.5,
    output_tokens=11,
    acceptance=COUNTS,
)


def test_records_come_back_in_the_order_of_time(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {"upstream": "127.0.0.1:8000"})
    later = replace(RECORD, at=RECORD.at + 5, acceptance=None, outcome=Outcome.CUT)
    writer.write(later)
    writer.write(RECORD)
    writer.close()
    assert read_records(tmp_path) == (RECORD, later)
    assert read_records(tmp_path, since=RECORD.at + 1) == (later,)


def test_files_rotate_and_the_oldest_go(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {}, rotate_bytes=2_000, keep_bytes=6_000)
    for i in range(100):
        writer.write(replace(RECORD, at=float(i)))
    writer.close()
    files = sorted(tmp_path.glob("records-*"))
    assert all(path.stat().st_size <= 2_000 for path in files)
    assert sum(path.stat().st_size for path in files) <= 8_000
    kept = [record.at for record in read_records(tmp_path)]
    assert kept == [float(i) for i in range(100 - len(kept), 100)]


def test_two_taps_share_a_folder_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    first, second = RecordWriter(tmp_path, {}), RecordWriter(tmp_path, {}, rotate_bytes=100)
    first.write(RECORD)
    second.write(RECORD)
    first.close()
    second.close()
    newest = sorted(tmp_path.glob("records-*"))[-1]
    with newest.open("ab") as file:
        file.write(b'{"at": 179')
    assert len(read_records(tmp_path)) == 2


def test_a_full_disk_loses_records_and_not_the_traffic(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {})
    writer.close()
    writer._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    writer.write(RECORD)
    assert writer.lost == 1
    writer.close()


def test_what_is_no_record_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a folder of tap's records"):
        read_records(tmp_path)
    RecordWriter(tmp_path, {}).close()
    with pytest.raises(StoreError, match="no records yet"):
        read_records(tmp_path)


def test_a_record_reads_as_a_request_of_a_study() -> None:
    request = RECORD.request_record(3, start=RECORD.at - 10)
    assert request.index == 3
    assert request.intended_s == request.sent_s == 10
    assert request.first_token_s == 10.5
    assert request.finished_s == 11.5
    assert request.acceptance == COUNTS
    assert request.output_sha256 is None
    assert request.output_text is None
