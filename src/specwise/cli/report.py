"""`specwise report`: the study as one HTML page, as JSON, and its raw records as a table."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: specwise report chat-20261122-101500 --records csv")
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML file [STUDY/report.html].")
@click.option(
    "--records",
    type=click.Choice(["csv", "parquet", "jsonl"]),
    help="Also export the raw records, one row a request, into the study folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
def report(study: Path, out: Path | None, records: str | None, as_json: bool) -> None:
    """Write what was measured in STUDY as one self-contained HTML page and as JSON beside it.

    STUDY is the folder of a study or of a tuning.
    """
    from specwise.cli.studies import is_tuning  # noqa: PLC0415 - the plotting stack loads here

    if is_tuning(study):
        written = _report_tuning(study, out, records)
    else:
        written = _report_study(study, out, records)
    if as_json:
        import orjson  # noqa: PLC0415

        click.echo(orjson.dumps({name: str(path) for name, path in written.items()}))
    else:
        for name, path in written.items():
            click.echo(f"{name:<12}{path}")


def _report_tuning(path: Path, out: Path | None, records: str | None) -> dict[str, Path]:
    from specwise.cli.tune import (  # noqa: PLC0415
        confirmation_paths,
        read_tuning,
        search_path,
        write_answer,
    )
    from specwise.errors import InputError  # noqa: PLC0415

    if records is not None:
        studies = [search_path(path), *confirmation_paths(path)]
        raise InputError(
            f"{path} is a tuning: its raw records are in the studies that it holds.",
            f"Give one of {', '.join(map(str, studies))}.",
        )
    page = out or path / "report.html"
    return {"report": page, "tuning": write_answer(read_tuning(path), path, page)}


def _report_study(path: Path, out: Path | None, records: str | None) -> dict[str, Path]:
    from specwise.decision.assessment import assess  # noqa: PLC0415
    from specwise.decision.evidence import gather_evidence  # noqa: PLC0415
    from specwise.measurement.store import read_study  # noqa: PLC0415
    from specwise.reporting.export import export_records  # noqa: PLC0415
    from specwise.reporting.html import write_report  # noqa: PLC0415
    from specwise.reporting.json_export import write_json  # noqa: PLC0415

    data = read_study(path)
    assessment = assess(data, gather_evidence(data))
    written = {"report": out or path / "report.html", "assessment": path / "assessment.json"}
    write_report(assessment, written["report"])
    write_json(assessment, written["assessment"])
    if records is not None:
        written["records"] = path / f"records.{records}"
        export_records(data, written["records"], records)
    return written
