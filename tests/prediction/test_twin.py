"""The twin over real sockets: what it sends, when, and how it fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import numpy as np
import pytest

from specwise.domain import AcceptanceCounts, AcceptanceSource
from specwise.errors import ServerError
from specwise.prediction.truth import Fault, ServerTruth, parse_truth
from specwise.prediction.twin import Twin, playing
from specwise.vllm import metrics
from specwise.vllm.response import StreamedResponse, StreamReader
from specwise.vllm.server import probe

TRUTH = """
model = "m"
max_model_len = 2000
characters_per_token = 4
[limits]
max_num_seqs = 4
kv_tokens = 4000
[costs]
target_pass_ms = 5
draft_pass_ms = 0.5
[[segment]]
name = "easy"
match = "easy"
cached_share = 0.5
[[segment]]
name = "hard"
output_tokens = [5, 9]
[[server]]
name = "baseline"
[[server]]
name = "draft"
speculation = { method = "draft_model", k = 3 }
[server.acceptance]
easy = 1
hard = [0.6, 0.5, 0.4]
"""
HTTP = httpx.Client(trust_env=False)  # making one takes as long as a request
BASELINE, DRAFT = parse_truth(TRUTH, name="truth")
EASY = "an easy prompt" + " of words" * 10


@pytest.fixture(scope="module", autouse=True)
def _connections() -> Iterator[None]:
    with HTTP:
        yield


@contextmanager
def one(truth: ServerTruth) -> Iterator[Twin]:
    with playing([truth]) as (twin,):
        yield twin


def body(prompt: str = EASY, *, chat: bool = False, **fields: object) -> dict[str, object]:
    asked: dict[str, object] = {"model": "m", "max_tokens": 40, "temperature": 0}
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return asked | fields


def ask(
    twin: Twin, prompt: str = EASY, *, chat: bool = False, **fields: object
) -> StreamedResponse:
    """Send a streaming request and read the answer as the load client does."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = body(prompt, chat=chat, stream=True, stream_options=options, **fields)
    reader = StreamReader(speculative=True)
    with HTTP.stream("POST", twin.url + path, json=asked, timeout=20) as response:
        assert response.status_code == 200
        for data in response.iter_raw():
            reader.feed(time.perf_counter(), data)
    return reader.finish(time.perf_counter())


def test_no_speculation_and_no_load_gives_the_configured_tpot() -> None:
    with one(BASELINE) as twin:
        answer = ask(twin)
    tpot_s = (answer.chunk_s[-1] - answer.chunk_s[0]) / 39
    assert tpot_s == pytest.approx(0.005, abs=0.001)
    assert answer.chunk_tokens == (1,) * 40


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_reads_like_vllms(chat: bool) -> None:
    with one(DRAFT) as twin:
        answer = ask(twin, chat=chat)
    # All drafts are accepted: the prompt's token, then steps of 4, the last cut by max_tokens.
    assert answer.chunk_tokens == (1,) + (4,) * 9 + (3,)
    assert answer.acceptance == AcceptanceCounts(
        AcceptanceSource.PER_REQUEST, (0, 0, 0, 10), drafted_tokens=30
    )
    assert (answer.prompt_tokens, answer.output_tokens) == (26, 40)
    assert answer.cached_tokens == 0  # half of 26 tokens is no whole block of 16
    assert answer.finish_reason == "length"
    assert answer.done
    assert len(answer.text.split()) == 40


def test_greedy_answers_are_the_same_with_and_without_speculation() -> None:
    with playing([BASELINE, DRAFT]) as (baseline, draft):
        answers = [ask(twin, "a hard one") for twin in (baseline, draft, draft)]
        assert len({answer.output_sha256 for answer in answers}) == 1
        assert 5 <= (answers[0].output_tokens or 0) <= 9
        assert answers[0].finish_reason == "stop"
        sampled = {ask(draft, "a hard one", temperature=1.0).output_sha256 for _ in range(3)}
        assert len(sampled) > 1


def test_acceptance_follows_the_truth() -> None:
    fast = parse_truth(TRUTH.replace("target_pass_ms = 5", "target_pass_ms = 0.2"), name="t")[1]
    fast = replace(fast, segments=tuple(replace(s, output_tokens=None) for s in fast.segments))
    with one(fast) as twin:
        counts = np.zeros(4)
        for _ in range(2):
            acceptance = ask(twin, "a hard one", max_tokens=900).acceptance
            assert acceptance is not None
            counts += acceptance.steps_by_accepted
        snapshot = metrics.scrape(twin.url)
    at_least = counts[::-1].cumsum()[::-1]
    conditional = at_least[1:] / at_least[:-1]
    error = 4 * np.sqrt(0.25 / at_least[:-1])
    assert (abs(conditional - [0.6, 0.5, 0.4]) < error).all()
    assert snapshot.counters["spec_drafts"] == counts.sum()
    assert snapshot.counters["spec_accepted_pos_0"] == at_least[1]
    assert snapshot.counters["generation_tokens"] == 1800


def test_counters_move_with_the_steps() -> None:
    with one(DRAFT) as twin:
        asked = body(max_tokens=1500, stream=True)
        with HTTP.stream("POST", twin.url + "/v1/completions", json=asked) as response:
            pieces = response.iter_raw()
            for _ in range(3):
                next(pieces)
            counters = metrics.scrape(twin.url).counters
    # In the middle of the answer; every draft is accepted, whatever the moment.
    assert counters["spec_drafts"] >= 2
    assert counters["spec_accepted_tokens"] == 3 * counters["spec_drafts"]
    assert counters["generation_tokens"] == 1 + 4 * counters["spec_drafts"]


def test_more_requests_than_seats_wait() -> None:
    with one(BASELINE) as twin, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, twin, max_tokens=200) for _ in range(8)]
        snapshot = metrics.scrape(twin.url)
        deadline = time.monotonic() + 5
        while snapshot.gauges["running"] < 4 or snapshot.gauges["waiting"] < 4:
            assert time.monotonic() < deadline
            snapshot = metrics.scrape(twin.url)
        assert snapshot.gauges["running"] == snapshot.gauges["waiting"] == 4
        assert snapshot.gauges["kv_use"] > 0
        assert all(answer.result().output_tokens == 200 for answer in answers)
        after = metrics.scrape(twin.url)
        assert after.gauges["running"] == after.gauges["waiting"] == after.gauges["kv_use"] == 0
        assert after.histograms["ttft_s"].count == 8
        assert after.counters["request_success"] == 8


def test_a_client_that_leaves_frees_its_place() -> None:
    with one(BASELINE) as twin:
        asked = body(max_tokens=1500, stream=True)
        with HTTP.stream("POST", twin.url + "/v1/completions", json=asked) as response:
            next(response.iter_raw())
        deadline = time.monotonic() + 5
        while metrics.scrape(twin.url).gauges["running"] and time.monotonic() < deadline:
            time.sleep(0.02)
        text = HTTP.get(twin.url + "/metrics").text
        assert metrics.parse(text).gauges["running"] == 0
        assert 'finished_reason="abort",model_name="m"} 1.0' in text
        assert ask(twin).output_tokens == 40


def test_it_is_taken_for_the_vllm_it_plays() -> None:
    old = replace(DRAFT, generation="V0", version="0.6.6", per_request_metrics=False)
    with playing([BASELINE, DRAFT, replace(old, name="old")]) as (baseline, draft, v0):
        found = probe(draft.url, model="m")
        assert (found.version, found.models) == ("0.32.0", ("m",))
        assert (found.generation, found.speculative) == ("V1", True)
        assert found.max_model_len == 2000
        assert probe(baseline.url).speculative is False
        assert probe(v0.url).generation == "V0"
        assert probe(v0.url).speculative is None  # V0 says so with its first verify step
        answer = ask(v0, "a hard one")
        assert answer.acceptance is not None
        assert answer.acceptance.source is AcceptanceSource.CHUNKS
        text = HTTP.get(v0.url + "/metrics").text
        assert 'vllm:spec_decode_draft_acceptance_rate{model_name="m"}' in text
        assert "position" not in text
        assert probe(v0.url).speculative is True


def test_v0_counts_positions_behind_a_rejection() -> None:
    truth = replace(
        DRAFT,
        generation="V0",
        per_request_metrics=False,
        acceptance={"easy": ((0.0, (0.0, 1.0, 1.0)),), "hard": ((0.0, (0.0, 1.0, 1.0)),)},
    )
    with one(truth) as twin:
        ask(twin)
        text = HTTP.get(twin.url + "/metrics").text
    # Every first draft fails, every other would pass: V1's rate is 0, V0's 2 of 3.
    assert 'vllm:spec_decode_draft_acceptance_rate{model_name="m"} 0.66' in text
    assert 'vllm:spec_decode_efficiency{model_name="m"} 0.25' in text


def test_a_whole_answer_without_streaming() -> None:
    with one(DRAFT) as twin:
        answer = HTTP.post(twin.url + "/v1/chat/completions", json=body(chat=True)).json()
    assert answer["object"] == "chat.completion"
    assert len(answer["choices"][0]["message"]["content"].split()) == 40
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] == 30


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "`other` does not exist"),
        ({"max_tokens": 5000}, 400, "maximum context length is 2000"),
        ({"min_p": 0.1}, 400, "not yet supported with speculative"),
        ({"n": 2}, 400, "n must be 1"),
        ({"prompt": None}, 400, "prompt of text"),
        ({"max_tokens": "many"}, 400, "not a number"),
    ],
)
def test_what_vllm_would_refuse(fields: dict[str, object], status: int, message: str) -> None:
    with one(DRAFT) as twin:
        response = HTTP.post(twin.url + "/v1/completions", json=body(**fields))
        assert response.status_code == status
        assert message in response.json()["error"]["message"]
        assert HTTP.post(twin.url + "/v1/completions", content=b"{").status_code == 400


def faulty(kind: str, **fields: object) -> ServerTruth:
    plain = {"every": 2, "status": 429, "after_chunks": 2, "at_s": 0.0, "down_s": 0.2}
    return replace(DRAFT, faults=(Fault(kind=kind, **(plain | fields)),))  # type: ignore[arg-type]


def test_every_second_request_is_turned_away() -> None:
    with one(faulty("status")) as twin:
        codes = [
            HTTP.post(twin.url + "/v1/completions", json=body(max_tokens=2)).status_code
            for _ in range(4)
        ]
    assert codes == [200, 429, 200, 429]


def test_faults_in_the_stream() -> None:
    with one(faulty("cut", every=1)) as twin:
        with pytest.raises(httpx.RemoteProtocolError):
            ask(twin)
        assert metrics.scrape(twin.url).gauges["running"] == 0
    with one(faulty("malformed", every=1)) as twin:
        answer = ask(twin)
        assert answer.fault is not None
        assert not answer.fault.by_server
    with one(faulty("hang", every=1)) as twin:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(twin.url + "/v1/completions", json=body(), timeout=0.2)
        assert HTTP.get(twin.url + "/health").status_code == 200


def test_a_restart_cuts_streams_and_loses_the_counters() -> None:
    with one(faulty("restart", at_s=0.4)) as twin:
        ask(twin, max_tokens=8)
        before = metrics.scrape(twin.url)
        with pytest.raises(httpx.TransportError):
            ask(twin, max_tokens=1900)
        with pytest.raises(httpx.ConnectError):
            HTTP.get(twin.url + "/health")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                HTTP.get(twin.url + "/health")
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        assert metrics.difference(before, metrics.scrape(twin.url)).reset
        assert ask(twin).output_tokens == 40


def test_a_taken_port_is_an_error_and_nothing_stays_behind() -> None:
    with one(BASELINE) as twin:
        taken = replace(DRAFT, port=twin.port)
        with pytest.raises(ServerError, match="cannot listen"), playing([taken]):
            pass
    assert not [t for t in threading.enumerate() if t.name == "twin"]


def test_it_says_how_late_it_was() -> None:
    with one(DRAFT) as twin:
        ask(twin)
        told = json.loads(HTTP.get(twin.url + "/twin").text)
        assert told["twin"] == "draft"
        assert told["steps"] == 11
        assert 0 <= told["lag_p50_s"] <= told["lag_max_s"]
        assert twin.lag().steps == 11
        assert "specwise_twin_lag_p99_seconds" in HTTP.get(twin.url + "/metrics").text
