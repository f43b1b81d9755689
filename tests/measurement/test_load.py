from __future__ import annotations

import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from tests.scripted_server import (
    Script,
    ScriptedServer,
    Served,
    events,
    scripted_server_process,
    throwaway_certificate,
)

from specwise.domain import AcceptanceSource, Api, ClientHealth, Outcome, RequestRecord
from specwise.errors import InputError
from specwise.measurement.arrivals import intended_times
from specwise.measurement.connection import Connection
from specwise.measurement.load import (
    LoadRun,
    PlannedRequest,
    Target,
    client_limits,
    percentile,
    run_load,
)
from specwise.vllm.response import endpoint, request_body

KEY = "sk-very-secret-0123456789"
PROMPT = "Once upon a time there was a rather secret prompt that nobody may read"
TEXT = " w0é w1 w2 w3é w4"


def plan(
    count: int,
    *,
    times: tuple[float, ...] | None = None,
    api: Api = Api.CHAT,
    prompt: str = PROMPT,
) -> list[PlannedRequest]:
    body = request_body(api, model="m", prompt=prompt, max_tokens=5, temperature=0.0)
    return [
        PlannedRequest(i, f"p{i}", "prose", 0.0, endpoint(api), body, times[i] if times else None)
        for i in range(count)
    ]


def load(
    url: str,
    requests: list[PlannedRequest],
    *,
    concurrency: int | None = 1,
    on_record: Callable[[RequestRecord], None] = lambda _record: None,
    keep_text: bool = False,
    stop: Callable[[], bool] = lambda: False,
    **target: Any,
) -> tuple[LoadRun, list[RequestRecord]]:
    records: list[RequestRecord] = []

    def keep(record: RequestRecord) -> None:
        records.append(record)
        on_record(record)

    target = {"timeout_s": 10.0} | target
    run = run_load(
        requests,
        target=Target(url, "m", **target),
        concurrency=concurrency,
        part=3,
        on_record=keep,
        keep_text=keep_text,
        stop=stop,
    )
    assert run.finished == len(records)
    return run, records


# --- what a record holds ------------------------------------------------------------------------


@pytest.mark.parametrize("api", list(Api))
def test_a_record_holds_what_happened(api: Api) -> None:
    script = Script(first_s=0.02, gap_s=0.01, cached_tokens=4, finish_reason="stop")
    with ScriptedServer(script) as server:
        run, (record,) = load(server.url, plan(1, api=api), headers={"X-Team": "blue"})
        (served,) = server.served
    assert record.outcome is Outcome.OK
    assert (record.index, record.prompt_id, record.segment, record.part) == (0, "p0", "prose", 3)
    assert (record.status, record.error, record.finish_reason) == (200, None, "stop")
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 5, 4)
    assert record.chunk_tokens == (1,) * 5
    assert 0 <= record.intended_s <= record.sent_s < record.chunk_s[0]
    assert list(record.chunk_s) == sorted(record.chunk_s)
    assert record.chunk_s[-1] <= record.finished_s <= run.duration_s
    assert record.output_text is None
    assert len(record.output_sha256 or "") == 64
    assert served.path == endpoint(api)
    assert served.headers["x-team"] == "blue"
    assert served.headers["accept-encoding"] == "identity"
    assert served.body["stream_options"]["include_usage"] is True


def test_text_is_kept_only_when_asked_for() -> None:
    with ScriptedServer() as server:
        _, (record,) = load(server.url, plan(1), keep_text=True)
    assert record.output_text == TEXT


def test_chunks_estimate_acceptance_when_the_target_speculates() -> None:
    with ScriptedServer(Script(tokens_per_chunk=4)) as server:
        _, (record,) = load(server.url, plan(1), speculative=True)
        _, (plain,) = load(server.url, plan(1))
    assert record.acceptance is not None
    assert record.acceptance.source is AcceptanceSource.CHUNKS
    assert record.acceptance.steps_by_accepted == (0, 0, 0, 3)
    assert plain.acceptance is None


def test_a_base_path_goes_in_front() -> None:
    with ScriptedServer() as server:
        load(server.url + "/tenant/a/", plan(1))
        assert server.served[0].path == "/tenant/a/v1/chat/completions"


# --- timing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_chunk", [1, 4])
def test_ttft_and_tpot_agree_with_the_servers_log(tokens_per_chunk: int) -> None:
    script = Script(first_s=0.05, gap_s=0.01, chunks=20, tokens_per_chunk=tokens_per_chunk)
    times = intended_times("poisson", 40.0, 100, np.random.default_rng(1))
    for _ in range(6):
        with scripted_server_process(script) as server:
            run, records = load(server.url, plan(100, times=times), concurrency=None)
            log = server.log()
        if not run.client_limited:  # otherwise, as it says itself, the run measured this machine
            break
    assert {r.outcome for r in records} == {Outcome.OK}
    start_s = matching_start(records, log)
    tokens = script.chunks * tokens_per_chunk
    ttft, tpot = [], []
    log.sort(key=lambda served: served.received_s)
    for record, served in zip(sorted(records, key=lambda r: r.sent_s), log, strict=True):
        assert record.first_token_s is not None
        true_first_s = served.chunk_sent_s[0] - start_s
        ttft.append(abs(record.first_token_s - true_first_s))
        true_tpot_s = (served.chunk_sent_s[-1] - served.chunk_sent_s[0]) / (tokens - 1)
        tpot.append(abs((record.chunk_s[-1] - record.first_token_s) / (tokens - 1) - true_tpot_s))
        assert record.output_tokens == tokens
    assert run.duration_s > times[-1]
    for errors in (ttft, tpot):
        assert median(errors) < 0.002
        assert percentile(errors, 0.99) < 0.005


def matching_start(records: list[RequestRecord], log: list[Served]) -> float:
    """The run's time 0 on the machine's clock: no request is received before it is sent."""
    sent = sorted(r.sent_s for r in records)
    received = sorted(served.received_s for served in log)
    return min(r - s for r, s in zip(received, sent, strict=True))


def test_an_open_loop_sends_on_time_however_slow_the_server_is() -> None:
    times = tuple(i * 0.01 for i in range(30))
    with ScriptedServer(Script(first_s=0.5)) as server:
        _, records = load(server.url, plan(30, times=times), concurrency=None)
    records.sort(key=lambda r: r.index)
    assert [r.intended_s for r in records] == pytest.approx(times)
    assert median(r.sent_s - r.intended_s for r in records) < 0.005
    assert all(r.sent_s >= r.intended_s for r in records)
    assert all(r.sent_s < 0.45 for r in records)


def test_a_closed_loop_holds_its_concurrency_and_its_connections() -> None:
    with ScriptedServer(Script(first_s=0.02)) as server:
        _, records = load(server.url, plan(20), concurrency=4)
        assert server.connections == 4
    events = sorted([(r.sent_s, 1) for r in records] + [(r.finished_s, -1) for r in records])
    in_flight = np.cumsum([step for _, step in events])
    assert in_flight.max() == 4
    sent = [r.index for r in sorted(records, key=lambda r: r.sent_s)]
    assert sorted(sent[:4]) == [0, 1, 2, 3]
    assert all(0 <= r.sent_s - r.intended_s < 0.1 for r in records)


def test_records_come_while_the_run_goes_on() -> None:
    with ScriptedServer() as server:
        served_at_record: list[int] = []
        load(
            server.url,
            plan(10),
            on_record=lambda _record: served_at_record.append(len(server.served)),
        )
    assert served_at_record[0] < 10


def test_several_hundred_at_once() -> None:
    with ScriptedServer(Script(first_s=0.3)) as server:
        _, records = load(server.url, plan(300, times=(0.0,) * 300), concurrency=None)
    assert {r.outcome for r in records} == {Outcome.OK}


def test_a_low_limit_on_open_files_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with scripted_server_process(Script(first_s=0.3)) as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        try:
            _, records = load(server.url, plan(200, times=(0.0,) * 200), concurrency=None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {r.outcome for r in records} == {Outcome.OK}


# --- bodies of every kind -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        Script(framing="length"),
        Script(framing="close"),
        Script(keep_alive=False),
        Script(close_after=True),
        Script(interim=True),
        Script(encoding="gzip"),
        Script(encoding="deflate"),
        Script(encoding="gzip", framing="length"),
        Script(encoding="gzip", framing="close", cuts=True),
        Script(cuts=True),
        Script(cuts=True, line_end="\r\n", comments=True),
        Script(cuts=True, framing="close"),
        Script(slow_s=1e-5),
    ],
    ids=lambda script: "-".join(str(v) for k, v in vars(script).items() if v != vars(Script())[k]),
)
def test_every_way_to_send_a_body_gives_the_same_record(script: Script) -> None:
    with ScriptedServer(script) as server:
        _, records = load(server.url, plan(2), keep_text=True)
        connections = server.connections
    assert [r.outcome for r in records] == [Outcome.OK] * 2, records[0].error
    assert [r.output_text for r in records] == [TEXT] * 2
    assert [r.chunk_tokens for r in records] == [(1,) * 5] * 2
    kept = script.framing != "close" and script.keep_alive and not script.close_after
    assert connections == (1 if kept else 2)


def test_an_encoding_that_was_not_asked_for_and_is_unknown_is_an_error() -> None:
    with ScriptedServer(Script(encoding="br")) as server:
        _, (record,) = load(server.url, plan(1))
    assert record.outcome is Outcome.STREAM_ERROR
    assert "'br'" in (record.error or "")


def test_a_large_prompt_arrives() -> None:
    with ScriptedServer() as server:
        _, (record,) = load(server.url, plan(1, prompt="x" * 3_000_000))
        assert len(server.served[0].body["messages"][0]["content"]) == 3_000_000
    assert record.outcome is Outcome.OK


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "outcome", "status", "error", "chunks"),
    [
        (Script(fault="status", status=429), Outcome.HTTP_ERROR, 429, "HTTP 429: made to fail", 0),
        (Script(fault="status", status=500), Outcome.HTTP_ERROR, 500, "HTTP 500: made to", 0),
        (
            Script(fault="redirect"),
            Outcome.HTTP_ERROR,
            307,
            "redirect to http://elsewhere.example/v1/x not followed: give the final address",
            0,
        ),
        (Script(fault="hang"), Outcome.TIMEOUT, None, "nothing came within 0.4 s", 0),
        (Script(fault="stall"), Outcome.TIMEOUT, 200, "not complete within 0.4 s", 2),
        (Script(slow_s=0.1), Outcome.TIMEOUT, None, "nothing came within 0.4 s", 0),
        (Script(fault="cut"), Outcome.CUT, 200, "before the answer was complete", 2),
        (Script(fault="cut", framing="length"), Outcome.CUT, 200, "was complete", 2),
        (Script(fault="cut", framing="close"), Outcome.CUT, 200, "stream was complete", 2),
        (Script(fault="reset"), Outcome.CUT, 200, "before the answer was complete", None),
        (Script(fault="silent-close"), Outcome.CUT, None, "before any answer", 0),
        (Script(fault="malformed"), Outcome.STREAM_ERROR, 200, "is not JSON", 4),
        (
            Script(fault="error-event"),
            Outcome.STREAM_ERROR,
            200,
            "the server reported an error in the stream: made to fail",
            4,
        ),
        (Script(fault="garbage"), Outcome.STREAM_ERROR, None, "not valid HTTP/1.1", 0),
        (Script(fault="upgrade"), Outcome.STREAM_ERROR, None, "another protocol", 0),
        (
            Script(fault="not-a-stream"),
            Outcome.STREAM_ERROR,
            200,
            "(application/json) is not a stream",
            0,
        ),
        (Script(fault="no-done"), Outcome.STREAM_ERROR, 200, "without a finish reason", 5),
    ],
    ids=lambda value: f"{value.fault}-{value.framing}" if isinstance(value, Script) else "",
)
def test_each_fault_is_recorded_as_what_it_is(
    script: Script, outcome: Outcome, status: int | None, error: str, chunks: int | None
) -> None:
    with ScriptedServer(lambda i, _body: script if i == 1 else Script()) as server:
        _, records = load(server.url, plan(3), timeout_s=0.4)
        assert len(server.served) == 3  # nothing is sent twice
    assert [r.outcome for r in records] == [Outcome.OK, outcome, Outcome.OK], records[1].error
    record = records[1]
    assert record.status == status
    assert error in (record.error or "")
    assert chunks is None or len(record.chunk_s) == chunks
    assert record.finished_s >= record.sent_s
    if outcome is Outcome.TIMEOUT:
        assert record.finished_s - record.sent_s == pytest.approx(0.4, abs=0.1)


def test_nobody_listening_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _, records = load(f"http://127.0.0.1:{port}", plan(2))
    assert [r.outcome for r in records] == [Outcome.REFUSED] * 2
    assert "refused" in (records[0].error or "").lower()
    assert records[0].chunk_s == ()
    assert records[0].finished_s >= records[0].intended_s


def test_a_server_that_was_away_is_used_again() -> None:
    with ScriptedServer() as server:
        port = server.port
    servers: list[ScriptedServer] = []

    def start(record: RequestRecord) -> None:
        if record.index == 1:
            servers.append(ScriptedServer(port=port).__enter__())

    times = (0.0, 0.02, 0.5)
    _, records = load(
        f"http://127.0.0.1:{port}", plan(3, times=times), concurrency=None, on_record=start
    )
    servers[0].__exit__()
    assert [r.outcome for r in records] == [Outcome.REFUSED, Outcome.REFUSED, Outcome.OK]


def test_a_stream_that_breaks_and_goes_silent_is_noticed_before_its_timeout() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    done = threading.Event()

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)
            for data in (answer, b"3\r\n:\n\n\r\n", b"no chunk\r\n"):
                sock.sendall(data)
                time.sleep(0.02)
            done.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        run, (record,) = load(f"http://127.0.0.1:{listener.getsockname()[1]}", plan(1))
        done.set()
        server.join(10)
    assert record.outcome is Outcome.STREAM_ERROR
    assert record.error == "the answer is not valid HTTP/1.1"
    assert record.finished_s < run.duration_s < 5.0


# --- kept-alive connections ---------------------------------------------------------------------


def test_a_connection_closed_in_the_instant_of_reuse_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: set[Connection] = set()
    idle = threading.Semaphore(0)

    def reusable(connection: Connection, _now_s: float) -> bool:
        # The server closes while the event loop does not look; the client believes in it still.
        if connection._served and connection not in answered:
            answered.add(connection)
            idle.release()
            poller = select.poll()
            poller.register(connection._socket.fileno(), select.POLLRDHUP)
            assert poller.poll(10_000)
        return True

    monkeypatch.setattr(Connection, "reusable", reusable)
    answer = b"".join(data for _, data in events(Script(), endpoint(Api.CHAT)))
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer)
    arrived = 0

    def serve(listener: socket.socket) -> None:
        nonlocal arrived
        for _ in range(3):
            sock, _ = listener.accept()
            with sock:
                assert sock.recv(1 << 16).endswith(b"}")
                arrived += 1
                sock.sendall(head + answer)
                assert idle.acquire(timeout=10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        _, records = load(f"http://127.0.0.1:{listener.getsockname()[1]}", plan(3))
        idle.release()
        server.join(10)
    assert [r.outcome for r in records] == [Outcome.OK] * 3
    assert arrived == 3  # each request once


def test_a_request_that_reached_the_server_is_never_sent_again() -> None:
    answers = [Script(), Script(fault="silent-close"), Script()]
    with ScriptedServer(lambda i, _body: answers[i]) as server:
        _, records = load(server.url, plan(3))
        assert len(server.served) == 3
        assert server.served[1].connection == server.served[0].connection
    assert [r.outcome for r in records] == [Outcome.OK, Outcome.CUT, Outcome.OK]


# --- TLS ----------------------------------------------------------------------------------------


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, context = throwaway_certificate(tmp_path)
    with ScriptedServer(Script(cuts=True), tls=context) as server:
        _, unverified = load(server.url, plan(2))
        _, unchecked = load(server.url, plan(2), verify_tls=False, keep_text=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        _, trusted = load(server.url, plan(2), keep_text=True)
    assert [r.outcome for r in unverified] == [Outcome.REFUSED] * 2
    assert "certificate" in (unverified[0].error or "")
    for records in (unchecked, trusted):
        assert [r.output_text for r in records] == [TEXT] * 2


# --- ends ---------------------------------------------------------------------------------------


def first_only(i: int, _body: dict[str, Any]) -> Script:
    return Script(first_s=0.0 if i == 0 else 60.0)


@pytest.mark.parametrize("concurrency", [2, None])
def test_stop_records_what_was_in_flight_as_cancelled(concurrency: int | None) -> None:
    begun_s = time.perf_counter()
    ended: list[RequestRecord] = []
    with ScriptedServer(first_only) as server:
        run, records = load(
            server.url,
            plan(6, times=(0.0, 0.05, 0.1, 90.0, 90.0, 90.0)),
            concurrency=concurrency,
            on_record=ended.append,
            stop=lambda: bool(ended) and len(server.served) == 3,
            timeout_s=60.0,
        )
    assert run.stopped
    assert sorted(r.outcome for r in records) == ["cancelled", "cancelled", "ok"]
    assert {r.index for r in records} == {0, 1, 2}
    assert time.perf_counter() - begun_s < 30


def test_ctrl_c_ends_the_run_as_stop_does() -> None:
    def press(record: RequestRecord) -> None:
        if record.outcome is Outcome.OK:
            os.kill(os.getpid(), signal.SIGINT)

    with ScriptedServer(first_only) as server:
        run, records = load(server.url, plan(5), concurrency=2, on_record=press, timeout_s=60.0)
    assert run.stopped
    assert sorted(r.outcome for r in records) == ["cancelled", "cancelled", "ok"]


@pytest.mark.parametrize("concurrency", [2, None])
def test_what_on_record_raises_ends_the_run(concurrency: int | None) -> None:
    class DiskFullError(Exception):
        pass

    def full(record: RequestRecord) -> None:
        raise DiskFullError(record.index)

    slow = Script(first_s=60.0)
    with ScriptedServer(lambda i, _body: Script() if i == 0 else slow) as server:
        begun_s = time.perf_counter()
        with pytest.raises(DiskFullError):
            load(
                server.url,
                plan(4, times=(0.0, 0.0, 0.0, 90.0)),
                concurrency=concurrency,
                on_record=full,
                timeout_s=60.0,
            )
    assert time.perf_counter() - begun_s < 30


# --- the client watches itself ------------------------------------------------------------------


def test_a_client_that_is_held_up_says_so() -> None:
    times = tuple(i * 0.02 for i in range(40))
    with ScriptedServer(Script(first_s=0.03, gap_s=0.002)) as server:
        run, _ = load(
            server.url,
            plan(40, times=times),
            concurrency=None,
            on_record=lambda _record: time.sleep(0.03),
        )
    assert run.client_limited
    assert run.client.loop_lag_s_p99 > 0.02
    assert run.client.lateness_s_p99 > 0.01
    assert any("timer" in limit for limit in run.limits)
    assert any("after their time" in limit for limit in run.limits)


def test_a_client_that_is_held_up_keeps_the_times_of_what_arrived() -> None:
    times = tuple(i * 0.02 for i in range(40))
    with scripted_server_process(Script(first_s=0.06, gap_s=0.04, chunks=3)) as server:
        run, records = load(
            server.url,
            plan(40, times=times),
            concurrency=None,
            on_record=lambda _record: time.sleep(0.015),
        )
        log = server.log()
    assert run.client.loop_lag_s_p99 > 0.01
    start_s = matching_start(records, log)
    true_s = sorted(at_s - start_s for served in log for at_s in served.chunk_sent_s)
    seen_s = sorted(at_s for record in records for at_s in record.chunk_s)
    errors_s = [abs(true - seen) for true, seen in zip(true_s, seen_s, strict=True)]
    assert percentile(errors_s, 0.9) < 0.005


def test_a_client_that_uses_up_its_core_says_so() -> None:
    def burn(_record: RequestRecord) -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass

    with ScriptedServer() as server:
        run, _ = load(server.url, plan(40), concurrency=8, on_record=burn)
    assert run.client_limited
    assert run.client.cpu_share > 0.3


def test_the_rule_of_client_limits() -> None:
    def limits(lateness: float, lag: float, share: float, ttft: float | None, open_loop: bool):
        health = ClientHealth(0.0, lateness, lag, share)
        return client_limits(health, ttft, open_loop=open_loop)

    assert limits(0.004, 0.004, 0.8, 0.05, True) == ()
    assert limits(0.009, 0.009, 0.8, 0.2, True) == ()  # 5 % of 200 ms
    assert len(limits(0.011, 0.011, 0.9, 0.2, True)) == 3
    assert len(limits(0.011, 0.0, 0.0, None, True)) == 1
    assert limits(0.9, 0.0, 0.0, 0.05, False) == ()  # a closed loop has no schedule


# --- secrets and bad input ----------------------------------------------------------------------


def test_neither_key_nor_prompt_shows_anywhere() -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    script = Script(
        fault="status",
        status=401,
        message=f"no entry with\n{KEY}; 1 validation error: input: {PROMPT!r} is what you sent",
    )
    with ScriptedServer(script) as server:
        _, (record,) = load(server.url, plan(1), headers=headers)
        assert server.served[0].headers["authorization"] == f"Bearer {KEY}"
    shown = repr(record) + repr(Target(server.url, "m", headers=headers)) + repr(plan(1))
    assert KEY not in shown
    assert "rather secret" not in shown
    assert record.error == (
        "HTTP 401: no entry with [redacted]; 1 validation error: input: "
        "'[request text]' is what you sent"
    )


@pytest.mark.parametrize(
    ("url", "options", "complaint"),
    [
        ("127.0.0.1:8000", {}, "not one of the form"),
        ("ftp://127.0.0.1", {}, "not one of the form"),
        ("http://127.0.0.1:99999", {}, "not one of the form"),
        ("http://me:pa55@127.0.0.1", {}, "carries a user name"),
        ("http://127.0.0.1", {"headers": {"Authorization": "Bearer a\nb"}}, "line break"),
        ("http://127.0.0.1", {"headers": {"a b": "c"}}, "cannot be the name"),
        ("http://127.0.0.1", {"timeout_s": 0.0}, "timeout of 0.0"),
        ("http://127.0.0.1", {"concurrency": 0}, "concurrency of 0"),
        ("http://127.0.0.1", {"concurrency": None}, "send time for every request"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused(
    url: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        load(url, plan(1), **options)
    assert caught.value.next_step
    assert "pa55" not in str(caught.value)
    assert "Bearer" not in str(caught.value)


def test_an_empty_plan_is_an_empty_run() -> None:
    run, records = load("http://127.0.0.1:1", [])
    assert records == []
    assert not run.stopped


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99.0
