"""Where and with what a study ran: enough to tell whether two studies may be compared."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specwise import __version__
from specwise.errors import CheckpointError
from specwise.facts.checkpoint import from_folder


def describe_here() -> dict[str, Any]:
    """specwise, Python, operating system, processor, memory and GPUs of this machine, and the time.

    What cannot be found out is None, never a guess. GPUs are an empty list where there is no
    NVIDIA driver.
    """
    return {
        "specwise": __version__,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def describe_model(folder: Path) -> dict[str, Any]:
    """Identity of a checkpoint folder: sha256 of config and weight files' headers and sizes.

    Hashing all weights of a 70B model takes minutes; names, sizes and safetensors headers (which
    hold every tensor's name, shape and place) tell two checkpoints apart in milliseconds, though
    not two sets of weights of one shape. ``weight_bits`` is what its linear layers are stored in,
    left out where the config does not say. Empty for a model that is not a local folder.
    """
    if not (folder / "config.json").is_file():
        return {}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, 64 * 2**20)))
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    bits = _weight_bits(folder)
    return {
        "config_and_headers_sha256": digest.hexdigest(),
        "weights_bytes": sum(path.stat().st_size for path in weights),
    } | ({} if bits is None else {"weight_bits": bits})


def _weight_bits(folder: Path) -> float | None:
    try:
        checkpoint = from_folder(folder)
    except CheckpointError:
        return None
    if checkpoint.quantization is not None:
        return checkpoint.quantization.weight_bits
    return {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0}.get(checkpoint.dtype)
