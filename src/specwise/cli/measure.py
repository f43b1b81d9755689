"""`specwise measure`: run a study file, or go on with an unfinished one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from specwise.domain import LoadPoint, Loop, MeasuredTrial, Outcome, Purpose, StudyDesign, Trial
from specwise.errors import InputError, StoppedError
from specwise.measurement.design import bundled_study, read_study_file
from specwise.measurement.prompts import check_prompts
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
@click.option("--plan", is_flag=True, help="Print the trials that would run, and stop.")
@click.option("--example", is_flag=True, help="Print a study file to start from, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def measure(
    *,
    study: Path | None,
    out: Path | None,
    resume: Path | None,
    plan: bool,
    example: bool,
    as_json: bool,
) -> None:
    """Measure every arm of STUDY (a TOML file) at every load, into a study folder.

    Interrupting is safe: each request is stored as it ends, and --resume goes on.
    """
    if example:
        click.echo(bundled_study("example"), nl=False)
        return
    if (study is None) == (resume is None):
        raise InputError(
            "Give a study file, or --resume with an unfinished study folder.",
            "`specwise measure --example` prints a study file to start from.",
        )
    if resume is not None:
        folder = StudyFolder.open(resume)
        base = Path(folder.provenance.get("base", "."))
    else:
        assert study is not None  # noqa: S101 - checked above
        design, text = read_study_file(study)
        if plan:
            _print_plan(design)
            return
        base = study.resolve().parent
        check_prompts(design, base)  # before a folder is made that could not be used
        folder = open_folder(out or _default_folder(design), design, text)
    run(folder, base, quiet=as_json)
    if as_json:
        click.echo(_result_json(folder))
    else:
        click.echo(f"\nMeasured into {folder.path}\nNext: specwise decide {folder.path}")


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
    with interruptible() as stop:
        conduct(folder, base=base, listener=_listener(quiet), stop=stop)


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


def _default_folder(design: StudyDesign) -> Path:
    return Path(f"{design.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _print_plan(design: StudyDesign) -> None:
    for trial in design.trials:
        click.echo(f"{trial.trial_id}  {trial.requests} requests")
    total = sum(trial.requests for trial in design.trials)
    click.echo(f"{len(design.trials)} trials, {total} requests")


def _listener(quiet: bool) -> Listener:
    if quiet:
        return Listener()

    def started(trial: Trial, progress: Progress) -> None:
        left = "" if progress.to_go_s is None else f"  {_duration(progress.to_go_s)} to go"
        purpose = "baseline again" if trial.purpose is Purpose.NOISE_FLOOR else trial.arm
        place = f"[{progress.done + 1:>{len(str(progress.total))}}/{progress.total}]"
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
