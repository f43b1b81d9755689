"""A model's metadata -> Checkpoint: from a folder, the built-in table or the hub, never weights.

Parameters are counted in the safetensors headers where these can be read, else from the config by
formula. The formulas are checked against the published counts of every model in ``models.toml``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from specwise.domain import Checkpoint, KvGroup, Quantization
from specwise.errors import CheckpointError

_HEADER_LIMIT = 100_000_000  # safetensors' own limit on a header
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BOOL": 8, "F4": 4, "U16": 16, "U32": 32, "U64": 64,
}  # fmt: skip
_VERIFIED = {  # model types whose formula reproduces published counts exactly
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "deepseek_v3", "gpt_oss",
}  # fmt: skip


def load_checkpoint(name: str) -> Checkpoint:
    """The checkpoint a user means: a folder, a name of the built-in table, or a hub id.

    Raises CheckpointError if it is none of these or its metadata cannot be read.
    """
    path = Path(name).expanduser()
    if _is_dir(path):
        return from_folder(path, name)
    known = table_name(name)
    if known is not None:
        return from_table(known)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII):
        return from_hub(name)
    near = _near_names(name)
    raise CheckpointError(
        f"There is no model folder {name!r}, and no built-in model of that name.",
        "Give a folder with config.json, a hub id (owner/name), or a built-in name such as "
        f"{', '.join(near)}.",
    )


def load_local(name: str) -> Checkpoint | None:
    """The checkpoint if it is a folder or a built-in model, None otherwise; never asks the hub."""
    path = Path(name).expanduser()
    try:
        if name and (path / "config.json").is_file():
            return from_folder(path, name)
        known = table_name(name) if name else None
        return from_table(known) if known is not None else None
    except (CheckpointError, OSError, ValueError):
        return None


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


# ------------------------------------------------------------------------------- the table


@functools.cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("specwise.facts").joinpath("data/models.toml").read_text()
    return tomllib.loads(text)


def known_models() -> tuple[str, ...]:
    """Names of the built-in table."""
    return tuple(_table())


def _short(name: str) -> str:
    """``meta-llama/Llama-3.1-8B-Instruct`` as ``llama-3.1-8b``."""
    return re.sub(r"-(instruct|it|base|chat)(?=-|$)", "", name.rsplit("/", 1)[-1].lower())


def table_name(name: str) -> str | None:
    """The table's name for what the user typed: the hub id, or its last part in any case."""
    owner = name.rpartition("/")[0].lower()
    for known in _table():
        same_owner = not owner or known.lower().startswith(owner + "/")
        if same_owner and _short(known) == _short(name):
            return known
    return None


def full_name(name: str) -> str:
    """The hub id of a built-in model's short name; anything else as it is."""
    known = table_name(name) if "/" not in name and not _is_dir(Path(name).expanduser()) else None
    return known or name


def _near_names(name: str) -> list[str]:
    import difflib  # noqa: PLC0415 (only for the error)

    shorts = [_short(known) for known in _table()]
    return difflib.get_close_matches(_short(name), shorts, n=3, cutoff=0.3) or shorts[:3]


def from_table(name: str) -> Checkpoint:
    """A built-in model; KeyError for an unknown name."""
    entry = _table()[name]
    checkpoint = from_config(entry["config"], name, f"built-in table: config.json of {name}")
    return replace(
        checkpoint,
        parameters_from="table",
        family=entry["family"],
        tokenizer_family=entry["tokenizer"],
    )


def published_parameters() -> Mapping[str, int]:
    """The owners' own parameter counts of the built-in models."""
    return {name: int(entry["published"]) for name, entry in _table().items()}


# ------------------------------------------------------------------------- folders and the hub


def from_folder(folder: Path, name: str | None = None) -> Checkpoint:
    """A checkpoint folder: config.json, and the headers of its safetensors files if there are any.

    Raises CheckpointError for a folder without a readable config.json or with damaged headers.
    """
    config = _read_json(folder / "config.json")
    checkpoint = from_config(config, name or str(folder), f"folder {folder}")
    checkpoint = replace(checkpoint, folder=str(folder))
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(read_header(file))
    return _with_tensors(checkpoint, tensors) if tensors else checkpoint


def from_hub(repo: str) -> Checkpoint:
    """A hub repository's metadata and tokenizer files, cached by huggingface_hub; no weights.

    Raises CheckpointError when the hub cannot be reached or refuses, naming the alternatives.
    """
    import httpx  # noqa: PLC0415
    import huggingface_hub as hub  # noqa: PLC0415 (0.3 s, only when a hub id is given)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    trouble = (OSError, ValueError, httpx.HTTPError, HfHubHTTPError, RuntimeError)
    try:
        config_file = hub.hf_hub_download(repo, "config.json")
    except trouble as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}
        reason = "HF_HUB_OFFLINE is set" if offline else str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"{repo} could not be read from the Hugging Face hub: {reason}.",
            "Give a local folder with its config.json (and tokenizer.json), or a built-in name: "
            f"{', '.join(_near_names(repo))}. Gated models need HF_TOKEN.",
        ) from error
    folder = Path(config_file).parent
    checkpoint = from_config(_read_json(Path(config_file)), repo, f"hub {repo}")
    for optional in ("tokenizer.json", "tokenizer_config.json"):
        try:
            hub.hf_hub_download(repo, optional)
        except trouble:
            continue
    checkpoint = replace(checkpoint, folder=str(folder))
    try:
        metadata = hub.get_safetensors_metadata(repo)
    except trouble:
        note = "its safetensors headers could not be read: parameters by formula"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    tensors = {
        tensor: Tensor(info.dtype, tuple(info.shape))
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    return _with_tensors(checkpoint, tensors)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing or something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}.",
            "Point to the folder that holds config.json.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}.", "Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.", "Download the file again.")
    return value


# ------------------------------------------------------------------------- safetensors headers


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a header: its dtype as safetensors writes it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return math.ceil(math.prod(self.shape) * _DTYPE_BITS.get(self.dtype, 16) / 8)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file says it holds; the data is not read.

    Format: 8 bytes little-endian header length, then JSON (safetensors README).
    """
    damaged = f"{file} is not a whole safetensors file"
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT
            if length >= _HEADER_LIMIT:
                raise CheckpointError(f"{damaged}: no header.", "Download the file again.")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.", "") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{damaged}: {error}.", "Download the file again.") from error
    tensors: dict[str, Tensor] = {}
    for name, info in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        shape = info.get("shape") if isinstance(info, dict) else None
        if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise CheckpointError(f"{damaged}: tensor {name!r}.", "Download the file again.")
        tensors[name] = Tensor(str(info.get("dtype")), tuple(shape))
    return tensors


_NOT_WEIGHTS = re.compile(
    r"(scales?|scale_inv|zeros|qzeros|zero_point|g_idx|weight_shape|absmax|quant_map|inv_freq|"
    r"masked_bias|nested_absmax)$|quant_state"
)


def _with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint with parameters and bytes as its headers have them."""
    bits = checkpoint.quantization.weight_bits if checkpoint.quantization else 16
    total = sum(t.size_bytes for t in tensors.values())
    counted = 0
    mtp = 0
    for name, tensor in tensors.items():
        if _NOT_WEIGHTS.search(name):
            continue
        if checkpoint.tied_embeddings and name.endswith("lm_head.weight"):
            continue  # stored twice, loaded once
        packed = 1.0
        if name.endswith(("qweight", "weight_packed")):
            packed = _DTYPE_BITS.get(tensor.dtype, 32) / bits
        elif name.endswith("_blocks"):
            packed = 2.0  # mxfp4: two values a byte
        count = round(math.prod(tensor.shape) * packed)
        layer = re.search(r"layers\.(\d+)\.", name)
        if "mtp" in name or (
            layer and checkpoint.mtp_layers and int(layer[1]) >= checkpoint.layers
        ):
            mtp += count
        else:
            counted += count
    if not counted:
        return checkpoint
    active = checkpoint.active_parameters
    if checkpoint.parameters:
        active = round(active * counted / checkpoint.parameters)
    notes = checkpoint.notes
    if mtp:
        notes = (*notes, f"{mtp:,} parameters of its MTP layers are not counted")
    if checkpoint.tied_embeddings:
        double = [t.size_bytes for n, t in tensors.items() if n.endswith("lm_head.weight")]
        total -= sum(double)
    return replace(
        checkpoint,
        parameters=counted,
        active_parameters=min(active, counted) if active else counted,
        parameters_from="safetensors",
        weight_bytes=total,
        notes=tuple(n for n in notes if not n.startswith("parameters by")),
    )


# ------------------------------------------------------------------------------- the config


class _Config:
    """Typed access to a config.json; what is absent or malformed becomes a CheckpointError."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self.name = name

    def whole(self, *keys: str, default: int | None = None) -> int:
        """The first of the keys that is there, as a whole number from 0."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
                raise CheckpointError(
                    f"{self.name}: {key} in its config.json is {value!r}, not a whole number.",
                    "Check the file against the model's page.",
                )
            return value
        if default is None:
            raise CheckpointError(
                f"{self.name}: its config.json has no {keys[0]}.",
                "Point to a causal language model; for others give a local folder with "
                "safetensors files.",
            )
        return default

    def text(self, key: str) -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def on(self, key: str, *, default: bool = False) -> bool:
        value = self.values.get(key)
        return value if isinstance(value, bool) else default

    def items(self, key: str) -> list[Any]:
        value = self.values.get(key)
        return value if isinstance(value, list) else []

    def part(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        return value if isinstance(value, dict) else {}


def from_config(values: Mapping[str, Any], name: str, source: str) -> Checkpoint:
    """A checkpoint from the contents of a config.json alone."""
    outer = _Config(values, name)
    notes: list[str] = []
    text = outer.part("text_config")
    config = outer
    if text:
        config = _Config({**values, **text}, name)
        notes.append("only its language model is counted, not its encoders")
    model_type = config.text("model_type")
    architectures = outer.items("architectures")
    architecture = str(architectures[0]) if architectures else model_type or "unknown"
    if model_type not in _VERIFIED:
        notes.append(
            f"parameters by the common formula: {model_type or 'an unnamed model type'} is not one "
            "that specwise has verified"
        )
    hidden = config.whole("hidden_size", "n_embd", "d_model")
    heads = config.whole("num_attention_heads", "n_head", "num_heads")
    layers = config.whole("num_hidden_layers", "n_layer", "num_layers")
    vocab = config.whole("vocab_size")
    if min(hidden, heads, vocab) < 1:
        raise CheckpointError(f"{name}: its config.json has a size of 0.", "Check the file.")
    shape = _Shape(config, hidden, heads, layers)
    tied = config.on("tie_word_embeddings")
    embedding = vocab * hidden * (1 if tied else 2)
    total, active = shape.layer_parameters()
    head = _head_method(outer, architecture)
    if head:
        notes.append(f"a {head} head: it runs with its target only")
    positions = config.whole("max_position_embeddings", "n_positions", "max_seq_len", default=0)
    return Checkpoint(
        name=name,
        source=source,
        architecture=architecture,
        parameters=embedding + total + hidden,
        active_parameters=embedding + active + hidden,
        parameters_from="config",
        weight_bytes=None,
        layers=layers,
        hidden_size=hidden,
        attention_heads=heads,
        vocab_size=vocab,
        max_positions=positions or None,
        kv_groups=shape.kv_groups(),
        dtype=config.text("dtype") or config.text("torch_dtype") or "bfloat16",
        quantization=_quantization(config.part("quantization_config"), name),
        tied_embeddings=tied,
        mtp_layers=config.whole("num_nextn_predict_layers", "mtp_num_hidden_layers", default=0),
        experts=shape.experts,
        active_experts=min(shape.active_experts, shape.experts),
        head_method=head,
        family=model_type,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """Parameter and cache arithmetic of a decoder's layers."""

    config: _Config
    hidden: int
    heads: int
    layers: int

    @property
    def kv_heads(self) -> int:
        multi_query = 1 if self.config.on("multi_query") else self.heads
        return self.config.whole("num_key_value_heads", "num_kv_heads", default=multi_query)

    @property
    def head_dim(self) -> int:
        return self.config.whole("head_dim", default=self.hidden // self.heads)

    @property
    def model_type(self) -> str:
        return self.config.text("model_type")

    @property
    def experts(self) -> int:
        """Experts of a sparse layer, 0 for a dense model."""
        return self.config.whole("num_experts", "num_local_experts", "n_routed_experts", default=0)

    @property
    def active_experts(self) -> int:
        """Experts that one token goes through; meaningless for a dense model."""
        return self.config.whole("num_experts_per_tok", "num_experts_per_token", default=1)

    def layer_parameters(self) -> tuple[int, int]:
        """(all, active for one token) parameters of all layers, norms included."""
        common = self._attention() + self._norms()
        dense = self._dense_mlp()
        if not self.experts:
            return self.layers * (common + dense), self.layers * (common + dense)
        all_experts, active_experts = self._experts(self.experts)
        dense_layers = min(self._dense_layers(), self.layers)
        sparse = self.layers - dense_layers
        fixed = self.layers * common + dense_layers * dense
        return fixed + sparse * all_experts, fixed + sparse * active_experts

    def _attention(self) -> int:
        config, hidden, heads = self.config, self.hidden, self.heads
        latent = config.whole("kv_lora_rank", default=0)
        if latent:
            nope = config.whole("qk_nope_head_dim")
            rope = config.whole("qk_rope_head_dim")
            value = config.whole("v_head_dim")
            q_rank = config.whole("q_lora_rank", default=0)
            q_width = heads * (nope + rope)
            query = hidden * q_rank + q_rank + q_rank * q_width if q_rank else hidden * q_width
            key_value = hidden * (latent + rope) + latent + latent * heads * (nope + value)
            return query + key_value + heads * value * hidden
        q_width, kv_width = heads * self.head_dim, self.kv_heads * self.head_dim
        total = hidden * q_width + 2 * hidden * kv_width + q_width * hidden
        if self.model_type in {"qwen2", "qwen2_moe"} or config.on("attention_bias"):
            total += q_width + 2 * kv_width
        if config.on("attention_bias") and self.model_type not in {"qwen2", "qwen2_moe"}:
            total += hidden
        if self.model_type in {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}:
            total += 2 * self.head_dim
        if self.model_type == "gpt_oss":
            total += heads + q_width + 2 * kv_width + hidden  # sinks and biases
        return total

    def _norms(self) -> int:
        return self.hidden * (4 if self.model_type in {"gemma2", "gemma3", "gemma3_text"} else 2)

    def _dense_mlp(self) -> int:
        inner = self.config.whole("intermediate_size", "n_inner", default=4 * self.hidden)
        matrices = 2 if self.model_type in {"gpt2", "opt", "gpt_neox", "falcon", "phi"} else 3
        return matrices * self.hidden * inner

    def _experts(self, experts: int) -> tuple[int, int]:
        """(all, active) parameters of one sparse layer's experts and router."""
        config, hidden = self.config, self.hidden
        inner = config.whole("moe_intermediate_size", "intermediate_size")
        chosen = self.active_experts
        expert = 3 * hidden * inner
        router = hidden * experts
        shared_inner = config.whole("shared_expert_intermediate_size", default=0)
        shared = 3 * hidden * (shared_inner or inner * config.whole("n_shared_experts", default=0))
        if self.model_type == "qwen2_moe":
            shared += hidden  # the shared expert's gate
        if self.model_type == "deepseek_v3":
            router += experts  # e_score_correction_bias
        if self.model_type == "gpt_oss":
            expert += 2 * inner + hidden
            router += experts
        return experts * expert + router + shared, min(chosen, experts) * expert + router + shared

    def _dense_layers(self) -> int:
        """Layers whose MLP is dense although the model has experts."""
        step = self.config.whole("decoder_sparse_step", default=1)
        dense = self.config.whole("first_k_dense_replace", default=0)
        if step > 1:
            dense = self.layers - self.layers // step
        return max(dense, len(self.config.items("mlp_only_layers")))

    def kv_groups(self) -> tuple[KvGroup, ...]:
        """Layers by what they cache; see ``KvGroup``."""
        config = self.config
        latent = config.whole("kv_lora_rank", default=0)
        if latent:
            width = latent + config.whole("qk_rope_head_dim")
            return (KvGroup(self.layers, 1, width, latent=width),)
        sliding = self._sliding_layers()
        window = config.whole("sliding_window", default=0) or None
        full = self.layers - sliding
        groups = []
        if full:
            groups.append(KvGroup(full, self.kv_heads, self.head_dim))
        if sliding:
            groups.append(KvGroup(sliding, self.kv_heads, self.head_dim, window=window))
        return tuple(groups)

    def _sliding_layers(self) -> int:
        """How many layers attend to a window only."""
        config, layers = self.config, self.layers
        used = config.values.get("use_sliding_window")
        opt_in = self.model_type in {"qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}
        if not config.whole("sliding_window", default=0) or used is False or (opt_in and not used):
            return 0
        kinds = config.items("layer_types")
        if kinds:
            return min(sum(1 for kind in kinds if kind == "sliding_attention"), layers)
        if opt_in:
            return max(0, layers - config.whole("max_window_layers", default=layers))
        if self.model_type in {"gemma2", "gpt_oss"}:
            return (layers + 1) // 2
        if self.model_type in {"gemma3", "gemma3_text"}:
            return layers - layers // max(1, config.whole("sliding_window_pattern", default=6))
        return layers


def _quantization(values: Mapping[str, Any], name: str) -> Quantization | None:
    """What ``quantization_config`` says, None if there is none or it is of no known method."""
    method = values.get("quant_method") or values.get("quant_algo")
    if not isinstance(method, str):
        return None
    method = method.lower()
    fixed = {"fp8": 8.0, "mxfp4": 4.25, "fbgemm_fp8": 8.0, "modelopt": 8.0, "modelopt_fp4": 4.5}
    if method in fixed:
        return Quantization(method, fixed[method])
    if method == "bitsandbytes":
        return Quantization(method, 4.0 if values.get("load_in_4bit") else 8.0)
    bits = values.get("bits", values.get("w_bit"))
    if method == "compressed-tensors":
        groups = values.get("config_groups")
        found = [
            group["weights"].get("num_bits")
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        ]
        bits = next((b for b in found if b), 8)
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 16:
        if bits is None:
            return Quantization(method, 4.0 if method in {"gptq", "awq"} else 8.0)
        raise CheckpointError(
            f"{name}: {bits!r} bits in its quantization_config.", "Check its config.json."
        )
    return Quantization(method, float(bits))


def _head_method(config: _Config, architecture: str) -> str | None:
    """eagle, eagle3 or medusa for a draft head, None for a model that runs by itself."""
    said = config.text("speculators_model_type").lower() or architecture.lower()
    for method in ("eagle3", "eagle", "medusa", "dflash"):
        if method in said:
            return method
    return None
