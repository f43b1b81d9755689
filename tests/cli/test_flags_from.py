"""What `specwise flags --from` makes of each verdict, on each kind of arm."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.analysis.synthetic import C1, C16, demo_design, demo_study
from tests.cli.study_folders import write_study

from specwise.cli.flags_from import (
    Choice,
    argument_flags,
    choose,
    served,
)
from specwise.cli.main import specwise
from specwise.cli.studies import read_assessment, with_recommendation
from specwise.decision.assessment import Assessment, assess
from specwise.decision.deployment import Recommendation
from specwise.decision.schedule import ScheduleProposal
from specwise.decision.verdict import Decision
from specwise.domain import Arm, Deployment, Speculation, StudyData
from specwise.errors import CommandError, InputError, MeasurementError, StoreError
from specwise.vllm.command import ServeCommand, Version, read_command, read_yaml

DEPLOYMENT = Deployment(
    model="meta/Target-70B",
    engine="/opt/vllm/bin/python",
    served_name="chat",
    arguments=(
        "-tp", "2", "--max-model-len", "4096", "--some-new-flag", "a", "b",
        "--middleware", "one", "--middleware", "two", "--api-key", "sk-verysecret",
    ),
    environment={"NCCL_P2P_DISABLE": "1", "HF_TOKEN": "hf_verysecret"},
)  # fmt: skip
DRAFT = Speculation("draft_model", 4, "meta/Draft-1B", options={"draft_tensor_parallel_size": 1})
SCHEDULE = ((1, 4, 4), (5, 1024, 0))


def arms(*, given: bool) -> tuple[Arm, ...]:
    if given:
        baseline = Arm("baseline", url="http://10.0.0.1:8000")
        return baseline, Arm("draft_model", DRAFT, url="http://10.0.0.2:8000")
    return Arm("baseline", deployment=DEPLOYMENT), Arm("draft_model", DRAFT, DEPLOYMENT)


@cache
def study(verdict: str, *, given: bool = False) -> StudyData:
    """A study with that verdict: the demo's truth, seen from another production."""
    ours = arms(given=given)
    design = {
        "on": lambda: demo_design(arms=ours, production_workload="json", loads=(C1, C16)),
        "on-with-schedule": lambda: demo_design(arms=ours, loads=(C1, C16)),
        "off": lambda: demo_design(arms=ours, production_workload="prose", loads=(C16,)),
        "measure-more": lambda: demo_design(arms=ours, repeats=1, noise_floor=False, loads=(C16,)),
    }[verdict]()
    described = {arm.name: {"vllm": "0.32.0", "served_models": ["chat"]} for arm in ours}
    return replace(demo_study(design), provenance={"specwise": "test", "arms": described})


@cache
def assessed(verdict: str, *, given: bool = False) -> Assessment:
    return assess(study(verdict, given=given))


def command_of(verdict: str, *, version: str = "0.32.0") -> ServeCommand:
    found = served(study(verdict), choose(assessed(verdict)), version=Version.parse(version))
    assert found.checked is not None
    assert not found.checked.refused
    return found.checked.command


def run(*words: str) -> Result:
    return CliRunner().invoke(specwise, ["flags", *words])


def test_the_studies_here_have_the_verdicts_they_are_named_for() -> None:
    for verdict in ("on", "on-with-schedule", "off", "measure-more"):
        assert assessed(verdict).verdict.decision == verdict


# ---------------------------------------------------------------------- what is to be served


def test_on_is_the_arm_as_it_was_measured_with_its_own_arguments() -> None:
    command = command_of("on")
    assert command.model == "meta/Target-70B"
    assert command.speculation == {
        "method": "draft_model",
        "num_speculative_tokens": 4,
        "model": "meta/Draft-1B",
        "draft_tensor_parallel_size": 1,
    }
    assert command.get("--served-model-name") == "chat"
    assert command.get("--tensor-parallel-size") == "2"
    assert command.get("--max-model-len") == "4096"
    assert command.get("--per-request-spec-decode-metrics") == "summary"
    assert command.environment == (("NCCL_P2P_DISABLE", "1"),)


def test_arguments_that_specwise_does_not_know_are_passed_on() -> None:
    flags = command_of("on").flags
    values = [flag.values for flag in flags if flag.name in ("--some-new-flag", "--middleware")]
    assert values == [("a", "b"), ("one",), ("two",)]


def test_a_proposed_schedule_has_a_k_that_reaches_it_and_is_not_confirmed() -> None:
    assessment = assessed("on-with-schedule")
    proposed = assessment.verdict.schedule
    choice = choose(assessment)
    assert proposed is not None
    assert choice.speculation is not None
    assert choice.speculation.schedule == proposed.rows
    assert choice.speculation.k == max(k for _, _, k in proposed.rows)
    assert not choice.confirmed
    config = command_of("on-with-schedule").speculation or {}
    assert config["num_speculative_tokens_per_batch_size"] == [list(r) for r in proposed.rows]


def test_a_schedule_that_an_arm_ran_is_confirmed_and_keeps_the_arms_k() -> None:
    base = assessed("on")
    ran = replace(DRAFT, k=5, schedule=SCHEDULE)
    design = replace(
        base.study.design, arms=(arms(given=False)[0], Arm("draft_model", ran, DEPLOYMENT))
    )
    verdict = replace(
        base.verdict,
        decision=Decision.SCHEDULE,
        schedule=ScheduleProposal("draft_model", SCHEDULE, "measured", confirmed=True),
    )
    choice = choose(replace(base, study=replace(base.study, design=design), verdict=verdict))
    assert choice.confirmed
    assert choice.speculation == ran


def test_off_is_the_baselines_command() -> None:
    command = command_of("off")
    assert command.speculation is None
    assert command.get("--max-model-len") == "4096"
    assert not command.has("--per-request-spec-decode-metrics")  # vLLM would refuse it


def test_measure_more_is_an_error_with_the_next_trial_unless_an_arm_is_named() -> None:
    assessment = assessed("measure-more")
    with pytest.raises(MeasurementError) as caught:
        choose(assessment)
    assert caught.value.exit_code == 3
    assert assessment.verdict.next_trials[0].what in caught.value.next_step
    assert "--arm: baseline, draft_model" in caught.value.next_step
    forced = choose(assessment, arm="draft_model")
    assert forced.forced
    assert forced.speculation == DRAFT
    assert "measure-more" in forced.remark
    with pytest.raises(InputError, match="no arm 'draft'"):
        choose(assessment, arm="draft")


# ------------------------------------------------------------------------- versions, engines


def test_ngram_is_not_given_a_lookup_that_was_not_measured() -> None:
    """`specwise flags TARGET` chooses 2 to 4 tokens; the study measured vLLM's own."""
    arm = Arm("ngram", Speculation("ngram", 3), DEPLOYMENT)
    found = served(study("on"), Choice(arm, arm.speculation, ""), version=Version(0, 32))
    assert found.checked is not None
    assert found.checked.command.speculation == {"method": "ngram", "num_speculative_tokens": 3}


def test_the_studys_version_decides_unless_the_user_does() -> None:
    data = study("on")
    old = {"arms": {"draft_model": {"vllm": "0.25.1+cu128"}}}
    choice = choose(assessed("on"))
    found = served(replace(data, provenance=old), choice)
    assert found.version == Version(0, 25, 1)
    assert found.checked is not None
    assert not found.checked.command.has("--per-request-spec-decode-metrics")  # from 0.29 on
    for unknown in ({}, {"arms": {"draft_model": {"vllm": "main"}}}):
        found = served(replace(data, provenance=unknown), choice)
        assert "does not say its vLLM version" in found.remarks[0]


def test_a_version_without_schedules_is_refused_and_told_what_works() -> None:
    with pytest.raises(CommandError) as caught:
        command_of("on-with-schedule", version="0.20.0")
    assert "0.20.0 cannot change the draft length" in caught.value.what
    assert "0.24.0" in caught.value.next_step
    assert "--arm baseline" in caught.value.next_step


def test_a_schedule_that_lint_would_drop_is_refused() -> None:
    """Data parallelism: vLLM ignores the schedule and drafts k at every load."""
    choice = choose(assessed("on-with-schedule"))
    with pytest.raises(CommandError, match="cannot work here: A schedule with data parallelism"):
        served(study("on-with-schedule"), choice, further=["--data-parallel-size", "2"])


def test_the_embedded_engine_is_started_as_it_was_with_the_models_it_had() -> None:
    deployment = Deployment("bundled:target", arguments=("--dtype", "float32"))
    arm = Arm("draft_model", Speculation("draft_model", 3, "bundled:draft"), deployment)
    words = ["/cache/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    words += ["/cache/target", "--port", "1234", "--speculative-config", '{"model": "/pkg/draft"}']
    described = {"arms": {"draft_model": {"vllm": "0.32.0", "command": words}}}
    found = served(replace(study("on"), provenance=described), Choice(arm, arm.speculation, ""))
    assert found.checked is not None
    command = found.checked.command
    assert command.launcher == ("/cache/bin/python", "-m", "vllm.entrypoints.openai.api_server")
    assert command.model == "/cache/target"
    assert (command.speculation or {})["model"] == "/pkg/draft"
    assert command.get("--served-model-name") == "bundled:target"  # what clients ask for
    assert command.has("--enforce-eager")
    assert not command.has("--port")
    assert dict(command.environment)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    unknown = served(study("on"), Choice(arm, arm.speculation, ""), version=Version(0, 32))
    assert any("knows bundled:target and bundled:draft" in r for r in unknown.remarks)


def test_every_word_of_an_argument_stays_with_its_flag() -> None:
    flags = argument_flags(
        ["-tp=2", "--new", "-1", "x", "--enforce-eager", "--served_model_name=a"]
    )
    assert [(f.name, f.values) for f in flags] == [
        ("--tensor-parallel-size", ("2",)),
        ("--new", ("-1", "x")),
        ("--enforce-eager", ()),
        ("--served-model-name", ("a",)),
    ]
    with pytest.raises(InputError, match="belongs to no vLLM argument"):
        argument_flags(["x"])
    with pytest.raises(InputError, match="comes from the study"):
        argument_flags(["--speculative-config", "{}"])


# --------------------------------------------------------------------------- the command line


def test_the_command_goes_to_stdout_and_everything_said_to_stderr(tmp_path: Path) -> None:
    folder = str(write_study(tmp_path / "study", study("on")))
    done = run("--from", folder)
    assert done.exit_code == 0, done.output
    assert read_command(done.stdout).speculation == command_of("on").speculation
    assert "Turn speculation on" in done.stderr
    assert "--api-key" in done.stderr
    assert "HF_TOKEN" in done.stderr
    further = run("--from", folder, "--vllm", "0.33.0", "--", "--max-model-len", "8192")
    assert read_command(further.stdout).get("--max-model-len") == "8192"
    assert "verysecret" not in done.output + further.output
    for form, read in (("yaml", read_yaml), ("k8s", read_yaml)):
        said = run("--from", folder, "--format", form)
        assert read(said.stdout).speculation == command_of("on").speculation
        assert ("NCCL_P2P_DISABLE=1" in said.stderr) == (form == "yaml")
    answer = json.loads(run("--from", folder, "--json").stdout)
    assert answer["decision"] == "on"
    assert answer["arm"] == "draft_model"
    assert answer["words"][:3] == ["vllm", "serve", "meta/Target-70B"]


def test_measure_more_leaves_stdout_empty(tmp_path: Path) -> None:
    folder = str(write_study(tmp_path / "study", study("measure-more")))
    done = run("--from", folder)
    assert isinstance(done.exception, MeasurementError)
    assert done.stdout == ""
    forced = run("--from", folder, "--arm", "draft_model")
    assert forced.exit_code == 0
    assert "verdict is measure-more" in forced.stderr


def test_of_servers_known_by_address_the_speculative_flags_alone(tmp_path: Path) -> None:
    folder = str(write_study(tmp_path / "study", study("on", given=True)))
    done = run("--from", folder)
    words = [w for w in shlex.split(done.stdout, comments=True) if w.strip()]
    assert words[:2] == ["--per-request-spec-decode-metrics", "summary"]
    assert words[2] == "--speculative-config"
    assert json.loads(words[3]) == command_of("on").speculation
    assert "by its address only" in done.stderr
    assert run("--from", folder, "--format", "k8s").stdout.startswith("args:\n")
    answer = json.loads(run("--from", folder, "--json").stdout)
    assert not answer["complete"]
    off = run("--from", str(write_study(tmp_path / "off", study("off", given=True))))
    assert off.exit_code == 0
    assert off.stdout.startswith("#")
    assert off.stdout.count("\n") == 1


def test_a_tunings_answer_takes_the_place_of_its_confirmations_verdict() -> None:
    """That study alone would say on; the tuning asks about every load."""
    base = assessed("on")
    usual = Recommendation(Decision.SCHEDULE, "f", "draft_model", SCHEDULE, "Confirmed.", ("Why.",))
    choice = choose(with_recommendation(base, usual))
    assert choice.speculation == replace(DRAFT, schedule=SCHEDULE)
    assert choice.confirmed
    assert choice.remark == "Confirmed."
    off = replace(usual, decision=Decision.OFF, arm=None, schedule=())
    assert choose(with_recommendation(base, off)).speculation is None
    more = replace(off, decision=Decision.MEASURE_MORE, reasons=("Why.", "Give more minutes."))
    with pytest.raises(MeasurementError, match=r"Give more minutes\. Or name an arm"):
        choose(with_recommendation(base, more))


def test_of_a_tuning_the_confirmation_counts(tmp_path: Path) -> None:
    tuning = tmp_path / "tuned"
    write_study(tuning / "search", study("off"))
    confirmed = write_study(tuning / "confirm", study("on"))
    done = run("--from", str(tuning), "--rollout")
    assert done.exit_code == 0, done.output
    assert "at no load is it slower than off" in done.stdout
    assert f"--against {confirmed} --arm draft_model" in done.stdout
    with pytest.raises(StoreError, match="not a study folder"):
        read_assessment(tmp_path / "none")


def test_of_two_confirmations_the_one_that_holds_counts(tmp_path: Path) -> None:
    """Both are of the same static arm; the first was refused."""
    tuning = tmp_path / "tuned"
    write_study(tuning / "search", study("off"))
    write_study(tuning / "confirm", study("off"))
    confirmed = write_study(tuning / "confirm-2", study("on"))
    done = run("--from", str(tuning), "--rollout")
    assert done.exit_code == 0, done.output
    assert f"--against {confirmed} --arm draft_model" in done.stdout


def test_rollout_prints_a_note_with_both_commands(tmp_path: Path) -> None:
    folder = str(write_study(tmp_path / "study", study("on")))
    note = run("--from", folder, "--rollout").stdout
    blocks = note.split("```")
    commands = [read_command(b) for b in blocks[1::2] if "vllm serve" in b]
    assert [c.speculation is None for c in commands] == [False, True]
    assert commands[0].without("--per-request-spec-decode-metrics").flags == commands[1].flags
    answer = json.loads(run("--from", folder, "--rollout", "--json").stdout)
    assert [step["share"] for step in answer["rollout"]["steps"]] == [0.05, 0.25, 1.0]
    assert answer["markdown"] == note


def test_what_does_not_go_together_is_said() -> None:
    for words, said in (
        (["--from", "s", "target"], "TARGET target"),
        (["--from", "s", "--k", "3", "--schedule", "1-4:2"], "--k, --schedule"),
        (["--arm", "x", "target"], "go with --from"),
        ([], "TARGET"),
    ):
        done = run(*words)
        assert done.exit_code == 2
        assert said in done.output
