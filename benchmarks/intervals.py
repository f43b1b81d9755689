"""Do the intervals hold the truth, and does noise ever decide? Thousands of simulated studies.

Studies come from `tests.analysis.known_truth`: prompts shared by the arms, noise of requests with a
heavy tail, noise of whole trials, closed-loop clients. Printed, each with its Monte-Carlo error:
the coverage of the 95 % intervals of every effect in four kinds of study; the coverage of the
crossover's interval; how often studies of equal arms end in "on" or "off", by bound.

    python -m benchmarks.intervals [--studies 1000] [--part coverage|crossover|equal]

Exits with 1 if a bar is missed: coverage between 93 and 97 % within its Monte-Carlo error for the
effects that decide, false verdicts in less than 5 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from tests.analysis.known_truth import World, simulate, true_ratios

from specwise.analysis.comparison import compare, speedup_effects
from specwise.analysis.crossover import find_crossovers
from specwise.analysis.latency import summarise
from specwise.decision.conditions import check_conditions
from specwise.decision.findings import Findings
from specwise.decision.verdict import Decision, decide
from specwise.domain import Slo

SHOWN = (
    "speedup", "tpot_mean", "tpot_p50", "tpot_p99", "ttft_p50", "ttft_p99", "output_tokens_per_s",
    "goodput_per_s",
)  # fmt: skip
_MIX = {"json": {4: 0.3, 16: 0.3}, "prose": {4: 0.1, 16: -0.1}}
_SLIGHT = {"json": {4: 0.05, 16: 0.05}, "prose": {4: 0.0, 16: 0.0}}
_SAME = {"json": {4: 0.0, 16: 0.0}, "prose": {4: 0.0, 16: 0.0}}
WORLDS = {
    "demo: 3 arms, 3 workloads, 2 x 32 requests": World({"draft": _MIX, "ngram": _SLIGHT}),
    "small: 2 arms, 1 mix, 2 loads, 3 x 50": World(
        {"draft": _MIX}, loads=(4, 16), repeats=3, requests=50, pure=False
    ),
    "twice: 2 arms, 1 mix, 2 x 64": World({"draft": _MIX}, requests=64, pure=False),
    "large: 2 arms, 3 workloads, 4 x 100": World({"draft": _MIX}, repeats=4, requests=100),
}
_UNEVEN = "uneven: 2 arms, 1 mix, 3 loads, 2 x 12 to 192"
WORLDS[_UNEVEN] = World(
    {"draft": {"json": dict.fromkeys((1, 4, 16), 0.1), "prose": dict.fromkeys((1, 4, 16), -0.1)}},
    loads=(1, 4, 16),
    requests={1: 12, 4: 48, 16: 192},
    pure=False,
    stall_share=0.0,
)
_SLOPE = {load: 0.25 * math.log2(6.0 / load) for load in (1, 2, 4, 8, 16, 32)}
CLIMB = World(
    {"draft": {"json": _SLOPE, "prose": _SLOPE}},
    loads=(1, 2, 4, 8, 16, 32),
    requests=48,
    pure=False,
    reaction_sd=0.0,
    ttft_share=0.0,
)
CROSSOVER_AT = 6.0


def coverage(name: str, studies: int, seed: int) -> dict[tuple[str, str], list[bool]]:
    """Whether each interval held the truth, by metric and kind of place."""
    world, rng = WORLDS[name], np.random.default_rng(seed)
    held: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(studies):
        study, measured = simulate(world, rng)
        for e in compare(study, measured).effects:
            if e.metric in SHOWN and math.isfinite(e.se_log):
                truth = true_ratios(world, e.arm, e.load.value)[e.metric, e.workload, e.segment]
                place = "segment" if e.segment else "mix" if e.workload == "mix" else "pure"
                held[e.metric, place].append(e.low <= truth <= e.high)
    return dict(held)


def coverage_by_load(name: str, studies: int, seed: int) -> dict[float, list[bool]]:
    """Whether the speedup's interval for the whole workload held the truth, by load."""
    world, rng = WORLDS[name], np.random.default_rng(seed)
    held: dict[float, list[bool]] = defaultdict(list)
    for _ in range(studies):
        _, measured = simulate(world, rng)
        for e in speedup_effects(measured, "baseline"):
            truth = true_ratios(world, e.arm, e.load.value)["speedup", e.workload, None]
            held[e.load.value].append(e.low <= truth <= e.high)
    return dict(held)


def crossovers(studies: int, seed: int) -> dict[str, list[bool]]:
    """Whether the crossover's interval held the load at which the truth crosses."""
    rng = np.random.default_rng(seed)
    held: dict[str, list[bool]] = defaultdict(list)
    for _ in range(studies):
        study, measured = simulate(CLIMB, rng)
        effects = compare(study, measured).effects
        for found in find_crossovers(effects, metric="speedup"):
            low = found.low if found.low is not None else 0.0
            high = found.high if found.high is not None else math.inf
            if found.outcome.startswith("always"):
                low, high = (max(found.loads), math.inf) if "better" in found.outcome else (0, 0)
            where = "whole" if found.segment is None else "segment"
            held[where].append(low <= CROSSOVER_AT <= high)
            held[f"{where}: bounded"].append(found.low is not None and found.high is not None)
    return dict(held)


BOUNDS = ("tpot", "ttft", "throughput")
EQUAL = {
    "demo, 2 equal candidates": replace(
        WORLDS["demo: 3 arms, 3 workloads, 2 x 32 requests"],
        gain={"draft": _SAME, "ngram": _SAME},
    ),
    "large, 1 equal candidate": replace(
        WORLDS["large: 2 arms, 3 workloads, 4 x 100"], gain={"draft": _SAME}
    ),
    "twice, 1 equal candidate": replace(
        WORLDS["twice: 2 arms, 1 mix, 2 x 64"], gain={"draft": _SAME}
    ),
}


def equal_arms(name: str, studies: int, seed: int) -> dict[tuple[str, str], list[bool]]:
    """Verdicts on studies whose candidate and baseline are one and the same, by bound."""
    world = replace(EQUAL[name], slo=Slo(ttft_s=0.5, tpot_s=0.03), reaction_sd=0.0)
    rng = np.random.default_rng(seed)
    held: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(studies):
        for bound, found in verdicts(world, rng).items():
            for wrong in (Decision.ON, Decision.SCHEDULE, Decision.OFF):
                held[bound, wrong.value].append(found is wrong)
            held[bound, "any of them"].append(found is not Decision.MEASURE_MORE)
    return dict(held)


def verdicts(world: World, rng: np.random.Generator) -> dict[str, Decision]:
    """One simulated study, all the way to its decision, for each bound of the service."""
    study, measured = simulate(world, rng)
    comparison = compare(study, measured)
    findings = Findings(
        study=study,
        summaries=summarise(study, measured),
        acceptance=(),
        effects=comparison.effects,
        noise_floors=comparison.noise_floors,
        signatures=comparison.signatures,
        crossovers=find_crossovers(comparison.effects),
    )
    found = {}
    for bound in BOUNDS:
        slo = replace(world.slo, bound=bound)
        bounded = replace(study, design=replace(study.design, slo=slo))
        held = replace(findings, study=bounded)
        found[bound] = decide(held, check_conditions(held, measured)).decision
    return found


@dataclass(frozen=True)
class Line:
    """One figure: a share with its Monte-Carlo error, and whether it is within its bar."""

    name: str
    share: float
    error: float
    count: int
    bar: tuple[float, float] | None = None

    @property
    def missed(self) -> bool:
        """Outside the bar by more than two Monte-Carlo errors."""
        return self.bar is not None and not (
            self.bar[0] - 2 * self.error <= self.share <= self.bar[1] + 2 * self.error
        )

    def __str__(self) -> str:
        mark = "  MISSED" if self.missed else ""
        return f"  {self.name:<34}{self.share:7.1%} +- {self.error:.1%}  of {self.count:,}{mark}"


def line(name: str, hits: list[bool], studies: int, bar: tuple[float, float] | None) -> Line:
    """Intervals of one study are not independent: the error counts studies."""
    share = float(np.mean(hits))
    error = math.sqrt(max(share * (1 - share), 0.25 / studies) / studies)
    return Line(name, share, error, len(hits), bar)


def in_parts(studies: int) -> list[tuple[int, int]]:
    """(studies, seed) of the parts that two processes work through."""
    size = 125
    return [(min(size, studies - done), 1000 + done) for done in range(0, studies, size)]


def merged(parts: Iterator[Mapping[object, list[bool]]]) -> dict[object, list[bool]]:
    together: dict[object, list[bool]] = defaultdict(list)
    for part in parts:
        for key, hits in part.items():
            together[key] += hits
    return together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--part", choices=["coverage", "crossover", "equal"])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    lines: list[Line] = []

    def report(found: Line) -> None:
        lines.append(found)
        print(found, flush=True)

    began = time.monotonic()
    parts = in_parts(options.studies)
    sizes, seeds = [p[0] for p in parts], [p[1] for p in parts]
    with ProcessPoolExecutor(options.processes) as pool:
        if options.part in (None, "coverage"):
            for name in WORLDS:
                print(f"95 % intervals, {name}")
                held = merged(pool.map(coverage, [name] * len(parts), sizes, seeds))
                for (metric, place), hits in sorted(held.items()):
                    report(line(f"{metric}, {place}", hits, options.studies, (0.93, 0.97)))
            print("the same by load, speedup of the mix")
            by_load = merged(pool.map(coverage_by_load, [_UNEVEN] * len(parts), sizes, seeds))
            for load, hits in by_load.items():
                report(line(f"{load} clients", hits, options.studies, (0.93, 0.97)))
        if options.part in (None, "crossover"):
            print("crossover at 6 clients, measured at 1 to 32, 2 x 48 requests")
            held = merged(pool.map(crossovers, sizes, seeds))
            for where, hits in sorted(held.items()):
                bar = None if "bounded" in where else (0.93, 0.97)
                report(line(where, hits, options.studies, bar))
        if options.part in (None, "equal"):
            for name in EQUAL:
                print(f"false verdicts on equal arms: {name}")
                held = merged(pool.map(equal_arms, [name] * len(parts), sizes, seeds))
                for (bound, wrong), hits in held.items():
                    bar = (0.0, 0.05) if wrong == "any of them" else None
                    report(line(f"{bound}-bound: {wrong}", hits, options.studies, bar))
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(any(found.missed for found in lines))


if __name__ == "__main__":
    main()
