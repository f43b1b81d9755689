"""`specwise watch`: follow running servers and say when they no longer are what was measured."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specwise.errors import InputError

if TYPE_CHECKING:
    from specwise.monitoring.expectations import Expectations
    from specwise.monitoring.standing import ReplicaStanding


@click.command(
    epilog="Example: specwise watch http://127.0.0.1:8000 --against specwise-demo --once"
)
@click.argument("urls", nargs=-1)
@click.option(
    "--targets",
    type=click.Path(path_type=Path),
    help="File with one address a line, read anew each round: replicas may come and go.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), help="Study folder that the verdict rests on."
)
@click.option("--arm", help="Which speculating arm runs in production; default: the verdict's.")
@click.option(
    "--every", "every_s", default=15.0, type=click.FloatRange(min=0.1), help="Seconds a round."
)
@click.option("--once", is_flag=True, help="One window of --every seconds, then the exit code.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="File that carries counters and the drift test from one run to the next (for cron).",
)
@click.option("--exporter", help="[HOST:]PORT to serve the findings as Prometheus metrics.")
@click.option("--api-key-env", help="Environment variable that holds the servers' API key.")
@click.option(
    "--false-alarms",
    default=0.01,
    type=click.FloatRange(min=1e-9, max=0.5),
    help="Chance of a false drift alarm on one healthy replica in 30 days.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a round.")
def watch(
    *,
    urls: tuple[str, ...],
    targets: Path | None,
    against: Path | None,
    arm: str | None,
    every_s: float,
    once: bool,
    state: Path | None,
    exporter: str | None,
    api_key_env: str | None,
    false_alarms: float,
    as_json: bool,
) -> None:
    """Follow vLLM servers at URLS: acceptance, latency, cache, and drift from a study.

    Exit code of --once: 0 all is as measured, 1 a replica is unhealthy or contradicts the study's
    verdict, 3 a replica could not be read.
    """
    from specwise.monitoring.exporter import Exporter, serving  # noqa: PLC0415 - loads numpy
    from specwise.monitoring.watch import (  # noqa: PLC0415
        Watch,
        check_url,
        load_memories,
        read_targets,
        save_memories,
    )

    fixed = tuple(check_url(url) for url in urls)
    if not fixed and targets is None:
        raise InputError("Give the address of a server, or --targets.", "As http://host:port.")

    def current() -> tuple[str, ...]:
        more = read_targets(targets) if targets is not None else ()
        return tuple(dict.fromkeys((*fixed, *more)))

    current()  # a wrong file is said before anything starts
    expected = _expected(against, arm)
    memories = load_memories(state) if state is not None else ()
    stop = _stop_on_signals()
    with ExitStack() as stack:
        watching = stack.enter_context(
            Watch(
                expected,
                headers=_headers(api_key_env),
                false_alarm_rate=false_alarms,
                memories=memories,
            )
        )
        findings = Exporter()
        if exporter is not None:
            host, port = _address(exporter)
            bound = stack.enter_context(serving(findings, host=host, port=port))
            click.echo(f"findings at http://{host}:{bound}/metrics", err=True)
        show = stack.enter_context(_Screen(expected, as_json=as_json, live=not once))
        known = {memory.url for memory in memories if memory.last is not None}
        if once and not set(current()) <= known:
            watching.round(current())  # the window needs a beginning
            stop.wait(every_s)
        while True:
            began = time.monotonic()
            standings = watching.round(current())
            findings.show(standings)
            if state is not None:
                save_memories(state, watching.memories())
            show.round(standings)
            if once:
                break
            if stop.wait(max(0.0, every_s - (time.monotonic() - began))):
                return
    sys.exit(_exit_code(standings))


def _expected(study: Path | None, arm: str | None) -> Expectations | None:
    if study is None:
        return None
    from specwise.cli.studies import read_assessment  # noqa: PLC0415
    from specwise.monitoring.expectations import expectations  # noqa: PLC0415

    _, assessment = read_assessment(study)
    return expectations(assessment, arm=arm)


def _headers(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise InputError(
            f"Environment variable {variable} is not set.", "Export it, or leave --api-key-env out."
        )
    return {"Authorization": f"Bearer {key}"}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise InputError(f"--exporter {text!r} is not [HOST:]PORT.", "For example 9464.")
    return host or "127.0.0.1", int(port)


def _stop_on_signals() -> threading.Event:
    import signal  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _exit_code(standings: tuple[ReplicaStanding, ...]) -> int:
    from specwise.monitoring.standing import Health  # noqa: PLC0415
    from specwise.monitoring.windows import State  # noqa: PLC0415

    if any(s.health is Health.UNHEALTHY or s.verdict_stands is False for s in standings):
        return 1
    unread = (State.UNREACHABLE, State.NOT_VLLM)
    return 3 if any(s.window.state in unread for s in standings) else 0


class _Screen:
    """Where rounds go: a page that redraws itself on a terminal, plain text, or JSON lines."""

    def __init__(self, expected: Expectations | None, *, as_json: bool, live: bool) -> None:
        self._expected = expected
        self._stack = ExitStack()
        self._print: Callable[[tuple[ReplicaStanding, ...]], None]
        from rich.console import Console  # noqa: PLC0415

        self._console = Console()
        if as_json:
            self._print = self._json
        elif live and self._console.is_terminal:
            from rich.live import Live  # noqa: PLC0415

            self._live = self._stack.enter_context(
                Live(console=self._console, screen=True, auto_refresh=False)
            )
            self._print = self._redraw
        else:
            self._print = self._plain

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def round(self, standings: tuple[ReplicaStanding, ...]) -> None:
        self._print(standings)

    def _json(self, standings: tuple[ReplicaStanding, ...]) -> None:
        import orjson  # noqa: PLC0415

        from specwise.monitoring.page import round_to_dict  # noqa: PLC0415

        click.echo(orjson.dumps(round_to_dict(standings, self._expected, at_s=time.time())))

    def _redraw(self, standings: tuple[ReplicaStanding, ...]) -> None:
        from specwise.monitoring.page import page  # noqa: PLC0415

        self._live.update(page(standings, self._expected, at_s=time.time()), refresh=True)

    def _plain(self, standings: tuple[ReplicaStanding, ...]) -> None:
        from specwise.monitoring.page import page  # noqa: PLC0415

        self._console.print(page(standings, self._expected, at_s=time.time()))
