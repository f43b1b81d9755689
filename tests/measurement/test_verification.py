from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.sampling_vllm import SamplingVllm

from specwise.analysis.losslessness import evaluate
from specwise.cli.main import main
from specwise.domain import (
    Api,
    GreedyComparison,
    GreedyDifference,
    Losslessness,
    LosslessnessResult,
    PermutationTest,
    PositionDistance,
    SamplingComparison,
)
from specwise.errors import InputError, ServerError, StoreError
from specwise.measurement.design import parse_study
from specwise.measurement.load import Target
from specwise.measurement.prompts import Prompt
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder
from specwise.measurement.verification import (
    VerifyPlan,
    VerifyPrompt,
    ask_baseline,
    ask_candidate,
    prompts_of,
    read_losslessness,
    write_losslessness,
)

PLAN = VerifyPlan(
    prompts=10, greedy_tokens=12, sampling_prompts=6, samples=100, sample_tokens=5, effect=0.2
)
DRAFTS = (0.5,)


def prompts(count: int = 10, api: Api = Api.CHAT) -> list[VerifyPrompt]:
    return [VerifyPrompt(f"p{i}", api, Prompt(f"p{i}", text=f"text {i}")) for i in range(count)]


def target(server: SamplingVllm) -> Target:
    return Target(url=server.url, model=server.model, timeout_s=30)


def check(
    baseline: SamplingVllm,
    candidate: SamplingVllm,
    plan: VerifyPlan = PLAN,
    api: Api = Api.CHAT,
) -> LosslessnessResult:
    asked = prompts(plan.prompts, api)
    first = ask_baseline(target(baseline), asked, plan)
    second = ask_candidate(target(candidate), asked, plan, first)
    return evaluate(plan, first, second, arm="draft", model="fake", measured_at="now")


@pytest.mark.parametrize("api", list(Api))
def test_equal_servers_are_unchanged(api: Api) -> None:
    with SamplingVllm() as baseline, SamplingVllm(conditional=DRAFTS, seed=2) as candidate:
        result = check(baseline, candidate, api=api)
    assert result.verdict is Losslessness.UNCHANGED, result.reasons
    assert result.greedy is not None
    assert result.greedy.equal == 10
    assert result.greedy.self_differing == 0
    assert result.greedy.logprob_noise == pytest.approx(0, abs=2e-5)
    assert result.sampling is not None
    assert result.sampling.power >= 0.9
    assert result.drafted_tokens == 3 * (10 + 6 * 100)


def test_each_server_is_asked_in_an_order_of_its_own_and_without_seeds() -> None:
    """vLLM servers start with one seed: asked alike, they would draw the same numbers."""
    with SamplingVllm() as baseline, SamplingVllm(conditional=DRAFTS) as candidate:
        check(baseline, candidate)

    def sampled(server: SamplingVllm) -> list[str]:
        bodies = [body for body in server.bodies if body["temperature"] != 0]
        assert not any("seed" in body for body in bodies)
        return [str(body["messages"]) for body in bodies]

    ours, theirs = sampled(baseline), sampled(candidate)
    assert sorted(ours) == sorted(theirs)
    matches = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert matches < len(ours) / 2


def test_what_is_compared_asks_for_no_logprobs_on_the_candidate() -> None:
    """vLLM 0.11.1 to 0.13 serves a request for logprobs without drafts."""
    with SamplingVllm() as baseline, SamplingVllm(conditional=DRAFTS, seed=2) as candidate:
        check(baseline, candidate)
    generated = [body for body in candidate.bodies if "prompt_logprobs" not in body]
    assert len(generated) >= 10 + 6
    assert not any("logprobs" in body for body in generated)


def test_a_lossy_acceptance_rule_is_a_change_of_both_kinds() -> None:
    with (
        SamplingVllm() as baseline,
        SamplingVllm(conditional=DRAFTS, seed=2, wrong=0.3) as candidate,
    ):
        result = check(baseline, candidate)
    assert result.verdict is Losslessness.CHANGED
    assert [reason.split(":")[0] for reason in result.reasons] == ["greedy", "sampling"]
    assert result.greedy is not None
    assert any(d.near_tie is False for d in result.greedy.differences)
    for difference in result.greedy.differences:
        assert difference.position > 0
        assert difference.baseline_gap is not None
        assert difference.baseline_gap > 0
        # The candidate's own logprobs contradict its choice: it was not its argmax.
        assert difference.candidate_gap is not None
        assert difference.candidate_gap < 0


def test_rounding_turns_near_ties_and_nothing_else() -> None:
    """Two servers whose logits are off by 0.02: outputs part, and only where they nearly tie."""
    plan = VerifyPlan(prompts=40, greedy_tokens=24, sampling=False)
    with (
        SamplingVllm(noise=0.02) as baseline,
        SamplingVllm(noise=0.02, conditional=DRAFTS, seed=2) as candidate,
    ):
        result = check(baseline, candidate, plan)
    assert result.greedy is not None
    assert result.greedy.differences, "the servers were meant to part somewhere"
    assert all(d.near_tie for d in result.greedy.differences)
    assert result.greedy.logprob_noise == pytest.approx(0.08, abs=0.05)
    assert result.verdict is Losslessness.UNCHANGED
    assert "near-ties" in result.reasons[0]


def test_without_logprobs_a_difference_cannot_be_judged() -> None:
    refuses = ("logprobs", "prompt_logprobs")
    plan = VerifyPlan(prompts=20, greedy_tokens=12, sampling=False)
    with (
        SamplingVllm(refuses=refuses) as baseline,
        SamplingVllm(refuses=refuses, conditional=DRAFTS, wrong=0.1) as candidate,
    ):
        result = check(baseline, candidate, plan)
    assert result.greedy is not None
    assert {d.near_tie for d in result.greedy.differences} == {None}
    assert result.verdict is Losslessness.UNKNOWN
    assert "without logprobs" in result.reasons[0]


def test_a_candidate_that_drafts_nothing_has_shown_nothing() -> None:
    with (
        SamplingVllm() as baseline,
        SamplingVllm(conditional=DRAFTS, seed=2, drafts=False) as candidate,
    ):
        result = check(baseline, candidate)
    assert result.verdict is Losslessness.UNKNOWN
    assert "drafted nothing" in result.reasons[0]


def test_too_few_samples_to_see_the_effect_are_no_pass() -> None:
    plan = VerifyPlan(prompts=4, greedy=False, sampling_prompts=2, samples=40, sample_tokens=4)
    with SamplingVllm() as baseline, SamplingVllm(conditional=DRAFTS, seed=2) as candidate:
        result = check(baseline, candidate, plan)
    assert result.greedy is None
    assert result.verdict is Losslessness.UNKNOWN
    assert result.sampling is not None
    assert f"{result.sampling.samples_needed} samples a prompt" in result.reasons[0]


def test_nearly_determined_outputs_are_no_pass_either() -> None:
    with (
        SamplingVllm(peaked=20) as baseline,
        SamplingVllm(peaked=20, conditional=DRAFTS, seed=2) as candidate,
    ):
        result = check(baseline, candidate)
    assert result.verdict is Losslessness.UNKNOWN
    assert "nearly determined" in result.reasons[0]


def test_informative_prompts_are_sampled() -> None:
    """Half of the prompts are nearly determined; the others are chosen."""
    with SamplingVllm() as server:
        known = {p.prompt_id: p for p in prompts(10)}
        first = ask_baseline(target(server), list(known.values()), PLAN)
    import math

    def likeliest(name: str) -> float:
        tops = [math.exp(max(at.values())) for at in first.greedy[name].logprobs[1:]]
        return sum(tops) / len(tops) if tops else math.inf

    chosen = [abs(likeliest(name) - 0.5) for name in first.samples]
    left = [abs(likeliest(name) - 0.5) for name in known if name not in first.samples]
    assert len(chosen) == 6
    assert max(chosen) <= min(left)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"silent": ("return_token_ids",)}, "does not return token ids"),
        ({"fail_status": 500}, "HTTP 500: broken"),
        ({"refuses": ("n",)}, "HTTP 400: no n here"),
        ({"silent": ("n",)}, "gave 1 of 16 outputs"),
    ],
)
def test_servers_that_cannot_be_compared_are_named(settings: dict[str, Any], message: str) -> None:
    with SamplingVllm(**settings) as server, pytest.raises(ServerError, match=message):
        ask_baseline(target(server), prompts(), PLAN)


# --- where prompts come from, and where results stay --------------------------------------------

STUDY = """
name = "s"
[[arm]]
name = "baseline"
url = "http://127.0.0.1:1"
[[arm]]
name = "draft"
url = "http://127.0.0.1:2"
speculation = { method = "ngram", k = 2 }
[[segment]]
name = "one"
prompts = "one.jsonl"
[[segment]]
name = "two"
prompts = "bundled:prose"
api = "completions"
[load]
concurrency = [1]
production_workload = "one"
"""


def test_segments_take_turns(tmp_path: Path) -> None:
    lines = [json.dumps({"id": "same", "prompt": f"text {i}"}) for i in range(3)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    design = parse_study(STUDY, name="s")
    chosen = prompts_of(design, tmp_path, 10)
    segments = [prompt.prompt_id.split("/")[0] for prompt in chosen]
    assert segments == ["one", "two"] * 3 + ["two"] * 4
    assert len({prompt.prompt_id for prompt in chosen}) == 10
    assert {prompt.api for prompt in chosen[1::2]} == {Api.COMPLETIONS}
    assert chosen == prompts_of(design, tmp_path, 10)


RESULT = LosslessnessResult(
    arm="draft",
    model="m",
    verdict=Losslessness.CHANGED,
    reasons=("greedy: so",),
    greedy=GreedyComparison(
        prompts=2,
        tokens=9,
        equal=1,
        differences=(GreedyDifference("p", 3, 5, None, 0.2, None, False),),
        logprob_noise=1e-5,
        tolerance=0.001,
        self_differing=0,
    ),
    sampling=SamplingComparison(
        prompts=1,
        samples=20,
        tokens=2,
        temperature=1.0,
        top_p=1.0,
        false_alarm_rate=0.01,
        tests=(PermutationTest("tokens", 9.0, 3.0, 0.001, 0.004),),
        positions=(PositionDistance(1, 0.4, 0.1, 0.2),),
        effect=0.1,
        power=0.5,
        power_wanted=0.9,
        detectable=None,
        samples_needed=50,
        room=0.4,
    ),
    drafted_tokens=12,
    accepted_tokens=None,
    baseline_version="0.32.0",
    candidate_version="0.32.0",
    seed=0,
    measured_at="2026-11-22T00:00:00Z",
)


def test_results_survive_storing_one_for_each_arm(tmp_path: Path) -> None:
    from dataclasses import replace

    assert read_losslessness(tmp_path) == ()
    other = replace(RESULT, arm="ngram", greedy=None, sampling=None)
    write_losslessness(tmp_path, RESULT)
    write_losslessness(tmp_path, other)
    assert read_losslessness(tmp_path) == (RESULT, other)
    again = replace(RESULT, verdict=Losslessness.UNCHANGED)
    write_losslessness(tmp_path, again)
    assert set(read_losslessness(tmp_path)) == {again, other}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1, "results": [{}]}'])
def test_a_damaged_file_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "verify.json").write_text(content)
    with pytest.raises(StoreError, match="is damaged"):
        read_losslessness(tmp_path)


def test_a_file_of_another_schema_is_said(tmp_path: Path) -> None:
    (tmp_path / "verify.json").write_text('{"schema_version": 9, "results": []}')
    with pytest.raises(StoreError, match="schema 9"):
        read_losslessness(tmp_path)


# --- the command --------------------------------------------------------------------------------

FEW = ("--prompts", "bundled:prose", "--prompt-count", "8", "--sampling-prompts", "6")
LESS = ("--effect", "0.2", "--samples", "100", "--sample-tokens", "5")


def leave(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["verify", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_passes_fails_and_cannot_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = StudyFolder.create(
        tmp_path / "study", parse_study(STUDY, name="s"), describe_here(), STUDY
    )
    kept = ("--store", str(folder.path), "--arm", "draft")
    with (
        SamplingVllm() as baseline,
        SamplingVllm(conditional=DRAFTS, seed=2) as good,
        SamplingVllm(conditional=DRAFTS, seed=3, wrong=0.3) as bad,
    ):
        urls = ("--baseline", baseline.url, "--candidate")
        assert leave(*urls, good.url, *FEW, *LESS, *kept) == 0
        out = capsys.readouterr().out
        assert "✓ UNCHANGED" in out
        assert "8 of 8 outputs equal" in out
        assert [r.verdict for r in read_losslessness(folder.path)] == [Losslessness.UNCHANGED]

        assert leave(*urls, f"{bad.url}/v1", *FEW, *LESS, *kept) == 1
        out = capsys.readouterr().out
        assert "✗ CHANGED" in out
        assert "a change" in out
        assert "differs" in out
        assert [r.verdict for r in read_losslessness(folder.path)] == [Losslessness.CHANGED]

        assert leave(*urls, good.url, *FEW, "--samples", "20", "--json", "--only", "sampling") == 3
        result = json.loads(capsys.readouterr().out)["results"][0]
        assert result["verdict"] == "unknown"
        assert result["greedy"] is None

        # The wrong way round, and a folder without that arm.
        for arguments in (
            ("--baseline", good.url, "--candidate", baseline.url, *FEW),
            (*urls, good.url, *FEW, "--store", str(folder.path)),
        ):
            with pytest.raises(InputError):
                _invoke(arguments)


def _invoke(arguments: tuple[str, ...]) -> None:
    from specwise.cli.verify import verify

    verify.main(["verify", *arguments][1:], standalone_mode=False)


def test_no_text_is_kept(tmp_path: Path) -> None:
    design = parse_study(STUDY, name="s")
    folder = StudyFolder.create(tmp_path / "study", design, describe_here(), STUDY)
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"a secret {i}"}) for i in range(8))
    )
    with SamplingVllm() as baseline, SamplingVllm(conditional=DRAFTS, wrong=0.5) as candidate:
        mine = ("--prompts", str(tmp_path / "mine.jsonl"), *LESS, "--greedy-tokens", "12")
        kept = ("--store", str(folder.path), "--arm", "draft")
        assert leave("--baseline", baseline.url, "--candidate", candidate.url, *mine, *kept) == 1
    assert "secret" not in (folder.path / "verify.json").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--baseline", "http://127.0.0.1:1"),
        ("--baseline", "http://127.0.0.1:1", "--candidate", "http://127.0.0.1:2"),
        ("--baseline", "here", "--candidate", "there", "--prompts", "bundled:prose"),
        ("none.toml",),
        ("none.toml", "--baseline", "http://a", "--candidate", "http://b"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
