from __future__ import annotations

import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from specwise.domain import AcceptanceSource, Deployment
from specwise.errors import InputError, ServerError
from specwise.facts.bundled import SEGMENTS, bundled_prompts
from specwise.vllm import metrics
from specwise.vllm.server import Capabilities, Server, probe


def _prompts(per_segment: int) -> list[list[dict[str, str]]]:
    messages = []
    for segment in SEGMENTS:
        lines = bundled_prompts(segment).read_text().splitlines()[:per_segment]
        messages += [json.loads(line)["messages"] for line in lines]
    return messages


def _chat(server: Server, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"model": server.model, "messages": messages, "temperature": 0.0} | options
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False
    )
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def _settled(server: Server, before: metrics.Snapshot, requests: int) -> metrics.Delta:
    """The counters once the server has booked ``requests`` requests more than ``before``."""
    deadline = time.monotonic() + 10
    while True:
        delta = metrics.difference(before, metrics.scrape(server.url))
        if delta.counters["request_success"] >= requests:
            return delta
        assert time.monotonic() < deadline, "the server never booked the requests"
        time.sleep(0.1)


def test_greedy_output_is_the_same_with_and_without_a_draft(
    baseline_server: Server, drafting_server: Server
) -> None:
    """20 prompts of all segments, float32: speculation may not change a single token."""
    prompts = _prompts(per_segment=5)
    with ThreadPoolExecutor(2) as pool:  # the servers work side by side, each on one request
        outputs = pool.map(
            lambda server: [_chat(server, prompt, max_tokens=64) for prompt in prompts],
            (baseline_server, drafting_server),
        )
    for plain, drafted in zip(*outputs, strict=True):
        assert plain["choices"][0]["message"] == drafted["choices"][0]["message"]
        assert plain["usage"]["completion_tokens"] == drafted["usage"]["completion_tokens"]


def test_a_probe_tells_the_two_servers_apart(
    baseline_server: Server, drafting_server: Server
) -> None:
    assert probe(baseline_server.url, model="demo") == Capabilities(
        version="0.32.0",
        models=("demo",),
        speculative=False,
        per_request_metrics=False,
        generation="V1",
        max_model_len=1024,
    )
    found = probe(drafting_server.url, model="demo")
    assert (found.speculative, found.per_request_metrics) == (True, None)
    with pytest.raises(InputError, match="It serves demo"):
        probe(drafting_server.url, model="another")


def test_the_quick_reading_of_metrics_is_the_whole_ones(drafting_server: Server) -> None:
    text = metrics.fetch(drafting_server.url)
    whole, some = metrics.parse(text), metrics.parse(text, histograms=("tpot_s",))
    assert (some.counters, some.gauges) == (whole.counters, whole.gauges)
    assert some.histograms == {"tpot_s": whole.histograms["tpot_s"]}
    assert (some.generation, some.process_start_s) == (whole.generation, whole.process_start_s)


def test_counters_agree_with_the_requests_that_were_sent(drafting_server: Server) -> None:
    before = metrics.scrape(drafting_server.url)
    prompts = _prompts(per_segment=2)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda m: _chat(drafting_server, m, max_tokens=40), prompts))
    delta = _settled(drafting_server, before, len(prompts))
    usage = [answer["usage"] for answer in answers]
    per_request = [answer["metrics"]["speculative_decoding"] for answer in answers]
    assert delta.counters["request_success"] == len(prompts)
    assert delta.counters["prompt_tokens"] == sum(u["prompt_tokens"] for u in usage)
    assert delta.counters["generation_tokens"] == sum(u["completion_tokens"] for u in usage)
    assert delta.histograms["ttft_s"].count == len(prompts)
    counts = metrics.acceptance_from(delta)
    assert counts is not None
    assert counts.source is AcceptanceSource.COUNTERS
    histograms = [r["acceptance_histogram"] for r in per_request]
    assert counts.steps_by_accepted == tuple(map(sum, zip(*histograms, strict=True)))
    assert counts.drafted_tokens == sum(r["num_draft_tokens"] for r in per_request)


def test_a_baseline_server_counts_no_drafts(baseline_server: Server) -> None:
    snapshot = metrics.scrape(baseline_server.url)
    assert not any(name.startswith("spec_") for name in snapshot.counters)
    assert {"running", "waiting", "kv_use"} <= snapshot.gauges.keys()
    assert snapshot.process_start_s is not None


def test_a_suspended_server_uses_no_processor_and_answers_afterwards(
    drafting_server: Server,
) -> None:
    messages = _prompts(per_segment=1)[0]
    _chat(drafting_server, messages, max_tokens=4)  # it would go on spinning for a second
    drafting_server.suspend()
    try:
        spent = _processor_s(drafting_server.pid)
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{drafting_server.url}/health", timeout=0.5, trust_env=False)
        assert _processor_s(drafting_server.pid) - spent <= 0.02
    finally:
        drafting_server.resume()
    assert _chat(drafting_server, messages, max_tokens=4)["usage"]["completion_tokens"] > 0


def _processor_s(group: int) -> float:
    """Processor time of all members of a process group so far."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def test_a_cache_salt_keeps_the_prefix_caches_of_two_trials_apart(baseline_server: Server) -> None:
    messages = [{"role": "user", "content": "and so on, " * 100}]

    def cached_tokens(salt: str) -> int:
        usage = _chat(baseline_server, messages, max_tokens=1, cache_salt=salt)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached_tokens("trial 1") == 0
    assert cached_tokens("trial 1") > 0
    assert cached_tokens("trial 2") == 0


def test_a_server_that_cannot_start_says_why(deployment: Deployment, tmp_path: Path) -> None:
    too_long = replace(deployment, arguments=("--max-model-len", "100000"))
    with Server.start(too_long, log_path=tmp_path / "log") as server:
        with pytest.raises(ServerError, match=r"max_model_len \(100000\) is greater than"):
            server.wait_ready()
        assert not server.alive
