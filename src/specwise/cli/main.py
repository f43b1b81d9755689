"""The `specwise` command: finds a subcommand, runs it, turns errors into one message and a code.

Exit codes: 0 fine, 1 the answer is no, 2 bad input, 3 could not measure.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

import click

from specwise import __version__
from specwise.errors import SpecwiseError

# Name, one line of help: grouped by stage, in the order a user meets them. Modules load on use, so
# that `specwise --help` stays instant.
STAGES: dict[str, dict[str, str]] = {
    "Start": {"demo": "Show me the whole thing, here, now: a real vLLM, no GPU needed."},
    "Plan": {
        "pair": "Is this draft sensible for this target?",
        "memory": "What does speculation cost in KV cache, concurrency and context?",
        "flags": "What do I pass to my vLLM version?",
        "lint": "What is wrong with the command I have?",
        "predict": "What should I expect, and where is the crossover?",
    },
    "Measure": {
        "measure": "What happens, arm against arm, at my load?",
        "verify": "Is the output unchanged by speculation?",
        "tune": "Which draft length at which load? Finds it, and confirms a schedule.",
    },
    "Decide": {
        "decide": "So: on, off, or measure more?",
        "report": "Show me, and my boss.",
        "compare": "What did that change do: quantisation, version, flags?",
    },
    "Watch": {
        "watch": "Is it still true in production?",
        "tap": "A proxy that measures each request, by temperature and segment.",
        "alerts": "Prometheus rules with this study's own thresholds.",
        "dashboard": "A Grafana dashboard with this study's figures as lines.",
    },
    "Engine": {
        "engine": "The embedded vLLM: install it, find it, check it.",
        "calibrate": "What does a step cost on my engine? Predictions build on it.",
        "twin": "Servers with a known truth: rehearse a study without a GPU.",
    },
}


class _Commands(click.Group):
    """A group whose commands live in `specwise.cli.<name>` and load when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [name for commands in STAGES.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = getattr(
            importlib.import_module(f"specwise.cli.{cmd_name}"), cmd_name
        )
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not ctx.resilient_parsing:
            for meant in difflib.get_close_matches(args[0], known, 1):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for stage, commands in STAGES.items():
            with formatter.section(stage):
                formatter.write_dl(list(commands.items()), col_max=12)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 fine, 1 the answer is no, 2 bad input, 3 could not measure.",
)
@click.version_option(__version__, prog_name="specwise")
def specwise() -> None:
    """Should this vLLM deployment speculate, and how?

    specwise measures speculative decoding against a baseline at your own load, decides, and shows
    the evidence. Start with `specwise demo`.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exits the process with the documented codes."""
    try:
        return specwise.main(args=arguments, prog_name="specwise")
    except SpecwiseError as error:
        click.echo(f"specwise: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
