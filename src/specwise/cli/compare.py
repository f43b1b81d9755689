"""`specwise compare`: what a change between two studies did to acceptance and times."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from specwise.errors import InputError

# The sides of the bundled before/after: what replaces the model and the name in its study file.
_SIDES = {"float": "", "int8": "-int8", "int4": "-int4"}


@click.command(
    epilog="Example: specwise compare --example float > before.toml; "
    "specwise compare --example int8 > after.toml; specwise measure before.toml --out before; "
    "specwise measure after.toml --out after; specwise compare before after"
)
@click.argument("before", required=False, metavar="STUDY_A", type=click.Path(path_type=Path))
@click.argument("after", required=False, metavar="STUDY_B", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML page [STUDY_B/compare.html].")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--example",
    type=click.Choice(list(_SIDES)),
    help="Print one side of a before/after that runs on a processor, and stop.",
)
def compare(
    *,
    before: Path | None,
    after: Path | None,
    out: Path | None,
    as_json: bool,
    example: str | None,
) -> None:
    """What did the change between STUDY_A (before) and STUDY_B (after) do?

    Both studies ask the same prompts; between them something changed: the target's or the draft's
    quantisation, the vLLM version, k, a flag. Says by segment whether acceptance fell by more than
    5 points, what happened to the times, what else differs, and what to do.

    Exit code 0: no harm. 1: acceptance fell by more than 5 points for certain, or a speculating
    arm's time per output token at production load is more than 5 % longer for certain. 3: cannot
    tell. 2: the studies cannot be compared.
    """
    if example is not None:
        click.echo(_example(example), nl=False)
        return
    if before is None or after is None:
        raise InputError(
            "Give two study folders: before the change, and after it.",
            "`specwise compare --help` has an example that runs.",
        )
    from specwise.analysis.before_after import compare_studies  # noqa: PLC0415 - scipy loads here
    from specwise.decision.change import EXIT_CODES, judge  # noqa: PLC0415
    from specwise.measurement.store import read_study  # noqa: PLC0415
    from specwise.reporting.before_after import (  # noqa: PLC0415
        change_to_dict,
        print_change,
        write_change,
    )

    change = compare_studies(read_study(before), read_study(after))
    verdict = judge(change)
    page = out or after / "compare.html"
    write_change(change, verdict, page)
    if as_json:
        import orjson  # noqa: PLC0415

        found = change_to_dict(change, verdict) | {"page": str(page)}
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        print_change(change, verdict, page=page)
    sys.exit(EXIT_CODES[verdict.outcome])


def _example(side: str) -> str:
    from specwise.measurement.design import bundled_study  # noqa: PLC0415

    text = bundled_study("quantise")
    named = text.replace('name = "quantise-float"', f'name = "quantise-{side}"')
    model = '"bundled:target-unpadded'
    return named.replace(f'{model}"', f'{model}{_SIDES[side]}"')
