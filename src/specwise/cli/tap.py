"""`specwise tap`: a transparent proxy that measures each request of production traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from specwise.errors import InputError

if TYPE_CHECKING:
    from specwise.monitoring.tap import Tap


@click.command(
    epilog="Example: specwise tap --upstream http://127.0.0.1:8000 --records tap-records"
)
@click.option("--upstream", required=True, help="The vLLM server that requests are passed to.")
@click.option("--listen", default="127.0.0.1:9000", show_default=True, help="[HOST:]PORT.")
@click.option("--segment-header", help="Request header that names the segment, as X-Segment.")
@click.option(
    "--rules",
    type=click.Path(path_type=Path),
    help="TOML file that names segments by model, path, temperature, max_tokens, response_format.",
)
@click.option(
    "--records", type=click.Path(path_type=Path), help="Folder for one record a request, no text."
)
@click.option(
    "--metrics-listen", default="127.0.0.1:9464", show_default=True, help="[HOST:]PORT or none."
)
@click.option(
    "--realtime",
    is_flag=True,
    help="Ask for real-time priority, so that nothing else on the machine delays streams.",
)
def tap(
    *,
    upstream: str,
    listen: str,
    segment_header: str | None,
    rules: Path | None,
    records: Path | None,
    metrics_listen: str,
    realtime: bool,
) -> None:
    """Pass OpenAI requests on to a vLLM server unchanged, and measure each on its way.

    Acceptance, TTFT and TPOT per request, by temperature and segment, as Prometheus metrics and as
    records for `specwise decide --from-tap`. No prompt, output or key is stored. Acceptance needs a
    server started with --per-request-spec-decode-metrics summary; a streamed answer carries it
    where the client asks for usage.
    """
    import asyncio  # noqa: PLC0415
    from contextlib import ExitStack  # noqa: PLC0415

    import uvloop  # noqa: PLC0415

    from specwise.monitoring.tap import Tap, steady, tap_settings  # noqa: PLC0415
    from specwise.monitoring.tap_metrics import TapMetrics, serving_metrics  # noqa: PLC0415
    from specwise.monitoring.tap_records import RecordWriter, TapRecord  # noqa: PLC0415
    from specwise.monitoring.tap_requests import Segments  # noqa: PLC0415

    settings = tap_settings(upstream, listen)
    segments = Segments(header=segment_header, rules=rules)
    metrics = TapMetrics()
    with ExitStack() as stack:
        if metrics_listen != "none":
            host, _, port = metrics_listen.rpartition(":")
            if not port.isdigit() or int(port) > 65535:
                raise InputError(
                    f"--metrics-listen {metrics_listen!r} is not [HOST:]PORT.", "For example 9464."
                )
            bound = stack.enter_context(
                serving_metrics(metrics, host=host or "127.0.0.1", port=int(port))
            )
            click.echo(f"metrics at http://{host or '127.0.0.1'}:{bound}/metrics", err=True)
        writer = None
        if records is not None:
            writer = RecordWriter(records, {"upstream": settings.upstream.authority})
            stack.callback(writer.close)

        def on_record(record: TapRecord) -> None:
            metrics.count(record)
            if writer is not None:
                writer.write(record)

        if realtime:
            ask_for_realtime()
        stack.enter_context(steady())
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        runner.run(_serve(Tap(settings, segments, on_record), upstream))
        if writer is not None and writer.lost:
            click.echo(f"{writer.lost} records could not be written to {records}.", err=True)


def ask_for_realtime() -> None:
    """The lowest real-time priority, above all ordinary processes; a warning where it is refused.

    Tap sleeps most of the time, so it starves nobody; and the kernel keeps a share of each core
    for ordinary processes whatever happens (sched_rt_runtime_us).
    """
    import os  # noqa: PLC0415

    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (PermissionError, AttributeError):
        click.echo(
            "--realtime was refused: it needs CAP_SYS_NICE on Linux (root, or systemd's "
            "AmbientCapabilities=CAP_SYS_NICE). Going on at ordinary priority.",
            err=True,
        )


async def _serve(proxy: Tap, upstream: str) -> None:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await proxy.start()
    click.echo(f"tap at http://{proxy.settings.host}:{proxy.port} -> {upstream}", err=True)
    try:
        await stop.wait()
    finally:
        await proxy.stop()
