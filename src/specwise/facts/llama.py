"""A Llama forward pass in numpy: the reference that small checkpoints are checked against.

It reads and writes safetensors without torch and computes in float32, with no cache and no
batching: meant for a few prompts of a model of up to some hundred million parameters.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specwise.errors import CheckpointError

Floats = npt.NDArray[np.float32]
Bfloat16s = npt.NDArray[np.uint16]


# Names of safetensors' dtypes; numpy has no bfloat16, so its 16 bits stand in.
_DTYPES = {"BF16": "<u2", "F32": "<f4", "I8": "<i1", "I32": "<i4", "I64": "<i8"}


def load_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file by name; BF16 as its 16 bits (uint16).

    Layout: eight bytes of header length, little endian; the header in JSON; the data. Raises
    CheckpointError when the file is not that, or holds another dtype than BF16, F32, I8, I32, I64.
    """
    try:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries: dict[str, Any] = json.loads(raw[8:start])
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, not one of {', '.join(_DTYPES)}")
            first, last = entry["data_offsets"]
            data = np.frombuffer(raw[start + first : start + last], dtype=_DTYPES[entry["dtype"]])
            tensors[name] = data.reshape(entry["shape"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file that can be used here: {error}",
            "Copy the checkpoint again, or reinstall specwise if it is one of its own.",
        ) from error
    return tensors


def load_bfloat16(path: Path) -> dict[str, Bfloat16s]:
    """The tensors of a safetensors file that holds BF16 only, by name, as their 16 bits.

    Raises CheckpointError when the file is not that.
    """
    tensors = load_tensors(path)
    others = [name for name, tensor in tensors.items() if tensor.dtype != np.uint16]
    if others:
        raise CheckpointError(
            f"{path} is not a safetensors file of bfloat16 tensors: {others[0]} is "
            f"{tensors[others[0]].dtype}.",
            "Give the checkpoint before it was quantised or converted.",
        )
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write tensors as a safetensors file, uint16 as BF16; the file is on disk after."""
    names = {np.dtype(code): name for name, code in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor).tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def as_float32(bits: Bfloat16s) -> Floats:
    """A bfloat16 is the upper half of the float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class ReferenceLlama:
    """A LlamaForCausalLM with tied embeddings, no biases and plain rotary embedding."""

    config: dict[str, Any]
    weights: dict[str, Floats]

    @classmethod
    def load(cls, folder: Path) -> ReferenceLlama:
        """Read config.json and model.safetensors of a checkpoint folder."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_bfloat16(folder / "model.safetensors")
        return cls(config, {name: as_float32(bits) for name, bits in tensors.items()})

    def logits(self, tokens: list[int]) -> Floats:
        """Logits [length, vocabulary] after each of the tokens (Touvron et al. 2023)."""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[tokens]
        cos, sin = self._angles(len(tokens))
        for index in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{index}."
            x = x + self._attention(prefix, self._norm(prefix + "input_layernorm", x), cos, sin)
            x = x + self._mlp(prefix, self._norm(prefix + "post_attention_layernorm", x))
        out: Floats = self._norm("model.norm", x) @ embedding.T
        return out

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """The greedy continuation of a prompt, up to and including the end token."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + max_tokens:
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] == self.config["eos_token_id"]:
                break
        return tokens[len(prompt) :]

    def _norm(self, name: str, x: Floats) -> Floats:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        out: Floats = x / scale.astype(np.float32) * self.weights[name + ".weight"]
        return out

    def _angles(self, length: int) -> tuple[Floats, Floats]:
        size = self.config["head_dim"]
        rates = self.config["rope_theta"] ** -(np.arange(0, size, 2) / size)
        angles = np.outer(np.arange(length), rates)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _attention(self, prefix: str, x: Floats, cos: Floats, sin: Floats) -> Floats:
        length, size = len(x), self.config["head_dim"]

        def heads(name: str) -> Floats:
            projected = x @ self.weights[f"{prefix}self_attn.{name}_proj.weight"].T
            return projected.reshape(length, -1, size).transpose(1, 0, 2)

        def rotated(h: Floats) -> Floats:
            a, b = h[..., : size // 2], h[..., size // 2 :]
            return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)

        q, k, v = rotated(heads("q")), rotated(heads("k")), heads("v")
        groups = len(q) // len(k)
        k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(size))
        scores[:, np.triu(np.ones((length, length), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ v).transpose(1, 0, 2).reshape(length, -1)
        out: Floats = mixed @ self.weights[f"{prefix}self_attn.o_proj.weight"].T
        return out

    def _mlp(self, prefix: str, x: Floats) -> Floats:
        gate = x @ self.weights[f"{prefix}mlp.gate_proj.weight"].T
        up = x @ self.weights[f"{prefix}mlp.up_proj.weight"].T
        activated = gate / (1 + np.exp(-gate)) * up
        out: Floats = activated @ self.weights[f"{prefix}mlp.down_proj.weight"].T
        return out
