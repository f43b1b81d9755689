"""Studies simulated as columns, thousands of them, with every ratio between the arms known.

A request's time is prompt x arm x trial x its own noise. The prompt is shared by the arms; the
arm's effect differs a little from prompt to prompt; a trial runs fast or slow as a whole, now and
then much slower (Student t with 5 degrees of freedom); a request's own noise is lognormal with a
heavy tail: a few stall for a Pareto-distributed multiple of their time. Closed-loop clients take
the next request when theirs ends, so rates have the edges that real trials have.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import CellKey, TrialTable
from specwise.domain import (
    Arm,
    ClientHealth,
    LoadPoint,
    Loop,
    Outcome,
    Purpose,
    RequestRecord,
    Segment,
    Slo,
    Speculation,
    StudyData,
    StudyDesign,
    Trial,
    TrialPart,
    Workload,
)

Floats = NDArray[np.float64]
_CLIENT = ClientHealth(0.0001, 0.0006, 0.0005, 0.05)
_TPOT_S, _TTFT_S = 0.02, 0.2


@dataclass(frozen=True)
class World:
    """What studies are made from. ``gain[arm][segment]`` is log(speedup of TPOT) by load.

    ``ttft_ratio`` is candidate / baseline. ``requests`` of a trial may depend on the load. The
    noises are standard deviations of logs; a request stalls with probability ``stall_share`` and
    then takes 1 + Pareto(``stall_shape``) times as long. ``ttft_share`` scales TTFT, 0 for studies
    in which only decoding takes time.
    """

    gain: Mapping[str, Mapping[str, Mapping[float, float]]]
    shares: Mapping[str, float] = field(default_factory=lambda: {"json": 0.5, "prose": 0.5})
    loads: tuple[float, ...] = (16,)
    repeats: int = 2
    requests: int | Mapping[float, int] = 32
    noise_floor: bool = True
    pure: bool = True
    ttft_ratio: Mapping[str, float] = field(default_factory=dict)
    ttft_share: float = 1.0
    trial_sd: float = 0.03
    prompt_sd: float = 0.25
    reaction_sd: float = 0.05
    request_sd: float = 0.10
    stall_share: float = 0.03
    stall_shape: float = 2.5
    slo: Slo = field(default_factory=lambda: Slo(ttft_s=0.5, tpot_s=0.03))

    def __hash__(self) -> int:
        return hash(repr(self))

    def requests_at(self, load: LoadPoint) -> int:
        """Requests of a trial there."""
        return self.requests if isinstance(self.requests, int) else self.requests[load.value]

    def design(self) -> StudyDesign:
        """The study file these studies would have had; its mix is production's workload."""
        loads = tuple(LoadPoint(Loop.CLOSED, value) for value in self.loads)
        segments = tuple(Segment(name, "x", temperature=0.4) for name in self.shares)
        mix = Workload("mix", tuple(self.shares.items()))
        workloads = (*(Workload(s.name, ((s.name, 1.0),)) for s in segments), mix)
        arms = (
            Arm("baseline", url="http://127.0.0.1:1"),
            *(Arm(name, Speculation("ngram", 3), url="http://127.0.0.1:2") for name in self.gain),
        )
        return StudyDesign(
            name="simulated",
            seed=0,
            arms=arms,
            segments=segments,
            workloads=workloads if self.pure else workloads[-1:],
            loads=loads,
            production_load=loads[-1],
            production_workload="mix",
            slo=self.slo,
            trials=(),
            timeout_s=60.0,
        )


def simulate(
    world: World, rng: np.random.Generator
) -> tuple[StudyData, dict[CellKey, tuple[TrialTable, ...]]]:
    """One study: its design, and its trials as columns."""
    design = world.design()
    measured: dict[CellKey, tuple[TrialTable, ...]] = {}
    trials: list[Trial] = []
    for workload in design.workloads:
        for load in design.loads:
            n = world.requests_at(load)
            shares = dict(workload.shares)
            prompts = [_prompts(world, shares, n, rng) for _ in range(world.repeats)]
            plans = [(arm.name, Purpose.MEASURE, world.repeats) for arm in design.arms]
            if world.noise_floor and workload.is_mix:
                plans.append(("baseline", Purpose.NOISE_FLOOR, 1))
            for arm, purpose, repeats in plans:
                tables = []
                for repeat in range(repeats):
                    name = f"{arm}-{workload.name}-{load.label}-{purpose.value}-{repeat}"
                    trial = Trial(name, arm, workload.name, load, repeat, purpose, n)
                    tables.append(_trial(world, trial, prompts[repeat], rng))
                    trials.append(trial)
                measured[arm, workload.name, load, purpose] = tuple(tables)
    design = replace(design, trials=tuple(trials))
    return StudyData(design, {}, (), "simulated"), measured


@dataclass(frozen=True)
class _Prompts:
    segment: NDArray[np.object_]
    tokens: Floats
    hardness: Floats
    prefill: Floats


def _prompts(
    world: World, shares: Mapping[str, float], n: int, rng: np.random.Generator
) -> _Prompts:
    counts = [round(share * n) for share in shares.values()]
    counts[-1] = n - sum(counts[:-1])
    segment = np.repeat(np.array(list(shares), dtype=np.object_), counts)
    rng.shuffle(segment)
    return _Prompts(
        segment,
        np.clip(np.round(np.exp(rng.normal(3.9, 0.4, n))), 8, 256),
        rng.normal(0.0, world.prompt_sd, n),
        rng.normal(0.0, 0.3, n),
    )


def _own_noise(world: World, n: int, rng: np.random.Generator, sd: float) -> Floats:
    stalled = rng.random(n) < world.stall_share
    return np.exp(rng.normal(0.0, sd, n)) * np.where(
        stalled, 1.0 + rng.pareto(world.stall_shape, n), 1.0
    )


def _pace(world: World, rng: np.random.Generator) -> float:
    return float(np.exp(world.trial_sd * rng.standard_t(5) / np.sqrt(5 / 3)))


def _times(
    world: World,
    served: tuple[str, float],
    prompts: _Prompts,
    paces: tuple[Floats | float, Floats | float],
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """TTFT and TPOT of each request, ``served`` by (arm, load)."""
    arm, load = served
    n = len(prompts.tokens)
    gains = world.gain.get(arm, {})
    gain = np.zeros(n)
    for name in gains:
        gain[prompts.segment == name] = gains[name][load]
    spread = world.reaction_sd
    reaction = rng.normal(-(spread**2) / 2, spread, n) * bool(gains)
    tpot = _TPOT_S * np.exp(prompts.hardness - gain + reaction) * paces[0]
    ratio = world.ttft_share * world.ttft_ratio.get(arm, 1.0)
    ttft = _TTFT_S * ratio * np.exp(prompts.prefill) * paces[1]
    return (
        ttft * _own_noise(world, n, rng, 2 * world.request_sd),
        tpot * _own_noise(world, n, rng, world.request_sd),
    )


def _trial(world: World, trial: Trial, prompts: _Prompts, rng: np.random.Generator) -> TrialTable:
    n = trial.requests
    pace = _pace(world, rng)
    paces = (pace, pace * float(np.exp(rng.normal(0.0, world.trial_sd / 2))))
    ttft, tpot = _times(world, (trial.arm, trial.load.value), prompts, paces, rng)
    decode = tpot * (prompts.tokens - 1)
    e2e = ttft + decode
    free = [0.0] * int(trial.load.value)
    start = np.empty(n)
    for i, duration in enumerate(e2e):
        start[i] = heapq.heappop(free)
        heapq.heappush(free, start[i] + duration)
    finish = start + e2e
    end = float(finish[finish >= start[-1]].min())
    inside = np.clip((end - start - ttft) / np.maximum(decode, 1e-12), 0.0, 1.0)
    slo = world.slo
    meets = (ttft <= (slo.ttft_s or np.inf)) & (tpot <= (slo.tpot_s or np.inf))
    return TrialTable(
        trial=trial,
        records=tuple(
            RequestRecord(i, str(i), s, 0.4, 0, 0.0, 0.0, (), (), 1.0, Outcome.OK)
            for i, s in enumerate(prompts.segment)
        ),
        parts=(TrialPart("", end, _CLIENT),),
        index=np.arange(n),
        prompt_id=np.array(
            [f"{trial.workload}-{trial.load.label}-{trial.repeat}-{i}" for i in range(n)],
            dtype=np.object_,
        ),
        segment=prompts.segment,
        ok=np.ones(n, dtype=np.bool_),
        meets_slo=meets,
        ttft_s=ttft,
        ttft_from_sent_s=ttft,
        tpot_s=tpot,
        e2e_s=e2e,
        e2e_from_sent_s=e2e,
        output_tokens=prompts.tokens,
        window_tokens=prompts.tokens * inside,
        window_s=end,
    )


@cache
def true_ratios(world: World, arm: str, load: float) -> Mapping[tuple[str, str, str | None], float]:
    """The ratio that each effect estimates, by (metric, workload, segment): the same metric of a
    population of some million requests served in thousands of trials."""
    rng = np.random.default_rng(11)
    n = 1_500_000
    names = np.array(list(world.shares), dtype=np.object_)
    segment = rng.choice(names, n, p=list(world.shares.values()))
    prompts = _Prompts(
        segment,
        np.clip(np.round(np.exp(rng.normal(3.9, 0.4, n))), 8, 256),
        rng.normal(0.0, world.prompt_sd, n),
        rng.normal(0.0, 0.3, n),
    )
    columns = {}
    for name in ("baseline", arm):
        own = np.random.default_rng(12)  # the arms share their draws, so that only truth differs
        scale = np.exp(world.trial_sd * own.standard_t(5, n) / np.sqrt(5 / 3))
        paces = (scale, scale * np.exp(own.normal(0.0, world.trial_sd / 2, n)))
        ttft, tpot = _times(world, (name, load), prompts, paces, own)
        columns[name] = {"ttft": ttft, "tpot": tpot, "e2e": ttft + tpot * (prompts.tokens - 1)}
    found: dict[tuple[str, str, str | None], float] = {}
    everywhere = np.ones(n, dtype=np.bool_)
    views = [("mix", None, everywhere)]
    for name in names:
        rows = segment == name
        views += [("mix", name, rows), (name, None, rows)]
    for workload, part, rows in views:
        tokens = prompts.tokens[rows].sum()
        sides = []
        for side in ("baseline", arm):
            c = {key: values[rows] for key, values in columns[side].items()}
            figures = {"speedup": c["e2e"].sum() / tokens}
            for key, values in c.items():
                figures[f"{key}_mean"] = values.mean()
                for kind, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
                    figures[f"{key}_{kind}"] = float(np.quantile(values, q))
            good = (c["ttft"] <= (world.slo.ttft_s or np.inf)) & (
                c["tpot"] <= (world.slo.tpot_s or np.inf)
            )
            figures["output_tokens_per_s"] = tokens / c["e2e"].sum()
            figures["goodput_per_s"] = good.sum() / c["e2e"].sum()
            sides.append(figures)
        for metric, value in sides[0].items():
            ratio = sides[1][metric] / value
            found[metric, workload, part] = 1 / ratio if metric == "speedup" else ratio
    return found
