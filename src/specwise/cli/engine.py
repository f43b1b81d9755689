"""`specwise engine`: install the embedded vLLM, say whether it is healthy, print where it is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specwise.vllm import engine as embedded


@click.group()
def engine() -> None:
    """The embedded vLLM: install it, find it, check it.

    vLLM's CPU build in an environment of its own, for `specwise demo` and for studies on a machine
    without a GPU. Nothing outside its folder is touched.

    \b
    Example:
      specwise engine install
      specwise engine status
    """


@engine.command()
@click.option("--reinstall", is_flag=True, help="Start from an empty folder.")
@click.option(
    "--pip-args", default="", metavar="TEXT", help='Passed on to pip, e.g. "--proxy http://...".'
)
def install(reinstall: bool, pip_args: str) -> None:
    """Install the engine, or finish an installation that was interrupted.

    \b
    Example:
      specwise engine install
    """
    arguments = embedded.split_pip_arguments(pip_args)
    before = embedded.status()
    if before.healthy and not reinstall:
        click.echo(f"vLLM {before.vllm_version} is installed and healthy: {before.folder}")
        return
    click.echo(
        f"Installing vLLM {before.vllm_version} (CPU) into {before.folder}\n"
        f"About {embedded.DOWNLOAD_BYTES / 1e9:.1f} GB to download, "
        f"{embedded.DISK_BYTES / 1e9:.1f} GB on disk. Ctrl-C is safe: the next run goes on."
    )
    after = _install_showing_progress(arguments, reinstall=reinstall)
    size = after.installed.size_bytes if after.installed else 0
    click.echo(f"vLLM {after.vllm_version} is installed and healthy ({size / 1e9:.1f} GB).")


@engine.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(as_json: bool) -> None:
    """Version, folder, size, and whether it is healthy; exit code 1 if it is not.

    \b
    Example:
      specwise engine status --json
    """
    found = embedded.status()
    if as_json:
        facts = asdict(found) | {"folder": str(found.folder), "healthy": found.healthy}
        click.echo(json.dumps(facts, indent=2))
    else:
        click.echo(f"vLLM     {found.vllm_version} (CPU build)")
        click.echo(f"folder   {found.folder}")
        if found.installed:
            click.echo(f"torch    {found.installed.torch_version}")
            click.echo(f"Python   {found.installed.python_version}")
            click.echo(f"size     {found.installed.size_bytes / 1e9:.1f} GB")
        click.echo(f"health   {found.problem or 'healthy'}")
        if found.next_step:
            click.echo(f"         {found.next_step}")
    sys.exit(0 if found.healthy else 1)


@engine.command()
def path() -> None:
    """Print the engine's environment folder, for use in scripts.

    \b
    Example:
      "$(specwise engine path)/bin/python" -c "import vllm; print(vllm.__version__)"
    """
    click.echo(embedded.engine_python().parent.parent)


def _install_showing_progress(arguments: list[str], *, reinstall: bool) -> embedded.EngineStatus:
    """Install with a progress bar in a terminal, and with a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return embedded.install(_Lines(), pip_arguments=arguments, reinstall=reinstall)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None)

        def advance(text: str, done: int, total: int) -> None:
            bar.update(task, description=text, completed=done, total=total or None)

        return embedded.install(advance, pip_arguments=arguments, reinstall=reinstall)


class _Lines:
    """Progress for a log: one line at most every 25 packages, and one for every other step."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what.startswith("fetching") and done < self._next:
            return
        self._next = done + 25 if what.startswith("fetching") else self._next
        click.echo(f"[{done}/{total}] {what}" if total else what)
