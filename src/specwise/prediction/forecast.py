"""What to expect before anything runs: arms, loads, break-even acceptance, and what is not known.

A forecast has two halves. The closed forms here give break-even acceptance and the best k against
load, and the sensitivity of the answer to each unknown. The simulated study (`forecast_study`)
gives percentiles, goodput and the crossover, through the same analysis as a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from specwise.domain import (
    Arm,
    Checkpoint,
    Deployment,
    Gpu,
    LoadPoint,
    Loop,
    MeasuredTrial,
    Purpose,
    Segment,
    Slo,
    Speculation,
    StudyData,
    StudyDesign,
    Trial,
    Workload,
)
from specwise.errors import InputError
from specwise.planning.memory import ServingPlan, plan_memory
from specwise.prediction.costs import RooflineCosts, StepCosts, roofline
from specwise.prediction.speedup import Point, best_k, break_even_alpha, step_speedup
from specwise.prediction.study import SimArm, Traffic, limits_of, simulate_study

LARGEST_K = 8


@dataclass(frozen=True, slots=True)
class Prior:
    """Acceptance before it was measured: conditional by position, as published for a method.

    The last position's value stands for all later ones. ``drafted_share`` is below 1 for lookups.
    """

    conditional: tuple[float, ...]
    drafted_share: float
    source: str

    def at(self, position: int) -> float:
        """Conditional acceptance of a draft ``position`` (from 1)."""
        return self.conditional[min(position, len(self.conditional)) - 1]

    def positions(self, k: int) -> tuple[float, ...]:
        """The first ``k`` positions."""
        return tuple(self.at(i) for i in range(1, k + 1))

    def given_drafted(self, k: int) -> tuple[float, ...]:
        """The first ``k`` positions among steps that draft at all: what the simulation draws."""
        first, *rest = self.positions(k)
        return (min(first / self.drafted_share, 1.0) if self.drafted_share else 0.0, *rest)


_TRACES = "published traces, Llama-3.1-8B on ShareGPT, greedy; yours will differ: measure it"
PRIORS: Mapping[str, Prior] = {
    "draft_model": Prior((0.70,), 1.0, "a usual draft model; yours will differ: measure it"),
    "eagle3": Prior((0.62, 0.61, 0.66), 1.0, _TRACES),
    "eagle": Prior((0.62, 0.61, 0.66), 1.0, _TRACES),
    "mtp": Prior((0.80, 0.60), 1.0, "DeepSeek's MTP, first position; yours will differ"),
    "ngram": Prior((0.16, 0.80, 0.83), 0.50, _TRACES),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to speculate: its method, draft length, draft and expected acceptance."""

    name: str
    speculation: Speculation
    acceptance: Prior
    draft: Checkpoint | None = None


class Question(Protocol):
    """What a forecast answers: a `Scenario`, or a finished study at other loads.

    ``name`` and ``machine`` say of what; ``notes`` where the costs come from, empty for a roofline.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def machine(self) -> str: ...  # noqa: D102
    @property
    def gpu(self) -> Gpu | None: ...  # noqa: D102
    @property
    def gpus(self) -> int | None: ...  # noqa: D102
    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102
    @property
    def output_tokens(self) -> int: ...  # noqa: D102
    @property
    def mean_context(self) -> float: ...  # noqa: D102
    @property
    def loads(self) -> tuple[LoadPoint, ...]: ...  # noqa: D102
    @property
    def production(self) -> LoadPoint: ...  # noqa: D102
    @property
    def candidates(self) -> tuple[Candidate, ...]: ...  # noqa: D102
    @property
    def slo(self) -> Slo: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102
    def baseline_costs(self) -> StepCosts: ...  # noqa: D102
    def candidate_costs(self, candidate: Candidate) -> StepCosts: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked: a target on GPUs, its traffic, loads and candidates.

    ``costs`` takes the place of the roofline: fitted ones, by arm name, "baseline" among them.
    """

    target: Checkpoint
    gpu: Gpu
    gpus: int
    prompt_tokens: int
    output_tokens: int
    loads: tuple[LoadPoint, ...]
    production: LoadPoint
    candidates: tuple[Candidate, ...]
    slo: Slo
    temperature: float = 0.0
    context: int = 8192
    costs: Mapping[str, StepCosts] | None = None

    @property
    def name(self) -> str:
        """The target's."""
        return self.target.name

    @property
    def machine(self) -> str:
        """As ``4 x NVIDIA H100 SXM``."""
        return f"{self.gpus} x {self.gpu.name}"

    @property
    def notes(self) -> tuple[str, ...]:
        """None: the costs' own constants say where they come from."""
        return ()

    @property
    def mean_context(self) -> float:
        """Tokens cached for a request half-way through its output."""
        return self.prompt_tokens + self.output_tokens / 2

    def baseline_costs(self) -> StepCosts:
        """A step's price without speculation."""
        if self.costs is not None:
            return self.costs["baseline"]
        return roofline(self.target, self.gpu, tensor_parallel=self.gpus)

    def candidate_costs(self, candidate: Candidate, k: int | None = None) -> StepCosts:
        """A step's price with ``candidate``, at its own or another draft length."""
        if self.costs is not None:
            return self.costs[candidate.name]
        speculation = candidate.speculation
        if k is not None:
            speculation = replace(speculation, k=k)
        return roofline(
            self.target,
            self.gpu,
            tensor_parallel=self.gpus,
            speculation=speculation,
            draft=candidate.draft,
        )


@dataclass(frozen=True, slots=True)
class AtBatch:
    """A candidate at one number of running requests, in closed form.

    ``break_even`` is the acceptance alike at all positions at which nothing is won, None where no
    acceptance suffices; ``best_k`` is 0 where speculation should be off.
    """

    candidate: str
    batch: int
    speedup: float
    break_even: float | None
    best_k: int
    best_speedup: float


@dataclass(frozen=True, slots=True)
class Unknown:
    """How the decode speedup moves if one unknown is at its low or its high end."""

    candidate: str
    name: str
    low: str
    high: str
    speedup_low: float
    speedup_high: float

    @property
    def swing(self) -> float:
        """Size of the move, as a ratio of 1 or more."""
        low, high = sorted((self.speedup_low, self.speedup_high))
        return high / low

    @property
    def decides(self) -> bool:
        """Whether the sign of the answer depends on it."""
        return (self.speedup_low - 1) * (self.speedup_high - 1) < 0


def by_batch(scenario: Question, batches: Sequence[int]) -> tuple[AtBatch, ...]:
    """Speedup, break-even acceptance and best k of every candidate at each batch (req B5)."""
    baseline = scenario.baseline_costs()
    found = []
    for candidate in scenario.candidates:
        costs, k = scenario.candidate_costs(candidate), candidate.speculation.k
        for batch in batches:
            at = Point(batch, scenario.mean_context, candidate.acceptance.drafted_share)
            best, best_speedup = best_k(
                costs, baseline, at=at, conditional=candidate.acceptance.at, largest=LARGEST_K
            )
            found.append(
                AtBatch(
                    candidate=candidate.name,
                    batch=batch,
                    speedup=step_speedup(
                        costs, baseline, at=at, conditional=candidate.acceptance.positions(k)
                    ),
                    break_even=break_even_alpha(costs, baseline, at=at, k=k),
                    best_k=best,
                    best_speedup=best_speedup,
                )
            )
    return tuple(found)


def sensitivity(scenario: Question, batch: float) -> tuple[Unknown, ...]:
    """What moves the answer at ``batch`` running requests most, first.

    Every unknown is moved alone, to the ends of what it may reasonably be.
    """
    found = [u for c in scenario.candidates for u in _unknowns(scenario, c, batch)]
    return tuple(sorted(found, key=lambda unknown: -unknown.swing))


def _unknowns(scenario: Question, candidate: Candidate, batch: float) -> Iterator[Unknown]:
    def speedup(
        *,
        conditional: tuple[float, ...] | None = None,
        context: float | None = None,
        size: float = 1.0,
        change: Mapping[str, float] | None = None,
        host: Mapping[str, float] | None = None,
    ) -> float:
        prices = [scenario.baseline_costs(), scenario.candidate_costs(candidate)]
        moved = [_changed(price, change or {}, host or {}) for price in prices]
        at = Point(
            batch * size,
            scenario.mean_context if context is None else context,
            candidate.acceptance.drafted_share,
        )
        k = candidate.speculation.k
        held = candidate.acceptance.positions(k) if conditional is None else conditional
        return step_speedup(moved[1], moved[0], at=at, conditional=held)

    name, k = candidate.name, candidate.speculation.k
    prior = candidate.acceptance.positions(k)
    ends = [tuple(min(max(a + move, 0.0), 1.0) for a in prior) for move in (-0.15, 0.15)]
    yield Unknown(
        name,
        "acceptance",
        "0.15 lower at each position",
        "0.15 higher",
        *(speedup(conditional=e) for e in ends),
    )
    yield Unknown(
        name,
        "running requests",
        "half as many",
        "twice as many",
        speedup(size=0.5),
        speedup(size=2.0),
    )
    yield Unknown(
        name,
        "context",
        "half as long",
        "four times as long",
        speedup(context=scenario.mean_context / 2),
        speedup(context=scenario.mean_context * 4),
    )
    if not isinstance(scenario.baseline_costs(), RooflineCosts):
        return
    for field, text in (("bandwidth", "share of bandwidth"), ("flops", "share of FLOP/s")):
        yield Unknown(
            name,
            text,
            "a tenth lower",
            "a tenth higher",
            speedup(change={field: 0.9}),
            speedup(change={field: 1.1}),
        )
    yield Unknown(
        name,
        "host time a step",
        "none",
        "twice",
        speedup(host={"step_s": 0.0, "speculation_s": 0.0}),
        speedup(host={"step_s": 2.0, "speculation_s": 2.0}),
    )
    if candidate.speculation.method != "ngram":
        yield Unknown(
            name,
            "launch time of a draft pass",
            "none",
            "three times",
            speedup(host={"draft_pass_s": 0.0}),
            speedup(host={"draft_pass_s": 3.0}),
        )


def _changed(price: StepCosts, change: Mapping[str, float], host: Mapping[str, float]) -> StepCosts:
    if not isinstance(price, RooflineCosts):
        return price
    efficiency = replace(
        price.efficiency,
        **{name: getattr(price.efficiency, name) * by for name, by in change.items()},
    )
    overheads = replace(
        price.overheads,
        **{name: getattr(price.overheads, name) * by for name, by in host.items()},
    )
    return replace(price, efficiency=efficiency, overheads=overheads)


# ---------------------------------------------------------------------------------------------
# The simulated study

_SEGMENT = "traffic"
_REQUESTS = (48, 400)


def forecast_study(scenario: Scenario, *, seed: int = 0, repeats: int = 2) -> StudyData:
    """Every arm at every load, simulated, as a study marked predicted.

    Prompts and outputs vary around their means as real ones do (log-normal, deviation 0.5). Raises
    InputError where the model leaves no room for a KV cache on these GPUs.
    """
    design = _design(scenario, seed, repeats)
    rng = np.random.default_rng([seed, 1])
    sizes = rng.lognormal(-0.125, 0.5, (512, 2)) * (scenario.prompt_tokens, scenario.output_tokens)
    largest = (scenario.context // 2, scenario.context // 2 - LARGEST_K - 1)
    bounded = np.clip(np.rint(sizes), 2, largest).astype(int)
    traffic = {_SEGMENT: Traffic(tuple((int(p), int(o)) for p, o in bounded))}
    provenance: dict[str, Any] = {
        "target": scenario.target.name,
        "gpu": scenario.gpu.name,
        "gpus": scenario.gpus,
        "acceptance": {c.name: c.acceptance.source for c in scenario.candidates},
        "costs": "fitted" if scenario.costs is not None else "roofline",
    }
    return simulate_study(
        design,
        arms=_arms(scenario),
        traffic=traffic,
        arrivals=poisson_arrivals,
        provenance=provenance,
        on_trial=_nothing,
    )


def poisson_arrivals(trial: Trial, rng: np.random.Generator) -> Sequence[float]:
    """When the requests of an open-loop trial come, seconds."""
    gaps = rng.exponential(1 / trial.load.value, trial.requests)
    return [float(at) for at in np.cumsum(gaps)]


def _nothing(_: MeasuredTrial) -> None:
    """A forecast shows no progress: it takes seconds."""


def _arms(scenario: Scenario) -> dict[str, SimArm]:
    arms = {"baseline": SimArm(scenario.baseline_costs(), limits_of(_memory(scenario, None), None))}
    for candidate in scenario.candidates:
        memory = _memory(scenario, candidate.draft)
        if not memory.fits:
            raise InputError(
                f"{scenario.target.name} with {candidate.name} leaves no KV cache for a request "
                f"of {scenario.context} tokens on {scenario.gpus} x {scenario.gpu.name}.",
                "See `specwise memory` with the same options; more GPUs, or fewer bits.",
            )
        arms[candidate.name] = SimArm(
            costs=scenario.candidate_costs(candidate),
            config=limits_of(memory, candidate.speculation),
            acceptance={_SEGMENT: candidate.acceptance.given_drafted(candidate.speculation.k)},
            draft_probability={_SEGMENT: candidate.acceptance.drafted_share},
        )
    return arms


def _memory(scenario: Scenario, draft: Checkpoint | None) -> Any:
    plan = ServingPlan(
        target=scenario.target,
        gpu=scenario.gpu,
        gpus=scenario.gpus,
        draft=draft,
        draft_tensor_parallel=scenario.gpus,
        context=scenario.context,
    )
    found = plan_memory(plan)
    if not found.fits:
        raise InputError(
            f"{scenario.target.name} leaves no KV cache for a request of {scenario.context} tokens "
            f"on {scenario.gpus} x {scenario.gpu.name}.",
            "See `specwise memory` with the same options; more GPUs, or fewer bits.",
        )
    return found


def planned_trials(
    arms: Sequence[Arm],
    workload: str,
    loads: Sequence[LoadPoint],
    repeats: int,
    requests_at: Mapping[LoadPoint, int] | None = None,
) -> tuple[Trial, ...]:
    """Every arm at every load, with ``requests_at`` that load, by default enough for it."""
    trials: list[Trial] = []
    fewest, most = _REQUESTS
    for repeat in range(repeats):
        for load in loads:
            requests = int(min(max(fewest, 4 * load.value), most))
            if load.loop is Loop.OPEN:
                requests = int(min(max(120, 30 * load.value), most))
            requests = (requests_at or {}).get(load, requests)
            for arm in arms:
                trials.append(
                    Trial(
                        f"{len(trials) + 1:04d}-{arm.name}-{load.label}-r{repeat}",
                        arm.name,
                        workload,
                        load,
                        repeat,
                        Purpose.MEASURE,
                        requests,
                    )
                )
    return tuple(trials)


def _design(scenario: Scenario, seed: int, repeats: int) -> StudyDesign:
    deployment = Deployment(model=scenario.target.name, engine="predicted")
    arms = (
        Arm("baseline", deployment=deployment),
        *(Arm(c.name, c.speculation, deployment) for c in scenario.candidates),
    )
    return StudyDesign(
        name=f"forecast of {scenario.target.name}",
        seed=seed,
        arms=arms,
        segments=(
            Segment(
                _SEGMENT,
                "predicted",
                temperature=scenario.temperature,
                max_tokens=scenario.output_tokens,
            ),
        ),
        workloads=(Workload(_SEGMENT, ((_SEGMENT, 1.0),)),),
        loads=scenario.loads,
        production_load=scenario.production,
        production_workload=_SEGMENT,
        slo=scenario.slo,
        trials=planned_trials(arms, _SEGMENT, scenario.loads, repeats),
        timeout_s=math.inf,
    )
