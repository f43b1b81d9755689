"""For every rule of the catalogue: flip the one fact it rests on, and see it flip, and be named.

The starting point is a study in which everything holds. Where a fact is decisive the verdict must
change with it; where it is not, the condition's status must, and the explanation must name it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.analysis.synthetic import C4, C16, Truth, demo_design, demo_study

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.cells import Cells, cells
from specwise.analysis.comparison import Effect, find_signatures, t_quantile
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import ServingSummary
from specwise.analysis.server_figures import GpuFigures
from specwise.decision.assessment import Assessment, assess
from specwise.decision.conditions import Condition, check_conditions
from specwise.decision.evidence import ArmFacts, Evidence
from specwise.decision.explanation import Explanation, explain, paired_records
from specwise.decision.findings import Findings
from specwise.decision.rules import RULES
from specwise.decision.verdict import Decision, Verdict, decide
from specwise.domain import (
    AcceptanceSource,
    ClientHealth,
    Losslessness,
    LosslessnessResult,
    Quantization,
    Segment,
    Slo,
)
from specwise.facts.checkpoint import from_table
from specwise.facts.hardware import find_gpu
from specwise.planning.memory import Range, RuleResult, ServingPlan, memory_rules, plan_memory
from specwise.planning.pairing import BANDS, GOOD, judge_pair
from specwise.vllm.command import Version, read_command
from specwise.vllm.findings import Finding
from specwise.vllm.lint import lint

ARM = "draft_model"
TARGET = replace(from_table("meta-llama/Llama-3.1-70B-Instruct"), family="llama")
DRAFT = replace(from_table("meta-llama/Llama-3.1-8B-Instruct"), family="llama")
PLAN = ServingPlan(TARGET, find_gpu("h200"), 4, DRAFT, draft_tensor_parallel=4)
VERSION = Version(0, 32, 0)
SAME_TOKENIZER = Finding("tokenizer", GOOD, "The tokenizers are the same.", "", "", "")
VERIFIED = LosslessnessResult(
    ARM, "target", Losslessness.UNCHANGED, ("24 of 24 equal",), None, None, 100, 80,
    "0.32.0", "0.32.0", 0, "2026-11-22T20:00:00Z",
)  # fmt: skip
SERVE = "vllm serve meta-llama/Llama-3.1-70B-Instruct --tensor-parallel-size 4"


def facts() -> ArmFacts:
    pair = judge_pair(TARGET, DRAFT, VERSION)
    return ArmFacts(
        target=TARGET,
        draft=DRAFT,
        pair=replace(pair, findings=(SAME_TOKENIZER,)),
        memory=plan_memory(PLAN),
        memory_without_draft=plan_memory(replace(PLAN, draft=None)),
        memory_rules=memory_rules(PLAN),
        lint=lint(read_command(SERVE), VERSION),
        configuration={"method": "draft_model", "num_speculative_tokens": 4},
    )


@dataclass(frozen=True)
class World:
    """A study's analysis and the evidence beside it."""

    findings: Findings
    measured: Cells
    evidence: Evidence

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return check_conditions(self.findings, self.measured, self.evidence)

    @property
    def verdict(self) -> Verdict:
        """On the draft model alone: with a second winner the verdict would just go to that."""
        design = replace(self.findings.design, arms=self.findings.design.arms[:2])
        alone = replace(self.findings, study=replace(self.findings.study, design=design))
        return decide(alone, self.conditions)

    def of(self, rule: str, arm: str = ARM) -> Condition:
        return next(
            c for c in self.conditions if c.id == rule and c.scope.split("/")[0] in ("", "mix", arm)
        )

    def explained(self) -> Explanation:
        held = {
            name: getattr(self.findings, name)
            for name in ("study", "summaries", "acceptance", "effects", "noise_floors",
                         "signatures", "crossovers")
        }  # fmt: skip
        return explain(
            Assessment(**held, conditions=self.conditions, verdict=self.verdict, warnings=())
        )


@cache
def good() -> World:
    """Everything holds: alike and cool temperatures, a draft that wins everywhere, all verified."""
    wins = {name: {4: 1.6, 16: 1.5} for name in ("json", "prose", "copy")}
    slight = {name: {4: 1.1, 16: 1.1} for name in wins}
    truth = Truth(
        speedup={ARM: wins, "ngram": slight},
        acceptance={ARM: dict.fromkeys(wins, 0.95), "ngram": dict.fromkeys(wins, 0.6)},
        ttft_ratio={ARM: 0.6},
        request_sd=0.03,
    )
    slo = Slo(ttft_s=1.0, tpot_s=0.2, e2e_s=20.0)
    design = demo_design(loads=(C4, C16), requests=64, slo=slo)
    segments = tuple(replace(s, temperature=0.3) for s in design.segments)
    study = demo_study(replace(design, segments=segments), truth, seed=4)
    found = assess(study)
    findings = Findings(
        found.study, found.summaries, found.acceptance, found.effects, found.noise_floors,
        found.signatures, found.crossovers,
    )  # fmt: skip
    gpu = GpuFigures(0, "NVIDIA H200", 100, 90, 0.8, 10)
    world = World(
        findings,
        cells(study),
        Evidence({ARM: facts(), "ngram": ArmFacts()}, {ARM: VERIFIED}, watched=True),
    )
    return with_summary(world, ARM, gpus=(gpu,))


# ---------------------------------------------------------------------------------------------
# Turning one fact


def with_effects(
    world: World, change: Callable[[Effect], Effect], *metrics: str, segment: str | None = None
) -> World:
    """Effects of the arm on the mix (or a segment of it) at production's load, changed."""

    def turned(e: Effect) -> Effect:
        here = (e.arm, e.workload, e.segment, e.load) == (ARM, "mix", segment, C16)
        return change(e) if here and e.metric in metrics else e

    effects = tuple(turned(e) for e in world.findings.effects)
    parts = [e for e in effects if e.metric[:4] in ("tpot", "e2e_")]
    findings = replace(world.findings, effects=effects, signatures=find_signatures(parts))
    return replace(world, findings=findings)


def at(gain: float, se: float = 0.02) -> Callable[[Effect], Effect]:
    """The effect made ``gain`` times better (above 1) or worse, known well."""

    def change(e: Effect) -> Effect:
        ratio = gain if e.better == "higher" else 1 / gain
        half = 2.1 * se
        return replace(
            e, ratio=ratio, low=ratio * math.exp(-half), high=ratio * math.exp(half), se_log=se,
            dof=20.0,
        )  # fmt: skip

    return change


def effects(gain: float, *metrics: str, segment: str | None = None) -> Callable[[World], World]:
    return lambda world: with_effects(world, at(gain), *metrics, segment=segment)


def with_summary(world: World, arm: str, **changes: Any) -> World:
    def turned(s: ServingSummary) -> ServingSummary:
        here = (s.arm, s.workload, s.segment, s.load) == (arm, "mix", None, C16)
        return replace(s, **changes) if here and s.purpose.value == "measure" else s

    summaries = tuple(turned(s) for s in world.findings.summaries)
    return replace(world, findings=replace(world.findings, summaries=summaries))


def summary(**changes: Any) -> Callable[[World], World]:
    return lambda world: with_summary(world, ARM, **changes)


def broken(name: str) -> Callable[[World], World]:
    """The arm's P95 over the limit, shown to be worse than the baseline's."""

    def flip(world: World) -> World:
        own = world.findings.summary(ARM, world.findings.production, C16)
        assert own is not None
        held = replace(getattr(own, f"{name}_s"), p95=100.0)
        return with_effects(with_summary(world, ARM, **{f"{name}_s": held}), at(0.5), f"{name}_p95")

    return flip


def with_design(world: World, **changes: Any) -> World:
    design = replace(world.findings.design, **changes)
    study = replace(world.findings.study, design=design)
    return replace(world, findings=replace(world.findings, study=study))


def temperatures(*values: float) -> Callable[[World], World]:
    def flip(world: World) -> World:
        segments = tuple(
            Segment(s.name, "x", temperature=t)
            for s, t in zip(world.findings.design.segments, values, strict=True)
        )
        return with_design(world, segments=segments)

    return flip


def acceptance(
    change: Callable[[AcceptanceSummary], AcceptanceSummary], segment: str | None = None
) -> Callable[[World], World]:
    def turned(a: AcceptanceSummary) -> AcceptanceSummary:
        here = (a.arm, a.workload, a.segment, a.load) == (ARM, "mix", segment, C16)
        return change(a) if here else a

    return lambda world: replace(
        world,
        findings=replace(
            world.findings, acceptance=tuple(turned(a) for a in world.findings.acceptance)
        ),
    )


def spread(a: AcceptanceSummary) -> AcceptanceSummary:
    assert a.per_request is not None
    return replace(a, per_request=replace(a.per_request, p10=0.2))


def crossing(outcome: str, load: float | None) -> Callable[[World], World]:
    def turned(c: Crossover) -> Crossover:
        here = (c.arm, c.workload, c.segment) == (ARM, "mix", None)
        return replace(c, outcome=outcome, load_value=load, low=load, high=load) if here else c

    return lambda world: replace(
        world,
        findings=replace(
            world.findings, crossovers=tuple(turned(c) for c in world.findings.crossovers)
        ),
    )


def trials(**changes: Any) -> Callable[[World], World]:
    """Parts of every trial of the arm at production's load, changed."""

    def flip(world: World) -> World:
        measured = {
            key: tuple(
                replace(t, parts=tuple(replace(p, **changes) for p in t.parts))
                if (key[0], key[2]) == (ARM, C16)
                else t
                for t in tables
            )
            for key, tables in world.measured.items()
        }
        return replace(world, measured=measured)

    return flip


def long_and_full(world: World) -> World:
    """KV cache full with long prompts."""
    measured = {
        key: tuple(
            replace(t, records=tuple(replace(r, prompt_tokens=30_000) for r in t.records))
            for t in tables
        )
        for key, tables in world.measured.items()
    }
    return with_summary(replace(world, measured=measured), ARM, kv_use_max=0.97)


def without_controls(world: World) -> World:
    kept = tuple(e for e in world.findings.effects if e.workload == "mix" or e.load != C16)
    return replace(world, findings=replace(world.findings, effects=kept))


def one_load(world: World) -> World:
    kept = tuple(e for e in world.findings.effects if e.load == C16)
    findings = replace(world.findings, effects=kept)
    return with_design(replace(world, findings=findings), loads=(C16,))


def noisy_floor(world: World) -> World:
    floors = tuple(replace(f, ratio=1.2, low=1.15, high=1.25) for f in world.findings.noise_floors)
    return replace(world, findings=replace(world.findings, noise_floors=floors))


def evidence(**changes: Any) -> Callable[[World], World]:
    """Facts about the arm, changed."""

    def flip(world: World) -> World:
        arms = {**world.evidence.arms, ARM: replace(world.evidence.of(ARM), **changes)}
        return replace(world, evidence=replace(world.evidence, arms=arms))

    return flip


def pair(**changes: Any) -> Callable[[World], World]:
    return evidence(pair=replace(facts().pair, **changes))  # type: ignore[type-var]


def stated(**changes: Any) -> Callable[[World], World]:
    return lambda world: replace(world, evidence=replace(world.evidence, **changes))


def slow_ttft(world: World) -> World:
    slo = replace(world.findings.design.slo, ttft_s=None)
    return with_effects(with_design(world, slo=slo), at(0.5), "ttft_p50")


def nothing_fits(world: World) -> World:
    """No request of the longest context fits, and none was served."""
    plan = facts().memory
    assert plan is not None
    none = replace(plan, concurrency=Range.exactly(0.0), tokens=Range.exactly(0.0))
    unserved = with_summary(world, ARM, failures={"refused": 128}, requests=128)
    return evidence(memory=none)(unserved)


def crowded(world: World) -> World:
    rules = (facts().memory_rules[0], RuleResult("draft-share", 0.3, 0.15, "too large"))
    return evidence(memory_rules=rules)(with_summary(world, ARM, preemptions=12.0))


OTHER = replace(DRAFT, family="qwen")
INT4, INT8 = Quantization("awq", 4), Quantization("fp8", 8)
CHANGED = replace(VERIFIED, verdict=Losslessness.CHANGED, reasons=("prompt 3 differs",))
SPLIT = {"p50": 1.5, "p99": 0.5}


def signature(metric: str) -> Callable[[World], World]:
    def flip(world: World) -> World:
        for kind, gain in SPLIT.items():
            world = with_effects(world, at(gain), f"{metric}_{kind}")
        return world

    return flip


@dataclass(frozen=True)
class Case:
    """What to turn, what the condition becomes, and the verdict then (None: still "on")."""

    flip: Callable[[World], World]
    status: str = "fail"
    decision: Decision | None = None
    before: str = "pass"


BUSY = ClientHealth(0.0, 0.0, loop_lag_s_p99=5.0, cpu_share=0.2)
MORE, OFF = Decision.MEASURE_MORE, Decision.OFF
NOT_HERE = Decision.SCHEDULE  # it still wins at the lower load
CASES: Mapping[str, Case] = {
    "client": Case(trials(client=BUSY), decision=MORE),
    "repeats": Case(
        lambda w: with_effects(w, lambda e: replace(e, trial_noise_known=False), "speedup"),
        decision=MORE,
    ),
    "pairs": Case(
        lambda w: with_effects(w, lambda e: replace(e, pairs=12), "speedup"), decision=MORE
    ),
    "A/A": Case(noisy_floor),
    "G3": Case(one_load),
    "I2": Case(temperatures(0.0, 0.6, 0.6)),
    "I3": Case(temperatures(0.9, 0.9, 0.9)),
    "I3-spread": Case(temperatures(0.0, 1.0, 0.0)),
    "B3": Case(temperatures(0.0, 0.0, 0.0), "unknown"),
    "I2-slo": Case(lambda w: with_design(w, slo=Slo(bound="ttft"))),
    "I3-monitoring": Case(stated(watched=False)),
    "F2": Case(without_controls),
    "speedup": Case(effects(0.7, "speedup"), decision=NOT_HERE),
    "G2-tpot": Case(effects(0.7, "tpot_mean"), decision=NOT_HERE),
    "G2-tpot-p99": Case(effects(0.7, "tpot_p99"), decision=NOT_HERE),
    "G2-ttft": Case(slow_ttft, decision=OFF),
    "G2-ttft-p99": Case(effects(0.6, "ttft_p99")),
    "G5": Case(effects(0.8, "output_tokens_per_s")),
    "G5-goodput": Case(effects(0.8, "goodput_per_s")),
    "slo-ttft": Case(broken("ttft"), decision=OFF),
    "slo-tpot": Case(broken("tpot"), decision=OFF),
    "slo-e2e": Case(broken("e2e"), decision=OFF),
    "I5": Case(crossing("crosses", 8.0)),
    "E4": Case(crossing("crosses", 8.0)),
    "A6": Case(effects(1.02, "speedup"), decision=MORE),
    "B4": Case(effects(0.7, "speedup"), "unknown", decision=NOT_HERE),  # what was measured decides
    "B1": Case(acceptance(lambda a: replace(a, source=AcceptanceSource.CHUNKS)), "unknown"),
    "B2": Case(acceptance(lambda a: replace(a, rate=0.3))),
    "G1": Case(acceptance(spread)),
    "B5": Case(effects(0.7, "tpot_mean"), decision=NOT_HERE),
    "G6": Case(
        trials(
            counters={
                "spec_drafts": 100.0,
                "spec_draft_tokens": 400.0,
                "spec_accepted_tokens": 100.0,
                "spec_accepted_pos_0": 100.0,
            }
        )
    ),
    "I2-mix": Case(effects(0.6, "speedup", segment="prose"), decision=NOT_HERE),
    "F3-tpot": Case(signature("tpot"), decision=NOT_HERE),
    "F3-e2e": Case(signature("e2e")),
    "F4": Case(effects(0.6, "speedup", segment="prose"), decision=NOT_HERE),
    "F4-acceptance": Case(acceptance(lambda a: replace(a, rate=0.2), "prose")),
    "errors": Case(summary(failures={"http_error": 40}), decision=OFF),
    "G4": Case(summary(preemptions=9.0)),
    "G4-prefix": Case(summary(prefix_hit_rate=0.05)),
    "G4-gpu": Case(summary(gpus=(GpuFigures(0, "H200", 100, 99, 0.9, 10),))),
    "I3-memory": Case(long_and_full),
    "G7": Case(stated(losslessness={ARM: CHANGED}), decision=OFF),
    "A1": Case(pair(band=BANDS[-1])),
    "A3-family": Case(pair(draft=OTHER)),
    "A3-tokenizer": Case(pair(findings=(replace(SAME_TOKENIZER, rule="tokenizer-different"),))),
    "A4": Case(pair(draft=OTHER)),
    "C2": Case(nothing_fits, decision=OFF),
    "C3": Case(
        evidence(memory=replace(facts().memory, tokens=Range.exactly(100.0)))  # type: ignore[type-var]
    ),
    "C5-target": Case(
        evidence(memory_rules=(RuleResult("target-share", 0.8, 0.7, ""), facts().memory_rules[1]))
    ),
    "I2-memory": Case(crowded, decision=OFF),
    "C6": Case(evidence(memory=plan_memory(replace(PLAN, draft_tensor_parallel=1))), "unknown"),
    "D1": Case(evidence(target=replace(TARGET, quantization=INT4))),
    "D2": Case(evidence(target=replace(TARGET, quantization=INT8)), "unknown"),
    "D3": Case(
        evidence(target=replace(TARGET, quantization=INT8), draft=replace(DRAFT, quantization=INT4))
    ),
    "E2": Case(evidence(lint=lint(read_command(f"{SERVE} --speculative-model x"), VERSION))),
    "E3": Case(evidence(configuration={"rejection_sample_method": "synthetic"}), decision=OFF),
}


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == RULES.keys()


def test_the_reference_lists_every_rule_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/conditions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*)$", page, re.M))
    assert rows.keys() == RULES.keys()
    for name, rule in RULES.items():
        assert rows[name].startswith(f"{rule.question} | {rule.threshold} | {rule.kind} |")


def test_it_starts_from_a_study_in_which_everything_holds() -> None:
    world = good()
    assert (world.verdict.decision, world.verdict.arm) == (Decision.ON, ARM)
    failing = {c.id for c in world.conditions if c.status == "fail" and c.scope.startswith(ARM)}
    assert failing == set()


@pytest.mark.parametrize("rule", CASES)
def test_flipping_one_fact_flips_its_condition(rule: str) -> None:
    case, before = CASES[rule], good()
    after = case.flip(before)
    assert before.of(rule).status == case.before
    assert before.of(rule).advice == ""
    found = after.of(rule)
    assert found.status == case.status
    assert found.advice == RULES[rule].advice
    if case.decision is None:
        assert after.verdict.decision is Decision.ON
    else:
        assert after.verdict.decision is case.decision
        if found.veto:
            assert rule in after.verdict.rule
    if after.verdict.arm == ARM:
        said = after.explained()
        where = said.unknown if case.status == "unknown" else (*said.ruled_out, *said.against)
        assert rule in {c.id for c in where}
        assert (rule in {c.id for c in said.ruled_out}) == (found.veto and found.status == "fail")


@pytest.mark.parametrize("rule", [r for r, rule in RULES.items() if rule.kind == "rule of thumb"])
def test_a_rule_of_thumb_never_outranks_a_measurement(rule: str) -> None:
    after = CASES[rule].flip(good())
    found = after.of(rule)
    assert not found.veto or found.kind == "measured"


def test_what_is_not_known_is_unknown_and_says_what_to_do() -> None:
    bare = replace(good(), evidence=Evidence())
    for rule in ("A1", "A3-family", "A3-tokenizer", "C2", "C3", "C5-target", "D1", "E2", "E3"):
        assert bare.of(rule).status == "unknown"
        assert bare.of(rule).advice
    assert bare.verdict.decision is Decision.ON


def test_a_method_without_a_draft_has_nothing_to_match() -> None:
    for rule in ("A1", "A3-tokenizer", "I2-memory"):
        assert good().of(rule, "ngram").status == "pass"


def test_an_arm_that_is_ruled_out_leaves_the_field_to_the_next() -> None:
    world = CASES["G7"].flip(good())
    found = decide(world.findings, world.conditions)
    assert (found.decision, found.arm) == (Decision.ON, "ngram")
    assert any("not what it would be" in reason for reason in found.reasons)


def test_published_figures_stand_beside_the_users_own() -> None:
    found = good().of("B4")
    assert found.kind == "published"
    assert "yours 1." in found.value
    assert "published, another system" in found.value


def test_an_explanation_can_be_checked_by_hand() -> None:
    """The sums in its first figures are those of the raw records; its interval is its own parts."""
    said, effect = good().explained(), good().verdict.effect
    assert effect is not None
    step = next(s for s in said.steps if s.figures.get("metric") == "speedup")
    pairs = paired_records(good().findings.study, effect)
    for side, arm in enumerate(("baseline", ARM)):
        total_s = sum(pair[side].finished_s - pair[side].intended_s for pair in pairs)
        tokens = sum(pair[side].output_tokens or 0 for pair in pairs)
        value = effect.baseline_value if side == 0 else effect.candidate_value
        assert total_s / tokens == pytest.approx(value, rel=1e-9)
        shown = f"{arm}: {total_s:.3f} s / {tokens:,} tokens = {value * 1e3:.3f} ms"
        assert any(line.startswith(shown) for line in step.lines)
    f = {name: float(value) for name, value in step.figures.items() if isinstance(value, float)}
    assert f["ratio"] == pytest.approx(f["baseline"] / f["candidate"])
    error = math.sqrt(f["request_variance"] + f["machine_variance"] / 2)
    assert f["se_log"] == pytest.approx(error)
    trials = t_quantile(f["noise_dof"], f["confidence"]) * math.sqrt(f["trial_variance"] / 2)
    half = max(f["t"] * error, trials)
    assert f["low"] == pytest.approx(f["ratio"] * math.exp(-half))
    assert f["high"] == pytest.approx(f["ratio"] * math.exp(half))
    assert any("requests.jsonl" in command for command in said.recompute)
