"""When each request of an open loop is due: pure functions from a process to send times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from specwise.errors import InputError

PROCESSES = ("constant", "poisson", "gamma", "trace")


def intended_times(
    process: str,
    rate_per_s: float | None,
    count: int,
    rng: np.random.Generator,
    *,
    burstiness: float = 1.0,
    trace: Sequence[float] = (),
) -> tuple[float, ...]:
    """Intended send times of ``count`` requests: seconds from the start, ascending.

    ``constant`` spaces them 1/rate apart from 0. ``poisson`` draws independent exponential gaps of
    mean 1/rate and leaves them as drawn, so that the realised rate varies as a Poisson process
    does. ``gamma`` draws gaps with shape ``burstiness`` and mean 1/rate: coefficient of variation
    1/sqrt(burstiness), so 1 is Poisson and below 1 comes in bursts. ``trace`` replays the first
    ``count`` times of ``trace`` from 0, stretched to a mean of ``rate_per_s`` when that is given.

    Raises InputError for an unknown process, a rate or burstiness that is not positive, or a trace
    that is too short.
    """
    if count < 0:
        raise InputError(f"{count} requests were asked for.", "Give a count of 0 or more.")
    if process == "trace":
        return _from_trace(trace, rate_per_s, count)
    if rate_per_s is None or not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise InputError(
            f"An arrival rate of {rate_per_s} requests/s cannot be scheduled.",
            "Give a rate above 0.",
        )
    if process == "constant":
        return tuple(i / rate_per_s for i in range(count))
    if process == "poisson":
        gaps = rng.exponential(1.0 / rate_per_s, count)
    elif process == "gamma":
        if not (burstiness > 0 and math.isfinite(burstiness)):
            raise InputError(
                f"A burstiness of {burstiness} does not describe a gamma process.",
                "Give a value above 0: 1 is Poisson, below 1 comes in bursts.",
            )
        gaps = rng.gamma(burstiness, 1.0 / (rate_per_s * burstiness), count)
    else:
        raise InputError(
            f"There is no arrival process {process!r}.", f"Choose one of {', '.join(PROCESSES)}."
        )
    return tuple(np.cumsum(gaps).tolist())


def parse_trace(text: str, name: str = "trace") -> tuple[float, ...]:
    """Times in seconds from a text with one number a line; blank and ``#`` lines are skipped.

    Any origin will do (epoch seconds as well), only differences count. Raises InputError, naming
    the line, for something that is not a number or a time before its predecessor.
    """
    times: list[float] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.split("#", 1)[0].strip()
        if not entry:
            continue
        try:
            value = float(entry)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(
                f"{name}, line {number}: {entry[:40]!r} is not a time in seconds.",
                "Write one number a line; lines starting with # are skipped.",
            )
        if times and value < times[-1]:
            raise InputError(
                f"{name}, line {number}: {value} comes before the time on the line above it.",
                "Sort the times in ascending order.",
            )
        times.append(value)
    if not times:
        raise InputError(f"{name} holds no times.", "Write one time in seconds on each line.")
    return tuple(times)


def _from_trace(trace: Sequence[float], rate_per_s: float | None, count: int) -> tuple[float, ...]:
    if count > len(trace):
        raise InputError(
            f"The trace holds {len(trace)} arrivals, and {count} requests were asked for.",
            "Ask for fewer requests or give a longer trace: a trace is never repeated.",
        )
    if any(later < earlier for earlier, later in pairwise(trace)):
        raise InputError("The trace's times are not ascending.", "Sort them.")
    used = [t - trace[0] for t in trace[:count]]
    if not rate_per_s or count < 2:
        return tuple(used)
    if rate_per_s < 0 or not math.isfinite(rate_per_s):
        raise InputError(
            f"An arrival rate of {rate_per_s} requests/s cannot be scheduled.",
            "Give a rate above 0, or none to replay the trace as it was recorded.",
        )
    if used[-1] == 0.0:
        raise InputError(
            "All arrivals of the trace fall on one moment: it cannot be stretched to a rate.",
            "Replay it without a rate.",
        )
    stretch = (count - 1) / used[-1] / rate_per_s
    return tuple(t * stretch for t in used)
