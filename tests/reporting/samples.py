"""Assessments to show: a study with a mix that hides a losing segment, and its variations.

Numbers are invented but shaped like the real thing: json gains at every load, prose at T=0.8 gains
alone and loses under load. Only the types come from specwise, so that a mistake in the analysis
cannot hide one in the reporting.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from specwise.analysis.acceptance import AcceptanceSummary, RequestSpread
from specwise.analysis.comparison import Effect, NoiseFloor, Signature
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import Percentiles, ServingSummary
from specwise.decision.assessment import Assessment
from specwise.decision.conditions import Condition
from specwise.decision.schedule import ScheduleProposal
from specwise.decision.verdict import Decision, NextTrial, SegmentVerdict, Verdict
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Api,
    Arm,
    ClientHealth,
    Deployment,
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

DEPLOYMENT = Deployment(model="/models/target", served_name="target")
ARMS = (
    Arm("baseline", deployment=DEPLOYMENT),
    Arm("draft_model", Speculation("draft_model", k=3, draft="/models/draft"), DEPLOYMENT),
    Arm("ngram", Speculation("ngram", k=3), DEPLOYMENT),
)
LOADS = tuple(LoadPoint(Loop.CLOSED, float(value)) for value in (1, 4, 16))
PRODUCTION = LOADS[-1]
SEGMENTS = (
    Segment("json", "bundled:json", temperature=0.0, max_tokens=96),
    Segment("copy", "bundled:copy", temperature=0.0, max_tokens=96),
    Segment("prose", "bundled:prose", temperature=0.8, max_tokens=96, api=Api.COMPLETIONS),
)
WORKLOADS = (
    Workload("json", (("json", 1.0),)),
    Workload("copy", (("copy", 1.0),)),
    Workload("prose", (("prose", 1.0),)),
    Workload("mix", (("json", 0.5), ("prose", 0.5))),
)
# true speedup by arm and segment at 1, 4 and 16 clients, and P(position accepted)
SPEEDUP = {
    ("draft_model", "json"): (2.21, 1.72, 1.31),
    ("draft_model", "copy"): (1.95, 1.28, 1.02),
    ("draft_model", "prose"): (1.14, 0.93, 0.76),
    ("ngram", "json"): (1.12, 1.05, 0.96),
    ("ngram", "copy"): (1.83, 1.45, 1.22),
    ("ngram", "prose"): (0.98, 0.88, 0.81),
}
ACCEPT = {
    ("draft_model", "json"): 0.92,
    ("draft_model", "copy"): 0.84,
    ("draft_model", "prose"): 0.31,
    ("ngram", "json"): 0.42,
    ("ngram", "copy"): 0.78,
    ("ngram", "prose"): 0.12,
}
BASE_TPOT_S = {1: 0.0161, 4: 0.0243, 16: 0.0571}
K = 3


def speedup(arm: str, segment: str, load: LoadPoint) -> float:
    return SPEEDUP[arm, segment][LOADS.index(load)] if arm != "baseline" else 1.0


def record(
    random_source: random.Random, index: int, arm: str, segment: Segment, load: LoadPoint
) -> RequestRecord:
    """One request: a first chunk after TTFT, then chunks of 1 to k + 1 tokens."""
    tpot_s = BASE_TPOT_S[int(load.value)] / speedup(arm, segment.name, load)
    tpot_s *= random_source.lognormvariate(0, 0.18)
    if arm != "baseline" and segment.name == "prose" and random_source.random() < 0.06:
        tpot_s *= 2.3
    ttft_s = 0.04 * load.value**0.6 * random_source.lognormvariate(0, 0.4)
    ttft_s *= 1.0 if arm == "baseline" else 1.12
    output_tokens = random_source.randint(40, 96)
    intended_s = index * 0.11
    if random_source.random() < 0.004:
        return RequestRecord(
            index, f"{segment.name}-{index}", segment.name, segment.temperature, 0, intended_s,
            intended_s + 0.0004, (), None, intended_s + 30.0, Outcome.TIMEOUT,
            error="no response within 30 s",
        )  # fmt: skip
    steps = [0] * (K + 1)
    chunk_s = [intended_s + ttft_s]
    chunk_tokens = [1]
    left = output_tokens - 1
    while left > 0:
        accepted = 0
        if arm != "baseline":
            while accepted < K and random_source.random() < ACCEPT[arm, segment.name]:
                accepted += 1
            steps[accepted] += 1
        tokens = min(left, accepted + 1)
        chunk_s.append(chunk_s[-1] + tokens * tpot_s)
        chunk_tokens.append(tokens)
        left -= tokens
    counts = AcceptanceCounts(AcceptanceSource.PER_REQUEST, tuple(steps), K * sum(steps))
    return RequestRecord(
        index=index,
        prompt_id=f"{segment.name}-{index}",
        segment=segment.name,
        temperature=segment.temperature,
        part=0,
        intended_s=intended_s,
        sent_s=intended_s + 0.0004,
        chunk_s=tuple(chunk_s),
        chunk_tokens=tuple(chunk_tokens),
        finished_s=chunk_s[-1] + 0.0002,
        outcome=Outcome.OK,
        status=200,
        prompt_tokens=64,
        output_tokens=output_tokens,
        cached_tokens=0,
        finish_reason="length",
        acceptance=None if arm == "baseline" else counts,
        output_sha256=f"{random_source.getrandbits(256):064x}",
    )


def study(requests: int = 48, repeats: int = 2, *, predicted: bool = False) -> StudyData:
    """A complete study: every arm at every workload and load, and one A/A trial per load."""
    random_source = random.Random(7)
    trials: list[MeasuredTrial] = []
    for load in LOADS:
        for workload in WORKLOADS:
            for repeat in range(1, repeats + 1):
                runs = [(arm.name, Purpose.MEASURE) for arm in ARMS]
                if repeat == 1 and workload.name == "mix":
                    runs.append(("baseline", Purpose.NOISE_FLOOR))
                for arm, purpose in runs:
                    number = len(trials) + 1
                    trial = Trial(
                        f"{number:04d}-{arm}-{workload.name}-{load.label}-r{repeat}"
                        + ("-aa" if purpose is Purpose.NOISE_FLOOR else ""),
                        arm, workload.name, load, repeat, purpose, requests,
                    )  # fmt: skip
                    names = [name for name, _ in workload.shares]
                    records = tuple(
                        record(
                            random_source,
                            index,
                            arm,
                            next(s for s in SEGMENTS if s.name == names[index % len(names)]),
                            load,
                        )
                        for index in range(requests)
                    )
                    part = TrialPart(
                        f"2026-03-01T10:{number % 60:02d}:00+00:00",
                        12.0,
                        ClientHealth(0.0002, 0.0011, 0.0008, 0.06),
                    )
                    trials.append(MeasuredTrial(trial, records, (part,), complete=True))
    design = StudyDesign(
        name="mixed-assistant",
        seed=7,
        arms=ARMS,
        segments=SEGMENTS,
        workloads=WORKLOADS,
        loads=LOADS,
        production_load=PRODUCTION,
        production_workload="mix",
        slo=Slo(ttft_s=0.5, tpot_s=0.08),
        trials=tuple(m.trial for m in trials),
        timeout_s=30.0,
    )
    provenance = {
        "specwise": "0.1.0",
        "started_at": "2026-03-01T10:00:00+00:00",
        "host": {"cpu": "2 x86_64 cores", "memory_bytes": 16_777_216_000},
        "engine": {"vllm": "0.32.0", "device": "cpu"},
        "models": {
            "target": {"path": "/models/target", "sha256": "3f5a" * 16},
            "draft": {"path": "/models/draft", "sha256": "91c0" * 16},
        },
        "arms": {
            "draft_model": {
                "command": "vllm serve /models/target --max-model-len 2048 "
                '--speculative-config \'{"method": "draft_model", "model": "/models/draft"}\''
            }
        },
    }
    return StudyData(design, provenance, tuple(trials), "/studies/mixed-assistant", predicted)


def effect(
    arm: str,
    workload: str,
    segment: str | None,
    load: LoadPoint,
    ratio: float,
    *,
    metric: str = "speedup",
    better: str = "higher",
    half_width: float = 0.07,
    value: float = 0.05,
) -> Effect:
    return Effect(
        metric=metric,
        better=better,  # type: ignore[arg-type]
        arm=arm,
        workload=workload,
        segment=segment,
        load=load,
        ratio=ratio,
        low=ratio * math.exp(-half_width),
        high=ratio * math.exp(half_width),
        confidence=0.95,
        pairs=96,
        repeats=2,
        baseline_value=value,
        candidate_value=value / ratio if metric == "speedup" else value * ratio,
        se_log=half_width / 2,
        dof=12.0,
        trial_noise_known=True,
        note="",
        trial_ids=(),
    )


def _mixture(arm: str, workload: Workload, load: LoadPoint) -> float:
    """The mix's speedup: times add up, so it is the harmonic mean of its segments'."""
    return 1 / sum(share / speedup(arm, name, load) for name, share in workload.shares)


def _percentiles(p50: float) -> Percentiles:
    return Percentiles(96, p50 * 1.05, p50, p50 * 1.5, p50 * 2.1)


def _cells() -> list[tuple[Workload, str | None, LoadPoint]]:
    cells: list[tuple[Workload, str | None, LoadPoint]] = []
    for workload in WORKLOADS:
        segments = [None, *(s for s, _ in workload.shares)] if workload.is_mix else [None]
        cells += [(workload, segment, load) for segment in segments for load in LOADS]
    return cells


@cache
def assessment(*, predicted: bool = False) -> Assessment:
    data = study(predicted=predicted)
    summaries: list[ServingSummary] = []
    acceptance: list[AcceptanceSummary] = []
    effects: list[Effect] = []
    for workload, segment, load in _cells():
        for arm in (a.name for a in ARMS):
            name = segment or workload.shares[0][0]
            gain = (
                _mixture(arm, workload, load)
                if workload.is_mix and segment is None
                else speedup(arm, name, load)
            )
            tpot_s = BASE_TPOT_S[int(load.value)] / gain
            ids = tuple(
                t.trial_id
                for t in data.design.trials
                if (t.arm, t.workload, t.load, t.purpose)
                == (arm, workload.name, load, Purpose.MEASURE)
            )
            summaries.append(
                ServingSummary(
                    arm=arm, workload=workload.name, segment=segment, load=load,
                    purpose=Purpose.MEASURE, repeats=2, requests=96,
                    failures={"timeout": 1} if arm == "ngram" and load.value == 16 else {},
                    ttft_s=_percentiles(0.04 * load.value**0.6),
                    ttft_from_sent_s=_percentiles(0.04 * load.value**0.6),
                    tpot_s=_percentiles(tpot_s), e2e_s=_percentiles(tpot_s * 70),
                    e2e_from_sent_s=_percentiles(tpot_s * 70),
                    inter_chunk_gap_s=_percentiles(tpot_s * 2),
                    time_per_output_token_s=tpot_s * 1.05, output_tokens=6540,
                    mean_output_tokens=68.1, output_tokens_per_s=load.value / tpot_s,
                    requests_per_s=load.value / tpot_s / 68,
                    goodput_per_s=load.value / tpot_s / 70, slo_share=0.94,
                    prefix_hit_rate=None, kv_use_max=0.31 if segment is None else None,
                    running_mean=load.value, waiting_max=0.0, preemptions=0.0, trial_ids=ids,
                )
            )  # fmt: skip
            if arm == "baseline":
                continue
            rate = sum(ACCEPT[arm, s] for s, _ in workload.shares) / len(workload.shares)
            rate = ACCEPT[arm, segment] if segment else rate
            unconditional = tuple(rate**i for i in range(1, K + 1))
            acceptance.append(
                AcceptanceSummary(
                    arm=arm, workload=workload.name, segment=segment, load=load,
                    source=AcceptanceSource.PER_REQUEST, requests=96, steps=2400, drafted=7200,
                    accepted=int(2400 * sum(unconditional)), rate=sum(unconditional) / K,
                    length=1 + sum(unconditional), unconditional=unconditional,
                    conditional=(rate,) * K,
                    per_request=RequestSpread(
                        96, AcceptanceSource.PER_REQUEST, max(0.0, rate - 0.2), rate,
                        min(1.0, rate + 0.12), 0.1,
                    ),
                    k=K, temperature=None if workload.is_mix and segment is None else 0.0, note="",
                    trial_ids=ids,
                )
            )  # fmt: skip
            effects.append(effect(arm, workload.name, segment, load, gain))
            effects += [
                effect(
                    arm, workload.name, segment, load, value, metric=metric, better=better,
                    half_width=width, value=0.057,
                )
                for metric, better, value, width in (
                    ("ttft_p50", "lower", 1.12, 0.05),
                    ("ttft_p99", "lower", 1.21, 0.3),
                    ("tpot_p50", "lower", 0.97 / gain, 0.06),
                    ("tpot_p99", "lower", 1.18 / gain, 0.2),
                    ("output_tokens_per_s", "higher", gain, 0.08),
                    ("goodput_per_s", "higher", gain, 0.12),
                )
            ]  # fmt: skip
    by_cell = {(e.metric, e.arm, e.workload, e.segment, e.load): e for e in effects}
    hidden = [by_cell["speedup", "draft_model", "mix", s, PRODUCTION] for s in ("json", "prose")]
    verdict = Verdict(
        decision=Decision.OFF,
        arm="draft_model",
        headline="Leave speculation off for mix at 16 clients: draft_model is slower.",
        reasons=(
            "The whole mix runs at 0.96x [0.90, 1.03]: no gain that this study can see.",
            "prose inside the mix is slowed to 0.76x [0.71, 0.82], the whole interval below 1.",
            "json inside the mix gains 1.31x [1.22, 1.41]: serve it from a speculating server.",
        ),
        effect=by_cell["speedup", "draft_model", "mix", None, PRODUCTION],
        segments=(
            SegmentVerdict(
                "json", "mix", "draft_model", Decision.ON,
                "1.31x [1.22, 1.41] at 16 clients.", (hidden[0],),
            ),
            SegmentVerdict(
                "prose", "mix", "draft_model", Decision.OFF,
                "0.76x [0.71, 0.82] at 16 clients.", (hidden[1],),
            ),
            SegmentVerdict(
                "copy", "copy", "ngram", Decision.ON, "1.22x [1.14, 1.31] at 16 clients.",
                (by_cell["speedup", "ngram", "copy", None, PRODUCTION],),
            ),
        ),
        schedule=ScheduleProposal(
            "draft_model", ((1, 3, 3), (4, 8, 1), (9, 256, 0)),
            "prose loses from about 3 clients on; json gains at every load measured.",
            confirmed=False,
        ),
        next_trials=(
            NextTrial(
                "Serve json alone at 16 clients with draft_model",
                "json gains inside the mix; alone it would show what routing it apart brings.",
                '[load]\nconcurrency = [16, 32]\nproduction_workload = "json"',
            ),
        ),
        client_limited=False,
    )  # fmt: skip
    evidence = next(
        t.trial_id
        for t in data.design.trials
        if (t.arm, t.workload, t.load) == ("draft_model", "mix", PRODUCTION)
    )
    conditions = (
        Condition(
            "G1", "Is the P10 of per-request acceptance above 0.5?", "0.11", "at least 0.5",
            "rule of thumb for a share of requests that lose", "fail", "draft_model/mix",
            (evidence,), "rule of thumb",
        ),
        Condition(
            "I1", "Is the production workload faster, whole interval above 1?",
            "0.96x [0.90, 1.03]", "interval above 1", "this study, 96 pairs, 2 repeats", "fail",
            "draft_model/mix", (evidence,), "measured", True,
        ),
        Condition(
            "G3", "Was it measured at the production load?", "16 concurrent clients",
            "up to 16 concurrent clients", "this study", "pass", "", (), "measured",
        ),
        Condition(
            "C5", "Is the draft at most 15 % of GPU memory?", "no GPU here", "at most 15 %",
            "rule of thumb", "unknown", "", (), "rule of thumb",
        ),
    )  # fmt: skip
    return Assessment(
        study=data,
        summaries=tuple(summaries),
        acceptance=tuple(acceptance),
        effects=tuple(effects),
        noise_floors=(NoiseFloor(PRODUCTION, "mix", "speedup", 1.01, 0.97, 1.05),),
        signatures=(
            Signature(
                "draft_model", "mix", None, PRODUCTION, "tpot",
                by_cell["tpot_p50", "draft_model", "mix", None, PRODUCTION],
                by_cell["tpot_p99", "draft_model", "mix", None, PRODUCTION], True,
            ),
        ),
        crossovers=(
            Crossover("draft_model", "prose", None, "crosses", 2.6, 1.9, 3.6, Loop.CLOSED,
                      (1.0, 4.0, 16.0), ""),
            Crossover("draft_model", "json", None, "always better", None, None, None, Loop.CLOSED,
                      (1.0, 4.0, 16.0), ""),
        ),
        conditions=conditions,
        verdict=verdict,
        warnings=("Of 3,744 requests 14 failed (timeout 14); they count against goodput.",),
    )  # fmt: skip


def measure_more(base: Assessment) -> Assessment:
    """The same study with nothing to decide from yet: no effects, no acceptance, no candidate."""
    return replace(
        base,
        effects=(), acceptance=(), noise_floors=(), signatures=(), crossovers=(), conditions=(),
        summaries=(),
        verdict=replace(
            base.verdict, decision=Decision.MEASURE_MORE, arm=None, effect=None, segments=(),
            headline="Not measured yet: the baseline has no complete trial at 16 clients.",
            reasons=(), schedule=None,
        ),
    )  # fmt: skip


@cache
def crowded() -> Assessment:
    """Hard to lay out: a prediction, five candidates with long names, rates per second, gaps."""
    base = assessment(predicted=True)
    names = {
        "draft_model": "draft_model-1B-int8-probabilistic-k3-tp1",
        "ngram": "ngram-lookup-2-to-5-prompt-and-output-k3",
    }
    more = ("eagle3", "suffix", "mtp")
    segment_names = {"json": "structured-extraction-of-purchase-orders", "prose": "x", "copy": "y"}
    rates = {load: LoadPoint(Loop.OPEN, load.value * 12.5, "poisson") for load in LOADS}

    def renamed(item: Any, **changes: Any) -> Any:
        arm = changes.get("arm", item.arm)
        segment = getattr(item, "segment", None)
        known = {
            "arm": names.get(arm, arm),
            "workload": segment_names.get(item.workload, item.workload),
            "segment": segment_names.get(segment, segment),
            "load": rates.get(getattr(item, "load", None)),
        }
        fields = {f.name for f in dataclasses.fields(item)}
        return replace(item, **{k: v for k, v in (known | changes).items() if k in fields})

    effects = [renamed(e) for e in base.effects]
    for place, arm in enumerate(more):
        effects += [
            renamed(e, arm=arm, ratio=e.ratio * 1.5**place, low=e.low / 3, high=e.high * 1.5**place)
            for e in base.effects
            if e.arm == "ngram"
        ]
    effects[0] = replace(effects[0], ratio=math.nan, low=math.nan, high=math.nan)
    arms = (
        ARMS[0],
        replace(ARMS[1], name=names["draft_model"]),
        replace(ARMS[2], name=names["ngram"]),
        *(Arm(arm, Speculation(arm, k=5), DEPLOYMENT) for arm in more),
    )
    design = replace(
        base.study.design,
        arms=arms,
        segments=tuple(renamed_segment(s, segment_names) for s in SEGMENTS),
        workloads=tuple(
            Workload(
                segment_names.get(w.name, w.name),
                tuple((segment_names[name], share) for name, share in w.shares),
            )
            for w in WORKLOADS
        ),
        loads=tuple(rates.values()),
        production_load=rates[PRODUCTION],
    )
    trials = tuple(
        replace(
            m,
            trial=renamed(m.trial),
            records=tuple(
                replace(r, segment=segment_names[r.segment], output_text="THE MODEL SAID THIS")
                for r in m.records
            ),
            complete=place != 3,
        )
        for place, m in enumerate(base.study.trials)
    )
    estimated = [
        replace(renamed(a), source=AcceptanceSource.CHUNKS, drafted=None, rate=None)
        if a.arm == "ngram"
        else renamed(a)
        for a in base.acceptance
    ]
    verdict = replace(
        base.verdict,
        decision=Decision.MEASURE_MORE,
        arm=names["draft_model"],
        effect=renamed(base.verdict.effect),
        headline='Nothing can be decided while the client limits it: <b>5 & 6</b> "quoted".',
        segments=tuple(
            replace(
                s,
                segment=segment_names[s.segment],
                workload=segment_names.get(s.workload, s.workload),
                arm=names[s.arm or ""],
                effects=tuple(renamed(e) for e in s.effects),
            )
            for s in base.verdict.segments
        ),
        client_limited=True,
    )
    return replace(
        base,
        study=replace(base.study, design=design, trials=trials),
        summaries=tuple(renamed(s) for s in base.summaries),
        acceptance=tuple(estimated),
        effects=tuple(effects),
        crossovers=tuple(renamed(c) for c in base.crossovers),
        noise_floors=(),
        signatures=(),
        verdict=verdict,
        warnings=("A server said <script>alert(1)</script> in trial 0004.", *base.warnings),
    )


def renamed_segment(segment: Segment, names: Mapping[str, str]) -> Segment:
    return replace(segment, name=names[segment.name])
