from __future__ import annotations

import tomllib

import pytest
from tests.analysis.synthetic import C1, C4, C16
from tests.decision.situations import (
    BASELINE,
    DRAFT,
    JSON,
    PROSE,
    SCHEDULED,
    SUFFIX,
    WHOLE,
    Cell,
    effect,
    situation,
)

from specwise.decision.conditions import Condition
from specwise.decision.verdict import Decision, Verdict, decide, exit_code
from specwise.domain import Arm, LoadPoint, Slo, Speculation

WIN_BELOW: dict[Cell, float] = {("mix", None, C1): 1.5, ("mix", None, C4): 1.2}
ALL_WIN: dict[Cell, float] = {WHOLE: 1.3, JSON: 1.4, PROSE: 1.2}
PROSE_LOSES: dict[Cell, float] = {WHOLE: 1.2, JSON: 1.6, PROSE: 0.8}


def condition(name: str, scope: str = "", *, veto: bool = True) -> Condition:
    return Condition(
        name, "Is it so?", "no", "yes", "a test", "fail", scope, (), "measured", veto=veto
    )


@pytest.mark.parametrize(
    ("decision", "code"),
    [
        (Decision.ON, 0),
        (Decision.SCHEDULE, 0),
        (Decision.OFF, 1),
        (Decision.MEASURE_MORE, 3),
    ],
)
def test_exit_codes_are_for_a_gate(decision: Decision, code: int) -> None:
    assert exit_code(decision) == code


def test_on_when_the_whole_and_every_segment_win() -> None:
    found = decide(situation({**ALL_WIN, **WIN_BELOW}), ())
    assert found.decision is Decision.ON
    assert found.arm == "draft"
    assert found.headline.startswith("Turn speculation on")
    assert [s.decision for s in found.segments] == [Decision.ON, Decision.ON]
    assert found.next_trials == ()


@pytest.mark.parametrize("whole", [0.97, 1.0, 1.2, 1.6])
@pytest.mark.parametrize("place", [PROSE, ("prose", None, C16)])
@pytest.mark.parametrize("below", [{}, WIN_BELOW])
def test_no_average_hides_a_losing_segment(
    whole: float, place: Cell, below: dict[Cell, float]
) -> None:
    found = decide(situation({WHOLE: whole, JSON: 1.6, place: 0.8, **below}), ())
    assert found.decision is not Decision.ON
    assert "prose" in found.headline
    assert any("prose" in reason and "0.80x" in reason for reason in found.reasons)
    losing = next(s for s in found.segments if s.segment == "prose")
    assert losing.decision is Decision.OFF


def test_a_loss_that_is_a_matter_of_load_asks_for_a_schedule() -> None:
    found = decide(situation({**PROSE_LOSES, **WIN_BELOW}), ())
    assert found.decision is Decision.SCHEDULE
    assert found.schedule is not None
    assert not found.schedule.confirmed
    assert found.schedule.rows[0][2] == 4
    assert found.schedule.rows[-1][2] == 0
    assert any("not the same as off" in reason for reason in found.reasons)
    assert "with the schedule" in found.next_trials[0].what


def test_a_loss_at_every_load_is_off_with_routing_advice() -> None:
    below: dict[Cell, float] = {("mix", None, C1): 0.9, ("mix", None, C4): 0.9}
    found = decide(situation({**PROSE_LOSES, **below}), ())
    assert found.decision is Decision.OFF
    assert any("serve json with draft, and prose from a server without" in r for r in found.reasons)


def test_a_method_without_schedules_is_off_where_it_loses() -> None:
    found = decide(situation({**PROSE_LOSES, **WIN_BELOW}, arms=(BASELINE, SUFFIX)), ())
    assert found.decision is Decision.OFF
    assert any("takes no schedule" in reason for reason in found.reasons)


def test_a_segment_that_loses_at_the_lower_load_too_leaves_nothing_to_schedule() -> None:
    lower: dict[Cell, float] = {
        ("mix", "prose", C1): 0.8,
        ("mix", "prose", C4): 0.8,
    }
    assert decide(situation({**PROSE_LOSES, **WIN_BELOW, **lower}), ()).decision is Decision.OFF


def test_the_whole_losing_is_off_or_a_schedule() -> None:
    losing: dict[Cell, float] = {WHOLE: 0.8, JSON: 0.9, PROSE: 0.7}
    assert decide(situation(losing), ()).decision is Decision.OFF
    assert decide(situation({**losing, **WIN_BELOW}), ()).decision is Decision.SCHEDULE


def test_an_interval_that_holds_1_decides_nothing_and_names_the_next_trial() -> None:
    found = decide(situation({WHOLE: 1.03, JSON: 1.03, PROSE: 1.03}), ())
    assert found.decision is Decision.MEASURE_MORE
    (trial,) = found.next_trials
    assert "draft" in trial.what
    assert "mix at c16" in trial.what
    load = tomllib.loads(trial.toml)["load"]
    assert load["concurrency"] == [16]
    assert load["production_workload"] == "mix"
    assert load["repeats"] > 2


def test_a_segment_that_may_lose_holds_an_on_back() -> None:
    gains = {**ALL_WIN, PROSE: 0.99}
    assert decide(situation(gains), ()).decision is Decision.MEASURE_MORE
    # The same estimate, known well enough that a loss of 5 % is out: no reason to wait.
    sure = tuple(effect(m, 0.99, PROSE, se=0.012) for m in ("speedup", "tpot_mean"))
    assert decide(situation(gains, others=sure), ()).decision is Decision.ON


def test_a_loss_by_one_look_in_many_is_measured_again_not_believed() -> None:
    slight = {WHOLE: 1.01, JSON: 1.1, PROSE: 0.955}
    found = decide(situation(slight), ())
    assert found.decision is Decision.MEASURE_MORE
    assert any("looks like a loss" in reason for reason in found.reasons)


def test_a_loser_outside_production_is_named_in_the_headline() -> None:
    gains: dict[Cell, float] = {("json", None, C16): 1.3, ("prose", None, C16): 0.8}
    found = decide(situation(gains, workload="json"), ())
    assert found.decision is Decision.ON
    assert "Keep prose away from it" in found.headline
    assert {s.segment: s.decision for s in found.segments}["prose"] is Decision.OFF


def test_nothing_measured_at_production_asks_for_it() -> None:
    found = decide(situation(WIN_BELOW), ())
    assert found.decision is Decision.MEASURE_MORE
    assert found.effect is None
    assert "mix at c16" in found.next_trials[0].what


def test_a_measured_schedule_is_confirmed() -> None:
    idle = {WHOLE: 0.99, JSON: 1.0, PROSE: 0.99}
    found = decide(situation({**idle, **WIN_BELOW}, arms=(BASELINE, SCHEDULED), se=0.01), ())
    assert found.decision is Decision.SCHEDULE
    assert found.schedule is not None
    assert found.schedule.confirmed
    assert found.schedule.rows == ((1, 4, 4), (5, 1024, 0))


def test_a_measured_schedule_that_loses_is_off() -> None:
    gains = {**PROSE_LOSES, **WIN_BELOW}
    found = decide(situation(gains, arms=(BASELINE, SCHEDULED)), ())
    assert found.decision is Decision.OFF


@pytest.mark.parametrize("name", ["client", "repeats", "pairs"])
def test_a_measurement_that_cannot_carry_a_decision_refuses_it(name: str) -> None:
    found = decide(situation(ALL_WIN), (condition(name),))
    assert found.decision is Decision.MEASURE_MORE
    assert found.next_trials
    assert found.client_limited is (name == "client")
    assert decide(situation(ALL_WIN), (condition(name, veto=False),)).decision is Decision.ON


@pytest.mark.parametrize("name", ["errors", "slo-ttft"])
def test_a_broken_limit_vetoes_its_own_arm_only(name: str) -> None:
    found = decide(situation(ALL_WIN), (condition(name, "draft/mix"),))
    assert found.decision is Decision.OFF
    assert any("Is it so?" in reason for reason in found.reasons)
    other = decide(situation(ALL_WIN), (condition(name, "other/mix"),))
    assert other.decision is Decision.ON


def test_the_best_arm_at_production_is_chosen() -> None:
    other = Arm("ngram", Speculation("ngram", 4), url="http://127.0.0.1:3")
    better = tuple(
        effect(metric, gain, cell, arm="ngram")
        for cell, gain in {WHOLE: 1.5, JSON: 1.4, PROSE: 1.6}.items()
        for metric in ("speedup", "tpot_mean")
    )
    found = decide(situation(ALL_WIN, arms=(BASELINE, DRAFT, other), others=better), ())
    assert (found.decision, found.arm) == (Decision.ON, "ngram")
    assert any(reason.startswith("draft instead: on") for reason in found.reasons)
    by_segment = {s.segment: s.arm for s in found.segments}
    assert by_segment["prose"] == "ngram"


def test_many_candidates_need_more_certainty() -> None:
    """A gain that is significant once is not when the best of eight arms was picked."""
    edge = {WHOLE: 1.055, JSON: 1.055, PROSE: 1.055}
    assert decide(situation(edge), ()).decision is Decision.ON
    more = tuple(
        Arm(f"n{i}", Speculation("ngram", i), url="http://127.0.0.1:3") for i in range(1, 8)
    )
    found = decide(situation(edge, arms=(BASELINE, DRAFT, *more)), ())
    assert found.decision is Decision.MEASURE_MORE


class TestSlo:
    """What the service is bound by changes the answer to the same measurement."""

    gains = ALL_WIN

    def verdict(self, bound: str, **others: float) -> Verdict:
        extra = tuple(effect(metric, gain, WHOLE) for metric, gain in others.items())
        return decide(situation(self.gains, slo=Slo(bound=bound), others=extra), ())

    def test_tpot_is_what_speculation_helps(self) -> None:
        assert self.verdict("tpot").decision is Decision.ON

    def test_ttft_bound_needs_a_better_ttft(self) -> None:
        assert self.verdict("ttft", ttft_p99=0.8).decision is Decision.OFF
        assert self.verdict("ttft", ttft_p99=1.0).decision is Decision.MEASURE_MORE
        assert self.verdict("ttft", ttft_p99=1.3).decision is Decision.ON

    def test_throughput_bound_needs_more_tokens_per_second(self) -> None:
        worse = self.verdict("throughput", output_tokens_per_s=0.9)
        assert worse.decision is Decision.OFF
        assert worse.effect is not None
        assert worse.effect.metric == "output_tokens_per_s"
        assert self.verdict("throughput", output_tokens_per_s=1.2).decision is Decision.ON

    def test_a_faster_total_with_a_slower_tpot_is_no_win(self) -> None:
        assert self.verdict("tpot", tpot_mean=0.8).decision is Decision.OFF


def test_the_signature_without_a_control_asks_for_one() -> None:
    split = (effect("tpot_p50", 1.4, WHOLE), effect("tpot_p99", 0.7, WHOLE))
    found = decide(situation(ALL_WIN, others=split), ())
    assert any("alone at c16" in trial.what for trial in found.next_trials)
    controlled = {**ALL_WIN, ("json", None, C16): 1.4, ("prose", None, C16): 1.2}
    found = decide(situation(controlled, others=split), ())
    assert not any("alone at c16" in trial.what for trial in found.next_trials)


def test_production_below_the_crossover_is_on() -> None:
    at: LoadPoint = C4
    gains: dict[Cell, float] = {
        ("mix", None, C1): 1.5,
        ("mix", None, C4): 1.2,
        ("mix", None, C16): 0.8,
        ("mix", "json", C4): 1.3,
        ("mix", "prose", C4): 1.1,
    }
    found = decide(situation(gains, production=at), ())
    assert found.decision is Decision.ON
    assert any("stops paying at about" in reason for reason in found.reasons)


def test_unknown_trial_noise_leaves_segments_open() -> None:
    unknown = tuple(effect(m, 1.4, JSON, known=False) for m in ("speedup", "tpot_mean"))
    found = decide(situation(ALL_WIN, others=unknown), ())
    by_segment = {s.segment: s.decision for s in found.segments}
    assert by_segment["json"] is Decision.MEASURE_MORE
