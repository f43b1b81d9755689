"""`specwise decide`: the verdict of a study, in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(epilog="Example: specwise decide chat-20261122-101500 --explain")
@click.argument("study", type=click.Path(path_type=Path), required=False)
@click.option(
    "--from-tap",
    "tap_records",
    type=click.Path(path_type=Path),
    help="Instead: what the records of `specwise tap` in this folder can decide.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), help="With --from-tap: the study to hold up."
)
@click.option("--explain", "explained", is_flag=True, help="Every step, to be checked by hand.")
@click.option(
    "--watched/--not-watched",
    default=None,
    help="Whether production's acceptance is monitored and alerted on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdict and evidence as JSON.")
def decide(
    study: Path | None,
    *,
    tap_records: Path | None,
    against: Path | None,
    explained: bool,
    watched: bool | None,
    as_json: bool,
) -> None:
    """Should the deployment measured in STUDY speculate?

    STUDY is the folder of a study or of a tuning.

    Says on, on with a schedule, off, or measure more, overall and for each segment, with evidence.

    Exit code 0: on (with or without a schedule). 1: off. 3: not decidable from what was measured.
    """
    if tap_records is not None:
        from specwise.cli.from_tap import decide_from_tap  # noqa: PLC0415

        decide_from_tap(tap_records, against=against, as_json=as_json)
    if study is None:
        raise click.UsageError("Give a STUDY, or --from-tap FOLDER.")
    from specwise.cli.studies import is_tuning  # noqa: PLC0415 - numpy and scipy load here

    if is_tuning(study):
        from specwise.cli.tune import read_tuning, show  # noqa: PLC0415

        if explained or watched is not None:
            raise click.UsageError(
                "--explain and --watched are for a study: give one of those in STUDY/confirm*."
            )
        show(read_tuning(study), study, as_json=as_json)
    from specwise.decision.assessment import assess  # noqa: PLC0415
    from specwise.decision.evidence import gather_evidence  # noqa: PLC0415
    from specwise.decision.explanation import explain  # noqa: PLC0415
    from specwise.decision.verdict import exit_code  # noqa: PLC0415
    from specwise.measurement.store import read_study  # noqa: PLC0415

    data = read_study(study)
    assessment = assess(data, gather_evidence(data, watched=watched))
    if as_json:
        import orjson  # noqa: PLC0415

        from specwise.reporting.json_export import (  # noqa: PLC0415
            assessment_to_dict,
            json_types,
            without_secrets,
        )

        answer = assessment_to_dict(assessment)
        if explained:
            answer["explanation"] = without_secrets(json_types(explain(assessment)))
        click.echo(orjson.dumps(answer, option=orjson.OPT_INDENT_2))
    else:
        from specwise.reporting.console import print_assessment  # noqa: PLC0415
        from specwise.reporting.explanation import print_explanation  # noqa: PLC0415

        page = study / "report.html"
        print_assessment(assessment, report=page if page.exists() else None)
        if explained:
            print_explanation(explain(assessment))
        if not page.exists():
            click.echo(f"Evidence with figures: specwise report {study}")
    sys.exit(exit_code(assessment.verdict.decision))
