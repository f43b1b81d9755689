"""Checkpoints from metadata: published parameter counts and KV bytes are the oracles. req: A1"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.errors import CheckpointError
from specwise.facts import checkpoint as facts

BILLIONS_AND_KV_BYTES = {  # parameters in billions, KV bytes per token in BF16
    "Llama-3.2-1B": (1.236, 32_768),
    "Llama-3.2-3B": (3.213, 114_688),
    "Llama-3.1-8B": (8.030, 131_072),
    "Llama-3.1-70B": (70.554, 327_680),
    "Llama-3.3-70B": (70.554, 327_680),
    "Llama-3.1-405B": (405.85, 516_096),
    "Qwen2.5-0.5B": (0.494, 12_288),
    "Qwen2.5-1.5B": (1.544, 28_672),
    "Qwen2.5-3B": (3.086, 36_864),
    "Qwen2.5-7B": (7.616, 57_344),
    "Qwen2.5-14B": (14.77, 196_608),
    "Qwen2.5-32B": (32.76, 262_144),
    "Qwen2.5-72B": (72.71, 327_680),
    "Qwen3-0.6B": (0.596, 114_688),
    "Qwen3-1.7B": (1.721, 114_688),
    "Qwen3-4B": (4.022, 147_456),
    "Qwen3-8B": (8.191, 147_456),
    "Qwen3-14B": (14.77, 163_840),
    "Qwen3-32B": (32.76, 262_144),
    "Qwen3-30B-A3B": (30.53, 98_304),
    "Qwen3-235B-A22B": (235.1, 192_512),
    "Mistral-7B-v0.3": (7.248, 131_072),
    "Mixtral-8x7B": (46.70, 131_072),
    "DeepSeek-V3": (671.0, 70_272),
    "gpt-oss-20b": (20.91, 49_152),
    "gpt-oss-120b": (116.8, 73_728),
}


@pytest.mark.parametrize("name", BILLIONS_AND_KV_BYTES)
def test_known_models(name: str) -> None:
    known = name if name != "Mixtral-8x7B" else "Mixtral-8x7B-Instruct-v0.1"
    known = known if name != "Mistral-7B-v0.3" else "Mistral-7B-Instruct-v0.3"
    model = facts.load_checkpoint(known)
    billions, kv_bytes = BILLIONS_AND_KV_BYTES[name]
    assert model.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert model.kv_elements_per_token * 2 == kv_bytes
    assert model.active_parameters <= model.parameters


@pytest.mark.parametrize(("name", "published"), facts.published_parameters().items())
def test_the_formulas_give_the_published_counts_exactly(name: str, published: int) -> None:
    assert facts.from_table(name).parameters == published


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 3.35), ("qwen3-235b-a22b", 22.2), ("mixtral-8x7b-instruct-v0.1", 12.9)],
)
def test_active_parameters_of_experts(name: str, billions: float) -> None:
    assert facts.load_checkpoint(name).active_parameters / 1e9 == pytest.approx(billions, abs=0.06)


def test_special_shapes() -> None:
    deepseek = facts.load_checkpoint("deepseek-v3")
    assert deepseek.kv_groups[0].latent == 576
    assert deepseek.mtp_layers == 1
    assert deepseek.quantization is not None
    assert deepseek.quantization.method == "fp8"
    windows = [(g.layers, g.window) for g in facts.load_checkpoint("gpt-oss-20b").kv_groups]
    assert windows == [(12, None), (12, 128)]


BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def read(**changes: Any) -> Any:
    return facts.from_config(BASE | changes, "test", "test")


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8}, [(4, 8)]),
        ({"model_type": "qwen2", "sliding_window": 8}, [(4, None)]),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
             "max_window_layers": 3},
            [(3, None), (1, 8)],
        ),
        ({"model_type": "gemma2", "sliding_window": 8}, [(2, None), (2, 8)]),
        (
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2},
            [(2, None), (2, 8)],
        ),
        (
            {"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
            [(1, None), (3, 8)],
        ),
    ],
)  # fmt: skip
def test_sliding_windows(changes: dict[str, Any], windows: list[Any]) -> None:
    assert [(g.layers, g.window) for g in read(**changes).kv_groups] == windows


@pytest.mark.parametrize(
    ("config", "method", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", 4),
        ({"quant_method": "awq", "w_bit": 4}, "awq", 4),
        ({"quant_method": "fp8"}, "fp8", 8),
        ({"quant_method": "mxfp4"}, "mxfp4", 4.25),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            "compressed-tensors",
            4,
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4),
    ],
)  # fmt: skip
def test_quantization(config: dict[str, Any], method: str, bits: float) -> None:
    found = read(quantization_config=config).quantization
    assert (found.method, found.weight_bits) == (method, bits)


def test_unknown_architectures_are_counted_and_say_so() -> None:
    model = read(model_type="brandnew")
    assert model.parameters == read().parameters
    assert "brandnew" in model.notes[0]


def test_text_part_of_a_multimodal_model() -> None:
    model = facts.from_config({"architectures": ["X"], "text_config": BASE}, "test", "test")
    assert model.parameters == read().parameters
    assert any("language model" in note for note in model.notes)


def test_heads_are_recognised() -> None:
    assert read(architectures=["LlamaForCausalLMEagle3"]).head_method == "eagle3"
    assert read(speculators_model_type="eagle3").head_method == "eagle3"
    assert read().head_method is None


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file with a header and no data: nobody may read past the header."""
    header = {n: {"dtype": d, "shape": s, "data_offsets": [0, 0]} for n, (d, s) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def folder(root: Path, tensors: dict[str, tuple[str, list[int]]], **changes: Any) -> Path:
    (root / "config.json").write_text(json.dumps(BASE | changes))
    write_safetensors(root / "model.safetensors", tensors)
    return root


def test_headers_are_counted(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("BF16", [100, 64]),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [8]),
        "lm_head.weight": ("BF16", [100, 64]),
    }
    model = facts.load_checkpoint(str(folder(tmp_path, tensors)))
    assert (model.parameters, model.parameters_from) == (12_800, "safetensors")
    assert model.weight_bytes == 2 * 12_800 + 32
    tied = facts.load_checkpoint(str(folder(tmp_path, tensors, tie_word_embeddings=True)))
    assert tied.parameters == 6_400


@pytest.mark.parametrize(
    ("tensors", "quantization"),
    [
        ({"w.qweight": ("I32", [8, 64]), "w.scales": ("F16", [1, 64]), "w.qzeros": ("I32", [1, 8])},
         {"quant_method": "gptq", "bits": 4}),
        ({"w.weight_packed": ("I32", [64, 8]), "w.weight_scale": ("BF16", [64, 1]),
          "w.weight_shape": ("I64", [2])},
         {"quant_method": "compressed-tensors",
          "config_groups": {"g": {"weights": {"num_bits": 4}}}}),
        ({"w_blocks": ("U8", [64, 32]), "w_scales": ("U8", [64, 2])}, {"quant_method": "mxfp4"}),
        ({"w.weight": ("F8_E4M3", [64, 64]), "w.weight_scale_inv": ("F32", [1, 1])},
         {"quant_method": "fp8"}),
    ],
)  # fmt: skip
def test_packed_weights_count_as_what_they_hold(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], quantization: dict[str, Any]
) -> None:
    model = facts.load_checkpoint(str(folder(tmp_path, tensors, quantization_config=quantization)))
    assert model.parameters == 4096


def test_damaged_safetensors(tmp_path: Path) -> None:
    folder(tmp_path, {})
    for content in (b"", b"\x01\x00\x00", struct.pack("<Q", 50) + b"{", struct.pack("<Q", 2**40)):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError):
            facts.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hidden_size": 64}', '{"hidden_size": -1}'])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        facts.load_checkpoint(str(tmp_path))
    assert error.value.next_step


def test_a_name_that_is_nothing() -> None:
    with pytest.raises(CheckpointError, match="built-in"):
        facts.load_checkpoint("llama-9-1T")


def test_the_hub_offline_names_the_alternatives(tmp_path: Path) -> None:
    code = "from specwise.facts.checkpoint import load_checkpoint as l; l('nobody/nothing-8b')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
    )
    assert "CheckpointError" in done.stderr
    assert "local folder" in done.stderr
    assert "qwen3-8b" in done.stderr


def test_a_hub_id_reads_metadata_and_tokenizer_but_no_weights(tmp_path: Path) -> None:
    """Against a server that speaks the hub's protocol on a real socket."""
    served = tmp_path / "served"
    served.mkdir()
    folder(served, {"lm_head.weight": ("BF16", [100, 64])})
    with (served / "model.safetensors").open("ab") as stream:
        stream.truncate(50_000_000)  # weights nobody may ask for
    (served / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with _hub(served) as (url, sent):
        code = (
            "from specwise.facts.checkpoint import load_checkpoint as l; from pathlib import Path;"
            "c = l('someone/model'); print(c.parameters, c.parameters_from);"
            "print((Path(c.folder) / 'tokenizer.json').is_file())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "PATH": ""},
        )
    assert done.stdout.split() == ["6400", "safetensors", "True"], done.stderr
    assert sum(sent) < 1_000_000


@contextmanager
def _hub(served: Path) -> Iterator[tuple[str, list[int]]]:
    """A hub that serves one repository; yields its address and the sizes of the bodies it sent."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = served / self.path.split("?")[0].rsplit("/", 1)[-1]
            content = path.read_bytes() if "/resolve/" in self.path and path.is_file() else None
            wanted = self.headers.get("Range")
            part = content or b""
            if content is not None and wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last) + 1]
            self.send_response(404 if content is None else 206 if wanted else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if content is not None and wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body:
                sent.append(len(part))
                self.wfile.write(part)

        def log_message(self, *args: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


def test_no_hub_library_is_loaded_for_local_metadata() -> None:
    code = (
        "import sys; from specwise.facts.checkpoint import load_checkpoint as l; l('qwen3-8b'); "
        "assert not {'huggingface_hub', 'tokenizers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


_VALUE = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.floats() | st.just([])


@given(
    st.dictionaries(
        st.sampled_from(
            [*BASE, "head_dim", "kv_lora_rank", "num_experts", "sliding_window", "layer_types",
             "quantization_config", "text_config", "first_k_dense_replace", "qk_rope_head_dim",
             "decoder_sparse_step", "moe_intermediate_size"]
        ),
        _VALUE
        | st.integers(0, 300)
        | st.dictionaries(st.sampled_from(["bits", "quant_method"]), _VALUE),
    )
)  # fmt: skip
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        model = read(**changes)
    except CheckpointError as error:
        assert error.next_step  # noqa: PT017 (most inputs do not raise)
    else:
        assert model.parameters >= 0
