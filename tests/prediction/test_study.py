"""A simulated study goes through the same analysis and decision as a measured one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.prediction.test_scheduler import COSTS

from specwise.decision.assessment import assess
from specwise.decision.verdict import Decision
from specwise.domain import Speculation, StudyData, Trial
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.measurement.arrivals import intended_times
from specwise.measurement.design import parse_study
from specwise.planning.memory import ServingPlan, plan_memory
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.study import SimArm, Traffic, limits_of, simulate_study
from specwise.reporting.html import write_report

STUDY = """
name = "simulated"
seed = 1
[[arm]]
name = "baseline"
url = "http://127.0.0.1:1"
[[arm]]
name = "draft"
url = "http://127.0.0.1:2"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[segment]]
name = "easy"
prompts = "bundled:json"
[[segment]]
name = "hard"
prompts = "bundled:prose"
[[workload]]
name = "mix"
shares = {{ easy = 0.75, hard = 0.25 }}
[load]
{load}
requests = 40
repeats = 2
"""
CLOSED = "concurrency = [1, 16]\nproduction = 16"
OPEN = "rate_per_s = [1, 8]\nproduction = 8"
SIZES = tuple((int(p), int(o)) for p, o in np.random.default_rng(4).integers(20, 200, (50, 2)))


def arms(acceptance: float, draft_s: float) -> dict[str, SimArm]:
    baseline = SimArm(replace(COSTS, speculates=False), SchedulerConfig(kv_tokens=100_000))
    draft = SimArm(
        replace(COSTS, draft_pass_s=draft_s),
        SchedulerConfig(kv_tokens=100_000, method="draft_model", k=3),
        acceptance={"easy": (acceptance,) * 3, "hard": (acceptance / 2,) * 3},
    )
    return {"baseline": baseline, "draft": draft}


def simulated(load: str, acceptance: float = 0.8, draft_s: float = 5e-4) -> StudyData:
    design = parse_study(STUDY.format(load=load), name="study")

    def arrivals(trial: Trial, rng: np.random.Generator) -> tuple[float, ...]:
        return intended_times(trial.load.arrivals, trial.load.value, trial.requests, rng)

    return simulate_study(
        design,
        arms=arms(acceptance, draft_s),
        traffic={"easy": Traffic(SIZES), "hard": Traffic(SIZES)},
        arrivals=arrivals,
        provenance={"specwise": "test"},
    )


@pytest.mark.parametrize("load", [CLOSED, OPEN])
def test_a_good_draft_is_switched_on_and_a_useless_one_off(load: str) -> None:
    good, useless = simulated(load), simulated(load, acceptance=0.02, draft_s=3e-3)
    assert assess(good).verdict.decision is Decision.ON
    assert assess(useless).verdict.decision is Decision.OFF


def test_arms_share_requests_and_everything_is_marked_predicted(tmp_path: Path) -> None:
    study = simulated(CLOSED)
    assert study.predicted
    cells: dict[object, list[object]] = {}
    for t in study.trials:
        key = (t.trial.workload, t.trial.load, t.trial.repeat)
        sent = [(r.prompt_id, r.prompt_tokens, r.output_tokens) for r in t.records]
        cells.setdefault(key, []).append(sent)
    assert all(sent == cell[0] for cell in cells.values() for sent in cell)
    mix = next(t for t in study.trials if t.trial.workload == "mix")
    assert sum(r.segment == "easy" for r in mix.records) == 30
    page = tmp_path / "report.html"
    write_report(assess(study), page)
    assert "A simulation made this data" in page.read_text()


def test_counters_agree_with_the_records() -> None:
    for measured in simulated(OPEN).trials:
        (part,) = measured.parts
        counters = part.counters
        assert counters["generation_tokens"] == sum(r.output_tokens or 0 for r in measured.records)
        assert part.gauges
        if measured.trial.arm == "draft":
            accepted = [r.acceptance for r in measured.records if r.acceptance]
            assert counters["spec_drafts"] == sum(a.steps for a in accepted)
            assert counters["spec_accepted_tokens"] == sum(a.accepted_tokens for a in accepted)
            assert counters["spec_accepted_pos_0"] == sum(
                a.steps - a.steps_by_accepted[0] for a in accepted
            )
        else:
            assert not any("spec" in name for name in counters)


def test_the_same_seed_gives_the_same_study() -> None:
    assert simulated(OPEN) == simulated(OPEN)


def test_limits_follow_from_the_memory_plan() -> None:
    target, draft = load_checkpoint("llama-3.1-8b"), load_checkpoint("llama-3.2-1b")
    plan = ServingPlan(target, find_gpu("h100"), draft=draft, context=4096)
    memory = plan_memory(plan)
    limits = limits_of(memory, Speculation("draft_model", 3, schedule=((1, 8, 3), (9, 64, 1))))
    assert limits.kv_tokens == int(memory.tokens.likely) > 100_000
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (1024, 8192)
    assert limits.k_by_batch()[8:10] == (3, 1)
    assert limits.async_scheduling
    assert not limits_of(memory, Speculation("ngram", 3)).async_scheduling
    assert limits_of(memory, None).method is None


def test_what_is_missing_is_named() -> None:
    design = parse_study(STUDY.format(load=CLOSED), name="study")
    incomplete = arms(0.5, 1e-3)
    incomplete["draft"] = SimArm(incomplete["draft"].costs, incomplete["draft"].config)
    with pytest.raises(InputError, match="no acceptance for segment easy, hard"):
        simulate_study(
            design,
            arms=incomplete,
            traffic={"easy": Traffic(SIZES), "hard": Traffic(SIZES)},
            arrivals=lambda *_: (),
            provenance={},
        )
