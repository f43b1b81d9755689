from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.monitoring.test_alerts import EXPECTED

from specwise.decision.verdict import Decision
from specwise.monitoring.expectations import Expectations
from specwise.monitoring.standing import Health, Level, Memory, ReplicaStanding, Watched
from specwise.monitoring.windows import Reading
from specwise.vllm.metrics import Histogram, Snapshot

MINUTE_S = 60.0


class Server:
    """A server's counters over simulated minutes; every figure can be told to it."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self.sums = {"tpot_s": [0.0, 0.0], "ttft_s": [0.0, 0.0]}
        self.at_s = 0.0

    def minute(
        self,
        *,
        rate: float = 0.76,
        drafted: float = 48_200,
        tpot_s: float = 0.030,
        ttft_s: float = 0.2,
        requests: int = 60,
        running: float = 12,
        kv_use: float = 0.4,
        preemptions: float = 0,
        speculative: bool | None = True,
    ) -> Reading:
        self.at_s += MINUTE_S
        added = {
            "spec_drafts": drafted / 4,
            "spec_draft_tokens": drafted,
            "spec_accepted_tokens": rate * drafted,
            "preemptions": preemptions,
            "request_success": requests,
        }
        for name, value in added.items():
            self.counters[name] = self.counters.get(name, 0.0) + value
        for name, mean_s in (("tpot_s", tpot_s), ("ttft_s", ttft_s)):
            self.sums[name][0] += requests
            self.sums[name][1] += requests * mean_s
        histograms = {
            name: Histogram((float("inf"),), (count,), total)
            for name, (count, total) in self.sums.items()
        }
        snapshot = Snapshot(
            counters=dict(self.counters),
            gauges={"running": running, "kv_use": kv_use},
            histograms=histograms,
            generation="V1",
            speculative=speculative,
        )
        return Reading(self.at_s, self.at_s, snapshot)


def after(expected: Expectations | None, minutes: int = 20, **state: Any) -> ReplicaStanding:
    watched, server = Watched(Memory("u"), expected), Server()
    for _ in range(minutes):
        standing = watched.read(server.minute(**state))
    return standing


def codes(standing: ReplicaStanding) -> set[str]:
    return {seen.code for seen in standing.observations}


def test_the_articles_counters_are_classified_as_it_does() -> None:
    healthy = after(None, rate=36_600 / 48_200, drafted=48_200)
    assert healthy.health is Health.HEALTHY
    assert healthy.rate == pytest.approx(0.76, abs=0.005)
    unhealthy = after(None, rate=19_400 / 51_000, drafted=51_000)
    assert unhealthy.health is Health.UNHEALTHY
    assert unhealthy.rate == pytest.approx(0.38, abs=0.005)
    assert codes(unhealthy) == {"acceptance-low"}
    assert after(None, rate=0.6).health is Health.WATCH


def test_the_studys_own_break_even_rate_outranks_the_rule_of_thumb() -> None:
    cheap = dataclasses.replace(EXPECTED, rate=0.45, break_even=0.3)
    assert after(cheap, rate=0.45).health is Health.HEALTHY
    dear = dataclasses.replace(EXPECTED, break_even=0.7)
    low = after(dear, rate=0.69, minutes=5)
    assert low.health is Health.UNHEALTHY
    assert "measured break-even rate 0.70" in low.observations[0].text


def test_as_measured_nothing_is_said() -> None:
    standing = after(EXPECTED)
    assert (standing.health, standing.observations) == (Health.HEALTHY, ())
    assert standing.verdict_stands is True


@pytest.mark.parametrize(
    ("state", "code", "level", "stands"),
    [
        ({"rate": 0.40}, "acceptance-low", Level.CRITICAL, False),
        ({"rate": 0.66}, "drift", Level.WARNING, False),
        ({"tpot_s": 0.048}, "slower-than-baseline", Level.CRITICAL, False),
        ({"ttft_s": 0.3}, "ttft", Level.WARNING, True),
        ({"running": 30}, "above-crossover", Level.WARNING, False),
        ({"kv_use": 0.97, "preemptions": 2}, "kv-squeeze", Level.WARNING, True),
        ({"speculative": False, "drafted": 0}, "no-speculation", Level.CRITICAL, False),
    ],
)
def test_each_cause_is_named_and_turns_the_verdict_or_not(
    state: dict[str, Any], code: str, level: Level, stands: bool
) -> None:
    standing = after(EXPECTED, **state)
    found = {seen.code: seen for seen in standing.observations}
    assert found[code].level is level
    assert found[code].next_step
    assert set(found) <= {code, "drift"}
    assert standing.verdict_stands is stands


def test_a_slow_server_at_a_higher_load_than_measured_is_not_compared() -> None:
    assert codes(after(EXPECTED, tpot_s=0.048, running=20)) == set()


def test_a_quiet_server_is_not_judged() -> None:
    standing = after(EXPECTED, rate=0.2, drafted=300 / 20, requests=1)
    assert codes(standing) == set()


def test_off_by_decision_and_off_in_production_agree() -> None:
    off = dataclasses.replace(EXPECTED, decision=Decision.OFF)
    standing = after(off, speculative=False, drafted=0)
    assert [seen.level for seen in standing.observations] == [Level.NOTE]
    assert standing.verdict_stands is None


def test_a_decay_over_hours_is_dated() -> None:
    """Two healthy hours, then 0.1 lost over six: the fall is flagged, with when it began."""
    rng = np.random.default_rng(4)
    watched, server = Watched(Memory("u"), EXPECTED), Server()
    for minute in range(8 * 60):
        lost = 0.1 * max(0, minute - 120) / 360
        rate = 0.76 - lost + rng.normal(0, 0.02)
        standing = watched.read(server.minute(rate=rate, drafted=6000))
        if standing.drift.alarm_at_s is not None:
            break
    assert codes(standing) == {"drift"}
    assert standing.drift.alarm_at_s is not None
    assert standing.drift.since_s is not None
    assert 2 * 3600 < standing.drift.since_s < standing.drift.alarm_at_s
    assert standing.drift.alarm_at_s < 7 * 3600
    assert "from 0.76 (study) to" in standing.observations[0].text


def test_it_goes_on_from_its_memory_as_if_it_had_never_stopped() -> None:
    whole, parts = Watched(Memory("u"), EXPECTED), Watched(Memory("u"), EXPECTED)
    server = Server()
    for minute in range(30):
        reading = server.minute(rate=0.72 - 0.002 * minute)
        parts = Watched(parts.memory, EXPECTED)
        assert parts.read(reading) == whole.read(reading)


def test_readings_shorter_than_the_tests_window_are_put_together() -> None:
    """Four readings a minute make the same evidence as one."""
    slow, fast = Watched(Memory("u"), EXPECTED), Watched(Memory("u"), EXPECTED)
    one, four = Server(), Server()
    for _ in range(10):
        last = slow.read(one.minute(rate=0.71))
        for _ in range(4):
            reading = four.minute(rate=0.71, drafted=48_200 / 4)
            four.at_s -= 0.75 * MINUTE_S
            quarter = dataclasses.replace(reading, at_s=four.at_s, monotonic_s=four.at_s)
            often = fast.read(quarter)
    # The first reading of each only starts the clock: nine minutes against nine and three quarters.
    assert often.drift.evidence == pytest.approx(last.drift.evidence, rel=0.15)
    assert often.drift.evidence > 0


def test_restarts_and_outages_are_shown_and_forgiven() -> None:
    watched, server = Watched(Memory("u"), EXPECTED), Server()
    for _ in range(5):
        watched.read(server.minute())
    gone = watched.read(Reading(server.at_s, server.at_s, None, "Cannot reach u."))
    assert gone.health is Health.UNKNOWN
    assert codes(gone) == {"unreachable"}
    server.counters.clear()
    assert codes(watched.read(server.minute())) == {"restarted"}
    assert codes(watched.read(server.minute())) == set()
