"""Quantised copies of a small bfloat16 checkpoint, in the format that vLLM loads.

Rounding to nearest, without calibration data: good enough to see what quantising a target does to
the acceptance of its draft (req: D1, D2), not the way to quantise a model for production. Files
follow compressed-tensors 0.16 as vLLM 0.32 reads it: ``compressors/{naive,pack}_quantized`` there,
``quantization/compressed_tensors/schemes`` in vLLM.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specwise.errors import CheckpointError
from specwise.facts.bundled import derived_checkpoint, file_sha256
from specwise.facts.llama import Floats, as_float32, load_bfloat16, load_tensors, save_tensors

GROUP = 128
_PER_INT32 = 8  # four-bit numbers in 32 bits

Integers = npt.NDArray[np.int8]


class Scheme(StrEnum):
    """How the linear layers are stored; embeddings and norms stay as they are.

    ``INT8``: W8A8, one scale an output channel, activations quantised per token while serving.
    ``INT4``: W4A16, one scale for each 128 weights of a channel, activations untouched.
    """

    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix [out, in] as integers of ``bits`` and float32 scales [out, groups]."""

    values: Integers
    scales: Floats

    def dequantised(self) -> Floats:
        """The weights that the integers stand for, float32 [out, in]."""
        group = self.values.shape[1] // self.scales.shape[1]
        out: Floats = self.values.astype(np.float32) * np.repeat(self.scales, group, axis=1)
        return out


def round_to_nearest(weights: Floats, bits: int, group: int | None = None) -> Quantised:
    """Symmetric integers of ``bits``, one scale for each ``group`` weights (None: a channel).

    The scale is 2 max|w| / (2^bits - 1), so that both ends of the range are off by half a step and
    no weight by more. A group of zeros gets the scale 1. CheckpointError if a channel is no whole
    number of groups.
    """
    rows, columns = weights.shape
    group = group or columns
    if columns % group:
        raise CheckpointError(
            f"A matrix with {columns} columns cannot be quantised in groups of {group}.",
            "Choose int8, which has one scale a channel.",
        )
    grouped = weights.reshape(rows, -1, group)
    scales = np.abs(grouped).max(axis=2, keepdims=True) * np.float32(2 / (2**bits - 1))
    scales = np.where(scales > 0, scales, np.float32(1))
    limit = 2 ** (bits - 1)
    values = np.clip(np.rint(grouped / scales), -limit, limit - 1).astype(np.int8)
    return Quantised(values.reshape(rows, columns), scales[:, :, 0])


def pack_int4(values: Integers) -> npt.NDArray[np.int32]:
    """Eight numbers of -8..7 in each int32, [out, ceil(in / 8)], the first in the lowest bits.

    Stored with 8 added, as an unsigned number; a row that does not fill its last int32 ends in
    zero bits.
    """
    rows, columns = values.shape
    shifted = np.pad((values.astype(np.int16) + 8).astype(np.uint32), ((0, 0), (0, -columns % 8)))
    places = np.arange(_PER_INT32, dtype=np.uint32) * 4
    lanes = shifted.reshape(rows, -1, _PER_INT32) << places
    packed: npt.NDArray[np.uint32] = np.bitwise_or.reduce(lanes, axis=2)
    return packed.view(np.int32)


def unpack_int4(packed: npt.NDArray[np.int32], columns: int) -> Integers:
    """The inverse of `pack_int4`: [out, ``columns``]."""
    places = np.arange(_PER_INT32, dtype=np.uint32) * 4
    nibbles = (packed.view(np.uint32)[:, :, None] >> places) & 15
    values = nibbles.astype(np.int8) - 8
    out: Integers = values.reshape(len(packed), -1)[:, :columns].astype(np.int8)
    return out


def quantised_checkpoint(folder: Path, source: Path, scheme: Scheme) -> Path:
    """A copy of the bfloat16 checkpoint ``source`` in ``scheme``, made inside ``folder``.

    Kept from one call to the next while the source's weights are the same. Raises CheckpointError
    when the source is no bfloat16 checkpoint in one file, or the copy cannot be written.
    """
    weights = source / "model.safetensors"
    return derived_checkpoint(
        folder,
        f"{source.name}-{scheme}",
        {
            "scheme": scheme,
            "group": GROUP if scheme is Scheme.INT4 else None,
            "format": 1,
            "source_sha256": file_sha256(weights),
        },
        lambda out: _write(source, out, scheme),
        marker="quantisation.json",
        what=f"the {scheme} copy of {source.name}",
        room_mb=weights.stat().st_size * 6 // 10 // 2**20 + 1,
    )


def dequantised_weights(folder: Path) -> dict[str, Floats]:
    """The weights of a copy made here as float32, under the names that they had before."""
    stored = load_tensors(folder / "model.safetensors")
    weights: dict[str, Floats] = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix("_packed")
            values = unpack_int4(tensor, int(stored[f"{module}_shape"][1]))
            weights[module] = Quantised(values, stored[f"{module}_scale"]).dequantised()
        elif tensor.dtype == np.int8:
            weights[name] = Quantised(tensor, stored[f"{name}_scale"]).dequantised()
        elif tensor.dtype == np.uint16:
            weights[name] = as_float32(tensor)
    return weights


def _write(source: Path, out: Path, scheme: Scheme) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _quantization_config(scheme)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in source.glob("*.json"):
        if path.name.startswith(("tokenizer", "generation_config", "special_tokens")):
            shutil.copyfile(path, out / path.name)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, bits in load_bfloat16(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= _stored(name, as_float32(bits), scheme)
        else:
            tensors[name] = bits
    save_tensors(out / "model.safetensors", tensors)


def _stored(name: str, weights: Floats, scheme: Scheme) -> dict[str, npt.NDArray[Any]]:
    """A linear layer's tensors under the names that compressed-tensors gives them."""
    if scheme is Scheme.INT8:
        whole = round_to_nearest(weights, 8)
        return {name: whole.values, f"{name}_scale": whole.scales}
    grouped = round_to_nearest(weights, 4, GROUP)
    return {
        f"{name}_packed": pack_int4(grouped.values),
        f"{name}_scale": grouped.scales,
        f"{name}_shape": np.array(weights.shape, dtype=np.int64),
    }


def _quantization_config(scheme: Scheme) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    if scheme is Scheme.INT8:
        weights: dict[str, Any] = {"num_bits": 8, "strategy": "channel", "dynamic": False}
        inputs: dict[str, Any] | None = {"num_bits": 8, "strategy": "token", "dynamic": True}
    else:
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False}
        inputs = None
    layers = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": inputs and common | inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme is Scheme.INT8 else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": layers},
        "ignore": ["lm_head"],
    }
