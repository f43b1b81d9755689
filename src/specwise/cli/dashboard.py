"""`specwise dashboard`: a Grafana dashboard with the study's own figures as lines."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: specwise dashboard specwise-demo > dashboard.json")
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--arm", help="Which speculating arm runs in production; default: the verdict's.")
@click.option(
    "--selector", default="", help="Label matchers that pick the vLLM servers, as 'job=\"vllm\"'."
)
@click.option(
    "--tap", is_flag=True, help="Add panels by segment, over what `specwise tap` exports."
)
@click.option("--json", "_as_json", is_flag=True, help="Accepted like everywhere: it always is.")
def dashboard(study: Path, arm: str | None, selector: str, *, tap: bool, _as_json: bool) -> None:
    """Print a Grafana dashboard (JSON, to be imported) for the deployment measured in STUDY.

    It reads the series that the rules of `specwise alerts` record.
    """
    import orjson  # noqa: PLC0415

    from specwise.cli.studies import read_assessment  # noqa: PLC0415 - numpy and scipy load here
    from specwise.monitoring.dashboard import dashboard as model  # noqa: PLC0415
    from specwise.monitoring.expectations import expectations  # noqa: PLC0415

    _, assessment = read_assessment(study)
    expected = expectations(assessment, arm=arm)
    page = model(expected, selector=selector, tap=tap)
    click.echo(orjson.dumps(page, option=orjson.OPT_INDENT_2))
