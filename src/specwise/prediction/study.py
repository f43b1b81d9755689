"""A study without servers: every trial of a design, simulated, in the records of a measurement."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    ClientHealth,
    GaugeSample,
    Loop,
    MeasuredTrial,
    Outcome,
    RequestRecord,
    Speculation,
    StudyData,
    StudyDesign,
    Trial,
    TrialPart,
    Workload,
)
from specwise.errors import InputError
from specwise.planning.memory import MemoryPlan
from specwise.prediction.costs import StepCosts
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, SimRun, simulate

_NO_CLIENT = ClientHealth(0.0, 0.0, 0.0, 0.0)
_GAUGE_PERIOD_S = 1.0
_FEWEST_SAMPLES = 20


@dataclass(frozen=True, slots=True)
class Traffic:
    """The sizes of a segment's requests: each request takes one (prompt, output) pair of tokens."""

    sizes: tuple[tuple[int, int], ...]
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SimArm:
    """What an arm is made of: its step costs, its engine's limits, and acceptance by segment.

    ``acceptance`` is conditional, one probability a draft position; ``draft_probability`` as in
    `SimRequest`. A baseline has neither. Requests that are sent at one moment reach the engine
    ``spacing_s`` apart (closed loop).
    """

    costs: StepCosts
    config: SchedulerConfig
    acceptance: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    draft_probability: Mapping[str, float] = field(default_factory=dict)
    spacing_s: float = 0.0


def limits_of(memory: MemoryPlan, speculation: Speculation | None) -> SchedulerConfig:
    """The engine's limits that follow from a memory plan: its likely KV pool, and vLLM's defaults.

    Asynchronous scheduling is on unless drafts are looked up on the CPU (vLLM 0.32,
    ``config/vllm.py``). Raises InputError where the pool has no block.
    """
    plan = memory.plan
    return SchedulerConfig(
        max_num_batched_tokens=plan.batched_tokens,
        max_num_seqs=plan.sequences,
        kv_tokens=max(int(memory.tokens.likely), 0),
        max_model_len=plan.context,
        method=speculation.method if speculation else None,
        k=speculation.k if speculation else 0,
        schedule=speculation.schedule if speculation else (),
        async_scheduling=speculation is None or speculation.method not in ("ngram", "suffix"),
    )


def simulate_study(
    design: StudyDesign,
    *,
    arms: Mapping[str, SimArm],
    traffic: Mapping[str, Traffic],
    arrivals: Callable[[Trial, np.random.Generator], Sequence[float]],
    provenance: Mapping[str, Any],
    on_trial: Callable[[MeasuredTrial], None] = lambda _: None,
    own_luck: bool = False,
) -> StudyData:
    """Every trial of ``design``, marked as predicted.

    ``arrivals`` gives an open-loop trial's arrival times (seconds from its start). As in a
    measurement, all arms of a (workload, load, repeat) get the same requests at the same times, and
    the A/A trial repeats its twin exactly, since a simulation has no noise of its own. Drafts are
    accepted by the same draws in all arms, which tells arms apart with fewer requests; with
    ``own_luck`` each arm has its own, as servers have. Raises
    InputError for an arm or segment without description, or requests that could never be served.
    """
    _check(design, arms, traffic)
    trials = []
    for trial in design.trials:
        luck = zlib.crc32(trial.arm.encode()) if own_luck else 0
        measured = _simulate_trial(design, trial, arms[trial.arm], traffic, arrivals, luck=luck)
        on_trial(measured)
        trials.append(measured)
    return StudyData(
        design=design,
        provenance={**provenance, "predicted": True},
        trials=tuple(trials),
        folder="",
        predicted=True,
    )


def _check(design: StudyDesign, arms: Mapping[str, SimArm], traffic: Mapping[str, Traffic]) -> None:
    for arm in design.arms:
        if arm.name not in arms:
            raise InputError(f"Nothing is known about the costs of arm {arm.name!r}.")
        missing = [s.name for s in design.segments if s.name not in arms[arm.name].acceptance]
        if not arm.is_baseline and missing:
            raise InputError(
                f"Arm {arm.name!r} has no acceptance for segment {', '.join(missing)}.",
                "Give one probability a draft position.",
            )
    unknown = [s.name for s in design.segments if not (s.name in traffic and traffic[s.name].sizes)]
    if unknown:
        raise InputError(
            f"Segment {', '.join(unknown)} has no request sizes.", "Give (prompt, output) tokens."
        )


def _simulate_trial(
    design: StudyDesign,
    trial: Trial,
    arm: SimArm,
    traffic: Mapping[str, Traffic],
    arrivals: Callable[[Trial, np.random.Generator], Sequence[float]],
    *,
    luck: int,
) -> MeasuredTrial:
    workload = design.workload(trial.workload)
    cell = [design.workloads.index(workload), design.loads.index(trial.load), trial.repeat]
    times: Sequence[float | None] = [None] * trial.requests
    if trial.load.loop is Loop.OPEN:
        times = arrivals(trial, np.random.default_rng([design.seed, 3, *cell]))
    rng = np.random.default_rng([design.seed, 2, *cell])
    chosen = _requests(workload, trial.requests, traffic, rng)
    requests = [
        SimRequest(
            prompt_tokens=size[0],
            output_tokens=size[1],
            arrival_s=at,
            segment=segment,
            temperature=design.segment(segment).temperature,
            acceptance=arm.acceptance.get(segment, ()) if arm.config.method else (),
            draft_probability=arm.draft_probability.get(segment, 1.0),
            cached_prompt_tokens=traffic[segment].cached_prompt_tokens,
        )
        for (segment, size), at in zip(chosen, times, strict=True)
    ]
    run = simulate(
        requests,
        arm.costs,
        arm.config,
        rng=np.random.default_rng([design.seed, 4, *cell, *([luck] if luck else [])]),
        concurrency=int(trial.load.value) if trial.load.loop is Loop.CLOSED else None,
        spacing_s=arm.spacing_s,
        trace=True,
    )
    names = [f"{segment}-{cell[1]}-{trial.repeat}-{i}" for i, (segment, _) in enumerate(chosen)]
    return MeasuredTrial(trial, records(run, names), (_part(run),), complete=True)


def _requests(
    workload: Workload,
    count: int,
    traffic: Mapping[str, Traffic],
    rng: np.random.Generator,
) -> list[tuple[str, tuple[int, int]]]:
    """Segment and size of each request, shuffled; shares as exact as whole requests allow."""
    names = [name for name, _ in workload.shares]
    exact = np.array([share for _, share in workload.shares]) * count
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact)[: count - counts.sum()]:
        counts[index] += 1
    segments = [names[i] for i in rng.permutation(np.repeat(np.arange(len(names)), counts))]
    picks = rng.random(count)
    return [
        (name, traffic[name].sizes[int(pick * len(traffic[name].sizes))])
        for name, pick in zip(segments, picks, strict=True)
    ]


def records(run: SimRun, prompt_ids: Sequence[str], *, part: int = 0) -> tuple[RequestRecord, ...]:
    """A simulated run as the records a measurement would have written, in order of requests."""
    found = []
    for index, (request, live) in enumerate(zip(run.requests, run.served, strict=True)):
        times, tokens = run.chunks(index)
        acceptance = None
        if run.k:
            acceptance = AcceptanceCounts(
                AcceptanceSource.PER_REQUEST, live.steps_by_accepted(run.k), live.drafted
            )
        found.append(
            RequestRecord(
                index=index,
                prompt_id=prompt_ids[index],
                segment=request.segment,
                temperature=request.temperature,
                part=part,
                intended_s=live.arrival_s,
                sent_s=live.arrival_s,
                chunk_s=tuple(times.tolist()),
                chunk_tokens=tuple(tokens.tolist()),
                finished_s=live.finished_s,
                outcome=Outcome.OK,
                status=200,
                prompt_tokens=request.prompt_tokens,
                output_tokens=live.output,
                cached_tokens=live.cached,
                finish_reason="length",
                acceptance=acceptance,
            )
        )
    return tuple(found)


def _part(run: SimRun) -> TrialPart:
    counters: dict[str, float] = {
        "prompt_tokens": sum(request.prompt_tokens for request in run.requests),
        "generation_tokens": int(run.output_tokens.sum()),
        "prefix_cache_queries": sum(request.prompt_tokens for request in run.requests),
        "prefix_cache_hits": sum(live.cached for live in run.served),
        "preemptions": run.preemptions,
        "request_success": len(run.requests),
    }
    if run.k:
        by_accepted = np.sum([live.steps_by_accepted(run.k) for live in run.served], axis=0)
        at_least = by_accepted[::-1].cumsum()[::-1]
        counters |= {
            "spec_drafts": int(at_least[0]),
            "spec_draft_tokens": sum(live.drafted for live in run.served),
            "spec_accepted_tokens": int(at_least[1:].sum()),
        }
        counters |= {f"spec_accepted_pos_{i}": int(n) for i, n in enumerate(at_least[1:])}
    return TrialPart(
        started_at="",
        duration_s=run.duration_s,
        client=_NO_CLIENT,
        counters=counters,
        gauges=_gauges(run),
    )


def _gauges(run: SimRun) -> tuple[GaugeSample, ...]:
    """The engine at regular moments, as a scrape would have found it: in the step of the moment."""
    trace = run.trace
    if trace is None:
        return ()
    period_s = min(_GAUGE_PERIOD_S, run.duration_s / _FEWEST_SAMPLES)
    samples = []
    for at_s in np.arange(period_s, run.duration_s, period_s).tolist():
        step = int(run.ends_s.searchsorted(at_s))
        idle = at_s < run.ends_s[step] - trace.duration_s[step]
        samples.append(
            GaugeSample(
                at_s=round(at_s, 3),
                running=0.0 if idle else float(trace.running[step]),
                waiting=0.0 if idle else float(trace.waiting[step]),
                kv_use=0.0 if idle else float(trace.blocks[step] / run.pool_blocks),
            )
        )
    return tuple(samples)
