"""`specwise measure`: run a study file, or go on with an unfinished one."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from specwise.domain import (
    Deployment,
    LoadPoint,
    Loop,
    MeasuredTrial,
    Outcome,
    Purpose,
    StudyDesign,
    Trial,
)
from specwise.errors import InputError, StoppedError
from specwise.measurement.design import bundled_study, read_study_file
from specwise.measurement.experiments import EXPERIMENTS
from specwise.measurement.prompts import check_inputs
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder
from specwise.measurement.study import Listener, Progress, conduct


@click.command(
    epilog="Example: specwise measure --example > study.toml; specwise measure study.toml"
)
@click.argument("study", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Study folder to create.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="Go on with an unfinished study folder."
)
@click.option(
    "--experiment",
    type=click.Choice(EXPERIMENTS),
    help="Measure STUDY's arms and prompts as this experiment; see docs/how-to/experiments.md.",
)
@click.option(
    "--temperatures",
    help="Of the temperature experiment, separated by commas [0,0.4,0.8,1].",
)
@click.option("--plan", is_flag=True, help="Print the trials that would run, and stop.")
@click.option("--example", is_flag=True, help="Print a study file to start from, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def measure(
    *,
    study: Path | None,
    out: Path | None,
    resume: Path | None,
    experiment: str | None,
    temperatures: str | None,
    plan: bool,
    example: bool,
    as_json: bool,
) -> None:
    """Measure every arm of STUDY (a TOML file) at every load, into a study folder.

    Interrupting is safe: each request is stored as it ends, and --resume goes on.
    """
    if example:
        click.echo(bundled_study(experiment or "example"), nl=False)
        return
    if (study is None) == (resume is None):
        raise InputError(
            "Give a study file, or --resume with an unfinished study folder.",
            "`specwise measure --example` prints a study file to start from.",
        )
    if resume is not None and (experiment or temperatures):
        raise InputError(
            "--experiment and --temperatures make a new study; --resume goes on with one.",
            "Leave them out: the folder knows what it is.",
        )
    if resume is not None:
        folder = StudyFolder.open(resume)
        base = Path(folder.provenance.get("base", "."))
    else:
        assert study is not None  # noqa: S101 - checked above
        design, text = read_study_file(
            study,
            experiment=experiment,
            temperatures=_temperatures(temperatures),
            version_of=engine_version,
        )
        if plan:
            _print_plan(design)
            return
        base = study.resolve().parent
        check_inputs(design, base)  # before a folder is made that could not be used
        folder = open_folder(out or _default_folder(design), design, text)
    run(folder, base, quiet=as_json)
    if as_json:
        click.echo(_result_json(folder))
    else:
        click.echo(f"\nMeasured into {folder.path}")
        if folder.design.experiment:
            _print_experiment(folder)
        click.echo(f"Next: specwise decide {folder.path}")


def open_folder(path: Path, design: StudyDesign, text: str) -> StudyFolder:
    """A new study folder, or the unfinished one of the very same study file."""
    if (path / "manifest.json").exists():
        folder = StudyFolder.open(path)
        if folder.design != design:
            raise InputError(
                f"{path} holds a study of another design.",
                "Choose another folder with --out.",
            )
        return folder
    return StudyFolder.create(path, design, describe_here(), text)


def run(folder: StudyFolder, base: Path, *, quiet: bool = False) -> None:
    """Conduct the study with progress on the terminal; Ctrl-C stops it cleanly."""
    skip = None
    if folder.design.experiment == "ladder":
        from specwise.analysis.ladder import trials_to_skip  # noqa: PLC0415 - scipy loads here

        skip = trials_to_skip
    with interruptible() as stop:
        conduct(folder, base=base, listener=listener_of(quiet), stop=stop, skip=skip)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that the study asks; a second Ctrl-C insists."""
    asked = False

    def ask(number: int, frame: object) -> None:  # noqa: ARG001
        nonlocal asked
        if asked:
            raise StoppedError("Stopped at once; requests in flight are lost, the rest is kept.")
        asked = True
        click.echo("\nstopping after the requests in flight are closed ...", err=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _temperatures(text: str | None) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in (text or "").split(",") if word.strip())
    except ValueError:
        values = (math.nan,)
    if not all(0 <= value <= 2 for value in values):
        raise InputError(
            f"--temperatures {text!r} are not temperatures.",
            "Give numbers from 0 to 2, separated by commas: --temperatures 0,0.4,0.8,1.0",
        )
    return values


def engine_version(deployment: Deployment) -> str | None:
    """The vLLM that a deployment will run, None if its engine does not say."""
    from specwise.vllm.engine import embedded_version  # noqa: PLC0415
    from specwise.vllm.server import EMBEDDED, installed_version  # noqa: PLC0415

    if deployment.engine == EMBEDDED:
        return embedded_version()
    return installed_version(deployment.engine)


def _print_experiment(folder: StudyFolder) -> None:
    from specwise.decision.assessment import assess  # noqa: PLC0415 - numpy and scipy load here
    from specwise.reporting.console import print_experiment  # noqa: PLC0415

    experiment = assess(folder.read()).experiment
    if experiment is not None:
        print_experiment(experiment)
        click.echo()


def _default_folder(design: StudyDesign) -> Path:
    return Path(f"{design.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _print_plan(design: StudyDesign) -> None:
    for trial in design.trials:
        click.echo(f"{trial.trial_id}  {trial.requests} requests")
    total = sum(trial.requests for trial in design.trials)
    click.echo(f"{len(design.trials)} trials, {total} requests")


def listener_of(quiet: bool) -> Listener:
    """Progress on the terminal, a line a trial; nothing if ``quiet``."""
    if quiet:
        return Listener()

    def started(trial: Trial, progress: Progress) -> None:
        left = "" if progress.to_go_s is None else f"  {_duration(progress.to_go_s)} to go"
        purpose = "baseline again" if trial.purpose is Purpose.NOISE_FLOOR else trial.arm
        of = "" if progress.total is None else f"/{progress.total}"
        place = f"[{progress.done + 1:>{len(of) - 1 if of else 3}}{of}]"
        click.echo(
            f"{place} {purpose:<16} {trial.workload:<12} {_load(trial.load):<16}{left}", nl=False
        )

    def finished(measured: MeasuredTrial, progress: Progress) -> None:  # noqa: ARG001
        click.echo(f"\t{_trial_figures(measured)}")

    return Listener(
        note=lambda text: click.echo(f"      {text}"),
        trial_started=started,
        trial_finished=finished,
    )


def _trial_figures(measured: MeasuredTrial) -> str:
    """A line to see at a glance that a trial went well; the analysis proper comes later."""
    ok = [record for record in measured.records if record.outcome is Outcome.OK]
    duration_s = sum(part.duration_s for part in measured.parts)
    figures = f"{sum(r.output_tokens or 0 for r in ok) / max(duration_s, 1e-9):7.0f} tokens/s"
    if failed := len(measured.records) - len(ok):
        figures += f"  {failed} of {len(measured.records)} FAILED"
    return figures


def _load(load: LoadPoint) -> str:
    return f"concurrency {load.value:g}" if load.loop is Loop.CLOSED else f"{load.value:g} req/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _result_json(folder: StudyFolder) -> str:
    import orjson  # noqa: PLC0415 - only --json needs it

    data = folder.read()
    failed = sum(r.outcome is not Outcome.OK for t in data.trials for r in t.records)
    result = {
        "study": str(folder.path),
        "trials": len(data.trials),
        "requests": sum(len(t.records) for t in data.trials),
        "failed_requests": failed,
        "complete": all(t.complete for t in data.trials),
    }
    return orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
