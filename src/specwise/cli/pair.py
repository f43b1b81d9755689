"""`specwise pair`: is this draft sensible for this target?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.planning.advice import WORKLOADS, advise_methods, known_drafts, tokens_per_step
from specwise.planning.pairing import PairReport, judge_pair, rank_pairs
from specwise.vllm.command import Version

if TYPE_CHECKING:
    from specwise.prediction.speedup import DraftRange

_COLOURS = {"error": "red", "warning": "yellow", "advice": "cyan", "good": "green"}


@click.command(epilog="Example: specwise pair llama-3.1-70b llama-3.1-8b llama-3.2-1b")
@click.argument("target")
@click.argument("drafts", nargs=-1)
@click.option(
    "--workload", type=click.Choice(WORKLOADS), default="chat", show_default=True,
    help="What the server is for.",
)  # fmt: skip
@click.option("--vllm", "version", help="vLLM version (default: the newest known).")
@click.option(
    "--round-trip", is_flag=True, help="Encode test texts even if vocabularies are large."
)
@click.option("--gpu", default="h100", show_default=True, help="For the predicted speedup.")
@click.option("--gpus", "count", type=click.IntRange(1, 1024), help="Default: the fewest that fit.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def pair(  # noqa: PLR0917 (click passes by name)
    ctx: click.Context,
    /,
    target: str,
    drafts: tuple[str, ...],
    workload: str,
    version: str | None,
    round_trip: bool,
    gpu: str,
    count: int | None,
    as_json: bool,
) -> None:
    """Is this draft sensible for this TARGET?

    TARGET and DRAFTS are folders, hub ids or built-in names. Without DRAFTS the built-in models of
    the target's tokenizer are ranked. Exit code 1 if no draft is sensible.
    """
    wanted = Version.parse(version) if version else None
    model = load_checkpoint(target)
    if drafts:
        reports = rank_pairs(
            [judge_pair(model, load_checkpoint(d), wanted, round_trip=round_trip) for d in drafts]
        )
    else:
        reports = known_drafts(model, wanted)
    methods = advise_methods(model, workload, reports, wanted)
    good = any(r.sensible for r in reports)
    predicted = {r.draft.name: _predicted(r, gpu, count) for r in reports}
    if as_json:
        answer = {
            "target": model.name,
            "parameters": model.parameters,
            "parameters_from": model.parameters_from,
            "source": model.source,
            "notes": list(model.notes),
            "drafts": [
                _as_dict(r) | {"predicted": [asdict(p) for p in predicted[r.draft.name][1]]}
                for r in reports
            ],
            "methods": [asdict(m) for m in methods],
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        for report in reports:
            _print(report)
            _print_predicted(*predicted[report.draft.name], gpu)
        if not reports:
            click.echo("No built-in model is a smaller one with this target's tokenizer.")
        loads = [f for r in reports for f in r.findings if f.rule == "load"]
        for finding in loads[:1]:
            click.echo(f"{finding.what} {finding.why} {finding.fix}\n")
        click.echo(f"To test for {workload}, in this order (never a promise):")
        for number, method in enumerate(methods, 1):
            name = f"{method.method} with {method.draft}" if method.draft else method.method
            click.echo(f"  {number}. {name}: {method.reason}")
        click.echo(
            "A verify step of k = 3 drafts emits "
            + ", ".join(f"{tokens_per_step([a] * 3):.2f} tokens at {a:g}" for a in (0.4, 0.6, 0.8))
            + " acceptance of each; one without drafts emits 1."
        )
    ctx.exit(0 if good else 1)


def _predicted(report: PairReport, gpu: str, count: int | None) -> tuple[int, Sequence[DraftRange]]:
    """(GPUs, predicted range): what the pair may give if it can run at all."""
    from specwise.prediction.speedup import draft_range  # noqa: PLC0415 - numpy loads here

    accelerator = find_gpu(gpu)
    gpus = count
    if gpus is None:
        needed = 1.3 * (report.target.weight_bytes or 2 * report.target.parameters)
        gpus = 1
        while gpus * accelerator.memory_bytes < needed and gpus < 64:
            gpus *= 2
    return gpus, draft_range(report.target, report.draft, accelerator, gpus=gpus)


def _print_predicted(gpus: int, ranges: Sequence[DraftRange], gpu: str) -> None:
    for found in ranges:
        needed = "out of reach" if found.break_even is None else f"{found.break_even:.0%}"
        click.echo(
            f"  predicted, k = 3 on {gpus} x {gpu}: {found.low:.2f}x to {found.high:.2f}x at "
            f"{found.batch} running (50 to 80 % accepted at each position; even at {needed})"
        )
    click.echo()


def _as_dict(report: PairReport) -> dict[str, object]:
    return {
        "draft": report.draft.name,
        "parameters": report.draft.parameters,
        "parameters_from": report.draft.parameters_from,
        "source": report.draft.source,
        "notes": list(report.draft.notes),
        "ratio": report.ratio,
        "active_ratio": report.active_ratio,
        "band": report.band.name,
        "sensible": report.sensible,
        "tokenizers": asdict(report.tokenizers) if report.tokenizers else None,
        "findings": [asdict(f) for f in report.findings],
    }


def _print(report: PairReport) -> None:
    """One draft's findings as text."""
    word = "worth testing" if report.sensible else "not sensible"
    click.echo(f"{report.draft.name} for {report.target.name}: {word}")
    for finding in report.findings:
        if finding.rule == "load":
            continue  # true of every draft: said once, below
        label = click.style(f"{finding.severity:<8}", fg=_COLOURS[finding.severity], bold=True)
        click.echo(f"  {label}{finding.what}")
        click.echo(f"          {finding.why} -> {finding.fix}  [{finding.source}]")
    for note in (*report.target.notes, *report.draft.notes):
        click.echo(f"  note    {note}")
