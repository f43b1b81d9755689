"""Steps read back from records: of a simulation, whose steps are known, and of faults by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.test_extrapolation import LADDER, scenario

from specwise.analysis.cells import CellKey, TrialTable, table_of
from specwise.analysis.steps import (
    context_slope,
    drafted_share,
    gaps_of,
    observed_steps,
    slowed_trials,
)
from specwise.domain import (
    LoadPoint,
    Loop,
    MeasuredTrial,
    Outcome,
    Purpose,
    RequestRecord,
    Slo,
    Speculation,
    StudyData,
    Trial,
)
from specwise.prediction.costs import StepShape
from specwise.prediction.forecast import forecast_study

DRAFT = Speculation("draft_model", 3, draft="d")


def record(index: int, times: tuple[float, ...], **given: object) -> RequestRecord:
    """A request of 10 prompt tokens that was sent a second before its first chunk."""
    found = RequestRecord(
        index=index,
        prompt_id=str(index),
        segment="s",
        temperature=0.0,
        part=0,
        intended_s=times[0] - 1,
        sent_s=times[0] - 1,
        chunk_s=times,
        chunk_tokens=(1,) * len(times),
        finished_s=times[-1],
        outcome=Outcome.OK,
        prompt_tokens=10,
        output_tokens=len(times),
    )
    return replace(found, **given)  # type: ignore[arg-type]


def table(*records: RequestRecord) -> TrialTable:
    load = LoadPoint(Loop.CLOSED, 2.0)
    trial = Trial("t", "baseline", "s", load, 0, Purpose.MEASURE, len(records))
    return table_of(MeasuredTrial(trial, records, (), complete=True), Slo())


def every(start: float, step: float, count: int) -> tuple[float, ...]:
    return tuple(start + step * i for i in range(count))


@pytest.fixture(scope="module")
def simulated() -> StudyData:
    return forecast_study(scenario(LADDER[:5]), repeats=1)


def test_what_a_step_computed_is_known_to_the_token(simulated: StudyData) -> None:
    """The simulation's costs of the very shapes that were read give the times that were read."""
    asked = scenario(LADDER[:5])
    for trial in simulated.trials:
        if trial.trial.load.value > 1:
            spoken = None if trial.trial.arm == "baseline" else DRAFT
            costs = asked.candidate_costs(asked.candidates[0]) if spoken else asked.baseline_costs()
            [gaps] = gaps_of([table_of(trial, Slo())], spoken)
            alone = gaps.prompts == 0
            shape = StepShape(
                gaps.tokens[alone],
                gaps.context_tokens[alone],
                gaps.running[alone],
                3 * bool(spoken),
            )
            assert gaps.seconds[alone] == pytest.approx(costs.step_s(shape), rel=1e-6)
            assert alone.sum() > 100


def test_the_price_of_the_cache_is_found_apart(simulated: StudyData) -> None:
    costs = scenario(LADDER[:5]).baseline_costs()
    per_token = float(costs.step_s(StepShape(8, 9000, 8, 0)) - costs.step_s(StepShape(8, 0, 8, 0)))
    plain = [table_of(t, Slo()) for t in simulated.trials if t.trial.arm == "baseline"]
    found = context_slope(gaps_of(plain, None))
    assert found is not None
    slope, error = found
    assert slope == pytest.approx(per_token / 9000, rel=0.05)
    assert 0 < error < 0.1 * slope
    assert context_slope([]) is None


def test_noise_makes_the_price_of_the_cache_uncertain_not_wrong(simulated: StudyData) -> None:
    rng = np.random.default_rng(1)
    plain = [table_of(t, Slo()) for t in simulated.trials if t.trial.arm == "baseline"]
    gaps = [
        replace(g, seconds=g.seconds * np.exp(rng.normal(0, 0.05, len(g.seconds))))
        for g in gaps_of(plain, None)
    ]
    exact, noisy = context_slope(gaps_of(plain, None)), context_slope(gaps)
    assert exact is not None
    assert noisy is not None
    assert noisy[1] > 10 * exact[1]
    assert abs(noisy[0] - exact[0]) < 4 * noisy[1]


def test_who_was_running_is_not_known_after_the_first_request_that_a_stop_cut_off() -> None:
    """Three ran in part 0; the cell keeps the later answer of the third, sent at 4."""
    first, second = record(0, every(1, 0.5, 30)), record(1, every(1.1, 0.5, 30))
    again = replace(record(2, every(1, 0.5, 30)), part=1)
    whole = [
        step
        for step in observed_steps(table(first, second, replace(again, part=0)), None)
        if not step.prefill
    ]
    assert {step.requests for step in whole} == {3}
    cut = [step for step in observed_steps(table(first, second, again), None) if not step.prefill]
    assert {step.requests for step in cut} == {1}, "part 1 only"
    assert sum(step.steps for step in cut) == 28


def test_nobody_is_known_to_be_alone_after_that_either() -> None:
    one_by_one = [record(i, every(1 + 10 * i, 0.5, 10)) for i in range(4)]
    later = record(4, every(1, 0.5, 10), part=1)
    [first] = [s for s in observed_steps(table(*one_by_one, later), None) if s.prefill]
    assert first.steps == 4, "the fifth, and three before the one that may have had company"
    assert (first.tokens, first.seconds) == (10, 1)


def test_a_chunk_of_several_steps_is_left_out() -> None:
    merged = record(0, every(1, 0.5, 20), chunk_tokens=(1,) + (2,) * 19, output_tokens=39)
    assert not [s for s in observed_steps(table(merged), None) if not s.prefill]
    assert [s for s in observed_steps(table(merged), DRAFT) if not s.prefill]


def test_a_request_that_failed_before_its_usage_still_takes_its_place() -> None:
    running = record(0, every(1, 0.5, 40))
    cut = record(1, every(6, 0.5, 20), prompt_tokens=None, output_tokens=None, outcome=Outcome.CUT)
    steps = [s for s in observed_steps(table(running, cut), None) if not s.prefill]
    assert sum(s.steps for s in steps if s.requests == 2) == pytest.approx(19, abs=1)
    assert sum(s.steps for s in steps if s.requests == 1) == pytest.approx(19, abs=1)
    assert {s.requests for s in steps} == {1, 2}
    refused = replace(cut, chunk_s=(), chunk_tokens=(), outcome=Outcome.REFUSED)
    alone = [s for s in observed_steps(table(running, refused), None) if not s.prefill]
    assert {s.requests for s in alone} == {1}


def test_long_prompts_may_take_several_steps() -> None:
    decoding = record(0, every(1, 0.5, 60))
    joining = [record(i, every(1 + 5 * i, 0.5, 3), prompt_tokens=900) for i in range(1, 7)]
    trial = table(decoding, *joining)
    assert max(s.tokens for s in observed_steps(trial, None)) > 900
    short = observed_steps(trial, None, longest_prompt=800)
    assert max(s.tokens for s in short) < 900


def test_without_per_request_figures_every_step_is_taken_to_draft() -> None:
    assert drafted_share([record(0, every(1, 0.5, 10))]) == 1


def cell_of(*steps_s: float) -> dict[CellKey, tuple[TrialTable, ...]]:
    """Repeats of one trial, each with steps of another length."""
    tables = []
    for repeat, step_s in enumerate(steps_s):
        found = table(record(0, every(1.0, step_s, 20)), record(1, every(1.0, step_s, 20)))
        tables.append(replace(found, trial=replace(found.trial, trial_id=str(repeat))))
    trial = tables[0].trial
    return {(trial.arm, trial.workload, trial.load, trial.purpose): tuple(tables)}


def test_a_trial_slower_than_its_repeats_was_held_up() -> None:
    found = slowed_trials(cell_of(0.05, 0.04, 0.1, 0.04, 0.041))
    assert found == {"2": pytest.approx(2.5)}
    assert slowed_trials(cell_of(0.1)) == {}, "there is nothing to compare it with"


def test_a_machine_that_is_always_uneven_names_no_trial() -> None:
    assert slowed_trials(cell_of(0.04, 0.1, 0.07, 0.05, 0.09)) == {}
