from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.tune_truths import Played, Search, TrueCosts, Truth, seconds_of

from specwise.decision.deployment import (
    MOST_CONFIRMATIONS,
    SCHEDULED,
    Confirmation,
    FamilyStanding,
    assess_tuning,
    confirm,
    confirmation_design,
    family_standings,
    next_way,
    recommend,
    settled,
    to_confirm,
)
from specwise.decision.findings import percent
from specwise.decision.observations import log_goodput
from specwise.decision.standing import not_run, survey
from specwise.decision.tuning import (
    USUAL_START_S,
    Spent,
    next_pick,
    probe_arms,
    sweep_seconds,
)
from specwise.decision.verdict import Decision
from specwise.domain import MeasuredTrial, Purpose, StudyData, StudyDesign, Trial
from specwise.measurement.design import parse_study
from specwise.measurement.sweep import families
from specwise.vllm.flags import schedule_problems

STUDY = """
name = "tuned"
[slo]
bound = "throughput"
[serve]
model = "simulated"
{serve}
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[arm]]
name = "ngram"
speculation = {{ method = "ngram", k = 3 }}
[[segment]]
name = "json"
prompts = "simulated"
[[segment]]
name = "prose"
prompts = "simulated"
temperature = 0.8
[[workload]]
name = "mix"
shares = {{ json = 0.5, prose = 0.5 }}
[load]
concurrency = [1, 4, 16]
requests = [12, 24, 80]
[tune]
k = [1, 2, 4]
draft_sampling = ["greedy"]
"""
SIZES = tuple((100 + 10 * i, 40 + i) for i in range(20)) * 10
# Compute binds at about ten tokens: speculation wins alone and loses in a crowd.
PLAIN = TrueCosts(0.02, 0.002, 2.0, 1e-7, 0.0005)
DRAFT = replace(PLAIN, draft_pass_s=0.0012, draft_token_s=0.00004, speculates=True)
NGRAM = replace(PLAIN, draft_pass_s=0.0004, lookup=True, speculates=True)
TURNING = Truth(
    {"": PLAIN, "draft_model": DRAFT, "ngram": NGRAM},
    {
        "draft_model": {"json": (0.85,) * 8, "prose": (0.7,) * 8},
        "ngram": {"json": (0.5,) * 8, "prose": (0.3,) * 8},
    },
    {"json": 0.3, "prose": 0.1},
    {"json": SIZES, "prose": SIZES},
    noise=0.005,
)
HOPELESS = replace(
    TURNING,
    acceptance={m: dict.fromkeys(("json", "prose"), (0.05,) * 8) for m in ("draft_model", "ngram")},
)


def design_of(serve: str = "") -> StudyDesign:
    return parse_study(STUDY.format(serve=serve), name="t", experiment="tune")


class SlowAtFirst(Played):
    """An engine that something else slows while its first trials run."""

    def __init__(self, truth: Truth, rng: np.random.Generator, trials: int) -> None:
        super().__init__(truth, rng)
        self._left = trials

    def run(self, design: StudyDesign, trial: Trial) -> MeasuredTrial:
        found = super().run(design, trial)
        self._left -= 1
        return found if self._left < 0 else slowed(found, 2.2)


def slowed(found: MeasuredTrial, times: float) -> MeasuredTrial:
    records = tuple(
        replace(
            r,
            intended_s=r.intended_s * times,
            sent_s=r.sent_s * times,
            chunk_s=tuple(s * times for s in r.chunk_s),
            finished_s=r.finished_s * times,
        )
        for r in found.records
    )
    parts = tuple(replace(part, duration_s=part.duration_s * times) for part in found.parts)
    return replace(found, records=records, parts=parts)


class Tuning(Search):
    """A search on a simulated engine; ``last`` is what ended it."""

    def __init__(
        self,
        truth: Truth,
        *,
        design: StudyDesign | None = None,
        tolerance: float = 0.02,
        budget_s: float | None = None,
    ) -> None:
        engine = Played(truth, np.random.default_rng(5))
        super().__init__(
            engine, design or design_of(), tolerance=tolerance, budget_s=budget_s, start_s=20.0
        )

    @classmethod
    def slow_at_first(cls, trials: int) -> Tuning:
        """Something else takes most of the machine while the first ``trials`` run."""
        tuning = cls(TURNING)
        tuning.played = SlowAtFirst(TURNING, np.random.default_rng(5), trials)
        return tuning

    def to_its_end(self) -> Tuning:
        self.last = self.run()
        return self


@pytest.fixture(scope="module")
def tuned() -> Tuning:
    return Tuning(TURNING).to_its_end()


@pytest.fixture(scope="module")
def hopeless() -> Tuning:
    return Tuning(HOPELESS).to_its_end()


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


def test_goodput_counts_only_what_meets_the_limits(tuned: Tuning) -> None:
    tables = next(iter(tuned.measured.values()))
    whole = log_goodput(tables[0])
    halved = replace(tables[0], meets_slo=np.arange(len(tables[0].ok)) % 2 == 0)
    share = halved.meets_slo.mean()
    assert log_goodput(halved) == pytest.approx(whole + math.log(share))
    none = replace(tables[0], ok=np.zeros_like(tables[0].ok))
    assert math.isnan(log_goodput(none))


# ---------------------------------------------------------------------------------------------
# Deployment: ways, schedule, confirmation, recommendation


def confirmed(tuning: Tuning) -> tuple[StudyData, tuple[Confirmation, ...]]:
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    way = to_confirm(ways, 0.02)[0]
    study = tuning.confirm(way, repeats=6, all_workloads=True)
    return study, confirm(study, way.family)


def test_a_schedule_follows_what_pays_at_each_load(tuned: Tuning) -> None:
    ways = family_standings(tuned.design, tuned.last.standing, tuned.measured)
    draft = next(way for way in ways if way.family == "draft")
    assert draft.schedule is not None
    assert schedule_problems([list(row) for row in draft.schedule.rows]) == []
    assert list(draft.schedule.lengths) == sorted(draft.schedule.lengths, reverse=True)
    assert draft.scheduled_gain > draft.static_gain
    assert [load.value for load, *_ in draft.idle_price] == [1, 4, 16]
    busy = draft.idle_price[-1]
    assert busy[1] == pytest.approx(0.95, abs=0.06)  # the draft's first pass, every step
    assert ways == tuple(sorted(ways, key=lambda way: -way.gain))


def test_the_confirmation_is_a_plain_study_dealt_anew(tuned: Tuning) -> None:
    ways = family_standings(tuned.design, tuned.last.standing, tuned.measured)
    design = confirmation_design(tuned.design, ways[0], repeats=3)
    assert [arm.name for arm in design.arms] == ["baseline", ways[0].static, SCHEDULED]
    assert design.seed != tuned.design.seed
    assert design.experiment == ""
    assert design.tune is None
    speculation = design.arm(SCHEDULED).speculation
    assert speculation is not None
    assert ways[0].schedule is not None
    assert speculation.schedule == ways[0].schedule.rows
    assert speculation.k == max(k for _, _, k in speculation.schedule)


def test_clear_loads_are_not_repeated_for_ever(tuned: Tuning) -> None:
    study, found = confirmed(tuned)
    assert settled(study) <= set(study.design.loads)
    for load in settled(study):
        repeats = {
            t.trial.repeat
            for t in study.trials
            if t.trial.load == load and t.trial.workload == "mix" and t.trial.arm == SCHEDULED
        }
        assert len(repeats) < 6
    by_arm = {c.arm: c for c in found}
    assert by_arm[SCHEDULED].schedule
    assert all(cell.ratio <= cell.to_baseline.ratio for cell in by_arm[SCHEDULED].cells)
    assert by_arm["draft-k4"].outcome == "refused" if "draft-k4" in by_arm else True


def test_a_confirmed_schedule_is_recommended_and_no_load_is_slower(tuned: Tuning) -> None:
    study, found = confirmed(tuned)
    whole = assess_tuning(
        replace(tuned.study, skipped=_rest(tuned)),
        tuned.picks,
        [study],
        tolerance=0.02,
        budget_s=None,
    )
    assert whole.stopped == "tolerance"
    answer = whole.recommendation
    if found[0].outcome == "confirmed":
        assert answer.decision is Decision.SCHEDULE
        assert answer.arm == SCHEDULED
        assert answer.schedule == found[0].schedule
        assert "at no load is it slower" in answer.headline
    else:
        assert answer.decision in (Decision.OFF, Decision.MEASURE_MORE)


def _rest(tuning: Tuning) -> dict[str, str]:
    done = {t.trial.trial_id for t in tuning.trials}
    return not_run(tuning.design, tuning.last.standing, "enough", done)


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


def test_a_refused_schedule_is_composed_anew_from_what_the_confirmation_showed(
    tuned: Tuning,
) -> None:
    ways = family_standings(tuned.design, tuned.last.standing, tuned.measured)
    first = next_way(tuned.study, (), 0.02)
    assert first == to_confirm(ways, 0.02)[0]
    assert first.schedule is not None
    reckless = replace(first, schedule=replace(first.schedule, rows=((1, 64, 4),)))
    refused = tuned.confirm(reckless, repeats=4, all_workloads=False)
    assert confirm(refused, reckless.family)[0].outcome == "refused"
    again = next_way(tuned.study, (refused,), 0.02)
    assert again is not None
    assert again.family == first.family
    assert again.schedule is not None
    assert again.schedule.rows != reckless.schedule.rows
    held = tuned.confirm(again, repeats=6, all_workloads=False)
    assert confirm(held, again.family)[0].outcome != "refused"
    assert next_way(tuned.study, (refused,) * MOST_CONFIRMATIONS, 0.02) is None


@pytest.mark.parametrize(
    ("bound", "stopped", "decision"),
    [(0.015, "tolerance", Decision.OFF), (0.06, "budget", Decision.MEASURE_MORE)],
)
def test_a_refusal_means_off_only_if_little_else_can_be_missed(
    tuned: Tuning, bound: float, stopped: str, decision: Decision
) -> None:
    standing = replace(tuned.last.standing, regret_bound=bound)
    ways = family_standings(tuned.design, standing, tuned.measured)
    refused = Confirmation(ways[0].family, ways[0].static, (), ways[0].static, (), "refused", ())
    answer = recommend(tuned.design, standing, ways, (refused,), stopped=stopped, tolerance=0.02)
    assert answer.decision is decision
    assert percent(bound) in " ".join((answer.headline, *answer.reasons))


def test_what_a_confirmation_refused_is_not_tried_again(tuned: Tuning) -> None:
    """Trials in which the scheduled arm takes 1.1 times as long where drafting does not pay."""

    def refused(way: FamilyStanding) -> StudyData:
        study = tuned.confirm(way, repeats=4, all_workloads=False)
        dear = tuple(
            slowed(t, 1.1) if t.trial.arm == SCHEDULED and t.trial.load.value >= 16 else t
            for t in study.trials
        )
        study = replace(study, trials=dear)
        assert confirm(study, way.family)[0].outcome == "refused"
        return study

    first = next_way(tuned.study, (), 0.02)
    assert first is not None
    studies = [refused(first)]
    second = next_way(tuned.study, studies, 0.02)
    assert second is not None
    assert second.schedule is not None
    assert second.schedule.lengths[-1] == 0  # it drafted there, and idling was hardly tried
    studies.append(refused(second))
    last = next_way(tuned.study, studies, 0.02)
    assert last is None or last.family != first.family


def test_one_odd_trial_of_the_idling_arm_does_not_end_the_search_for_a_schedule(
    tuned: Tuning,
) -> None:
    """Drafting was refused where idling ran once, in a minute in which it looked a third slower."""
    idle = [t for t in tuned.study.trials if t.trial.arm == "draft-idle"]
    assert len({t.trial.load for t in idle}) == len(idle) > 0
    odd = tuple(slowed(t, 1.35) if t.trial.arm == "draft-idle" else t for t in tuned.study.trials)
    search = replace(tuned.study, trials=odd)
    first = next_way(search, (), 0.02)
    assert first is not None
    assert first.schedule is not None
    reckless = replace(first, schedule=replace(first.schedule, rows=((1, 1024, 4),)))
    refused = tuned.confirm(reckless, repeats=4, all_workloads=False)
    assert confirm(refused, reckless.family)[0].outcome == "refused"
    again = next_way(search, (refused,), 0.02)
    assert again is not None
    assert again.family == first.family
    assert again.schedule is not None
    assert again.schedule.lengths[-1] == 0


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


def test_where_nothing_pays_the_answer_is_off(hopeless: Tuning) -> None:
    tuning = hopeless
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    assert to_confirm(ways, 0.02) == ()
    assert next_way(tuning.study, (), 0.02) is None
    answer = recommend(
        tuning.design,
        tuning.last.standing,
        ways,
        (),
        stopped=tuning.last.stopped,
        tolerance=0.02,
    )
    assert answer.decision is Decision.OFF
    assert answer.arm is None


def test_noise_that_cannot_be_decided_ends_in_measure_more() -> None:
    tuning = Tuning(replace(TURNING, noise=0.4), budget_s=200.0).to_its_end()
    assert tuning.last.stopped == "budget"
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    answer = recommend(
        tuning.design, tuning.last.standing, ways, (), stopped="budget", tolerance=0.02
    )
    assert answer.decision is Decision.MEASURE_MORE
    assert percent(tuning.last.standing.regret_bound) in answer.headline
    assert "--resume" in answer.reasons[-1]


def test_without_schedules_it_says_why() -> None:
    design = design_of('arguments = ["--data-parallel-size", "2"]')
    assert not any("idle" in arm.name for arm in design.arms)
    tuning = Tuning(TURNING, design=design).to_its_end()
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    assert all(way.schedule is None for way in ways)
    assert all("data parallelism" in way.note for way in ways)


def test_two_pools_are_the_next_best_thing_where_segments_differ() -> None:
    """JSON wins at every load, prose loses: no length serves the mix, a router would."""
    light = replace(PLAIN, token_s=0.0004)
    split = replace(
        TURNING,
        costs={
            "": light,
            "draft_model": replace(light, draft_pass_s=0.006, speculates=True),
            "ngram": replace(light, draft_pass_s=0.0004, lookup=True, speculates=True),
        },
        acceptance={
            "draft_model": {"json": (0.9,) * 8, "prose": (0.02,) * 8},
            "ngram": {"json": (0.02,) * 8, "prose": (0.02,) * 8},
        },
    )
    tuning = Tuning(split).to_its_end()
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    answer = recommend(
        tuning.design, tuning.last.standing, ways, (), stopped="tolerance", tolerance=0.02
    )
    assert "json (temperature 0) to a server with draft-k" in answer.routing
    assert "prose (temperature 0.8) to one without" in answer.routing
    assert "not confirmed" in answer.routing


def test_a_confirmation_that_was_refused_still_tells_the_segments_apart(tuned: Tuning) -> None:
    _, found = confirmed(tuned)
    refused = tuple(replace(c, outcome="refused") for c in found)
    answer = recommend(
        tuned.design, tuned.last.standing, (), refused, stopped="tolerance", tolerance=0.02
    )
    assert answer.decision is Decision.OFF
    assert answer.arm is None
    assert any("refused" in reason for reason in answer.reasons)
