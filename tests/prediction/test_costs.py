from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from benchmarks.prediction_published import (
    batch_series,
    blog,
    errors,
    k_sweep,
    read_points,
    reproduce,
)
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Gpu, Quantization, Speculation
from specwise.errors import InputError
from specwise.facts.checkpoint import from_table
from specwise.facts.hardware import find_gpu, gpus
from specwise.prediction.costs import (
    RooflineCosts,
    StepShape,
    eagle_head,
    graph_tokens,
    model_of,
    roofline,
)
from specwise.prediction.speedup import Point, best_k, step_speedup

LLAMA_8B = from_table("meta-llama/Llama-3.1-8B-Instruct")
LLAMA_70B = from_table("meta-llama/Llama-3.1-70B-Instruct")
QWEN_MOE = from_table("Qwen/Qwen3-30B-A3B")
H100 = find_gpu("h100")
EAGLE3 = Speculation("eagle3", 3)

BATCHES = st.integers(1, 512)
CONTEXTS = st.integers(0, 30_000)


def costs(speculation: Speculation | None = None, gpu: Gpu = H100, **more: object) -> RooflineCosts:
    return roofline(LLAMA_8B, gpu, speculation=speculation, **more)  # type: ignore[arg-type]


def test_one_token_reads_the_weights_once() -> None:
    """Llama-3.1-8B on an H100 in BF16: 15 GB at about four fifths of 3.35 TB/s, plus the host."""
    model = model_of(LLAMA_8B)
    assert model.body + model.head == pytest.approx(LLAMA_8B.parameters - 128_256 * 4096)
    step_s = Point(1, 100).step_s(costs(version=(0, 9, 0)), None)
    assert step_s == pytest.approx(7.07e-3, rel=0.05)  # issue 20780's baseline


def test_many_tokens_are_bound_by_compute() -> None:
    tokens = 100_000
    found = costs().target_s(tokens, 0, 1)
    model = model_of(LLAMA_8B)
    products = 2 * (model.body + model.head) * tokens
    assert found == pytest.approx(products / (0.81 * 989e12), rel=0.01)


@given(BATCHES, CONTEXTS)
def test_more_of_anything_never_costs_less(batch: int, context: int) -> None:
    for speculation in (None, EAGLE3, Speculation("ngram", 3)):
        price = costs(speculation)
        k = 3 if speculation else 0
        shape = StepShape(batch * (1 + k), batch * context, batch, k)
        here = price.step_s(shape)
        assert here > 0
        for field, more in (("tokens", 10), ("context_tokens", 1000), ("requests", 1), ("k", 1)):
            assert (
                price.step_s(dataclasses.replace(shape, **{field: getattr(shape, field) + more}))
                >= here
            )
        faster = dataclasses.replace(H100, bandwidth_bytes_per_s=2 * H100.bandwidth_bytes_per_s)
        assert costs(speculation, faster).step_s(shape) <= here


@given(st.floats(0.3, 0.95), CONTEXTS.filter(lambda c: c < 2000))
def test_speedup_does_not_rise_with_batch_for_a_dense_model_and_short_contexts(
    alpha: float, context: int
) -> None:
    speedups = [
        step_speedup(costs(EAGLE3), costs(), at=Point(batch, context), conditional=[alpha] * 3)
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]
    # The host's share shrinks as the batch grows, which may lift it by less than it ever matters.
    assert all(after <= before * 1.01 for before, after in pairwise(speedups))


def test_with_long_contexts_speculation_pays_again_at_large_batches() -> None:
    """MagicDec: reading the cache is shared by all tokens of a verify step."""
    speedups = {
        context: [
            step_speedup(costs(EAGLE3), costs(), at=Point(b, context), conditional=[0.7] * 3)
            for b in (64, 256)
        ]
        for context in (200, 16_000)
    }
    assert speedups[200][1] < speedups[200][0]
    assert speedups[16_000][1] > speedups[200][1] * 1.3
    assert speedups[16_000][1] > 1.5


@given(st.floats(0.3, 0.95))
def test_the_best_k_does_not_rise_with_batch(alpha: float) -> None:
    best = [
        best_k(costs(EAGLE3), costs(), at=Point(batch, 300), conditional=lambda _i: alpha)[0]
        for batch in (1, 8, 32, 64, 128, 256)
    ]
    assert best == sorted(best, reverse=True)


def test_arrays_are_priced_like_their_elements() -> None:
    price = costs(EAGLE3)
    tokens, context, requests = (
        np.array([4, 64, 8192]),
        np.array([10, 9000, 0]),
        np.array([1, 16, 3]),
    )
    together = price.step_s(StepShape(tokens, context, requests, np.array([3, 3, 0])))
    alone = [
        price.step_s(StepShape(*shape))
        for shape in zip(
            tokens.tolist(), context.tolist(), requests.tolist(), (3, 3, 0), strict=True
        )
    ]
    assert together == pytest.approx(alone)


def test_tensor_parallelism_splits_work_and_adds_messages() -> None:
    one, four = (roofline(LLAMA_70B, H100, tensor_parallel=n) for n in (1, 4))
    assert four.target_s(1, 0, 1) > one.target_s(1, 0, 1) / 4
    assert four.target_s(1, 0, 1) < one.target_s(1, 0, 1) / 2
    slow_link = dataclasses.replace(H100, link_bytes_per_s=32e9)
    slow = roofline(LLAMA_70B, slow_link, tensor_parallel=4)
    assert slow.target_s(512, 0, 512) > 1.3 * four.target_s(512, 0, 512)


def test_a_mixture_of_experts_reads_more_of_them_as_tokens_grow() -> None:
    """E (1 - (1 - K/E)^t) distinct experts; one token reads the active parameters."""
    model = model_of(QWEN_MOE)
    table = QWEN_MOE.vocab_size * QWEN_MOE.hidden_size
    assert model.read_parameters(1) == pytest.approx(QWEN_MOE.active_parameters - table, rel=1e-6)
    assert model.read_parameters(10**6) == pytest.approx(QWEN_MOE.parameters - table)
    read = [model.read_parameters(t) for t in (1, 2, 4, 64)]
    assert read == sorted(read)
    assert model.active_body + model.head == pytest.approx(QWEN_MOE.active_parameters - table)


def test_a_sliding_window_bounds_what_is_read() -> None:
    groups = (dataclasses.replace(LLAMA_8B.kv_groups[0], window=128),)
    model = dataclasses.replace(model_of(LLAMA_8B), kv_groups=groups)
    assert model.kv_bytes(10 * 5000, 10, 1) == model.kv_bytes(10 * 128, 10, 1)


def test_quantised_weights_are_read_faster() -> None:
    int4 = dataclasses.replace(LLAMA_8B, quantization=Quantization("awq", 4))
    fp8 = dataclasses.replace(LLAMA_8B, quantization=Quantization("fp8", 8))
    times = [roofline(c, H100).target_s(1, 0, 1) for c in (LLAMA_8B, fp8, int4)]
    assert times[0] == pytest.approx(2 * times[1], rel=0.05)
    assert times[0] == pytest.approx(4 * times[2], rel=0.05)
    # At many tokens 8 bits multiply twice as fast, 4-bit weights are multiplied in 16.
    many = [roofline(c, H100).target_s(16_384, 0, 1) for c in (LLAMA_8B, fp8, int4)]
    assert many[0] == pytest.approx(2 * many[1], rel=0.05)
    assert many[2] == pytest.approx(many[0], rel=0.05)


def test_an_eagle_3_head_is_small_and_has_its_own_vocabulary() -> None:
    """yuhuili/EAGLE3-LLaMA3.1-Instruct-8B is 0.85 GB; EAGLE uses the target's output matrix."""
    head = eagle_head(LLAMA_8B, draft_vocabulary=32_000)
    assert 2 * (head.body + head.head) == pytest.approx(0.85e9, rel=0.1)
    assert eagle_head(LLAMA_8B).head == model_of(LLAMA_8B).head


def test_k_of_zero_still_runs_the_first_pass() -> None:
    price = costs(EAGLE3)
    assert price.draft_s(16, 0, 16, 0) > 0
    assert price.draft_s(16, 0, 16, 0) == price.draft_s(16, 0, 16, 1)
    assert costs(Speculation("ngram", 3)).draft_s(16, 0, 16, 0) == 0
    assert costs().draft_s(16, 0, 16, 3) == 0


def test_a_draft_model_needs_its_checkpoint() -> None:
    with pytest.raises(InputError, match="needs its checkpoint"):
        costs(Speculation("draft_model", 3))


def test_every_known_gpu_has_a_price() -> None:
    for gpu in gpus().values():
        assert 0 < costs(EAGLE3, gpu).step_s(StepShape(4, 100, 1, 3)) < 1


def test_the_published_speedups_are_reproduced() -> None:
    """Issue's bar: 4 % mean, 12 % at most, acceptance never from the points that are judged."""
    for traces in (True, False):
        mean, largest = errors(list(reproduce(batch_series(), given=traces)))
        assert mean <= 0.025
        assert largest <= 0.10


def test_the_sweep_over_k_is_reproduced() -> None:
    sweep = k_sweep()
    assert all(abs(predicted / tpot - 1) <= 0.05 for _, tpot, predicted in sweep)
    assert min(sweep, key=lambda row: row[1])[0] == min(sweep, key=lambda row: row[2])[0] == 4


def test_the_blogs_crossovers_are_in_their_brackets() -> None:
    for ladder in blog():
        assert ladder.bracket(ladder.predicted) == ladder.bracket(ladder.published)


@given(st.integers(1, 600))
def test_a_step_is_padded_to_the_next_cuda_graph(tokens: int) -> None:
    captured = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    expected = next((size for size in captured if size >= tokens), tokens)
    assert graph_tokens(tokens, 512) == expected
    assert graph_tokens(np.array([tokens]), 512)[0] == expected


def test_a_small_draft_is_bound_by_its_launches() -> None:
    """SpecDecode-Bench: 37.5 % of an 8B target's pass for 0.6B, 12.5 % of 70B's for 8B."""
    for target, draft, split, published in (
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", 1, 0.375),
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", 4, 0.125),
    ):
        price = roofline(
            from_table(target),
            H100,
            tensor_parallel=split,
            speculation=Speculation("draft_model", 3),
            draft=from_table(draft),
            version=(0, 10, 1),
        )
        one_more = price.draft_s(4, 300, 1, 3) - price.draft_s(4, 300, 1, 2)
        assert one_more / price.target_s(4, 300, 1) == pytest.approx(published, abs=0.07)


def test_points_from_a_file_are_judged_by_the_same_code(tmp_path: Path) -> None:
    """Another target, an unknown data set, and a batch whose contexts exceed the KV cache."""
    points = [
        {"target": "Qwen3-8B", "method": m, "k": 3, "dataset": d, "batch": b, "speedup": v}
        for m, d in (("draft", "GSM8K"), ("EAGLE3", "long"), ("ngram", "unknown"))
        for b, v in ((1, 1.3), (128, 1.0))
    ]
    table = {
        "about": {"hardware": {"Qwen3-8B": "1x H100-80GB"}},
        "workloads": {"long": {"prompt_tokens": 200, "output_tokens": 30_000}},
        "points": points,
    }
    path = tmp_path / "points.json"
    path.write_text(json.dumps(table))
    found = list(reproduce(read_points(path)))
    assert len(found) == 6
    assert all(p.error == pytest.approx(0, abs=1e-3) for p in found if p.batch == 1)
    by_method = {p.series.method: p.predicted for p in found if p.batch == 128}
    assert by_method["draft_model"] < 1.2
    assert by_method["eagle3"] > 1.2  # bound by the cache, not by compute
