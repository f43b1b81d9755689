"""Servers that specwise starts itself, as real processes of a stand-in for vLLM."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from specwise.domain import Arm, Outcome, Speculation
from specwise.errors import InputError
from specwise.measurement.design import parse_study
from specwise.measurement.fleet import api_headers, resolve_model
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder, read_study
from specwise.measurement.study import Listener, conduct

ENTRY_POINT = """
import argparse, signal, sys, time
sys.path.insert(0, {root!r})
from tests.fake_vllm import FakeVllm
options = argparse.ArgumentParser()
for name in ("--port", "--model", "--served-model-name", "--speculative-config"):
    options.add_argument(name)
asked, _ = options.parse_known_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
drafts = (0.5, 0.5) if asked.speculative_config else ()
with FakeVllm(
    port=int(asked.port), model=asked.served_model_name, conditional=drafts,
    step_s=lambda _: 0.01,
):
    time.sleep(600)
"""

STUDY = """
name = "started"
[serve]
model = "{model}"
engine = "{python}"
together = {together}
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = {{ method = "ngram", k = 2 }}
[[segment]]
name = "one"
prompts = "prompts.jsonl"
max_tokens = 10
[load]
concurrency = [2]
requests = 10
repeats = 1
noise_floor = false
warmup = 1
"""


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> StudyFolder:
    """A new study whose engine is this Python with a package called vllm on its path."""
    package = tmp_path / "engine" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(ENTRY_POINT.format(root=str(Path(__file__).parents[2])))
    info = tmp_path / "engine" / "vllm-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "engine"))
    (tmp_path / "model").mkdir()
    prompts = [json.dumps({"prompt": f"say {i} words"}) for i in range(60)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    text = STUDY.format(
        model=tmp_path / "model", python=sys.executable, together=str(request.param).lower()
    )
    design = parse_study(text, name="study.toml")
    return StudyFolder.create(tmp_path / "study", design, describe_here(), text)


def servers_of(folder: StudyFolder, word: str) -> list[int]:
    """Process ids of this study's servers whose command line holds ``word``."""
    model = str(folder.path.parent / "model").encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if model in line and word.encode() in line:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("folder", [True, False], indirect=True)
def test_a_server_that_dies_is_started_again_and_nothing_is_left_running(
    folder: StudyFolder,
) -> None:
    notes: list[str] = []
    killed: list[int] = []
    draft = next(t for t in folder.design.trials if t.arm == "draft")

    def stop() -> bool:
        if not killed and len(folder.read_trial(draft).records) >= 3:
            killed.extend(servers_of(folder, "--speculative-config"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return False

    base = folder.path.parent
    conduct(folder, base=base, listener=Listener(note=notes.append), stop=stop)

    assert len(killed) == 1
    assert sum("starting the server of arm draft" in note for note in notes) == 2
    assert any("the server went away" in note for note in notes)
    study = read_study(folder.path)
    assert all(t.complete and len(t.records) == 10 for t in study.trials)
    failed = [r for t in study.trials for r in t.records if r.outcome is not Outcome.OK]
    assert len(failed) <= 4, "the two in flight, and what was sent while it died"
    assert study.provenance["arms"]["draft"]["vllm"] == "0.32.0"
    assert servers_of(folder, "") == []


def test_bundled_models_resolve_and_unknown_ones_are_named() -> None:
    assert resolve_model("org/model") == "org/model"
    assert Path(resolve_model("bundled:draft"), "config.json").exists()
    with pytest.raises(InputError, match="no bundled model 'nonsense'"):
        resolve_model("bundled:nonsense")


def test_the_api_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = Arm("a", Speculation("ngram", 1), url="http://x", api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "v")
    assert api_headers(arm) == {"Authorization": "Bearer v"}
    monkeypatch.setenv("SOME_KEY", "")
    with pytest.raises(InputError, match="SOME_KEY, which is not set"):
        api_headers(arm)
