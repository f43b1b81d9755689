"""The sweep that a tuning chooses its trials from: every draft length of every way to speculate.

A study file names ways to speculate, one arm each; here each becomes a *family* of arms that differ
in the draft length only, and one more that is on but idle, which is what a schedule's k = 0 costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from specwise.domain import (
    Arm,
    Deployment,
    Purpose,
    Speculation,
    StudyDesign,
    TuneSettings,
)
from specwise.errors import StudyFileError
from specwise.measurement.experiments import SAMPLES_ITS_DRAFTS, VersionOf, other_samplings
from specwise.measurement.trials import order_trials
from specwise.vllm.command import Version
from specwise.vllm.flags import METHODS_WITH_SCHEDULE, SCHEDULE_START

LENGTHS: Final = (1, 2, 3, 4, 5, 6, 7, 8)
_LARGEST_BATCH: Final = 1024


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What a sweep is made of.

    ``draft_sampling`` None stands for all ways to sample drafts that the version has, ``repeats``
    is the most of any cell, and ``idle`` asks for the arms that price a schedule's k = 0.
    """

    lengths: tuple[int, ...] = LENGTHS
    draft_sampling: tuple[str, ...] | None = None
    repeats: int = 4
    idle: bool = True


def tuning_sweep(
    design: StudyDesign, plan: SweepPlan, settings: TuneSettings, *, version_of: VersionOf
) -> StudyDesign:
    """The exhaustive sweep over what ``design`` describes: arms x workloads x loads x repeats.

    An arm ``draft`` becomes ``draft-k1``, ``draft-k2``, ... and ``draft-idle``; with another draft
    sampling method ``draft-probabilistic-k1`` and so on. The idle arm is left out where vLLM would
    not follow a schedule: an old version, data parallelism, a method without. Arms of the file that
    differ in their draft length only are one family. Raises StudyFileError for arms with a url,
    which nobody here can restart, for arms that have a schedule already, and for a draft sampling
    method that is asked for and not to be had.
    """
    for arm in design.arms:
        if arm.deployment is None:
            raise StudyFileError(
                f"Arm {arm.name!r} has a url; a tuning restarts servers with other draft lengths.",
                "Give a model in [serve] or in the arm, so that specwise can start it.",
            )
        if arm.speculation is not None and arm.speculation.schedule:
            raise StudyFileError(
                f"Arm {arm.name!r} has a schedule; a tuning composes one from static arms.",
                "Remove the schedule; to measure it as it is, use `specwise measure`.",
            )
    versions: dict[str, str | None] = {}  # asking an engine takes a while
    arms = [design.arms[0]]
    for arm in design.arms[1:]:
        assert arm.deployment is not None  # noqa: S101 - checked above
        engine = arm.deployment.engine
        if engine not in versions:
            versions[engine] = version_of(arm.deployment)
        for sampled in _by_sampling(arm, plan, versions[engine]):
            if _family_key(sampled) not in map(_family_key, arms):
                arms += _family(sampled, plan, versions[engine])
    names = [arm.name for arm in arms]
    taken = sorted({name for name in names if names.count(name) > 1})
    if taken:
        raise StudyFileError(f"The sweep would have two arms {taken[0]!r}.", "Rename one arm.")
    requests = {trial.load: trial.requests for trial in design.trials}
    noise_floor = any(trial.purpose is Purpose.NOISE_FLOOR for trial in design.trials)
    return replace(
        design,
        experiment="tune",
        tune=settings,
        arms=tuple(arms),
        trials=order_trials(
            tuple(arms),
            design.workloads,
            design.loads,
            requests=requests,
            repeats=plan.repeats,
            noise_workload=design.production_workload if noise_floor else None,
            # One server after the other: a sweep has more arms than fit into memory together. A
            # tuning takes the trials in its own order anyway.
            together=False,
        ),
    )


def families(design: StudyDesign) -> dict[str, tuple[str, ...]]:
    """Arms by family in a sweep's design: by draft length, the idle one last.

    Arms belong together that differ in draft length and schedule only.
    """
    found: dict[tuple[str, ...], list[Arm]] = {}
    for arm in design.arms:
        if not arm.is_baseline:
            found.setdefault(_family_key(arm), []).append(arm)
    return {
        family_of(arms[0].name): tuple(arm.name for arm in sorted(arms, key=_place))
        for arms in found.values()
    }


def family_of(arm: str) -> str:
    """The family's name, from that of one of its arms."""
    return arm.rpartition("-")[0] or arm


def _family_key(arm: Arm) -> tuple[str, ...]:
    """What the arms of a family share; () for the baseline."""
    if arm.speculation is None:
        return ()
    options = {"draft_sample_method": "greedy", **arm.speculation.options}
    shared = (arm.speculation.draft, sorted(options.items()), arm.deployment)
    return (arm.speculation.method, *map(repr, shared))


def _place(arm: Arm) -> tuple[bool, int]:
    speculation = arm.speculation
    return (False, 0) if speculation is None else (bool(speculation.schedule), speculation.k)


def _by_sampling(arm: Arm, plan: SweepPlan, version: str | None) -> list[Arm]:
    """``arm`` for each way of sampling drafts that is asked for and that its vLLM has."""
    speculation, wanted = arm.speculation, plan.draft_sampling
    assert speculation is not None  # noqa: S101 - only such arms are asked
    own = str(speculation.options.get("draft_sample_method", "greedy"))
    methods = [own, *other_samplings(speculation, version)]
    if wanted is not None and speculation.method in SAMPLES_ITS_DRAFTS:
        methods = [method for method in methods if method in wanted]
    if not methods:
        raise StudyFileError(
            f"tune.draft_sampling asks for {', '.join(wanted or ())}, but arm {arm.name!r} on vLLM "
            f"{version or '(version unknown)'} can only be {own}.",
            f'Add "{own}" to it, or leave it out to try what each vLLM has.',
        )
    return [
        arm
        if method == own
        else replace(
            arm,
            name=f"{arm.name}-{method}",
            speculation=replace(
                speculation, options={**speculation.options, "draft_sample_method": method}
            ),
        )
        for method in methods
    ]


def _family(arm: Arm, plan: SweepPlan, version: str | None) -> list[Arm]:
    """``arm`` with every draft length, and on but idle where its vLLM takes a schedule."""
    speculation, deployment = arm.speculation, arm.deployment
    assert speculation is not None  # noqa: S101 - only such arms make families
    assert deployment is not None  # noqa: S101 - checked by the caller
    lengths = sorted(set(plan.lengths))
    found = [
        replace(arm, name=f"{arm.name}-k{k}", speculation=replace(speculation, k=k))
        for k in lengths
    ]
    if plan.idle and follows_schedules(speculation, deployment, version):
        longest = lengths[-1]
        idle = replace(speculation, k=longest, schedule=((1, _LARGEST_BATCH, 0),))
        found.append(replace(arm, name=f"{arm.name}-idle", speculation=idle))
    return found


def follows_schedules(
    speculation: Speculation, deployment: Deployment, version: str | None
) -> bool:
    """Whether this vLLM lets the draft length follow the batch size. An unknown version may."""
    if speculation.method not in METHODS_WITH_SCHEDULE or is_data_parallel(deployment):
        return False
    known = Version.of(version)
    # A build without a version, such as "dev", is newer than releases.
    return known is None or known >= SCHEDULE_START


def is_data_parallel(deployment: Deployment) -> bool:
    """Whether the arguments ask for data parallelism, with which vLLM ignores schedules."""
    words = [part for word in deployment.arguments for part in word.split("=", 1)]
    return any(
        name.replace("_", "-") in ("--data-parallel-size", "-dp") and value != "1"
        for name, value in pairwise(words)
    )
