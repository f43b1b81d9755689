"""`specwise memory`: what speculation costs in KV cache, concurrency and context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from specwise.domain import Checkpoint
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu, gpus
from specwise.planning import memory as plans
from specwise.planning.memory import GIB, MemoryPlan, Range, ServingPlan
from specwise.vllm.command import Version

_KV_BITS = {"auto": 16.0, "bf16": 16.0, "fp16": 16.0, "fp8": 8.0, "fp32": 32.0}


@click.command(
    epilog="Example: specwise memory llama-3.1-70b --draft llama-3.1-8b --gpu h100 --gpus 4 "
    "--context 8192"
)
@click.argument("target")
@click.option("--draft", help="The draft: a folder, a hub id or a built-in name.")
@click.option("--gpu", default="h100", show_default=True, help="The GPU by name.")
@click.option("--gpus", "count", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--context", type=click.IntRange(1, 100_000_000), default=8192, show_default=True)
@click.option(
    "--concurrency", type=click.IntRange(1, 1_000_000), default=1, help="Requests at once."
)
@click.option("--k", type=click.IntRange(1, 1000), default=3, help="Draft length.")
@click.option("--vllm", "version", help="vLLM version (default: the newest known).")
@click.option("--utilization", type=click.FloatRange(0, 1, min_open=True), help="GPU memory share.")
@click.option("--precision", help="Of the target: bf16, fp8, int8, int4 (default: as stored).")
@click.option("--draft-precision", help="Of the draft.")
@click.option("--draft-tp", type=click.IntRange(1, 1024), help="1 or --gpus (vLLM's default).")
@click.option("--kv-dtype", type=click.Choice([*_KV_BITS]), default="auto", show_default=True)
@click.option("--max-num-seqs", type=click.IntRange(1, 1_000_000))
@click.option("--max-num-batched-tokens", type=click.IntRange(1, 10_000_000))
@click.option("--eager", is_flag=True, help="Without CUDA graphs.")
@click.option("--simple", is_flag=True, help="Vendor gigabytes and bytes per parameter only.")
@click.option("--table", is_flag=True, help="Every precision mix, for 1, 2, 4 and 8 GPUs.")
@click.option(
    "--search", type=click.Choice(["gpus", "precision"]), help="For --concurrency requests."
)
@click.option(
    "--pool", type=click.FloatRange(0, 1e6, min_open=True), help="A known KV pool, in GiB."
)
@click.option("--block-size", type=click.IntRange(1, 4096), default=16, help="With --pool.")
@click.option(
    "--chart", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG or SVG."
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def memory(ctx: click.Context, /, target: str, draft: str | None, **options: Any) -> None:
    """What does speculation cost in KV cache, concurrency and context?

    TARGET is a folder, a hub id or a built-in name. Exit code 1 if one request of the asked context
    does not fit.
    """
    target_model = load_checkpoint(target)
    draft_model = load_checkpoint(draft) if draft else None
    plan = ServingPlan(
        target=target_model,
        gpu=find_gpu(options["gpu"]),
        gpus=options["count"],
        draft=draft_model,
        draft_tensor_parallel=options["draft_tp"] or options["count"],
        k=options["k"],
        context=options["context"],
        concurrency=options["concurrency"],
        version=Version.parse(options["version"]) if options["version"] else None,
        utilization=options["utilization"],
        target_precision=options["precision"],
        draft_precision=options["draft_precision"],
        kv_bits=_KV_BITS[options["kv_dtype"]],
        max_num_seqs=options["max_num_seqs"],
        max_batched_tokens=options["max_num_batched_tokens"],
        eager=options["eager"],
    )
    if options["simple"]:
        answer, text, good = _simple(plan)
    elif options["pool"]:
        answer, text, good = _pool(plan, options["pool"], options["block_size"])
    elif options["search"]:
        answer, text, good = _search(plan, options["search"])
    elif options["table"]:
        answer, text, good = _table(plan)
    else:
        answer, text, good = _full(plan)
    if options["chart"]:
        _chart(plan, options["chart"])
        text += f"\nChart: {options['chart']}"
    click.echo(json.dumps(answer, indent=2) if options["as_json"] else text)
    ctx.exit(0 if good else 1)


Answer = tuple[dict[str, Any], str, bool]


def _full(plan: ServingPlan) -> Answer:
    """The plan with the draft and without it, side by side."""
    result = plans.plan_memory(plan)
    alone = plans.plan_memory(replace(plan, draft=None))
    rules = plans.memory_rules(plan)
    warning = plans.v0_warning(plan)
    answer = {
        "target": _model(plan.target),
        "draft": _model(plan.draft) if plan.draft else None,
        "gpu": plan.gpu.name,
        "gpus": plan.gpus,
        "vllm": str(plan.vllm),
        "utilization": plan.share,
        "with_draft": _as_dict(result) if plan.draft else None,
        "without_draft": _as_dict(alone),
        "rules": [asdict(r) | {"holds": r.holds} for r in rules],
        "warning": warning,
    }
    lines = [_heading(plan), "", _bars(result), "", *_term_lines(result), ""]
    lines += _effect_lines(plan, result, alone)
    lines += [
        f"{'ok  ' if rule.holds else 'mind'} {rule.name}: {rule.value:.0%} (rule: at most "
        f"{rule.limit:.0%}){'' if rule.holds else ', ' + rule.text}"
        for rule in rules
    ]
    lines += [f"note {note}" for note in (*_notes(plan), *([warning] if warning else ()))]
    return answer, "\n".join(lines), result.fits


def _heading(plan: ServingPlan) -> str:
    draft = f" + {plan.draft.name}" if plan.draft else ""
    return (
        f"{plan.target.name}{draft} on {plan.gpus} x {plan.gpu.name}, vLLM {plan.vllm}, "
        f"utilisation {plan.share:g}\nOne GPU ({plan.gpu.memory_bytes / GIB:.1f} GiB), "
        "likely value and range in GiB:"
    )


def _notes(plan: ServingPlan) -> list[str]:
    models = [plan.target] + ([plan.draft] if plan.draft else [])
    notes = [f"{model.name}: {note}" for model in models for note in model.notes]
    notes += [
        f"{model.name}: its own context ends at {model.max_positions:,} tokens"
        for model in models
        if model.max_positions and plan.context > model.max_positions
    ]
    if any(g.window for m in models for g in m.kv_groups) and plan.draft:
        notes.append("sliding windows beside a draft: the block layout is an estimate")
    return notes


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "parameters": checkpoint.parameters,
        "parameters_from": checkpoint.parameters_from,
        "kv_bytes_per_token_bf16": checkpoint.kv_elements_per_token * 2,
        "notes": list(checkpoint.notes),
    }


def _as_dict(result: MemoryPlan) -> dict[str, Any]:
    return {
        "target_precision": result.plan.target_precision,
        "draft_precision": result.plan.draft_precision,
        "gpus": result.plan.gpus,
        "budget_bytes": result.budget_bytes,
        "terms": [asdict(term) for term in result.terms],
        "pool_bytes": asdict(result.pool),
        "kv_bytes_per_token": result.kv_bytes_per_token,
        "kv_tokens": asdict(result.tokens),
        "concurrency": asdict(result.concurrency),
        "longest_context": asdict(result.longest),
        "fits": result.fits,
    }


def _term_lines(result: MemoryPlan) -> list[str]:
    rows = [("budget", Range.exactly(result.budget_bytes), "memory x utilisation")]
    rows += [(t.name, t.bytes, t.note) for t in result.terms]
    rows.append(
        ("left for the KV cache", result.pool, f"{result.kv_bytes_per_token:,.0f} B a token")
    )
    return [
        f"  {name:<22}{value.likely / GIB:>8.2f}  {_span(value.scaled(1 / GIB), 2):<16}{note}"
        for name, value, note in rows
    ]


def _span(value: Range, digits: int) -> str:
    if value.low == value.high:
        return "exact"
    return f"{value.low:,.{digits}f} to {value.high:,.{digits}f}"


def _effect_lines(plan: ServingPlan, result: MemoryPlan, alone: MemoryPlan) -> list[str]:
    """KV tokens, concurrency and context, with the draft and without it."""
    rows = [
        ("KV cache tokens", alone.tokens, result.tokens, 0),
        (f"requests of {plan.context:,} tokens", alone.concurrency, result.concurrency, 1),
        (f"longest context for {plan.concurrency}", alone.longest, result.longest, 0),
    ]
    if plan.draft is None:
        return [f"  {n:<28}{a.likely:>12,.{d}f}  {_span(a, d)}" for n, a, _, d in rows]
    lines = [f"  {'':<28}{'without draft':>14}{'with draft':>14}{'kept':>8}  range without | with"]
    for name, before, after, digits in rows:
        kept = f"{max(after.likely, 0) / before.likely:.0%}" if before.likely > 0 else "-"
        lines.append(
            f"  {name:<28}{before.likely:>14,.{digits}f}{after.likely:>14,.{digits}f}{kept:>8}"
            f"  {_span(before, digits)} | "
            + (_span(after, digits) if after.high > 0 else "does not fit")
        )
    return lines


def _bars(result: MemoryPlan, width: int = 60) -> str:
    """One GPU's memory as a line of letters, one letter a term."""
    total = result.plan.gpu.memory_bytes
    parts = [(t.name[0].upper(), t.bytes.likely) for t in result.terms]
    parts[0] = ("T", parts[0][1])
    parts = [
        ("D" if t.name == "draft weights" else p[0], p[1])
        for t, p in zip(result.terms, parts, strict=True)
    ]
    parts = [("." if letter not in "TD" else letter, size) for letter, size in parts]
    parts.append(("k", max(0.0, result.pool.likely)))
    drawn = "".join(letter * round(size / total * width) for letter, size in parts)[:width]
    return f"  [{drawn:<{width}}]  T target  D draft  . overhead  k KV cache"


def _table(plan: ServingPlan) -> Answer:
    """All mixes for 1, 2, 4 and 8 GPUs."""
    results = plans.mix_table(plan, (1, 2, 4, 8))
    lines = [
        f"{plan.target.name} on {plan.gpu.name}, vLLM {plan.vllm}, context {plan.context:,}",
        f"  {'GPUs':>4} {'target':>7} {'draft':>6} {'KV GiB':>8} {'KV tokens':>12} {'requests':>9}",
    ]
    for result in results:
        mix = result.plan
        fits = f"{result.pool.likely / GIB:>8.1f} {max(0, result.tokens.likely):>12,.0f}"
        lines.append(
            f"  {mix.gpus:>4} {mix.target_precision or '':>7} {mix.draft_precision or '-':>6} "
            + (f"{fits} {result.concurrency.likely:>9.1f}" if result.fits else "does not fit")
        )
    answer = {
        "gpu": plan.gpu.name,
        "context": plan.context,
        "plans": [_as_dict(r) for r in results],
    }
    return answer, "\n".join(lines), any(r.fits for r in results)


def _search(plan: ServingPlan, what: str) -> Answer:
    """The smallest GPU set, or the best precision mix, for the asked concurrency and context."""
    wanted = f"{plan.concurrency} requests of {plan.context:,} tokens"
    if what == "gpus":
        found = plans.smallest_gpu_set(plan, list(gpus().values()))
        name = f"{found.plan.gpus} x {found.plan.gpu.name}" if found else ""
    else:
        found = plans.best_precision(plan)
        name = f"{found.plan.target_precision} + {found.plan.draft_precision}" if found else ""
    if found is None:
        return {"found": None}, f"Nothing holds {wanted}.", False
    answer = {"found": name, "gpu": found.plan.gpu.name, "plan": _as_dict(found)}
    held = f"{found.concurrency.low:,.0f} to {found.concurrency.high:,.0f}"
    return answer, f"{name} holds {wanted} (room for {held}).", True


def _pool(plan: ServingPlan, gib: float, block: int) -> Answer:
    """What a pool of known size holds: exact, as vLLM logs it at start-up."""
    models = plans.cached_models(plan)
    held = plans.kv_capacity(
        models, pool_bytes=int(gib * GIB), max_model_len=plan.context, block_tokens=block
    )
    answer = asdict(held) | {"pool_gib": gib, "context": plan.context, "block_tokens": block}
    text = (
        f"KV cache size: {held.tokens:,} tokens, maximum concurrency for {plan.context:,} tokens "
        f"per request: {held.concurrency:.2f}x"
    )
    return answer, text, held.concurrency >= 1


def _simple(plan: ServingPlan) -> Answer:
    """Vendor gigabytes and bytes per parameter."""
    target = plans.nominal_billions(plan.target)
    draft = plans.nominal_billions(plan.draft) if plan.draft else 0.0
    total = plan.gpu.vendor_gb * plan.gpus
    share = plan.utilization or 0.9
    rows = plans.simple_fit(target, draft, total_gb=total, utilization=share)
    lines = [
        f"{target:g} B target, {draft:g} B draft, {plan.gpus} x {plan.gpu.name} = {total:g} GB",
        f"  {'target':>7} {'draft':>6} {'weights GB':>11} {'left GB':>8} {f'at {share:g}':>8}",
    ]
    for row in rows:
        lines.append(
            f"  {row.target_precision:>7} {row.draft_precision:>6} {row.weights_gb:>11g} "
            f"{row.left_gb:>8g} {row.kv_budget_gb:>8.1f}  {row.verdict}"
        )
    answer: dict[str, Any] = {
        "total_gb": total,
        "rows": [asdict(r) | {"weights_gb": r.weights_gb} for r in rows],
    }
    chosen = next((r for r in rows if r.verdict == "recommended"), None)
    if chosen and plan.gpus > 1 and plan.draft:
        on_one, each = plans.simple_imbalance(chosen.draft_gb, plan.gpus, total, chosen.target_gb)
        answer["imbalance_gb"] = {"with_draft": on_one, "without": each}
        lines.append(
            f"Draft TP 1 in V0 puts {chosen.draft_gb:g} GB on one of {plan.gpus} GPUs: {on_one:g} "
            f"GB left there, {each:g} GB elsewhere. V1 puts it on every one."
        )
    return answer, "\n".join(lines), any(r.verdict in {"recommended", "fits"} for r in rows)


def _chart(plan: ServingPlan, path: Path) -> None:
    """Stacked bars of one GPU's memory, with and without the draft."""
    if path.suffix not in {".png", ".svg"}:
        raise InputError(f"{path} is neither .png nor .svg.", "Choose one of the two endings.")
    import matplotlib as mpl  # noqa: PLC0415 (0.5 s, only for a chart)

    mpl.use("agg")
    from matplotlib.figure import Figure  # noqa: PLC0415

    results: Sequence[tuple[str, MemoryPlan]] = [
        ("without draft", plans.plan_memory(replace(plan, draft=None)))
    ]
    if plan.draft is not None:
        results = [*results, ("with draft", plans.plan_memory(plan))]
    figure = Figure(figsize=(8, 1.7 + 0.7 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    colours = {
        "target weights": "#4477aa",
        "draft weights": "#ee6677",
        "context and NCCL": "#777777",
        "activation peak": "#999999",
        "CUDA graphs": "#bbbbbb",
        "verify logits": "#ccbb44",
        "KV cache": "#228833",
    }
    seen: set[str] = set()
    for row, (_, result) in enumerate(results):
        left = 0.0
        parts = [(t.name, t.bytes.likely) for t in result.terms]
        parts.append(("KV cache", max(0.0, result.pool.likely)))
        for name, size in parts:
            label = None if name in seen else name
            axes.barh(row, size / GIB, left=left / GIB, color=colours[name], label=label)
            seen.add(name)
            left += size
    axes.axvline(plan.gpu.memory_bytes / GIB, color="black", linewidth=1)
    axes.set_yticks(range(len(results)), [name for name, _ in results])
    axes.set_xlabel(f"GiB on one {plan.gpu.name} (line: its memory)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}.", "Choose another path.") from error
