"""Studies with a known truth, shaped like the demo's, for tests of everything that reads a study.

A request draws its output length and its difficulty from its prompt, so that arms share them; each
step accepts drafts with the segment's conditional probability; each trial runs a little fast or
slow as a whole. Closed-loop clients take the next request when theirs ends.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Arm,
    ClientHealth,
    GaugeSample,
    LoadPoint,
    Loop,
    MeasuredTrial,
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

HEALTHY_CLIENT = ClientHealth(
    lateness_s_p50=0.0001, lateness_s_p99=0.0006, loop_lag_s_p99=0.0005, cpu_share=0.05
)
C1, C4, C16 = (LoadPoint(Loop.CLOSED, value) for value in (1, 4, 16))
BASE_TPOT_S = {1: 0.020, 4: 0.024, 16: 0.045}
BASE_TTFT_S = {1: 0.045, 4: 0.070, 16: 0.160}

DRAFT_MODEL = {  # speedup of the output tokens by segment and concurrency
    "json": {1: 1.9, 4: 1.5, 16: 1.25},
    "prose": {1: 1.18, 4: 0.97, 16: 0.78},
    "copy": {1: 2.0, 4: 1.5, 16: 1.15},
}
NGRAM = {
    "json": {1: 1.15, 4: 1.05, 16: 0.97},
    "prose": {1: 0.98, 4: 0.94, 16: 0.90},
    "copy": {1: 1.8, 4: 1.5, 16: 1.3},
}
ACCEPTANCE = {  # conditional, the same at every position
    "draft_model": {"json": 0.9, "prose": 0.4, "copy": 0.85},
    "ngram": {"json": 0.45, "prose": 0.15, "copy": 0.8},
}


@dataclass(frozen=True)
class Truth:
    """What a synthetic study is made from; the defaults are the demo's story."""

    speedup: Mapping[str, Mapping[str, Mapping[float, float]]] = field(
        default_factory=lambda: {"draft_model": DRAFT_MODEL, "ngram": NGRAM}
    )
    ttft_ratio: Mapping[str, float] = field(default_factory=dict)
    acceptance: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: ACCEPTANCE)
    trial_sd: float = 0.02
    request_sd: float = 0.06
    failure_share: Mapping[str, float] = field(default_factory=dict)


def demo_design(
    *,
    repeats: int = 2,
    requests: int = 32,
    noise_floor: bool = True,
    slo: Slo | None = None,
    production_workload: str = "mix",
    production_load: LoadPoint = C16,
    loads: tuple[LoadPoint, ...] = (C1, C4, C16),
    arms: tuple[Arm, ...] | None = None,
) -> StudyDesign:
    """Baseline, draft_model and ngram on json (T=0), prose (T=0.8), copy (T=0) and their mix."""
    arms = arms or (
        Arm("baseline", url="http://127.0.0.1:8000"),
        Arm("draft_model", Speculation("draft_model", 4, draft="draft"), url="http://x"),
        Arm("ngram", Speculation("ngram", 4), url="http://y"),
    )
    segments = (
        Segment("json", "bundled:json", temperature=0.0, max_tokens=64),
        Segment("prose", "bundled:prose", temperature=0.8, max_tokens=64),
        Segment("copy", "bundled:copy", temperature=0.0, max_tokens=64),
    )
    mix = Workload("mix", (("json", 0.4), ("prose", 0.4), ("copy", 0.2)))
    workloads = (*(Workload(s.name, ((s.name, 1.0),)) for s in segments), mix)
    trials: list[Trial] = []
    for repeat in range(repeats):
        for workload in workloads:
            for load in loads:
                purposes = [(arm.name, Purpose.MEASURE) for arm in arms]
                if noise_floor and repeat == 0 and workload.name == production_workload:
                    purposes.append((arms[0].name, Purpose.NOISE_FLOOR))
                for arm, purpose in purposes:
                    suffix = "-aa" if purpose is Purpose.NOISE_FLOOR else ""
                    name = f"{len(trials) + 1:04d}-{arm}-{workload.name}-{load.label}-r{repeat}"
                    trials.append(
                        Trial(name + suffix, arm, workload.name, load, repeat, purpose, requests)
                    )
    return StudyDesign(
        name="synthetic",
        seed=1,
        arms=arms,
        segments=segments,
        workloads=workloads,
        loads=loads,
        production_load=production_load,
        production_workload=production_workload,
        slo=slo or Slo(ttft_s=0.5, tpot_s=0.08),
        trials=tuple(trials),
        timeout_s=60.0,
    )


def demo_study(
    design: StudyDesign | None = None,
    truth: Truth | None = None,
    *,
    seed: int = 0,
    source: AcceptanceSource = AcceptanceSource.PER_REQUEST,
    client: ClientHealth = HEALTHY_CLIENT,
) -> StudyData:
    """A measured study: json wins at every load, prose at T=0.8 loses at c16, the mix hides it."""
    design, truth = design or demo_design(), truth or Truth()
    rng = np.random.default_rng(seed)
    return StudyData(
        design=design,
        provenance={"specwise": "0.1.0", "vllm": {"baseline": "0.32.0"}, "hardware": "2 cores"},
        trials=tuple(
            _trial(design, truth, trial, source=source, client=client, rng=rng)
            for trial in design.trials
        ),
        folder="synthetic-study",
    )


def without(study: StudyData, *, trials: set[str]) -> StudyData:
    """The study as if those trials had been interrupted."""
    return replace(
        study,
        trials=tuple(
            replace(t, complete=t.complete and t.trial.trial_id not in trials) for t in study.trials
        ),
    )


def _segments(design: StudyDesign, trial: Trial) -> list[str]:
    """Deals the trial's requests out to the workload's segments, the same for every arm."""
    order = np.random.default_rng([7, trial.repeat, int(trial.load.value)])
    dealt: list[str] = []
    for name, share in design.workload(trial.workload).shares:
        dealt += [name] * round(share * trial.requests)
    dealt = (dealt + [design.workload(trial.workload).shares[0][0]] * trial.requests)[
        : trial.requests
    ]
    order.shuffle(dealt)
    return dealt


def _trial(
    design: StudyDesign,
    truth: Truth,
    trial: Trial,
    *,
    source: AcceptanceSource,
    client: ClientHealth,
    rng: np.random.Generator,
) -> MeasuredTrial:
    load = trial.load.value
    pace = float(np.exp(rng.normal(0.0, truth.trial_sd)))
    clients = [0.0] * int(load if trial.load.loop is Loop.CLOSED else trial.requests)
    gaps = np.random.default_rng([9, trial.repeat]).exponential(1 / load, trial.requests)
    records = []
    for index, segment in enumerate(_segments(design, trial)):
        slot = int(np.argmin(clients))
        closed = trial.load.loop is Loop.CLOSED
        start = clients[slot] if closed else float(gaps[: index + 1].sum())
        record = _request(
            design,
            truth,
            trial,
            index=index,
            segment=segment,
            start=start,
            pace=pace,
            source=source,
            rng=rng,
        )
        clients[slot] = record.finished_s
        records.append(record)
    duration = max(r.finished_s for r in records)
    part = TrialPart(
        started_at="2026-11-22T20:00:00Z",
        duration_s=duration,
        client=client,
        counters=_counters(design.arm(trial.arm), records),
        gauges=tuple(
            GaugeSample(duration * share, running=min(load, 16.0), waiting=0.0, kv_use=0.02 * load)
            for share in (0.25, 0.5, 0.75)
        ),
    )
    return MeasuredTrial(trial, tuple(records), (part,), complete=True)


def _nearest(table: Mapping[float, float], load: float) -> float:
    return table[min(table, key=lambda known: abs(math.log(known / load)))]


@cache
def _prompt(*key: int) -> tuple[int, float]:
    """Tokens that the prompt leads to, and how hard they are: the same for every arm."""
    rng = np.random.default_rng([3, *key])
    return int(rng.integers(24, 65)), float(np.exp(rng.normal(0.0, 0.08)))


def _request(
    design: StudyDesign,
    truth: Truth,
    trial: Trial,
    *,
    index: int,
    segment: str,
    start: float,
    pace: float,
    source: AcceptanceSource,
    rng: np.random.Generator,
) -> RequestRecord:
    arm = design.arm(trial.arm)
    load = trial.load.value
    tokens, difficulty = _prompt(trial.repeat, index, int(load), len(segment))
    noise = float(np.exp(rng.normal(0.0, truth.request_sd)))
    temperature = design.segment(segment).temperature
    sent = start + 0.0002
    if rng.random() < truth.failure_share.get(arm.name, 0.0):
        return RequestRecord(
            index=index,
            prompt_id=f"{segment}-{trial.repeat}-{index}",
            segment=segment,
            temperature=temperature,
            part=0,
            intended_s=start,
            sent_s=sent,
            chunk_s=(),
            chunk_tokens=(),
            finished_s=start + 0.01,
            outcome=Outcome.HTTP_ERROR,
            status=500,
            error="internal server error",
        )
    speculation = arm.speculation
    speedup = 1.0
    if speculation is not None:
        speedup = _nearest(truth.speedup[arm.name][segment], load)
    accepts = truth.acceptance.get(arm.name, {}).get(segment, 0.6)
    if speculation is None:
        steps, carried = [0] * (tokens - 1), [1] * tokens
    else:
        steps, carried, written = [], [1], 1
        while written < tokens:
            accepted = 0
            while accepted < speculation.k and rng.random() < accepts:
                accepted += 1
            accepted = min(accepted, tokens - written - 1)
            steps.append(accepted)
            carried.append(accepted + 1)
            written += accepted + 1
    tpot = _nearest(BASE_TPOT_S, load) / speedup * pace * difficulty * noise
    ratio = truth.ttft_ratio.get(arm.name, 1.0)
    ttft = _nearest(BASE_TTFT_S, load) * ratio * pace * float(np.exp(rng.normal(0.0, 0.15)))
    first = start + ttft
    decode = tpot * (tokens - 1)
    # Evenly paced steps: the last token lands exactly `decode` after the first.
    chunk_s = [first + decode * step / max(len(steps), 1) for step in range(len(carried))]
    counts = None
    if speculation is not None and steps:
        histogram = np.bincount(steps, minlength=speculation.k + 1)
        counts = AcceptanceCounts(
            source=source,
            steps_by_accepted=tuple(int(n) for n in histogram),
            drafted_tokens=None
            if source is AcceptanceSource.CHUNKS
            else len(steps) * speculation.k,
        )
    text = f"{segment}{index}{trial.repeat}" + ("" if temperature == 0 else arm.name)
    return RequestRecord(
        index=index,
        prompt_id=f"{segment}-{trial.repeat}-{index}",
        segment=segment,
        temperature=temperature,
        part=0,
        intended_s=start,
        sent_s=sent,
        chunk_s=tuple(chunk_s),
        chunk_tokens=tuple(carried),
        finished_s=chunk_s[-1] + 0.0004,
        outcome=Outcome.OK,
        status=200,
        prompt_tokens=50,
        output_tokens=tokens,
        finish_reason="stop",
        acceptance=None if source is AcceptanceSource.COUNTERS else counts,
        output_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _counters(arm: Arm, records: list[RequestRecord]) -> dict[str, float]:
    counters = {
        "prompt_tokens": float(sum(r.prompt_tokens or 0 for r in records)),
        "generation_tokens": float(sum(r.output_tokens or 0 for r in records)),
        "prefix_cache_queries": 50.0 * len(records),
        "prefix_cache_hits": 10.0 * len(records),
        "preemptions": 0.0,
    }
    if arm.speculation is None:
        return counters
    steps = [n - 1 for r in records for n in (r.chunk_tokens or ())[1:]]
    counters["spec_drafts"] = float(len(steps))
    counters["spec_draft_tokens"] = float(len(steps) * arm.speculation.k)
    counters["spec_accepted_tokens"] = float(sum(steps))
    for position in range(arm.speculation.k):
        counters[f"spec_accepted_pos_{position}"] = float(sum(n > position for n in steps))
    return counters
