"""Kills the servers of a specwise that is gone. Run as a script, in a session of its own.

Standard input is a pipe from specwise, which writes the process group of each server that it
starts, one a line. When the pipe closes or the parent changes, specwise has ended, however it ended
(`kill -9` included), and the groups are killed. SIGKILL reaches a suspended group as well.
"""

from __future__ import annotations

import os
import select
import signal
import sys

PERIOD_S = 1.0


def main(parent: int) -> None:
    """Wait for the end of ``parent``, then kill the groups read from standard input."""
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
    for group in groups.split():
        try:
            os.killpg(int(group), signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]))
