"""Before/after on real servers: quantised targets that vLLM runs as such (req: D1, D2)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.real_vllm.side_by_side import started
from tokenizers import Tokenizer

from specwise.analysis.before_after import compare_studies
from specwise.cli.main import main
from specwise.domain import Deployment, Speculation
from specwise.facts.bundled import bundled_draft, bundled_prompts, bundled_target
from specwise.facts.llama import ReferenceLlama, as_float32, load_bfloat16, save_tensors
from specwise.facts.quantise import (
    Scheme,
    dequantised_weights,
    quantised_checkpoint,
    round_to_nearest,
)
from specwise.measurement.store import read_study
from specwise.vllm.server import Server

STUDY = """
name = "{name}"
seed = 3
[[arm]]
name = "baseline"
url = "{baseline}"
[[arm]]
name = "spec"
url = "{spec}"
speculation = {{ method = "draft_model", k = 3, draft = "{draft}" }}
[[segment]]
name = "json"
prompts = "bundled:json"
max_tokens = 32
[load]
concurrency = [8]
requests = [40]
repeats = 2
noise_floor = false
warmup = 2
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[Scheme, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {s: quantised_checkpoint(folder, bundled_target(), s) for s in Scheme}


@pytest.fixture(scope="module")
def spoilt_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft with its linear layers rounded to two bits: a change that must cost acceptance."""
    folder = tmp_path_factory.mktemp("draft") / "two-bit"
    shutil.copytree(bundled_draft(), folder)
    tensors = load_bfloat16(folder / "model.safetensors")
    for name, bits in tensors.items():
        if name.endswith("_proj.weight"):
            rounded = round_to_nearest(as_float32(bits), 2).dequantised()
            tensors[name] = (rounded.view(np.uint32) >> 16).astype(np.uint16)
    save_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def quantised_servers(
    deployment: Deployment,
    drafting: Speculation,
    copies: dict[Scheme, Path],
    spoilt_draft: Path,
    logs: Path,
) -> Iterator[dict[Scheme, Server]]:
    """int8 with the draft, 4-bit with the spoilt one."""
    drafts = {Scheme.INT8: drafting, Scheme.INT4: replace(drafting, draft=str(spoilt_draft))}
    wanted = {
        str(scheme): (replace(deployment, model=str(copies[scheme])), draft)
        for scheme, draft in drafts.items()
    }
    with started(logs, **wanted) as servers:
        yield dict(zip(drafts, servers, strict=True))


def test_compressed_tensors_reads_the_same_weights(
    engine_python: Path, copies: dict[Scheme, Path], tmp_path: Path
) -> None:
    """The library that defines the format decompresses a layer to what is meant here."""
    code = """
import json, sys
import numpy as np
from safetensors.torch import load_file
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
folder, out, layer = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))["quantization_config"]
scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
stored = load_file(f"{folder}/model.safetensors")
names = {n.removeprefix(layer + "."): t for n, t in stored.items() if n.startswith(layer + ".")}
np.save(out, PackedQuantizationCompressor.decompress(names, scheme)["weight"].float().numpy())
"""
    layer = "model.layers.1.mlp.down_proj"
    out = tmp_path / "weights.npy"
    subprocess.run(
        [engine_python, "-c", code, copies[Scheme.INT4], out, layer], check=True, timeout=120
    )
    expected = dequantised_weights(copies[Scheme.INT4])[f"{layer}.weight"]
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-6)


def test_vllm_runs_quantised_layers(quantised_servers: dict[Scheme, Server], logs: Path) -> None:
    assert quantised_servers.keys() == set(Scheme)
    said = {scheme: (logs / f"{scheme}.log").read_text() for scheme in Scheme}
    assert "quantization=compressed-tensors" in said[Scheme.INT8]
    assert "Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8" in said[Scheme.INT8]
    assert "Using CPUWNA16LinearKernel for CompressedTensorsWNA16" in said[Scheme.INT4]
    assert "specwise repair 'int4' applied" in said[Scheme.INT4]


@pytest.mark.parametrize(("scheme", "least"), [(Scheme.INT8, 0.9), (Scheme.INT4, 0.98)])
def test_greedy_outputs_are_those_of_the_quantised_weights(
    quantised_servers: dict[Scheme, Server],
    copies: dict[Scheme, Path],
    scheme: Scheme,
    least: float,
) -> None:
    """W4A16 leaves activations alone, so numpy chooses its tokens; W8A8 rounds them as well."""
    tokenizer = Tokenizer.from_file(str(bundled_target() / "tokenizer.json"))
    config = json.loads((copies[scheme] / "config.json").read_text())
    reference = ReferenceLlama(config, dequantised_weights(copies[scheme]))
    server = quantised_servers[scheme]
    agrees = []
    for line in bundled_prompts("json").read_text().splitlines()[:4]:
        prompt = f"<|user|>{json.loads(line)['messages'][0]['content']}<|assistant|>"
        body = {"model": server.model, "prompt": prompt, "max_tokens": 24, "temperature": 0}
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json=body | {"return_token_ids": True},
            timeout=120,
            trust_env=False,
        ).json()
        written = answer["choices"][0]["token_ids"]
        read = tokenizer.encode(prompt).ids
        chosen = reference.logits([*read, *written[:-1]])[len(read) - 1 :].argmax(-1)
        agrees += (chosen == written).tolist()
    assert len(agrees) > 80
    assert np.mean(agrees) >= least


@pytest.fixture
def sides(
    drafting_server: Server, quantised_servers: dict[Scheme, Server], spoilt_draft: Path
) -> dict[str, tuple[Server, Path]]:
    """The speculating server and its draft, by the name of a study."""
    return {
        "float": (drafting_server, bundled_draft()),
        "int8": (quantised_servers[Scheme.INT8], bundled_draft()),
        "spoilt": (quantised_servers[Scheme.INT4], spoilt_draft),
    }


def test_before_and_after(
    baseline_server: Server,
    sides: dict[str, tuple[Server, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """int8 keeps acceptance; a draft that lost its precision does not, and that is certain."""
    for name, (server, draft) in sides.items():
        text = STUDY.format(name=name, baseline=baseline_server.url, spec=server.url, draft=draft)
        (tmp_path / f"{name}.toml").write_text(text)
        with pytest.raises(SystemExit) as done:
            main(["measure", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name)])
        assert done.value.code == 0
    capsys.readouterr()

    studies = {name: read_study(tmp_path / name) for name in sides}
    (held,) = compare_studies(studies["float"], studies["int8"]).acceptance
    assert held.verdict != "fell"
    assert held.paired
    assert held.units >= 70
    assert abs(held.estimate.difference) < 0.05
    same, of = held.same_outputs or (0, 1)
    assert same > of / 2  # near the float outputs, but a rounded model of its own
    assert same < of

    with pytest.raises(SystemExit) as left:
        main(["compare", str(tmp_path / "float"), str(tmp_path / "spoilt"), "--json"])
    assert left.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["outcome"] == "fell"
    (fell,) = found["acceptance"]
    assert fell["source"] == "per_request"
    assert fell["estimate"]["high"] < -0.05
    assert {d["what"] for d in found["differences"]} == {"draft"}
    assert found["controls"] == ["baseline"]
    assert (tmp_path / "spoilt" / "compare.html").exists()
