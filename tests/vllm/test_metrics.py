from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import AcceptanceSource
from specwise.errors import InputError, ServerError
from specwise.vllm import metrics

# Two engines of a V1 server, k=3, as vLLM 0.32 prints them (shortened).
V1 = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 15.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 13.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 3.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 7.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="2"} 0.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 4.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 2.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 2.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 0.5
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.1",model_name="m"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf",model_name="m"} 4.0
vllm:time_to_first_token_seconds_count{engine="1",model_name="m"} 4.0
vllm:time_to_first_token_seconds_sum{engine="1",model_name="m"} 0.25
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.7e+09
"""

# A V0 server (0.6), which has a gauge for acceptance and no counters per position.
V0 = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 1.0
# TYPE vllm:num_requests_swapped gauge
vllm:num_requests_swapped{model_name="m"} 0.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="m"} 500.0
# TYPE vllm:spec_decode_draft_acceptance_rate gauge
vllm:spec_decode_draft_acceptance_rate{model_name="m"} 0.76
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 366.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{model_name="m"} 482.0
# TYPE vllm:spec_decode_num_emitted_tokens_total counter
vllm:spec_decode_num_emitted_tokens_total{model_name="m"} 460.0
"""


def test_counters_are_summed_over_engines_and_labels() -> None:
    counters = metrics.parse(V1).counters
    assert counters["spec_drafts"] == 15
    assert counters["spec_accepted_pos_0"] == 9
    assert counters["request_success"] == 7


def test_kv_use_is_the_fullest_engines_and_other_gauges_are_sums() -> None:
    assert metrics.parse(V1).gauges == {"running": 5.0, "kv_use": 0.75}


def test_histograms_are_summed_bucket_by_bucket() -> None:
    ttft = metrics.parse(V1).histograms["ttft_s"]
    assert ttft == metrics.Histogram((0.1, math.inf), (5.0, 6.0), 0.75)
    assert ttft.count == 6


def test_what_is_not_exported_is_absent_rather_than_zero() -> None:
    snapshot = metrics.parse(V1)
    assert "preemptions" not in snapshot.counters
    assert "waiting" not in snapshot.gauges
    assert "tpot_s" not in snapshot.histograms


@pytest.mark.parametrize(
    ("text", "generation", "speculative"),
    [
        (V1, "V1", True),
        ('vllm:prefix_cache_queries_total{engine="0"} 0', "V1", False),
        ('vllm:gpu_prefix_cache_queries_total{engine="0"} 0', "V1", False),
        (V0, "V0", True),
        ('vllm:num_requests_swapped{model_name="m"} 0', "V0", None),  # V0 has not drafted yet
        ("go_goroutines 7", None, None),
    ],
)
def test_generation_and_speculation_are_told_from_the_names(
    text: str, generation: str | None, speculative: bool | None
) -> None:
    snapshot = metrics.parse(text)
    assert (snapshot.generation, snapshot.speculative) == (generation, speculative)


def test_v0_names_map_to_the_same_canonical_names() -> None:
    snapshot = metrics.parse(V0)
    assert snapshot.gauges["kv_use"] == 0.5
    assert snapshot.counters["spec_draft_tokens"] == 482
    assert snapshot.counters["spec_accepted_tokens"] == 366
    assert metrics.acceptance_from(metrics.difference(metrics.Snapshot(), snapshot)) is None


def test_a_metric_exported_under_its_old_and_new_name_counts_once() -> None:
    text = (
        'vllm:gpu_prefix_cache_queries_total{engine="0"} 40\n'
        'vllm:prefix_cache_queries_total{engine="0"} 40\n'
        'vllm:gpu_cache_usage_perc{engine="0"} 0.5\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\n'
    )
    snapshot = metrics.parse(text)
    assert snapshot.counters == {"prefix_cache_queries": 40}
    assert snapshot.gauges == {"kv_use": 0.5}


@pytest.mark.parametrize("text", [V1, V0])
def test_reading_only_some_histograms_changes_nothing_else(text: str) -> None:
    whole, some = metrics.parse(text), metrics.parse(text, histograms=("tpot_s", "ttft_s"))
    assert some.histograms == {
        name: h for name, h in whole.histograms.items() if name in ("tpot_s", "ttft_s")
    }
    for field in ("counters", "gauges", "generation", "speculative", "process_start_s"):
        assert getattr(some, field) == getattr(whole, field)


def test_text_of_another_format_is_one_clear_error() -> None:
    with pytest.raises(ServerError, match="not in Prometheus' text format"):
        metrics.parse("<html><body>nothing here</body></html>")


def test_acceptance_comes_from_neighbouring_positions() -> None:
    counts = metrics.acceptance_from(metrics.difference(metrics.Snapshot(), metrics.parse(V1)))
    assert counts is not None
    assert counts.source is AcceptanceSource.COUNTERS
    assert counts.steps_by_accepted == (6, 4, 3, 2)
    assert (counts.steps, counts.accepted_tokens, counts.drafted_tokens) == (15, 16, 45)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any), st.integers(1, 4))
def test_acceptance_gives_back_the_steps_that_were_counted(steps: list[int], engines: int) -> None:
    """Any histogram of accepted drafts, spread over engines, survives the way through /metrics."""
    k = len(steps) - 1
    lines = []
    for number in range(engines):
        share = [count // engines + (number < count % engines) for count in steps]
        engine = f'engine="{number}",model_name="m"'
        lines.append(f"vllm:spec_decode_num_drafts_total{{{engine}}} {sum(share)}")
        lines.append(f"vllm:spec_decode_num_draft_tokens_total{{{engine}}} {sum(share) * k}")
        for position in range(k):
            at_least = sum(share[position + 1 :])
            lines.append(
                "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                f'{{{engine},position="{position}"}} {at_least}'
            )
    snapshot = metrics.parse("\n".join(lines) + "\n")
    counts = metrics.acceptance_from(metrics.difference(metrics.Snapshot(), snapshot))
    assert counts is not None
    assert counts.steps_by_accepted == tuple(steps)
    assert counts.drafted_tokens == sum(steps) * k


def _counted(**counters: float) -> metrics.Snapshot:
    return metrics.Snapshot(counters=counters, process_start_s=1.0)


def test_a_difference_is_after_minus_before() -> None:
    delta = metrics.difference(_counted(prompt_tokens=5), _counted(prompt_tokens=8))
    assert delta == metrics.Delta(counters={"prompt_tokens": 3})


def test_a_counter_that_appears_started_from_zero() -> None:
    delta = metrics.difference(_counted(), _counted(spec_drafts=8))
    assert delta.counters == {"spec_drafts": 8}


@pytest.mark.parametrize(
    "after",
    [
        _counted(prompt_tokens=4),  # fell
        _counted(),  # vanished
        metrics.Snapshot(counters={"prompt_tokens": 9}, process_start_s=2.0),  # another process
    ],
)
def test_a_restart_is_reported_and_leaves_no_numbers(after: metrics.Snapshot) -> None:
    delta = metrics.difference(_counted(prompt_tokens=5), after)
    assert delta == metrics.Delta(reset=True)
    assert metrics.acceptance_from(delta) is None


def test_histograms_are_subtracted() -> None:
    before = metrics.Snapshot(histograms={"ttft_s": metrics.Histogram((1.0, math.inf), (1, 2), 5)})
    after = metrics.Snapshot(histograms={"ttft_s": metrics.Histogram((1.0, math.inf), (4, 6), 9)})
    delta = metrics.difference(before, after)
    assert delta.histograms["ttft_s"] == metrics.Histogram((1.0, math.inf), (3, 4), 4)


@pytest.mark.parametrize(
    "counters",
    [
        {"spec_drafts": 0.0, "spec_draft_tokens": 0.0, "spec_accepted_pos_0": 0.0},
        {"spec_drafts": 5.0, "spec_draft_tokens": 5.0, "spec_accepted_pos_0": 6.0},
        {"spec_drafts": 5.0, "spec_draft_tokens": 5.0},
    ],
    ids=["no step", "contradiction", "no positions"],
)
def test_no_acceptance_where_the_counters_do_not_tell(counters: dict[str, float]) -> None:
    assert metrics.acceptance_from(metrics.Delta(counters=counters)) is None


@contextmanager
def _serving(status: int, body: str = "", location: str = "") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_scrape_reads_a_server() -> None:
    with _serving(200, V1) as url:
        assert metrics.scrape(url + "/").counters["spec_drafts"] == 15


@pytest.mark.parametrize(
    ("status", "location", "message"),
    [
        (401, "", "refuses access"),
        (403, "", "refuses access"),
        (404, "", "HTTP 404"),
        (302, "http://elsewhere/", "redirects to http://elsewhere/"),
    ],
)
def test_a_server_that_does_not_answer_with_metrics(
    status: int, location: str, message: str
) -> None:
    with _serving(status, "", location) as url, pytest.raises(ServerError, match=message):
        metrics.fetch(url)


def test_a_port_where_nobody_listens() -> None:
    with pytest.raises(ServerError, match="Cannot reach"):
        metrics.fetch("http://127.0.0.1:9")


def test_an_address_that_is_none() -> None:
    with pytest.raises(InputError, match="http://host:port"):
        metrics.fetch("127.0.0.1:8000")
