"""Kills the servers of a specwise that is gone. Run as a script, in a session of its own.

Standard input is a pipe from specwise, which writes the process group of each server that it
starts, one a line. When the pipe closes or the parent changes, specwise has ended, however it ended
(`kill -9` included), and the groups are ended: politely first, because a vLLM that is killed leaves
hundreds of megabytes of shared memory behind, then by SIGKILL. A suspended group is woken for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

PERIOD_S = 1.0
GRACE_S = 5.0


def main(parent: int) -> None:
    """Wait for the end of ``parent``, then end the groups read from standard input."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    groups = b""
    while True:
        # The parent is looked at too: a child that it forked may still hold the pipe open. Its end
        # may also come before this line runs, so what it wrote is read before it is acted upon.
        orphaned = os.getppid() != parent
        readable = select.select([0], [], [], 0 if orphaned else PERIOD_S)[0]
        received = os.read(0, 4096) if readable else b""
        groups += received
        if not received and (readable or orphaned):
            break
    ended = [int(group) for group in groups.split()]
    for group in ended:
        _signal(group, signal.SIGTERM)
        _signal(group, signal.SIGCONT)
    deadline = time.monotonic() + GRACE_S
    while any(living_members(group) for group in ended) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in ended:
        _signal(group, signal.SIGKILL)


def living_members(group: int) -> list[int]:
    """Process ids of a group that still run; zombies, which hold nothing, are left out."""
    living = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # pid (name) state parent group ...; the name may hold spaces and parentheses.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                living.append(int(entry.name))
    return living


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    main(int(sys.argv[1]))
