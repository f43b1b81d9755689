from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    ClientHealth,
    GaugeSample,
    GpuSeries,
    Outcome,
    PickRecord,
    RequestRecord,
    StudyDesign,
    TrialPart,
    TuneSettings,
)
from specwise.errors import StoreError
from specwise.measurement.design import bundled_study, parse_study
from specwise.measurement.store import StudyFolder, read_study, remaining

DESIGN = parse_study(bundled_study("example"), name="example")
TRIAL = DESIGN.trials[0]
RECORD = RequestRecord(
    index=0,
    prompt_id="p0",
    segment="extract",
    temperature=0.0,
    part=0,
    intended_s=0.0,
    sent_s=0.001,
    chunk_s=(0.1, 0.2),
    chunk_tokens=(1, 4),
    finished_s=0.25,
    outcome=Outcome.OK,
    status=200,
    prompt_tokens=5,
    output_tokens=5,
    acceptance=AcceptanceCounts(AcceptanceSource.PER_REQUEST, (0, 0, 0, 1), 3),
)


def folder_at(path: Path) -> StudyFolder:
    return StudyFolder.create(path / "study", DESIGN, {"specwise": "test"}, "text")


def test_parts_written_before_there_were_gpu_figures_are_read(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    part = TrialPart("2026-01-01T00:00:00Z", 1.5, ClientHealth(0.0, 0.0, 0.0, 0.1))
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
        writer.part(part)
    path = folder.trial_folder(TRIAL) / "parts.jsonl"
    line = json.loads(path.read_bytes())
    del line["gpus"], line["gpu_note"]
    path.write_text(json.dumps(line) + "\n")
    assert folder.read_trial(TRIAL).parts == (part,)


def test_a_skipped_trial_is_over_without_having_been_measured(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    assert not folder.is_over(TRIAL)
    folder.skip(TRIAL, "the answer is clear")
    again = StudyFolder.open(folder.path)
    assert again.is_over(TRIAL)
    assert not again.is_complete(TRIAL)
    study = again.read()
    assert study.skipped == {TRIAL.trial_id: "the answer is clear"}
    assert study.trials == ()


def test_design_and_records_come_back_as_they_were(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    part = TrialPart(
        started_at="2026-01-01T00:00:00Z",
        duration_s=1.5,
        client=ClientHealth(0.0, 0.001, 0.002, 0.1),
        counters={"spec_drafts": 3.0},
        gauges=(GaugeSample(1.0, 2.0, None, 0.5),),
        gpus=(GpuSeries(0, "H100", None, (1.0, 2.0), (7, None), (None, 0.5)),),
    )
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
        writer.part(part)
        writer.complete()
    again = StudyFolder.open(folder.path)
    assert again.design == DESIGN
    measured = again.read_trial(TRIAL)
    assert (measured.records, measured.parts, measured.complete) == ((RECORD,), (part,), True)


def test_a_cancelled_request_is_sent_again_and_counts_once(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    cancelled = replace(RECORD, outcome=Outcome.CANCELLED)
    with folder.recording(TRIAL) as writer:
        writer.request(cancelled)
        writer.request(replace(RECORD, index=1))
    assert remaining(folder.read_trial(TRIAL)) == set(range(TRIAL.requests)) - {1}
    with folder.recording(TRIAL) as writer:
        writer.request(replace(RECORD, part=1))
    assert [r.part for r in folder.read_trial(TRIAL).records] == [1, 0]
    assert remaining(folder.read_trial(TRIAL)) == set(range(2, TRIAL.requests))


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_torn_last_line_costs_that_request_only(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = folder_at(tmp_path_factory.mktemp("torn"))
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
        writer.request(replace(RECORD, index=1))
    path = folder.trial_folder(TRIAL) / "requests.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[: min(cut, len(second) - 2)])
    assert [r.index for r in folder.read_trial(TRIAL).records] == [0]
    with folder.recording(TRIAL) as writer:
        writer.request(replace(RECORD, index=2))
    assert [r.index for r in folder.read_trial(TRIAL).records] == [0, 2]


def test_a_line_torn_behind_a_brace_is_torn_too(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
    path = folder.trial_folder(TRIAL) / "requests.jsonl"
    line = path.read_bytes()
    inner = line.index(b"}") + 1
    assert inner < len(line) - 2, "the end of the acceptance counts, not of the record"
    path.write_bytes(line + line[:inner])
    assert folder.read_trial(TRIAL).records == (RECORD,)


PICK = PickRecord("0001", "the baseline", None, started_server=True, start_s=4.0, seconds=2.5)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_the_journal_of_a_tuning_outlives_a_torn_line(tmp_path: Path, cut: int) -> None:
    folder = folder_at(tmp_path)
    assert folder.picks() == ()
    folder.note_pick(PICK)
    path = folder.path / "picks.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes()[:cut])
    assert StudyFolder.open(folder.path).picks() == (PICK,)
    second = replace(PICK, trial_id="0002", regret_bound=0.08)
    folder.note_pick(second)
    assert StudyFolder.open(folder.path).picks() == (PICK, second)


def test_other_settings_open_what_a_tuning_skipped(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    folder.skip(TRIAL, "the search is over")
    folder.change_settings(TuneSettings(0.01, 60.0))
    again = StudyFolder.open(folder.path)
    assert again.design == replace(DESIGN, tune=TuneSettings(0.01, 60.0))
    assert not again.is_over(TRIAL)


def test_more_repeats_leave_what_was_measured_as_it_is(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
        writer.complete()
    folder.skip(DESIGN.trials[-1], "clear already")
    text = bundled_study("example")
    assert "repeats = 2" in text
    more = parse_study(text.replace("repeats = 2", "repeats = 5"), name="example")
    folder.add_repeats(more.trials)
    again = StudyFolder.open(folder.path)
    assert again.design.trials == more.trials
    assert again.read_trial(TRIAL).records == (RECORD,)
    assert not again.is_over(DESIGN.trials[-1])
    with pytest.raises(ValueError, match="more repeats"):
        folder.add_repeats(DESIGN.trials)


def test_designs_written_before_there_were_tunings_are_read(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    path = folder.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["design"]["tune"]
    path.write_text(json.dumps(manifest))
    assert StudyFolder.open(folder.path).design == DESIGN


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
    second = DESIGN.trials[1]
    folder.trial_folder(second).mkdir(parents=True)
    (folder.trial_folder(second) / "requests.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(StoreError, match="No space left") as caught,
        folder.recording(second) as writer,
    ):
        writer.request(RECORD)
    assert caught.value.exit_code == 3
    assert "--resume" in str(caught.value)
    assert folder.read_trial(TRIAL).records == (RECORD,)


def test_another_schema_version(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    manifest = json.loads((folder.path / "manifest.json").read_bytes())
    (folder.path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(StoreError, match="schema 99; this specwise reads 1"):
        StudyFolder.open(folder.path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema_version": 1}', "\x00\xff"])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        StudyFolder.open(tmp_path)


def test_a_damaged_record_names_its_line(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with folder.recording(TRIAL) as writer:
        writer.request(RECORD)
    path = folder.trial_folder(TRIAL) / "requests.jsonl"
    path.write_bytes(path.read_bytes() + b'{"index": "x"}\n')
    with pytest.raises(StoreError, match="line 2 is not a record"):
        folder.read_trial(TRIAL)


def test_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="it has no manifest"):
        StudyFolder.open(tmp_path / "none")
    with pytest.raises(StoreError, match="holds no measured requests"):
        read_study(folder_at(tmp_path).path)
    with pytest.raises(StoreError, match="exists and is not an unfinished study"):
        StudyFolder.create(tmp_path, DESIGN, {}, "")


def test_two_processes_cannot_measure_into_one_folder(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    with (
        folder.locked(),
        pytest.raises(StoreError, match="Another specwise is measuring"),
        StudyFolder.open(folder.path).locked(),
    ):
        pass


def test_a_design_survives_its_manifest(tmp_path: Path) -> None:
    text = bundled_study("demo")
    design: StudyDesign = parse_study(text, name="demo")
    StudyFolder.create(tmp_path / "s", design, {}, text)
    assert StudyFolder.open(tmp_path / "s").design == design
