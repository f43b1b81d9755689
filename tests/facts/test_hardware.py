"""Accelerators by name."""

from __future__ import annotations

import pytest

from specwise.errors import InputError
from specwise.facts.hardware import GIB, find_gpu, gpus


@pytest.mark.parametrize(
    ("spelling", "vendor_gb"),
    [("h100", 80), ("H100 SXM", 80), ("NVIDIA H200", 141), ("RTX 4090", 24), ("a100-40", 40),
     ("MI300X", 192), ("H100-PCIe", 80)],
)  # fmt: skip
def test_spellings(spelling: str, vendor_gb: float) -> None:
    assert find_gpu(spelling).vendor_gb == vendor_gb


def test_unknown_gpus_name_the_near_ones() -> None:
    with pytest.raises(InputError, match=r"h100"):
        find_gpu("h1000")


@pytest.mark.parametrize("name", gpus())
def test_every_entry_is_plausible(name: str) -> None:
    gpu = gpus()[name]
    assert 0.85 < gpu.memory_bytes / (gpu.vendor_gb * 1e9) <= 1.09
    assert 3e11 <= gpu.bandwidth_bytes_per_s <= 1e13
    assert gpu.source
    ridge = gpu.bf16_flops / gpu.bandwidth_bytes_per_s  # operations per byte
    assert 100 < ridge < 500
    assert gpu.memory_bytes > 20 * GIB
