"""`specwise watch` against real servers: its figures are the requests' own."""

from __future__ import annotations

import json

import httpx
import pytest

from specwise.facts.bundled import bundled_prompts
from specwise.monitoring.standing import Health
from specwise.monitoring.watch import Watch
from specwise.monitoring.windows import State
from specwise.vllm import metrics
from specwise.vllm.server import Server


def test_a_window_is_what_the_requests_in_it_say_of_themselves(
    baseline_server: Server, drafting_server: Server
) -> None:
    urls = [drafting_server.url, baseline_server.url]
    lines = bundled_prompts("json").read_text().splitlines()[:4]
    with Watch(None) as watch, httpx.Client(trust_env=False, timeout=60) as client:
        watch.round(urls)
        counts = []
        for line in lines:
            body = {
                "model": drafting_server.model,
                "messages": json.loads(line)["messages"],
                "temperature": 0.0,
                "max_tokens": 32,
            }
            answer = client.post(f"{drafting_server.url}/v1/chat/completions", json=body).json()
            counts.append(answer["metrics"]["speculative_decoding"])
        wanted = sum(c["num_draft_tokens"] for c in counts)
        before = metrics.scrape(drafting_server.url)
        while metrics.scrape(drafting_server.url) != before:  # booked a moment after the answer
            before = metrics.scrape(drafting_server.url)
        drafting, plain = watch.round(urls)
    assert drafting.window.state is State.OK
    assert drafting.window.drafted_tokens == wanted
    accepted = sum(c["num_accepted_draft_tokens"] for c in counts)
    assert drafting.rate == pytest.approx(accepted / wanted)
    assert drafting.window.requests == len(lines)
    assert len(drafting.window.positions) == 3
    assert drafting.window.ttft_s is not None
    assert drafting.window.ttft_s.count == len(lines)
    assert drafting.window.tpot_s is not None
    assert drafting.window.tpot_s.mean > 0
    assert (drafting.window.generation, drafting.window.kv_use) == ("V1", 0.0)
    assert plain.health is Health.UNKNOWN
    assert [seen.code for seen in plain.observations] == ["no-speculation"]
