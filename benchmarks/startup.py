"""How long the command line takes to answer, against Python's own start as the bound.

    python benchmarks/startup.py

Alternates `python -c pass` and each command, and prints medians, spread and the ratio to the bare
interpreter. The bar: `specwise --help` under 0.4 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 11
COMMANDS = {
    "bare interpreter": ["-c", "pass"],
    "specwise --help": ["-m", "specwise.cli.main", "--help"],
    "specwise measure --example": ["-m", "specwise.cli.main", "measure", "--example"],
    "specwise engine status": ["-m", "specwise.cli.main", "engine", "status"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - began


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    bare = statistics.median(times["bare interpreter"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:<28} {median:6.3f} s  ({min(values):.3f} to {max(values):.3f})"
            f"  {median / bare:5.1f} x bare"
        )


if __name__ == "__main__":
    main()
