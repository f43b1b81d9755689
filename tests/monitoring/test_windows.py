from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.monitoring.windows import Reading, Replica, State, quantile, window
from specwise.vllm.metrics import Histogram, Snapshot, parse


def counters(drafted: float, accepted: float, *, tpot: tuple[float, float] = (0, 0)) -> str:
    count, total = tpot
    return f"""
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafted / 4}
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0",model_name="m"}} {drafted / 5}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="1",model_name="m"}} {drafted / 10}
vllm:prefix_cache_queries_total{{model_name="m"}} 100
vllm:num_requests_running{{engine="0",model_name="m"}} 3
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:generation_tokens_total{{model_name="m"}} {accepted + drafted / 4}
vllm:request_time_per_output_token_seconds_bucket{{le="0.01"}} 0
vllm:request_time_per_output_token_seconds_bucket{{le="0.05"}} {count}
vllm:request_time_per_output_token_seconds_bucket{{le="+Inf"}} {count}
vllm:request_time_per_output_token_seconds_sum {total}
vllm:request_time_per_output_token_seconds_count {count}
"""


def reading(at_s: float, text: str | None, *, jump_s: float = 0.0) -> Reading:
    snapshot = None if text is None else parse(text)
    return Reading(at_s + jump_s, at_s, snapshot, "" if text else "refused")


def test_a_window_holds_only_what_happened_in_it() -> None:
    """The article's healthy server, after a lifetime of something else."""
    before = reading(100, counters(1_000_000, 100_000, tpot=(50, 9.0)))
    after = reading(160, counters(1_048_200, 136_600, tpot=(60, 9.3)))
    found = window(before, after)
    assert found.state is State.OK
    assert found.rate == pytest.approx(36_600 / 48_200)
    assert found.length == pytest.approx(1 + 36_600 / (48_200 / 4))
    assert found.positions == pytest.approx((0.8, 0.4))
    assert found.output_tokens_per_s == pytest.approx((36_600 + 48_200 / 4) / 60)
    assert found.tpot_s is not None
    assert found.tpot_s.count == 10
    assert found.tpot_s.mean == pytest.approx(0.03)
    assert 0.01 < found.tpot_s.p50 < found.tpot_s.p99 <= 0.05
    assert (found.running, found.kv_use, found.waiting) == (3, 0.25, None)


def test_a_restart_gives_no_rate_and_the_next_window_is_whole_again() -> None:
    replica = Replica()
    readings = [counters(1000, 800), counters(100, 50), counters(200, 150)]
    found = [replica.read(reading(60.0 * n, text)) for n, text in enumerate(readings)]
    assert [w.state for w in found] == [State.FIRST, State.RESTARTED, State.OK]
    assert [w.rate for w in found] == [None, None, pytest.approx(1.0)]


def test_a_window_spans_an_outage() -> None:
    replica = Replica()
    replica.read(reading(0, counters(1000, 800)))
    assert replica.read(reading(60, None)).state is State.UNREACHABLE
    found = replica.read(reading(120, counters(2000, 1300)))
    assert (found.state, found.duration_s, found.rate) == (State.OK, 120, 0.5)


def test_something_else_on_that_port_is_not_vllm() -> None:
    found = window(None, reading(0, "up 1\n"))
    assert found.state is State.NOT_VLLM
    assert found.error


def test_a_clock_that_jumps_does_not_change_rates() -> None:
    before = reading(0, counters(1000, 800))
    found = window(before, reading(60, counters(2000, 1400), jump_s=3600))
    assert (found.clock_jump_s, found.duration_s) == (3600, 60)
    assert found.rate == 0.6


def test_absent_is_not_zero() -> None:
    text = 'vllm:num_requests_running{model_name="m"} 0\nvllm:prefix_cache_queries_total 0\n'
    found = window(reading(0, text), reading(60, text))
    assert found.running == 0
    assert found.drafted_tokens is found.rate is found.ttft_s is found.prefix_hit_rate is None
    assert found.speculative is False


@given(st.lists(st.floats(0.001, 4.9), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, math.inf)
    at_most = tuple(float(sum(v <= bound for v in values)) for bound in bounds)
    found = quantile(Histogram(bounds, at_most, sum(values)), share)
    rank = share * len(values)
    bucket = next(i for i, count in enumerate(at_most) if count >= rank)
    assert (0.0, *bounds)[bucket] <= found <= bounds[bucket]


def test_quantiles_of_the_last_bucket_are_its_lower_bound() -> None:
    assert quantile(Histogram((1.0, math.inf), (0.0, 10.0), 50.0), 0.5) == 1.0
    assert math.isnan(quantile(Histogram((1.0, math.inf), (0.0, 0.0), 0.0), 0.5))


def test_a_first_reading_already_shows_the_gauges() -> None:
    found = window(None, reading(0, counters(1000, 800)))
    assert (found.state, found.running, found.rate) == (State.FIRST, 3, None)


def test_snapshots_are_kept_out_of_what_a_replica_forgets() -> None:
    replica = Replica()
    replica.read(reading(0, counters(1000, 800)))
    replica.read(reading(60, "up 1\n"))
    assert replica.last is not None
    assert isinstance(replica.last.snapshot, Snapshot)
    assert replica.last.at_s == 0
