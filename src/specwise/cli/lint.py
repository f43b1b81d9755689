"""`specwise lint`: what is wrong with a vLLM command, and the corrected one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from specwise.errors import CommandError
from specwise.planning.pairing import model_facts
from specwise.vllm.command import (
    ServeCommand,
    Version,
    names,
    read_command,
    read_process,
    read_words,
    read_yaml,
    to_container_args,
    to_shell,
    to_words,
    to_yaml,
)
from specwise.vllm.findings import Finding
from specwise.vllm.lint import lint as run_lint

_COLOURS = {"error": "red", "warning": "yellow", "advice": "cyan"}
_FORMATS = {"shell": to_shell, "yaml": to_yaml, "k8s": to_container_args}
_FILE_LIMIT = 4_000_000


def _read(words: tuple[str, ...], pid: int | None) -> ServeCommand:
    """The command from whatever the user gave: text, words, a file, standard input or a process."""
    if pid is not None:
        return read_process(pid)
    if not words:
        raise CommandError("There is nothing to lint.", "Give a command, a file, - or --pid.")
    if len(words) > 1:
        return read_words(words)
    text = words[0]
    if text == "-":
        return read_command(sys.stdin.read(_FILE_LIMIT))
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        return read_command(text)
    try:
        content = path.read_bytes()[:_FILE_LIMIT].decode()
    except (OSError, ValueError) as error:
        raise CommandError(f"{text} cannot be read: {error}.", "Give a text file.") from error
    if path.suffix in {".yaml", ".yml", ".json"}:
        return read_yaml(content)
    return read_command(content)


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: specwise lint 'vllm serve llama-3.1-70b --speculative-model llama-3.1-8b "
    "--num-speculative-tokens 5'",
)
@click.option("--vllm", "version", help="vLLM version (default: the image's tag, or the newest).")
@click.option("--pid", type=click.IntRange(1), help="Lint a running process's arguments.")
@click.option("--format", "form", type=click.Choice([*_FORMATS]), default="shell")
@click.option("--gpu", help="Check the memory too: the GPU, e.g. h100.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lint(  # noqa: PLR0917 (click passes by name)
    ctx: click.Context,
    version: str | None,
    pid: int | None,
    form: str,
    gpu: str | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """What is wrong with the vLLM COMMAND I have, and what is the corrected one?

    COMMAND is a shell command in quotes, its words, a file (.yaml: a config file, container args or
    a manifest; else a shell script), or - for standard input. Exit code 1 if vLLM would refuse or
    ignore something.
    """
    parsed = _read(command, pid)
    wanted = Version.parse(version) if version else parsed.version or names().newest
    config = parsed.speculation or {}
    draft = config.get("model") or parsed.get("--speculative-model")
    target_facts = model_facts(parsed.model)
    result = run_lint(parsed, wanted, target=target_facts, draft=model_facts(draft))
    findings = result.findings
    if gpu is not None:
        from specwise.planning.memory import command_findings  # noqa: PLC0415

        findings += command_findings(result.corrected, wanted, gpu)
    wrong = any(f.severity != "advice" for f in findings)
    if as_json:
        answer = {
            "vllm": str(wanted),
            "clean": not wrong,
            "findings": [asdict(f) for f in findings],
            "corrected": {
                "words": to_words(result.corrected),
                "speculative_config": result.corrected.speculation,
                form: _FORMATS[form](result.corrected),
            },
        }
        click.echo(json.dumps(answer, indent=2))
    else:
        _print(findings, wanted)
        click.echo(f"\nCorrected for vLLM {wanted}:\n" if findings else "")
        click.echo(_FORMATS[form](result.corrected))
    ctx.exit(1 if wrong else 0)


def _print(findings: tuple[Finding, ...], version: Version) -> None:
    """The findings as text, worst first."""
    if not findings:
        click.echo(f"Nothing wrong for vLLM {version}.")
        return
    order = list(_COLOURS)
    for finding in sorted(findings, key=lambda f: order.index(f.severity)):
        label = click.style(f"{finding.severity:<8}", fg=_COLOURS[finding.severity], bold=True)
        click.echo(f"{label}{finding.what}  [{finding.rule}]")
        click.echo(f"        {finding.why}\n        -> {finding.fix}\n        {finding.source}")
