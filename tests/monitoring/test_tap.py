"""Tap over real sockets: the client sees what the upstream shows, and nothing stays behind."""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from tests.monitoring.tapped import body_of, exchange, head_of, port_of, tapped, wait_until
from tests.scripted_server import Script, ScriptedServer

from specwise.domain import Outcome
from specwise.errors import InputError
from specwise.monitoring.tap import tap_settings
from specwise.monitoring.tap_metrics import TapMetrics

SPECULATION = {
    "num_draft_tokens": 12,
    "num_accepted_draft_tokens": 8,
    "num_spec_steps": 4,
    "acceptance_histogram": [1, 0, 1, 2],
}
PATHS = ("/v1/chat/completions", "/v1/completions")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def request(path: str = PATHS[0], *, close: bool = True, **more: object) -> bytes:
    body = json.dumps({"model": "m", "stream": True, "temperature": 0.3, **more}).encode()
    connection = "close" if close else "keep-alive"
    return (
        f"POST {path} HTTP/1.1\r\nHost: there\r\nAuthorization: Bearer key-of-mine\r\n"
        f"X-Segment: chat\r\nConnection: {connection}\r\nX-ODD: UPPER,lower; q=1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


SCRIPTS = {
    "plain": Script(chunks=40, speculation=SPECULATION, close_after=True),
    "cut in pieces": Script(cuts=True, keep_alive=False, chunks=8),
    "length": Script(framing="length", keep_alive=False),
    "until close": Script(framing="close", keep_alive=False),
    "gzip": Script(encoding="gzip", keep_alive=False),
    "carriage returns": Script(line_end="\r\n", comments=True, keep_alive=False),
    "interim": Script(interim=True, keep_alive=False),
    "dies mid-stream": Script(fault="cut", fault_at=3),
    "resets mid-stream": Script(fault="reset", fault_at=3, gap_s=0.02),
    "dies later": Script(fault="cut", fault_at=12, chunks=40),
    "resets later": Script(fault="reset", fault_at=12, chunks=40, gap_s=0.02),
    "closes in silence": Script(fault="silent-close"),
    "error event": Script(fault="error-event", keep_alive=False),
    "malformed": Script(fault="malformed", keep_alive=False),
    "no done": Script(fault="no-done", keep_alive=False),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_client_sees_what_the_upstream_shows(name: str) -> None:
    with ScriptedServer(SCRIPTS[name]) as server, tapped(server.url) as tap:
        direct = exchange(server.url, request())
        through = exchange(tap.url, request())
        assert head_of(through) == head_of(direct)
        assert body_of(through) == body_of(direct)
        first, second = server.served
        assert (first.path, first.headers, first.body) == (
            second.path,
            second.headers,
            second.body,
        )
        (record,) = tap.wait_records(1)
    cut = name.partition(" ")[0] in ("dies", "resets", "closes")
    broken = name in ("error event", "malformed")
    expected = Outcome.CUT if cut else Outcome.STREAM_ERROR if broken else Outcome.OK
    assert record.outcome is expected


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 503])
def test_errors_pass_as_they_are_and_the_connection_lives_on(status: int) -> None:
    with ScriptedServer(Script(fault="status", status=status)) as server, tapped(server.url) as tap:
        with httpx.Client() as direct, httpx.Client() as client:
            wanted = direct.post(server.url + PATHS[1], json={"prompt": "p"})
            for _ in range(3):
                answer = client.post(tap.url + PATHS[1], json={"prompt": "p"})
                assert answer.status_code == status
                assert answer.content == wanted.content
                assert answer.headers.raw == wanted.headers.raw
        assert server.connections == 2
        records = tap.wait_records(3)
    assert {(r.outcome, r.status, r.bucket) for r in records} == {
        (Outcome.HTTP_ERROR, status, "default")
    }


def test_redirects_are_passed_on_and_not_followed() -> None:
    with ScriptedServer(Script(fault="redirect")) as server, tapped(server.url) as tap:
        answer = httpx.post(tap.url + PATHS[0], json={"model": "m"})
    assert answer.status_code == 307
    assert answer.headers["location"] == "http://elsewhere.example/v1/x?token=abc"


@pytest.mark.parametrize("path", PATHS)
def test_what_is_recorded_is_what_the_server_said(path: str) -> None:
    script = Script(first_s=0.3, gap_s=0.05, chunks=9, speculation=SPECULATION, cached_tokens=3)
    with ScriptedServer(script) as server, tapped(server.url) as tap:
        with httpx.Client(headers={"X-Segment": "chat"}) as client:
            for _ in range(2):
                client.post(tap.url + path, json={"model": "m", "stream": True, "temperature": 0.6})
        assert server.connections == 1
        records = tap.wait_records(2)
        served = server.served
    for record, truth in zip(records, served, strict=True):
        assert (record.segment, record.bucket, record.path) == ("chat", "0.5-0.7", path)
        assert (record.outcome, record.stream, record.chunks) == (Outcome.OK, True, 9)
        assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 9, 3)
        assert record.acceptance is not None
        assert record.acceptance.steps_by_accepted == (1, 0, 1, 2)
        assert record.rate == pytest.approx(8 / 12)
        assert record.ttft_s is not None
        assert record.tpot_s is not None
        true_ttft_s = truth.chunk_sent_s[0] - truth.received_s
        true_tpot_s = (truth.chunk_sent_s[-1] - truth.chunk_sent_s[0]) / 8
        assert record.ttft_s == pytest.approx(true_ttft_s, abs=0.15)
        assert record.tpot_s == pytest.approx(true_tpot_s, abs=0.03)
    metrics = TapMetrics()
    for record in records:
        metrics.count(record)
    labels = {"segment": "chat", "temperature": "0.5-0.7"}

    def sample(name: str, **more: str) -> float | None:
        return metrics.registry.get_sample_value(f"specwise_tap_{name}", labels | more)

    assert sample("requests_total", outcome="ok") == 2
    assert sample("draft_tokens_total") == 24
    assert sample("accepted_tokens_total") == 16
    assert sample("verify_steps_total") == 8
    assert sample("acceptance_rate_bucket", le="0.65") == 0
    assert sample("acceptance_rate_bucket", le="0.7") == 2
    assert sample("ttft_seconds_count") == sample("tpot_seconds_count") == 2


# --- raw upstreams: what the scripted server cannot do --------------------------------------


@contextmanager
def raw_upstream(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """Each connection is handled in a thread, then closed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    threads: list[threading.Thread] = []

    def one(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(10)
            with suppress(ConnectionError, TimeoutError):
                handle(sock)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=one, args=(sock,))
            threads.append(thread)
            thread.start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join(5)
        for thread in threads:
            thread.join(10)


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(1 << 16)
        if not piece:
            raise ConnectionError
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def test_large_and_chunked_uploads_arrive_byte_for_byte() -> None:
    content = os.urandom(5 << 20)
    arrived: list[bytes] = []

    def upstream(sock: socket.socket) -> None:
        head, body = read_head(sock)
        if b"chunked" in head:
            while not body.endswith(b"0\r\n\r\n"):
                body += sock.recv(1 << 16)
            body = body_of(b"Transfer-Encoding: chunked\r\n\r\n" + body)
        else:
            while len(body) < len(content):
                body += sock.recv(1 << 16)
        arrived.append(body)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(content), 70_001):
            yield content[at : at + 70_001]

    with raw_upstream(upstream) as url, tapped(url) as tap:
        assert httpx.post(tap.url + PATHS[0], content=content).text == "ok"
        assert httpx.post(tap.url + PATHS[0], content=pieces()).text == "ok"
        records = tap.wait_records(2)
    assert arrived == [content, content]
    assert [r.bucket for r in records] == ["unread", "unread"]


def test_a_slow_client_holds_the_upstream_back_and_not_the_memory() -> None:
    sent = threading.Event()
    total = 64 << 20

    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        piece = b"x" * (1 << 20)
        for _ in range(total >> 20):
            sock.sendall(piece)
        sent.set()

    with raw_upstream(upstream) as url, tapped(url) as tap:
        sock = socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10)
        with sock:
            tracemalloc.start()
            sock.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not sent.wait(0.5)
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            received = 0
            while received < total:
                received += len(sock.recv(1 << 20))
        assert sent.wait(5)
    assert peak_bytes < 8 << 20


def test_large_headers_pass_and_boundless_ones_are_refused() -> None:
    def upstream(sock: socket.socket) -> None:
        head, _ = read_head(sock)
        sock.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (len(head), head)
        )

    with raw_upstream(upstream) as url, tapped(url) as tap:
        big = b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"v" * 200_000
        assert body_of(exchange(tap.url, big + b"\r\n\r\n")) == big
        answer = exchange(tap.url, b"GET / HTTP/1.1\r\nX-Big: " + b"v" * (2 << 20))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
        assert exchange(tap.url, b"no http at all\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        both = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc"
        assert exchange(tap.url, b"POST / HTTP/1.1\r\nHost: x\r\n" + both).startswith(
            b"HTTP/1.1 400 "
        )
        assert httpx.get(tap.url).status_code == 200


def test_a_malformed_request_on_a_kept_connection_is_refused_like_a_first() -> None:
    with (
        ScriptedServer(Script(fault="status", status=404)) as server,
        tapped(server.url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        sock.sendall(request(close=False))
        received = b""
        while not received.endswith(b"}"):
            received += sock.recv(1000)
        assert received.startswith(b"HTTP/1.1 404 ")
        sock.sendall(b"\x16\x03\x01 no http\r\n\r\n")
        received = b""
        while data := sock.recv(1000):
            received += data
    assert received.startswith(b"HTTP/1.1 400 ")


def test_head_no_content_and_pipelined_requests_keep_their_order() -> None:
    def upstream(sock: socket.socket) -> None:
        while True:
            head, _ = read_head(sock)
            method, path = head.split(b" ")[:2]
            if method == b"HEAD":
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
            elif path == b"/none":
                sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            else:
                time.sleep(0.01)
                sock.sendall(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n"
                    b"%x\r\n%b\r\n0\r\nX-End: yes\r\n\r\n" % (len(path), path)
                )

    def ask(method: bytes, path: bytes, more: bytes = b"") -> bytes:
        return b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (method, path, more)

    pipelined = ask(b"HEAD", b"/a") + ask(b"GET", b"/b") + ask(b"GET", b"/none")
    pipelined += ask(b"GET", b"/c") * 3
    with (
        raw_upstream(upstream) as url,
        tapped(url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        sock.sendall(pipelined)
        received = b""
        while received.count(b"X-End: yes\r\n\r\n") < 4:
            received += sock.recv(1 << 16)
    answers = [part.partition(b"\r\n\r\n") for part in received.split(b"HTTP/1.1 ")[1:]]
    assert [head[:3] for head, _, _ in answers] == [b"200", b"200", b"204", *[b"200"] * 3]
    bodies = [body for _, _, body in answers]
    assert bodies[0] == bodies[2] == b""
    assert bodies[1] == b"2\r\n/b\r\n0\r\nX-End: yes\r\n\r\n"
    assert bodies[3:] == [b"2\r\n/c\r\n0\r\nX-End: yes\r\n\r\n"] * 3


def test_an_upgraded_connection_is_passed_through() -> None:
    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n\r\nhello"
        )
        while data := sock.recv(100):
            sock.sendall(data[::-1])

    with (
        raw_upstream(upstream) as url,
        tapped(url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        sock.sendall(
            b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n\r\n"
        )
        received = b""
        while not received.endswith(b"hello"):
            received += sock.recv(1000)
        assert received.startswith(b"HTTP/1.1 101 ")
        sock.sendall(b"\x00abc")
        assert sock.recv(100) == b"cba\x00"


def test_the_upstream_is_connected_with_the_client_before_any_request() -> None:
    connected, gone = threading.Event(), threading.Event()

    def upstream(sock: socket.socket) -> None:
        connected.set()
        assert sock.recv(1) == b""
        gone.set()

    with raw_upstream(upstream) as url, tapped(url) as tap:
        with socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10):
            assert connected.wait(5)
            assert not gone.is_set()
        assert gone.wait(5)
    assert tap.records == []


def test_a_connection_on_which_nothing_was_asked_ends_when_the_upstream_ends_it() -> None:
    with (
        raw_upstream(lambda _: None) as url,
        tapped(url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        assert sock.recv(1) == b""


def test_an_upstream_that_came_after_the_client_is_tried_once_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        tapped(f"http://127.0.0.1:{port}") as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        sock.sendall(b"GET / HT")  # of which the head is not here when connecting fails
        wait_until(lambda: tap.tap.clients and tap.tasks() == 1)
        with socket.create_server(("127.0.0.1", port)) as listener:
            sock.sendall(b"TP/1.1\r\nHost: x\r\n\r\n")
            upstream, _ = listener.accept()
            with upstream:
                head, _ = read_head(upstream)
                upstream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                received = b""
                while not received.endswith(b"ok"):
                    received += sock.recv(1000)
    assert head.startswith(b"GET / HTTP/1.1\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_client_that_never_asks_is_let_go_and_one_that_asked_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specwise.monitoring.tap._IDLE_S", 0.2)
    with (
        ScriptedServer(Script(fault="status", status=404)) as server,
        tapped(server.url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as kept,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as silent,
    ):
        for _ in range(2):
            kept.sendall(request(close=False))
            received = b""
            while not received.endswith(b"}"):
                received += kept.recv(1000)
            assert received.startswith(b"HTTP/1.1 404 ")
            with suppress(ConnectionError):
                assert silent.recv(1) == b""


def test_an_idle_connection_that_the_upstream_closes_is_closed_for_the_client_too() -> None:
    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        time.sleep(0.05)

    with (
        raw_upstream(upstream) as url,
        tapped(url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while data := sock.recv(1000):
            received += data
    assert received.endswith(b"\r\n\r\nok")


def test_an_answer_before_the_upload_is_whole_reaches_the_client() -> None:
    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(
            b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"
        )
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass

    with (
        raw_upstream(upstream) as url,
        tapped(url) as tap,
        socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
    ):
        head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        sock.sendall(head.encode() + b"x" * 1000)
        received = b""
        while data := sock.recv(1000):
            received += data
        (record,) = tap.wait_records(1)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.endswith(b"big")
    assert (record.outcome, record.status) == (Outcome.HTTP_ERROR, 413)
    assert record.bucket == "unread"


def test_stopping_records_what_is_in_flight_as_cancelled() -> None:
    with ScriptedServer(Script(fault="stall")) as server:
        with (
            tapped(server.url) as tap,
            socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock,
        ):
            sock.sendall(request())
            received = b""
            while received.count(b"data: ") < 2:
                received += sock.recv(1 << 16)
            records = tap.records
        assert [(r.outcome, r.status) for r in records] == [(Outcome.CANCELLED, 200)]


def test_an_upstream_that_is_not_there_is_a_502_for_each() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tapped(f"http://127.0.0.1:{port}") as tap:
        answer = httpx.post(tap.url + PATHS[0], json={"model": "m", "temperature": 0})
        assert answer.status_code == 502
        assert answer.json()["error"]["type"] == "upstream_unreachable"
        (record,) = tap.wait_records(1)
    assert (record.outcome, record.status) == (Outcome.REFUSED, 502)


def test_a_client_that_leaves_ends_the_upstreams_work_too() -> None:
    gone = threading.Event()

    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        if sock.recv(1) == b"":
            gone.set()

    with raw_upstream(upstream) as url, tapped(url) as tap:
        with socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock:
            sock.sendall(request())
            sock.recv(1 << 16)
        assert gone.wait(5)
        (record,) = tap.wait_records(1)
    assert record.outcome is Outcome.CANCELLED


def test_streams_are_not_buffered() -> None:
    with ScriptedServer(Script(chunks=4, gap_s=0.25)) as server, tapped(server.url) as tap:
        body = {"model": "m", "stream": True}
        with httpx.stream("POST", tap.url + PATHS[0], json=body) as answer:
            times = [time.perf_counter() for piece in answer.iter_raw() if b"w" in piece]
        sent = server.served[0].chunk_sent_s
    assert len(times) >= 4
    assert all(at - sent_s < 0.2 for at, sent_s in zip(times, sent, strict=False))


def test_a_first_chunk_goes_before_the_chunks_of_running_streams() -> None:
    """They come while tap is busy; which client has its chunk first tells the order of writing."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b'13\r\ndata: {"more": 1}\n\n\r\n'
    upstreams: list[socket.socket] = []
    done, busy, free = threading.Event(), threading.Event(), threading.Event()

    def upstream(sock: socket.socket) -> None:
        read_head(sock)
        upstreams.append(sock)
        done.wait(10)

    def block() -> None:
        busy.set()
        free.wait(5)

    with raw_upstream(upstream) as url, tapped(url) as tap, ExitStack() as stack:
        stack.callback(done.set)
        poller = stack.enter_context(select.epoll())
        clients = []
        for i in range(9):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", tap.tap.port), 10))
            sock.sendall(request())
            wait_until(lambda i=i: len(upstreams) > i)
            clients.append(sock)
        for running, sock in zip(upstreams[:8], clients[:8], strict=True):
            running.sendall(head + chunk * 6)
            received = b""
            while received.count(chunk) < 6:
                piece = sock.recv(1 << 16)
                assert piece
                received += piece
        for sock in clients:
            poller.register(sock.fileno(), select.EPOLLIN)
        tap.loop.call_soon_threadsafe(block)
        assert busy.wait(5)
        for running in upstreams[:8]:
            running.sendall(chunk)
        upstreams[8].sendall(head + chunk)
        free.set()
        for sock in clients:
            sock.settimeout(10)
            assert sock.recv(1 << 16, socket.MSG_PEEK).endswith(chunk)
        order = [fd for fd, _ in poller.poll(5)]  # in the order in which they became ready
        assert len(order) == 9
        assert order[0] == clients[8].fileno()


def test_hundreds_of_dropped_connections_leave_nothing_behind() -> None:
    states = (b"", b"POST /v1/comp", request()[:-9], request(close=False), request() * 2)

    def drop(i: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(states[i % len(states)])
            if i % 3 == 0:
                linger = b"\x01\0\0\0\0\0\0\0"
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset

    with ScriptedServer(Script(gap_s=0.001, chunks=20)) as server, tapped(server.url) as tap:
        port = port_of(tap.url)
        gc.collect()
        descriptors = open_descriptors()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(drop, range(600)))
        wait_until(lambda: not tap.tap.clients)
        wait_until(lambda: open_descriptors() <= descriptors)
        assert tap.tasks() == 1  # the one that serves
        answer = httpx.post(tap.url + PATHS[0], json={"stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")


def test_dropped_connections_are_freed_without_a_garbage_collection() -> None:
    """Cycles would wait for the collector, which tap lets run seldom: memory would grow."""
    states = (b"", b"POST /v1/comp", request()[:-9], request(close=False))

    def left() -> list[object]:
        kinds = ("_Client", "_Upstream", "_Exchange", "Answer", "HttpResponseParser")
        return [held for held in gc.get_objects() if type(held).__name__ in kinds]

    with ScriptedServer(Script(gap_s=0.001, chunks=20)) as server, tapped(server.url) as tap:
        gc.collect()
        before = len(left())
        gc.disable()
        try:
            for i in range(200):
                with socket.create_connection(("127.0.0.1", tap.tap.port), timeout=10) as sock:
                    sock.sendall(states[i % 4])
                    time.sleep(0.0002 * (i % 7))
            httpx.post(tap.url + PATHS[0], json={})  # accepted after all of them
            wait_until(lambda: not tap.tap.clients)
            wait_until(lambda: len(left()) <= before)
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("upstream", "listen"),
    [
        ("127.0.0.1:8000", "9000"),
        ("http://127.0.0.1:8000/v1", "9000"),
        ("http://u:p@127.0.0.1:8000", "9000"),
        ("http://127.0.0.1:8000", "here"),
        ("http://127.0.0.1:8000", "127.0.0.1:99999"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(upstream: str, listen: str) -> None:
    with pytest.raises(InputError):
        tap_settings(upstream, listen)
