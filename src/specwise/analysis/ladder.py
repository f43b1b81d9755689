"""A climb through the loads: the effect at each, where it changes sign, and when to stop.

The stopping rule (docs/concepts/statistics.md):

- Only whole loads are decided about. A load that was begun is finished with all its repeats, so
  what is measured at it does not depend on what is seen at it, and its effects are as unbiased as
  in a climb that never stops. What is skipped is skipped because of lighter loads only.
- **Clear**: every candidate arm was shown slower than the baseline at some load climbed so far,
  with an interval at 1 - 0.05 / (loads x arms): over a whole climb the rule stops a candidate
  that never loses in fewer than 5 % of studies. The effect falls with the load, so what lies above
  has the same sign.
- **Saturated**: production's load was climbed and every arm is saturated (see `saturation`). What
  lies above only adds waiting.
- Production's load is never skipped: the verdict is about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betaincinv
from scipy.stats import mannwhitneyu

from specwise.analysis.cells import Cells, TrialTable, cells
from specwise.analysis.comparison import Effect, speedup_effects
from specwise.analysis.crossover import Crossover, find_crossovers
from specwise.analysis.latency import ServingSummary, rates
from specwise.domain import LoadPoint, Loop, Outcome, Purpose, RequestRecord, StudyData

CROSSOVER_METRICS = ("speedup", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p95", "tpot_p99")
FAILED_SHARE = 0.01
PLATEAU_SHARE = 0.1
GROWING_TTFT = 2.0

End = Literal["climbed", "clear", "saturated", "unfinished"]


@dataclass(frozen=True, slots=True)
class Saturation:
    """An arm that cannot take more: where, and what shows it."""

    arm: str
    load: LoadPoint
    reason: str


@dataclass(frozen=True, slots=True)
class Rung:
    """One load of the ladder: the production workload as a whole.

    ``effects`` are every effect against the baseline; ``summaries`` one for each arm.
    """

    load: LoadPoint
    summaries: tuple[ServingSummary, ...]
    effects: tuple[Effect, ...]
    saturated: tuple[Saturation, ...]

    def effect(self, arm: str, metric: str) -> Effect | None:
        """That effect at this load, None where it was not measured."""
        return next((e for e in self.effects if (e.arm, e.metric) == (arm, metric)), None)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The load ladder's result.

    ``end`` says how the climb ended and ``reason`` why, in a sentence; ``skipped`` are the loads
    that were not run. ``crossovers`` holds, by metric, where each arm stops paying.
    """

    workload: str
    rungs: tuple[Rung, ...]
    end: End
    reason: str
    skipped: tuple[LoadPoint, ...]
    crossovers: Mapping[str, tuple[Crossover, ...]]


def climb(
    study: StudyData,
    measured: Cells,
    summaries: Sequence[ServingSummary],
    effects: Sequence[Effect],
    *,
    seed: int = 0,
) -> Ladder:
    """The ladder of a study on its production workload, from what was measured of it."""
    design = study.design
    workload = design.production_workload
    whole = [e for e in effects if e.workload == workload and e.segment is None]
    own = [
        s
        for s in summaries
        if (s.workload, s.segment, s.purpose) == (workload, None, Purpose.MEASURE)
    ]
    full = {s.arm: s for s in saturations(study, measured)}
    rungs = tuple(
        Rung(
            load,
            tuple(s for s in own if s.load == load),
            tuple(e for e in whole if e.load == load),
            tuple(s for s in full.values() if s.load == load),
        )
        for load in sorted({s.load for s in own})
    )
    skipped = {
        t.load: study.skipped[t.trial_id] for t in design.trials if t.trial_id in study.skipped
    }
    end, reason = _ending(study, skipped, tuple(full.values()))
    return Ladder(
        workload=workload,
        rungs=rungs,
        end=end,
        reason=reason,
        skipped=tuple(sorted(skipped)),
        crossovers={
            metric: find_crossovers(whole, metric=metric, seed=seed) for metric in CROSSOVER_METRICS
        },
    )


def _ending(
    study: StudyData, skipped: Mapping[LoadPoint, str], full: Sequence[Saturation]
) -> tuple[End, str]:
    if skipped:
        reason = next(iter(skipped.values()))
        return ("clear" if reason.startswith(_CLEAR) else "saturated"), reason
    if finished_loads(study) != set(study.design.loads):
        return "unfinished", "the climb is not finished; `specwise measure --resume` goes on"
    reached = "every load was climbed"
    if full:
        reached += "; " + "; ".join(f"{s.arm} is saturated at {s.load.label}" for s in full)
    return "climbed", reached


_CLEAR, _FULL = "the answer is clear", "the servers are saturated"


def trials_to_skip(study: StudyData) -> dict[str, str]:
    """The trials that the stopping rule drops, given what was measured so far, with the reason."""
    design = study.design
    finished = finished_loads(study)
    if not finished:
        return {}
    measured = {key: held for key, held in cells(study).items() if key[2] in finished}
    reason = _clear(study, measured)
    if not reason and max(finished) >= design.production_load:
        reason = _full(study, measured)
    if not reason:
        return {}
    begun = {t.trial.load for t in study.trials}
    return {
        trial.trial_id: reason
        for trial in design.trials
        if trial.load > max(finished)
        and trial.load not in begun
        and trial.load != design.production_load
    }


def finished_loads(study: StudyData) -> set[LoadPoint]:
    """Loads of which every trial is complete."""
    done = {t.trial.trial_id for t in study.trials if t.complete}
    return {
        load
        for load in study.design.loads
        if all(t.trial_id in done for t in study.design.trials if t.load == load)
    }


def _clear(study: StudyData, measured: Cells) -> str:
    design = study.design
    candidates = [arm.name for arm in design.arms[1:]]
    confidence = 1 - 0.05 / (len(design.loads) * len(candidates))
    lost: dict[str, str] = {}
    effects = speedup_effects(measured, design.arms[0].name)
    for effect in sorted(effects, key=lambda e: e.load):
        if effect.workload != design.production_workload or not effect.trial_noise_known:
            continue
        low, high = effect.interval(confidence)
        if high < 1 and effect.arm not in lost:
            lost[effect.arm] = (
                f"{effect.arm} is slower at {effect.load.label} "
                f"({effect.ratio:.2f}x [{low:.2f}, {high:.2f}] at {confidence:.1%})"
            )
    if set(lost) != set(candidates):
        return ""
    return f"{_CLEAR}: {' and '.join(lost.values())}, and the effect falls with the load"


def _full(study: StudyData, measured: Cells) -> str:
    full = saturations(study, measured)
    if {s.arm for s in full} != {arm.name for arm in study.design.arms}:
        return ""
    return f"{_FULL}: " + "; ".join(f"{s.arm} at {s.load.label}, {s.reason}" for s in full)


def saturations(study: StudyData, measured: Cells) -> tuple[Saturation, ...]:
    """For each arm the first load at which it is saturated, if any.

    A plateau that a heavier load climbed out of again was none: the machine was busy with
    something else.
    """
    design = study.design
    found = []
    for arm in design.arms:
        climbed = sorted(
            (load, tables)
            for (name, workload, load, purpose), tables in measured.items()
            if (name, workload, purpose) == (arm.name, design.production_workload, Purpose.MEASURE)
        )
        before: tuple[LoadPoint, Sequence[TrialTable]] | None = None
        for place, (load, tables) in enumerate(climbed):
            reason = saturation(load, tables, before)
            if reason and not any(_climbs(load, tables, *c) for c in climbed[place + 1 :]):
                found.append(Saturation(arm.name, load, reason))
                break
            before = (load, tables)
    return tuple(found)


def saturation(
    load: LoadPoint,
    tables: Sequence[TrialTable],
    before: tuple[LoadPoint, Sequence[TrialTable]] | None,
) -> str:
    """What shows that an arm is saturated at ``load``; empty if nothing does.

    - Requests time out, or are refused, cut or answered 429 or 503: surely (95 %) more than 1 %.
    - Closed loop: less than a tenth of the load added since the lighter one, ``before``, became
      throughput, whichever of their trials are compared, and the mean E2E grew by at least 80 % of
      what the load did (with a full server it grows just as the load: Little's law).
    - Open loop: the queue never settles. TTFT in the last third of the arrivals is at least twice
      that in the first third, and not by chance (Mann-Whitney, 1 %).
    """
    records = [record for table in tables for record in table.records]
    gave_up = sum(_gave_up(record) for record in records)
    if gave_up and _at_least(gave_up, len(records)) > FAILED_SHARE:
        return f"{gave_up} of {len(records)} requests timed out or were refused"
    if load.loop is Loop.OPEN:
        return _unsettled(tables)
    return "" if before is None else _plateau(load, tables, before)


def _gave_up(record: RequestRecord) -> bool:
    return record.outcome in (Outcome.TIMEOUT, Outcome.REFUSED, Outcome.CUT) or (
        record.outcome is Outcome.HTTP_ERROR and record.status in (429, 503)
    )


def _at_least(failed: int, requests: int) -> float:
    """The one-sided 95 % lower bound of a share (Clopper & Pearson 1934)."""
    return float(betaincinv(failed, requests - failed + 1, 0.05))


def _plateau(
    load: LoadPoint,
    tables: Sequence[TrialTable],
    before: tuple[LoadPoint, Sequence[TrialTable]],
) -> str:
    lighter, lighter_tables = before
    e2e, e2e_lighter = _mean_e2e(tables), _mean_e2e(lighter_tables)
    if _climbs(lighter, lighter_tables, load, tables) or not e2e_lighter > 0:
        return ""
    more_load, more_e2e = load.value / lighter.value, e2e / e2e_lighter
    if more_e2e < 0.8 * more_load:
        return ""
    more_tokens = max(_tokens_per_s(tables)) / min(_tokens_per_s(lighter_tables))
    return (
        f"{more_load:.3g} times the clients of {lighter.label} give at most {more_tokens:.2f} "
        f"times its tokens/s and {more_e2e:.2f} times its E2E"
    )


def _climbs(
    lighter: LoadPoint,
    lighter_tables: Sequence[TrialTable],
    load: LoadPoint,
    tables: Sequence[TrialTable],
) -> bool:
    """Whether some trial at ``load`` gives more than one at ``lighter``, for the load added.

    True, too, where a trial's throughput is not known.
    """
    here, there = _tokens_per_s(tables), _tokens_per_s(lighter_tables)
    if not (here and there and min(there) > 0):
        return True
    return max(here) / min(there) > 1 + PLATEAU_SHARE * (load.value / lighter.value - 1)


def _tokens_per_s(tables: Sequence[TrialTable]) -> list[float]:
    """Output tokens/s of each trial that has a loaded window."""
    return [held[0] for table in tables if (held := rates([table], None)) is not None]


def _mean_e2e(tables: Sequence[TrialTable]) -> float:
    values = np.concatenate([table.e2e_s for table in tables])
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _unsettled(tables: Sequence[TrialTable]) -> str:
    first, last = [], []
    for table in tables:
        third = len(table.ttft_s) // 3
        if third:
            first.append(table.ttft_s[:third])
            last.append(table.ttft_s[-third:])
    if not first:
        return ""
    early, late = (values[np.isfinite(values)] for values in map(np.concatenate, (first, last)))
    if min(len(early), len(late)) < 4 or np.median(late) < GROWING_TTFT * np.median(early):
        return ""
    if mannwhitneyu(late, early, alternative="greater").pvalue > 0.01:
        return ""
    return (
        f"the queue never settles: TTFT P50 {np.median(early) * 1000:.0f} ms in the first third of "
        f"the arrivals, {np.median(late) * 1000:.0f} ms in the last"
    )
