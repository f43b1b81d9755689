"""`specwise twin`: servers that do not exist, with a truth that is known."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specwise.errors import InputError

if TYPE_CHECKING:
    from specwise.prediction.truth import ServerTruth
    from specwise.prediction.twin import Twin

# Above this the latencies measured at the twin are the machine's, not the truth's.
TOLERABLE_LAG_S = 0.002


@click.command(
    epilog="Example: specwise twin --example > truth.toml; specwise twin truth.toml &\n\n"
    "specwise twin --study > study.toml; specwise measure study.toml"
)
@click.argument("truth", required=False, type=click.Path(path_type=Path))
@click.option("--example", is_flag=True, help="Print a truth file to start from, and stop.")
@click.option("--study", is_flag=True, help="Print a study that measures the example, and stop.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print addresses, and lag at the end, as a line of JSON each.",
)
def twin(*, truth: Path | None, example: bool, study: bool, host: str, as_json: bool) -> None:
    """Play the vLLM servers described in TRUTH (a TOML file) until Ctrl-C.

    They stream, count and export metrics like vLLM, with the acceptance, step times and faults that
    the file says: rehearse a study without a GPU, and see whether it finds what is true.
    """
    from specwise.prediction.truth import bundled_text, read_truth  # noqa: PLC0415 - numpy

    if example or study:
        click.echo(bundled_text("truth" if example else "rehearse"), nl=False)
        return
    if truth is None:
        raise InputError("Give a truth file.", "`specwise twin --example` prints one.")
    asyncio.run(_play(read_truth(truth), host, as_json))


async def _play(truths: Sequence[ServerTruth], host: str, as_json: bool) -> None:
    from specwise.prediction.twin import serve  # noqa: PLC0415 - the HTTP server

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def started(twins: Sequence[Twin]) -> None:
        if as_json:
            _print_json({playing.truth.name: {"url": playing.url} for playing in twins})
            return
        for playing in twins:
            click.echo(f"{playing.truth.name:<12} {playing.url}  {_truth(playing.truth)}")
        click.echo("Ctrl-C stops them.")

    twins = await serve(truths, host=host, started=started, stop=stop)
    if as_json:
        _print_json(
            {
                played.truth.name: {
                    "steps": played.lag().steps,
                    "lag_p50_s": played.lag().p50_s,
                    "lag_p99_s": played.lag().p99_s,
                    "lag_max_s": played.lag().max_s,
                }
                for played in twins
            }
        )
        return
    click.echo()
    for played in twins:
        lag = played.lag()
        click.echo(
            f"{played.truth.name:<12} {lag.steps} steps, chunks late by {1e3 * lag.p50_s:.1f} ms "
            f"(median), {1e3 * lag.p99_s:.1f} ms (p99), {1e3 * lag.max_s:.1f} ms (worst)"
        )
    if any(played.lag().p99_s > TOLERABLE_LAG_S for played in twins):
        click.echo("This machine could not keep the schedule: expect latencies above the truth's.")


def _truth(truth: ServerTruth) -> str:
    if not truth.k:
        return f"{truth.model}, no speculation"
    ranges = []
    for segment, rows in truth.acceptance.items():
        first = [row[0] for _, row in rows]
        ends = dict.fromkeys(f"{value:g}" for value in (max(first), min(first)))
        ranges.append(f"{segment} {' to '.join(ends)}")
    return f"{truth.model}, {truth.config.method} k={truth.k}, first draft accepted: " + ", ".join(
        ranges
    )


def _print_json(content: object) -> None:
    import orjson  # noqa: PLC0415 - only --json needs it

    click.echo(orjson.dumps(content).decode())
