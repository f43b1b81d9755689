"""The whole job on the real engine: start, measure, decide, report."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from specwise.analysis.latency import summarise
from specwise.cli.main import main
from specwise.domain import AcceptanceSource, Outcome
from specwise.measurement.store import read_study

STUDY = """
name = "real"
seed = 1
[serve]
model = "bundled:target-unpadded"
arguments = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8"]
[[arm]]
name = "baseline"
environment = {{ VLLM_CPU_OMP_THREADS_BIND = "{first}" }}
[[arm]]
name = "draft_model"
environment = {{ VLLM_CPU_OMP_THREADS_BIND = "{last}" }}
speculation = {{ method = "draft_model", k = 3, draft = "bundled:draft" }}
[[segment]]
name = "json"
prompts = "bundled:json"
max_tokens = 32
[[segment]]
name = "prose"
prompts = "bundled:prose"
temperature = 0.8
max_tokens = 32
[[workload]]
name = "mix"
shares = {{ json = 1, prose = 1 }}
[load]
concurrency = [1, 4]
requests = [4, 12]
repeats = 1
warmup = 1
"""


def leave(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_measure_decide_report(
    engine_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine_python.exists()
    cores = sorted(os.sched_getaffinity(0))  # one each: they start in two thirds of the time
    text = STUDY.format(first=cores[0], last=cores[-1])
    (tmp_path / "study.toml").write_text(text)
    folder = tmp_path / "study"
    assert leave("measure", str(tmp_path / "study.toml"), "--out", str(folder)) == 0

    study = read_study(folder)
    assert all(trial.complete for trial in study.trials)
    records = [r for t in study.trials for r in t.records]
    assert {r.outcome for r in records} == {Outcome.OK}
    drafted = [t for t in study.trials if t.trial.arm == "draft_model"]
    for trial in drafted:
        acceptance = [r.acceptance for r in trial.records if r.acceptance]
        assert {a.source for a in acceptance} == {AcceptanceSource.PER_REQUEST}
        (part,) = trial.parts
        # The server's own counters and the responses tell the same story, to the token.
        assert part.counters["spec_accepted_tokens"] == sum(a.accepted_tokens for a in acceptance)
        assert part.counters["generation_tokens"] == sum(
            r.output_tokens or 0 for r in trial.records
        )
        assert part.counters["prefix_cache_hits"] == 0, "a trial must not warm another's cache"

    # In float32 greedy outputs of the two arms are the same text.
    def outputs(arm: str) -> dict[tuple[str, str], str | None]:
        return {
            (t.trial.load.label, r.prompt_id): r.output_sha256
            for t in study.trials
            if (t.trial.arm, t.trial.workload, t.trial.purpose) == (arm, "json", "measure")
            for r in t.records
        }

    assert outputs("baseline") == outputs("draft_model")

    # What the server says of itself stands beside the latencies, for every arm (req: G4).
    for summary in summarise(study):
        if summary.segment is None:
            assert summary.queue_mean_s is not None
            assert (summary.preemptions, summary.prefix_hit_rate) == (0, 0)
            assert summary.gpus or summary.gpu_note

    arms = study.provenance["arms"]
    assert arms["baseline"]["vllm"] == arms["draft_model"]["vllm"]
    assert "--speculative-config" in arms["draft_model"]["command"]

    capsys.readouterr()
    assert leave("decide", str(folder)) in (0, 1, 3)
    assert "json" in capsys.readouterr().out
    assert leave("report", str(folder), "--records", "csv") == 0
    assert (folder / "report.html").stat().st_size > 50_000
    assert len((folder / "records.csv").read_text().splitlines()) == 1 + len(records)

    for arm in arms.values():
        port = int(arm["command"][arm["command"].index("--port") + 1])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
