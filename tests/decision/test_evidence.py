from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.analysis.synthetic import demo_design, demo_study

from specwise.decision.evidence import arm_facts, gather_evidence
from specwise.domain import Arm, Losslessness, LosslessnessResult, Speculation
from specwise.facts.bundled import bundled_draft, bundled_target
from specwise.facts.hardware import find_gpu
from specwise.measurement.verification import write_losslessness

DRAFT = Speculation("draft_model", 4, draft=str(bundled_draft()))
COMMAND = [
    "python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(bundled_target()),
    "--max-model-len", "2048", "--gpu-memory-utilization", "0.8",
    "--speculative-config", f'{{"method":"draft_model","model":"{bundled_draft()}",'
    '"num_speculative_tokens":4}',
]  # fmt: skip


def described(**more: object) -> dict[str, object]:
    return {"vllm": "0.32.0", "command": COMMAND, "max_model_len": 2048, **more}


def test_an_arm_that_specwise_started_tells_everything() -> None:
    arm = Arm("draft", DRAFT, url="http://127.0.0.1:1")
    provenance = {
        "arms": {"draft": described()},
        "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 550.54"],
    }
    facts = arm_facts(arm, provenance)
    assert facts.pair is not None
    assert any(f.rule == "tokenizer" for f in facts.pair.findings)
    assert facts.lint is not None
    assert str(facts.lint.version) == "0.32.0"
    assert facts.configuration["num_speculative_tokens"] == 4
    assert facts.memory is not None
    assert facts.memory_without_draft is not None
    assert facts.memory.plan.gpu == find_gpu("h100")
    assert (facts.memory.plan.context, facts.memory.plan.utilization) == (2048, 0.8)
    assert facts.memory.pool.likely < facts.memory_without_draft.pool.likely
    assert facts.note == facts.memory_note == ""


def test_without_a_gpu_the_pair_is_known_and_the_memory_is_not() -> None:
    arm = Arm("draft", DRAFT, url="http://127.0.0.1:1")
    facts = arm_facts(arm, {"arms": {"draft": described()}, "gpus": []})
    assert facts.pair is not None
    assert facts.memory is None
    assert "no known GPU" in facts.memory_note


def test_a_server_elsewhere_is_known_by_its_built_in_name_only() -> None:
    names = Speculation("draft_model", 4, draft="meta-llama/Llama-3.1-8B-Instruct")
    arm = Arm("draft", names, url="http://h:1", model="meta-llama/Llama-3.1-70B-Instruct")
    facts = arm_facts(arm, {})
    assert facts.pair is not None
    assert facts.pair.ratio == pytest.approx(8.8, abs=0.2)
    assert facts.lint is None
    other = arm_facts(replace(arm, model="mine/secret-70b"), {})
    assert other.pair is None
    assert "the target's (mine/secret-70b)" in other.note


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3, 81559 MiB, 550", "h100"),
        ("NVIDIA H200, 143771 MiB, 550", "h200"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB, 550", "a100-40"),
        ("NVIDIA L40S, 46068 MiB, 550", "l40s"),
        ("NVIDIA L40, 46068 MiB, 550", None),
        ("NVIDIA GeForce RTX 4090, 24564 MiB, 550", "rtx4090"),
    ],
)
def test_gpus_are_recognised_by_the_drivers_name(name: str, gpu: str | None) -> None:
    arm = Arm("draft", DRAFT, url="http://127.0.0.1:1")
    facts = arm_facts(arm, {"arms": {"draft": described()}, "gpus": [name]})
    found = facts.memory.plan.gpu if facts.memory else None
    assert found == (find_gpu(gpu) if gpu else None)


def test_strange_provenance_is_no_error() -> None:
    arm = Arm("draft", DRAFT, url="http://127.0.0.1:1")
    for odd in (
        {"arms": None, "gpus": None},
        {"arms": {"draft": {"vllm": "nightly", "command": ["sleep", "1"], "served_models": None}}},
    ):
        assert arm_facts(arm, odd).lint is None


def test_verify_results_are_read_from_the_study_folder(tmp_path: Path) -> None:
    result = LosslessnessResult(
        "ngram", "target", Losslessness.CHANGED, ("differs",), None, None, 1, 1, None, None, 0, "t"
    )
    write_losslessness(tmp_path, result)
    study = replace(demo_study(demo_design(repeats=1, requests=4)), folder=str(tmp_path))
    found = gather_evidence(study, watched=True)
    assert found.losslessness == {"ngram": result}
    assert found.watched is True
    assert set(found.arms) == {"draft_model", "ngram"}
    assert gather_evidence(replace(study, folder=str(tmp_path / "gone"))).losslessness == {}
