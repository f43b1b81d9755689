from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.scripted_server import DONE, Script, events

from specwise.domain import AcceptanceSource, Api
from specwise.vllm import response
from specwise.vllm.response import (
    Done,
    Fault,
    StreamedResponse,
    StreamReader,
    acceptance_from_chunks,
    endpoint,
    error_message,
    parse_event,
    read_stream,
    request_body,
)

SUMMARY = {
    "mean_acceptance_length": 2.0,
    "draft_acceptance_rate": 0.5,
    "acceptance_histogram": [1, 2, 1],
    "num_spec_steps": 4,
    "num_accepted_draft_tokens": 4,
    "num_draft_tokens": 8,
    "num_spec_tokens": 2,
}


def stream(script: Script, api: Api = Api.CHAT) -> bytes:
    return b"".join(data for _, data in events(script, endpoint(api)))


def chunk(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"object": "chat.completion.chunk", **fields}) + b"\n\n"


@pytest.mark.parametrize("api", list(Api))
def test_both_endpoints_say_the_same(api: Api) -> None:
    script = Script(chunks=4, tokens_per_chunk=3, cached_tokens=5, finish_reason="stop")
    response = read_stream(stream(script, api), at_s=1.5)
    assert response.chunk_s == (1.5,) * 4
    assert response.chunk_tokens == (3, 3, 3, 3)
    assert (response.prompt_tokens, response.output_tokens, response.cached_tokens) == (7, 12, 5)
    assert response.finish_reason == "stop"
    assert response.text == " w0é w1 w2 w3é"
    assert response.output_sha256 == hashlib.sha256(response.text.encode()).hexdigest()
    assert response.done
    assert not response.incomplete
    assert response.fault is None
    assert response.acceptance is None


@pytest.mark.parametrize("api", list(Api))
def test_without_running_counts_chunks_are_kept_but_not_counted(api: Api) -> None:
    response = read_stream(stream(Script(chunks=4, running_counts=False), api), speculative=True)
    assert len(response.chunk_s) == 4
    assert response.chunk_tokens is None
    assert response.output_tokens == 4
    assert response.acceptance is None


def test_reasoning_belongs_to_the_output() -> None:
    response = read_stream(stream(Script(chunks=3, reasoning=2)))
    assert response.text == " w0é w1 w2"
    assert response.chunk_tokens == (1, 1, 1)


def test_tool_call_arguments_belong_to_the_output() -> None:
    call = {"index": 0, "function": {"arguments": '{"a":'}}
    data = chunk(choices=[{"delta": {"tool_calls": [call, {"function": {"name": "f"}}]}}])
    assert read_stream(data).text == '{"a":'


def test_a_chunk_with_a_token_and_no_text_counts() -> None:
    # An end-of-text token, or half of a multi-byte character.
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    choice = {"delta": {"content": ""}, "finish_reason": "stop"}
    response = read_stream(chunk(choices=[choice], usage=usage), at_s=3.0)
    assert response.chunk_s == (3.0,)
    assert response.chunk_tokens == (1,)
    assert response.output_tokens == 1


def test_the_servers_own_acceptance_figures_win() -> None:
    script = Script(chunks=4, tokens_per_chunk=2, speculation=SUMMARY)
    acceptance = read_stream(stream(script), speculative=True).acceptance
    assert acceptance is not None
    assert acceptance.source is AcceptanceSource.PER_REQUEST
    assert acceptance.steps_by_accepted == (1, 2, 1)
    assert acceptance.drafted_tokens == 8
    assert acceptance.steps == SUMMARY["num_spec_steps"]
    assert acceptance.accepted_tokens == SUMMARY["num_accepted_draft_tokens"]


def test_null_metrics_are_no_figures() -> None:
    data = chunk(choices=[], usage=None, metrics={"speculative_decoding": None}) + DONE
    response = read_stream(data)
    assert response.acceptance is None
    assert response.fault is None


def test_tokens_per_chunk_estimate_acceptance_only_of_a_speculating_server() -> None:
    data = stream(Script(chunks=4, tokens_per_chunk=3))
    assert read_stream(data).acceptance is None
    acceptance = read_stream(data, speculative=True).acceptance
    assert acceptance is not None
    assert acceptance.source is AcceptanceSource.CHUNKS
    assert acceptance.steps_by_accepted == (0, 0, 2)
    assert acceptance.drafted_tokens is None


def test_first_and_cut_chunk_are_left_out_of_the_estimate() -> None:
    finished = acceptance_from_chunks([1, 3, 1, 4, 2], finished=True)
    assert finished is not None
    assert finished.steps_by_accepted == (1, 0, 1, 1)
    unfinished = acceptance_from_chunks([1, 3, 1, 4, 2], finished=False)
    assert unfinished is not None
    assert unfinished.steps_by_accepted == (1, 1, 1, 1)
    assert acceptance_from_chunks([1, 2], finished=True) is None
    assert acceptance_from_chunks([], finished=True) is None


@given(st.floats(0.0, 0.95), st.integers(1, 6), st.integers(0, 2**16))
@settings(deadline=None, max_examples=20)
def test_the_estimate_agrees_with_the_truth_on_a_long_answer(
    acceptance: float, k: int, seed: int
) -> None:
    import numpy as np

    rng = np.random.default_rng(seed)
    misses = rng.random((20_000, k)) >= acceptance
    accepted = np.where(misses.any(axis=1), misses.argmax(axis=1), k)
    tokens = [1, *(accepted + 1).tolist()]
    tokens[-1] = 1  # cut
    estimate = acceptance_from_chunks(tokens, finished=True)
    assert estimate is not None
    assert estimate.accepted_tokens / estimate.steps == pytest.approx(accepted.mean(), abs=0.01)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_and_comments_do_not_matter(line_end: str) -> None:
    plain = read_stream(stream(Script()))
    assert read_stream(stream(Script(line_end=line_end, comments=True))) == plain


def read_in_pieces(data: bytes, cuts: list[int]) -> StreamedResponse:
    reader = StreamReader(speculative=True)
    for start, end in pairwise([0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]):
        reader.feed(2.0, data[start:end])
    return reader.finish(2.0)


@given(
    st.builds(
        Script,
        chunks=st.integers(0, 4),
        tokens_per_chunk=st.integers(1, 4),
        line_end=st.sampled_from(["\n", "\r\n", "\r"]),
        comments=st.booleans(),
        running_counts=st.booleans(),
        usage=st.booleans(),
        speculation=st.sampled_from([None, SUMMARY]),
        words=st.lists(st.text(max_size=5), max_size=4).map(tuple),
        reasoning=st.integers(0, 2),
    ),
    st.sampled_from(list(Api)),
    st.binary(max_size=4),
    st.lists(st.integers(0, 2**16), max_size=12),
)
@settings(deadline=None, max_examples=300)
@example(Script(line_end="\r"), Api.CHAT, b"\n\x00", [1])
@example(Script(line_end="\r"), Api.CHAT, b"\n\n", [1])
def test_the_outcome_does_not_depend_on_where_the_bytes_were_cut(
    script: Script, api: Api, tail: bytes, cuts: list[int]
) -> None:
    data = stream(script, api) + tail
    whole = read_in_pieces(data, [])
    assert read_in_pieces(data, cuts) == whole
    assert read_in_pieces(data, list(range(len(data)))) == whole


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6))
@settings(deadline=None)
def test_garbage_never_raises(data: bytes, cuts: list[int]) -> None:
    assert read_in_pieces(data, cuts) == read_in_pieces(data, [])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "usage", "metrics", "delta", "text", "error", "content", "message",
                     "speculative_decoding", "acceptance_histogram", "completion_tokens",
                     "prompt_tokens_details", "tool_calls", "function", "finish_reason"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_json_of_any_shape_never_raises(message: Any) -> None:
    try:
        data = b"data: " + orjson.dumps(message) + b"\n\n"
    except TypeError:  # integers beyond 64 bits
        return
    read_stream(data)


def test_an_events_time_is_that_of_the_piece_that_completes_it() -> None:
    data = stream(Script(chunks=2), Api.COMPLETIONS)
    first_end = data.index(b"\n\n") + 2
    reader = StreamReader()
    reader.feed(1.0, data[: first_end - 1])
    reader.feed(2.0, data[first_end - 1 : first_end + 5])
    reader.feed(3.0, data[first_end + 5 :])
    assert reader.finish(4.0).chunk_s == (2.0, 3.0)


ODD_CHUNKS = [
    b'"}',
    b"\\",
    b"a\\",
    b'b","c',
    b"\\\\",
    b'\\"},\\"finish_reason\\":null',
    b'","x":"',
    b"\\ud83d",
    b"\\ud83d\\ude00",
    b"\xf0\x9f",
    b"\\n\\n",
    b"\x01",
    "é😀".encode(),
    b"",
]


@given(
    st.lists(st.sampled_from([b" word", *ODD_CHUNKS]) | st.text(max_size=3), max_size=30),
    st.lists(
        st.tuples(
            st.integers(0, 30),
            st.sampled_from(
                [
                    lambda data: data[:-1],
                    lambda data: data + data,
                    lambda data: data.replace(b"total_tokens", b"total"),
                    lambda data: data.replace(b'"completion_tokens":', b'"completion_tokens":-'),
                    lambda data: data.replace(b'"completion_tokens":', b'"completion_tokens":0.'),
                    lambda data: data.replace(b'"completion_tokens":', b""),
                    lambda data: data.replace(b'"prompt_tokens":7', b'"prompt_tokens":8'),
                    lambda data: data[:70],
                    lambda data: data[:-20] + b"\n\n",
                    lambda data: data.replace(b"data: ", b"data:"),
                    lambda data: data.replace(b"}}\n", b',"more":{"a":[1]}}}\n'),
                    lambda data: data.replace(b"\n\n", b"\r\n\r\n"),
                    lambda data: data.replace(b'"index"', b'"logprobs":null,"index"'),
                    lambda data: data[:0] + b'data: {"error": {"message": "out of memory"}}\n\n',
                    lambda data: b": ping\n\n" + data,
                    lambda data: data[:0],
                ]
            ),
        ),
        max_size=3,
    ),
    st.sampled_from(list(Api)),
    st.integers(1, 30),
)
@settings(deadline=None, max_examples=300)
def test_chunks_read_together_say_what_each_says_alone(
    words: list[Any],
    changes: list[tuple[int, Callable[[bytes], bytes]]],
    api: Api,
    together: int,
) -> None:
    script = Script(chunks=len(words), words=("WORD",) * len(words), tokens_per_chunk=2)
    pieces = [data for _, data in events(script, endpoint(api))]
    for i, word in enumerate(words, start=len(pieces) - len(words) - 2):
        inside = word if isinstance(word, bytes) else orjson.dumps(word)[1:-1]
        pieces[i] = pieces[i].replace(b"WORD", inside)
    for i, change in changes:
        pieces[i % len(pieces)] = change(pieces[i % len(pieces)])
    times_s = [float(i) for i in range(len(pieces))]
    reader, plain_reader = StreamReader(speculative=True), StreamReader(speculative=True)
    for i in range(0, len(pieces), together):
        reader.feed_all(times_s[i : i + together], pieces[i : i + together])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response, "_MAX_LEARNT", 0)
        for at_s, data in zip(times_s, pieces, strict=True):
            plain_reader.feed(at_s, data)
    assert reader.finish(99.0) == plain_reader.finish(99.0)


@pytest.mark.parametrize("api", list(Api))
def test_most_chunks_of_an_answer_are_read_together(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def count(payload: bytes) -> Any:
        parsed.append(payload)
        return parse_event(payload)

    monkeypatch.setattr(response, "parse_event", count)
    pieces = [data for _, data in events(Script(chunks=100), endpoint(api))]
    reader = StreamReader()
    reader.feed_all([1.0] * len(pieces), pieces)
    assert len(reader.finish(1.0).chunk_s) == 100
    assert len(parsed) < 10


def test_multi_line_data_is_one_event() -> None:
    data = b'event: x\nid: 1\ndata: {"choices":\ndata:[{"text": "a"}]}\n\ndata:[DONE]\n\n'
    response = read_stream(data)
    assert response.text == "a"
    assert response.done
    assert response.fault is None


def test_a_byte_order_mark_is_skipped() -> None:
    assert read_stream(b"\xef\xbb\xbf" + stream(Script())).fault is None


def test_a_missing_last_blank_line_is_forgiven() -> None:
    data = stream(Script())
    assert read_stream(data.removesuffix(b"\n")) == read_stream(data)
    cut = read_stream(data.removesuffix(DONE)[:-20])
    assert not cut.done
    assert cut.incomplete


def test_nothing_counts_after_done() -> None:
    data = stream(Script())
    assert read_stream(data + data) == read_stream(data)


@pytest.mark.parametrize(
    ("payload", "message", "by_server"),
    [
        (b'{"error": {"message": "out of memory", "code": 500}}', "out of memory", True),
        (b'{"object": "error", "message": "old style"}', "old style", True),
        (b'{"error": "short"}', "short", True),
        (b"{nonsense", "not JSON", False),
        (b"[1]", "shape", False),
        (b'{"choices": [{"delta": 3}]}', "shape", False),
        (b'{"choices": [{"text": 3}]}', "shape", False),
        (b'{"choices": [], "usage": {"completion_tokens": "many"}}', "shape", False),
    ],
)
def test_errors_in_the_stream_are_faults(payload: bytes, message: str, by_server: bool) -> None:
    event = parse_event(payload)
    assert isinstance(event, Fault)
    assert message in event.message
    assert event.by_server is by_server
    response = read_stream(b"data: " + payload + b"\n\n" + DONE)
    assert response.fault == event
    assert response.done


def test_done_is_done() -> None:
    assert parse_event(b"[DONE]") == Done()


def test_error_message_reads_fastapis_form_too() -> None:
    assert error_message({"detail": "Not Found"}) == "Not Found"
    assert error_message([1]) == ""


def test_request_bodies() -> None:
    chat = orjson.loads(
        request_body(Api.CHAT, model="m", prompt="hi", max_tokens=5, temperature=0.5, seed=3)
    )
    assert chat == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    body = request_body(Api.CHAT, model="m", prompt=messages, max_tokens=5, temperature=0.0)
    assert orjson.loads(body)["messages"] == messages
    plain = orjson.loads(
        request_body(
            Api.COMPLETIONS,
            model="m",
            prompt="hi",
            max_tokens=5,
            temperature=0.0,
            extra={"stop": ["x"], "stream": False},
        )
    )
    assert plain["prompt"] == "hi"
    assert plain["stop"] == ["x"]
    assert plain["stream"] is True
    with pytest.raises(TypeError):
        request_body(Api.COMPLETIONS, model="m", prompt=messages, max_tokens=5, temperature=0.0)
