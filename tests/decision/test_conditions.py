from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.analysis.synthetic import (
    ACCEPTANCE,
    C1,
    C4,
    C16,
    Truth,
    demo_design,
    demo_study,
    without,
)

from specwise.decision.assessment import assess
from specwise.decision.conditions import Condition
from specwise.domain import (
    AcceptanceSource,
    ClientHealth,
    Segment,
    Slo,
    StudyData,
    StudyDesign,
)

SMALL: StudyDesign = demo_design(loads=(C4, C16), repeats=2)


def conditions(study: StudyData) -> Mapping[tuple[str, str], Condition]:
    return {(c.id, c.scope): c for c in assess(study).conditions}


@pytest.fixture(scope="module")
def study() -> StudyData:
    return demo_study(SMALL)


@pytest.fixture(scope="module")
def held(study: StudyData) -> Mapping[tuple[str, str], Condition]:
    return conditions(study)


def test_every_condition_says_all_that_it_must(
    study: StudyData, held: Mapping[tuple[str, str], Condition]
) -> None:
    ids = {t.trial_id for t in study.design.trials}
    for condition in held.values():
        assert condition.question.endswith("?")
        assert condition.value
        assert condition.threshold
        assert condition.source
        assert set(condition.evidence) <= ids
        if condition.kind == "measured" and condition.status == "fail":
            assert condition.evidence


def test_ids_are_unique_within_a_scope(study: StudyData) -> None:
    found = assess(study).conditions
    assert len({(c.id, c.scope) for c in found}) == len(found)


def test_the_reference_explains_every_condition(
    held: Mapping[tuple[str, str], Condition],
) -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "conditions.md"
    explained = set(re.findall(r"^\| `([^`]+)` \|", page.read_text(encoding="utf-8"), re.M))
    assert {condition.id for condition in held.values()} <= explained


def test_only_measured_conditions_can_veto(held: Mapping[tuple[str, str], Condition]) -> None:
    assert all(c.kind == "measured" for c in held.values() if c.veto)


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ("draft_model/json", "pass"),
        ("draft_model/prose", "fail"),
        ("draft_model/mix/prose", "fail"),
        ("ngram/json", "fail"),
    ],
)
def test_acceptance_against_the_thumb_rule(
    held: Mapping[tuple[str, str], Condition], scope: str, status: str
) -> None:
    condition = held["B2", scope]
    assert condition.status == status
    assert condition.kind == "rule of thumb"


def test_a_rule_of_thumb_does_not_outrank_a_measurement(
    held: Mapping[tuple[str, str], Condition],
) -> None:
    """copy is in the break-even band by the rule and wins by measurement: both are shown."""
    assert ACCEPTANCE["ngram"]["copy"] == 0.8
    assert held["B2", "ngram/copy"].status == "unknown"
    assert held["B5", "ngram/copy"].status == "pass"


@pytest.mark.parametrize(("segment", "status"), [("json", "pass"), ("prose", "fail")])
def test_break_even_sides_with_the_measured_effect(
    held: Mapping[tuple[str, str], Condition], segment: str, status: str
) -> None:
    condition = held["B5", f"draft_model/{segment}"]
    rate, needed = (float(w) for w in condition.value.split()[:3:2])
    assert "tokens a step that costs" in condition.value
    assert condition.status == status
    assert (rate > needed) == (status == "pass")


def test_per_request_acceptance_shows_the_requests_below_half(
    held: Mapping[tuple[str, str], Condition],
) -> None:
    assert held["G1", "draft_model/json"].status == "pass"
    mix = held["G1", "draft_model/mix"]
    assert mix.status == "fail"
    assert "of requests below 0.5" in mix.value


def test_the_mix_is_not_spoken_for_by_its_average(
    held: Mapping[tuple[str, str], Condition],
) -> None:
    found = held["F4", "draft_model/mix"]
    assert found.status == "fail"
    assert "prose 0.7" in found.value or "prose 0.8" in found.value


def test_health_reads_the_servers_counters(held: Mapping[tuple[str, str], Condition]) -> None:
    found = held["G6", "draft_model/mix"]
    assert found.status == "fail"
    assert "drafted" in found.value


def test_health_is_unknown_without_counters(study: StudyData) -> None:
    bare = replace(
        study,
        trials=tuple(
            replace(t, parts=tuple(replace(p, counters={}) for p in t.parts)) for t in study.trials
        ),
    )
    held = conditions(bare)
    assert held["G6", "draft_model/mix"].status == "unknown"
    assert held["G4", "draft_model/mix"].status == "unknown"
    assert held["G4", "draft_model/mix"].advice


def test_greedy_output_is_compared_by_digest(study: StudyData) -> None:
    assert conditions(study)["G7", "draft_model"].status == "pass"
    changed = replace(
        study,
        trials=tuple(
            replace(
                t,
                records=tuple(
                    replace(r, output_sha256="0" * 64) if t.trial.arm == "ngram" else r
                    for r in t.records
                ),
            )
            for t in study.trials
        ),
    )
    found = conditions(changed)["G7", "ngram"]
    assert found.status == "unknown"
    assert found.value.startswith("0 of ")


def test_several_loads_up_to_production(held: Mapping[tuple[str, str], Condition]) -> None:
    assert held["G3", ""].status == "pass"
    alone = demo_study(demo_design(loads=(C16,)))
    assert conditions(alone)["G3", ""].status == "fail"


def test_one_trial_of_each_arm_is_not_enough() -> None:
    design = demo_design(loads=(C16,), repeats=1, noise_floor=False)
    found = conditions(demo_study(design))["repeats", ""]
    assert (found.status, found.veto) == ("fail", True)


def test_few_pairs_are_not_enough() -> None:
    design = demo_design(loads=(C16,), repeats=2, requests=8)
    found = conditions(demo_study(design))["pairs", ""]
    assert (found.status, found.veto) == ("fail", True)
    assert found.value == "16 pairs"


def test_a_limited_client_vetoes_only_where_the_verdict_rests(study: StudyData) -> None:
    slow = ClientHealth(0.0, 0.0, loop_lag_s_p99=0.030, cpu_share=0.2)

    def limited(load: object) -> StudyData:
        return replace(
            study,
            trials=tuple(
                replace(t, parts=tuple(replace(p, client=slow) for p in t.parts))
                if t.trial.load == load
                else t
                for t in study.trials
            ),
        )

    at_production = conditions(limited(C16))["client", ""]
    assert (at_production.status, at_production.veto) == ("fail", True)
    assert "30.0 ms late" in at_production.value
    below = conditions(limited(C4))["client", ""]
    assert (below.status, below.veto) == ("unknown", False)


def test_failures_of_one_arm_are_a_veto() -> None:
    study = demo_study(SMALL, Truth(failure_share={"draft_model": 0.3}))
    held = conditions(study)
    assert (held["errors", "draft_model/mix"].status, held["errors", "draft_model/mix"].veto) == (
        "fail",
        True,
    )
    assert held["errors", "ngram/mix"].status == "pass"


def test_failures_of_every_arm_are_no_veto() -> None:
    share = dict.fromkeys(("baseline", "draft_model", "ngram"), 0.2)
    found = conditions(demo_study(SMALL, Truth(failure_share=share)))["errors", "draft_model/mix"]
    assert (found.status, found.veto) == ("unknown", False)


def test_a_ttft_limit_that_only_speculation_breaks_is_a_veto() -> None:
    truth = Truth(ttft_ratio={"draft_model": 4.0})
    design = demo_design(loads=(C16,), slo=Slo(ttft_s=0.4))
    held = conditions(demo_study(design, truth))
    found = held["slo-ttft", "draft_model/mix"]
    assert (found.status, found.veto) == ("fail", True)
    assert held["slo-ttft", "ngram/mix"].status == "pass"
    assert held["G2-ttft", "draft_model/mix"].status == "fail"


def test_a_limit_that_the_baseline_breaks_too_is_no_veto() -> None:
    design = demo_design(loads=(C16,), slo=Slo(ttft_s=0.01))
    found = conditions(demo_study(design))["slo-ttft", "draft_model/mix"]
    assert (found.status, found.veto) == ("fail", False)


@pytest.mark.parametrize(
    ("temperatures", "alike", "median"),
    [
        ((0.0, 0.0, 0.0), "pass", "pass"),
        ((0.0, 0.8, 0.0), "fail", "pass"),
        ((0.8, 0.9, 1.0), "fail", "fail"),
        ((0.3, 0.4, 0.5), "pass", "pass"),
    ],
)
def test_temperatures_of_the_production_workload(
    temperatures: tuple[float, float, float], alike: str, median: str
) -> None:
    segments = tuple(
        Segment(name, "bundled:x", temperature=t)
        for name, t in zip(("json", "prose", "copy"), temperatures, strict=True)
    )
    design = replace(demo_design(loads=(C16,), repeats=1), segments=segments)
    held = conditions(demo_study(design))
    assert held["I2", "mix"].status == alike
    assert held["I3", "mix"].status == median
    assert held["B3", "mix"].status == ("unknown" if max(temperatures) == 0 else "pass")


@pytest.mark.parametrize(
    ("bound", "status"), [("ttft", "fail"), ("tpot", "pass"), ("throughput", "pass")]
)
def test_what_the_service_is_bound_by(bound: str, status: str) -> None:
    design = demo_design(loads=(C16,), repeats=1, slo=Slo(bound=bound))
    assert conditions(demo_study(design))["I2-slo", ""].status == status


def test_production_against_the_crossover() -> None:
    loads = (C1, C4, C16)
    held = conditions(demo_study(demo_design(loads=loads, production_workload="prose")))
    assert held["I5", "draft_model/prose"].status == "fail"
    low = demo_design(loads=loads, production_workload="prose", production_load=C1)
    assert conditions(demo_study(low))["I5", "draft_model/prose"].status == "pass"


def test_an_unfinished_study_still_answers(study: StudyData) -> None:
    gone = {t.trial_id for t in study.design.trials if t.load == C16}
    held = conditions(without(study, trials=gone))
    assert held["G3", ""].status == "fail"
    assert held["speedup", "draft_model/mix"].status == "unknown"
    assert conditions(replace(study, trials=()))["pairs", ""].value == "0 pairs"


def test_chunk_estimates_say_that_they_are(study: StudyData) -> None:
    estimated = demo_study(SMALL, source=AcceptanceSource.CHUNKS)
    assert "estimated" in conditions(estimated)["B2", "draft_model/mix/json"].value
