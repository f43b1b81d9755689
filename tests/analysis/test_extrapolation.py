"""A study simulated with known costs: are costs, acceptance and crossover found again?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.prediction.test_study import CLOSED, simulated

from specwise.analysis.acceptance import summarise_acceptance
from specwise.analysis.cells import table_of
from specwise.analysis.crossover import Crossover
from specwise.analysis.extrapolation import Extrapolation, extrapolate, observed_steps
from specwise.analysis.latency import summarise
from specwise.decision.assessment import Assessment, assess
from specwise.domain import Arm, LoadPoint, Loop, Slo, Speculation, StudyData
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.prediction.costs import StepShape
from specwise.prediction.forecast import PRIORS, Candidate, Prior, Scenario, forecast_study

ALIKE = Prior((0.75, 0.6, 0.5), 1.0, "the truth")
LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


def scenario(
    loads: tuple[float, ...],
    *candidates: Candidate,
    prompt: int = 200,
    loop: Loop = Loop.CLOSED,
) -> Scenario:
    points = tuple(LoadPoint(loop, v, "" if loop is Loop.CLOSED else "poisson") for v in loads)
    draft = load_checkpoint("llama-3.2-1b")
    return Scenario(
        target=load_checkpoint("llama-3.1-8b"),
        gpu=find_gpu("h100"),
        gpus=1,
        prompt_tokens=prompt,
        output_tokens=100,
        loads=points,
        production=points[-1],
        candidates=candidates
        or (Candidate("draft", Speculation("draft_model", 3, draft="d"), ALIKE, draft),),
        slo=Slo(tpot_s=0.05),
    )


def crossing(assessment: Assessment) -> Crossover:
    [found] = [c for c in assessment.crossovers if c.segment is None]
    return found


def points(*values: float) -> tuple[LoadPoint, ...]:
    return tuple(LoadPoint(Loop.CLOSED, v) for v in values)


@pytest.fixture(scope="module")
def measured() -> StudyData:
    """Half of the ladder, standing in for a measurement."""
    return replace(forecast_study(scenario(LADDER[:5])), predicted=False)


@pytest.fixture(scope="module")
def told(measured: StudyData) -> Extrapolation:
    return extrapolate(measured, loads=points(*LADDER))


def test_the_crossover_is_found_beyond_the_loads_that_were_measured(
    measured: StudyData, told: Extrapolation
) -> None:
    truth = crossing(assess(forecast_study(scenario(LADDER))))
    assert truth.load_value is not None
    assert truth.load_value > LADDER[4]
    assert crossing(assess(measured)).load_value is None
    found = crossing(assess(told.predicted))
    assert found.load_value is not None
    assert abs(math.log2(found.load_value / truth.load_value)) <= 1


def test_the_crossover_is_found_from_every_second_load() -> None:
    truth = crossing(assess(forecast_study(scenario(LADDER))))
    half = forecast_study(scenario(LADDER[::2]))
    found = crossing(assess(extrapolate(half, loads=points(*LADDER)).predicted))
    assert found.load_value is not None
    assert truth.load_value is not None
    assert abs(math.log2(found.load_value / truth.load_value)) <= 1


def test_steps_are_the_ones_that_were_priced(measured: StudyData) -> None:
    asked = scenario(LADDER[:5])
    speculation = asked.candidates[0].speculation
    errors = []
    for trial in measured.trials:
        spoken = None if trial.trial.arm == "baseline" else speculation
        costs = asked.baseline_costs()
        if spoken:
            costs = asked.candidate_costs(asked.candidates[0])
        for step in observed_steps(table_of(trial, asked.slo), spoken):
            if not step.prefill:
                shape = StepShape(step.tokens, step.context_tokens, step.requests, step.k or 0)
                errors.append(abs(step.seconds / costs.step_s(shape) - 1))
                assert step.requests <= trial.trial.load.value
    assert len(errors) > 20
    assert np.median(errors) < 0.03


def test_acceptance_sizes_and_loads_are_the_studys_own(told: Extrapolation) -> None:
    [candidate] = told.candidates
    assert candidate.acceptance.positions(3) == pytest.approx(ALIKE.positions(3), abs=0.03)
    assert candidate.acceptance.source == f"measured in {told.name}"
    assert told.prompt_tokens == pytest.approx(200, rel=0.15)
    assert told.output_tokens == pytest.approx(100, rel=0.15)
    assert told.predicted.predicted
    assert [a.name for a in told.predicted.design.arms] == ["baseline", "draft"]


def test_other_loads_and_draft_lengths_by_default_and_on_demand(measured: StudyData) -> None:
    found = extrapolate(measured, ks=(3, 1, 6), repeats=1)
    assert [load.value for load in found.loads] == [1, 2, 4, 8, 16, 32, 64]
    assert found.production.value == 16
    assert [(c.name, c.speculation.k) for c in found.candidates] == [
        ("draft", 3), ("draft, k=1", 1), ("draft, k=6", 6)
    ]  # fmt: skip
    six = found.candidates[2].acceptance.positions(6)
    assert six[3:] == (six[2],) * 3


def test_a_lookup_keeps_its_share_of_steps_with_drafts() -> None:
    ngram = Candidate("ngram", Speculation("ngram", 3), PRIORS["ngram"])
    study = forecast_study(scenario((1.0, 4.0, 16.0), ngram))
    [candidate] = extrapolate(study, repeats=1).candidates
    assert candidate.acceptance.drafted_share == pytest.approx(0.5, abs=0.03)
    assert candidate.acceptance.positions(3) == pytest.approx((0.16, 0.80, 0.83), abs=0.04)


def test_each_segment_of_a_mix_keeps_its_own_acceptance() -> None:
    found = extrapolate(simulated(CLOSED), repeats=1)
    seen = {
        a.segment: a.conditional[0]
        for a in summarise_acceptance(found.predicted)
        if a.load == found.loads[-1]
    }
    assert seen["easy"] == pytest.approx(0.8, abs=0.05)
    assert seen["hard"] == pytest.approx(0.4, abs=0.06)
    [candidate] = found.candidates
    assert 0.4 < candidate.acceptance.at(1) < 0.8


def test_an_open_loop_is_extrapolated_in_requests_per_second() -> None:
    study = forecast_study(scenario((1.0, 4.0, 8.0), loop=Loop.OPEN), repeats=1)
    found = extrapolate(study, repeats=1)
    assert [load.value for load in found.loads] == [1, 4, 8, 16, 32]
    assert {load.loop for load in found.loads} == {Loop.OPEN}


def test_too_little_to_go_by_is_one_clear_error(measured: StudyData) -> None:
    only = replace(measured, trials=tuple(t for t in measured.trials if t.trial.arm == "baseline"))
    with pytest.raises(InputError, match="no finished trials"):
        extrapolate(only)
    small = forecast_study(scenario((1.0,)), repeats=1)
    few = replace(
        small,
        trials=tuple(
            replace(t, records=tuple(replace(r, acceptance=None) for r in t.records), parts=())
            for t in measured.trials
        ),
        design=measured.design,
    )
    with pytest.raises(InputError, match="no acceptance"):
        extrapolate(few)


def serving(study: StudyData) -> dict[tuple[str, float], tuple[float, float]]:
    """(median TPOT, output tokens/s) by arm and load."""
    found = {}
    for summary in summarise(study):
        assert summary.tpot_s is not None
        assert summary.output_tokens_per_s is not None
        found[summary.arm, summary.load.value] = (summary.tpot_s.p50, summary.output_tokens_per_s)
    return found


@pytest.mark.parametrize("prompt", [200, 1000])
def test_times_at_eight_times_the_load_are_near_the_truth(prompt: int) -> None:
    """A fit that takes cached tokens for requests, or queues for seats, is off by half."""
    beyond = (2.0, 32.0, 128.0)
    truth = serving(forecast_study(scenario(beyond, prompt=prompt)))
    seen = forecast_study(scenario((1.0, 4.0, 16.0), prompt=prompt))
    told = extrapolate(seen, loads=points(*beyond))
    for key, (tpot_s, tokens_per_s) in serving(told.predicted).items():
        assert tpot_s == pytest.approx(truth[key][0], rel=0.1), key
        assert tokens_per_s == pytest.approx(truth[key][1], rel=0.12), key
    assert any("At c32, c128 more requests run at once" in note for note in told.notes)


def test_arms_that_differ_in_k_share_what_they_know() -> None:
    draft = load_checkpoint("llama-3.2-1b")
    arms = [
        Candidate(f"draft-k{k}", Speculation("draft_model", k, draft="d"), ALIKE, draft)
        for k in (1, 3)
    ]
    found = extrapolate(forecast_study(scenario(LADDER[:4], *arms)), ks=(2, 3), repeats=1)
    assert [(c.name, c.speculation.k) for c in found.candidates] == [
        ("draft-k1", 1), ("draft-k3", 3), ("draft, k=2", 2)
    ]  # fmt: skip
    assert len({c.acceptance for c in found.candidates}) == 1
    assert found.candidates[0].acceptance.positions(3) == pytest.approx(
        ALIKE.positions(3), abs=0.03
    )
    assert [note[:22] for note in found.notes if "Step costs" in note] == ["Step costs with draft:"]


def test_two_draft_models_have_costs_of_their_own() -> None:
    small, large = load_checkpoint("llama-3.2-1b"), load_checkpoint("llama-3.2-3b")
    asked = scenario(
        LADDER[:4],
        Candidate("small", Speculation("draft_model", 3, draft="s"), ALIKE, small),
        Candidate("large", Speculation("draft_model", 3, draft="l"), ALIKE, large),
    )
    found = extrapolate(forecast_study(asked), repeats=1)
    shape = StepShape(32, 2000, 8, 3)
    steps = []
    for candidate, truth in zip(found.candidates, asked.candidates, strict=True):
        steps.append(float(found.candidate_costs(candidate).step_s(shape)))
        assert steps[-1] == pytest.approx(
            float(asked.candidate_costs(truth).step_s(shape)), rel=0.05
        )
    assert steps[1] > 1.1 * steps[0]


def test_what_is_left_out_is_said(measured: StudyData) -> None:
    schedule = Speculation("draft_model", 3, draft="d", schedule=((1, 4, 3), (5, 256, 1)))
    arms = (*measured.design.arms, Arm("by batch", schedule), Arm("late", Speculation("ngram", 3)))
    told = extrapolate(
        replace(measured, design=replace(measured.design, arms=arms)), loads=points(4), repeats=1
    )
    assert "by batch is left out: its k follows the batch size." in told.notes
    assert "late is left out: it has no finished trial." in told.notes
    assert [c.name for c in told.candidates] == ["draft"]


def test_the_servers_own_limits_are_kept(measured: StudyData) -> None:
    """A closed loop's next request waits for a step: that is no limit of seats."""
    assert not [note for note in extrapolate(measured, loads=points(8)).notes if "At most" in note]
    words = ["vllm", "serve", "m", "--max-num-seqs", "6", "--max-num-batched-tokens", "512"]
    described = {arm.name: {"command": words} for arm in measured.design.arms}
    told = extrapolate(
        replace(measured, provenance={"arms": described}), loads=points(16), repeats=1
    )
    assert "At most 6 requests run at once, as the servers say." in told.notes
    running = [g.running for t in told.predicted.trials for p in t.parts for g in p.gauges]
    assert max(r for r in running if r is not None) == 6


def test_a_limit_of_seats_shows_in_the_gauges(measured: StudyData) -> None:
    words = ["vllm", "serve", "m", "--max-num-seqs", "6"]
    described = {arm.name: {"command": words} for arm in measured.design.arms}
    few = extrapolate(
        replace(measured, provenance={"arms": described}), loads=points(1, 2, 4, 24)
    ).predicted
    told = extrapolate(few, loads=points(24), repeats=1)
    assert "At most 6 requests run at once, as in the study." in told.notes


@pytest.mark.parametrize("process", ["constant", "gamma"])
def test_requests_arrive_as_in_the_study(process: str) -> None:
    study = forecast_study(scenario((1.0, 4.0, 8.0), loop=Loop.OPEN), repeats=1)
    load = LoadPoint(Loop.OPEN, 4.0, process, burstiness=0.2)
    told = extrapolate(study, loads=(load,), repeats=1)
    sent = [r.sent_s for r in told.predicted.trials[0].records]
    gaps = np.diff(sorted(sent))
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.6)
    spread = np.std(gaps) / np.mean(gaps)
    assert spread < 0.01 if process == "constant" else spread > 1.5


def test_chunks_of_several_steps_are_one_clear_error(measured: StudyData) -> None:
    def merged(times: tuple[float, ...]) -> tuple[float, ...]:
        return (times[0], *times[5::5])

    trials = []
    for trial in measured.trials:
        records = tuple(
            replace(r, chunk_s=merged(r.chunk_s), chunk_tokens=(1,) + (9,) * len(r.chunk_s[5::5]))
            for r in trial.records
        )
        trials.append(replace(trial, records=records))
    with pytest.raises(InputError, match="several steps came in one chunk") as error:
        extrapolate(replace(measured, trials=tuple(trials)))
    assert "--stream-interval" in str(error.value)
