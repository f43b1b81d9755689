from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from specwise.cli.main import STAGES, main


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What the command does, done in this process: a new one imports for a second or two."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        contextlib.chdir(folder or Path()),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as left,
    ):
        main(list(arguments))
    assert left.value.code is None or isinstance(left.value.code, int)
    said = [stream.buffer.getvalue().decode() for stream in (out, errors)]
    return subprocess.CompletedProcess(arguments, left.value.code or 0, *said)


def process(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "specwise.cli.main", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )


def test_help_groups_the_commands_by_stage() -> None:
    out = run("--help").stdout
    assert [line.rstrip(":") for line in re.findall(r"^[A-Z]\w+:$", out, re.MULTILINE)] == [
        "Options",
        *STAGES,
    ]
    for commands in STAGES.values():
        assert all(f"  {name}" in out for name in commands)


@pytest.mark.parametrize("name", [name for commands in STAGES.values() for name in commands])
def test_every_command_has_help_and_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"specwise {name}" in done.stdout.split("Usage:")[1]
    assert name == "engine" or "xample" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from specwise.cli.main import specwise\n"
        "try: specwise.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'pydantic', 'rich', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["measure"], 2, "Give a study file"),
        (["measure", "none.toml"], 2, "none.toml does not exist"),
        (["measure", "--resume", "none"], 3, "none is not a study folder"),
        (["decide", "none"], 3, "none is not a study folder"),
        (["report", "none"], 3, "none is not a study folder"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["measur"], 2, "Did you mean 'measure'?"),
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["--help"], ["decide", "none"], ["nonsense"]])
def test_a_process_says_the_same(tmp_path: Path, arguments: list[str]) -> None:
    one, other = run(*arguments, folder=tmp_path), process(*arguments, folder=tmp_path)
    assert (one.returncode, one.stdout, one.stderr) == (
        other.returncode,
        other.stdout,
        other.stderr,
    )


def test_the_example_study_can_be_planned(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(run("measure", "--example").stdout)
    done = run("measure", "study.toml", "--plan", folder=tmp_path)
    assert done.returncode == 0
    trials = 2 * 3 * 3 * 2 + 3  # arms x workloads x loads x repeats, and A/A
    assert done.stdout.splitlines()[-1].startswith(f"{trials} trials, ")


def test_main_passes_the_exit_code_on() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["measure", "--resume", "none"])
    assert caught.value.code == 3
