"""The draft/target pair that ships with specwise, its prompts, and the padded copy of its target.

The trained target has 5 million parameters: cheap to ship, too cheap to serve for speculation to
matter. :func:`padded_target` writes a copy that computes the same function at the price of a
model of about 100 (or 300) million parameters, and :func:`check_padding` proves that it is the
same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from specwise.errors import CheckpointError
from specwise.facts.llama import Bfloat16s, ReferenceLlama, load_bfloat16, save_tensors

SEGMENTS = ("json", "copy", "code", "prose")
PaddedSize = Literal["100m", "300m"]
PADDED_LAYERS = 8
_INTERMEDIATE: Mapping[PaddedSize, int] = {"100m": 10240, "300m": 32768}

_FOLDER = Path(__file__).resolve().parents[1] / "bundled"
_BLOCK_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def bundled_target() -> Path:
    """The trained target as a Hugging Face checkpoint folder: 5M parameters, not padded."""
    return _FOLDER / "target"


def bundled_draft() -> Path:
    """The draft distilled from it, as a Hugging Face checkpoint folder."""
    return _FOLDER / "draft"


def bundled_prompts(segment: str) -> Path:
    """The held-out prompts of a segment (json, copy, code or prose) as JSONL.

    One object a line: id, segment, messages, max_tokens, and source, the text it was taken from.
    """
    if segment not in SEGMENTS:
        raise CheckpointError(
            f"there is no bundled segment {segment!r}", f"Choose one of {', '.join(SEGMENTS)}."
        )
    return _FOLDER / "prompts" / f"{segment}.jsonl"


def padded_target(folder: Path, size: PaddedSize = "100m") -> Path:
    """A copy of the bundled target that costs like ``size`` parameters, inside ``folder``.

    Added blocks have a zero output projection and a zero down projection, which makes each the
    identity; the trained blocks' MLPs are widened by rows that a zero down projection ignores. So
    the function is unchanged while an engine pays for every multiplication. The copy appears
    under its final name only when it is complete, and a copy made from the same weights by the
    same recipe is kept as it is.

    Returns the checkpoint folder. Raises CheckpointError when it cannot be written.
    """
    source, intermediate = bundled_target(), _INTERMEDIATE[size]
    recipe = {"layers": PADDED_LAYERS, "intermediate": intermediate, "format": 1}
    return derived_checkpoint(
        folder,
        f"specwise-demo-target-padded-{size}",
        {"recipe": recipe, "source_sha256": file_sha256(source / "model.safetensors")},
        lambda out: _write_padded(source, out, intermediate),
        marker="padding.json",
        what="the padded target",
        room_mb=intermediate // 40,  # a quarter more than bfloat16 takes
    )


def derived_checkpoint(
    folder: Path,
    name: str,
    wanted: Mapping[str, Any],
    write: Callable[[Path], None],
    *,
    marker: str,
    what: str,
    room_mb: int,
) -> Path:
    """A checkpoint folder inside ``folder`` that ``write`` makes, whole or not at all.

    ``wanted`` says what it is made from and how: it gives the folder its name and is kept in the
    file ``marker``, so that a copy made from the same is kept as it is. Raises CheckpointError,
    about ``what`` and the ``room_mb`` it takes, when it cannot be written.
    """
    made = folder / f"{name}-{hashlib.sha256(_canonical(wanted)).hexdigest()[:12]}"
    if _marker(made / marker) == wanted:
        return made
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
        try:
            write(unfinished)
            (unfinished / marker).write_bytes(_canonical(wanted))
            shutil.rmtree(made, ignore_errors=True)
            unfinished.rename(made)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        # Another process may have finished the same copy meanwhile: then it is just as good.
        if _marker(made / marker) == wanted:
            return made
        raise CheckpointError(
            f"{what} cannot be written to {folder}: {error}",
            f"Free about {room_mb} MB there, or set SPECWISE_HOME to a folder with room.",
        ) from error
    return made


@dataclass(frozen=True, slots=True)
class PaddingCheck:
    """How the padded target compares with the trained one on some prompts."""

    prompts: int
    tokens: int
    first_difference: tuple[int, int] | None
    """Prompt index and token index where greedy outputs part, None when they never do."""
    largest_logit_difference: float

    @property
    def same(self) -> bool:
        """Whether every greedy token is the same."""
        return self.first_difference is None


def check_padding(padded: Path, *, prompts: int = 4, max_tokens: int = 16) -> PaddingCheck:
    """Compare greedy outputs of the padded and the trained target, in float32 and without vLLM.

    The trained target generates; the padded one then reads prompt and output once. Where its most
    likely next token is the generated one at every position, its own greedy output is the same, by
    induction over positions. Prompts are taken from all four segments in turn.
    """
    trained, widened = ReferenceLlama.load(bundled_target()), ReferenceLlama.load(padded)
    compared, largest, parted = 0, 0.0, None
    for index, prompt in enumerate(_prompt_tokens(prompts)):
        output = trained.greedy(prompt, max_tokens)
        read, scored = [*prompt, *output[:-1]], slice(len(prompt) - 1, None)
        expected, found = trained.logits(read)[scored], widened.logits(read)[scored]
        largest = max(largest, float(abs(expected - found).max()))
        compared += len(output)
        if parted is None:
            position = common_prefix(output, found.argmax(-1).tolist())
            parted = (index, position) if position < len(output) else None
    return PaddingCheck(prompts, compared, parted, largest)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two outputs share before they part (or before the shorter one ends)."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _prompt_tokens(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(bundled_target() / "tokenizer.json"))
    lines = [bundled_prompts(s).read_text(encoding="utf-8").splitlines() for s in SEGMENTS]
    chosen = [lines[i % len(lines)][i // len(lines)] for i in range(count)]
    contents = [json.loads(line)["messages"][0]["content"] for line in chosen]
    return [tokenizer.encode(f"<|user|>{text}<|assistant|>").ids for text in contents]


def _write_padded(source: Path, out: Path, intermediate: int) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    trained_layers = config["num_hidden_layers"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, out / name)
    config |= {
        "num_hidden_layers": PADDED_LAYERS,
        "intermediate_size": intermediate,
        "specwise_padded": (
            f"{trained_layers} trained layers; the other layers and the MLP columns beyond "
            f"{config['intermediate_size']} add cost and change nothing"
        ),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    trained = load_bfloat16(source / "model.safetensors")
    padded = {k: v for k, v in trained.items() if not k.startswith("model.layers.")}
    for layer in range(PADDED_LAYERS):
        origin = f"model.layers.{layer % trained_layers}."
        for name, tensor in trained.items():
            if name.startswith(origin):
                part = name.removeprefix(origin)
                is_identity = layer >= trained_layers and part in _BLOCK_OUTPUTS
                kept = np.zeros_like(tensor) if is_identity else tensor
                padded[f"model.layers.{layer}.{part}"] = _widened(part, kept, intermediate)
    save_tensors(out / "model.safetensors", padded)


def _widened(part: str, tensor: Bfloat16s, intermediate: int) -> Bfloat16s:
    """An MLP matrix at the padded width; the added part of the down projection is zero."""
    if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        return np.resize(tensor, (intermediate, tensor.shape[1]))
    if part == "mlp.down_proj.weight":
        return np.pad(tensor, ((0, 0), (0, intermediate - tensor.shape[1])))
    return tensor


def _marker(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def file_sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal; CheckpointError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"the weights of a bundled checkpoint are missing: {error}", "Reinstall specwise."
        ) from error
