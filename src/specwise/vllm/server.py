"""vLLM servers: the command that starts one, its life as processes of ours, and what a probe finds.

A server that specwise starts is a process group of its own (vLLM's API server, engine core and
workers all stay in it), so that it can be suspended, resumed and killed as one, and so that Ctrl-C
in the terminal reaches specwise only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from specwise.domain import Deployment, Speculation
from specwise.errors import EngineError, InputError, ServerError
from specwise.vllm import engine, flags, metrics
from specwise.vllm.command import Version
from specwise.vllm.server_watchdog import living_members

EMBEDDED = "embedded"
READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
# The CPU build takes every core for its matrix products, and the load client shares them: it must
# be able to take a time stamp when an answer arrives, not when a thread of vLLM makes way.
EMBEDDED_NICENESS = 5
EMBEDDED_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"}

_ENTRY_POINT = "vllm.entrypoints.openai.api_server"
_WATCHDOG = Path(__file__).with_name("server_watchdog.py")
_PER_REQUEST_METRICS_SINCE = Version(0, 29)  # vllm/config/observability.py
_PROMPT_DETAILS_SINCE = Version(0, 8)
# Words that specwise puts into the command itself.
_OURS = ("--model", "--served-model-name", "--host", "--port", "--speculative-config")
_EAGER_CHOICES = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-O")
_NEEDS_DRAFT = ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a running server says about itself; None where it does not say.

    ``per_request_metrics`` is False where the version or the lack of speculation rules them out and
    None otherwise: only a response can show them.
    """

    version: str | None
    models: tuple[str, ...]
    speculative: bool | None
    per_request_metrics: bool | None
    generation: metrics.Generation | None
    max_model_len: int | None


def probe(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    model: str | None = None,
    timeout_s: float = 10.0,
    verify_tls: bool = True,
) -> Capabilities:
    """Ask a running server what it is; ``max_model_len`` is that of ``model``, or of the first one.

    Raises ServerError when it cannot be reached, refuses access, or is not an OpenAI-compatible
    server, and InputError when it does not serve ``model`` (naming those that it does).
    """

    def get(path: str) -> str:
        return metrics.fetch(url, path, headers=headers, timeout_s=timeout_s, verify_tls=verify_tls)

    listed = _json(url, get("/v1/models")).get("data", [])
    by_name = {str(entry.get("id")): entry for entry in listed}
    if model is not None and model not in by_name:
        raise InputError(
            f"{url} does not serve the model {model!r}.",
            f"It serves {', '.join(by_name) or 'no model'}: name one of these.",
        )
    chosen = by_name.get(model) if model else next(iter(by_name.values()), None)
    version, snapshot = None, metrics.Snapshot()
    with contextlib.suppress(ServerError):  # not every OpenAI-compatible server has /version
        version = _json(url, get("/version")).get("version")
    with contextlib.suppress(ServerError):  # /metrics can be switched off
        snapshot = metrics.parse(get("/metrics"))
    known = Version.of(version)
    cannot = snapshot.speculative is False or (known and known < _PER_REQUEST_METRICS_SINCE)
    return Capabilities(
        version=version,
        models=tuple(by_name),
        speculative=snapshot.speculative,
        per_request_metrics=False if cannot else None,
        generation=snapshot.generation,
        max_model_len=(chosen or {}).get("max_model_len"),
    )


def _json(url: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ServerError(
            f"{url} does not answer like an OpenAI-compatible server.",
            "Check that the address is that of a vLLM server, without a path such as /v1.",
        )
    return content


def launch_command(
    deployment: Deployment,
    speculation: Speculation | None,
    *,
    port: int,
    python: str = "python",
    version: str | None = None,
) -> list[str]:
    """The argument list that serves ``deployment`` with ``speculation`` on 127.0.0.1.

    ``version`` is that of the vLLM that ``python`` runs; options that only newer versions know are
    added when it is known to have them. Raises InputError for arguments that contradict specwise's
    own and for a speculation that vLLM would refuse, or would only choke on after a minute.
    """
    ours = [word for word in deployment.arguments if word.split("=")[0] in _OURS]
    if ours:
        raise InputError(
            f"The deployment's arguments contain {', '.join(ours)}, which specwise sets itself.",
            "Remove them; the model, its served name and the speculation have fields of their own.",
        )
    served = ["--served-model-name", deployment.served_name] if deployment.served_name else []
    command = [python, "-m", _ENTRY_POINT, "--model", deployment.model, *served]
    command += ["--host", "127.0.0.1", "--port", str(port), *deployment.arguments]
    given = {word.split("=")[0] for word in deployment.arguments}
    if deployment.engine == EMBEDDED and not given.intersection(_EAGER_CHOICES):
        # Compiling takes one to two minutes on a CPU and gains nothing there.
        command.append("--enforce-eager")
    known = Version.of(version)

    def has(since: Version) -> bool:
        return known is not None and known >= since

    if "--enable-prompt-tokens-details" not in given and has(_PROMPT_DETAILS_SINCE):
        command.append("--enable-prompt-tokens-details")  # cached tokens in each answer's usage
    if speculation is not None:
        config = json.dumps(startable_config(speculation), separators=(",", ":"))
        command += ["--speculative-config", config]
        flag = "--per-request-spec-decode-metrics"
        if flag not in given and has(_PER_REQUEST_METRICS_SINCE):
            command += [flag, "summary"]
    return command


def startable_config(speculation: Speculation) -> dict[str, Any]:
    """The value of ``--speculative-config``; InputError for a speculation that cannot start.

    Checked here are the values that vLLM refuses, or accepts and chokes on a minute later.
    """
    if speculation.draft is None and speculation.method in _NEEDS_DRAFT:
        raise InputError(
            f"The method {speculation.method} needs a draft model.", "Name it in the field draft."
        )
    if speculation.k < 1:
        raise InputError(
            f"The draft length k is {speculation.k}.",
            "Set k to at least 1; an arm without speculation has no speculation section.",
        )
    if speculation.schedule:
        _check_schedule(speculation)
    own = flags.speculative_config(replace(speculation, options={}))
    twice = own.keys() & speculation.options.keys()
    if twice:
        raise InputError(
            f"The speculation's options repeat {', '.join(sorted(twice))}.",
            "Set method, draft, k and schedule in their own fields only.",
        )
    return flags.speculative_config(speculation)


def _check_schedule(speculation: Speculation) -> None:
    """vLLM's own rules, and two that it passes over in silence.

    These are: no gaps (it would carry the previous k on) and no k above the arm's own (it would cut
    it down).
    """
    rows = speculation.schedule
    problems = flags.schedule_problems(rows)
    if not problems:
        gaps = flags.schedule_gaps(rows)
        problems = [f"batch sizes {first} to {last} are in no row" for first, last, _ in gaps]
        problems += [
            f"row {list(row)} asks for more than the arm's k = {speculation.k}"
            for row in rows
            if row[2] > speculation.k
        ]
    if problems:
        raise InputError(
            f"The schedule cannot be served: {'; '.join(problems)}.",
            "Rows are [first batch size, last batch size, k], start at 1 and leave no gap.",
        )


def installed_version(python: str | os.PathLike[str]) -> str | None:
    """The version of the vLLM that an interpreter can import, None if it has none.

    Raises EngineError when the interpreter itself does not run.
    """
    code = (
        "import importlib.metadata as m\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(names.get('vllm') or names.get('vllm-cpu') or '')"
    )
    try:
        result = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(
            f"The engine {str(python)!r} does not run: {error}.",
            'Set engine to "embedded" or to the Python interpreter of an environment with vLLM.',
        ) from error
    return result.stdout.strip() or None


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
    return port


class Server:
    """A vLLM server that this process started. Use it as a context manager: leaving it stops it.

    If specwise itself is killed, a watchdog process kills the server. Not for use from several
    threads at once.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], watchdog: subprocess.Popen[bytes], log: _Log
    ) -> None:
        """Take over processes that `start` made."""
        self._process = process
        self._watchdog = watchdog
        self._log = log
        self._suspended = False
        self._stopped = False
        self.url = ""
        self.model = ""
        self.version: str | None = None
        self.command: tuple[str, ...] = ()

    @classmethod
    def start(
        cls,
        deployment: Deployment,
        speculation: Speculation | None = None,
        *,
        log_path: Path,
        port: int | None = None,
    ) -> Self:
        """Start a server and return at once; `wait_ready` waits until it answers.

        What the server prints is appended to ``log_path``. ``port`` None takes a free one.
        Raises InputError as `launch_command` does and EngineError when there is no engine to start.
        """
        for model in (deployment.model, speculation.draft if speculation else None):
            _check_folder(model)
        if deployment.engine == EMBEDDED:
            python, version = str(engine.engine_python()), engine.embedded_version()
        else:
            python = str(Path(deployment.engine).expanduser())
            found = installed_version(python)
            if found is None:
                raise EngineError(
                    f"The Python {python} has no vLLM.",
                    "Name the interpreter of an environment in which vLLM is installed.",
                )
            version = found
        port = port or free_port()
        command = launch_command(deployment, speculation, port=port, python=python, version=version)
        environment = _environment(deployment, speculation)
        niceness = EMBEDDED_NICENESS if deployment.engine == EMBEDDED else 0
        server = cls.launch(command, environment=environment, log_path=log_path, niceness=niceness)
        server.url = f"http://127.0.0.1:{port}"
        server.model = deployment.served_name or deployment.model
        server.version = version
        return server

    @classmethod
    def launch(
        cls,
        command: list[str],
        *,
        environment: dict[str, str],
        log_path: Path,
        niceness: int = 0,
    ) -> Self:
        """Start ``command`` as a process group with a watchdog, its output appended to a log.

        ``niceness`` is how much lower than ours the priority of the group is.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as output:
            log = _Log(log_path, output.tell())
            # The watchdog comes first, so that no server is ever without one.
            watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WATCHDOG), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except BaseException:
                _end_watchdog(watchdog)
                raise
        server = cls(process, watchdog, log)
        server.command = tuple(command)
        try:
            if niceness:
                own = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PGRP, process.pid, min(19, own + niceness))
            if watchdog.stdin:
                watchdog.stdin.write(f"{process.pid}\n".encode())
        except BaseException:
            server.stop(timeout_s=0)
            raise
        return server

    @property
    def alive(self) -> bool:
        """Whether the server process runs (suspended counts)."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the API server, which is the id of the process group too."""
        return self._process.pid

    def wait_ready(
        self,
        timeout_s: float = READY_TIMEOUT_S,
        *,
        on_wait: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        period_s: float = 0.25,
    ) -> None:
        """Block until /health answers; ``on_wait`` is told the seconds waited so far.

        Raises ServerError with the reason from the log when the server dies or takes too long. It
        is left as it is: stop it, or leave the context.
        """
        began = clock()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while True:
                if not self.alive:
                    raise self._died("did not start")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                waited_s = clock() - began
                if waited_s > timeout_s:
                    raise ServerError(
                        f"The vLLM server was not ready within {timeout_s:g} s. Its log ends with:"
                        f"\n{self._log.tail()}",
                        f"Allow more time, or read {self._log.path}.",
                    )
                on_wait(waited_s)
                time.sleep(period_s)

    def suspend(self) -> None:
        """Stop the whole group from running (SIGSTOP); its memory and open connections stay.

        An idle vLLM still turns over for a second after its last request and would disturb the arm
        measured next. Connections to a suspended server hang, and its idle keep-alive connections
        are closed once it runs again: open new ones for each trial.
        """
        if not self.alive:
            raise self._died("died")
        if not self._suspended:
            os.killpg(self.pid, signal.SIGSTOP)
            self._suspended = True

    def resume(self, timeout_s: float = 60.0) -> None:
        """Let a suspended group run again and wait until it answers; ServerError if it does not."""
        if self._suspended:
            os.killpg(self.pid, signal.SIGCONT)
            self._suspended = False
        self.wait_ready(timeout_s, period_s=0.02)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the server: politely first, and every process of its group after ``timeout_s``.

        Safe to call twice, and on a server that died or is suspended.
        """
        if self._stopped:
            return
        try:
            if timeout_s > 0 and self.alive:
                self._signal_group(signal.SIGCONT)
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout_s)
                    # The engine core, and the tracker that gives shared memory back.
                    self._signal_group(signal.SIGTERM)
                    _wait_until_gone(self.pid, timeout_s=2.0)
        finally:
            # Also when the wait was interrupted, and for workers that outlived the API server.
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            _wait_until_gone(self.pid)
            _end_watchdog(self._watchdog)
            self._stopped = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _died(self, how: str) -> ServerError:
        reason = failure_reason(self._log.text(), self._process.returncode)
        return ServerError(
            f"The vLLM server {how}: {reason}", f"Its whole log is {self._log.path}."
        )


@dataclass(frozen=True, slots=True)
class _Log:
    """A log file from the byte where this server's output begins."""

    path: Path
    start: int

    def text(self) -> str:
        try:
            with self.path.open("rb") as log:
                log.seek(self.start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def tail(self, lines: int = 5) -> str:
        return "\n".join(self.text().strip().splitlines()[-lines:])


def _check_folder(model: str | None) -> None:
    """InputError for a model that is clearly meant as a folder and is none."""
    if model and model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise InputError(f"The model folder {model} does not exist.", "Correct the path.")


def _environment(deployment: Deployment, speculation: Speculation | None) -> dict[str, str]:
    """The server's environment: ours, what the embedded engine needs, what the deployment sets."""
    environment = dict(os.environ)
    environment["VLLM_NO_USAGE_STATS"] = "1"
    if deployment.engine == EMBEDDED:
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
        for name, value in EMBEDDED_ENVIRONMENT.items():
            environment.setdefault(name, value)
        draft = speculation.draft if speculation else None
        if all(Path(model).is_dir() for model in (deployment.model, draft) if model):
            environment.setdefault("HF_HUB_OFFLINE", "1")
    return environment | dict(deployment.environment)


# vLLM's log prefixes: "(EngineCore pid=12) ERROR 11-22 19:00:00 [core.py:1200] ".
_PREFIX = re.compile(r"^(?:\(\S+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:.]+ \[[^\]]*\] ?)?")
_RAISED = re.compile(r"^(?:[\w.]+\.)?(?!Warning)\w*(?:Error|Exception|Exit|Interrupt)\b(?::|$)")
_ARGPARSE = re.compile(r"^\S+: error: ")
# Raised because of another failure in the same log; never the reason.
_CONSEQUENCES = (
    "Engine core initialization failed",
    "Engine process failed to start",
    "WorkerProc initialization failed",
    "Engine core proc",
    "EngineDeadError",
    "SystemExit",
    "KeyboardInterrupt",
    "BrokenPipeError",
    "EOFError",
    "asyncio.exceptions.CancelledError",
)


def failure_reason(log: str, returncode: int | None) -> str:
    """Why a server died, in a line or a few: the first error raised that no other one caused.

    ``log`` is what the server printed; falls back on how the process ended and the last line.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
    for number, text in enumerate(lines):
        if _ARGPARSE.match(text):
            return text.partition("error: ")[2]
        if not _RAISED.match(text) or any(mark in text for mark in _CONSEQUENCES):
            continue
        return _shortened(" ".join([text, *_continuation(text, lines[number + 1 :])]))
    ended = f"it ended with code {returncode}"
    if returncode is not None and returncode < 0:
        ended = f"it was ended by {signal.Signals(-returncode).name}"
        if -returncode == signal.SIGKILL:
            ended += ", which the system does when memory runs out"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    return f"{ended}. Its last line: {last}"


def _continuation(text: str, following: list[str]) -> list[str]:
    """The lines that belong to pydantic's error message: the field and what is wrong with it."""
    if "validation error" not in text:
        return []
    lines = [line.strip() for line in following[:4]]
    end = next((i for i, line in enumerate(lines) if line.startswith("For further")), 2)
    return [line.partition(" [type=")[0] for line in lines[:end]]


def _shortened(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _end_watchdog(watchdog: subprocess.Popen[bytes]) -> None:
    """End the watchdog before it can act on a group id that the system may have given away."""
    watchdog.kill()
    watchdog.wait()
    if watchdog.stdin:
        watchdog.stdin.close()


def _wait_until_gone(group: int, timeout_s: float = 10.0) -> None:
    """Wait for ended processes to leave: they give their memory and port back only then."""
    deadline = time.monotonic() + timeout_s
    while living_members(group) and time.monotonic() < deadline:
        time.sleep(0.02)
