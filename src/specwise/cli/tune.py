"""`specwise tune`: the best way to speculate at each load, and a schedule that was confirmed."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from specwise.cli.measure import engine_version, interruptible, listener_of, open_folder
from specwise.domain import StudyData, StudyDesign, TuneSettings
from specwise.errors import InputError, StoreError
from specwise.measurement.design import bundled_study, read_study_file
from specwise.measurement.prompts import check_inputs
from specwise.measurement.provenance import describe_here
from specwise.measurement.store import StudyFolder
from specwise.measurement.study import Choice, conduct

if TYPE_CHECKING:
    from specwise.decision.deployment import Tuned

SEARCH, CONFIRM = "search", "confirm"


@click.command(epilog="Example: specwise tune --example > tune.toml; specwise tune tune.toml")
@click.argument("study", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tuning to create.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with an unfinished one.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 0.5, min_open=True),
    help="Share of goodput that the answer may lose, averaged over the loads [0.02].",
)
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), help="Minutes for the search [no limit]."
)
@click.option(
    "--confirm-repeats",
    type=click.IntRange(2, 40),
    default=6,
    show_default=True,
    help="Most repeats of the confirmation, at loads that stay undecided.",
)
@click.option("--no-confirm", is_flag=True, help="Search only; nothing will be recommended.")
@click.option("--plan", is_flag=True, help="Print the arms and cells of the sweep, and stop.")
@click.option("--example", is_flag=True, help="Print a study file to start from, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def tune(
    *,
    study: Path | None,
    out: Path | None,
    resume: Path | None,
    tolerance: float | None,
    budget: float | None,
    confirm_repeats: int,
    no_confirm: bool,
    plan: bool,
    example: bool,
    as_json: bool,
) -> None:
    """Find the best draft length of every method of STUDY at every load, and confirm it.

    Runs the trials that are worth most for the time they take, until what choosing now could lose
    is within the tolerance or the budget is spent. Then composes a schedule of draft lengths by
    batch size and measures it beside the baseline and the best static arm, on new requests.

    Exit code 0: on (with or without a schedule). 1: off. 3: not decided.
    """
    if example:
        click.echo(bundled_study("tune"), nl=False)
        return
    if (study is None) == (resume is None):
        raise InputError(
            "Give a study file, or --resume with the folder of an unfinished tuning.",
            "`specwise tune --example` prints a study file to start from.",
        )
    if resume is not None:
        search = StudyFolder.open(search_path(resume))
        base, path = Path(search.provenance.get("base", ".")), resume
        design = _with_settings(search.design, tolerance, budget)
        if design != search.design:
            search.change_settings(design.tune)
    else:
        assert study is not None  # noqa: S101 - checked above
        design, text = read_study_file(study, experiment="tune", version_of=engine_version)
        design = _with_settings(design, tolerance, budget)
        if plan:
            _print_plan(design)
            return
        base, path = study.resolve().parent, out or Path(f"{design.name}-tuning")
        check_inputs(design, base)
        search = open_folder(path / SEARCH, design, text)
    _search(search, base, quiet=as_json)
    tuned = read_tuning(path)
    if not no_confirm:
        _confirm(tuned, path, base, confirm_repeats, quiet=as_json)
        tuned = read_tuning(path)
    show(tuned, path, as_json=as_json)


def search_path(path: Path) -> Path:
    """Where the search of the tuning in ``path`` is; StoreError if it is no tuning."""
    if not (path / SEARCH / "manifest.json").exists():
        raise StoreError(
            f"{path} is not the folder of a tuning: it has no {SEARCH}/manifest.json.",
            "Give the folder that `specwise tune` printed.",
        )
    return path / SEARCH


def _with_settings(
    design: StudyDesign, tolerance: float | None, budget_minutes: float | None
) -> StudyDesign:
    settings = design.tune or TuneSettings()
    if tolerance is not None:
        settings = replace(settings, tolerance=tolerance)
    if budget_minutes is not None:
        settings = replace(settings, budget_s=60 * budget_minutes)
    return replace(design, tune=settings)


def _search(folder: StudyFolder, base: Path, *, quiet: bool) -> None:
    """Run the trials that the tuner asks for, with progress on the terminal."""
    from specwise.analysis.cells import cells  # noqa: PLC0415 - scipy loads here
    from specwise.decision.standing import not_run, summary_line  # noqa: PLC0415
    from specwise.decision.tuning import Spent, next_pick  # noqa: PLC0415

    design = folder.design
    settings = design.tune or TuneSettings()

    def choose(study: StudyData, running: Collection[str]) -> Choice:
        spent = Spent.of(folder.picks())
        found = next_pick(
            design,
            cells(study),
            spent=spent,
            running=running,
            tolerance=settings.tolerance,
            budget_s=settings.budget_s,
            over=study.skipped,
        )
        done = {t.trial.trial_id for t in study.trials if t.complete} | set(study.skipped)
        if found.trial is None:
            reason = f"the search is over: {found.reason}"
            if not quiet:
                click.echo(f"      {found.reason}")
            return Choice(
                trial_id=None,
                reason=found.reason,
                regret_bound=found.standing.regret_bound,
                skip=not_run(design, found.standing, reason, done),
            )
        if not quiet:
            click.echo(
                f"      {summary_line(found.standing, design)}; {spent.total_s / 60:.1f} min"
            )
        left = None if settings.budget_s is None else settings.budget_s - spent.total_s
        return Choice(
            trial_id=found.trial.trial_id,
            reason=found.reason,
            regret_bound=found.standing.regret_bound,
            retire=tuple(e.arm for e in found.standing.eliminated),
            to_go_s=left,
        )

    with interruptible() as stop:
        conduct(
            folder,
            base=base,
            listener=listener_of(quiet),
            stop=stop,
            choose=choose,
            resume_command=f"specwise tune --resume {folder.path.parent}",
        )


def _confirm(tuned: Tuned, path: Path, base: Path, repeats: int, *, quiet: bool) -> None:
    """Measure what looks best again, way by way until one holds; nothing where nothing wins.

    A confirmation that is there already is gone on with: the same trials lead to the same ways.
    """
    from specwise.decision.confirmation import (  # noqa: PLC0415 - scipy loads here
        confirm,
        confirmation_design,
        next_way,
    )

    confirming: list[StudyData] = []
    while tuned.stopped and (way := next_way(tuned.search, confirming, tuned.tolerance)):
        design = confirmation_design(tuned.search.design, way, repeats=repeats)
        folder = confirmation_folder(path, design)
        if not quiet:
            arms = ", ".join(arm.name for arm in folder.design.arms)
            click.echo(f"\nConfirming on requests dealt anew: {arms}")
        _run_confirmation(folder, base, quiet=quiet)
        confirming.append(folder.read())
        held = confirm(tuned.search.design, confirming[-1])
        if any(c.outcome == "confirmed" for c in held):
            return


def confirmation_folder(path: Path, design: StudyDesign) -> StudyFolder:
    """The confirmation of these arms in the tuning at ``path``: one that is there, or a new one.

    A tuning that goes on under other settings may have other arms to confirm, or more repeats.
    """
    held = confirmation_paths(path)
    for where in held:
        folder = StudyFolder.open(where)
        if folder.design.arms == design.arms:
            if len(design.trials) > len(folder.design.trials):
                folder.add_repeats(design.trials)
            return folder
    where = path / (f"{CONFIRM}-{len(held) + 1}" if held else CONFIRM)
    text = (path / SEARCH / "study.toml").read_text(encoding="utf-8")
    return StudyFolder.create(where, design, describe_here(), text)


def confirmation_paths(path: Path) -> list[Path]:
    """The confirmations of the tuning in ``path``, oldest first."""
    found: list[Path] = []
    while (where := path / (f"{CONFIRM}-{len(found) + 1}" if found else CONFIRM)).exists():
        found.append(where)
    return found


def _run_confirmation(folder: StudyFolder, base: Path, *, quiet: bool) -> None:
    from specwise.decision.confirmation import next_confirmation  # noqa: PLC0415

    def choose(study: StudyData, running: Collection[str]) -> Choice:  # noqa: ARG001
        trial = next_confirmation(study)
        if trial is not None:
            return Choice(trial.trial_id, reason="to confirm")
        done = {t.trial.trial_id for t in study.trials} | set(study.skipped)
        left = [t.trial_id for t in folder.design.trials if t.trial_id not in done]
        reason = "it was already clear whether this load keeps what off gives"
        return Choice(None, reason=reason, skip=dict.fromkeys(left, reason))

    with interruptible() as stop:
        conduct(
            folder,
            base=base,
            listener=listener_of(quiet),
            stop=stop,
            choose=choose,
            resume_command=f"specwise tune --resume {folder.path.parent}",
        )


def read_tuning(path: Path) -> Tuned:
    """What the tuning in folder ``path`` came to so far; StoreError if it is none."""
    from specwise.decision.deployment import assess_tuning  # noqa: PLC0415 - scipy loads here

    search = StudyFolder.open(search_path(path))
    confirming = [StudyFolder.open(where).read() for where in confirmation_paths(path)]
    settings = search.design.tune or TuneSettings()
    return assess_tuning(
        search.read(),
        search.picks(),
        [study for study in confirming if study.trials],
        tolerance=settings.tolerance,
        budget_s=settings.budget_s,
    )


def show(tuned: Tuned, path: Path, *, as_json: bool) -> NoReturn:
    """Write the page and the JSON of a tuning, print it, and exit by its recommendation."""
    from specwise.decision.verdict import exit_code  # noqa: PLC0415
    from specwise.reporting.tuning_console import print_tuning  # noqa: PLC0415

    page = path / "report.html"
    answer = write_answer(tuned, path, page)
    if as_json:
        click.echo(answer.read_bytes())
    else:
        print_tuning(tuned, report=page)
    sys.exit(exit_code(tuned.recommendation.decision))


def write_answer(tuned: Tuned, path: Path, page: Path) -> Path:
    """Write a tuning's ``page``, the pages that it links to, and its JSON; the latter's path."""
    import orjson  # noqa: PLC0415 - what follows takes a while to load

    from specwise.decision.assessment import assess  # noqa: PLC0415
    from specwise.decision.evidence import gather_evidence  # noqa: PLC0415
    from specwise.reporting.html import write_report  # noqa: PLC0415
    from specwise.reporting.json_export import write_json  # noqa: PLC0415
    from specwise.reporting.tuning_page import write_tuning  # noqa: PLC0415
    from specwise.reporting.tuning_view import tuning_to_dict  # noqa: PLC0415

    for study in tuned.confirming:  # the evidence behind the answer
        assessment = assess(study, gather_evidence(study))
        write_report(assessment, Path(study.folder) / "report.html")
        write_json(assessment, Path(study.folder) / "assessment.json")
    write_tuning(tuned, page)
    answer = path / "tuning.json"
    answer.write_bytes(orjson.dumps(tuning_to_dict(tuned), option=orjson.OPT_INDENT_2))
    return answer


def _print_plan(design: StudyDesign) -> None:
    click.echo(f"{len(design.arms)} arms: {', '.join(arm.name for arm in design.arms)}")
    loads = ", ".join(load.label for load in design.loads)
    click.echo(f"workloads {', '.join(w.name for w in design.workloads)}; loads {loads}")
    cells = len(design.workloads) * len(design.loads)
    click.echo(f"{cells} cells; every arm once in each would be {cells * len(design.arms)} trials")
