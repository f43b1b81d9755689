"""What real streams of a real vLLM say, on both endpoints, with and without speculation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specwise.domain import AcceptanceSource, Api, Outcome, RequestRecord
from specwise.measurement.load import PlannedRequest, Target, run_load
from specwise.vllm.response import acceptance_from_chunks, endpoint, request_body
from specwise.vllm.server import Server

MODEL = "demo"
MAX_TOKENS = 40
PROMPTS = (
    '{"name": "lamp", "price": 12, "tags": ["red", "small"]}\n{"name": "chair", "price":',
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n",
    "The module defines functions that read a file and return",
    "Copy this line: one two three four five six seven. Copy:",
)


def send(server: Server, api: Api, *, concurrency: int, speculative: bool) -> list[RequestRecord]:
    plan = [
        PlannedRequest(
            i,
            f"p{i}",
            "s",
            0.0,
            endpoint(api),
            request_body(api, model=MODEL, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0.0),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    records: list[RequestRecord] = []
    run_load(
        plan,
        target=Target(server.url, MODEL, timeout_s=120.0, speculative=speculative),
        concurrency=concurrency,
        part=0,
        on_record=records.append,
        keep_text=True,
    )
    return sorted(records, key=lambda record: record.index)


def send_unmerged(server: Server, api: Api, *, speculative: bool) -> list[RequestRecord]:
    """Answers in which each step has a chunk of its own.

    vLLM merges steps when a stream falls behind its engine (v1/engine/output_processor.py,
    RequestOutputCollector); at 3 ms a step a pass of the garbage collector is enough.
    """
    for _ in range(5):
        records = send(server, api, concurrency=2, speculative=speculative)
        if all(len(r.chunk_s) >= _steps(r) for r in records):
            break
    return records


def _steps(record: RequestRecord) -> int:
    """The steps that wrote an answer, that of its prompt included."""
    counts = record.acceptance
    return 1 + counts.steps if counts else record.output_tokens or 0


@pytest.mark.parametrize("api", list(Api))
def test_a_speculating_servers_chunks_usage_and_histogram_agree(
    drafting_server: Server, api: Api
) -> None:
    for record in send_unmerged(drafting_server, api, speculative=True):
        assert record.outcome is Outcome.OK, record.error
        assert record.chunk_tokens is not None
        assert record.output_tokens is not None
        assert sum(record.chunk_tokens) == record.output_tokens <= MAX_TOKENS
        assert record.prompt_tokens
        assert record.finish_reason in ("length", "stop")
        exact = record.acceptance
        assert exact is not None
        assert exact.source is AcceptanceSource.PER_REQUEST
        assert len(exact.steps_by_accepted) == 3 + 1
        assert exact.drafted_tokens is not None
        assert exact.accepted_tokens <= exact.drafted_tokens <= 3 * exact.steps
        # The prompt's token, then a step a chunk; the last step may be cut short by the end.
        assert len(record.chunk_s) == 1 + exact.steps
        beyond_end = 1 + exact.steps + exact.accepted_tokens - record.output_tokens
        assert 0 <= beyond_end <= 3
        estimate = acceptance_from_chunks(record.chunk_tokens, finished=True)
        assert estimate is not None
        assert estimate.steps == exact.steps - 1
        padded = (*estimate.steps_by_accepted, 0, 0, 0)
        missing = [n - m for n, m in zip(exact.steps_by_accepted, padded, strict=False)]
        assert sorted(missing) == [0, 0, 0, 1]


@pytest.mark.parametrize("api", list(Api))
def test_a_plain_server_sends_one_token_a_chunk_and_no_acceptance(
    baseline_server: Server, drafting_server: Server, api: Api
) -> None:
    plain = send_unmerged(baseline_server, api, speculative=False)
    for record in plain:
        assert record.outcome is Outcome.OK, record.error
        assert record.chunk_tokens == (1,) * (record.output_tokens or 0)
        assert record.acceptance is None
    drafted = send(drafting_server, api, concurrency=2, speculative=True)
    assert [r.output_sha256 for r in drafted] == [r.output_sha256 for r in plain]
    assert [r.output_text for r in drafted] == [r.output_text for r in plain]


def test_a_model_that_the_server_does_not_have_is_an_http_error(baseline_server: Server) -> None:
    body = request_body(Api.CHAT, model="other", prompt="hi", max_tokens=1, temperature=0.0)
    request = PlannedRequest(0, "p", "s", 0.0, endpoint(Api.CHAT), body)
    records: list[RequestRecord] = []
    run_load(
        [request, replace(request, index=1)],
        target=Target(baseline_server.url, "other", timeout_s=60.0),
        concurrency=1,
        part=0,
        on_record=records.append,
    )
    assert [r.outcome for r in records] == [Outcome.HTTP_ERROR] * 2
    assert records[0].status == 404
    assert "`other` does not exist" in (records[0].error or "")
