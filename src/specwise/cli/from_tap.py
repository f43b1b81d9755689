"""`specwise decide --from-tap`: what production's records alone can decide."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click


def decide_from_tap(records: Path, *, against: Path | None, as_json: bool) -> NoReturn:
    """Print the judgement of the records in a folder; exits with its code."""
    from specwise.decision.assessment import assess  # noqa: PLC0415
    from specwise.measurement.store import read_study  # noqa: PLC0415
    from specwise.monitoring.expectations import expectations  # noqa: PLC0415
    from specwise.monitoring.production import judge_production  # noqa: PLC0415
    from specwise.monitoring.production_page import (  # noqa: PLC0415
        print_production,
        production_to_dict,
    )
    from specwise.monitoring.tap_records import read_records  # noqa: PLC0415

    expected = expectations(assess(read_study(against))) if against is not None else None
    production = judge_production(read_records(records), expected)
    if as_json:
        import orjson  # noqa: PLC0415

        click.echo(orjson.dumps(production_to_dict(production), option=orjson.OPT_INDENT_2))
    else:
        print_production(production)
    sys.exit(production.exit_code)
