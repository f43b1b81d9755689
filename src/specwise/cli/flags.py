"""`specwise flags`: the complete command for a vLLM version."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
from click.core import ParameterSource

from specwise.cli.checked_command import FORMATS, answer, check, say_findings
from specwise.domain import Speculation
from specwise.errors import InputError
from specwise.facts.checkpoint import full_name
from specwise.vllm.command import Version, names, read_words
from specwise.vllm.flags import ServeOptions, serve_command

_USUAL_K = {"mtp": 1, "suffix": 24}  # one MTP layer drafts one token well; suffix takes k as a cap


def read_schedule(text: str) -> tuple[tuple[int, int, int], ...]:
    """``1-8:4,9-64:2,65-1024:0`` or JSON ``[[1, 8, 4], ...]`` as rows; InputError otherwise."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
            return tuple((int(a), int(b), int(k)) for a, b, k in rows)
        except (ValueError, TypeError, RecursionError) as error:
            raise _bad_schedule(text) from error
    found = [re.fullmatch(r"\s*(\d{1,9})-(\d{1,9}):(\d{1,9})\s*", part) for part in text.split(",")]
    if not all(found):
        raise _bad_schedule(text)
    return tuple((int(m[1]), int(m[2]), int(m[3])) for m in found if m)


def _bad_schedule(text: str) -> InputError:
    return InputError(
        f"{text!r} is no schedule.",
        "Write rows first-last:k, e.g. 1-8:4,9-64:2,65-1024:0 (k by batch size).",
    )


def read_options(pairs: tuple[str, ...]) -> dict[str, object]:
    """``name=value`` pairs with JSON values where they are JSON; InputError without a ``=``."""
    options: dict[str, object] = {}
    for pair in pairs:
        name, sep, text = pair.partition("=")
        if not sep or not name:
            raise InputError(f"{pair!r} is no option.", "Write name=value.")
        try:
            options[name.replace("-", "_")] = json.loads(text)
        except (ValueError, RecursionError):
            options[name.replace("-", "_")] = text
    return options


@click.command(
    epilog="Example: specwise flags llama-3.1-70b --draft llama-3.1-8b --k 5 --tp 2 --draft-tp 1"
)
@click.argument("target", required=False)
@click.argument("further", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--from",
    "study",
    type=click.Path(path_type=Path),
    help="Instead of TARGET: what the verdict of this study (or tuning) says to serve.",
)
@click.option("--arm", help="With --from: this arm as it was measured, whatever the verdict.")
@click.option(
    "--rollout", is_flag=True, help="With --from: a rollout note in Markdown, with the command."
)
@click.option("--method", help="draft_model, ngram, eagle3, mtp, suffix, ... (default: by --draft)")
@click.option("--draft", help="The draft model's or head's folder or hub id.")
@click.option(
    "--k",
    type=click.IntRange(1, 10_000),
    help="Draft length (default: 3; mtp 1, suffix 24; the schedule's largest).",
)
@click.option("--vllm", "version", help="vLLM version, e.g. 0.6.3 (default: the newest known).")
@click.option("--tp", type=click.IntRange(1, 1024), default=1, help="GPUs that share the target.")
@click.option(
    "--draft-tp", type=click.IntRange(1, 1024), help="GPUs that share the draft: 1 or --tp."
)
@click.option("--utilization", type=click.FloatRange(0, 1, min_open=True), help="GPU memory share.")
@click.option("--max-model-len", type=click.IntRange(1))
@click.option("--max-num-seqs", type=click.IntRange(1))
@click.option("--dtype", help="auto, bfloat16, float16, float32")
@click.option("--quantization", help="Of the target, where its checkpoint does not say it.")
@click.option("--draft-quantization", help="Of the draft.")
@click.option("--kv-cache-dtype", help="e.g. fp8")
@click.option("--schedule", help="Draft length by batch size: 1-8:4,9-64:2,65-1024:0")
@click.option(
    "--acceptance", default="standard", help="standard, block, synthetic, fly, typical (V0)"
)
@click.option("--draft-sampling", help="greedy or probabilistic")
@click.option("--set", "fields", multiple=True, help="Any other speculative field: name=value.")
@click.option("--format", "form", type=click.Choice([*FORMATS]), default="shell", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def flags(  # noqa: PLR0917 (click passes by name)
    ctx: click.Context,
    /,
    target: str | None,
    further: tuple[str, ...],
    study: Path | None,
    arm: str | None,
    rollout: bool,
    method: str | None,
    draft: str | None,
    k: int | None,
    version: str | None,
    tp: int,
    draft_tp: int | None,
    utilization: float | None,
    max_model_len: int | None,
    max_num_seqs: int | None,
    dtype: str | None,
    quantization: str | None,
    draft_quantization: str | None,
    kv_cache_dtype: str | None,
    schedule: str | None,
    acceptance: str,
    draft_sampling: str | None,
    fields: tuple[str, ...],
    form: str,
    as_json: bool,
) -> None:
    """What do I pass to my vLLM version to serve TARGET with speculation?

    TARGET and --draft are written as given (use the folder or hub id that your server will see);
    built-in short names become hub ids. FURTHER vLLM arguments follow after --. Exit code 1 if vLLM
    would refuse the pair.

    With --from STUDY: the arm that the study's verdict recommends, on the study's own model,
    arguments and vLLM version. Exit code 3 where the verdict is to measure more.
    """
    if study is not None:
        _from_study(ctx, study, (*((target,) if target else ()), *further))
    if target is None:
        raise click.UsageError("Give TARGET, or --from STUDY.")
    if arm is not None or rollout:
        raise click.UsageError("--arm and --rollout go with --from STUDY.")
    method = method or ("draft_model" if draft else "ngram")
    rows = read_schedule(schedule) if schedule else ()
    longest = max((row[2] for row in rows), default=0)
    speculation = Speculation(
        method=method,
        k=k or longest or _USUAL_K.get(method, 3),
        draft=full_name(draft) if draft else None,
        schedule=rows,
        options=read_options(fields),
    )
    options = ServeOptions(
        model=full_name(target),
        version=Version.parse(version) if version else names().newest,
        speculation=speculation,
        tensor_parallel=tp,
        draft_tensor_parallel=draft_tp,
        utilization=utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        quantization=quantization,
        draft_quantization=draft_quantization,
        kv_cache_dtype=kv_cache_dtype,
        acceptance=acceptance,
        draft_sampling=draft_sampling,
        extra=read_words(["vllm", "serve", *further]).flags,
    )
    checked = check(serve_command(options), options.version, target=target, draft=draft)
    if as_json:
        click.echo(json.dumps(answer(checked, options.version, form), indent=2))
    else:
        say_findings(checked.findings)
        click.echo(FORMATS[form](checked.command))
    ctx.exit(1 if checked.refused else 0)


# What --from goes together with; everything else comes from the study.
_WITH_FROM = {"study", "arm", "rollout", "version", "form", "as_json", "target", "further"}


def _from_study(ctx: click.Context, study: Path, words: tuple[str, ...]) -> None:
    """The command that a study's verdict recommends; exits."""
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name is not None
        and parameter.name not in _WITH_FROM
        and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    if words and not words[0].startswith("-"):
        given.append(f"TARGET {words[0]}")
    if given:
        raise click.UsageError(
            f"--from takes the deployment from the study: leave out {', '.join(given)}. --arm, "
            "--vllm, --format, --rollout and vLLM arguments after -- go with it."
        )
    from specwise.cli.flags_from import flags_from_study  # noqa: PLC0415 - numpy loads here

    options = ctx.params
    ctx.exit(
        flags_from_study(
            study,
            arm=options["arm"],
            version=options["version"],
            further=words,
            form=options["form"],
            rollout=options["rollout"],
            as_json=options["as_json"],
        )
    )
