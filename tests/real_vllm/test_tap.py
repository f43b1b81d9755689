"""Real traffic through tap to a real vLLM: nothing changes, and the sums are the server's own."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console
from tests.monitoring.tapped import tapped

from specwise.domain import Outcome
from specwise.monitoring.production import judge_production
from specwise.monitoring.production_page import print_production
from specwise.monitoring.tap_metrics import TapMetrics
from specwise.monitoring.tap_records import RecordWriter, read_records
from specwise.vllm.metrics import difference, scrape
from specwise.vllm.server import Server

MODEL = "demo"
PROMPTS = {
    "json": '{"name": "lamp", "price": 12, "tags": ["red", "small"]}\n{"name": "chair", "price":',
    "code": "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n",
    "prose": "The module defines functions that read a file and return",
}
TEMPERATURES = (0.0, 0.3, 0.6, 1.0, None)
ENDLESS = {"ignore_eos": True}
BUCKETS = ("0", "0-0.5", "0.5-0.7", "0.7-1", "default")


def body(prompt: str, temperature: float | None, *, stream: bool, usage: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 24}
    if temperature is not None:
        message["temperature"] = temperature
    if stream:
        message["stream"] = True
        if usage:
            message["stream_options"] = {"include_usage": True}
    return message


def test_buckets_and_segments_add_up_to_the_servers_own_counters(
    drafting_server: Server, tmp_path: Path
) -> None:
    plan = [
        # An answer that ends at its first token has nothing drafted, so no rate to tell.
        (segment, body(prompt, temperature, stream=number % 3 > 0, usage=True) | ENDLESS)
        for segment, prompt in PROMPTS.items()
        for temperature in TEMPERATURES
        for number in range(3)
    ]
    before = scrape(drafting_server.url)
    with tapped(drafting_server.url) as tap:
        with httpx.Client(base_url=tap.url, timeout=60) as client, ThreadPoolExecutor(4) as pool:

            def send(planned: tuple[str, dict[str, Any]]) -> httpx.Response:
                segment, message = planned
                return client.post("/v1/completions", json=message, headers={"X-Segment": segment})

            answers = list(pool.map(send, plan))
        assert {answer.status_code for answer in answers} == {200}
        records = tap.wait_records(len(plan))
    delta = difference(before, scrape(drafting_server.url)).counters
    metrics = TapMetrics()
    writer = RecordWriter(tmp_path, {"upstream": drafting_server.url})
    for record in records:
        metrics.count(record)
        writer.write(record)
    writer.close()
    assert {r.outcome for r in records} == {Outcome.OK}

    def total(name: str) -> float:
        return sum(
            sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"specwise_tap_{name}_total"
        )

    assert total("draft_tokens") == delta["spec_draft_tokens"] > 0
    assert total("accepted_tokens") == delta["spec_accepted_tokens"] > 0
    assert total("verify_steps") == delta["spec_drafts"] > 0
    assert sum(r.output_tokens or 0 for r in records) == delta["generation_tokens"]
    assert sum(r.prompt_tokens or 0 for r in records) == delta["prompt_tokens"]

    production = judge_production(read_records(tmp_path))
    groups = {(g.kind, g.name): g for g in production.groups}
    assert {name for kind, name in groups if kind == "temperature"} == set(BUCKETS)
    for bucket in BUCKETS:
        group = groups["temperature", bucket]
        rates = [r.rate for r in records if r.bucket == bucket]
        assert group.with_acceptance == group.requests == len(rates) == 9
        wanted = np.quantile(np.array(rates, float), [0.1, 0.5, 0.9])
        assert (group.p10, group.p50, group.p90) == pytest.approx(tuple(wanted))
    assert sum(groups["segment", s].drafted_tokens for s in PROMPTS) == delta["spec_draft_tokens"]
    streamed = [r for r in records if r.stream]
    assert all(r.ttft_s and r.tpot_s and 0 < r.ttft_s < r.e2e_s for r in streamed)
    shown = io.StringIO()
    print_production(production, Console(file=shown, width=160))
    print(shown.getvalue())


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_through_tap_is_the_stream_without_it(
    drafting_server: Server, usage: bool
) -> None:
    """A client that did not ask for usage gets none: tap asks for nothing itself."""
    message = body(PROMPTS["code"], 0.0, stream=True, usage=usage)
    path = "/v1/completions"

    def chunks(answer: httpx.Response) -> list[Any]:
        found = []
        for line in answer.text.split("\n\n"):
            data = line.removeprefix("data: ")
            if data.startswith("{"):
                chunk = json.loads(data)
                del chunk["id"], chunk["created"]  # new for every request
                found.append(chunk)
            else:
                found.append(data)
        return found

    with tapped(drafting_server.url) as tap:
        direct = httpx.post(drafting_server.url + path, json=message, timeout=60)
        through = httpx.post(tap.url + path, json=message, timeout=60)
        assert chunks(through) == chunks(direct)
        assert ('"usage":{' in through.text) == usage
        wrong = {"model": "nobody", "prompt": "x", "stream": True}
        refused = httpx.post(drafting_server.url + path, json=wrong)
        refused_through = httpx.post(tap.url + path, json=wrong)
        assert (refused_through.status_code, refused_through.content) == (
            refused.status_code,
            refused.content,
        )
        records = tap.wait_records(2)
    unchanging = {"date", "x-request-id", "content-length"}
    kept = [(k, v) for k, v in through.headers.multi_items() if k not in unchanging]
    assert kept == [(k, v) for k, v in direct.headers.multi_items() if k not in unchanging]
    assert (records[0].acceptance is not None) == usage
