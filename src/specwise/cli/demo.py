"""`specwise demo`: a whole study on the embedded engine, with its verdict and report."""

from __future__ import annotations

from pathlib import Path

import click

from specwise.cli.measure import open_folder, run


@click.command(epilog="Example: specwise demo --quick")
@click.option("--quick", is_flag=True, help="A smaller study, three minutes at most.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Study folder [specwise-demo or specwise-demo-quick]; an unfinished one is resumed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdict and evidence as JSON.")
def demo(*, quick: bool, out: Path | None, as_json: bool) -> None:
    """Measure speculation on a real vLLM on this machine's processor, decide, and show it.

    Serves a small bundled target with and without speculation (a draft model, n-gram lookup),
    under three loads, for structured, creative and copying requests and their mix. Exits 0 when
    the study was measured and judged, whatever the verdict.
    """
    from specwise.facts.bundled import check_padding  # noqa: PLC0415 - numpy loads here
    from specwise.measurement.design import bundled_study, parse_study  # noqa: PLC0415
    from specwise.measurement.fleet import resolve_model  # noqa: PLC0415
    from specwise.vllm.engine import engine_python  # noqa: PLC0415

    engine_python()  # says how to install the engine when it is not there
    text = bundled_study("demo-quick" if quick else "demo")
    design = parse_study(text, name="the demo's study")
    folder = open_folder(out or Path(design.name), design, text)

    padded = Path(resolve_model("bundled:target"))
    check = check_padding(padded)
    if not check.same:
        raise click.ClickException(f"{padded} differs from the trained target; remove it.")
    click.echo(
        f"padded target: greedy output equal to the trained one on {check.tokens} tokens "
        f"of {check.prompts} prompts",
        err=as_json,
    )
    total = sum(trial.requests for trial in design.trials)
    click.echo(
        f"{len(design.arms)} arms, {len(design.trials)} trials, {total} requests; "
        "Ctrl-C is safe, the same command goes on",
        err=as_json,
    )
    run(folder, Path.cwd(), quiet=as_json)

    import orjson  # noqa: PLC0415

    from specwise.decision.assessment import assess  # noqa: PLC0415 - not before it is needed
    from specwise.decision.evidence import gather_evidence  # noqa: PLC0415
    from specwise.reporting.console import print_assessment  # noqa: PLC0415
    from specwise.reporting.html import write_report  # noqa: PLC0415
    from specwise.reporting.json_export import assessment_to_dict, write_json  # noqa: PLC0415

    data = folder.read()
    assessment = assess(data, gather_evidence(data))
    page = folder.path / "report.html"
    write_report(assessment, page)
    write_json(assessment, folder.path / "assessment.json")
    if as_json:
        click.echo(orjson.dumps(assessment_to_dict(assessment), option=orjson.OPT_INDENT_2))
    else:
        print_assessment(assessment, report=page)
