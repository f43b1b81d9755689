"""Several real servers at once: a start keeps one core busy for half a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from specwise.domain import Deployment, Speculation
from specwise.vllm.server import Server


@contextmanager
def started(logs: Path, **wanted: tuple[Deployment, Speculation | None]) -> Iterator[list[Server]]:
    """Servers that are ready, in the order asked for, each with a log of its name.

    Each has a core of its own as far as there are that many. vLLM binds every worker to the first
    one, which is fair to arms that are measured in turns and doubles the time that two starts take.
    """
    cores = cycle(sorted(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        servers = []
        for core, (name, (deployment, speculation)) in zip(cores, wanted.items(), strict=False):
            bound = {"VLLM_CPU_OMP_THREADS_BIND": str(core), **deployment.environment}
            server = Server.start(
                replace(deployment, environment=bound), speculation, log_path=logs / f"{name}.log"
            )
            servers.append(stack.enter_context(server))
        for server in servers:
            server.wait_ready()
        yield servers
