from __future__ import annotations

import pytest
from tests.decision.tunings import TURNING, Tuning, design_of

from specwise.decision.ways import family_standings
from specwise.vllm.flags import schedule_problems


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


def test_without_schedules_it_says_why() -> None:
    design = design_of('arguments = ["--data-parallel-size", "2"]')
    assert not any("idle" in arm.name for arm in design.arms)
    tuning = Tuning(TURNING, design=design).to_its_end()
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    assert all(way.schedule is None for way in ways)
    assert all("data parallelism" in way.note for way in ways)
