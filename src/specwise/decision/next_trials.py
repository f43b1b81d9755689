"""What to measure next, concretely: the sentence, the reason, the lines for the study file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from specwise.analysis.comparison import Effect, t_quantile
from specwise.decision.findings import ERROR_RATE, Findings, Place, counted, describe, metric_name
from specwise.decision.schedule import ScheduleProposal
from specwise.domain import LoadPoint, Loop

MOST_REPEATS = 40
_SMALLEST_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class NextTrial:
    """What to measure next: ``what`` in a sentence, ``why``, and the lines for the study file."""

    what: str
    why: str
    toml: str


def repeats_needed(effect: Effect, log_distance: float, confidence: float = 0.95) -> int | None:
    """Repeats at which the half width of the interval at ``confidence`` falls below a distance.

    The standard error falls with the root of the repeats, whose prompts are new ones, and the
    degrees of freedom grow with them. None above `MOST_REPEATS`.
    """
    for repeats in range(effect.repeats + 1, MOST_REPEATS + 1):
        growth = repeats / effect.repeats
        se = effect.se_log / math.sqrt(growth)
        if t_quantile(effect.dof * growth, confidence) * se < abs(log_distance):
            return repeats
    return None


def repeat(findings: Findings, effect: Effect) -> NextTrial:
    """More repeats of a cell whose interval holds 1: as many as this effect, if true, takes."""
    place = Place(effect.workload, effect.segment)
    cell = f"{effect.arm} and the baseline on {effect.workload} at {effect.load.label}"
    why = f"{metric_name(effect.metric)} of {place.label} is {describe(effect)}: it holds 1."
    sure = 1 - ERROR_RATE / max(1, len(findings.candidates))
    repeats = repeats_needed(effect, math.log(effect.ratio) if effect.ratio > 0 else 0.0, sure)
    if repeats is not None:
        what = f"Repeat {cell}: {repeats} repeats instead of {effect.repeats}."
    else:
        repeats = repeats_needed(effect, math.log(_SMALLEST_GAIN), sure) or MOST_REPEATS
        what = (
            f"Repeat {cell}: {repeats} repeats instead of {effect.repeats} tell whether it differs "
            f"by more than {_SMALLEST_GAIN - 1:.0%} at all."
        )
        why += " A difference this small may not be worth the draft's memory: off is the safe wait."
    return NextTrial(what, why, _load_toml(findings, effect.load, effect.workload, repeats))


def measure_production(findings: Findings, arm: str) -> NextTrial:
    """The production workload at the production load, where a comparison is missing there."""
    design = findings.design
    load, workload = design.production_load, design.production_workload
    done = {t.trial.trial_id for t in findings.study.trials if t.complete}
    missing = [
        t.trial_id
        for t in design.trials
        if (t.workload, t.load) == (workload, load) and t.trial_id not in done
    ]
    if missing:
        return NextTrial(
            f"Finish this study: `specwise measure {findings.study.folder}` goes on where it "
            f"stopped ({counted(len(missing), 'trial')} of {workload} at {load.label} to go).",
            "The verdict is about production's load, and its trials are not complete.",
            "",
        )
    return NextTrial(
        f"Measure {arm} and the baseline on {workload} at {load.label}, 2 repeats.",
        "The verdict is about production's load, and this study has no complete comparison there.",
        _load_toml(findings, load, workload, 2),
    )


def learn_noise(findings: Findings) -> NextTrial:
    """Repeats and an A/A trial, where trial-to-trial noise is unknown."""
    design = findings.design
    load = design.production_load
    return NextTrial(
        f"Repeat {design.production_workload} at {load.label}: 3 repeats and an A/A trial.",
        "One trial of each arm cannot tell an effect from how much trials differ by themselves.",
        _load_toml(findings, load, design.production_workload, 3) + "noise_floor = true\n",
    )


def more_requests(findings: Findings, pairs: int) -> NextTrial:
    """Larger trials, where too few requests could be paired."""
    design = findings.design
    load = design.production_load
    return NextTrial(
        f"Measure {design.production_workload} at {load.label} with 64 requests a trial.",
        f"Only {pairs} requests ended OK in both arms; a P99 needs 100.",
        _load_toml(findings, load, design.production_workload, 2, requests=64),
    )


def calm_client(findings: Findings, limited: str) -> NextTrial:
    """The same trials again from a client with a core of its own."""
    design = findings.design
    load = design.production_load
    return NextTrial(
        f"Measure {design.production_workload} at {load.label} again from a machine, or a core, "
        "that nothing else uses.",
        f"The load generator itself was too slow: {limited}",
        _load_toml(findings, load, design.production_workload, 2),
    )


def confirm_schedule(findings: Findings, proposal: ScheduleProposal) -> NextTrial:
    """The proposed schedule as an arm of its own."""
    arm = findings.design.arm(proposal.arm)
    speculation = arm.speculation
    if speculation is None:
        raise ValueError(f"arm {proposal.arm} does not speculate")
    lines = ["[[arm]]", f'name = "{arm.name}-schedule"']
    if arm.url is not None:
        lines.append('url = "http://HOST:PORT"  # a server started with this schedule')
    lines += ["[arm.speculation]", f'method = "{speculation.method}"', f"k = {speculation.k}"]
    if speculation.draft is not None:
        lines.append(f"draft = {json.dumps(speculation.draft)}")
    lines.append(f"schedule = {json.dumps([list(row) for row in proposal.rows])}")
    return NextTrial(
        f"Measure {arm.name} with the schedule {_rows(proposal)} at every load point.",
        "The schedule is put together from trials of fixed k; nobody has run it yet.",
        "\n".join(lines) + "\n",
    )


def control_run(findings: Findings, segments: tuple[str, ...]) -> NextTrial:
    """Each segment of the mix alone: the control that tells the mix from speculation itself."""
    load = findings.design.production_load
    return NextTrial(
        f"Measure {' and '.join(segments)} alone at {load.label}.",
        "P50 got better and P99 worse. If P99 tightens in these runs, the mix is the cause.",
        "# every segment is a workload of its own as soon as it is an [[segment]]\n"
        + _load_toml(findings, load, segments[0], 2),
    )


def _load_toml(
    findings: Findings, load: LoadPoint, workload: str, repeats: int, *, requests: int | None = None
) -> str:
    planned = [t.requests for t in findings.design.trials if t.load == load]
    lines = ["[load]"]
    if load.loop is Loop.CLOSED:
        lines.append(f"concurrency = [{load.value:g}]")
    else:
        lines += [f"rate_per_s = [{load.value:g}]", f'arrivals = "{load.arrivals or "poisson"}"']
    lines += [
        f"production = {load.value:g}",
        f'production_workload = "{workload}"',
        f"requests = {requests or max(planned, default=32)}",
        f"repeats = {repeats}",
    ]
    return "\n".join(lines) + "\n"


def _rows(proposal: ScheduleProposal) -> str:
    return ", ".join(f"{first}-{last}: k={k}" for first, last, k in proposal.rows)
