from __future__ import annotations

import itertools
import socket
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.scripted_server import Script, events

from specwise.domain import Api, Outcome
from specwise.measurement import connection as connection_module
from specwise.measurement.connection import Connection, Exchange
from specwise.vllm.response import StreamReader, endpoint

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Wire:
    """A transport that goes nowhere."""

    closed = False

    def is_closing(self) -> bool:
        return self.closed

    def write(self, _data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.closed = True


@contextmanager
def connection() -> Iterator[Connection]:
    """A connection whose clock says 0, 1, 2, ... to the reads it is given."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = Connection(lambda: 0.0, ours)
        made.connection_made(Wire())  # type: ignore[arg-type]
        yield made


def receive(made: Connection, reads: list[bytes]) -> tuple[Exchange, int]:
    """What becomes of one request's answer, and how often its end was told."""
    exchange, ends = Exchange(), itertools.count()
    made.send(exchange, b"", lambda: next(ends) and None)
    made._clock = map(float, itertools.count()).__next__
    for data in reads:
        made.data_received(data)
    return exchange, next(ends)


def in_reads(raw: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(raw), *(cut % len(raw) for cut in cuts)})
    return [raw[start:end] for start, end in itertools.pairwise(bounds)]


def framed(data: bytes, sizes: list[int]) -> list[bytes]:
    """``data`` as HTTP chunks of these sizes, repeated until it is used up."""
    chunks = []
    for size in itertools.cycle(sizes or [len(data)]):
        chunks.append(b"%x\r\n%b\r\n" % (len(data[:size]), data[:size]))
        data = data[size:]
        if not data:
            return chunks
    return chunks


@given(
    st.lists(st.integers(0, 2**16), max_size=40),
    st.lists(st.integers(1, 600), max_size=3),
    st.sampled_from(list(Api)),
)
@settings(deadline=None, max_examples=150)
@example([-1], [], Api.CHAT)
@example([-2], [], Api.CHAT)
@example([-3, -1], [], Api.CHAT)
def test_a_chunks_time_is_that_of_the_read_with_its_last_byte(
    cuts: list[int], sizes: list[int], api: Api
) -> None:
    # By HTTP's own arithmetic: where each event's last byte stands in the bytes as sent.
    sent, last_bytes = HEAD, []
    for kind, data in events(Script(chunks=20), endpoint(api)):
        chunks = framed(data, sizes)
        sent += b"".join(chunks)
        if kind:
            last_bytes.append(len(sent) - len(b"\r\n") - 1)
    sent += END
    reads = in_reads(sent, cuts)
    read_ends = list(itertools.accumulate(map(len, reads)))
    expected = tuple(float(bisect_left(read_ends, at + 1)) for at in last_bytes)

    with connection() as made:
        exchange, ends = receive(made, reads)
        assert ends == 1
        assert made.kept_alive
    assert exchange.complete
    assert exchange.fault is None
    assert exchange.finished_s == len(reads) - 1
    reader = StreamReader()
    reader.feed_all(exchange.times_s, exchange.pieces)
    response = reader.finish(exchange.finished_s)
    assert response.chunk_s == expected
    assert response.done


@pytest.mark.parametrize(
    "head", [HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]
)
def test_a_body_without_end_is_given_up(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_MAX_BODY_BYTES", 5000)
    with connection() as made:
        exchange, ends = receive(made, [head] + [b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 300)
    assert ends == 1
    assert exchange.fault == (Outcome.STREAM_ERROR, "the answer exceeds 256 MiB")
    assert exchange.pieces == []


def test_malformed_chunks_end_the_answer() -> None:
    with connection() as made:
        exchange, ends = receive(made, [HEAD, b"3\r\nabc\r\n", b"zz\r\n", b"3\r\ndef\r\n"])
        assert not made.kept_alive
    assert ends == 1
    assert exchange.fault == (Outcome.STREAM_ERROR, "the answer is not valid HTTP/1.1")
    assert exchange.pieces == [b"abc"]
    assert exchange.finished_s == 2.0


def test_what_was_given_up_never_ends() -> None:
    with connection() as made:
        exchange, _ = receive(made, [HEAD, b"3\r\nabc\r\n"])
        made.give_up()
        made.connection_lost(None)
        assert not made.kept_alive
    assert exchange.pieces == [b"abc"]
    assert exchange.fault is None
    assert not exchange.complete


def test_what_arrived_before_a_cut_is_kept() -> None:
    with connection() as made:
        exchange, _ = receive(made, [HEAD, b"3\r\nabc\r\n", b"3\r\nde"])
        made.connection_lost(None)
    assert exchange.fault is not None
    assert exchange.fault[0] is Outcome.CUT
    assert exchange.pieces == [b"abc", b"de"]
    assert exchange.finished_s == 3.0


@pytest.mark.parametrize("reads", [[HEAD + END + HEAD + END], [HEAD + b"1\r\nx\r\n", END + b"?"]])
def test_what_follows_an_answer_spoils_the_connection_only(reads: list[bytes]) -> None:
    with connection() as made:
        exchange, _ = receive(made, reads)
        assert not made.kept_alive
    assert exchange.complete
    assert exchange.fault is None
    assert len(exchange.pieces) == len(exchange.times_s) == len(reads) - 1


def test_bytes_that_nothing_asked_for_close_the_connection() -> None:
    with connection() as made:
        made.data_received(b"HTTP/1.1 200 OK\r\n")
        assert not made.kept_alive
