"""The real promtool and prometheus, from the PATH or where scripts/install-prometheus put them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_UNPACKED = Path(sys.prefix) / "prometheus" / "usr" / "bin"


def binary(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED))
    assert found, f"{name} is missing: run scripts/install-prometheus"
    return found


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [binary("promtool"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
    )
