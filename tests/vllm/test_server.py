from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specwise.domain import Deployment, Speculation
from specwise.errors import EngineError, InputError, ServerError
from specwise.vllm.server import (
    Server,
    failure_reason,
    free_port,
    installed_version,
    launch_command,
    probe,
    startable_config,
)

BASELINE = Deployment(model="/models/target", engine="/opt/vllm/bin/python", served_name="t")
DRAFT = Speculation("draft_model", k=3, draft="/models/draft")


def test_the_baseline_command() -> None:
    assert launch_command(BASELINE, None, port=8001, python="py", version="0.32.0") == [
        *("py", "-m", "vllm.entrypoints.openai.api_server", "--model", "/models/target"),
        *("--served-model-name", "t", "--host", "127.0.0.1", "--port", "8001"),
        "--enable-prompt-tokens-details",
    ]


def test_a_speculating_command_asks_for_per_request_metrics() -> None:
    command = launch_command(BASELINE, DRAFT, port=1, version="0.32.0+cpu")
    config = json.loads(command[command.index("--speculative-config") + 1])
    assert config == {
        "method": "draft_model",
        "model": "/models/draft",
        "num_speculative_tokens": 3,
    }
    assert command[-2:] == ["--per-request-spec-decode-metrics", "summary"]


@pytest.mark.parametrize("version", ["0.28.2", None])
def test_versions_without_per_request_metrics_are_not_asked(version: str | None) -> None:
    command = launch_command(BASELINE, DRAFT, port=1, version=version)
    assert "--per-request-spec-decode-metrics" not in command


def test_the_users_own_choice_of_an_option_stands() -> None:
    arguments = ("--per-request-spec-decode-metrics", "detailed", "--no-enforce-eager")
    deployment = Deployment(model="m", arguments=arguments)
    command = launch_command(deployment, DRAFT, port=1, version="0.32.0")
    assert command.count("--per-request-spec-decode-metrics") == 1
    assert "--enforce-eager" not in command


def test_the_embedded_engine_does_not_compile_unless_asked() -> None:
    assert "--enforce-eager" in launch_command(Deployment(model="m"), None, port=1)


@pytest.mark.parametrize("argument", ["--port=9", "--speculative-config", "--model"])
def test_arguments_that_contradict_specwises_own_are_refused(argument: str) -> None:
    deployment = Deployment(model="m", arguments=(argument,))
    with pytest.raises(InputError, match="which specwise sets itself"):
        launch_command(deployment, None, port=1)


def test_schedule_and_options_become_fields_of_the_config() -> None:
    speculation = Speculation(
        "ngram", k=4, schedule=((1, 2, 4), (3, 64, 0)), options={"prompt_lookup_max": 5}
    )
    assert startable_config(speculation) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 64, 0]],
        "prompt_lookup_max": 5,
    }


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((2, 8, 3),), "starts at batch size 2, not at 1"),
        (((1, 4, 3), (4, 8, 1)), "batch size 4 is in two rows"),
        (((1, 4, 3), (6, 8, 1)), "batch sizes 5 to 5 are in no row"),
        (((1, 2, 3), (3, 2, 1)), "ends before it starts"),
        (((1, 4, 5),), "more than the arm's k = 4"),
        (((1, 4, -1),), "negative k"),
    ],
)
def test_a_schedule_that_would_kill_the_server_later_is_refused_now(
    schedule: tuple[tuple[int, int, int], ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        startable_config(Speculation("ngram", k=4, schedule=schedule))


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        (Speculation("draft_model", k=3), "needs a draft model"),
        (Speculation("ngram", k=0), "draft length k is 0"),
        (Speculation("ngram", k=2, options={"method": "x"}), "options repeat method"),
    ],
)
def test_a_speculation_that_cannot_work_is_refused(speculation: Speculation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        startable_config(speculation)


def test_a_model_folder_that_does_not_exist(tmp_path: Path) -> None:
    deployment = Deployment(model=str(tmp_path / "nothing"), engine=sys.executable)
    with pytest.raises(InputError, match=r"nothing does not exist"):
        Server.start(deployment, log_path=tmp_path / "log")


def test_an_engine_that_is_no_python() -> None:
    with pytest.raises(EngineError, match="does not run"):
        installed_version("/nowhere/python")


def test_a_python_without_vllm(tmp_path: Path) -> None:
    assert installed_version(sys.executable) is None
    deployment = Deployment(model="m", engine=sys.executable)
    with pytest.raises(EngineError, match="has no vLLM"):
        Server.start(deployment, log_path=tmp_path / "log")


# --- why a server died -------------------------------------------------------------------------

ENGINE_CORE = """\
(APIServer pid=1) INFO 11-22 19:00:00 [entry.py:100] starting
(EngineCore pid=2) ERROR 11-22 19:00:01 [core.py:1200] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 19:00:01 [core.py:1200] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 19:00:01 [core.py:1200]   File "core.py", line 5, in run
(EngineCore pid=2) ERROR 11-22 19:00:01 [core.py:1200]     raise ValueError("too long")
(EngineCore pid=2) ERROR 11-22 19:00:01 [core.py:1200] ValueError: the context is too long
(EngineCore pid=2) Process EngineCore:
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "entry.py", line 1, in <module>
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
PYDANTIC = """\
(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for Config
(APIServer pid=1)   Value error, lookup min is above max [type=value_error]
(APIServer pid=1)     For further information visit somewhere
(APIServer pid=1) another line
"""
PYDANTIC_FIELD = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for Config
method
  Input should be 'ngram' or 'medusa' [type=literal_error, input_value='nosuch']
    For further information visit somewhere
"""


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (ENGINE_CORE, 1, "ValueError: the context is too long"),
        (
            "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --nonsense\n",
            2,
            "unrecognized arguments: --nonsense",
        ),
        (
            PYDANTIC,
            1,
            "ValidationError: 1 validation error for Config Value error, lookup min is above max",
        ),
        (PYDANTIC_FIELD, 1, "error for Config method Input should be 'ngram' or 'medusa'"),
        (
            "loading weights\n",
            -9,
            "which the system does when memory runs out. Its last line: loading weights",
        ),
        ("loading weights\n", -11, "it was ended by SIGSEGV. Its last line: loading weights"),
        ("", 3, "it ended with code 3. Its last line: nothing was printed"),
    ],
)
def test_the_reason_is_the_first_error_that_nothing_else_caused(
    log: str, code: int, reason: str
) -> None:
    assert failure_reason(log, code).endswith(reason)


# --- processes ---------------------------------------------------------------------------------

# A server of two processes, like vLLM's: the child serves /health, the parent waits.
TWO_PROCESSES = """
import http.server, os, signal, subprocess, sys, threading
if sys.argv[1] != "child":
    child = subprocess.Popen([sys.executable, __file__, "child", *sys.argv[1:]])
    if "parent-ignores-term" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(child.wait())
if "child-ignores-term" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print("serving", flush=True)
server.serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "two_processes.py"
    path.write_text(TWO_PROCESSES)
    return path


def _launch(script: Path, log: Path, *options: str) -> Server:
    port = free_port()
    command = [sys.executable, str(script), str(port), *options]
    server = Server.launch(command, environment=dict(os.environ), log_path=log)
    server.url = f"http://127.0.0.1:{port}"
    return server


def _states(group: int) -> list[str]:
    """The states of a process group's members, zombies left out."""
    states = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                states.append(fields[0])
    return states


def _eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_a_server_starts_answers_and_leaves_nothing_behind(script: Path, tmp_path: Path) -> None:
    waits: list[float] = []
    with _launch(script, tmp_path / "logs" / "arm.log") as server:
        server.wait_ready(20, on_wait=waits.append, period_s=0.02)
        assert server.alive
        assert len(_states(server.pid)) == 2
    assert waits == sorted(waits)
    assert not server.alive
    assert _states(server.pid) == []
    assert "serving" in (tmp_path / "logs" / "arm.log").read_text()
    server.stop()  # a second time does no harm


@pytest.mark.parametrize("option", ["parent-ignores-term", "child-ignores-term"])
def test_processes_that_ignore_the_polite_signal_are_killed(
    script: Path, tmp_path: Path, option: str
) -> None:
    server = _launch(script, tmp_path / "log", option)
    server.wait_ready(20, period_s=0.02)
    server.stop(timeout_s=0.2)
    assert _states(server.pid) == []


def test_an_exception_inside_the_context_stops_the_server(script: Path, tmp_path: Path) -> None:
    server = _launch(script, tmp_path / "log")
    server.wait_ready(20, period_s=0.02)
    with pytest.raises(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    assert _states(server.pid) == []


def test_a_suspended_group_stands_still_and_goes_on(script: Path, tmp_path: Path) -> None:
    with _launch(script, tmp_path / "log") as server:
        server.wait_ready(20, period_s=0.02)
        server.suspend()
        server.suspend()
        _eventually(lambda: set(_states(server.pid)) == {"T"})
        assert server.alive
        server.resume()
        assert "T" not in _states(server.pid)
        server.suspend()
    assert _states(server.pid) == []


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: an error of the run before\n")
    command = [sys.executable, "-c", "raise RuntimeError('no such model')"]
    with Server.launch(command, environment=dict(os.environ), log_path=log) as server:
        server.url = "http://127.0.0.1:9"
        with pytest.raises(ServerError, match="did not start: RuntimeError: no such model"):
            server.wait_ready(20, period_s=0.02)
        with pytest.raises(ServerError, match="died: RuntimeError: no such model"):
            server.suspend()
    assert "the run before" in log.read_text()


def test_a_server_that_never_gets_ready(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('hm', flush=True); time.sleep(60)"]
    log = tmp_path / "log"
    with Server.launch(command, environment=dict(os.environ), log_path=log) as server:
        server.url = "http://127.0.0.1:9"
        _eventually(lambda: log.read_text() == "hm\n")
        with pytest.raises(ServerError, match=r"not ready within 0.1 s.*\nhm"):
            server.wait_ready(0.1, period_s=0.02)


def test_a_nicer_server_makes_way_for_the_client(tmp_path: Path) -> None:
    with Server.launch(
        [sys.executable, "-c", "import time; time.sleep(30)"],
        environment=dict(os.environ),
        log_path=tmp_path / "log",
        niceness=5,
    ) as server:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, server.pid) == min(19, own + 5)


def test_a_command_that_does_not_exist_leaves_no_watchdog(tmp_path: Path) -> None:
    before = set(_watchdogs())  # those of servers that other tests keep running
    with pytest.raises(FileNotFoundError):
        Server.launch(["/nowhere/python"], environment={}, log_path=tmp_path / "log")
    assert set(_watchdogs()) <= before


def _watchdogs() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            if any("server_watchdog.py" in w for w in words) and str(os.getpid()) in words:
                found.append(entry.name)
    return found


@pytest.mark.parametrize("suspended", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_goes_when_specwise_is_killed(
    script: Path, tmp_path: Path, number: signal.Signals, *, suspended: bool
) -> None:
    """A parent process that starts a server and is then ended from outside, at its worst moment."""
    parent = textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from specwise.vllm.server import Server
        server = Server.launch(
            [sys.executable, {str(script)!r}, "{free_port()}"],
            environment=dict(os.environ), log_path=Path({str(tmp_path / "log")!r}))
        if {suspended}:
            time.sleep(0.3)
            server.suspend()
        if os.fork() == 0:  # a child that keeps the pipe to the watchdog open
            time.sleep(3)
            os._exit(0)
        print(server.pid, flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout is not None
        group = int(process.stdout.readline())
        assert _states(group)
        process.send_signal(number)
        process.wait(10)
        _eventually(lambda: _states(group) == [])


# --- probing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _answering(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") == "Bearer wrong":
                status, body = 401, ""
            else:
                status, body = answers.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


MODELS = json.dumps({"data": [{"id": "small", "max_model_len": 512}, {"id": "large"}]})
SPECULATES = 'vllm:spec_decode_num_drafts_total{engine="0"} 0\n'
PLAIN = 'vllm:prefix_cache_queries_total{engine="0"} 0\n'


def test_a_probe_of_a_speculating_server() -> None:
    answers = {
        "/v1/models": (200, MODELS),
        "/version": (200, '{"version": "0.32.0"}'),
        "/metrics": (200, PLAIN + SPECULATES),
    }
    with _answering(answers) as url:
        found = probe(url)
    assert found.version == "0.32.0"
    assert found.models == ("small", "large")
    assert found.max_model_len == 512
    assert (found.generation, found.speculative) == ("V1", True)
    assert found.per_request_metrics is None


def test_a_probe_says_unknown_where_the_server_says_nothing() -> None:
    with _answering({"/v1/models": (200, MODELS)}) as url:
        found = probe(url, model="large")
    assert (found.version, found.speculative, found.generation) == (None, None, None)
    assert (found.per_request_metrics, found.max_model_len) == (None, None)


@pytest.mark.parametrize(("version", "metrics"), [("0.32.0", PLAIN), ("0.28.0", SPECULATES)])
def test_per_request_metrics_are_ruled_out(version: str, metrics: str) -> None:
    answers = {
        "/v1/models": (200, MODELS),
        "/version": (200, json.dumps({"version": version})),
        "/metrics": (200, metrics),
    }
    with _answering(answers) as url:
        assert probe(url).per_request_metrics is False


def test_a_model_that_is_not_served_is_named_with_those_that_are() -> None:
    with (
        _answering({"/v1/models": (200, MODELS)}) as url,
        pytest.raises(InputError, match=r"'huge'.\nIt serves small, large"),
    ):
        probe(url, model="huge")


def test_access_is_refused() -> None:
    with _answering({}) as url, pytest.raises(ServerError, match="api_key_env"):
        probe(url, headers={"Authorization": "Bearer wrong"})


def test_something_that_is_no_model_server() -> None:
    with (
        _answering({"/v1/models": (200, "<html>")}) as url,
        pytest.raises(ServerError, match="not answer like an OpenAI-compatible server"),
    ):
        probe(url)


def test_nobody_there() -> None:
    with pytest.raises(ServerError, match="Cannot reach"):
        probe("http://127.0.0.1:9")
