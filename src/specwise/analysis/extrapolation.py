"""From a finished study to loads and draft lengths that it did not run.

Steps are read from the records: the gap between two chunks of a request is one engine step, and
the other requests' records say what that step computed. Costs are fitted to them; acceptance and
request sizes are the study's own. The rest is the simulation that `specwise predict` uses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.acceptance import (
    conditional_acceptance,
    counted_by_server,
    merge,
    unconditional_acceptance,
)
from specwise.analysis.cells import TrialTable, cells, token_arrivals
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Arm,
    Gpu,
    LoadPoint,
    Outcome,
    RequestRecord,
    Slo,
    Speculation,
    StudyData,
)
from specwise.errors import InputError
from specwise.prediction.costs import StepCosts
from specwise.prediction.fit import Fit, ObservedStep, fit_methods
from specwise.prediction.forecast import Candidate, Prior, planned_trials, poisson_arrivals
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.study import SimArm, Traffic, simulate_study

Floats = NDArray[np.float64]

_LOOKUPS = ("ngram", "suffix")
_FEWEST_STEPS = 5
_LONGEST_PROMPT = 2048  # more may be computed in several steps: max_num_batched_tokens of vLLM
_FULL_KV = 0.9


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """A finished study, asked about other loads and draft lengths; a `forecast.Question`.

    ``costs`` are fitted, by arm; ``notes`` say to what and how well. ``predicted`` is the simulated
    study.
    """

    name: str
    machine: str
    prompt_tokens: int
    output_tokens: int
    loads: tuple[LoadPoint, ...]
    production: LoadPoint
    candidates: tuple[Candidate, ...]
    slo: Slo
    costs: Mapping[str, StepCosts]
    notes: tuple[str, ...]
    predicted: StudyData

    @property
    def gpu(self) -> Gpu | None:
        """None: costs are measured, wherever the study ran."""
        return None

    @property
    def gpus(self) -> int | None:
        """None, as ``gpu``."""
        return None

    @property
    def mean_context(self) -> float:
        """Tokens cached for a request half-way through its output."""
        return self.prompt_tokens + self.output_tokens / 2

    def baseline_costs(self) -> StepCosts:
        """A step's price without speculation."""
        return self.costs["baseline"]

    def candidate_costs(self, candidate: Candidate) -> StepCosts:
        """A step's price with ``candidate``."""
        return self.costs[candidate.name]


def extrapolate(
    study: StudyData,
    *,
    loads: Sequence[LoadPoint] = (),
    production: LoadPoint | None = None,
    ks: Sequence[int] = (),
    slo: Slo | None = None,
    seed: int = 0,
    repeats: int = 2,
) -> Extrapolation:
    """Every arm with a static draft length at ``loads``, and with each other draft length ``ks``.

    ``loads`` are by default the study's own and two and four times production's. Raises InputError
    where the study is too small to fit costs to, or has no arm whose acceptance is known.
    """
    design = study.design
    tables = _tables(study)
    traffic, cached = _traffic(study, tables)
    arms = [a for a in design.arms[1:] if a.name in tables and _static(a)]
    if not arms or design.arms[0].name not in tables:
        raise InputError(
            f"Study {design.name} has no finished trials of a baseline and an arm with a static k.",
            "Measure them first: `specwise measure --resume STUDY`.",
        )
    fits = _fits(study, arms, tables)
    workload = design.workload(design.production_workload)
    segments = [name for name, _ in workload.shares]
    acceptance = {a.name: _acceptance(study, a, tables[a.name], segments) for a in arms}
    candidates: list[Candidate] = []
    sim_arms: dict[str, SimArm] = {}
    costs: dict[str, StepCosts] = {}
    kv_tokens, seats = _limits(tables)
    for arm in arms:
        speculation = arm.speculation
        assert speculation is not None  # noqa: S101 - candidates have one
        fit = fits[speculation.method]
        by_segment, whole = acceptance[arm.name]
        for k in dict.fromkeys((speculation.k, *ks)):
            name = arm.name if k == speculation.k else f"{arm.name}, k={k}"
            spoken = replace(speculation, k=k)
            candidates.append(Candidate(name, spoken, whole))
            costs[name] = fit.candidate
            sim_arms[name] = SimArm(
                costs=fit.candidate,
                config=_config(spoken, kv_tokens, seats),
                acceptance={s: p.given_drafted(k) for s, p in by_segment.items()},
                draft_probability={s: p.drafted_share for s, p in by_segment.items()},
            )
    first = next(iter(fits.values()))
    costs["baseline"] = first.baseline
    baseline = design.arms[0]
    sim_arms[baseline.name] = SimArm(first.baseline, _config(None, kv_tokens, seats))
    asked = tuple(sorted(loads)) or _default_loads(study)
    at = production or (design.production_load if design.production_load in asked else asked[-1])
    planned = (baseline, *(Arm(c.name, c.speculation, url="predicted") for c in candidates))
    predicted = simulate_study(
        replace(
            design,
            name=f"forecast from {design.name}",
            seed=seed,
            arms=planned,
            segments=tuple(design.segment(name) for name in segments),
            workloads=(workload,),
            loads=asked,
            production_load=at,
            slo=slo or design.slo,
            trials=planned_trials(planned, workload.name, asked, repeats),
            experiment="",
        ),
        arms=sim_arms,
        traffic={name: Traffic(sizes, cached[name]) for name, sizes in traffic.items()},
        arrivals=poisson_arrivals,
        provenance={"study": design.name, "costs": "fitted to the study's own steps"},
    )
    shares = dict(workload.shares)
    means = [
        sum(shares[s] * statistics.fmean(size[i] for size in traffic[s]) for s in segments)
        for i in (0, 1)
    ]
    return Extrapolation(
        name=design.name,
        machine="its own servers",
        prompt_tokens=round(means[0]),
        output_tokens=round(means[1]),
        loads=asked,
        production=at,
        candidates=tuple(candidates),
        slo=slo or design.slo,
        costs=costs,
        notes=(
            *(_fit_note(method, fit, study) for method, fit in fits.items()),
            f"KV cache: {kv_tokens:,} tokens, from its use in the study."
            if kv_tokens
            else "KV cache: taken as never full, since the study never used much of it.",
            *([f"At most {seats} requests run at once, as in the study."] if seats else ()),
        ),
        predicted=predicted,
    )


def _static(arm: Arm) -> bool:
    return arm.speculation is not None and not arm.speculation.schedule


def _tables(study: StudyData) -> dict[str, list[TrialTable]]:
    found: dict[str, list[TrialTable]] = {}
    for (arm, _, _, _), tables in cells(study).items():
        found.setdefault(arm, []).extend(tables)
    return found


def _default_loads(study: StudyData) -> tuple[LoadPoint, ...]:
    at = study.design.production_load
    own = [load for load in study.design.loads if load.loop is at.loop]
    return tuple(sorted({*own, *(replace(at, value=at.value * times) for times in (2, 4))}))


def _fit_note(method: str, fit: Fit, study: StudyData) -> str:
    largest = max(step.tokens for step in fit.observed)
    return (
        f"Step costs with {method}: fitted to {len(fit.observed)} kinds of steps of "
        f"{study.design.name}, up to {largest:,.0f} tokens a step; median error "
        f"{fit.median_error:.1%}."
    )


# ---------------------------------------------------------------------------------------------
# Steps


def _fits(
    study: StudyData, arms: Sequence[Arm], tables: Mapping[str, Sequence[TrialTable]]
) -> dict[str, Fit]:
    """A fit for each method, all with one target: verifying costs the same whatever drafted."""
    plain = [s for t in tables[study.design.arms[0].name] for s in observed_steps(t, None)]
    steps: dict[str, list[ObservedStep]] = {}
    for arm in arms:
        if arm.speculation:
            own = steps.setdefault(arm.speculation.method, [])
            own += [s for t in tables[arm.name] for s in observed_steps(t, arm.speculation)]
    return fit_methods(plain, steps, about={"study": study.design.name})


def observed_steps(table: TrialTable, speculation: Speculation | None) -> tuple[ObservedStep, ...]:
    """Steps of one trial, alike ones together: decoding alone, with prompts, and prompts alone.

    A step that ends at time b began where the request's chunk before came, at a. It decoded the
    requests that had their first token by a and their last at b or later, and computed the prompts
    of those whose first token came with b. Half a step or less between chunks of one step is the
    client's clock. ``speculation`` is None for a baseline.
    """
    k = speculation.k if speculation else None
    found: list[ObservedStep] = []
    for part in dict.fromkeys(r.part for r in table.records):
        records = [r for r in table.records if r.part == part and r.first_token_s is not None]
        if records:
            drafted = 0.0
            if speculation:
                share = _drafted_share(records) if speculation.method in _LOOKUPS else 1.0
                drafted = speculation.k * share
            found += _decoding(records, drafted, k)
            found += _alone(records, k)
    return tuple(found)


def _decoding(
    records: Sequence[RequestRecord], drafted: float, k: int | None
) -> list[ObservedStep]:
    times = [token_arrivals(r)[0] for r in records]
    first, last = (np.array([t[i] for t in times]) for i in (0, -1))
    # A request's last step may have been cut short in what it shows: it is left out.
    begins = np.concatenate([t[:-2] for t in times])
    ends = np.concatenate([t[1:-1] for t in times])
    whole = ends > begins
    begins, ends = begins[whole], ends[whole]
    slack = 0.3 * (ends - begins)
    order = np.argsort(first)
    prompts = np.concatenate(([0.0], np.cumsum([_computed(records[i]) for i in order])))
    before = np.searchsorted(first[order], begins + slack, side="right")
    after = np.searchsorted(first[order], ends + slack, side="right")
    gone = np.searchsorted(np.sort(last), ends - slack, side="left")
    running = np.maximum(before - gone, 1).astype(float)
    added, joined = prompts[after] - prompts[before], (after - before).astype(float)
    seconds = ends - begins
    each = statistics.fmean((r.prompt_tokens or 0) + (r.output_tokens or 0) / 2 for r in records)

    def step(chosen: NDArray[np.bool_], *, middle: float) -> ObservedStep:
        decoding, prompt = float(running[chosen].mean()), float(added[chosen].mean())
        return ObservedStep(
            tokens=decoding * (1 + drafted) + prompt,
            context_tokens=decoding * each + prompt,
            requests=decoding + float(joined[chosen].mean()),
            k=k,
            seconds=middle,
            steps=max(round(float((1 / running[chosen]).sum())), 1),
        )

    found = []
    for count in np.unique(running[joined == 0]):
        alike = (joined == 0) & (running == count)
        if alike.sum() >= _FEWEST_STEPS * count:
            found.append(step(alike, middle=float(np.median(seconds[alike]))))
    mixed = (joined > 0) & (added <= _LONGEST_PROMPT)
    tokens = running * (1 + drafted) + added
    for chosen in _quarters(tokens, mixed, weights=1 / running):
        found.append(step(chosen, middle=float(seconds[chosen].mean())))
    return found


def _quarters(
    values: Floats, among: NDArray[np.bool_], *, weights: Floats
) -> Iterable[NDArray[np.bool_]]:
    """``among`` in up to four groups by size of ``values``; none of fewer than a few steps."""
    if weights[among].sum() < _FEWEST_STEPS:
        return
    groups = min(4, int(weights[among].sum() // _FEWEST_STEPS))
    edges = np.quantile(values[among], np.linspace(0, 1, groups + 1))
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, groups - 1)
    for group in range(groups):
        chosen = among & (place == group)
        if weights[chosen].sum() >= _FEWEST_STEPS - 1:
            yield chosen


def _alone(records: Sequence[RequestRecord], k: int | None) -> list[ObservedStep]:
    """First steps of requests that had the server to themselves, in up to four sizes."""
    held = sorted(records, key=lambda r: r.sent_s)
    tokens, seconds = [], []
    busy_until = -math.inf
    for index, record in enumerate(held):
        first = record.first_token_s
        following = held[index + 1].sent_s if index + 1 < len(held) else math.inf
        computed = _computed(record)
        if (
            first is not None
            and busy_until <= record.sent_s
            and following >= first
            and 0 < computed <= _LONGEST_PROMPT
        ):
            tokens.append(computed)
            seconds.append(first - record.sent_s)
        busy_until = max(busy_until, record.finished_s)
    sizes, took = np.array(tokens), np.array(seconds)
    found = []
    every = np.ones(len(sizes), dtype=np.bool_)
    for chosen in _quarters(sizes, every, weights=np.ones(len(sizes))):
        found.append(
            ObservedStep(
                tokens=float(sizes[chosen].mean()),
                context_tokens=float(sizes[chosen].mean()),
                requests=1,
                k=k,
                seconds=float(np.median(took[chosen])),
                steps=int(chosen.sum()),
                prefill=True,
            )
        )
    return found


def _computed(record: RequestRecord) -> float:
    """Prompt tokens that were not in the prefix cache."""
    return max((record.prompt_tokens or 0) - (record.cached_tokens or 0), 0)


# ---------------------------------------------------------------------------------------------
# Acceptance, traffic, limits


def _drafted_share(records: Iterable[RequestRecord]) -> float:
    """Share of decoding steps that had drafts, where the server says; else 1."""
    steps = chunks = 0
    for record in records:
        if record.acceptance and record.acceptance.source is AcceptanceSource.PER_REQUEST:
            steps += record.acceptance.steps
            chunks += max(len(token_arrivals(record)[0]) - 1, 0)
    return min(steps / chunks, 1.0) if steps and chunks else 1.0


def _acceptance(
    study: StudyData, arm: Arm, tables: Sequence[TrialTable], segments: Sequence[str]
) -> tuple[dict[str, Prior], Prior]:
    """(by segment, of the production workload), over all loads: load does not change acceptance."""
    speculation = arm.speculation
    assert speculation is not None  # noqa: S101 - candidates have one
    source = f"measured in {study.design.name}"
    records = [r for t in tables for r in t.records if r.outcome is Outcome.OK]
    found = {}
    for segment in segments:
        own = [r for r in records if r.segment == segment]
        counts = _counted(own) or counted_by_server(
            [t for t in tables if t.trial.workload == segment] or list(tables)
        )
        if counts is None:
            raise InputError(
                f"Arm {arm.name} of {study.design.name} has no acceptance for {segment}.",
                "Measure it with per-request metrics, or leave --from and give --acceptance.",
            )
        share = _drafted_share(own) if speculation.method in _LOOKUPS else 1.0
        found[segment] = _prior(counts, share, speculation.k, source)
    mixed = [r for r in records if r.segment in segments]
    whole = _counted(mixed)
    if whole is None:
        return found, next(iter(found.values()))
    share = _drafted_share(mixed) if speculation.method in _LOOKUPS else 1.0
    return found, _prior(whole, share, speculation.k, source)


def _counted(records: Sequence[RequestRecord]) -> AcceptanceCounts | None:
    """The requests' own figures, the server's before those estimated from chunks."""
    held = [r.acceptance for r in records if r.acceptance is not None and r.acceptance.steps]
    for source in (AcceptanceSource.PER_REQUEST, AcceptanceSource.CHUNKS):
        counts = merge([c for c in held if c.source is source], 0)
        if counts is not None:
            return counts
    return None


def _prior(counts: AcceptanceCounts, share: float, k: int, source: str) -> Prior:
    padded = merge([counts], k) or counts
    conditional = conditional_acceptance(unconditional_acceptance(padded.steps_by_accepted))[:k]
    known = [0.0 if math.isnan(a) else a for a in conditional]
    return Prior((share * known[0], *known[1:]), share, source)


def _traffic(
    study: StudyData, tables: Mapping[str, Sequence[TrialTable]]
) -> tuple[dict[str, tuple[tuple[int, int], ...]], dict[str, int]]:
    """(sizes, cached prompt tokens) by segment of the production workload, from all arms."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    cached: dict[str, list[int]] = {}
    for held in tables.values():
        for record in (r for table in held for r in table.records if r.outcome is Outcome.OK):
            if record.prompt_tokens and record.output_tokens:
                size = (record.prompt_tokens, record.output_tokens)
                sizes.setdefault(record.segment, []).append(size)
                cached.setdefault(record.segment, []).append(record.cached_tokens or 0)
    for name, _ in study.design.workload(study.design.production_workload).shares:
        if name not in sizes:
            raise InputError(
                f"Study {study.design.name} has no finished request of segment {name}.",
                "Measure the production workload first.",
            )
    return (
        {name: tuple(held) for name, held in sizes.items()},
        {
            name: min(int(statistics.fmean(held)), min(p for p, _ in sizes[name]) - 1)
            for name, held in cached.items()
        },
    )


def _limits(tables: Mapping[str, Sequence[TrialTable]]) -> tuple[int | None, int | None]:
    """(KV tokens, most requests at once) as far as the study's gauges show them; None: not seen."""
    pools, seats = [], []
    for table in (t for held in tables.values() for t in held):
        lengths = [(r.prompt_tokens or 0) + (r.output_tokens or 0) / 2 for r in table.records]
        gauges = [g for part in table.parts for g in part.gauges]
        pools += [
            g.running * statistics.fmean(lengths) / g.kv_use
            for g in gauges
            if g.running and g.kv_use and g.kv_use >= 0.05
        ]
        queued = [g for g in gauges if g.running and (g.waiting or 0) >= 1]
        if len(queued) > len(gauges) / 2 and all((g.kv_use or 0) < _FULL_KV for g in queued):
            seats.append(round(max(g.running or 0 for g in queued)))
    return (int(statistics.median(pools)) if pools else None), (max(seats) if seats else None)


def _config(
    speculation: Speculation | None, kv_tokens: int | None, seats: int | None
) -> SchedulerConfig:
    return SchedulerConfig(
        kv_tokens=kv_tokens,
        max_num_seqs=seats or SchedulerConfig().max_num_seqs,
        method=speculation.method if speculation else None,
        k=speculation.k if speculation else 0,
        async_scheduling=speculation is None or speculation.method not in _LOOKUPS,
    )
