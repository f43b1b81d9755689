"""Studies of each experiment with a known truth, made without servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    ClientHealth,
    MeasuredTrial,
    Outcome,
    RequestRecord,
    StudyData,
    StudyDesign,
    Trial,
    TrialPart,
)
from specwise.measurement.design import parse_study

K = 3
TEXT = """
name = "experiment"
experiment = "{experiment}"
{top}
[[arm]]
name = "baseline"
url = "http://127.0.0.1:1"
[[arm]]
name = "draft"
url = "http://127.0.0.1:2"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[segment]]
name = "json"
prompts = "a.jsonl"
temperature = 0.1
[[segment]]
name = "prose"
prompts = "b.jsonl"
temperature = 0.8
[[workload]]
name = "mix"
shares = {{ json = 0.5, prose = 0.5 }}
[load]
{load}
"""


def experiment_design(
    experiment: str,
    load: str = "concurrency = [8]\nrequests = 40\nrepeats = 2",
    top: str = "",
) -> StudyDesign:
    return parse_study(TEXT.format(experiment=experiment, load=load, top=top), name="experiment")


@dataclass(frozen=True)
class Request:
    """What the truth says of one request: seconds a token, and P(accept) at each position."""

    tpot_s: float
    accept: float = 0.6
    ttft_s: float = 0.05
    outcome: Outcome = Outcome.OK


# (trial, segment, temperature, difficulty of the prompt, random source) -> what happens
Truth = Callable[[Trial, str, float, float, np.random.Generator], Request]


def experiment_study(
    design: StudyDesign,
    truth: Truth,
    *,
    seed: int = 0,
    trial_sd: float = 0.01,
    source: AcceptanceSource | None = AcceptanceSource.PER_REQUEST,
    skipped: Mapping[str, str] | None = None,
) -> StudyData:
    """Every trial of ``design`` as ``truth`` has it, less those that are ``skipped``."""
    rng = np.random.default_rng(seed)
    skipped = skipped or {}
    trials = tuple(
        _trial(design, trial, truth, rng, trial_sd=trial_sd, source=source)
        for trial in design.trials
        if trial.trial_id not in skipped
    )
    return StudyData(design, {}, trials, "experiment", skipped=dict(skipped))


def _trial(
    design: StudyDesign,
    trial: Trial,
    truth: Truth,
    rng: np.random.Generator,
    *,
    trial_sd: float,
    source: AcceptanceSource | None,
) -> MeasuredTrial:
    pace = float(np.exp(rng.normal(0, trial_sd)))
    shares = design.workload(trial.workload).shares
    clients = np.zeros(int(trial.load.value))
    records: list[RequestRecord] = []
    for index in range(trial.requests):
        segment = design.segment(shares[index % len(shares)][0])
        family = segment.same_prompts_as or segment.name
        difficulty = _difficulty(len(family), trial.repeat, index)
        request = truth(trial, family, segment.temperature, difficulty, rng)
        client = int(clients.argmin())
        start = float(clients[client])
        record = _record(
            index,
            f"{family}-{trial.repeat}-{index}",
            (segment.name, segment.temperature),
            request,
            start=start,
            pace=pace,
            speculates=trial.arm != "baseline",
            source=source,
            rng=rng,
        )
        clients[client] = record.finished_s
        records.append(record)
    part = TrialPart(
        started_at="2026-11-22T20:00:00Z",
        duration_s=max(r.finished_s for r in records),
        client=ClientHealth(0.0001, 0.0005, 0.0005, 0.05),
        counters=_counters(records) if trial.arm != "baseline" else {},
    )
    if source is AcceptanceSource.COUNTERS or source is None:
        records = [_without_acceptance(r) for r in records]
    if source is None:
        part = TrialPart(part.started_at, part.duration_s, part.client)
    return MeasuredTrial(trial, tuple(records), (part,), complete=True)


@cache
def _difficulty(*prompt: int) -> float:
    """The same for every arm."""
    return float(np.random.default_rng(prompt).normal())


def _record(
    index: int,
    prompt_id: str,
    segment: tuple[str, float],
    request: Request,
    *,
    start: float,
    pace: float,
    speculates: bool,
    source: AcceptanceSource | None,
    rng: np.random.Generator,
) -> RequestRecord:
    if request.outcome is not Outcome.OK:
        return RequestRecord(
            index, prompt_id, *segment, 0, start, start, (), (), start + 1.0, request.outcome
        )
    tokens, carried, steps = 40, [1], [0] * (K + 1)
    left = tokens - 1
    while left:
        accepted = 0
        while speculates and accepted < K and rng.random() < request.accept:
            accepted += 1
        steps[accepted] += 1
        carried.append(min(1 + accepted, left))
        left -= carried[-1]
    first = start + request.ttft_s * pace
    last = first + request.tpot_s * pace * (tokens - 1)
    chunk_s = tuple(np.linspace(first, last, len(carried)).tolist())
    counts = AcceptanceCounts(
        AcceptanceSource.CHUNKS
        if source is AcceptanceSource.CHUNKS
        else AcceptanceSource.PER_REQUEST,
        tuple(steps),
        None if source is AcceptanceSource.CHUNKS else K * sum(steps),
    )
    return RequestRecord(
        index, prompt_id, *segment, 0, start, start, chunk_s, tuple(carried), last, Outcome.OK,
        status=200, prompt_tokens=20, output_tokens=tokens,
        acceptance=counts if speculates else None, output_sha256="0" * 64,
    )  # fmt: skip


def _without_acceptance(record: RequestRecord) -> RequestRecord:
    return replace(record, acceptance=None)


def _counters(records: list[RequestRecord]) -> dict[str, float]:
    held = [r.acceptance for r in records if r.acceptance]
    total = np.sum([c.steps_by_accepted for c in held], axis=0)
    return {
        "spec_drafts": float(total.sum()),
        "spec_draft_tokens": float(K * total.sum()),
        "spec_accepted_tokens": float(sum(i * n for i, n in enumerate(total))),
        **{f"spec_accepted_pos_{i}": float(total[i + 1 :].sum()) for i in range(K)},
    }
