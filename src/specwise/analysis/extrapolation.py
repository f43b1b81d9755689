"""From a finished study to loads and draft lengths that it did not run.

Step costs are fitted to the steps that `analysis.steps` reads from the records; acceptance and
request sizes are the study's own. The rest is the simulation that `specwise predict` uses.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from specwise.analysis.acceptance import (
    counted_by_server,
    merge,
)
from specwise.analysis.cells import TrialTable, cells
from specwise.analysis.steps import (
    LONGEST_PROMPT,
    LOOKUPS,
    context_slope,
    decoding_chunks,
    drafted_share,
    gaps_of,
    observed_steps,
    steps_of,
)
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    Arm,
    Gpu,
    LoadPoint,
    Loop,
    Outcome,
    RequestRecord,
    Slo,
    Speculation,
    StudyData,
    StudyDesign,
    Trial,
)
from specwise.errors import CommandError, InputError
from specwise.measurement.arrivals import intended_times
from specwise.prediction.costs import StepCosts
from specwise.prediction.fit import Fit, ObservedStep, fit_methods
from specwise.prediction.forecast import Candidate, Prior, planned_trials, poisson_arrivals
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.study import SimArm, Traffic, simulate_study
from specwise.vllm.command import ServeCommand, read_words
from specwise.vllm.findings import whole_number

__all__ = ["Extrapolation", "extrapolate", "observed_steps"]

_FULL_KV = 0.9
_KV_IN_USE = 0.05  # below, the gauge's rounding decides
_PRIOR_STEPS = 4.0
_NOISY = 0.1
_SPACING_S = 0.0005  # an HTTP server reads and tokenizes requests that come together one by one
_POISSON = "Arrivals: Poisson at the same rate in place of the trace."


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
    requests_at: Mapping[LoadPoint, int] | None = None,
) -> Extrapolation:
    """Every arm with a static draft length at ``loads``, and with each other draft length ``ks``.

    ``loads`` are by default the study's own and two and four times production's; every simulated
    trial has requests enough for its load, or ``requests_at`` it. Arms that differ in k only share
    acceptance and costs. Raises InputError where the study is too small to fit costs to, or has no
    arm whose acceptance is known.
    """
    design = study.design
    tables = _tables(study)
    baseline = design.arms[0]
    families, left_out = _families(design, tables)
    if not families or baseline.name not in tables:
        raise InputError(
            f"Study {design.name} has no finished trials of a baseline and an arm with a static k.",
            " ".join((*left_out, "Measure them: `specwise measure --resume STUDY`.")),
        )
    traffic = _traffic(study, tables)
    workload = design.workload(design.production_workload)
    segments = [name for name, _ in workload.shares]
    limits = _Limits(study, tables, max(sum(size) for t in traffic.values() for size in t.sizes))
    accepted: dict[str, tuple[dict[str, Prior], Prior]] = {}
    reasons: list[InputError] = []
    for family in families:
        try:
            found = _acceptance(design.name, family, tables, segments)
            _decoding(design.name, family.arms, tables, limits)
        except InputError as error:
            reasons.append(error)
        else:
            accepted[family.name] = found
    families = [family for family in families if family.name in accepted]
    if not families:
        raise reasons[0]
    left_out += [f"Left out: {error.what}" for error in reasons]
    fits = _fits(study, families, tables, limits)
    candidates: list[Candidate] = []
    sim_arms = {
        baseline.name: SimArm(
            _first(fits).baseline, limits.of(baseline, None), spacing_s=_SPACING_S
        )
    }
    for family in families:
        by_segment, whole = accepted[family.name]
        for arm in family.asked(ks):
            spoken = _spoken(arm)
            candidates.append(Candidate(arm.name, spoken, whole))
            sim_arms[arm.name] = SimArm(
                costs=fits[family.name].candidate,
                config=limits.of(family.nearest(spoken.k), spoken),
                acceptance={s: p.given_drafted(spoken.k) for s, p in by_segment.items()},
                draft_probability={s: p.drafted_share for s, p in by_segment.items()},
                spacing_s=_SPACING_S,
            )
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
            trials=planned_trials(planned, workload.name, asked, repeats, requests_at),
            experiment="",
        ),
        arms=sim_arms,
        traffic=traffic,
        arrivals=_arrivals,
        provenance={"study": design.name, "costs": "fitted to the study's own steps"},
    )
    shares = dict(workload.shares)
    means = [
        sum(shares[s] * statistics.fmean(size[i] for size in traffic[s].sizes) for s in segments)
        for i in (0, 1)
    ]
    beyond = _beyond(predicted, fits)
    return Extrapolation(
        name=design.name,
        machine="its own servers",
        prompt_tokens=round(means[0]),
        output_tokens=round(means[1]),
        loads=asked,
        production=at,
        candidates=tuple(candidates),
        slo=slo or design.slo,
        costs={"baseline": sim_arms[baseline.name].costs}
        | {c.name: sim_arms[c.name].costs for c in candidates},
        notes=(
            *(_fit_note(name, fit) for name, fit in fits.items()),
            *limits.notes(),
            *([_POISSON] if any(load.trace for load in asked) else ()),
            *([beyond] if beyond else ()),
            *left_out,
        ),
        predicted=predicted,
    )


@dataclass(frozen=True, slots=True)
class _Family:
    """Arms that differ in k only."""

    name: str
    arms: tuple[Arm, ...]

    @property
    def method(self) -> str:
        return _spoken(self.arms[0]).method

    def asked(self, ks: Sequence[int]) -> Iterator[Arm]:
        """Its arms, then one for each further k."""
        yield from self.arms
        known = {_spoken(arm).k for arm in self.arms}
        for k in dict.fromkeys(k for k in ks if k not in known):
            yield Arm(f"{self.name}, k={k}", replace(_spoken(self.arms[0]), k=k))

    def nearest(self, k: int) -> Arm:
        return min(self.arms, key=lambda arm: abs(_spoken(arm).k - k))


def _spoken(arm: Arm) -> Speculation:
    assert arm.speculation is not None  # noqa: S101 - baselines are not asked
    return arm.speculation


def _families(
    design: StudyDesign, tables: Mapping[str, Sequence[TrialTable]]
) -> tuple[list[_Family], list[str]]:
    """(arms that can be extrapolated, by what they share; why others are left out)."""
    held: dict[tuple[str, str | None, str], list[Arm]] = {}
    left_out = []
    for arm in design.arms[1:]:
        spoken = arm.speculation
        if spoken is None:
            left_out.append(f"{arm.name} is left out: it does not speculate.")
        elif spoken.schedule:
            left_out.append(f"{arm.name} is left out: its k follows the batch size.")
        elif arm.name not in tables:
            left_out.append(f"{arm.name} is left out: it has no finished trial.")
        else:
            options = repr(sorted(spoken.options.items()))
            held.setdefault((spoken.method, spoken.draft, options), []).append(arm)
    names = [_shared_name(arms) for arms in held.values()]
    return [
        _Family(name if names.count(name) == 1 else arms[0].name, tuple(arms))
        for name, arms in zip(names, held.values(), strict=True)
    ], left_out


def _shared_name(arms: Sequence[Arm]) -> str:
    """What the arms' names have in common, without their k: draft of draft-k1 and draft-k3."""
    bare = [re.sub(rf"[\W_]*k[\W_]*{_spoken(arm).k}$", "", arm.name) for arm in arms]
    return bare[0] if bare[0] and set(bare) == {bare[0]} else arms[0].name


def _tables(study: StudyData) -> dict[str, list[TrialTable]]:
    found: dict[str, list[TrialTable]] = {}
    for (arm, _, _, _), tables in cells(study).items():
        found.setdefault(arm, []).extend(tables)
    return found


def _default_loads(study: StudyData) -> tuple[LoadPoint, ...]:
    at = study.design.production_load
    own = [load for load in study.design.loads if load.loop is at.loop]
    return tuple(sorted({*own, *(replace(at, value=at.value * times) for times in (2, 4))}))


def _arrivals(trial: Trial, rng: np.random.Generator) -> Sequence[float]:
    load = trial.load
    if load.arrivals not in ("constant", "gamma"):
        return poisson_arrivals(trial, rng)
    return intended_times(
        load.arrivals, load.value, trial.requests, rng, burstiness=load.burstiness
    )


def _first(fits: Mapping[str, Fit]) -> Fit:
    return next(iter(fits.values()))


def _fit_note(name: str, fit: Fit) -> str:
    largest = max(step.tokens for step in fit.observed)
    words = (
        f"Step costs with {name}: fitted to {len(fit.observed)} kinds of steps of the study, up to "
        f"{largest:,.0f} tokens a step; median error {fit.median_error:.1%}."
    )
    if fit.median_error > _NOISY:
        words += " Its steps of one size took different times: measure again on a quiet machine."
    return words


def _beyond(predicted: StudyData, fits: Mapping[str, Fit]) -> str:
    """At which loads more requests run at once than in any step of the study; empty if at none."""
    steps = [step for fit in fits.values() for step in fit.observed]
    decoding = [step for step in steps if step.k is None and step.tokens <= step.requests]
    most = max(step.requests for step in decoding or steps)
    found = set()
    for measured in predicted.trials:
        running = [g.running for part in measured.parts for g in part.gauges if g.running]
        if running and statistics.fmean(running) > 1.25 * most:
            found.add(measured.trial.load)
    if not found:
        return ""
    loads = ", ".join(load.label for load in sorted(found))
    return f"At {loads} more requests run at once than in the study ({most:.0f}): drawn on from it."


# ---------------------------------------------------------------------------------------------
# Costs


def _fits(
    study: StudyData,
    families: Sequence[_Family],
    tables: Mapping[str, Sequence[TrialTable]],
    limits: _Limits,
) -> dict[str, Fit]:
    """A fit for each family, all with one target: verifying costs the same whatever drafted."""
    name, baseline = study.design.name, study.design.arms[0]
    return fit_methods(
        _decoding(name, [baseline], tables, limits),
        {family.name: _decoding(name, family.arms, tables, limits) for family in families},
        about={"study": name},
        methods={family.name: family.method for family in families},
        context_slope=context_slope(gaps_of(tables[baseline.name], None)),
    )


def _decoding(
    study: str,
    arms: Sequence[Arm],
    tables: Mapping[str, Sequence[TrialTable]],
    limits: _Limits,
) -> list[ObservedStep]:
    """The steps of ``arms``; InputError where there are none in which a request decodes."""
    found = []
    for arm in arms:
        longest = min(limits.batched_tokens(arm), LONGEST_PROMPT)
        found += steps_of(tables[arm.name], arm.speculation, longest)
    if all(step.prefill for step in found):
        raise InputError(
            f"No engine steps can be read from the trials of {arms[0].name} in {study}: too few "
            "tokens were streamed, or several steps came in one chunk.",
            "Measure longer answers, from a server without --stream-interval.",
        )
    return found


# ---------------------------------------------------------------------------------------------
# Acceptance, traffic, limits


def counted_acceptance(records: Sequence[RequestRecord]) -> AcceptanceCounts | None:
    """The requests' own figures, the server's before those estimated from chunks."""
    held = [r.acceptance for r in records if r.acceptance is not None and r.acceptance.steps]
    for source in (AcceptanceSource.PER_REQUEST, AcceptanceSource.CHUNKS):
        counts = merge([c for c in held if c.source is source], 0)
        if counts is not None:
            return counts
    return None


def pooled_conditional(counted: Sequence[tuple[int, AcceptanceCounts]]) -> tuple[float, ...]:
    """Conditional acceptance by position from several (k, counts) of one draft.

    Position i is asked of those that draft so far: elsewhere an accepted run ends with the draft.
    Few steps reach far positions and would say 0 or 1 there, so each is drawn towards the one
    before it with the weight of a few steps.
    """
    found: list[float] = []
    for position in range(1, max(k for k, _ in counted) + 1):
        tails = [counts.steps_by_accepted for k, counts in counted if k >= position]
        tried = sum(sum(steps[position - 1 :]) for steps in tails)
        taken = sum(sum(steps[position:]) for steps in tails)
        before = found[-1] if found else 0.5
        found.append((taken + _PRIOR_STEPS * before) / (tried + _PRIOR_STEPS))
    return tuple(found)


def _acceptance(
    study: str,
    family: _Family,
    tables: Mapping[str, Sequence[TrialTable]],
    segments: Sequence[str],
) -> tuple[dict[str, Prior], Prior]:
    """(by segment, of the production workload), over all loads and k: neither changes it."""
    source = f"measured in {study}"

    def prior(segment: str | None) -> Prior | None:
        counted: list[tuple[int, AcceptanceCounts]] = []
        shares: list[tuple[float, int]] = []
        for arm in family.arms:
            own = [t for t in tables[arm.name] if segment in (None, t.trial.workload)]
            records = [
                r
                for t in tables[arm.name]
                for r in t.records
                if r.outcome is Outcome.OK and r.segment in ([segment] if segment else segments)
            ]
            counts = counted_acceptance(records)
            share = drafted_share(records)
            if counts is None or counts.source is AcceptanceSource.CHUNKS:
                by_server = counted_by_server(own)
                if by_server is not None:
                    counts = by_server
                    chunks = sum(decoding_chunks(r) for t in own for r in t.records)
                    share = min(counts.steps / chunks, 1.0) if chunks else 1.0
            if counts is not None:
                counted.append((_spoken(arm).k, counts))
                shares.append((share, counts.steps))
        if not counted:
            return None
        share = 1.0
        if family.method in LOOKUPS:
            share = sum(s * n for s, n in shares) / sum(n for _, n in shares)
        first, *rest = pooled_conditional(counted)
        return Prior((share * first, *rest), share, source)

    whole = prior(None)
    found = {segment: prior(segment) or whole for segment in segments}
    known = {segment: held for segment, held in found.items() if held is not None}
    if whole is None or len(known) < len(segments):
        raise InputError(
            f"{family.name} of {study} has no acceptance.",
            "Measure it with per-request metrics, or leave --from and give --acceptance.",
        )
    return known, whole


def _traffic(study: StudyData, tables: Mapping[str, Sequence[TrialTable]]) -> dict[str, Traffic]:
    """What the production workload's segments send, from the requests of all arms."""
    sizes: dict[str, list[tuple[int, int]]] = {}
    cached: dict[str, list[int]] = {}
    for record in (r for held in tables.values() for table in held for r in table.records):
        if record.outcome is Outcome.OK and record.prompt_tokens and record.output_tokens:
            size = (record.prompt_tokens, record.output_tokens)
            sizes.setdefault(record.segment, []).append(size)
            cached.setdefault(record.segment, []).append(record.cached_tokens or 0)
    found = {}
    for name, _ in study.design.workload(study.design.production_workload).shares:
        if name not in sizes:
            raise InputError(
                f"Study {study.design.name} has no finished request of segment {name}.",
                "Measure the production workload: `specwise measure --resume STUDY`.",
            )
        shortest = min(prompt for prompt, _ in sizes[name])
        hits = min(int(statistics.fmean(cached[name])), shortest - 1)
        found[name] = Traffic(tuple(sizes[name]), hits)
    return found


class _Limits:
    """Each server's limits: from its command line, else from the study's gauges."""

    def __init__(
        self, study: StudyData, tables: Mapping[str, Sequence[TrialTable]], largest_request: int
    ) -> None:
        self._commands = {arm.name: _command(study, arm) for arm in study.design.arms}
        self._pools = {
            name: statistics.median(pools)
            for name, held in tables.items()
            if (pools := [p for table in held for p in _pools(table)])
        }
        seats = [s for held in tables.values() for table in held if (s := _seats(table))]
        self._seats = max(seats) if seats else None
        self._without_gpu = study.provenance.get("gpus") == []
        self._smallest_pool = largest_request + 128

    def _flag(self, arm: Arm, name: str) -> int | None:
        command = self._commands.get(arm.name)
        return whole_number(command.get(name)) if command else None

    def batched_tokens(self, arm: Arm) -> int:
        """--max-num-batched-tokens; vLLM's default by size where it is not given."""
        return (
            self._flag(arm, "--max-num-batched-tokens") or SchedulerConfig().max_num_batched_tokens
        )

    def _seats_of(self, arm: Arm) -> int:
        return self._flag(arm, "--max-num-seqs") or self._seats or SchedulerConfig().max_num_seqs

    def _asynchronous(self, arm: Arm, speculation: Speculation | None) -> bool:
        """vLLM 0.32's default (``config/vllm.py``), which its CPU platform overrides."""
        command = self._commands.get(arm.name)
        refused = command is not None and command.has("--no-async-scheduling")
        if refused or (self._without_gpu and arm.deployment is not None):
            return False
        return speculation is None or speculation.method not in LOOKUPS

    def of(self, arm: Arm, speculation: Speculation | None) -> SchedulerConfig:
        """What ``arm`` can serve at once; ``speculation`` may be another than its own."""
        pool = self._pools.get(arm.name) or max(self._pools.values(), default=None)
        seats = self._seats_of(arm)
        spare = 2 * seats if speculation else seats
        return SchedulerConfig(
            max_num_batched_tokens=max(self.batched_tokens(arm), spare),
            max_num_seqs=seats,
            kv_tokens=max(int(pool), self._smallest_pool) if pool else None,
            max_model_len=self._flag(arm, "--max-model-len"),
            method=speculation.method if speculation else None,
            k=speculation.k if speculation else 0,
            async_scheduling=self._asynchronous(arm, speculation),
        )

    def notes(self) -> Iterator[str]:
        """What was taken, and from where."""
        if self._pools:
            low, high = (int(f(self._pools.values())) for f in (min, max))
            tokens = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            yield f"KV cache: {tokens} tokens, from its use in the study."
        else:
            yield "KV cache: taken as never full, since the study hardly used it."
        arms = [name for name, command in self._commands.items() if command]
        given = {self._flag(Arm(name), "--max-num-seqs") for name in arms} - {None}
        if given:
            yield f"At most {max(n for n in given if n)} requests run at once, as the servers say."
        elif self._seats:
            yield f"At most {self._seats} requests run at once, as in the study."


def _command(study: StudyData, arm: Arm) -> ServeCommand | None:
    described = study.provenance.get("arms", {}).get(arm.name, {})
    words = described.get("command") or (arm.deployment.arguments if arm.deployment else ())
    try:
        return read_words([str(word) for word in words]) if words else None
    except CommandError:
        return None


def _pools(table: TrialTable) -> Iterator[float]:
    """KV tokens of the server, at each moment that its cache was in use."""
    lengths = [(r.prompt_tokens or 0) + (r.output_tokens or 0) / 2 for r in table.records]
    for gauge in (g for part in table.parts for g in part.gauges):
        if gauge.running and gauge.kv_use and gauge.kv_use >= _KV_IN_USE:
            yield gauge.running * statistics.fmean(lengths) / gauge.kv_use


def _seats(table: TrialTable) -> int | None:
    """How many requests ran while more waited nearly always; None if that is no limit of seats."""
    gauges = [g for part in table.parts for g in part.gauges]
    queued = [g for g in gauges if g.running and (g.waiting or 0) >= 1]
    most = round(max((g.running or 0 for g in queued), default=0))
    full = [g for g in queued if round(g.running or 0) == most]
    load = table.trial.load
    if (
        not queued
        or len(full) <= 0.8 * len(gauges)
        or (load.loop is Loop.CLOSED and most >= load.value - 1)
        or any((g.kv_use or 0) >= _FULL_KV for g in queued)
    ):
        return None
    return most
