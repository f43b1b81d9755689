"""`specwise alerts`: Prometheus rules from a study's own thresholds."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="Example: specwise alerts specwise-demo --selector 'job=\"vllm\"' > rules.yml"
)
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--arm", help="Which speculating arm runs in production; default: the verdict's.")
@click.option(
    "--selector", default="", help="Label matchers that pick the vLLM servers, as 'job=\"vllm\"'."
)
@click.option("--tap", is_flag=True, help="Add rules by segment, over what `specwise tap` exports.")
@click.option("--json", "as_json", is_flag=True, help="The same rules as JSON.")
def alerts(study: Path, arm: str | None, selector: str, *, tap: bool, as_json: bool) -> None:
    """Print Prometheus recording and alerting rules for the deployment measured in STUDY.

    Thresholds are the study's own: its acceptance, its TPOT without speculation, its crossover.
    """
    from specwise.cli.studies import read_assessment  # noqa: PLC0415 - numpy and scipy load here
    from specwise.monitoring.alerts import alert_rules  # noqa: PLC0415
    from specwise.monitoring.expectations import expectations  # noqa: PLC0415

    _, assessment = read_assessment(study)
    expected = expectations(assessment, arm=arm)
    rules = alert_rules(expected, selector=selector, tap=tap)
    if as_json:
        import orjson  # noqa: PLC0415
        import yaml  # noqa: PLC0415

        rules = orjson.dumps(yaml.safe_load(rules), option=orjson.OPT_INDENT_2).decode() + "\n"
    click.echo(rules, nl=False)
