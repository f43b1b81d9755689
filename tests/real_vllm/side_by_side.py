"""Several real servers at once: a start keeps one core busy for half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from specwise.domain import Deployment, Speculation
from specwise.vllm.server import Server


@contextmanager
def started(logs: Path, **wanted: tuple[Deployment, Speculation | None]) -> Iterator[list[Server]]:
    """Servers that are ready, in the order asked for, each with a log of its name."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(Server.start(*what, log_path=logs / f"{name}.log"))
            for name, what in wanted.items()
        ]
        for server in servers:
            server.wait_ready()
        yield servers
