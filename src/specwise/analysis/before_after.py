"""What a change did: two studies of the same prompts, before and after it (req: D2).

Acceptance is compared by segment with each prompt as its own control. Times are compared arm by
arm, after / before. The two sittings were not alternated, so what the machine did between them does
not cancel: intervals hold the noise that each study saw inside itself, and only the speedup over a
study's own baseline is free of drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from specwise.analysis.acceptance import counted_by_server, counts_from
from specwise.analysis.cells import Cells, Floats, TrialTable, cells, segments_of
from specwise.analysis.comparison import (
    CONFIDENCE,
    Direction,
    Effect,
    effects_of,
    speedup_effects,
    t_quantile,
)
from specwise.analysis.pairs import Block, PairKey, Pairs, noise_blocks, pair_trials
from specwise.analysis.study_differences import (
    ArmPair,
    Difference,
    find_differences,
    identical,
    pair_arms,
    shared_segments,
)
from specwise.domain import (
    AcceptanceCounts,
    AcceptanceSource,
    LoadPoint,
    Outcome,
    Purpose,
    RequestRecord,
    Speculation,
    StudyData,
)
from specwise.errors import InputError
from specwise.vllm.response import acceptance_from_chunks

DROP = 0.05
"""The drop of the acceptance rate that calls for a remedy: 5 percentage points (req: D2)."""

_RULE_OF_THREE = 3.0
_ROUNDING = 1e-12
_MOST_TIMES_MORE = 100

AcceptanceVerdict = Literal["fell", "held", "cannot tell"]
Counted = tuple[float, float]  # accepted and drafted tokens of one prompt, or of one trial


@dataclass(frozen=True, slots=True)
class Estimate:
    """A difference of two rates, after - before, with its interval; NaN where there is none."""

    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """The rate after less the rate before."""
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class AcceptanceChange:
    """Acceptance of one segment (or whole workload) in one arm, before and after.

    The rate is accepted / drafted tokens over the first ``k`` positions of each verify step.
    ``units`` are what the interval is over: prompts, or trials where only the server's counters
    tell; ``paired`` says whether each unit is its own control. ``verdict`` sides with the interval:
    "fell" if all of it is a drop of more than 5 points, "held" if none of it is. ``more`` is about
    how many further units would decide what could not be told, None where it is decided or no
    feasible number would. ``same_outputs`` counts greedy requests with the same output in both
    studies, of how many.
    """

    arm: str
    segment: str
    k: int
    estimate: Estimate
    units: int
    unit: Literal["prompts", "trials"]
    paired: bool
    source: AcceptanceSource
    verdict: AcceptanceVerdict
    more: int | None
    same_outputs: tuple[int, int] | None
    note: str


@dataclass(frozen=True, slots=True)
class SpeedupChange:
    """What speculation gained over its own baseline in each study, and after / before of that.

    Each study alternated its arms, so drift between the studies cancels here.
    """

    arm: str
    workload: str
    load: LoadPoint
    before: Effect
    after: Effect
    ratio: float
    low: float
    high: float

    @property
    def direction(self) -> Direction:
        """Which side of 1 the whole interval lies on."""
        if self.low > 1:
            return "better"
        return "worse" if self.high < 1 else "undecided"


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """Two studies and what lies between them.

    ``effects`` are after / before by arm (speedup: time per output token before / after);
    ``controls`` names arms that were served the same in both, whose effects are the drift.
    ``cautions`` are sentences about the comparison itself.
    """

    before: StudyData
    after: StudyData
    arms: tuple[ArmPair, ...]
    differences: tuple[Difference, ...]
    acceptance: tuple[AcceptanceChange, ...]
    effects: tuple[Effect, ...]
    speedups: tuple[SpeedupChange, ...]
    controls: tuple[str, ...]
    cautions: tuple[str, ...]


def compare_studies(before: StudyData, after: StudyData, *, seed: int = 0) -> BeforeAfter:
    """Everything that two studies of the same prompts say about the change between them.

    Pure, and deterministic for a ``seed``. Raises InputError, naming each obstacle, where a
    comparison would mean nothing: no arm or segment in common, other prompts, another temperature,
    top_p or API, no complete trial.
    """
    arms = pair_arms(before, after)
    segments = shared_segments(before, after)
    differences = find_differences(before, after, arms)
    # Goodput of both by one SLO, or it would compare two limits.
    judged = replace(before, design=replace(before.design, slo=after.design.slo))
    held = cells(judged), cells(after)
    acceptance = tuple(
        change
        for pair in arms
        if pair.before.speculation is not None and pair.after.speculation is not None
        for change in _acceptance(pair, held, segments)
    )
    if not acceptance:
        raise InputError(
            "No segment has acceptance figures in both studies.",
            "Finish both (`specwise measure --resume`); acceptance needs vLLM's per-request "
            "figures, its counters or streamed token counts.",
        )
    controls = tuple(pair.name for pair in arms if identical(before, after, pair))
    effects = _effects(before, after, arms, differences, held, seed=seed)
    return BeforeAfter(
        before=before,
        after=after,
        arms=arms,
        differences=differences,
        acceptance=acceptance,
        effects=effects,
        speedups=_speedup_changes(before, after, arms, held, seed=seed),
        controls=controls,
        cautions=(
            *_cautions(before, after, differences, effects, controls),
            *_left_out(segments, acceptance),
        ),
    )


def _left_out(segments: Sequence[str], acceptance: Sequence[AcceptanceChange]) -> Iterator[str]:
    """Segments that had figures in one study only, if others had them in both."""
    by_prompt = {a.segment for a in acceptance if a.unit == "prompts"}
    missing = [s for s in segments if by_prompt and s not in by_prompt]
    if missing:
        yield (
            f"No acceptance figures in both studies for {', '.join(missing)}: nothing is said "
            "about it."
        )


# ---------------------------------------------------------------------------------------------
# Acceptance


def paired_difference(before: Sequence[Counted], after: Sequence[Counted]) -> Estimate:
    """after - before of two ratios of sums over the same units, each unit its own control.

    Linearised ratio estimators (Cochran, Sampling Techniques, 1977, sections 2.11 and 6.4): the
    residuals z = (y - r x) / mean(x) of the two sides are subtracted unit by unit, and Student's t
    with n - 1 degrees of freedom bounds their mean. Where no unit differs at all the interval is
    the rule of three: with n units alike, at most about 3 / n of all units differ (Hanley and
    Lippman-Hand, JAMA 249, 1983), each taken to move by as much as the units' rates lie apart.
    No interval below two units.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (before, after))
    (rate_a, z_a), (rate_b, z_b) = _residuals(first), _residuals(second)
    z = z_b - z_a
    if len(z) < 2:
        return _estimate(rate_a, rate_b, math.nan)
    if z.std() < _ROUNDING:
        return _estimate(rate_a, rate_b, _RULE_OF_THREE / len(z) * _apart(first, second))
    standard_error = float(z.std(ddof=1)) / math.sqrt(len(z))
    return _estimate(rate_a, rate_b, t_quantile(len(z) - 1, CONFIDENCE) * standard_error)


def unpaired_difference(before: Sequence[Counted], after: Sequence[Counted]) -> Estimate:
    """after - before over different units: the same residuals, Welch's t of their variances."""
    first, second = (np.asarray(side, dtype=np.float64) for side in (before, after))
    (rate_a, z_a), (rate_b, z_b) = _residuals(first), _residuals(second)
    if min(len(z_a), len(z_b)) < 2:
        return _estimate(rate_a, rate_b, math.nan)
    parts = [float(z.var(ddof=1)) / len(z) for z in (z_a, z_b)]
    if sum(parts) < _ROUNDING**2:
        units = min(len(z_a), len(z_b))
        return _estimate(rate_a, rate_b, _RULE_OF_THREE / units * _apart(first, second))
    dof = sum(parts) ** 2 / sum(
        part**2 / (len(z) - 1) for part, z in zip(parts, (z_a, z_b), strict=True)
    )
    return _estimate(rate_a, rate_b, t_quantile(dof, CONFIDENCE) * math.sqrt(sum(parts)))


def _residuals(counted: Floats) -> tuple[float, Floats]:
    """The ratio of the columns' sums, and each unit's part of its error."""
    accepted, drafted = counted[:, 0], counted[:, 1]
    rate = float(accepted.sum() / drafted.sum())
    return rate, (accepted - rate * drafted) / drafted.mean()


def _apart(*sides: Floats) -> float:
    """How far the units' rates lie apart; 1 where they are all the same."""
    rates = np.concatenate([side[:, 0] / side[:, 1] for side in sides])
    return float(np.ptp(rates)) or 1.0


def _estimate(before: float, after: float, half: float) -> Estimate:
    difference = after - before
    return Estimate(before, after, difference - half, difference + half)


def judge_drop(estimate: Estimate, units: int) -> tuple[AcceptanceVerdict, int | None]:
    """The 5-point rule by interval, and about how many further units would decide it.

    An interval shrinks with the square root of its units, and it decides once it no longer holds
    -5 points: n (half width / distance)^2 units in all. None where that is over 100 times n.
    """
    if estimate.high < -DROP:
        return "fell", None
    if estimate.low > -DROP:
        return "held", None
    half, distance = (estimate.high - estimate.low) / 2, abs(estimate.difference + DROP)
    if not math.isfinite(half) or half > distance * math.sqrt(_MOST_TIMES_MORE):
        return "cannot tell", None
    return "cannot tell", max(1, math.ceil(units * (half / distance) ** 2) - units)


def at_draft_length(counts: AcceptanceCounts, drafted_to: int | None, k: int) -> Counted:
    """Accepted and drafted tokens as if every verify step had drafted only its first ``k``.

    Position i is accepted or not whatever was drafted after it, so cutting the histogram at k is
    exact for drafts made one after the other. ``drafted_to`` is the draft length that was used,
    None where it varied. Counts that say what they drafted keep it where nothing is cut: lookups
    may propose less.
    """
    accepted = sum(min(i, k) * n for i, n in enumerate(counts.steps_by_accepted))
    if k == drafted_to and counts.drafted_tokens is not None:
        return float(accepted), float(counts.drafted_tokens)
    return float(accepted), float(counts.steps * k)


def _acceptance(
    pair: ArmPair, held: tuple[Cells, Cells], segments: Sequence[str]
) -> list[AcceptanceChange]:
    """Every segment by prompt; whole workloads by trial where only counters tell."""
    tables = _common_tables(pair, held)
    found = []
    for segment in segments:
        records = [
            [r for t in side for r in t.records if r.outcome is Outcome.OK and r.segment == segment]
            for side in tables
        ]
        change = _by_prompt(pair, segment, records)
        if change is not None:
            found.append(change)
    return found or _by_trial(pair, tables)


def _common_tables(pair: ArmPair, held: tuple[Cells, Cells]) -> list[list[TrialTable]]:
    """The two arms' trials in the workloads and loads that both measured; all, if none is."""
    own = [
        {
            (workload, load): tables
            for (name, workload, load, purpose), tables in side.items()
            if name == arm.name and purpose is Purpose.MEASURE
        }
        for side, arm in zip(held, (pair.before, pair.after), strict=True)
    ]
    common = own[0].keys() & own[1].keys()
    return [
        [t for key, tables in side.items() if key in common or not common for t in tables]
        for side in own
    ]


def _by_prompt(
    pair: ArmPair, segment: str, records: Sequence[Sequence[RequestRecord]]
) -> AcceptanceChange | None:
    source, other = (_best_source(side) for side in records)
    if source is None or other is None:
        return None
    k, notes = _common_draft_length(pair)
    if source is not other:
        # The estimate is low by about a step a request: on both sides alike, that cancels.
        records = [[_estimated(record) for record in side] for side in records]
        source = AcceptanceSource.CHUNKS
        notes.append("one study has only chunks to tell from, so both are estimated from them")
    elif source is AcceptanceSource.CHUNKS:
        notes.append("estimated from tokens per chunk")
    sides = [
        _prompt_counts(side, source, arm.speculation, k)
        for side, arm in zip(records, (pair.before, pair.after), strict=True)
    ]
    shared = sorted(sides[0].keys() & sides[1].keys())
    paired = 2 * len(shared) >= min(len(sides[0]), len(sides[1]))
    if paired:
        estimate = paired_difference(*([side[p] for p in shared] for side in sides))
        units = len(shared)
    else:
        estimate = unpaired_difference(*(list(side.values()) for side in sides))
        units = min(len(side) for side in sides)
        notes.append("the studies share too few prompts to pair them")
    verdict, more = judge_drop(estimate, units)
    return AcceptanceChange(
        arm=pair.name,
        segment=segment,
        k=k,
        estimate=estimate,
        units=units,
        unit="prompts",
        paired=paired,
        source=source,
        verdict=verdict,
        more=more,
        same_outputs=_same_outputs(records),
        note="; ".join(notes),
    )


def _best_source(records: Iterable[RequestRecord]) -> AcceptanceSource | None:
    found = {r.acceptance.source for r in records if r.acceptance is not None}
    for source in (AcceptanceSource.PER_REQUEST, AcceptanceSource.CHUNKS):
        if source in found:
            return source
    return None


def _estimated(record: RequestRecord) -> RequestRecord:
    """The record with its acceptance estimated from its chunks, whatever else was known."""
    tokens = record.chunk_tokens or ()
    estimate = acceptance_from_chunks(tokens, finished=record.finish_reason is not None)
    return replace(record, acceptance=estimate)


def _common_draft_length(pair: ArmPair) -> tuple[int, list[str]]:
    """The draft length both arms reach in every step that drafts, and what to say about it."""
    lengths = [_draft_lengths(arm.speculation) for arm in (pair.before, pair.after)]
    k = min(lengths[0] + lengths[1])
    if lengths[0] == lengths[1] == [k]:
        return k, []
    if max(len(side) for side in lengths) > 1:
        return k, [f"the draft length follows the batch size: compared over the first {k}"]
    return k, [f"k differs ({lengths[0][0]} and {lengths[1][0]}): compared over the first {k}"]


def _draft_lengths(speculation: Speculation | None) -> list[int]:
    if speculation is None:
        return []
    scheduled = sorted({k for _, _, k in speculation.schedule if k > 0})
    return scheduled or [speculation.k]


def _prompt_counts(
    records: Iterable[RequestRecord],
    source: AcceptanceSource,
    speculation: Speculation | None,
    k: int,
) -> dict[str, Counted]:
    """Accepted and drafted tokens by prompt, over all its requests."""
    assert speculation is not None  # noqa: S101 - only speculating arms come here
    drafted_to = None if speculation.schedule else speculation.k
    found: dict[str, Counted] = {}
    for record in records:
        counts = counts_from(record, source, speculation)
        if counts is None:
            continue
        before = found.get(record.prompt_id, (0.0, 0.0))
        accepted, drafted = at_draft_length(counts, drafted_to, k)
        if not drafted:
            continue
        found[record.prompt_id] = before[0] + accepted, before[1] + drafted
    return found


def _same_outputs(records: Sequence[Sequence[RequestRecord]]) -> tuple[int, int] | None:
    """Greedy prompts whose output is the same in both studies, of how many compared."""
    digests = [
        {r.prompt_id: r.output_sha256 for r in side if r.temperature == 0 and r.output_sha256}
        for side in records
    ]
    shared = digests[0].keys() & digests[1].keys()
    if not shared:
        return None
    return sum(digests[0][p] == digests[1][p] for p in shared), len(shared)


def _by_trial(pair: ArmPair, tables: Sequence[Sequence[TrialTable]]) -> list[AcceptanceChange]:
    """Whole workloads from the server's counters, each trial its own control."""
    k, notes = _common_draft_length(pair)
    found = []
    for workload in dict.fromkeys(t.trial.workload for t in tables[0]):
        sides = []
        for side, arm in zip(tables, (pair.before, pair.after), strict=True):
            counted = {
                (t.trial.load, t.trial.repeat): counts
                for t in side
                if t.trial.workload == workload and (counts := counted_by_server([t])) is not None
            }
            plan = arm.speculation
            drafted_to = plan.k if plan is not None and not plan.schedule else None
            sides.append({key: at_draft_length(c, drafted_to, k) for key, c in counted.items()})
        shared = sorted(sides[0].keys() & sides[1].keys())
        if not shared:
            continue
        estimate = paired_difference(*([side[key] for key in shared] for side in sides))
        verdict, more = judge_drop(estimate, len(shared))
        found.append(
            AcceptanceChange(
                arm=pair.name,
                segment=workload,
                k=k,
                estimate=estimate,
                units=len(shared),
                unit="trials",
                paired=True,
                source=AcceptanceSource.COUNTERS,
                verdict=verdict,
                more=more,
                same_outputs=None,
                note="; ".join(
                    [*notes, "from the server's counters: right only if nothing else used it"]
                ),
            )
        )
    return found


# ---------------------------------------------------------------------------------------------
# Times


def _effects(
    before: StudyData,
    after: StudyData,
    arms: Sequence[ArmPair],
    differences: Sequence[Difference],
    held: tuple[Cells, Cells],
    *,
    seed: int,
) -> tuple[Effect, ...]:
    """After / before of every arm in every cell whose times can be compared."""
    spoiled = {d.where for d in differences if d.effect == "times"}
    if "machine" in spoiled:
        return ()
    matched: dict[PairKey, Pairs] = {}
    for pair in arms:
        for workload in _same_workloads(before, after):
            names = [name for name, _ in after.design.workload(workload).shares]
            if any(f"segment {name}" in spoiled for name in names):
                continue
            for load in sorted(set(before.design.loads) & set(after.design.loads)):
                tables = [
                    side.get((arm.name, workload, load, Purpose.MEASURE), ())
                    for side, arm in zip(held, (pair.before, pair.after), strict=True)
                ]
                for segment in segments_of(after, workload):
                    key = (pair.name, workload, segment, load)
                    pairs = pair_trials(tables[0], tables[1], key)
                    if pairs is not None:
                        matched[key] = pairs
    blocks: list[Block] = []
    for study, side in zip((before, after), held, strict=True):
        blocks += noise_blocks(side, study.design.arms[0].name)
    return effects_of(matched, blocks, seed=seed)


def _same_workloads(before: StudyData, after: StudyData) -> list[str]:
    shares = {w.name: dict(w.shares) for w in before.design.workloads}
    return [w.name for w in after.design.workloads if shares.get(w.name) == dict(w.shares)]


def _speedup_changes(
    before: StudyData,
    after: StudyData,
    arms: Sequence[ArmPair],
    held: tuple[Cells, Cells],
    *,
    seed: int,
) -> tuple[SpeedupChange, ...]:
    """The gain over the own baseline, after / before, where both studies measured it."""
    of_study: list[Mapping[tuple[str, str, LoadPoint], Effect]] = [
        {
            (e.arm, e.workload, e.load): e
            for e in speedup_effects(side, study.design.arms[0].name, seed=seed)
        }
        for study, side in zip((before, after), held, strict=True)
    ]
    found = []
    for pair in arms:
        for (arm, workload, load), first in of_study[0].items():
            second = of_study[1].get((pair.after.name, workload, load))
            if arm == pair.before.name and second is not None:
                found.append(_speedup_change(pair.name, first, second))
    return tuple(found)


def _speedup_change(arm: str, first: Effect, second: Effect) -> SpeedupChange:
    """The ratio of two independent ratios; degrees of freedom by Satterthwaite."""
    parts = [(e.se_log**2, max(e.dof, 1.0)) for e in (first, second)]
    variance = sum(v for v, _ in parts)
    uncertain = sum(v**2 / dof for v, dof in parts)
    dof = variance**2 / uncertain if uncertain else 1.0
    half = t_quantile(dof, CONFIDENCE) * math.sqrt(variance)
    ratio = second.ratio / first.ratio
    return SpeedupChange(
        arm=arm,
        workload=first.workload,
        load=first.load,
        before=first,
        after=second,
        ratio=ratio,
        low=ratio * math.exp(-half),
        high=ratio * math.exp(half),
    )


def _cautions(
    before: StudyData,
    after: StudyData,
    differences: Sequence[Difference],
    effects: Sequence[Effect],
    controls: Sequence[str],
) -> list[str]:
    found = []
    if before.predicted or after.predicted:
        found.append("A simulation made at least one of the studies: its figures are predictions.")
    if before.folder == after.folder:
        found.append("Both sides are the same study: this shows that nothing differs from itself.")
    found += [
        f"{d.where}, {d.what}: {d.before} before, {d.after} after; {d.consequence}."
        for d in differences
        if d.consequence
    ]
    changes = {d.what for d in differences if d.effect == "change"}
    if len(changes) > 1:
        found.append(
            f"{len(changes)} things changed ({', '.join(sorted(changes))}): the effects belong to "
            "all of them together."
        )
    if effects:
        found.append(
            "The two studies were not alternated: what the machine did between them is part of "
            "after / before of the times, and no interval holds it."
            + (f" Arm {controls[0]} was served the same in both and shows it." if controls else "")
        )
        if not any(e.trial_noise_known for e in effects):
            found.append(
                "No repeats and no A/A trial: intervals of times hold only the requests' noise."
            )
    incomplete = [
        f"{sum(not t.complete for t in study.trials)} in {study.folder}"
        for study in (before, after)
        if any(not t.complete for t in study.trials)
    ]
    if incomplete:
        found.append(f"Incomplete trials were left out: {', '.join(incomplete)}.")
    return found
