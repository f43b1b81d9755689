from __future__ import annotations

from dataclasses import replace

import pytest
from tests.analysis.synthetic import (
    C1,
    C4,
    C16,
    Truth,
    demo_design,
    demo_study,
    without,
)

from specwise.decision.assessment import Assessment, assess
from specwise.decision.verdict import Decision
from specwise.domain import LoadPoint, Loop, Outcome, StudyData


@pytest.fixture(scope="module")
def demo() -> Assessment:
    return assess(demo_study())


def test_the_demo_story(demo: Assessment) -> None:
    """json wins everywhere, prose at T=0.8 loses under load, and the verdict says so."""
    verdict = demo.verdict
    assert verdict.decision is Decision.SCHEDULE
    assert verdict.arm == "draft_model"
    assert "prose" in verdict.headline
    by_cell = {(s.workload, s.segment): s for s in verdict.segments}
    assert by_cell["json", "json"].decision is Decision.ON
    assert by_cell["prose", "prose"].decision is Decision.OFF
    assert by_cell["mix", "prose"].decision is Decision.OFF
    assert verdict.schedule is not None
    assert verdict.schedule.rows[-1][2] == 0
    assert demo.warnings == ()


def test_it_is_pure_and_deterministic(demo: Assessment) -> None:
    assert repr(assess(demo_study())) == repr(demo)  # NaN equals itself in text only


def test_on_at_a_load_where_everything_wins() -> None:
    design = demo_design(loads=(C1, C4), production_load=C1)
    found = assess(demo_study(design)).verdict
    assert (found.decision, found.arm) == (Decision.ON, "draft_model")


def test_off_where_everything_loses() -> None:
    slow = {name: {1: 0.9, 4: 0.8, 16: 0.7} for name in ("json", "prose", "copy")}
    truth = Truth(speedup={"draft_model": slow, "ngram": slow})
    found = assess(demo_study(demo_design(loads=(C4, C16)), truth)).verdict
    assert found.decision is Decision.OFF
    assert found.schedule is None


def test_failures_turn_the_arm_down_however_fast_it_is() -> None:
    fast = {name: {1: 2.0, 4: 2.0, 16: 2.0} for name in ("json", "prose", "copy")}
    truth = Truth(
        speedup={"draft_model": fast, "ngram": fast},
        failure_share={"draft_model": 0.3, "ngram": 0.3},
    )
    found = assess(demo_study(demo_design(loads=(C16,)), truth))
    assert found.verdict.decision is Decision.OFF
    assert any("requests failed" in warning for warning in found.warnings)


def test_a_single_trial_of_each_arm_decides_nothing() -> None:
    study = demo_study(demo_design(loads=(C16,), repeats=1, noise_floor=False))
    found = assess(study)
    assert found.verdict.decision is Decision.MEASURE_MORE
    assert "A/A" in found.verdict.next_trials[0].what
    assert any("No repeats" in warning for warning in found.warnings)


def test_an_empty_study_can_be_assessed() -> None:
    found = assess(replace(demo_study(demo_design(repeats=1)), trials=()))
    assert found.verdict.decision is Decision.MEASURE_MORE
    assert found.verdict.next_trials
    assert any("not complete" in warning for warning in found.warnings)


def test_an_interrupted_study_says_what_is_missing() -> None:
    study = demo_study(demo_design(loads=(C16,)))
    last = study.design.trials[-1].trial_id
    found = assess(without(study, trials={last}))
    assert any(w.startswith("1 of ") for w in found.warnings)


def test_a_simulated_study_says_so() -> None:
    study = replace(demo_study(demo_design(loads=(C16,), repeats=1)), predicted=True)
    assert any("prediction" in warning for warning in assess(study).warnings)


def test_open_loop_studies_are_assessed_too() -> None:
    loads = tuple(LoadPoint(Loop.OPEN, value, "poisson") for value in (1.0, 16.0))
    found = assess(demo_study(demo_design(loads=loads, production_load=loads[1])))
    assert found.verdict.decision in (Decision.SCHEDULE, Decision.OFF)
    assert "16rps" in found.verdict.headline


def test_equal_arms_are_rarely_called_different() -> None:
    """A/A studies, decided in at most 1 of 20: two of twelve is already the far tail of that."""
    same = {name: {16: 1.0} for name in ("json", "prose", "copy")}
    truth = Truth(speedup={"draft_model": same, "ngram": same})
    design = demo_design(loads=(C16,))
    found = [assess(demo_study(design, truth, seed=seed)).verdict for seed in range(300, 312)]
    assert sum(verdict.decision is not Decision.MEASURE_MORE for verdict in found) <= 2


def _changed(**changes: object) -> StudyData:
    study = demo_study(demo_design(loads=(C16,), requests=16))
    return replace(
        study,
        trials=tuple(
            replace(t, records=tuple(replace(r, **changes) for r in t.records))  # type: ignore[arg-type]
            for t in study.trials
        ),
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": Outcome.TIMEOUT},
        {"outcome": Outcome.CANCELLED},
        {"output_tokens": None},
        {"output_tokens": 1},
        {"output_tokens": 0, "chunk_s": (), "chunk_tokens": ()},
        {"chunk_tokens": None},
        {"acceptance": None},
        {"output_sha256": None},
    ],
    ids=",".join,
)
def test_a_strange_study_gets_an_answer_not_a_traceback(changes: dict[str, object]) -> None:
    assert assess(_changed(**changes)).verdict.decision in Decision


@pytest.mark.filterwarnings("error")
def test_two_requests_a_trial_are_too_few_but_no_error() -> None:
    found = assess(demo_study(demo_design(loads=(C16,), requests=2)))
    assert found.verdict.decision is Decision.MEASURE_MORE


def test_what_the_prompts_source_says_of_sampling_is_a_warning() -> None:
    study = demo_study(demo_design(repeats=1, loads=(C1,), production_load=C1))
    remark = "Measured at temperature 0, but the source asks for 0.7 (96 of 96)."
    provenance = {**study.provenance, "prompt_notes": {"json": [remark], "prose": []}}
    warnings = assess(replace(study, provenance=provenance)).warnings
    assert f"Prompts of segment json: {remark}" in warnings
    assert not any("segment prose" in warning for warning in warnings)
