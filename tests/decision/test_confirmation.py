from __future__ import annotations

from dataclasses import replace

from tests.decision.tunings import Tuning, confirmed, slowed

from specwise.decision.confirmation import (
    MOST_CONFIRMATIONS,
    SCHEDULED,
    confirm,
    confirmation_design,
    next_way,
    settled,
)
from specwise.decision.ways import FamilyStanding, family_standings, to_confirm
from specwise.domain import StudyData


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


def test_a_refused_schedule_is_composed_anew_from_what_the_confirmation_showed(
    tuned: Tuning,
) -> None:
    ways = family_standings(tuned.design, tuned.last.standing, tuned.measured)
    first = next_way(tuned.study, (), 0.02)
    assert first == to_confirm(ways, 0.02)[0]
    assert first.schedule is not None
    reckless = replace(first, schedule=replace(first.schedule, rows=((1, 64, 4),)))
    refused = tuned.confirm(reckless, repeats=4, all_workloads=False)
    assert confirm(tuned.design, refused)[0].outcome == "refused"
    again = next_way(tuned.study, (refused,), 0.02)
    assert again is not None
    assert again.family == first.family
    assert again.schedule is not None
    assert again.schedule.rows != reckless.schedule.rows
    held = tuned.confirm(again, repeats=6, all_workloads=False)
    assert confirm(tuned.design, held)[0].outcome != "refused"
    assert next_way(tuned.study, (refused,) * MOST_CONFIRMATIONS, 0.02) is None


def test_what_a_confirmation_refused_is_not_tried_again(tuned: Tuning) -> None:
    """Trials in which the scheduled arm takes 1.1 times as long where drafting does not pay."""

    def refused(way: FamilyStanding) -> StudyData:
        study = tuned.confirm(way, repeats=4, all_workloads=False)
        dear = tuple(
            slowed(t, 1.1) if t.trial.arm == SCHEDULED and t.trial.load.value >= 16 else t
            for t in study.trials
        )
        study = replace(study, trials=dear)
        assert confirm(tuned.design, study)[0].outcome == "refused"
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
    assert confirm(tuned.design, refused)[0].outcome == "refused"
    again = next_way(search, (refused,), 0.02)
    assert again is not None
    assert again.family == first.family
    assert again.schedule is not None
    assert again.schedule.lengths[-1] == 0
