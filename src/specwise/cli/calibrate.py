"""`specwise calibrate`: what steps cost on an engine, for `specwise predict`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specwise.errors import InputError

if TYPE_CHECKING:
    from specwise.domain import StudyDesign


@click.command(epilog="Example: specwise calibrate study.toml --arm draft_model --out costs.json")
@click.argument("study", required=False, type=click.Path(path_type=Path))
@click.option("--arm", help="The speculating arm (default: the first of the study).")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("costs.json"),
    show_default=True,
    help="Where to store the costs.",
)
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 20))
@click.option("--json", "as_json", is_flag=True, help="Print what was stored.")
def calibrate(
    study: Path | None, arm: str | None, out: Path, *, rounds: int, as_json: bool
) -> None:
    """Measure what a step costs with and without speculation, and fit costs to it.

    STUDY is a study file whose baseline and --arm are used (its prompts are not); without one, the
    embedded engine with the bundled pair. Takes about a minute beside the servers' start.
    """
    from specwise.measurement.calibration import (  # noqa: PLC0415 - numpy and scipy load here
        BASELINE_WAVES,
        SPECULATING_WAVES,
        observe,
    )
    from specwise.measurement.design import (  # noqa: PLC0415
        bundled_study,
        parse_study,
        read_study_file,
    )
    from specwise.measurement.fleet import Fleet  # noqa: PLC0415
    from specwise.prediction.fit import fit_steps, write_fit  # noqa: PLC0415

    design = (
        read_study_file(study)[0]
        if study is not None
        else parse_study(bundled_study("demo"), name="the bundled study")
    )
    design = _two_arms(design, arm)
    baseline, candidate = design.arms
    speculation = candidate.speculation
    assert speculation is not None  # noqa: S101 - _two_arms chose a candidate
    described: dict[str, Any] = {}

    def note(text: str) -> None:
        click.echo(f"  {text}", err=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="specwise-calibrate-") as logs:
        fleet = Fleet(
            design,
            known={},
            log_path=lambda name: Path(logs) / f"{name}.log",
            on_described=described.update,
            note=note,
        )
        with fleet:
            fleet.start()
            up = time.monotonic()
            target = fleet.ready(baseline)
            observed = observe(target, BASELINE_WAVES, k=None, note=note, rounds=rounds)
            target = fleet.ready(candidate)
            observed += observe(
                target, SPECULATING_WAVES, k=speculation.k, note=note, rounds=rounds
            )
            measured = time.monotonic()
    fit = fit_steps(
        observed,
        method=speculation.method,
        about={
            "study": design.name,
            "arm": candidate.name,
            "k": speculation.k,
            "arms": described,
            "servers_s": round(up - began, 1),
            "measured_s": round(measured - up, 1),
        },
    )
    write_fit(fit, out)
    if as_json:
        click.echo(out.read_bytes())
        return
    worst = max(abs(r) for r in fit.residuals)
    click.echo(
        f"{len(observed)} kinds of steps in {measured - up:.0f} s (servers up after "
        f"{up - began:.0f} s); the fit misses them by {fit.median_error:.1%} in the median, "
        f"{worst:.1%} at most.\nCosts: {out}\n"
        f"Next: specwise predict MODEL --method {speculation.method} --costs {out}"
    )


def _two_arms(design: StudyDesign, arm: str | None) -> StudyDesign:
    """The study with its baseline and one candidate; no schedule, whose k would vary."""
    candidates = [a for a in design.arms if not a.is_baseline]
    chosen = next((a for a in candidates if a.name == (arm or candidates[0].name)), None)
    if chosen is None or chosen.speculation is None:
        raise InputError(
            f"Study {design.name} has no speculating arm {arm!r}.",
            f"It has {', '.join(a.name for a in candidates)}.",
        )
    if chosen.speculation.schedule:
        raise InputError(
            f"Arm {chosen.name} has a schedule: its draft length changes with the load.",
            "Calibrate an arm of the same method with a static k.",
        )
    return replace(design, arms=(design.arms[0], chosen))
