from __future__ import annotations

from dataclasses import replace

import pytest
from tests.decision.tunings import PLAIN, TURNING, Tuning, confirmed

from specwise.decision.confirmation import (
    SCHEDULED,
    Confirmation,
    next_way,
)
from specwise.decision.deployment import assess_tuning, recommend
from specwise.decision.findings import percent
from specwise.decision.standing import not_run
from specwise.decision.verdict import Decision
from specwise.decision.ways import family_standings, to_confirm


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


@pytest.mark.parametrize(
    ("bound", "stopped", "decision"),
    [(0.015, "tolerance", Decision.OFF), (0.06, "budget", Decision.MEASURE_MORE)],
)
def test_a_refusal_means_off_only_if_little_else_can_be_missed(
    tuned: Tuning, bound: float, stopped: str, decision: Decision
) -> None:
    standing = replace(tuned.last.standing, regret_bound=bound)
    ways = family_standings(tuned.design, standing, tuned.measured)
    refused = Confirmation(1, ways[0].family, ways[0].static, (), ways[0].static, (), "refused", ())
    answer = recommend(tuned.design, standing, ways, (refused,), stopped=stopped, tolerance=0.02)
    assert answer.decision is decision
    assert percent(bound) in " ".join((answer.headline, *answer.reasons))


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
