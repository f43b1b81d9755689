from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer

from specwise.errors import CheckpointError
from specwise.facts.bundled import (
    bundled_draft,
    bundled_prompts,
    bundled_target,
    padded_target,
)
from specwise.facts.checkpoint import from_folder
from specwise.facts.llama import ReferenceLlama, as_float32, load_bfloat16, load_tensors
from specwise.facts.quantise import (
    GROUP,
    Quantised,
    Scheme,
    dequantised_weights,
    pack_int4,
    quantised_checkpoint,
    round_to_nearest,
    unpack_int4,
)

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24),
    elements=st.floats(-100, 100, width=32),
)


@given(
    hnp.arrays(
        np.int8,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=30),
        elements=st.integers(-8, 7),
    )
)
def test_four_bit_numbers_survive_packing(values: np.ndarray) -> None:
    packed = pack_int4(values)
    assert packed.shape == (len(values), -(-values.shape[1] // 8))
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(unpack_int4(packed, values.shape[1]), values)


def test_the_first_number_lies_in_the_lowest_bits_with_eight_added() -> None:
    values = np.array([[-8, -7, 0, 0, 0, 0, 0, 7]], dtype=np.int8)
    assert pack_int4(values).view(np.uint32).item() == 0xF8888810
    assert pack_int4(values[:, :2]).view(np.uint32).item() == 0x10


@given(WEIGHTS, st.sampled_from([4, 8]))
@example(np.array([[6.98523e-40]], dtype=np.float32), 4)
@settings(deadline=None)
def test_no_weight_is_off_by_more_than_half_a_step(weights: np.ndarray, bits: int) -> None:
    quantised = round_to_nearest(weights, bits)
    assert quantised.values.min() >= -(2 ** (bits - 1))
    assert quantised.values.max() < 2 ** (bits - 1)
    error = np.abs(quantised.dequantised() - weights)
    # The scale of the tiniest weights is itself rounded, to a multiple of the smallest float.
    rounded = 2 ** (bits - 1) * np.finfo(np.float32).smallest_subnormal
    assert (error <= quantised.scales * 0.5 + np.abs(weights) * 1e-6 + rounded).all()


def test_each_group_of_a_row_has_its_own_scale() -> None:
    weights = np.concatenate([np.full((3, 8), 7.5), np.full((3, 8), -0.075)], axis=1)
    quantised = round_to_nearest(weights.astype(np.float32), 4, group=8)
    np.testing.assert_allclose(quantised.scales, [[1.0, 0.01]] * 3, rtol=1e-6)
    np.testing.assert_array_equal(quantised.values[0], [7] * 8 + [-8] * 8)


def test_zeros_stay_zeros_and_half_a_group_is_refused() -> None:
    zeros = round_to_nearest(np.zeros((2, 4), np.float32), 4, group=2)
    np.testing.assert_array_equal(zeros.dequantised(), np.zeros((2, 4)))
    with pytest.raises(CheckpointError, match="5 columns"):
        round_to_nearest(np.ones((2, 5), np.float32), 4, group=2)


@pytest.fixture(scope="module", params=list(Scheme))
def copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    return quantised_checkpoint(folder, bundled_target(), request.param)


def _scheme(copy: Path) -> Scheme:
    return Scheme(json.loads((copy / "quantisation.json").read_text())["scheme"])


def test_a_copy_holds_every_weight_within_half_a_step(copy: Path) -> None:
    trained = load_bfloat16(bundled_target() / "model.safetensors")
    found = dequantised_weights(copy)
    assert found.keys() == trained.keys()
    bits, group = (8, None) if _scheme(copy) is Scheme.INT8 else (4, GROUP)
    for name, stored in trained.items():
        weights = as_float32(stored)
        if name.endswith("_proj.weight"):
            assert (
                0
                < np.abs(found[name] - weights).max()
                <= 0.51 * (round_to_nearest(weights, bits, group).scales.max())
            )
        else:
            np.testing.assert_array_equal(found[name], weights)


def test_a_copy_says_what_it_is(copy: Path) -> None:
    checkpoint = from_folder(copy)
    scheme = _scheme(copy)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.method == "compressed-tensors"
    assert checkpoint.quantization.weight_bits == (8 if scheme is Scheme.INT8 else 4)
    assert checkpoint.parameters == from_folder(bundled_target()).parameters
    tensors = load_tensors(copy / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj.weight"
    if scheme is Scheme.INT8:
        assert tensors[layer].dtype == np.int8
        assert tensors[f"{layer}_scale"].shape == (384, 1)
    else:
        assert tensors[f"{layer}_packed"].shape == (384, 1024 // 8)
        assert tensors[f"{layer}_scale"].shape == (384, 1024 // GROUP)
        assert tensors[f"{layer}_shape"].tolist() == [384, 1024]
    assert (copy / "tokenizer.json").read_bytes() == (
        bundled_target() / "tokenizer.json"
    ).read_bytes()


def test_eight_bits_change_few_tokens_and_four_bits_more() -> None:
    """Share of the trained target's greedy tokens that a rounded one would have chosen too."""
    tokenizer = Tokenizer.from_file(str(bundled_target() / "tokenizer.json"))
    trained = ReferenceLlama.load(bundled_target())
    text = json.loads(bundled_prompts("prose").read_text().splitlines()[0])["messages"][0][
        "content"
    ]
    read = tokenizer.encode(f"<|user|>{text}<|assistant|>").ids
    chosen = trained.logits(read).argmax(-1)
    agrees = {}
    for bits, group in ((8, None), (4, GROUP)):
        weights = {
            name: round_to_nearest(tensor, bits, group).dequantised()
            if name.endswith("_proj.weight")
            else tensor
            for name, tensor in trained.weights.items()
        }
        rounded = ReferenceLlama(trained.config, weights).logits(read).argmax(-1)
        agrees[bits] = float((rounded == chosen).mean())
    assert agrees[8] > 0.95
    assert 0.6 < agrees[4] < agrees[8]


def test_a_copy_is_kept_and_a_torn_source_is_one_clear_error(tmp_path: Path) -> None:
    first = quantised_checkpoint(tmp_path, bundled_draft(), Scheme.INT8)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert quantised_checkpoint(tmp_path, bundled_draft(), Scheme.INT8) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(CheckpointError, match=r"not a safetensors file of bfloat16"):
        quantised_checkpoint(tmp_path, first, Scheme.INT8)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_draft_whose_width_has_no_whole_groups_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\d+ columns cannot") as raised:
        quantised_checkpoint(tmp_path, bundled_draft(), Scheme.INT4)
    assert "int8" in raised.value.next_step


def test_dequantised_is_values_times_scales() -> None:
    quantised = Quantised(np.array([[1, -2]], np.int8), np.array([[0.5, 2.0]], np.float32))
    np.testing.assert_array_equal(quantised.dequantised(), [[0.5, -4.0]])


def test_padding_and_rounding_do_not_interfere(tmp_path: Path) -> None:
    """The trained layers of the padded target round to the very weights of the trained one."""
    source = padded_target(tmp_path)
    for scheme in Scheme:
        padded = dequantised_weights(quantised_checkpoint(tmp_path, source, scheme))
        trained = dequantised_weights(quantised_checkpoint(tmp_path, bundled_target(), scheme))
        for name, weights in trained.items():
            inside = tuple(slice(size) for size in weights.shape)
            np.testing.assert_array_equal(padded[name][inside], weights)
