"""A draft length for each batch size, from the loads that were measured (req E4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from specwise.decision.findings import Findings, Place, listed
from specwise.domain import LoadPoint, Loop, Speculation
from specwise.vllm.flags import METHODS_WITH_SCHEDULE

_LARGEST_BATCH = 1024


@dataclass(frozen=True, slots=True)
class ScheduleProposal:
    """Rows (first batch size, last batch size, k) that start at 1, touch, and never grow in k.

    ``confirmed`` is False for a proposal: no trial has run it yet.
    """

    arm: str
    rows: tuple[tuple[int, int, int], ...]
    reason: str
    confirmed: bool


IDLE_PRICE = (
    "k = 0 is not the same as off: the draft keeps its memory, its first pass still runs, and a "
    "published run lost 6.6 % TPOT at concurrency 2 and 21.6 % at 189 to no speculation "
    "(vLLM issue 49548)."
)


def takes_schedule(speculation: Speculation) -> bool:
    """Whether the method's draft length can follow the batch size."""
    return speculation.method in METHODS_WITH_SCHEDULE


def propose(findings: Findings, arm: str) -> ScheduleProposal | None:
    """A schedule for ``arm`` from the loads measured on the production workload.

    At each load the draft length is the one, among the measured arms that differ from ``arm`` in
    k only, whose speedup is largest, or 0 where none is shown to win or a segment loses. Lengths
    never grow with the batch (k* does not rise with batch). A change of k is put at the crossover
    where one was found between the two loads, else right after the smaller load: nothing beyond
    it was measured to win. None if one length serves every load, or none wins at the smallest.
    """
    speculation = findings.design.arm(arm).speculation
    if speculation is None or not takes_schedule(speculation):
        return None
    if speculation.schedule:
        return ScheduleProposal(
            arm, speculation.schedule, "the schedule that was measured", confirmed=True
        )
    loop = findings.design.production_load.loop
    loads = [load for load in sorted(findings.design.loads) if load.loop is loop]
    steps: list[tuple[int, int, LoadPoint]] = []
    k = max(sibling.k for _, sibling in _siblings(findings, arm))
    for load in loads:
        if findings.effect("speedup", arm, findings.production, load) is None:
            continue
        k = min(k, _best_k(findings, arm, load))
        steps.append((_batch_size(findings, arm, load), k, load))
    if len(steps) < 2 or steps[0][1] == 0 or steps[0][1] == steps[-1][1]:
        return None
    rows: list[tuple[int, int, int]] = []
    first = 1
    for (batch, k_here, _), (next_batch, k_next, _) in pairwise(steps):
        if k_here != k_next:
            last = max(first, _boundary(findings, arm, batch, next_batch))
            rows.append((first, last, k_here))
            first = last + 1
    rows.append((first, max(_LARGEST_BATCH, 2 * steps[-1][0], first), steps[-1][1]))
    return ScheduleProposal(arm, tuple(rows), _reason(steps), confirmed=False)


@dataclass(frozen=True, slots=True)
class Lengths:
    """What each draft length of one way to speculate gives at each load.

    ``gains[k][j]`` is log(goodput / the baseline's) with draft length k at ``batches[j]`` requests
    (ascending); k = 0 is on but idle, whose price is a gain below 0. ``draws[k]`` are joint draws
    of the same, draws x loads: how sure they are.
    """

    batches: tuple[int, ...]
    gains: Mapping[int, Sequence[float]]
    draws: Mapping[int, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Composed:
    """A schedule and what it is expected to give: ``gain`` is the mean log gain over the loads.

    ``lengths`` has the draft length at each load. ``monotone`` is False where the data refuse
    lengths that never grow with the batch.
    """

    rows: tuple[tuple[int, int, int], ...]
    lengths: tuple[int, ...]
    gain: float
    monotone: bool


def compose(given: Lengths) -> Composed:
    """The schedule with the largest gain summed over the loads, each load alike (req E4).

    Lengths never grow with the batch, because k* does not (theory, and every published sweep),
    unless the free choice is better with 97.5 %. Between two loads with different lengths the
    change is put where the straight line between their measured differences, over log batch,
    crosses zero. Raises ValueError without a load or a length.
    """
    if not given.batches or not given.gains:
        raise ValueError("a schedule needs a load and a draft length")
    lengths = sorted(given.gains)
    free = tuple(
        lengths[int(np.argmax([given.gains[k][j] for k in lengths]))]
        for j in range(len(given.batches))
    )
    chosen = _never_growing(given)
    monotone = True
    if chosen != free:
        better = sum(
            given.draws[a][:, j] - given.draws[b][:, j]
            for j, (a, b) in enumerate(zip(free, chosen, strict=True))
        )
        if np.quantile(better, 0.025) > 0:
            chosen, monotone = free, False
    gain = sum(given.gains[k][j] for j, k in enumerate(chosen)) / len(chosen)
    return Composed(_rows(given, chosen), chosen, gain, monotone)


def _never_growing(given: Lengths) -> tuple[int, ...]:
    """The best non-increasing sequence, by dynamic programming from the largest batch."""
    lengths = sorted(given.gains)
    after = dict.fromkeys(lengths, (0.0, ()))
    held: dict[int, tuple[float, tuple[int, ...]]] = dict(after)
    for j in reversed(range(len(given.batches))):
        best: tuple[float, tuple[int, ...]] | None = None
        found = {}
        for k in lengths:  # ascending: what follows may use any length up to k
            total, rest = held[k]
            here = (total + given.gains[k][j], (k, *rest))
            best = here if best is None or here[0] > best[0] else best
            found[k] = best
        held = found
    return held[lengths[-1]][1]


def _rows(given: Lengths, chosen: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    rows: list[tuple[int, int, int]] = []
    first = 1
    for j, (k, following) in enumerate(pairwise(chosen)):
        if k != following:
            last = max(first, _change(given, j, k, following))
            rows.append((first, last, k))
            first = last + 1
    rows.append((first, max(_LARGEST_BATCH, 2 * given.batches[-1], first), chosen[-1]))
    return tuple(rows)


def _change(given: Lengths, j: int, k: int, following: int) -> int:
    """The last batch size that keeps ``k``, between load j and the next."""
    here, there = given.batches[j], given.batches[j + 1]
    ahead = given.gains[k][j] - given.gains[following][j]
    behind = given.gains[following][j + 1] - given.gains[k][j + 1]
    share = ahead / (ahead + behind) if ahead > 0 and behind > 0 else 0.0
    crossing = math.exp(math.log(here) + share * (math.log(there) - math.log(here)))
    return min(max(math.floor(crossing), here), there - 1)


def losers(findings: Findings, arm: str, load: LoadPoint) -> tuple[Place, ...]:
    """Segments of the production workload that ``arm`` serves significantly worse at ``load``.

    Measured in a mix or alone: either is enough.
    """
    found = []
    for place in findings.production_parts():
        judged = findings.judge(arm, place, load)
        if judged is not None and judged.direction == "worse":
            found.append(place)
    return tuple(found)


def _siblings(findings: Findings, arm: str) -> list[tuple[str, Speculation]]:
    """Arms that differ from ``arm`` in k only, itself included; a schedule is no sibling."""
    own = findings.design.arm(arm).speculation
    return [
        (other.name, other.speculation)
        for other in findings.candidates
        if own is not None
        and other.speculation is not None
        and not other.speculation.schedule
        and (other.speculation.method, other.speculation.draft, dict(other.speculation.options))
        == (own.method, own.draft, dict(own.options))
    ]


def _best_k(findings: Findings, arm: str, load: LoadPoint) -> int:
    best_ratio, best_k = 1.0, 0
    for name, speculation in _siblings(findings, arm):
        judged = findings.judge(name, findings.production, load)
        effect = findings.effect("speedup", name, findings.production, load)
        if judged is None or effect is None or judged.direction != "better":
            continue
        if effect.ratio > best_ratio and not losers(findings, name, load):
            best_ratio, best_k = effect.ratio, speculation.k
    return best_k


def _batch_size(findings: Findings, arm: str, load: LoadPoint) -> int:
    """Requests in the batch at ``load``: the concurrency, or by Little's law requests/s x E2E."""
    if load.loop is Loop.CLOSED:
        return int(load.value)
    summary = findings.summary(arm, findings.production, load)
    if summary is None or summary.e2e_from_sent_s is None:
        return max(1, round(load.value))
    return max(1, round(load.value * summary.e2e_from_sent_s.mean))


def _boundary(findings: Findings, arm: str, batch: int, next_batch: int) -> int:
    """The last batch size of a row: the earliest crossover of what stops winning next, else
    ``batch`` itself, the largest that was measured to win."""
    if findings.design.production_load.loop is not Loop.CLOSED:
        return batch
    places = [findings.production, *findings.production_parts()]
    crossings = [findings.crossover(arm, place) for place in places]
    known = [c.load_value for c in crossings if c is not None and c.load_value is not None]
    earliest = math.floor(min(known, default=batch))
    return earliest if batch <= earliest < next_batch else batch


def _reason(steps: list[tuple[int, int, LoadPoint]]) -> str:
    wins = [load.label for _, k, load in steps if k]
    idle = [load.label for _, k, load in steps if not k]
    text = f"speculates where it was measured to win ({listed(wins)})"
    if idle:
        text += f" and idles where it, or one segment, was not ({listed(idle)})"
    return f"{text}. To be confirmed by measuring it."
