"""Accelerators by their data sheets (``data/gpus.toml``), each figure with its source."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources

from specwise.domain import Gpu
from specwise.errors import InputError

GIB = 2**30


@functools.cache
def gpus() -> Mapping[str, Gpu]:
    """Every known accelerator by its short name."""
    text = resources.files("specwise.facts").joinpath("data/gpus.toml").read_text()
    table = tomllib.loads(text)
    return {
        key: Gpu(
            name=entry["title"],
            vendor_gb=entry["vendor_gb"],
            memory_bytes=round(entry["usable_gib"] * GIB),
            bandwidth_bytes_per_s=entry["bandwidth"] * 1e9,
            bf16_flops=entry["bf16"] * 1e12,
            fp8_flops=entry["fp8"] * 1e12 if "fp8" in entry else None,
            int8_flops=entry["int8"] * 1e12 if "int8" in entry else None,
            link_bytes_per_s=entry["link"] * 1e9,
            compute_capability=tuple(entry["capability"]),
            source=entry["source"]
            + "".join(f"; {field} approximate" for field in entry["approximate"]),
        )
        for key, entry in table.items()
    }


def find_gpu(name: str) -> Gpu:
    """The accelerator of that name in any spelling (``H100``, ``h100-sxm``, ``RTX 4090``).

    Raises InputError naming the known ones.
    """
    wanted = re.sub(r"^(nvidia|amd|geforce|instinct)+", "", re.sub(r"[^a-z0-9]", "", name.lower()))
    keys = {key.replace("-", ""): key for key in gpus()}
    for spelling in (wanted, re.sub(r"(sxm\d?|80gb?|40gb?|141gb?|192gb?)$", "", wanted)):
        if spelling in keys:
            return gpus()[keys[spelling]]
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(keys[n] for n in near)}? " if near else ""
    raise InputError(f"No accelerator is called {name!r}.", f"{hint}Known: {', '.join(gpus())}.")
