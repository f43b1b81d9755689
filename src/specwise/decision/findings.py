"""What the analysis found, with the questions that every decision asks of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specwise.analysis.acceptance import AcceptanceSummary
from specwise.analysis.cells import Cells
from specwise.analysis.comparison import Direction, Effect, NoiseFloor, Signature
from specwise.analysis.crossover import Crossover
from specwise.analysis.latency import ServingSummary, percentiles
from specwise.domain import Arm, LoadPoint, Loop, Purpose, StudyData, StudyDesign, Workload
from specwise.measurement.load import client_limits

ERROR_RATE = 0.02
"""Chance, for each way to be wrong, that noise decides: a verdict has several ways (the whole, the
other deciding metrics, segments, SLO limits), and together they must stay below 5 %."""
MARGIN = 0.95
"""A ratio that is shown to stay above this is no loss worth holding a deployment up for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was measured: a workload, or one segment inside a mix."""

    workload: str
    segment: str | None

    @property
    def label(self) -> str:
        """For sentences: ``json`` for a workload, ``json in mix`` for a segment of it."""
        return self.workload if self.segment is None else f"{self.segment} in {self.workload}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the deciding effects of one arm in one place at one load add up to.

    ``effect`` is the one that decided. ``harmless`` says that no deciding effect leaves room for
    a loss of more than 5 %. ``missing`` names the foremost metric where it has no interval.
    """

    direction: Direction
    effect: Effect
    harmless: bool
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Findings:
    """A study and its analysis."""

    study: StudyData
    summaries: tuple[ServingSummary, ...]
    acceptance: tuple[AcceptanceSummary, ...]
    effects: tuple[Effect, ...]
    noise_floors: tuple[NoiseFloor, ...]
    signatures: tuple[Signature, ...]
    crossovers: tuple[Crossover, ...]

    @property
    def design(self) -> StudyDesign:
        """The study's design."""
        return self.study.design

    @property
    def candidates(self) -> tuple[Arm, ...]:
        """The arms that speculate."""
        return self.design.arms[1:]

    @property
    def production(self) -> Place:
        """The production workload as a whole."""
        return Place(self.design.production_workload, None)

    def parts(self) -> tuple[Place, ...]:
        """Every segment measured at the production load, in mixes and alone, production's first.

        A pure workload that is itself the production workload is left out: it is the whole. So are
        variants of a segment: what production does not send is not judged.
        """
        at_load = {
            (e.workload, e.segment) for e in self.effects if e.load == self.design.production_load
        }
        places = []
        for workload in sorted(
            self.design.workloads, key=lambda w: w.name != self.design.production_workload
        ):
            if workload.is_mix:
                places += [Place(workload.name, name) for name, _ in workload.shares]
            elif workload.name != self.design.production_workload and not self._is_variant(
                workload
            ):
                places.append(Place(workload.name, None))
        return tuple(p for p in places if (p.workload, p.segment) in at_load)

    def _is_variant(self, workload: Workload) -> bool:
        return any(self.design.segment(name).same_prompts_as for name, _ in workload.shares)

    def production_parts(self) -> tuple[Place, ...]:
        """Those of `parts` that production's workload is made of, in the mix or alone."""
        shares = self.design.workload(self.design.production_workload).shares
        return tuple(p for p in self.parts() if self.segment_name(p) in [n for n, _ in shares])

    def segment_name(self, place: Place) -> str:
        """The segment that ``place`` is about."""
        if place.segment is not None:
            return place.segment
        workload = self.design.workload(place.workload)
        return place.workload if workload.is_mix else workload.shares[0][0]

    def effect(self, metric: str, arm: str, place: Place, load: LoadPoint) -> Effect | None:
        """That effect, None where it was not measured."""
        for effect in self.effects:
            if (effect.metric, effect.arm, effect.load) == (metric, arm, load) and (
                effect.workload,
                effect.segment,
            ) == (place.workload, place.segment):
                return effect
        return None

    def summary(self, arm: str, place: Place, load: LoadPoint) -> ServingSummary | None:
        """The summary of that measured cell, None where it was not measured."""
        for summary in self.summaries:
            if (summary.arm, summary.load, summary.purpose) == (arm, load, Purpose.MEASURE) and (
                summary.workload,
                summary.segment,
            ) == (place.workload, place.segment):
                return summary
        return None

    def accepted(self, arm: str, place: Place, load: LoadPoint) -> AcceptanceSummary | None:
        """The acceptance of that cell, None where it is not known."""
        for summary in self.acceptance:
            if (summary.arm, summary.load) == (arm, load) and (
                summary.workload,
                summary.segment,
            ) == (place.workload, place.segment):
                return summary
        return None

    def crossover(self, arm: str, place: Place) -> Crossover | None:
        """The crossover of that arm and place in the loop of the production load."""
        for crossover in self.crossovers:
            if (crossover.arm, crossover.workload, crossover.segment, crossover.loop) == (
                arm,
                place.workload,
                place.segment,
                self.design.production_load.loop,
            ):
                return crossover
        return None

    def lighter_loads(self) -> tuple[LoadPoint, ...]:
        """Load points below production's, of its loop, ascending."""
        production = self.design.production_load
        return tuple(
            load
            for load in sorted(self.design.loads)
            if load.loop is production.loop and load.value < production.value
        )

    def judge(
        self, arm: str, place: Place, load: LoadPoint, *, confidence: float = 0.95
    ) -> Judgement | None:
        """What the SLO's deciding effects say; None where they were not measured.

        Worse if any of them is worse; better if the first is better and none is worse. The others
        share the error that ``confidence`` leaves (Bonferroni). The first must have an interval to
        be better: a P99 of too few requests leaves the place undecided.
        """
        held = [self.effect(m, arm, place, load) for m in deciding_metrics(self.design, place)]
        effects = [e for e in held if e is not None and math.isfinite(e.se_log)]
        first = held[0]
        if not effects or first is None:
            return None
        shared = 1 - (1 - confidence) / max(1, len([e for e in effects if e is not first]))
        sides = [_direction(e, confidence if e is first else shared) for e in effects]
        harmless = all(_harmless(e) for e in effects)
        if "worse" in sides:
            return Judgement("worse", effects[sides.index("worse")], harmless=False)
        if effects[0] is not first:
            return Judgement("undecided", effects[0], harmless, missing=first.metric)
        return Judgement("better" if sides[0] == "better" else "undecided", first, harmless)


def limited_trials(
    measured: Cells,
) -> tuple[tuple[str, str], ...]:
    """Trials in which the client, not the server, may have shaped the times, and why."""
    found = []
    for (_, _, load, _), tables in measured.items():
        for table in tables:
            ttft = percentiles(table.ttft_s)
            for part in table.parts:
                limits = client_limits(
                    part.client, ttft.p50 if ttft else None, open_loop=load.loop is Loop.OPEN
                )
                if limits:
                    found.append((table.trial.trial_id, listed(limits)))
                    break
    return tuple(sorted(found))


def deciding_metrics(design: StudyDesign, place: Place) -> tuple[str, ...]:
    """The metrics that decide, the first one foremost, by what the service is bound by.

    A segment inside a mix shares the loop with the others, so its own throughput says nothing:
    its speedup decides. A segment seldom has the 100 requests that a P99 needs: TTFT P50 there.
    """
    if design.slo.bound == "ttft":
        return ("ttft_p99" if place.segment is None else "ttft_p50", "speedup")
    if design.slo.bound == "throughput":
        if place.segment is not None:
            return ("speedup",)
        return ("output_tokens_per_s", "goodput_per_s", "speedup")
    return ("speedup", "tpot_mean", "tpot_p99")


def _direction(effect: Effect, confidence: float) -> Direction:
    low, high = effect.strict_interval(confidence)
    if low > 1:
        return "better" if effect.better == "higher" else "worse"
    if high < 1:
        return "worse" if effect.better == "higher" else "better"
    return "undecided"


def _harmless(effect: Effect) -> bool:
    return effect.low >= MARGIN if effect.better == "higher" else effect.high <= 1 / MARGIN


def describe(effect: Effect) -> str:
    """An effect in words: ``1.42x [1.30, 1.55]`` for a speedup, else with the metric's name."""
    span = f"[{effect.low:.2f}, {effect.high:.2f}]"
    if not math.isfinite(effect.se_log):
        span = f"(no interval from {effect.pairs} requests)"
    text = f"{effect.ratio:.2f}x {span}"
    return text if effect.metric == "speedup" else f"{metric_name(effect.metric)} {text}"


def metric_name(metric: str) -> str:
    """A metric as people write it: ``TPOT P99`` for ``tpot_p99``."""
    known = {"output_tokens_per_s": "output tokens/s", "goodput_per_s": "goodput"}
    if metric in known or "_" not in metric:
        return known.get(metric, metric)
    name, kind = metric.split("_", 1)
    return f"{name.upper()} {kind if kind == 'mean' else kind.upper()}"


def percent(share: float) -> str:
    """``1.9 %`` for 0.019, ``38 %`` for 0.384."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def counted(number: int, noun: str) -> str:
    """``1 repeat``, ``2 repeats``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
