"""The command as a process: it serves, counts, records, and stops on a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from tests.scripted_server import Script, ScriptedServer

from specwise.cli.tap import ask_for_realtime, tap
from specwise.domain import Outcome
from specwise.monitoring.tap_records import read_records

SPECULATION = {
    "num_draft_tokens": 12,
    "num_accepted_draft_tokens": 8,
    "num_spec_steps": 4,
    "acceptance_histogram": [1, 0, 1, 2],
}


def test_it_serves_counts_records_and_stops(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nsegment = "warm"\ntemperature = [0.5, 2]\n')
    records = tmp_path / "records"
    with ScriptedServer(Script(speculation=SPECULATION)) as server:
        command = [sys.executable, "-m", "specwise.cli.main", "tap", "--upstream", server.url]
        command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        command += ["--rules", str(rules), "--records", str(records)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            metrics_url = re.findall(r"http://\S+", process.stderr.readline())[0]
            url = re.findall(r"http://\S+", process.stderr.readline())[0]
            secret = {"Authorization": "Bearer sk-very-secret"}
            body = {"model": "m", "prompt": "hidden words", "stream": True, "temperature": 0.7}
            answer = httpx.post(url + "/v1/completions", json=body, headers=secret)
            assert "[DONE]" in answer.text
            text = httpx.get(metrics_url).text
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.communicate()
    labels = 'segment="warm",temperature="0.5-0.7"'
    assert f"specwise_tap_draft_tokens_total{{{labels}}} 12.0" in text
    assert f'specwise_tap_acceptance_rate_bucket{{le="0.7",{labels}}} 1.0' in text
    (record,) = read_records(records)
    assert (record.segment, record.outcome, record.rate) == ("warm", Outcome.OK, 8 / 12)
    stored = b"".join(path.read_bytes() for path in records.iterdir())
    assert b"secret" not in stored
    assert b"hidden" not in stored


def test_realtime_is_asked_for_or_its_refusal_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "sched_setscheduler", lambda pid, how, to: asked.append((pid, how, to.sched_priority))
    )
    ask_for_realtime()
    assert asked == [(0, os.SCHED_RR, 1)]
    assert capsys.readouterr().err == ""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    ask_for_realtime()
    assert "CAP_SYS_NICE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--upstream", "127.0.0.1:8000"],
        ["--upstream", "http://127.0.0.1:1", "--metrics-listen", "here"],
        ["--upstream", "http://127.0.0.1:1", "--rules", "/nonexistent.toml"],
    ],
)
def test_wrong_options_end_with_one_clear_error(options: list[str]) -> None:
    ran = CliRunner().invoke(tap, options)
    assert ran.exit_code != 0
    assert getattr(ran.exception, "exit_code", None) == 2
