"""What a decision may know beside the measurement: gathered here, once, then only read.

Nothing asks the network: checkpoints count if they are local folders or built-in models. What
cannot be found out is None with the reason in `ArmFacts.note`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specwise.domain import Arm, Checkpoint, Gpu, LosslessnessResult, StudyData
from specwise.errors import CommandError, InputError
from specwise.facts.checkpoint import load_local
from specwise.facts.hardware import gpus
from specwise.measurement.verification import read_losslessness
from specwise.planning.memory import MemoryPlan, RuleResult, ServingPlan, memory_rules, plan_memory
from specwise.planning.pairing import PairReport, judge_pair, model_facts
from specwise.vllm.command import ServeCommand, Version, read_words
from specwise.vllm.findings import whole_number
from specwise.vllm.flags import speculative_config
from specwise.vllm.lint import LintResult, lint


@dataclass(frozen=True, slots=True)
class ArmFacts:
    """What metadata says about one speculating arm.

    ``target`` and ``draft`` are None where their metadata is not at hand; ``pair`` judges the two.
    ``memory`` and ``memory_without_draft`` are the plan on the GPUs it ran on, ``memory_rules`` its
    shares. ``configuration`` is the speculative configuration as vLLM names its fields.
    """

    target: Checkpoint | None = None
    draft: Checkpoint | None = None
    pair: PairReport | None = None
    memory: MemoryPlan | None = None
    memory_without_draft: MemoryPlan | None = None
    memory_rules: tuple[RuleResult, ...] = ()
    lint: LintResult | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    memory_note: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it: facts by arm, `specwise verify` results by arm, what the user said.

    ``watched`` is whether production's acceptance is monitored, None if nobody said.
    """

    arms: Mapping[str, ArmFacts] = field(default_factory=dict)
    losslessness: Mapping[str, LosslessnessResult] = field(default_factory=dict)
    watched: bool | None = None

    def of(self, arm: str) -> ArmFacts:
        """The facts of that arm, empty ones if nothing is known."""
        return self.arms.get(arm, ArmFacts(note="nothing was gathered"))


def gather_evidence(study: StudyData, *, watched: bool | None = None) -> Evidence:
    """What can be read on this machine about the arms of ``study``, and its verify results.

    Raises StoreError for a verify.json that cannot be read.
    """
    folder = Path(study.folder)
    results = read_losslessness(folder) if folder.is_dir() else ()
    return Evidence(
        arms={
            arm.name: arm_facts(arm, study.provenance)
            for arm in study.design.arms
            if not arm.is_baseline
        },
        losslessness={result.arm: result for result in results},
        watched=watched,
    )


def arm_facts(arm: Arm, provenance: Mapping[str, Any]) -> ArmFacts:
    """Metadata of one arm: its checkpoints, memory plan and lint, as far as they are at hand."""
    described = (provenance.get("arms") or {}).get(arm.name) or {}
    command = _command(described.get("command") or ())
    version = Version.of(described.get("vllm"))
    config: dict[str, Any] = {}
    if arm.speculation is not None:
        config = speculative_config(arm.speculation)
    if command is not None and command.speculation:
        config |= command.speculation
    names = [
        command.model if command else None,
        arm.deployment.model if arm.deployment else arm.model,
        *(described.get("served_models") or ()),
    ]
    target = _first_local(names)
    draft_name = config.get("model")
    draft = load_local(draft_name) if isinstance(draft_name, str) else None
    missing = [
        f"the {what}'s ({name or 'unnamed'})"
        for what, name, found, wanted in (
            ("target", next((n for n in names if n), None), target, True),
            ("draft", draft_name, draft, isinstance(draft_name, str)),
        )
        if wanted and found is None
    ]
    facts = ArmFacts(
        target=target,
        draft=draft,
        pair=judge_pair(target, draft, version) if target and draft else None,
        lint=_lint(command, version, config),
        configuration=config,
        note=f"metadata not at hand: {' and '.join(missing)}" if missing else "",
    )
    if missing or target is None:
        return replace(facts, memory_note=facts.note)
    gpu = _gpu(provenance.get("gpus") or ())
    if gpu is None:
        return replace(facts, memory_note="no known GPU on the machine that measured")
    plan = _plan(target, draft, gpu, command or ServeCommand(None, version=version), config)
    plan = replace(plan, version=version, context=described.get("max_model_len") or plan.context)
    try:
        return replace(
            facts,
            memory=plan_memory(plan),
            memory_without_draft=plan_memory(replace(plan, draft=None)),
            memory_rules=memory_rules(plan),
        )
    except InputError as error:
        return replace(facts, memory_note=error.what)


def _command(words: Sequence[str]) -> ServeCommand | None:
    try:
        return read_words([str(word) for word in words]) if words else None
    except CommandError:
        return None


def _first_local(names: Sequence[str | None]) -> Checkpoint | None:
    return next((found for name in names if name and (found := load_local(name))), None)


def _lint(
    command: ServeCommand | None, version: Version | None, config: Mapping[str, Any]
) -> LintResult | None:
    if command is None or version is None:
        return None
    return lint(
        command,
        version,
        target=model_facts(command.model),
        draft=model_facts(config.get("model")),
    )


def _gpu(found: Sequence[str]) -> Gpu | None:
    """The data sheet of the first GPU's name, such as "NVIDIA H100 80GB HBM3, 81559 MiB, ..."."""
    if not found:
        return None
    full = re.sub(r"[^a-z0-9]+", " ", str(found[0]).split(",")[0].lower()).replace("rtx ", "rtx")
    for name in sorted(gpus(), key=len, reverse=True):
        if all(re.search(rf"{part}(?!\d)", full) for part in name.split("-")):
            return gpus()[name]
    return None


def _plan(
    target: Checkpoint,
    draft: Checkpoint | None,
    gpu: Gpu,
    command: ServeCommand,
    config: Mapping[str, Any],
) -> ServingPlan:
    ranks = whole_number(command.get("--tensor-parallel-size")) or 1
    k = config.get("num_speculative_tokens")
    share = command.get("--gpu-memory-utilization")
    return ServingPlan(
        target=target,
        gpu=gpu,
        gpus=ranks,
        draft=draft,
        draft_tensor_parallel=1 if config.get("draft_tensor_parallel_size") == 1 else ranks,
        k=k if isinstance(k, int) else 3,
        context=whole_number(command.get("--max-model-len")) or target.max_positions or 8192,
        utilization=float(share) if share else None,
        max_num_seqs=whole_number(command.get("--max-num-seqs")),
        max_batched_tokens=whole_number(command.get("--max-num-batched-tokens")),
        eager=command.has("--enforce-eager"),
    )
