"""Whole studies against servers of known truth, over real sockets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from tests.fake_nvml import FakeGpu, FakeNvml
from tests.fake_vllm import FakeVllm

from specwise.analysis.latency import summarise
from specwise.domain import (
    AcceptanceSource,
    MeasuredTrial,
    Outcome,
    PickRecord,
    StudyData,
    Trial,
)
from specwise.errors import InputError, ServerError, StoppedError, StoreError
from specwise.measurement.design import bundled_study, parse_study
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder, read_study
from specwise.measurement.study import Choice, Listener, Progress, conduct

STUDY = """
name = "fake"
seed = 3
[[arm]]
name = "baseline"
url = "{baseline}"
[[arm]]
name = "draft"
url = "{draft}"
speculation = {{ method = "draft_model", k = 2, draft = "d" }}
[[segment]]
name = "one"
prompts = "prompts.jsonl"
max_tokens = 20
[[segment]]
name = "two"
prompts = "prompts.jsonl"
max_tokens = 20
temperature = 0.8
api = "completions"
[[workload]]
name = "mix"
shares = {{ one = 1, two = 1 }}
[load]
{load}
warmup = 1
timeout_s = 20
"""
CLOSED = "concurrency = [1, 4]\nrequests = [2, 8]\nrepeats = 2"
SHORT = "concurrency = [2]\nrequests = 12\nrepeats = 1\nnoise_floor = false"


def write_study(folder: Path, baseline: str, draft: str, load: str = CLOSED) -> Path:
    prompts = "\n".join(json.dumps({"prompt": f"say {i} words"}) for i in range(200))
    (folder / "prompts.jsonl").write_text(prompts)
    path = folder / "study.toml"
    path.write_text(STUDY.format(baseline=baseline, draft=draft, load=load))
    return path


def new_folder(path: Path) -> StudyFolder:
    text = path.read_text()
    design = parse_study(text, name="study.toml")
    return StudyFolder.create(path.parent / "study", design, describe_here(), text)


def measure(
    folder: StudyFolder, base: Path, stop: Callable[[], bool] = lambda: False
) -> tuple[StudyData, list[str]]:
    notes: list[str] = []
    conduct(folder, base=base, listener=Listener(note=notes.append), stop=stop)
    return read_study(folder.path), notes


def prompts_of(measured: MeasuredTrial) -> list[tuple[int, str]]:
    return [(r.index, r.prompt_id) for r in measured.records]


def test_a_study_measures_what_its_servers_do(tmp_path: Path) -> None:
    with (
        FakeVllm(step_s=lambda n: 0.004 + 0.0005 * n) as baseline,
        FakeVllm(step_s=lambda n: 0.006 + 0.0005 * n, conditional=(0.9, 0.8)) as draft,
    ):
        path = write_study(tmp_path, baseline.url, draft.url)
        data, _ = measure(new_folder(path), tmp_path)
        assert draft.counters["generation_tokens"] > 0

    assert all(trial.complete for trial in data.trials)
    assert len(data.trials) == len(data.design.trials)
    records = [r for t in data.trials for r in t.records]
    assert {r.outcome for r in records} == {Outcome.OK}
    assert all(r.output_tokens == 20 and r.prompt_tokens == 9 for r in records)

    by_cell: dict[tuple[object, ...], list[MeasuredTrial]] = {}
    for t in data.trials:
        by_cell.setdefault((t.trial.workload, t.trial.load, t.trial.repeat), []).append(t)
    for trials in by_cell.values():
        assert len({str(prompts_of(t)) for t in trials}) == 1, "arms must see the same prompts"

    drafted = [t for t in data.trials if t.trial.arm == "draft"]
    for trial in drafted:
        assert {r.acceptance.source for r in trial.records if r.acceptance} == {
            AcceptanceSource.PER_REQUEST
        }
        steps = sum(r.acceptance.steps for r in trial.records if r.acceptance)
        accepted = sum(r.acceptance.accepted_tokens for r in trial.records if r.acceptance)
        counters = {k: v for part in trial.parts for k, v in part.counters.items()}
        assert counters["spec_drafts"] == steps
        assert counters["spec_accepted_tokens"] == accepted
    assert all(r.acceptance is None for t in data.trials if t not in drafted for r in t.records)
    assert data.provenance["arms"]["draft"]["vllm"] == "0.32.0"


def test_temperature_and_endpoint_follow_the_segment(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        measure(new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT)), tmp_path)
        sent = baseline.bodies
    assert {("messages" in body, body["temperature"]) for body in sent} == {
        (True, 0.0),
        (False, 0.8),
    }
    assert all(body["stream"] for body in sent)
    salts = {body["cache_salt"] for body in sent}
    assert len(salts) == 2 * 3, "one for each trial of the baseline, and one for its warm-up"


def test_open_loop_sends_at_the_same_intended_times_to_every_arm(tmp_path: Path) -> None:
    load = "rate_per_s = [40]\nrequests = 16\nrepeats = 1\nnoise_floor = false"
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        path = write_study(tmp_path, baseline.url, draft.url, load)
        data, _ = measure(new_folder(path), tmp_path)
    times: dict[str, set[tuple[float, ...]]] = {}
    for t in data.trials:
        times.setdefault(t.trial.workload, set()).add(tuple(r.intended_s for r in t.records))
    assert all(len(seen) == 1 for seen in times.values())
    late = [r.sent_s - r.intended_s for t in data.trials for r in t.records]
    assert max(late) < 0.25


def test_stopping_keeps_what_was_measured_and_resuming_does_the_rest(tmp_path: Path) -> None:
    with FakeVllm(step_s=lambda _: 0.01) as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        with pytest.raises(StoppedError, match="everything measured is kept"):
            measure(folder, tmp_path, stop=lambda: len(baseline.bodies) > 8)
        before = {r for t in read_study(folder.path).trials for r in t.records}
        finished = {r for r in before if r.outcome is Outcome.OK}
        assert finished
        assert not all(folder.is_complete(t) for t in folder.design.trials)
        data, _ = measure(StudyFolder.open(folder.path), tmp_path)
    # The servers are gone now: a finished study asks nothing of them.
    _, notes = measure(StudyFolder.open(folder.path), tmp_path)
    assert notes == ["every trial is measured already"]
    after = {r for t in data.trials for r in t.records}
    assert finished <= after
    assert all(t.complete and len(t.records) == 12 for t in data.trials)
    assert {r.outcome for r in after} == {Outcome.OK}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "specwise.cli.main", *arguments]


def start_measuring(tmp_path: Path, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command("measure", str(path), "--out", str(tmp_path / "study")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    requests = tmp_path / "study" / "trials"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if len(list(requests.glob("*/requests.jsonl"))) >= 2:
            return process
        time.sleep(0.02)
    raise AssertionError(process.communicate(timeout=5))


def test_kill_9_loses_at_most_the_requests_in_flight(tmp_path: Path) -> None:
    with FakeVllm(step_s=lambda _: 0.01) as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        path = write_study(tmp_path, baseline.url, draft.url, SHORT)
        process = start_measuring(tmp_path, path)
        process.kill()
        process.communicate()
        answered = len(baseline.bodies) + len(draft.bodies)
        before = read_study(tmp_path / "study")
        kept = {r for t in before.trials for r in t.records}
        warmups = 2 * len(before.design.trials)
        assert len(kept) >= answered - warmups - 2 * 2, "concurrency 2, two trials begun"
        done = subprocess.run(
            command("measure", "--resume", str(tmp_path / "study"), "--json"),
            capture_output=True,
            text=True,
            check=True,
        )
    result = json.loads(done.stdout)
    assert result["complete"]
    assert result["failed_requests"] == 0
    after = read_study(tmp_path / "study")
    assert kept <= {r for t in after.trials for r in t.records}
    assert all(len(t.records) == 12 for t in after.trials)


def test_ctrl_c_is_exit_code_3_and_says_how_to_go_on(tmp_path: Path) -> None:
    with FakeVllm(step_s=lambda _: 0.01) as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        process = start_measuring(tmp_path, write_study(tmp_path, baseline.url, draft.url, SHORT))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 3
    assert f"specwise measure --resume {tmp_path / 'study'}" in errors
    assert "Traceback" not in errors


def wait_until_found_gone(folder: Path) -> None:
    """Until a trial of the draft has ended a part."""
    deadline = time.monotonic() + 10
    while not list((folder / "study" / "trials").glob("*draft*/parts.jsonl")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def test_a_server_that_restarts_is_waited_for_and_the_trial_goes_on(tmp_path: Path) -> None:
    with FakeVllm(step_s=lambda _: 0.001) as baseline:
        draft = FakeVllm(step_s=lambda _: 0.01, conditional=(0.5, 0.5)).__enter__()
        path = write_study(tmp_path, baseline.url, draft.url, SHORT.replace("12", "40"))

        def restart() -> None:
            while len(draft.bodies) < 12:
                time.sleep(0.01)
            draft.__exit__()
            wait_until_found_gone(tmp_path)
            time.sleep(0.3)
            draft.__enter__()

        away = threading.Thread(target=restart)
        away.start()
        data, notes = measure(new_folder(path), tmp_path)
        away.join()
        draft.__exit__()
    parted = [t.trial.trial_id for t in data.trials if len(t.parts) > 1]
    outcomes = {r.outcome: r.error for t in data.trials for r in t.records}
    assert any("the server went away" in note for note in notes), (parted, outcomes)
    assert all(t.complete and len(t.records) == 40 for t in data.trials)
    failed = [r for t in data.trials for r in t.records if r.outcome is not Outcome.OK]
    assert len(failed) <= 2, "the requests in flight at concurrency 2, and only these"
    assert max(r.part for t in data.trials for r in t.records) == 1


def test_a_server_that_is_away_at_a_trials_end_is_asked_again(tmp_path: Path) -> None:
    with FakeVllm(step_s=lambda _: 0.001) as baseline:
        draft = FakeVllm(step_s=lambda _: 0.01, conditional=(0.5, 0.5)).__enter__()
        # One client: with two, the last request could still slip in beside the one that ends it.
        path = write_study(tmp_path, baseline.url, draft.url, SHORT.replace("[2]", "[1]"))

        def restart() -> None:
            draft.goes_at = 1 + 11  # one to warm up; the twelfth finds nobody
            draft.join()
            wait_until_found_gone(tmp_path)
            draft.__enter__()

        away = threading.Thread(target=restart)
        away.start()
        data, notes = measure(new_folder(path), tmp_path)
        away.join()
        draft.__exit__()
    assert any("the server went away" in note for note in notes)
    assert all(t.complete and len(t.records) == 12 for t in data.trials)
    assert {r.outcome for t in data.trials for r in t.records} == {Outcome.OK}
    assert [r.index for t in data.trials for r in t.records if r.part == 1] == [11]


def test_a_server_that_stays_away_ends_the_sitting_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specwise.measurement.fleet.RETURN_PATIENCE_S", 0.2)
    with FakeVllm(step_s=lambda _: 0.005) as baseline:
        draft = FakeVllm(conditional=(0.5, 0.5)).__enter__()
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))

        def end() -> None:
            while len(draft.bodies) < 6:
                time.sleep(0.01)
            draft.__exit__()

        ended = threading.Thread(target=end)
        ended.start()
        with pytest.raises(ServerError) as caught:
            measure(folder, tmp_path)
        ended.join()
    assert caught.value.exit_code == 3
    assert any(t.complete for t in read_study(folder.path).trials)


def test_errors_429_and_500_are_recorded_not_retried(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5), fail_status=429) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        data, _ = measure(folder, tmp_path)
        sent = len(draft.bodies)
    refused = [r for t in data.trials if t.trial.arm == "draft" for r in t.records]
    assert {(r.outcome, r.status) for r in refused} == {(Outcome.HTTP_ERROR, 429)}
    warmups = 1 + 1 + 2
    assert sent == len(refused) + warmups


@pytest.mark.parametrize(
    ("servers", "error", "message"),
    [
        ({"draft": {"conditional": ()}}, InputError, "should speculate"),
        ({"baseline": {"conditional": (0.5,)}}, InputError, "the baseline, but"),
        ({"draft": {"fail_status": 400}}, ServerError, "refuses every warm-up request: HTTP 400"),
        ({"draft": {"api_key": "sesame"}}, ServerError, "401"),
    ],
)
def test_a_server_that_does_not_fit_the_design(
    tmp_path: Path,
    servers: dict[str, dict[str, object]],
    error: type[Exception],
    message: str,
) -> None:
    with (
        FakeVllm(**servers.get("baseline", {})) as baseline,  # type: ignore[arg-type]
        FakeVllm(**{"conditional": (0.5, 0.5), **servers.get("draft", {})}) as draft,  # type: ignore[arg-type]
    ):
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        with pytest.raises(error, match=message):
            measure(folder, tmp_path)


def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    with FakeVllm() as baseline:
        folder = new_folder(write_study(tmp_path, baseline.url, "http://127.0.0.1:9", SHORT))
        with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
            measure(folder, tmp_path)


def test_an_api_key_opens_the_server_and_is_stored_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KEY", "open-sesame-4711")
    with (
        FakeVllm() as baseline,
        FakeVllm(conditional=(0.5, 0.5), api_key="open-sesame-4711") as draft,
    ):
        path = write_study(tmp_path, baseline.url, draft.url, SHORT)
        path.write_text(
            path.read_text().replace(f'"{draft.url}"', f'"{draft.url}"\napi_key_env = "FAKE_KEY"')
        )
        folder = new_folder(path)
        measure(folder, tmp_path)
    for file in folder.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"open-sesame-4711" not in content, file
            assert b"words" not in content, f"prompt text in {file}"


def test_a_missing_prompt_file_leaves_no_folder_behind(tmp_path: Path) -> None:
    path = write_study(tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:9", SHORT)
    (tmp_path / "prompts.jsonl").unlink()
    done = subprocess.run(
        command("measure", str(path), "--out", str(tmp_path / "study")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "prompts.jsonl does not exist" in done.stderr
    assert not (tmp_path / "study").exists()


def test_what_the_source_says_of_sampling_is_noted_and_stored(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        path = write_study(tmp_path, baseline.url, draft.url, SHORT)
        prompts = "\n".join(json.dumps({"prompt": f"p{i}", "temperature": 0.8}) for i in range(40))
        (tmp_path / "prompts.jsonl").write_text(prompts)
        data, notes = measure(new_folder(path), tmp_path)
    assert any(
        note.startswith("segment one: Measured at temperature 0, but the source asks for 0.8")
        for note in notes
    )
    stored = data.provenance["prompt_notes"]
    assert len(stored["one"]) == 1
    assert stored["two"] == []


def test_a_trial_that_is_all_beginning_and_end_is_noted(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        loads = "concurrency = [2, 4]\nrequests = [4, 7]\nrepeats = 1\nnoise_floor = false"
        _, notes = measure(
            new_folder(write_study(tmp_path, baseline.url, draft.url, loads)), tmp_path
        )
    assert [note.split(":")[0] for note in notes if "fewer than two requests" in note] == ["c4"]


def test_prompts_that_changed_between_sittings_are_refused(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        with pytest.raises(StoppedError):
            measure(folder, tmp_path, stop=lambda: True)
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "other"}\n{"prompt": "more"}\n')
        with pytest.raises(StoreError, match="prompts of segment one, two changed"):
            measure(StudyFolder.open(folder.path), tmp_path)


def test_a_server_of_another_version_cannot_continue_a_study(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        with pytest.raises(StoppedError):
            measure(folder, tmp_path, stop=lambda: True)
        draft.version = "0.33.0"
        with pytest.raises(
            InputError, match=r"measured on vLLM 0\.32\.0 so far and now runs 0\.33"
        ):
            measure(StudyFolder.open(folder.path), tmp_path)


def test_the_gauges_are_sampled(tmp_path: Path) -> None:
    load = "concurrency = [2]\nrequests = 6\nrepeats = 1\nnoise_floor = false"
    with FakeVllm(step_s=lambda _: 0.04) as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        path = write_study(tmp_path, baseline.url, draft.url, load)
        data, _ = measure(new_folder(path), tmp_path)
    samples = [g for t in data.trials for part in t.parts for g in part.gauges]
    assert any(sample.running == 2 for sample in samples)
    assert all(sample.waiting is None for sample in samples), "absent is not zero"


def test_variants_of_a_segment_are_sent_its_very_prompts(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        path = write_study(tmp_path, baseline.url, draft.url, SHORT)
        text = path.read_text()
        design = parse_study(text, name="s", experiment="temperature", temperatures=(0.0, 0.4))
        folder = StudyFolder.create(tmp_path / "sweep", design, describe_here(), text)
        data, _ = measure(folder, tmp_path)
        sent = baseline.bodies
    by_workload = {t.trial.workload: prompts_of(t) for t in data.trials}
    assert by_workload["one"] == by_workload["one-t0.4"]
    assert by_workload["two"] == by_workload["two-t0"] == by_workload["two-t0.4"]
    assert by_workload["one"] != by_workload["two"]
    temperatures = {t.trial.workload: {r.temperature for r in t.records} for t in data.trials}
    assert temperatures["two-t0.4"] == {0.4}
    assert {r.segment for t in data.trials for r in t.records} == {s.name for s in design.segments}
    assert {body["temperature"] for body in sent} == {0.0, 0.4, 0.8}
    assert set(data.provenance["prompts"]) == {"one", "two"}


def test_trials_that_need_not_run_are_recorded_and_the_study_is_finished(tmp_path: Path) -> None:
    asked: list[int] = []

    def skip(study: StudyData) -> dict[str, str]:
        asked.append(len(study.trials))
        if not study.trials:
            return {}
        return {t.trial_id: "clear" for t in study.design.trials if t.load.value == 4}

    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        load = "concurrency = [1, 2, 4]\nrequests = 2\nrepeats = 1\nproduction = 2"
        path = write_study(tmp_path, baseline.url, draft.url, load)
        text = path.read_text()
        design = parse_study(text, name="s", experiment="ladder")
        folder = StudyFolder.create(tmp_path / "climb", design, describe_here(), text)
        notes: list[str] = []
        listener = Listener(note=notes.append)
        conduct(folder, base=tmp_path, listener=listener, stop=lambda: False, skip=skip)
    assert asked == [0, 3], "before each load that is left, with what was measured so far"
    assert "skipping c4 (3 trials): clear" in notes
    study = read_study(folder.path)
    assert {t.trial.load.value for t in study.trials} == {1, 2}
    assert set(study.skipped.values()) == {"clear"}
    # The servers are gone: nothing is left to do, and nothing is asked.
    again: list[str] = []
    reopened = StudyFolder.open(folder.path)
    conduct(reopened, base=tmp_path, listener=Listener(note=again.append), stop=lambda: True)
    assert again == ["every trial is measured already"]


def test_a_trial_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = StudyFolder.read_trial

    def count(folder: StudyFolder, trial: Trial) -> MeasuredTrial:
        read.append(trial.trial_id)
        return original(folder, trial)

    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        finished: list[MeasuredTrial] = []
        monkeypatch.setattr(StudyFolder, "read_trial", count)
        listener = Listener(trial_finished=lambda measured, _: finished.append(measured))
        conduct(folder, base=tmp_path, listener=listener, stop=lambda: False)
    assert read == [trial.trial_id for trial in folder.design.trials]
    assert tuple(finished) == read_study(folder.path).trials


def test_what_the_server_and_its_gpu_say_beside_the_latencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(server: FakeVllm) -> str:
        answered = len(server.bodies)
        return (
            "# TYPE vllm:num_requests_waiting gauge\n"
            f"vllm:num_requests_waiting {answered % 4}\n"
            "# TYPE vllm:num_preemptions counter\n"
            f"vllm:num_preemptions_total {answered}\n"
            "# TYPE vllm:request_queue_time_seconds histogram\n"
            f'vllm:request_queue_time_seconds_bucket{{le="+Inf"}} {answered}\n'
            f"vllm:request_queue_time_seconds_count {answered}\n"
            f"vllm:request_queue_time_seconds_sum {0.25 * answered}\n"
        )

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu(utilisation_percent=(75,))))
    monkeypatch.setattr("specwise.measurement.gpu.SAMPLE_PERIOD_S", 0.05)
    load = "concurrency = [2]\nrequests = 6\nrepeats = 1\nnoise_floor = false"
    with (
        FakeVllm(step_s=lambda _: 0.006, more_metrics=more) as baseline,
        FakeVllm(step_s=lambda _: 0.006, conditional=(0.5, 0.5)) as draft,
    ):
        data, _ = measure(
            new_folder(write_study(tmp_path, baseline.url, draft.url, load)), tmp_path
        )
    summaries = {s.arm: s for s in summarise(data) if s.workload == "one"}
    assert summaries["baseline"].preemptions == 6
    assert summaries["baseline"].queue_mean_s == pytest.approx(0.25)
    assert summaries["draft"].queue_mean_s is None, "absent is not zero"
    for summary in summaries.values():
        (gpu,) = summary.gpus
        assert (gpu.utilisation_mean, gpu.memory_used_max_bytes) == (0.75, 10 * 2**30)


def scripted(
    folder: StudyFolder, order: list[str], seen: list[StudyData] | None = None
) -> Callable[[StudyData, Collection[str]], Choice]:
    """Chooses the trials in ``order``, then skips the rest."""

    def choose(study: StudyData, _: Collection[str]) -> Choice:
        assert study == folder.read(), "what is kept in memory is what the folder holds"
        if seen is not None:
            seen.append(study)
        over = {t.trial.trial_id for t in study.trials if t.complete} | set(study.skipped)
        left = [trial_id for trial_id in order if trial_id not in over]
        if left:
            return Choice(left[0], f"number {order.index(left[0])}", 0.1, to_go_s=3.0)
        rest = {t.trial_id: "clear" for t in study.design.trials if t.trial_id not in over}
        return Choice(None, "all is clear", skip=rest)

    return choose


def conduct_chosen(
    folder: StudyFolder,
    order: list[str],
    seen: list[StudyData] | None = None,
    listener: Listener = Listener(),  # noqa: B008 - frozen
    stop: Callable[[], bool] = lambda: False,
) -> None:
    conduct(
        folder,
        base=folder.path.parent,
        listener=listener,
        stop=stop,
        choose=scripted(folder, order, seen),
        resume_command="specwise tune --resume here",
    )


def test_chosen_trials_run_in_the_order_they_are_chosen_and_the_journal_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, CLOSED))
        ids = [trial.trial_id for trial in folder.design.trials]
        order = [ids[5], ids[0], ids[9]]
        seen: list[StudyData] = []
        begun: list[tuple[str, Progress]] = []
        ended: list[MeasuredTrial] = []
        listener = Listener(
            trial_started=lambda trial, progress: begun.append((trial.trial_id, progress)),
            trial_finished=lambda measured, _: ended.append(measured),
        )
        conduct_chosen(folder, order, seen, listener)
    assert begun == [(trial_id, Progress(n, None, 3.0)) for n, trial_id in enumerate(order)]
    assert [len(study.trials) for study in seen] == [0, 1, 2, 3]
    study = read_study(folder.path)
    assert {t.trial.trial_id for t in study.trials} == set(order)
    assert {t.trial.trial_id: t for t in ended} == {t.trial.trial_id: t for t in study.trials}
    assert study.skipped == dict.fromkeys(set(ids) - set(order), "clear")
    picks = StudyFolder.open(folder.path).picks()
    assert [(p.trial_id, p.reason, p.regret_bound) for p in picks] == [
        (trial_id, f"number {n}", 0.1) for n, trial_id in enumerate(order)
    ]
    took_s = {t.trial.trial_id: t.parts[0].duration_s for t in study.trials}
    assert all(p.seconds > took_s[p.trial_id] for p in picks), "with its warm-up"
    assert all((p.started_server, p.start_s) == (False, 0.0) for p in picks), "servers by url"
    # The servers are gone: a tuning that is over asks nothing, neither of them nor of the chooser.
    monkeypatch.setattr("specwise.measurement.study._measure_chosen", None)
    conduct_chosen(StudyFolder.open(folder.path), order)


def test_a_trial_that_was_measured_is_parsed_once_however_many_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = StudyFolder.read_trial

    def count(folder: StudyFolder, trial: Trial) -> MeasuredTrial:
        read.append(trial.trial_id)
        return original(folder, trial)

    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        ids = [trial.trial_id for trial in folder.design.trials]
        monkeypatch.setattr(StudyFolder, "read_trial", count)
        asked = iter(ids)
        conduct(
            folder,
            base=tmp_path,
            listener=Listener(),
            stop=lambda: False,
            choose=lambda *_: Choice(next(asked, None), "next"),
        )
    assert sorted(read) == sorted(2 * ids), "at the beginning, and before it runs"


KILLED = """
import sys
from pathlib import Path
from tests.measurement.test_study import conduct_chosen
from specwise.measurement.store import StudyFolder
conduct_chosen(StudyFolder.open(Path(sys.argv[1])), sys.argv[2:])
"""


def test_a_tuning_that_was_killed_finishes_the_trial_it_was_at_first(tmp_path: Path) -> None:
    slow = FakeVllm(step_s=lambda _: 0.02, conditional=(0.5, 0.5))
    with FakeVllm() as baseline, slow as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        trials = folder.design.trials
        first = next(t for t in trials if t.arm == "baseline")
        second = next(t for t in trials if t.arm == "draft")
        third = next(t for t in trials if t.arm == "baseline" and t != first)
        order = [t.trial_id for t in (first, second, third)]
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder.path), *order])
        records = folder.trial_folder(second) / "requests.jsonl"
        deadline = time.monotonic() + 30
        while not (records.exists() and records.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None and time.monotonic() < deadline  # noqa: PT018
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert [p.trial_id for p in folder.picks()] == order[:1]
        (half,) = [t for t in folder.read().trials if not t.complete]
        ran_s = max(r.finished_s for r in half.records)
        # As if it had been killed in the moment between the end of the first trial and its line.
        (folder.path / "picks.jsonl").write_bytes(b'{"trial_id": "')
        begun: list[str] = []
        listener = Listener(trial_started=lambda trial, _: begun.append(trial.trial_id))
        conduct_chosen(StudyFolder.open(folder.path), order, listener=listener)
    assert begun == order[1:]
    picks = {p.trial_id: p for p in StudyFolder.open(folder.path).picks()}
    assert list(picks) == order
    assert [p.reason for p in picks.values()] == ["it was interrupted"] * 2 + ["number 2"]
    assert [p.regret_bound for p in picks.values()] == [None, None, 0.1]
    study = read_study(folder.path)
    resumed = next(t for t in study.trials if t.trial == second)
    assert set(half.records) <= set(resumed.records)
    assert picks[order[1]].seconds > ran_s + resumed.parts[-1].duration_s
    finished = next(t for t in study.trials if t.trial == first)
    assert picks[order[0]].seconds == pytest.approx(finished.parts[0].duration_s)


def test_a_tuning_that_is_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        order = [trial.trial_id for trial in folder.design.trials]
        with pytest.raises(StoppedError, match="`specwise tune --resume here`"):
            conduct_chosen(folder, order, stop=lambda: bool(folder.picks()))
        assert [p.trial_id for p in folder.picks()] == order[:1]


def test_an_arm_whose_server_refuses_is_given_up_but_not_the_baseline(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5), fail_status=400) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        by_arm = {t.arm: t.trial_id for t in folder.design.trials}
        notes: list[str] = []
        listener = Listener(note=notes.append)
        conduct_chosen(folder, [by_arm["draft"], by_arm["baseline"]], listener=listener)
        study = read_study(folder.path)
        reason = study.skipped[by_arm["draft"]]
        assert "the server of arm draft failed" in reason
        assert "refuses every warm-up request: HTTP 400" in reason
        assert [p.reason for p in folder.picks()] == [reason, "number 1"]
        assert [t.trial.trial_id for t in study.trials] == [by_arm["baseline"]]
        assert any(note.startswith("arm draft is given up") for note in notes)

        baseline.fail_status = 400
        (tmp_path / "again").mkdir()
        folder = new_folder(write_study(tmp_path / "again", baseline.url, draft.url, SHORT))
        with pytest.raises(ServerError, match="refuses every warm-up"):
            conduct_chosen(folder, [by_arm["baseline"]])


def test_a_trial_cannot_be_chosen_twice(tmp_path: Path) -> None:
    with FakeVllm() as baseline, FakeVllm(conditional=(0.5, 0.5)) as draft:
        folder = new_folder(write_study(tmp_path, baseline.url, draft.url, SHORT))
        same = Choice(folder.design.trials[0].trial_id, "again")
        with pytest.raises(ValueError, match="it is over"):
            conduct(
                folder,
                base=tmp_path,
                listener=Listener(),
                stop=lambda: False,
                choose=lambda *_: same,
            )


def test_the_search_of_a_tuning_is_not_measured_to_its_end_by_mistake(tmp_path: Path) -> None:
    design = parse_study(bundled_study("tune"), name="tune", version_of=lambda _: "0.32.0")
    folder = StudyFolder.create(tmp_path / "tuning" / "search", design, describe_here(), "")
    trial = design.trials[0]
    folder.note_pick(PickRecord(trial.trial_id, "first", 0.2, False, 0.0, 1.0))
    with pytest.raises(InputError, match=f"specwise tune --resume {tmp_path / 'tuning'}`"):
        measure(folder, tmp_path)
