"""Servers that specwise starts itself, as real processes of a stand-in for vLLM."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from tests.stand_in_engine import install

from specwise.domain import Arm, Outcome, Purpose, Speculation, StudyData
from specwise.errors import InputError
from specwise.measurement.design import parse_study
from specwise.measurement.fleet import Fleet, api_headers, resolve_model
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder, read_study
from specwise.measurement.study import Choice, Listener, conduct
from specwise.vllm.server import Server

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
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this Python one with a package called vllm; returns the folder for a study."""
    install(
        tmp_path,
        monkeypatch,
        before='if k == 5: sys.exit("ValueError: 5 drafts are more than this model takes")',
        conditional="(0.5, 0.5) if k else ()",
        step_s="0.01",
    )
    return tmp_path


def new_study(engine: Path, together: bool, tune: str = "") -> StudyFolder:
    text = STUDY.format(
        model=engine / "model", python=sys.executable, together=str(together).lower()
    )
    design = parse_study(
        text + tune,
        name="study.toml",
        experiment="tune" if tune else None,
        version_of=lambda _: "0.32.0",
    )
    return StudyFolder.create(engine / "study", design, describe_here(), text)


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


@pytest.mark.parametrize("together", [True, False])
def test_a_server_that_dies_is_started_again_and_nothing_is_left_running(
    engine: Path, together: bool
) -> None:
    folder = new_study(engine, together)
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


def test_a_server_that_dies_as_it_is_resumed_is_started_again(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was alive when it was last looked at, so only waiting for it shows its death."""
    resume, died = Server.resume, list[int]()

    def die_first(server: Server, timeout_s: float = 60.0) -> None:
        if not died:
            died.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)
        resume(server, timeout_s)

    monkeypatch.setattr(Server, "resume", die_first)
    folder, notes = new_study(engine, together=True), list[str]()
    draft = folder.design.arm("draft")
    with fleet_of(folder, None, notes) as fleet:
        fleet.ready(draft)
        fleet.ready(folder.design.arms[0])
        fleet.ready(draft)
        (pid,) = servers_of(folder, "--speculative-config")
        assert died != [pid]
    assert sum("starting the server of arm draft" in note for note in notes) == 2
    assert servers_of(folder, "") == []


TUNE = """
[tune]
k = [1, 2, 4]
repeats = 1
idle = false
"""


def fleet_of(folder: StudyFolder, most_servers: int | None, notes: list[str]) -> Fleet:
    return Fleet(
        folder.design,
        known={},
        log_path=folder.log_path,
        on_described=lambda _: None,
        note=notes.append,
        most_servers=most_servers,
    )


def test_servers_start_when_needed_and_the_one_used_longest_ago_makes_room(engine: Path) -> None:
    folder, notes = new_study(engine, together=True, tune=TUNE), list[str]()
    arm = folder.design.arm
    with fleet_of(folder, 3, notes) as fleet:
        assert (fleet.running, servers_of(folder, ""), fleet.start_s) == (frozenset(), [], {})
        for name in ("baseline", "draft-k1", "draft-k2", "draft-k1"):
            assert fleet.ready(arm(name)).speculative is (name != "baseline")
        assert fleet.running == {"baseline", "draft-k1", "draft-k2"}
        fleet.ready(arm("draft-k4"))
        assert fleet.running == {"baseline", "draft-k1", "draft-k4"}, "not the baseline"
        assert len(servers_of(folder, "")) == 3
        assert min(fleet.start_s.values()) > 0
        fleet.retire("draft-k1")
        fleet.retire("draft-k2")  # has none any more
        assert fleet.running == {"baseline", "draft-k4"}
        for pid in servers_of(folder, '"num_speculative_tokens":4'):
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: fleet.running == {"baseline"}), "one that died is not up"
    assert fleet.running == frozenset()
    assert servers_of(folder, "") == []
    assert [n.split()[0] for n in notes].count("starting") == 4


def test_one_at_a_time_only_one_is_up(engine: Path) -> None:
    folder = new_study(engine, together=False, tune=TUNE)
    with fleet_of(folder, 3, []) as fleet:
        for name in ("baseline", "draft-k1"):
            fleet.ready(folder.design.arm(name))
            assert fleet.running == {name}
            assert len(servers_of(folder, "")) == 1


def test_an_arm_whose_server_dies_at_the_start_is_given_up_and_the_tuning_goes_on(
    engine: Path,
) -> None:
    folder = new_study(engine, together=True, tune=TUNE.replace("4", "5"))
    assert [arm.name for arm in folder.design.arms][-1] == "draft-k5"
    seen: list[frozenset[str]] = []
    asked = ["draft-k1", "baseline", "draft-k5", "draft-k2"]

    def choose(study: StudyData, running: Collection[str]) -> Choice:
        seen.append(frozenset(running))
        if not asked:
            left = [t.trial_id for t in study.design.trials if t.purpose is Purpose.NOISE_FLOOR]
            return Choice(None, "all seen", skip=dict.fromkeys(left, "all seen"))
        arm = asked.pop(0)
        trial = next(t for t in study.design.trials if t.arm == arm)
        return Choice(trial.trial_id, f"to see {arm}", 0.1)

    base, notes = folder.path.parent, list[str]()
    listener = Listener(note=notes.append)
    conduct(folder, base=base, listener=listener, stop=lambda: False, choose=choose)
    study = read_study(folder.path)
    ran = {t.trial.arm for t in study.trials if t.complete}
    assert ran == {"baseline", "draft-k1", "draft-k2"}
    (lost,) = [t.trial_id for t in study.design.trials if t.arm == "draft-k5"]
    assert "5 drafts are more than this model takes" in study.skipped[lost]
    assert seen[0] == frozenset(), "no server before one is needed"
    assert seen[-1] == {"baseline", "draft-k2"}, "two at once, as any engine but the embedded one"
    picks = folder.picks()
    assert [p.reason.split(":")[0] for p in picks] == [
        "to see draft-k1",
        "to see baseline",
        "the server of arm draft-k5 failed",
        "to see draft-k2",
    ]
    assert all(p.started_server and p.start_s > 0 for p in picks)
    assert all(p.seconds > 0 for p in picks if "failed" not in p.reason)
    assert any("arm draft-k5 is given up" in note for note in notes)
    assert servers_of(folder, "") == []


def wait_until(holds: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


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
