"""specwise against servers whose truth is known: does it find what was put in?"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specwise.decision.assessment import assess
from specwise.decision.verdict import Decision
from specwise.domain import ClientHealth, Outcome, StudyData
from specwise.measurement.design import parse_study
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder, read_study
from specwise.measurement.study import Listener, conduct
from specwise.prediction.simulation import SimRequest, simulate
from specwise.prediction.truth import parse_truth

TRUTH = """
[costs]
target_pass_ms = 8
token_us = 150
draft_pass_ms = 0.8
[[segment]]
name = "easy"
match = "easy"
[[segment]]
name = "hard"
[[server]]
name = "baseline"
[[server]]
name = "draft"
speculation = { method = "draft_model", k = 3 }
[server.acceptance]
easy = 0.9
hard = 0.05
"""
STUDY = """
name = "known-truth"
[[arm]]
name = "baseline"
url = "{baseline}"
[[arm]]
name = "draft"
url = "{draft}"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[segment]]
name = "easy"
prompts = "easy.jsonl"
max_tokens = 24
[[segment]]
name = "hard"
prompts = "hard.jsonl"
max_tokens = 24
[load]
concurrency = [4]
requests = 8
repeats = 3
warmup = 0
production_workload = "{production}"
"""


LAG_S: dict[str, float] = {}  # how late the twins were, by their own account


@contextmanager
def twins(truth: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """The command in a process of its own; what it said about its servers."""
    command = [sys.executable, "-m", "specwise.cli.main", "twin", str(truth), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        LAG_S.update({name: told["lag_p99_s"] for name, told in json.loads(out).items()})
    finally:
        process.kill()
        process.communicate()


def without_client(study: StudyData) -> StudyData:
    """As if the load generator had a machine of its own, which a machine that runs tests is not."""
    healthy = ClientHealth(0.0, 0.0, 0.0, 0.0)
    trials = tuple(
        replace(t, parts=tuple(replace(part, client=healthy) for part in t.parts))
        for t in study.trials
    )
    return replace(study, trials=trials)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    base = tmp_path_factory.mktemp("known-truth")
    for segment in ("easy", "hard"):
        lines = [f'{{"prompt": "{segment} number {i}"}}\n' for i in range(64)]
        (base / f"{segment}.jsonl").write_text("".join(lines))
    (base / "truth.toml").write_text(TRUTH)
    with twins(base / "truth.toml") as servers:
        urls = {name: server["url"] for name, server in servers.items()}
        text = STUDY.format(**urls, production="easy")
        folder = StudyFolder.create(
            base / "study", parse_study(text, name="study"), describe_here(), text
        )
        conduct(folder, base=base, listener=Listener(), stop=lambda: False)
    return without_client(read_study(folder.path))


def expected_times_s(segment: str) -> list[float]:
    """Mean end-to-end time of each server: the same requests through the simulated engine."""
    times_s = []
    for truth in parse_truth(TRUTH, name="truth"):
        request = SimRequest(5, 24, acceptance=truth.acceptance_of(segment, 0.0))
        run = simulate(
            [request] * 400,
            truth.costs,
            truth.config,
            rng=np.random.default_rng(1),
            concurrency=4,
        )
        times_s.append(float((run.finished_s - run.arrival_s).mean()))
    return times_s


def test_acceptance_and_speedup_are_those_of_the_truth(measured: StudyData) -> None:
    records = [r for t in measured.trials for r in t.records]
    assert {r.outcome for r in records} == {Outcome.OK}
    assessment = assess(measured)
    for segment, truth in (("easy", 0.9), ("hard", 0.05)):
        (found,) = [a for a in assessment.acceptance if a.workload == segment and a.arm == "draft"]
        for position in range(3):
            reached = found.steps * truth**position
            if reached > 30:
                tolerance = 4 * np.sqrt(truth * (1 - truth) / reached)
                assert found.conditional[position] == pytest.approx(truth, abs=tolerance)
        (speedup,) = [
            e for e in assessment.effects if e.metric == "speedup" and e.workload == segment
        ]
        baseline_s, draft_s = expected_times_s(segment)
        late_s = 2 * max(LAG_S.values())  # here and at the client, on a machine that runs tests
        assert speedup.ratio > 0.9 * baseline_s / (draft_s + late_s)
        assert speedup.ratio < 1.1 * (baseline_s + late_s) / draft_s


def test_the_verdict_is_the_truths(measured: StudyData) -> None:
    assessment = assess(measured)
    assert assessment.verdict.decision is Decision.ON
    segments = {s.segment: s.decision for s in assessment.verdict.segments}
    assert segments["hard"] is Decision.OFF
