from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.tune_truths import seconds_of
from tests.decision.tunings import TURNING, Tuning

from specwise.decision.findings import percent
from specwise.decision.standing import not_run, survey
from specwise.decision.tuning import USUAL_START_S, Spent, next_pick, probe_arms, sweep_seconds
from specwise.decision.ways import family_standings, to_confirm
from specwise.domain import Purpose
from specwise.measurement.sweep import families


def test_the_opening_shows_the_baseline_its_noise_and_each_method() -> None:
    tuning = Tuning(TURNING)
    opening = []
    for _ in range(8):
        step = tuning.step()
        assert step.trial is not None
        opening.append((step.trial.arm, step.trial.load.value, step.trial.purpose))
    measure, again = Purpose.MEASURE, Purpose.NOISE_FLOOR
    assert opening[:4] == [
        ("baseline", 1, measure),
        ("baseline", 4, measure),
        ("baseline", 16, measure),
        ("baseline", 4, again),
    ]
    assert probe_arms(tuning.design) == ("draft-k2", "ngram-k2")
    assert opening[4:8] == [
        ("draft-k2", 1, measure),
        ("draft-k2", 4, measure),
        ("ngram-k2", 1, measure),
        ("ngram-k2", 4, measure),
    ]


def test_it_ends_within_the_tolerance_after_a_part_of_the_sweep(tuned: Tuning) -> None:
    assert tuned.last.stopped == "tolerance"
    assert tuned.last.standing.regret_bound <= 0.02
    assert "within the tolerance" in tuned.last.reason
    spent = Spent.of(tuned.picks)
    assert spent.total_s < 0.5 * sweep_seconds(tuned.design, tuned.measured, spent)


def test_what_it_chose_is_what_the_truth_likes_best(tuned: Tuning) -> None:
    for cell in tuned.last.standing.cells:
        workload = tuned.design.workload(cell.workload)
        true = {
            arm.name: tuned.played.long_run(arm, workload, cell.load, 120)
            for arm in tuned.design.arms
        }
        assert true[cell.best] > max(true.values()) - 0.05


def test_most_intervals_hold_the_truth(tuned: Tuning) -> None:
    held = []
    for cell in tuned.last.standing.cells:
        workload = tuned.design.workload(cell.workload)
        off = tuned.played.long_run(tuned.design.arms[0], workload, cell.load, 120)
        for arm in cell.arms:
            true = tuned.played.long_run(tuned.design.arm(arm.arm), workload, cell.load, 120)
            held.append(math.log(arm.low) - 0.02 <= true - off <= math.log(arm.high) + 0.02)
    assert np.mean(held) > 0.85


def test_an_arm_that_is_ruled_out_is_never_the_best_and_says_why(hopeless: Tuning) -> None:
    standing = hopeless.last.standing
    assert standing.eliminated
    for out in standing.eliminated:
        assert out.arm not in {cell.best for cell in standing.cells}
        assert "worse in every cell" in out.reason
        assert out.measured == (out.arm in {t.trial.arm for t in hopeless.trials})
        assert ("predicted" in out.reason) != out.measured


def test_every_trial_that_did_not_run_has_a_reason(hopeless: Tuning) -> None:
    done = {t.trial.trial_id for t in hopeless.trials}
    why = not_run(hopeless.design, hopeless.last.standing, "enough is known", done)
    assert set(why) | done == {t.trial_id for t in hopeless.design.trials}
    assert not set(why) & done
    assert any("ruled out" in reason for reason in why.values())


def test_the_same_trials_give_the_same_answer(tuned: Tuning) -> None:
    again = survey(tuned.design, tuned.measured)
    assert again.regret_bound == tuned.last.standing.regret_bound
    assert again.cells == tuned.last.standing.cells


def test_a_spent_budget_ends_it_and_says_what_could_be_lost() -> None:
    tuning = Tuning(TURNING, budget_s=60.0, tolerance=1e-4).to_its_end()
    assert tuning.last.stopped == "budget"
    assert "1 min is spent" in tuning.last.reason
    assert percent(tuning.last.standing.regret_bound) in tuning.last.reason


def test_a_server_that_is_up_is_preferred_to_one_that_takes_long_to_start() -> None:
    """With a start of an hour nothing but what the opening started is worth a trial."""
    tuning = Tuning(TURNING)
    for _ in range(8):
        tuning.step()
    found = next_pick(
        tuning.design,
        tuning.measured,
        spent=Spent(Spent.of(tuning.picks).trials, (3600.0, 3600.0)),
        running=tuning.running,
        tolerance=1e-4,
        budget_s=None,
    )
    assert found.trial is not None
    assert found.trial.arm in tuning.running


def test_when_nothing_is_left_it_says_so() -> None:
    tuning = Tuning(TURNING, tolerance=1e-9)
    every = {t.trial_id for t in tuning.design.trials}
    found = next_pick(
        tuning.design,
        {},
        spent=Spent({}, ()),
        running=(),
        tolerance=1e-9,
        budget_s=None,
        over=every,
    )
    assert found.stopped == "exhausted"


def test_starts_are_part_of_what_was_spent(tuned: Tuning) -> None:
    spent = Spent.of(tuned.picks)
    assert spent.total_s == pytest.approx(
        sum(seconds_of(t) for t in tuned.trials) + 20.0 * len(tuned.running)
    )
    assert spent.start_s == pytest.approx(20.0)
    assert Spent({}, ()).start_s == USUAL_START_S


def test_trials_that_something_slowed_do_not_mislead(tuned: Tuning) -> None:
    """Three of the baseline's first trials are slow: everything else would look twice as good."""
    tuning = Tuning.slow_at_first(3).to_its_end()
    held_up = {t.trial.trial_id for t in tuning.trials[:3]}
    assert set(tuning.last.standing.slowed) == held_up
    assert tuning.last.standing.slowed[tuning.trials[0].trial.trial_id] > 1.8
    for load in tuning.design.loads:
        ours, quiet = (
            t.last.standing.cell(tuning.design.production_workload, load) for t in (tuning, tuned)
        )
        chosen = next(a for a in quiet.arms if a.arm == ours.best)  # perhaps one it did not try
        assert chosen.high > 0.98 * quiet.arms[0].gain, load.label
    assert tuned.last.standing.slowed == {}


def test_the_price_of_idling_is_measured_where_a_schedule_would_idle(tuned: Tuning) -> None:
    """It never is the best arm, so nothing but the schedule asks for it."""
    ways = family_standings(tuned.design, tuned.last.standing, tuned.measured)
    first = to_confirm(ways, 0.02)[0]
    assert first.schedule is not None
    idle = next(a for a in families(tuned.design)[first.family] if a.endswith("idle"))
    for load in tuned.design.loads:
        arms = tuned.last.standing.cell(tuned.design.production_workload, load).arms
        drafting = [a.gain for a in arms if a.arm.startswith("draft-k")]
        if max(drafting) < 1:
            assert next(a for a in arms if a.arm == idle).trials, load.label
