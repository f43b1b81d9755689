"""How to bring a verdict into production: steps, what must be seen before each, and the way back.

Every threshold is the study's own, as `specwise.monitoring.expectations` derives it for watch and
alerts; how long a step must last follows from what those two need to see a change.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

import yaml

from specwise.analysis.latency import ServingSummary
from specwise.decision.assessment import Assessment
from specwise.decision.verdict import Decision
from specwise.domain import LoadPoint, Loop, Purpose, Speculation
from specwise.monitoring.alerts import alert_rules
from specwise.monitoring.drift import DriftTest, drift_test
from specwise.monitoring.expectations import FULL_KV_USE, Expectations, expectations
from specwise.reporting.wording import load_phrase, milliseconds, number, percent

SHARES = (0.05, 0.25, 1.0)
"""Usual canary shares. How long each must last is computed, not usual."""

PER_REQUEST_METRICS = "--per-request-spec-decode-metrics"
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True, slots=True)
class Serving:
    """What is rolled out, in the words of the user's vLLM version.

    ``command`` serves it and ``without`` serves the same without speculation; where the study does
    not know how the server is started (``complete`` False) they are the speculative flags alone and
    what to do instead. ``confirmed`` is False for a schedule that no trial has run.
    """

    arm: str
    speculation: Speculation | None
    command: str
    without: str
    vllm: str
    complete: bool = True
    confirmed: bool = True
    forced: bool = False


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One canary share of one replica's load, and what it takes to trust it.

    ``requests`` are what the canary has answered after ``lasts_s`` seconds.
    """

    share: float
    lasts_s: float
    requests: float


@dataclass(frozen=True, slots=True)
class Gate:
    """A figure, what the study measured, and within what it must stay for the next step."""

    figure: str
    measured: str
    holds: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """A rollout note. ``steps`` and ``gates`` are empty where nothing is to be rolled out yet.

    ``warnings`` come first; ``first`` is what to measure before anything is rolled out, with the
    lines for a study file; ``again`` says when the verdict no longer stands.
    """

    study: str
    decision: Decision
    serving: Serving
    warnings: tuple[str, ...]
    evidence: tuple[str, ...]
    first: str
    first_toml: str
    steps: tuple[RolloutStep, ...]
    why_so_long: str
    gates: tuple[Gate, ...]
    commands: tuple[tuple[str, str], ...]
    again: tuple[str, ...]


def plan_rollout(assessment: Assessment, serving: Serving, *, folder: str) -> Rollout:
    """The note for ``serving`` from the study that ``assessment`` is of, which lies in ``folder``.

    A schedule that nobody ran gets no steps: its thresholds are those of the trial that is still to
    come. Raises InputError as `expectations` does, where the study did not measure the arm at its
    production load.
    """
    design, verdict = assessment.study.design, assessment.verdict
    warnings = []
    if assessment.study.predicted:
        warnings.append("A simulation made this study. Measure before anything is rolled out.")
    if serving.forced:
        warnings.append(
            f"{serving.arm} was asked for; the verdict is “{verdict.decision}”: {verdict.headline}"
        )
    if serving.speculation is None or not serving.confirmed:
        trial = verdict.next_trials[0] if verdict.next_trials and not serving.confirmed else None
        return Rollout(
            study=design.name,
            decision=verdict.decision,
            serving=serving,
            warnings=tuple(warnings),
            evidence=(verdict.headline, *verdict.reasons[:1]),
            first=trial.what if trial else "",
            first_toml=trial.toml if trial else "",
            steps=(),
            why_so_long="",
            gates=(),
            commands=(),
            again=tuple(verdict.reasons[1:]) if serving.speculation is None else (),
        )
    expected = expectations(assessment, arm=serving.arm)
    if expected.low_rate > expected.rate:
        warnings.append(
            f"Acceptance was measured at {percent(expected.rate)}, below the "
            f"{percent(expected.low_rate)} from which `specwise watch` calls a replica unhealthy."
        )
    steps, why = _steps(assessment, expected)
    return Rollout(
        study=design.name,
        decision=verdict.decision,
        serving=serving,
        warnings=tuple(warnings),
        evidence=_evidence(assessment, serving, expected),
        first="",
        first_toml="",
        steps=steps,
        why_so_long=why,
        gates=_gates(expected),
        commands=_commands(expected, serving, folder),
        again=_again(assessment, expected),
    )


def _evidence(assessment: Assessment, serving: Serving, expected: Expectations) -> tuple[str, ...]:
    """What was decided, and what users saw."""
    measured = (
        f"At {load_phrase(expected.production_load)}: mean TPOT {_ms(expected.tpot_s.mean)} "
        f"(without speculation {_ms(expected.baseline_tpot_s.mean)}), mean TTFT "
        f"{_ms(expected.ttft_s.mean)} ({_ms(expected.baseline_ttft_s.mean)}), acceptance "
        f"{percent(expected.rate)}."
    )
    # What a forced arm's verdict says is among the warnings.
    found = [measured] if serving.forced else [assessment.verdict.headline, measured]
    production = assessment.study.design.production_load
    if production != expected.production_load:
        found.append(_idle(assessment, serving.arm, production))
    return tuple(found)


def _idle(assessment: Assessment, arm: str, production: LoadPoint) -> str:
    """What a schedule that drafts nothing at the production load costs there."""
    design = assessment.study.design
    tpot_s = {
        s.arm: s.tpot_s.mean
        for s in assessment.summaries
        if s.tpot_s is not None
        and (s.workload, s.segment, s.load, s.purpose)
        == (design.production_workload, None, production, Purpose.MEASURE)
    }
    text = f"At {load_phrase(production)} the schedule drafts nothing"
    if arm not in tpot_s or design.arms[0].name not in tpot_s:
        return f"{text}."
    return (
        f"{text}: mean TPOT {_ms(tpot_s[arm])} (without speculation "
        f"{_ms(tpot_s[design.arms[0].name])})."
    )


def _steps(assessment: Assessment, expected: Expectations) -> tuple[tuple[RolloutStep, ...], str]:
    """How long each share must last for the drift test and the alerts to be able to speak."""
    test = drift_test(expected)
    rate = _requests_per_s(assessment, expected)
    settle_s = slowest_alert_s(expected)
    steps = []
    for share in SHARES:
        drafted_per_s = share * rate * test.drafted_per_request
        lasts_s = max(settle_s, test.expected_delay_s(drafted_per_s))
        steps.append(RolloutStep(share, lasts_s, share * rate * lasts_s))
    why = (
        f"`specwise watch` sees a fall of acceptance by {test.drop * 100:.0f} points after about "
        f"{_count(_requests_for_drift(test))} requests of one replica (at most "
        f"{percent(test.false_alarm_rate)} false alarms in {test.horizon_s / 86_400:.0f} days), "
        f"and the slowest alert needs {duration(settle_s)} to fire: a step lasts as long as the "
        f"slower of the two. Shares and times are of the load that the study put on one server "
        f"({load_phrase(expected.production_load)}, {number(rate)} requests/s)."
    )
    return tuple(steps), why


def _requests_for_drift(test: DriftTest) -> float:
    """Requests until a fall by the test's drop is seen, where windows are short: 2 h s^2 / d^2."""
    return 2 * test.limit * test.deviation**2 / test.drop**2


def _requests_per_s(assessment: Assessment, expected: Expectations) -> float:
    """What the arm answered a second at the load the figures are from."""
    summary = _summary(assessment, expected)
    load = expected.production_load
    if summary.requests_per_s is not None:
        return summary.requests_per_s
    if load.loop is Loop.OPEN or summary.e2e_s is None:
        return load.value
    return load.value / summary.e2e_s.mean


def _summary(assessment: Assessment, expected: Expectations) -> ServingSummary:
    workload = assessment.study.design.production_workload
    return next(
        s
        for s in assessment.summaries
        if (s.arm, s.workload, s.segment, s.load, s.purpose)
        == (expected.arm, workload, None, expected.production_load, Purpose.MEASURE)
    )


def slowest_alert_s(expected: Expectations) -> float:
    """Seconds from a lasting change until the last alert on it fires: its range and its ``for``."""
    groups = yaml.safe_load(alert_rules(expected, tap=True))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    return max(
        _seconds(rule["for"])
        + max((_seconds(text) for text in re.findall(r"\[(\w+)\]", rule["expr"])), default=0.0)
        for rule in alerts
    )


def _seconds(text: str) -> float:
    """A Prometheus duration such as ``30m``."""
    return float(text[:-1]) * _UNITS_S[text[-1]]


def _gates(expected: Expectations) -> tuple[Gate, ...]:
    floor = max(expected.drifted_rate, expected.low_rate)
    off = (
        f"{percent(expected.low_rate)} is break-even"
        if expected.break_even is not None
        else f"below {percent(expected.low_rate)} turn it off (rule of thumb)"
    )
    running = (
        "" if expected.running is None else f" while {expected.running:.0f} or fewer requests run"
    )
    gates = [
        Gate(
            "Acceptance rate",
            percent(expected.rate),
            f"at least {percent(floor)}, no drift alarm; {off}",
        ),
        *(
            Gate(
                f"Acceptance of {s.segment} (T={s.temperature:g}), in `specwise tap`",
                percent(s.rate),
                f"at least {percent(max(0.0, expected.segment_floor(s)))}",
            )
            for s in expected.segments
            if len(expected.segments) > 1
        ),
        Gate(
            "Mean TPOT",
            _ms(expected.tpot_s.mean),
            f"below {_ms(expected.baseline_tpot_s.mean)} (without speculation){running}",
        ),
        Gate(
            "Mean TTFT",
            _ms(expected.ttft_s.mean),
            f"at most {_ms(expected.ttft_limit_s)} "
            f"({_ms(expected.baseline_ttft_s.mean)} without speculation){running}",
        ),
        Gate(
            "KV cache in use, at most",
            percent(expected.kv_use_max),
            f"no preemptions while above {percent(FULL_KV_USE)}",
        ),
    ]
    if expected.crossover_running is not None:
        gates.append(
            Gate(
                "Requests running on a replica",
                number(expected.running),
                f"at most {expected.crossover_running:.1f}: beyond that speculation stopped paying",
            )
        )
    return tuple(gates)


def _commands(expected: Expectations, serving: Serving, folder: str) -> tuple[tuple[str, str], ...]:
    """What to run, as (why, command)."""
    study = shlex.quote(folder)
    arm = f" --arm {shlex.quote(serving.arm)}"
    tap = " --tap" if len(expected.segments) > 1 else ""
    found = [
        (
            "every minute from cron, the canary replicas in canary.txt; exit code 0 through the "
            "whole step",
            f"specwise watch --targets canary.txt --against {study}{arm} "
            "--state canary.json --once",
        ),
        (
            "alerts and a dashboard with the same thresholds",
            f"specwise alerts {study}{arm}{tap} > specwise-rules.yml\n"
            f"specwise dashboard {study}{arm}{tap} > specwise-dashboard.json",
        ),
    ]
    if tap:
        found.append(
            (
                "acceptance by segment and temperature: a proxy in front of a canary replica",
                "specwise tap --upstream http://CANARY:8000",
            )
        )
    return tuple(found)


def _again(assessment: Assessment, expected: Expectations) -> tuple[str, ...]:
    design = assessment.study.design
    loads = [load for load in design.loads if load.loop is design.production_load.loop]
    found = []
    if expected.crossover_running is not None:
        found.append(
            f"Load: more than {expected.crossover_running:.1f} requests running on a replica, "
            "where speculation stopped paying."
        )
    elif loads:
        found.append(f"Load: beyond {load_phrase(max(loads))}, where nothing was measured.")
    if expected.break_even is not None:
        found.append(
            f"Acceptance: a drift alarm, or {percent(expected.break_even)} (break-even) or less."
        )
    else:
        found.append("Acceptance: a drift alarm.")
    found.append(
        "Anything else than what was measured: target, draft, quantisation, vLLM version, prompts, "
        "temperatures. `specwise compare` says what such a change did."
    )
    return tuple(found)


# ------------------------------------------------------------------------------------ Markdown


def to_markdown(rollout: Rollout) -> str:
    """The note as Markdown, ending in a newline."""
    serving = rollout.serving
    if serving.speculation is None:
        title = "Speculation off"
    else:
        title = f"Rollout: {serving.arm} ({_phrase(serving.speculation)})"
    lines = [f"# {title}", "", f"From study {rollout.study}, vLLM {serving.vllm}."]
    lines += [f"\n> {warning}" for warning in rollout.warnings]
    lines += ["", *(f"- {line}" for line in rollout.evidence)]
    if rollout.first:
        lines += _first(rollout)
    if serving.speculation is not None:
        heading = "What is rolled out" if rollout.steps else "What it would be"
        lines += ["", f"## {heading}", "", *_fenced(serving.command)]
        if not serving.complete:
            lines += ["", "The study knows the server's address only: add this to its command."]
    if rollout.steps:
        lines += _step_lines(rollout)
    lines += _way_back(rollout)
    if rollout.again:
        heading = "Decide again at" if serving.speculation is not None else "More from the study"
        lines += ["", f"## {heading}", "", *(f"- {line}" for line in rollout.again)]
    return "\n".join(lines) + "\n"


def _first(rollout: Rollout) -> list[str]:
    return [
        "",
        "## First confirm it",
        "",
        f"Nobody has run this schedule yet. {rollout.first} The steps and thresholds of a rollout "
        "come from that study.",
        "",
        *_fenced(rollout.first_toml, "toml"),
    ]


def _step_lines(rollout: Rollout) -> list[str]:
    lines = ["", "## Steps", "", "| share | lasts at least | requests by then |", "|---|---|---|"]
    lines += [
        f"| {percent(step.share)} | {duration(step.lasts_s)} | {_count(step.requests)} |"
        for step in rollout.steps
    ]
    lines += [
        "",
        rollout.why_so_long,
        "",
        "A small share of one replica's load runs in smaller batches than were measured: it tests "
        "acceptance, not latency under load. With several replicas give the canary whole ones at "
        "full load; each step then lasts as long as the last row. Let a step cover the busiest "
        "hours.",
        "",
        "A server that speculates refuses requests with `min_p` or `logit_bias` (status 400, vLLM "
        "0.32): look for such clients before the first step.",
        "",
        "## Before the next step",
        "",
        "On every canary replica:",
        "",
        "| figure | measured | holds |",
        "|---|---|---|",
    ]
    lines += [f"| {gate.figure} | {gate.measured} | {gate.holds} |" for gate in rollout.gates]
    lines += ["", "## Commands", ""]
    for why, command in rollout.commands:
        lines += [f"{why[0].upper()}{why[1:]}:", "", *_fenced(command), ""]
    return lines[:-1]


def _way_back(rollout: Rollout) -> list[str]:
    serving = rollout.serving
    heading = "Turn it off" if serving.speculation is not None else "What to serve"
    lines = ["", f"## {heading}", "", *_fenced(serving.without)]
    lines += [
        "",
        "vLLM reads its speculative configuration, a schedule too, when it starts: turning it off "
        "takes a restart. No request can opt out.",
    ]
    if PER_REQUEST_METRICS in serving.command:
        lines[-1] += (
            f" Where you edit a command by hand, take `{PER_REQUEST_METRICS}` out as well: a "
            "server without speculation refuses it."
        )
    return lines


def _fenced(text: str, language: str = "") -> list[str]:
    return [f"```{language}", text.rstrip("\n"), "```"]


def _phrase(speculation: Speculation) -> str:
    if not speculation.schedule:
        return f"{speculation.method}, k={speculation.k}"
    rows = ", ".join(f"{first}-{last}: k={k}" for first, last, k in speculation.schedule)
    return f"{speculation.method}, k by batch size {rows}"


def duration(seconds: float) -> str:
    """``25 min``, ``3.5 h`` or ``2.1 days``, never rounded down."""
    if seconds < 5400:
        return f"{math.ceil(seconds / 60)} min"
    if seconds < 172_800:
        return f"{math.ceil(seconds / 360) / 10:g} h"
    return f"{math.ceil(seconds / 8640) / 10:g} days"


def _count(requests: float) -> str:
    """A number of requests to two significant digits, rounded up."""
    step = 10.0 ** max(0, math.floor(math.log10(max(requests, 1.0))) - 1)
    return f"{math.ceil(requests / step) * step:,.0f}"


def _ms(value_s: float) -> str:
    return f"{milliseconds(value_s)} ms"
