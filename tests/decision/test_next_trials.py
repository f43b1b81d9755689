from __future__ import annotations

import math
import tomllib
from dataclasses import replace

import pytest
from tests.analysis.synthetic import C16
from tests.decision.situations import WHOLE, effect, situation

from specwise.analysis.comparison import t_quantile
from specwise.decision.next_trials import (
    MOST_REPEATS,
    confirm_schedule,
    repeat,
    repeats_needed,
)
from specwise.decision.schedule import ScheduleProposal
from specwise.domain import LoadPoint, Loop
from specwise.measurement.design import parse_study


@pytest.mark.parametrize("gain", [1.02, 1.03, 1.05, 0.97])
def test_the_repeats_asked_for_would_decide_and_one_fewer_would_not(gain: float) -> None:
    found = effect("speedup", gain, WHOLE, se=0.03, dof=8)
    needed = repeats_needed(found, math.log(gain))
    assert needed is not None

    def half_width(repeats: int) -> float:
        growth = repeats / found.repeats
        return t_quantile(found.dof * growth, 0.95) * found.se_log / math.sqrt(growth)

    assert half_width(needed) < abs(math.log(gain))
    assert needed == found.repeats + 1 or half_width(needed - 1) >= abs(math.log(gain))


def test_an_effect_of_nothing_asks_for_what_shows_that_it_is_small() -> None:
    nothing = effect("speedup", 1.0, WHOLE, se=0.03)
    assert repeats_needed(nothing, 0.0) is None
    found = repeat(situation({WHOLE: 1.0}), nothing)
    assert "3%" in found.what
    assert "off is the safe wait" in found.why
    assert tomllib.loads(found.toml)["load"]["repeats"] <= MOST_REPEATS


def test_open_loop_lines_name_a_rate() -> None:
    rate = LoadPoint(Loop.OPEN, 2.5, "poisson")
    found = repeat(situation({WHOLE: 1.0}), replace(effect("speedup", 1.02, WHOLE), load=rate))
    load = tomllib.loads(found.toml)["load"]
    assert load["rate_per_s"] == [2.5]
    assert load["arrivals"] == "poisson"


STUDY = """
name = "s"
[[arm]]
name = "baseline"
url = "http://127.0.0.1:1"
[[segment]]
name = "json"
prompts = "bundled:json"
[[segment]]
name = "prose"
prompts = "bundled:prose"
[[workload]]
name = "mix"
shares = { json = 0.5, prose = 0.5 }
"""


def test_the_lines_are_what_the_study_file_understands() -> None:
    findings = situation({WHOLE: 1.02})
    proposal = ScheduleProposal("draft", ((1, 4, 4), (5, 1024, 0)), "", confirmed=False)
    arm = confirm_schedule(findings, proposal).toml
    load = repeat(findings, effect("speedup", 1.02, WHOLE)).toml
    design = parse_study(STUDY + arm + load, name="study.toml")
    speculation = design.arms[1].speculation
    assert speculation is not None
    assert speculation.schedule == proposal.rows
    assert design.production_load == C16
    assert design.production_workload == "mix"
