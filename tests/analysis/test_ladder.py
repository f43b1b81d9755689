from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.experiment_studies import Request, Truth, experiment_design, experiment_study

from specwise.analysis.cells import cells
from specwise.analysis.comparison import compare, speedup_effects
from specwise.analysis.ladder import Ladder, climb, saturations, trials_to_skip
from specwise.analysis.latency import summarise
from specwise.domain import LoadPoint, Loop, Outcome, StudyData, Trial

LOAD = "concurrency = [1, 2, 4, 8, 16, 32]\nrequests = 64\nrepeats = 2\nproduction = 8"
DESIGN = experiment_design("ladder", LOAD)


def crossing(at: float, *, full_at: float = math.inf) -> Truth:
    """The candidate is (at / load)^0.3 times as fast; a full server gives no more than its cap."""

    def truth(
        trial: Trial, segment: str, _: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        load = trial.load.value
        base = 0.01 * max(load**0.4, load / full_at * full_at**0.4)
        speedup = (at / load) ** 0.3 if trial.arm != "baseline" else 1.0
        noise = math.exp(0.08 * difficulty + rng.normal(0, 0.04))
        return Request(base / speedup * noise, ttft_s=0.02 * math.exp(rng.normal(0, 0.2)))

    return truth


def climbed(truth: Truth, *, seed: int = 0) -> StudyData:
    """The study as `specwise measure` leaves it: loads one by one, the rest skipped when told."""
    full = experiment_study(DESIGN, truth, seed=seed, trial_sd=0.02)
    skipped: dict[str, str] = {}
    kept: list[str] = []
    for load in DESIGN.loads:
        so_far = replace(
            full,
            trials=tuple(t for t in full.trials if t.trial.trial_id in kept),
            skipped=skipped,
        )
        skipped |= trials_to_skip(so_far)
        kept += [t.trial_id for t in DESIGN.trials if t.load == load and t.trial_id not in skipped]
    return replace(
        full, trials=tuple(t for t in full.trials if t.trial.trial_id in kept), skipped=skipped
    )


def ladder_of(study: StudyData) -> Ladder:
    measured = cells(study)
    return climb(study, measured, summarise(study, measured), compare(study, measured).effects)


def test_a_clear_loss_ends_the_climb_but_not_before_production() -> None:
    ladder = ladder_of(climbed(crossing(at=3)))
    assert [r.load.value for r in ladder.rungs] == [1, 2, 4, 8]
    assert [load.value for load in ladder.skipped] == [16, 32]
    assert ladder.end == "clear"
    assert "draft is slower at c" in ladder.reason
    assert "the effect falls with the load" in ladder.reason
    early = ladder_of(climbed(crossing(at=0.3)))
    assert [r.load.value for r in early.rungs] == [1, 8], "production is never skipped"
    assert [load.value for load in early.skipped] == [2, 4, 16, 32]


def test_a_winner_is_climbed_to_the_top() -> None:
    ladder = ladder_of(climbed(crossing(at=200)))
    assert ladder.end == "climbed"
    assert ladder.skipped == ()
    assert len(ladder.rungs) == 6
    (crossover,) = ladder.crossovers["speedup"]
    assert crossover.outcome == "always better"


def test_the_crossover_holds_the_truth_and_every_percentile_is_there() -> None:
    ladder = ladder_of(climbed(crossing(at=5)))
    (crossover,) = ladder.crossovers["speedup"]
    assert crossover.outcome == "crosses"
    assert crossover.low is not None
    assert crossover.high is not None
    assert crossover.low < 5 < crossover.high
    for rung in ladder.rungs:
        for metric in ("ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p95", "tpot_p99"):
            effect = rung.effect("draft", metric)
            assert effect is not None
            assert effect.low < effect.ratio < effect.high
        assert {s.arm for s in rung.summaries} == {"baseline", "draft"}


def test_saturated_servers_end_the_climb_and_say_so() -> None:
    ladder = ladder_of(climbed(crossing(at=500, full_at=4)))
    assert ladder.end == "saturated"
    assert [r.load.value for r in ladder.rungs] == [1, 2, 4, 8]
    assert "2 times the clients of c4 give at most 1." in ladder.reason
    assert {s.arm for s in ladder.rungs[-1].saturated} == {"baseline", "draft"}


def test_a_machine_that_was_busy_for_a_while_is_not_a_saturated_server() -> None:
    def busy(
        trial: Trial, segment: str, t: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        request = crossing(at=500)(trial, segment, t, difficulty, rng)
        slow = trial.load.value == 2 or (trial.load.value == 8 and trial.repeat == 0)
        return replace(request, tpot_s=request.tpot_s * (2.5 if slow else 1))

    study = climbed(busy)
    ladder = ladder_of(study)
    assert ladder.end == "climbed"
    assert ladder.skipped == ()
    assert saturations(study, cells(study)) == ()


def test_one_arm_that_is_saturated_does_not_end_the_climb() -> None:
    def only_baseline(
        trial: Trial, segment: str, t: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        full_at = 4 if trial.arm == "baseline" else math.inf
        return crossing(at=500, full_at=full_at)(trial, segment, t, difficulty, rng)

    ladder = ladder_of(climbed(only_baseline))
    assert ladder.end == "climbed"
    assert "baseline is saturated at c8" in ladder.reason


def test_requests_that_give_up_are_saturation_and_one_bad_request_is_not() -> None:
    def losing(share: float) -> Truth:
        def truth(
            trial: Trial, segment: str, t: float, difficulty: float, rng: np.random.Generator
        ) -> Request:
            request = crossing(at=500)(trial, segment, t, difficulty, rng)
            lost = trial.load.value >= 2 and rng.random() < share
            return replace(request, outcome=Outcome.TIMEOUT) if lost else request

        return truth

    ladder = ladder_of(climbed(losing(0.2)))
    assert ladder.end == "saturated"
    assert "requests timed out or were refused" in ladder.reason
    assert ladder_of(climbed(losing(0.002))).end == "climbed"


def test_an_open_loop_is_saturated_when_its_queue_never_settles() -> None:
    design = experiment_design(
        "ladder", "rate_per_s = [1, 2, 4]\nrequests = 60\nrepeats = 2\nproduction = 2"
    )
    index = {"n": 0}

    def truth(
        trial: Trial, segment: str, t: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        index["n"] += 1
        place = index["n"] % 60
        queue = 0.05 * place if trial.load.value >= 4 else 0.0
        return Request(0.01, ttft_s=0.1 * math.exp(rng.normal(0, 0.2)) + queue)

    study = experiment_study(design, truth)
    full = saturations(study, cells(study))
    assert {(s.arm, s.load) for s in full} == {
        (arm, LoadPoint(Loop.OPEN, 4, "poisson")) for arm in ("baseline", "draft")
    }
    assert all("the queue never settles" in s.reason for s in full)


def test_an_unfinished_climb_says_so_and_decides_only_about_whole_loads() -> None:
    study = experiment_study(DESIGN, crossing(at=0.3))
    first = [t.trial_id for t in DESIGN.trials if t.load.value == 1]
    part = replace(study, trials=tuple(t for t in study.trials if t.trial.trial_id in first[:-1]))
    assert trials_to_skip(part) == {}
    assert trials_to_skip(replace(study, trials=())) == {}
    assert ladder_of(part).end == "unfinished"
    begun = [*first, next(t.trial_id for t in DESIGN.trials if t.load.value == 2)]
    into_the_second = replace(
        study, trials=tuple(t for t in study.trials if t.trial.trial_id in begun)
    )
    skipped = {DESIGN.trials[i].load.value for i, t in enumerate(DESIGN.trials)
               if t.trial_id in trials_to_skip(into_the_second)}  # fmt: skip
    assert skipped == {4, 16, 32}, "what was begun is finished"


def test_without_trial_noise_nothing_is_clear() -> None:
    design = experiment_design(
        "ladder", "concurrency = [1, 2]\nrequests = 40\nrepeats = 1\nnoise_floor = false"
    )
    study = experiment_study(design, crossing(at=0.2))
    light = replace(study, trials=tuple(t for t in study.trials if t.trial.load.value == 1))
    assert trials_to_skip(light) == {}


@pytest.mark.parametrize("at", [math.inf, 4.0])
def test_the_rule_rarely_stops_by_chance_and_leaves_the_effects_unbiased(at: float) -> None:
    """Equal arms (at = inf) are stopped in fewer than 5 %; stopping shifts no effect."""

    def equal(
        trial: Trial, segment: str, t: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        plain = replace(trial, arm="baseline") if math.isinf(at) else trial
        return crossing(at=1.0 if math.isinf(at) else at)(plain, segment, t, difficulty, rng)

    small = experiment_design(
        "ladder", "concurrency = [1, 2, 4, 8]\nrequests = 8\nrepeats = 2\nproduction = 2"
    )
    stopped, errors = 0, []
    for seed in range(60):
        full = experiment_study(small, equal, seed=seed, trial_sd=0.03)
        for load in small.loads[1:]:
            so_far = replace(full, trials=tuple(t for t in full.trials if t.trial.load < load))
            if skipped := trials_to_skip(so_far):
                stopped += 1
                full = replace(
                    full,
                    trials=tuple(t for t in full.trials if t.trial.trial_id not in skipped),
                )
                break
        for e in speedup_effects(cells(full), "baseline"):
            if e.load.value == 2:
                truth = 1.0 if math.isinf(at) else (at / 2) ** 0.3
                errors.append(math.log(e.ratio / truth))
    if math.isinf(at):
        assert stopped <= 5
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(len(errors))
