"""An experiment is a study's design transformed to answer one question.

Each function takes the design that a study file describes and returns the design that is measured:
other workloads, other loads, the same arms, servers and prompts. Everything else (trials, store,
resume, effects, verdict) is that of any study.

- temperature: the same prompts of each segment at several temperatures (req B1).
- ladder: the production workload at loads up to production's and past it (req G3, I5).
- mixed: the production mix, and each of its segments alone at the same load (req F2, F3).
- tune: every draft length of every way to speculate (req A5, E4); see sweep.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from specwise.domain import (
    Arm,
    Deployment,
    LoadPoint,
    Loop,
    Purpose,
    Segment,
    Speculation,
    StudyDesign,
    Workload,
)
from specwise.errors import StudyFileError
from specwise.measurement.trials import order_trials
from specwise.vllm.command import Version
from specwise.vllm.flags import DRAFT_SAMPLING

EXPERIMENTS: Final = ("temperature", "ladder", "mixed", "tune")
TEMPERATURES: Final = (0.0, 0.4, 0.8, 1.0)
MIX_NAME: Final = "mixed"

SAMPLES_ITS_DRAFTS: Final = ("draft_model", "eagle", "eagle3", "mtp")
_STEPS_BELOW: Final = 4  # halvings of production's load where the study has no lighter one
_PAST: Final = (2, 4)  # multiples of production's load where the study has no heavier one

VersionOf = Callable[[Deployment], str | None]


def as_experiment(
    design: StudyDesign,
    name: str,
    *,
    temperatures: Sequence[float] = (),
    version_of: VersionOf = lambda _: None,
) -> StudyDesign:
    """The design of experiment ``name`` on what ``design`` describes; "tune" has its own function.

    ``temperatures`` are those of the temperature experiment (default `TEMPERATURES`);
    ``version_of`` says which vLLM an arm that specwise starts will run, None where it cannot be
    known: an arm for each other draft sampling method is added where the version has them.
    Raises StudyFileError for a design that the experiment cannot be made from.
    """
    if temperatures and name != "temperature":
        raise StudyFileError(
            f"Temperatures were given, but the experiment is {name or 'none'}.",
            'They belong to the temperature experiment: experiment = "temperature".',
        )
    if name == "temperature":
        return temperature_sweep(with_draft_sampling(design, version_of), temperatures)
    if name == "ladder":
        return load_ladder(design)
    if name == "mixed":
        return mixed_workload(design)
    raise StudyFileError(
        f"There is no experiment {name!r}.", f"Choose one of {', '.join(EXPERIMENTS)}."
    )


def temperature_sweep(design: StudyDesign, temperatures: Sequence[float] = ()) -> StudyDesign:
    """Every segment at its own temperature, which is production's, and at each of ``temperatures``.

    At the production load. Each other temperature is a variant of the segment that is sent the very
    same prompts, named like ``json-t0.4``. A production mix stays, so that the study can still be
    decided.
    """
    wanted = sorted(set(temperatures or TEMPERATURES))
    segments: list[Segment] = []
    for segment in design.segments:
        segments.append(segment)
        segments += [
            replace(
                segment,
                name=f"{segment.name}-t{temperature:g}",
                temperature=temperature,
                same_prompts_as=segment.name,
            )
            for temperature in wanted
            if not math.isclose(temperature, segment.temperature, abs_tol=1e-9)
        ]
    names = [segment.name for segment in segments]
    taken = sorted({name for name in names if names.count(name) > 1})
    if taken:
        raise StudyFileError(
            f"The temperature experiment makes a segment {taken[0]!r}; the study has one already.",
            "Rename that segment.",
        )
    production = design.workload(design.production_workload)
    return _rebuilt(
        design,
        "temperature",
        segments=tuple(segments),
        workloads=(
            *(Workload(name, ((name, 1.0),)) for name in names),
            *((production,) if production.is_mix else ()),
        ),
        loads={design.production_load: _Effort.of(design).requests[design.production_load]},
    )


def with_draft_sampling(design: StudyDesign, version_of: VersionOf) -> StudyDesign:
    """An arm more for every other way of sampling drafts that a started arm's vLLM knows.

    ``draft_sample_method`` "greedy" proposes the draft's most likely token, "probabilistic" draws
    from its distribution. Arms with a url are left alone: only their owner can restart them.
    """
    arms = list(design.arms)
    for arm in design.arms:
        if arm.speculation is None or arm.deployment is None:
            continue
        for method in other_samplings(arm.speculation, version_of(arm.deployment)):
            options = {**arm.speculation.options, "draft_sample_method": method}
            speculation = replace(arm.speculation, options=options)
            if all(other.speculation != speculation for other in arms):
                arms.append(Arm(f"{arm.name}-{method}", speculation, arm.deployment))
    return _rebuilt(replace(design, arms=tuple(arms)), design.experiment)


def other_samplings(speculation: Speculation, version: str | None) -> tuple[str, ...]:
    """Ways of sampling drafts that vLLM ``version`` has besides the one ``speculation`` uses.

    None of an unknown version, and none where vLLM would not take the option.
    """
    options = speculation.options
    known = Version.of(version)
    if (
        known is None  # also a build without a version, such as "dev": what it has is not known
        or speculation.method not in SAMPLES_ITS_DRAFTS
        or options.get("rejection_sample_method", "standard") != "standard"
        or options.get("use_heterogeneous_vocab")
    ):
        return ()
    used = options.get("draft_sample_method", "greedy")
    return tuple(m for m, span in DRAFT_SAMPLING.items() if m != used and span.holds(known))


def load_ladder(design: StudyDesign) -> StudyDesign:
    """The production workload load by load: lighter ones, production's, and past it.

    The study's own loads stay. Where none is lighter than production's it is halved, down to a
    sixteenth; where none is heavier, twice and four times production's are added. All repeats of a
    load are measured before the next begins, so that the climb can end early
    (analysis/ladder.py).
    """
    production = design.production_load
    values = {load.value for load in design.loads}
    if not any(value < production.value for value in values):
        values |= {production.value / 2**step for step in range(1, _STEPS_BELOW + 1)}
    if not any(value > production.value for value in values):
        values |= {production.value * factor for factor in _PAST}
    if production.loop is Loop.CLOSED:
        values = {float(max(1, round(value))) for value in values}
    held = _Effort.of(design).requests
    loads = {}
    for value in sorted(values):
        load = production if value == production.value else replace(production, value=value)
        loads[load] = held.get(load) or _requests_at(load, held)
    workload = design.workload(design.production_workload)
    names = {name for name, _ in workload.shares}
    return _rebuilt(
        design,
        "ladder",
        segments=tuple(s for s in design.segments if s.name in names),
        workloads=(workload,),
        loads=loads,
        load_by_load=True,
    )


def _requests_at(load: LoadPoint, held: Mapping[LoadPoint, int]) -> int:
    """Requests for a load the study does not have: the nearest one's, grown with the load.

    Closed loop: at least two for each client, so that all are busy. Open loop: in proportion to the
    rate, so that a trial lasts as long as its neighbour.
    """
    nearest = min(held, key=lambda known: abs(math.log(known.value / load.value)))
    if load.loop is Loop.CLOSED:
        return max(held[nearest], math.ceil(2 * load.value))
    return max(4, round(held[nearest] * load.value / nearest.value))


def mixed_workload(design: StudyDesign) -> StudyDesign:
    """The production mix and its control: each of its segments alone, all at production's load.

    A study without a mix gets one, half of its coolest and half of its hottest segment.
    """
    workload = design.workload(design.production_workload)
    if not workload.is_mix:
        by_temperature = sorted(design.segments, key=lambda s: s.temperature)
        if len(by_temperature) < 2:
            raise StudyFileError(
                "The mixed experiment needs two segments, for example structured requests at a low "
                f"temperature and creative ones at a high; this study has only {workload.name}.",
                "Add an [[segment]].",
            )
        if MIX_NAME in [w.name for w in design.workloads]:
            raise StudyFileError(
                f"The workload {MIX_NAME!r} exists but is not production's.",
                f'Set load.production_workload = "{MIX_NAME}" to experiment with it.',
            )
        cool, hot = by_temperature[0].name, by_temperature[-1].name
        workload = Workload(MIX_NAME, ((cool, 0.5), (hot, 0.5)))
        design = replace(design, production_workload=MIX_NAME)
    names = [name for name, _ in workload.shares]
    load = design.production_load
    return _rebuilt(
        design,
        "mixed",
        segments=tuple(s for s in design.segments if s.name in names),
        workloads=(workload, *(Workload(name, ((name, 1.0),)) for name in names)),
        loads={load: _Effort.of(design).requests[load]},
    )


@dataclass(frozen=True, slots=True)
class _Effort:
    """How much a design measures, read off its trials."""

    requests: Mapping[LoadPoint, int]
    repeats: int
    noise_floor: bool

    @classmethod
    def of(cls, design: StudyDesign) -> _Effort:
        return cls(
            requests={trial.load: trial.requests for trial in design.trials},
            repeats=1 + max(trial.repeat for trial in design.trials),
            noise_floor=any(trial.purpose is Purpose.NOISE_FLOOR for trial in design.trials),
        )


def _rebuilt(
    design: StudyDesign,
    experiment: str,
    *,
    segments: tuple[Segment, ...] | None = None,
    workloads: tuple[Workload, ...] | None = None,
    loads: Mapping[LoadPoint, int] | None = None,
    load_by_load: bool = False,
) -> StudyDesign:
    """``design`` with these parts and the trials that follow from them."""
    effort = _Effort.of(design)
    workloads = workloads or design.workloads
    requests = loads or effort.requests
    return replace(
        design,
        experiment=experiment,
        segments=segments or design.segments,
        workloads=workloads,
        loads=tuple(sorted(requests)),
        trials=order_trials(
            design.arms,
            workloads,
            tuple(sorted(requests)),
            requests=requests,
            repeats=effort.repeats,
            noise_workload=design.production_workload if effort.noise_floor else None,
            together=design.servers_together,
            load_by_load=load_by_load,
        ),
    )
