"""Through tap to a server of known truth: figures by bucket and segment add up to its counters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.monitoring.tapped import tapped

from specwise.domain import Outcome
from specwise.monitoring.production import judge_production
from specwise.monitoring.tap_records import TapRecord
from specwise.prediction.truth import parse_truth
from specwise.prediction.twin import playing
from specwise.vllm.metrics import difference, scrape

TRUTH = """
model = "m"
max_model_len = 2000
characters_per_token = 4
[limits]
max_num_seqs = 8
kv_tokens = 8000
[costs]
target_pass_ms = 1
draft_pass_ms = 0.1
[[segment]]
name = "easy"
match = "easy"
[[segment]]
name = "hard"
[[server]]
name = "draft"
speculation = { method = "draft_model", k = 3 }
[server.acceptance]
easy = 1
hard = [0.4, 0.4, 0.4]
"""
TEMPERATURES = (0, 0.4, 0.7, 1.0, None)
BUCKETS = {"0", "0-0.5", "0.5-0.7", "0.7-1", "default"}
EACH = 8


def test_every_token_is_accounted_for_and_the_losing_segment_shows() -> None:
    plan = [
        (segment, temperature, number)
        for segment in ("easy", "hard")
        for temperature in TEMPERATURES
        for number in range(EACH)
    ]
    with playing(parse_truth(TRUTH, name="truth")) as (twin,), tapped(twin.url) as tap:
        before = scrape(twin.url)
        with httpx.Client(base_url=tap.url, timeout=30) as client, ThreadPoolExecutor(8) as pool:

            def send(planned: tuple[str, float | None, int]) -> int:
                segment, temperature, number = planned
                body: dict[str, object] = {"model": "m", "prompt": f"{segment} words {number}"}
                body |= {"max_tokens": 30}
                if temperature is not None:
                    body["temperature"] = temperature
                if number % 4:  # the others are answered in one piece
                    body |= {"stream": True, "stream_options": {"include_usage": True}}
                answer = client.post("/v1/completions", json=body, headers={"X-Segment": segment})
                return answer.status_code

            assert set(pool.map(send, plan)) == {200}
        records = list(tap.wait_records(len(plan)))
        delta = difference(before, scrape(twin.url)).counters
    assert {record.outcome for record in records} == {Outcome.OK}

    def total(part: list[TapRecord]) -> tuple[int, int, int]:
        counts = [r.acceptance for r in part if r.acceptance is not None]
        assert len(counts) == len(part)
        return (
            sum(c.drafted_tokens or 0 for c in counts),
            sum(c.accepted_tokens for c in counts),
            sum(c.steps for c in counts),
        )

    names = ("spec_draft_tokens", "spec_accepted_tokens", "spec_drafts")
    assert total(records) == tuple(delta[name] for name in names)
    assert sum(r.output_tokens or 0 for r in records) == delta["generation_tokens"]
    assert sum(r.prompt_tokens or 0 for r in records) == delta["prompt_tokens"]

    groups = {(g.kind, g.name): g for g in judge_production(records).groups}
    assert {name for kind, name in groups if kind == "temperature"} == BUCKETS
    assert sum(groups["temperature", b].drafted_tokens for b in BUCKETS) == total(records)[0]
    easy, hard = groups["segment", "easy"], groups["segment", "hard"]
    assert (easy.p10, easy.p50, easy.p90) == (1.0, 1.0, 1.0)
    # Each of three positions is reached with 0.4 of the one before: (0.4 + 0.16 + 0.064) / 3.
    assert hard.rate == pytest.approx(0.208, abs=0.05)
    assert hard.p90 is not None
    assert hard.p90 < 0.5
    assert "without speculation" in hard.advice
