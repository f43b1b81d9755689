"""The scrape loop over real sockets."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.monitoring.test_alerts import EXPECTED

from specwise.cli.main import main
from specwise.errors import InputError, StoreError
from specwise.monitoring.exporter import Exporter, serving
from specwise.monitoring.standing import Health
from specwise.monitoring.watch import (
    Watch,
    check_url,
    load_memories,
    read_targets,
    save_memories,
)
from specwise.monitoring.windows import State


class Replica(http.server.ThreadingHTTPServer):
    """Answers /metrics with counters that grow by a minute's traffic at each look."""

    daemon_threads = True

    def __init__(self, rate: float, port: int = 0, key: str = "") -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.rate, self.looks, self.key = rate, 0, key
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Replica

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.looks += 1
        drafted = 48_200 * self.server.looks
        labels = '{engine="0",model_name="m"}'
        body = (
            f"vllm:spec_decode_num_drafts_total{labels} {drafted / 4}\n"
            f"vllm:spec_decode_num_draft_tokens_total{labels} {drafted}\n"
            f"vllm:spec_decode_num_accepted_tokens_total{labels} {drafted * self.server.rate}\n"
            f"vllm:prefix_cache_queries_total{labels} 1\n"
            f"vllm:num_requests_running{labels} 3\n"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def replica(rate: float, *, port: int = 0, key: str = "") -> Iterator[Replica]:
    server = Replica(rate, port, key)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_replicas_are_judged_one_by_one_and_may_come_and_go() -> None:
    with replica(0.76) as good, replica(0.3) as bad, Watch(EXPECTED) as watch:
        watch.round([good.url])
        found = watch.round([good.url, bad.url])
        assert [s.window.state for s in found] == [State.OK, State.FIRST]
        found = watch.round([bad.url, good.url])
        assert [s.health for s in found] == [Health.UNHEALTHY, Health.HEALTHY]
        assert [s.rate for s in found] == [pytest.approx(0.3), pytest.approx(0.76)]
        assert len(watch.round([good.url])) == 1


def test_a_replica_that_is_down_spoils_nothing_and_is_picked_up_again() -> None:
    with Watch(EXPECTED, timeout_s=1.0) as watch:
        with replica(0.76) as server:
            port, url = server.server_port, server.url
            for _ in range(2):
                watch.round([url])
        (down,) = watch.round([url])
        assert down.window.state is State.UNREACHABLE
        assert "Cannot reach" in down.observations[0].text
        with replica(0.76, port=port):
            states = [watch.round([url])[0].window.state for _ in range(2)]
        assert states == [State.RESTARTED, State.OK]


def test_a_key_that_is_refused_is_said_and_never_shown() -> None:
    with replica(0.76, key="right") as server:
        with Watch(None, headers={"Authorization": "Bearer wrong-key"}) as watch:
            (refused,) = watch.round([server.url])
        assert "refuses access" in refused.observations[0].text
        assert "wrong-key" not in repr(refused)
        with Watch(None, headers={"Authorization": "Bearer right"}) as watch:
            assert watch.round([server.url])[0].window.state is State.FIRST


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with replica(0.6) as server, Watch(EXPECTED) as watch:
        for _ in range(3):
            watch.round([server.url])
        save_memories(state, watch.memories())
        assert load_memories(state) == watch.memories()
        with Watch(EXPECTED, memories=load_memories(state)) as later:
            assert later.round([server.url])[0].window.state is State.OK


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 9, "replicas": []}', "{"])
def test_a_state_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(StoreError, match=r"(?s)state of `specwise watch`|schema.*--state"):
        load_memories(tmp_path / "s")


def test_targets_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "targets"
    path.write_text("# replicas\nhttp://a:8000/v1\n\nhttps://b/metrics  # canary\n")
    assert read_targets(path) == ("http://a:8000", "https://b")
    with pytest.raises(InputError, match="cannot be read"):
        read_targets(tmp_path / "none")


@pytest.mark.parametrize("wrong", ["a:8000", "ftp://a", "http://", "http://a:port", "localhost"])
def test_what_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="http://host:port"):
        check_url(wrong)


def test_the_exporter_says_what_was_found() -> None:
    exporter = Exporter()
    with (
        replica(0.3) as server,
        Watch(EXPECTED) as watch,
        serving(exporter, host="127.0.0.1", port=0) as port,
    ):
        for _ in range(2):
            exporter.show(watch.round([server.url, "http://127.0.0.1:9"]))
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        with (
            pytest.raises(InputError, match="cannot listen"),
            serving(exporter, host="127.0.0.1", port=port),
        ):
            pass
    samples = {
        frozenset({s.name.removeprefix("specwise_watch_"), *s.labels.values()}): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples[frozenset({"acceptance_rate", server.url})] == pytest.approx(0.3)
    assert samples[frozenset({"verdict_stands", server.url})] == 0
    assert samples[frozenset({"health", server.url, "unhealthy"})] == 1
    assert samples[frozenset({"health", server.url, "healthy"})] == 0
    assert samples[frozenset({"observation", "acceptance-low", "critical", server.url})] == 1
    assert samples[frozenset({"reachable", "http://127.0.0.1:9"})] == 0
    assert frozenset({"acceptance_rate", "http://127.0.0.1:9"}) not in samples


COMMAND = [sys.executable, "-m", "specwise.cli.main", "watch"]


def once(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as left:
            main(["watch", "--once", *arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(left.value.code, int)
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_once_tells_cron_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with replica(0.76) as good, replica(0.3) as bad:
        code, said, errors = once(capsys, good.url, "--every", "0.2", "--json")
        assert code == 0, errors
        (found,) = json.loads(said)["replicas"]
        assert (found["health"], found["window"]["state"]) == ("healthy", "ok")
        assert found["acceptance_rate"] == pytest.approx(0.76)
        assert found["window"]["kv_use"] is None
        wrong = subprocess.run(
            [*COMMAND, good.url, bad.url, "--once", "--every", "0.2"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert wrong.returncode == 1
        assert "unhealthy" in wrong.stdout
        state = str(tmp_path / "state.json")
        first = once(capsys, good.url, "--every", "0.2", "--state", state, "--json")
        again = once(capsys, good.url, "--every", "60", "--state", state, "--json")
        assert [first[0], again[0]] == [0, 0]  # the second did not wait
    assert once(capsys, good.url, "--every", "0.1")[0] == 3


def test_it_follows_a_file_of_targets_until_it_is_stopped(tmp_path: Path) -> None:
    targets = tmp_path / "targets"
    with replica(0.76) as one, replica(0.75) as two:
        targets.write_text(one.url)
        process = subprocess.Popen(
            [*COMMAND, "--targets", str(targets), "--every", "0.1", "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert len(json.loads(process.stdout.readline())["replicas"]) == 1
            targets.write_text(f"{one.url}\n{two.url}\n")
            deadline = time.monotonic() + 20
            while len(json.loads(process.stdout.readline())["replicas"]) != 2:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give the address"),
        (("localhost:8000",), "not a server's address"),
        (("http://a", "--targets", "none"), "cannot be read"),
        (("http://a", "--exporter", "x:y"), "not [HOST:]PORT"),
        (("http://a", "--api-key-env", "NOT_SET_HERE"), "NOT_SET_HERE is not set"),
        (("http://a", "--against", "none"), "not a study folder"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = once(capsys, *arguments, "--every", "0.1")
    assert code in (2, 3)
    assert message in errors
    assert "Traceback" not in errors
