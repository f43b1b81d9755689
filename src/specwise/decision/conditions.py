"""Every rule of the catalogue applied to one study: value, status, evidence."""

from __future__ import annotations

from collections.abc import Iterator

from specwise.analysis.cells import Cells
from specwise.decision.acceptance_conditions import of_the_acceptance, of_the_mix
from specwise.decision.deployment_conditions import of_the_deployment
from specwise.decision.effect_conditions import of_the_effects
from specwise.decision.evidence import Evidence
from specwise.decision.findings import Findings, counted, limited_trials, listed
from specwise.decision.health_conditions import of_the_health
from specwise.decision.rules import Condition, Status, by_sign, condition
from specwise.domain import Purpose

__all__ = ["Condition", "check_conditions"]


def check_conditions(
    findings: Findings, measured: Cells, evidence: Evidence | None = None
) -> tuple[Condition, ...]:
    """Every rule applied, in a fixed order; what cannot be answered is "unknown", never left out.

    ``measured`` are the study's `cells`. First the measurement itself, then the service, then
    each candidate arm at the production load: effects, acceptance, the mix, health, deployment.
    """
    evidence = evidence or Evidence()
    found = [*_of_the_measurement(findings, measured), *_of_the_service(findings, evidence)]
    for arm in findings.candidates:
        found += of_the_effects(findings, arm.name)
        found += of_the_acceptance(findings, arm.name, measured)
        found += of_the_mix(findings, arm.name)
        found += of_the_health(findings, arm.name, measured, evidence)
        found += of_the_deployment(findings, arm.name, measured, evidence)
    return tuple(found)


def _of_the_measurement(findings: Findings, measured: Cells) -> Iterator[Condition]:
    design = findings.design
    production = design.production_load
    at_production = {t.trial_id for t in design.trials if t.load == production}
    limits = tuple(
        sorted(limited_trials(measured), key=lambda found: (found[0] not in at_production, found))
    )
    touched = any(name in at_production for name, _ in limits)
    yield condition(
        "client",
        "",
        _limited(limits),
        "fail" if touched else "unknown" if limits else "pass",
        evidence=tuple(name for name, _ in limits),
        veto=touched,
    )
    whole = [
        e
        for arm in findings.candidates
        if (e := findings.effect("speedup", arm.name, findings.production, production))
    ]
    ids = tuple(dict.fromkeys(name for effect in whole for name in effect.trial_ids))
    known = bool(whole) and all(e.trial_noise_known for e in whole)
    yield condition(
        "repeats",
        "",
        counted(max((e.repeats for e in whole), default=0), "repeat")
        + ", "
        + counted(sum(f.metric == "speedup" for f in findings.noise_floors), "A/A trial"),
        by_sign(known),
        evidence=ids,
        veto=True,
    )
    pairs = min((e.pairs for e in whole), default=0)
    yield condition("pairs", "", f"{pairs} pairs", by_sign(pairs >= 20), evidence=ids, veto=True)
    yield _noise_floor(findings, measured)
    loads = sorted({e.load for e in findings.effects})
    yield condition(
        "G3",
        "",
        f"{listed([load.label for load in loads]) or 'none'}; production is {production.label}",
        by_sign(production in loads and bool(findings.lighter_loads())),
        evidence=ids,
    )


def _noise_floor(findings: Findings, measured: Cells) -> Condition:
    """The A/A trial nearest to the verdict: of the production workload if there is one."""
    design = findings.design
    held = sorted(
        (
            f
            for f in findings.noise_floors
            if f.metric == "speedup" and f.load == design.production_load
        ),
        key=lambda f: f.workload != design.production_workload,
    )
    if not held:
        return condition("A/A", design.production_workload, "no A/A trial at this load", "unknown")
    floor = held[0]
    key = (design.arms[0].name, floor.workload, floor.load, Purpose.NOISE_FLOOR)
    return condition(
        "A/A",
        floor.workload,
        f"{floor.ratio:.2f}x [{floor.low:.2f}, {floor.high:.2f}]",
        by_sign(floor.low <= 1 <= floor.high or 0.95 <= floor.ratio <= 1 / 0.95),
        evidence=tuple(table.trial.trial_id for table in measured.get(key, ())),
    )


def _limited(limits: tuple[tuple[str, str], ...]) -> str:
    if not limits:
        return "no limit met"
    name, why = limits[0]
    more = f", and {len(limits) - 1} more trials" if len(limits) > 1 else ""
    return f"{name}: {why}{more}"


def _of_the_service(findings: Findings, evidence: Evidence) -> Iterator[Condition]:
    design = findings.design
    name = design.production_workload
    shares = design.workload(name).shares
    temperatures = [(design.segment(segment).temperature, share) for segment, share in shares]
    spread = max(t for t, _ in temperatures) - min(t for t, _ in temperatures)
    cool = sum(share for t, share in temperatures if t <= 0.5)
    median = _quantile(temperatures, 0.5)
    yield condition(
        "I2",
        name,
        f"{_temperatures(temperatures)}: {cool:.0%} at 0.5 or less",
        by_sign(spread <= 0.5 and cool >= 0.5),
    )
    yield condition("I3", name, f"{median:g}", by_sign(median <= 0.7))
    wide = _quantile(temperatures, 0.9) - _quantile(temperatures, 0.1)
    yield condition("I3-spread", name, f"{wide:g}", by_sign(wide <= 0.7 + 1e-9))
    greedy = all(t == 0 for t, _ in temperatures)
    yield condition(
        "B3",
        name,
        "every request at T = 0" if greedy else _temperatures(temperatures),
        "unknown" if greedy else "pass",
    )
    bound = design.slo.bound
    yield condition("I2-slo", "", f"bound by {bound}", by_sign(bound != "ttft"))
    yield _watched(findings, evidence)
    alone = {p.workload for p in findings.parts() if p.segment is None}
    missing = [segment for segment, _ in shares if len(shares) > 1 and segment not in alone]
    control = f"measured alone: {listed(sorted(alone & {s for s, _ in shares})) or 'none'}"
    yield condition(
        "F2",
        name,
        control if len(shares) > 1 else "one segment: nothing shares its batch",
        by_sign(not missing),
        evidence=tuple(
            dict.fromkeys(
                i
                for e in findings.effects
                if e.metric == "speedup" and e.load == design.production_load
                for i in e.trial_ids
            )
        ),
    )


def _watched(findings: Findings, evidence: Evidence) -> Condition:
    """No acceptance figures at all: nobody can watch. Otherwise only the user knows who does."""
    seen = any(a.source.value != "chunks" for a in findings.acceptance)
    status: Status = "unknown" if evidence.watched is None else by_sign(evidence.watched)
    said = {None: "nobody said", True: "you say it is", False: "you say it is not"}
    value = f"the servers report acceptance; {said[evidence.watched]}"
    if not seen:
        status, value = "fail", "the servers report no acceptance: nothing can be watched"
    ids = tuple(dict.fromkeys(i for a in findings.acceptance for i in a.trial_ids))
    return condition("I3-monitoring", "", value, status, evidence=ids)


def _quantile(values: list[tuple[float, float]], q: float) -> float:
    """The smallest value at or below which the share ``q`` of the weight lies."""
    total = 0.0
    for value, weight in sorted(values):
        total += weight
        if total >= q - 1e-9:
            return value
    return sorted(values)[-1][0]


def _temperatures(values: list[tuple[float, float]]) -> str:
    return "T = " + listed([f"{t:g}" for t in sorted({t for t, _ in values})])
