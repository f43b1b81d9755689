"""A `vllm serve` command that lint has seen, and how commands print it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import click

from specwise.planning.pairing import model_facts
from specwise.vllm.command import (
    ServeCommand,
    Version,
    to_container_args,
    to_shell,
    to_words,
    to_yaml,
)
from specwise.vllm.findings import ADVICE, ERROR, Finding
from specwise.vllm.lint import lint

FORMATS = {"shell": to_shell, "yaml": to_yaml, "k8s": to_container_args}


@dataclass(frozen=True, slots=True)
class Checked:
    """A command that lint has seen: repaired where the checkpoints forbid it, and what was said.

    ``refused`` says that vLLM would still refuse it.
    """

    command: ServeCommand
    findings: tuple[Finding, ...]
    refused: bool


def check(made: ServeCommand, version: Version, *, target: object, draft: object) -> Checked:
    """``made`` after lint, with the metadata of ``target`` and ``draft`` if it is at hand."""
    facts = {"target": model_facts(target), "draft": model_facts(draft)}
    result = lint(made, version, **facts)
    # Advice is for commands found in the wild; what the checkpoints forbid is repaired and said.
    findings = tuple(f for f in result.findings if f.severity != ADVICE)
    command = replace(result.corrected if findings else made, notes=made.notes)
    again = lint(command, version, **facts).findings
    return Checked(command, findings, any(f.severity == ERROR for f in again))


def answer(checked: Checked, version: Version, form: str) -> dict[str, Any]:
    """What --json prints."""
    return {
        "vllm": str(version),
        "words": to_words(checked.command),
        "speculative_config": checked.command.speculation,
        "notes": dict(checked.command.notes),
        "findings": [asdict(f) for f in checked.findings],
        form: FORMATS[form](checked.command),
    }


def say_findings(findings: tuple[Finding, ...]) -> None:
    """Print them to stderr."""
    for finding in findings:
        click.echo(f"{finding.severity}: {finding.what} {finding.fix}", err=True)
