"""Answers are read after they passed: in slices, completely, and into one record each."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scripted_server import DONE, Script, events

from specwise.domain import Outcome
from specwise.monitoring.tap_reading import Answer, ReadingQueue
from specwise.monitoring.tap_records import TapRecord
from specwise.monitoring.tap_requests import RequestFacts

PATH = "/v1/completions"
SPECULATION = {
    "num_draft_tokens": 12,
    "num_accepted_draft_tokens": 8,
    "num_spec_steps": 4,
    "acceptance_histogram": [1, 0, 1, 2],
}


def answer(*, streamed: bool = True, plain: bool = True, status: int = 200) -> Answer:
    found = Answer(at=1_790_000_000.0, began_s=10.0)
    found.facts = RequestFacts(PATH, read=True, model="m", temperature=0.5)
    found.segment = "s"
    found.status, found.streamed, found.plain = status, streamed, plain
    return found


def read(found: Answer, outcome: Outcome = Outcome.OK, *, ended_s: float = 20.0) -> TapRecord:
    records: list[TapRecord] = []

    async def pass_through() -> None:
        queue = ReadingQueue(records.append)
        queue.ended(found, outcome, ended_s)
        queue.ended(found, Outcome.CANCELLED, ended_s + 1)  # the first end counts
        while not records:
            await asyncio.sleep(0.001)
        queue.finish()

    asyncio.run(pass_through())
    (record,) = records
    return record


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 400))
def test_a_record_does_not_depend_on_how_the_bytes_came(seed: int, chunks: int) -> None:
    rng = random.Random(seed)
    script = Script(chunks=chunks, speculation=SPECULATION, cached_tokens=2)
    data = b"".join(part for _, part in events(script, PATH))
    found = answer()
    at = 0
    while at < len(data):
        size = rng.choice((1, 3, 100, 400))
        found.passed(11.0 + at / len(data), data[at : at + size])
        if rng.random() < 0.1:
            found.read_slice(rng.randint(1, 30))
        at += size
    record = read(found)
    assert (record.outcome, record.chunks, record.output_tokens) == (Outcome.OK, chunks, chunks)
    assert (record.prompt_tokens, record.cached_tokens) == (7, 2)
    assert record.rate == pytest.approx(8 / 12)
    assert record.ttft_s is not None
    assert 1.0 <= record.ttft_s <= 2.0
    assert record.e2e_s == 10.0
    if chunks > 1:
        assert record.tpot_s is not None
        assert record.last_token_s == pytest.approx(record.ttft_s + record.tpot_s * (chunks - 1))


def test_an_answer_that_was_not_streamed_has_counts_and_no_ttft() -> None:
    found = answer(streamed=False)
    body = {
        "choices": [{"text": "words", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16},
        "metrics": {"speculative_decoding": SPECULATION},
    }
    found.passed(12.0, json.dumps(body).encode())
    record = read(found)
    assert (record.ttft_s, record.tpot_s, record.chunks) == (None, None, 0)
    assert (record.output_tokens, record.finish_reason) == (9, "stop")
    assert record.rate == pytest.approx(8 / 12)


@pytest.mark.parametrize(
    ("found", "body"),
    [
        (answer(streamed=False), b"no JSON"),
        (answer(streamed=False), b'{"choices": []}'),
        (answer(streamed=False), b'{"choices": 3, "usage": {"completion_tokens": -1}}'),
        (answer(streamed=False), b"x" * (9 << 20)),
        (answer(plain=False), b"\x1f\x8b"),
        (answer(status=500), b'{"choices": [{}], "usage": {"completion_tokens": 1}}'),
    ],
)
def test_what_cannot_be_read_is_recorded_without_figures(found: Answer, body: bytes) -> None:
    for at in range(0, len(body), 1 << 20):
        found.passed(12.0, body[at : at + (1 << 20)])
    record = read(found, Outcome.OK if found.status == 200 else Outcome.HTTP_ERROR)
    assert (record.acceptance, record.output_tokens, record.ttft_s) == (None, None, None)
    assert found.unread_pieces == 0


def test_a_stream_that_was_cut_keeps_its_ttft_and_claims_no_tpot() -> None:
    found = answer()
    data = b"".join(part for _, part in events(Script(chunks=9), PATH)).removesuffix(DONE)
    found.passed(12.0, data[: len(data) // 2])
    record = read(found, Outcome.CUT)
    assert (record.outcome, record.ttft_s, record.tpot_s) == (Outcome.CUT, 2.0, None)


def test_reading_gives_way_to_traffic_and_a_long_stream_does_not_pile_up() -> None:
    """While 200 long answers are read, the event loop is never held up for long."""
    pieces = [part for _, part in events(Script(chunks=600), PATH)]
    records: list[TapRecord] = []
    worst_s = 0.0

    async def traffic() -> None:
        nonlocal worst_s
        queue = ReadingQueue(records.append)
        answers = [answer() for _ in range(200)]
        for found in answers:
            for piece in pieces[:520]:
                found.passed(11.0, piece)
                queue.passed(found)
        while any(found.unread_pieces for found in answers):
            before_s = time.thread_time()
            await asyncio.sleep(0)
            worst_s = max(worst_s, time.thread_time() - before_s)
        assert records == []
        for found in answers:
            for piece in pieces[520:]:
                found.passed(12.0, piece)
            queue.ended(found, Outcome.OK, 13.0)
        queue.finish()

    asyncio.run(traffic())
    assert {(r.chunks, r.output_tokens, r.outcome) for r in records} == {(600, 600, Outcome.OK)}
    assert len(records) == 200
    assert worst_s < 0.02  # all at once would take over 0.1 s
