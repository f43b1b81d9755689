"""Memory: the article's figures, vLLM's arithmetic, and what the two say of a draft."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import KvGroup
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import GIB, find_gpu, gpus
from specwise.planning import memory as m
from specwise.vllm.command import Version, read_command

TARGET, DRAFT = load_checkpoint("llama-3.1-70b"), load_checkpoint("llama-3.1-8b")
PLAN = m.ServingPlan(TARGET, find_gpu("h100"), 4, DRAFT, 4)


# --------------------------------------------------------------------- the article's arithmetic


@pytest.mark.parametrize(
    ("billions", "precision", "gigabytes"),
    [(70, "bf16", 140), (70, "int8", 70), (70, "int4", 35),
     (8, "bf16", 16), (8, "int8", 8), (8, "int4", 4)],
)  # fmt: skip
def test_weights(billions: float, precision: str, gigabytes: float) -> None:
    """req: C1"""
    row = m.simple_fit(billions, 0, total_gb=1000, mixes=[(precision, "bf16")])[0]
    assert row.target_gb == gigabytes


@pytest.mark.parametrize(
    ("total", "mix", "weights", "left", "verdict"),
    [
        (160, ("bf16", "bf16"), 156, 4, "unusable"),
        (160, ("int8", "bf16"), 86, 74, "recommended"),
        (160, ("int8", "int8"), 78, 82, "fits"),
        (160, ("int4", "bf16"), 51, 109, "fits"),
        (160, ("int4", "int4"), 39, 121, "fits"),
        (282, ("bf16", "bf16"), 156, 126, "recommended"),
    ],
)
def test_fit_table(
    total: float, mix: tuple[str, str], weights: float, left: float, verdict: str
) -> None:
    """req: C4"""
    rows = m.simple_fit(70, 8, total_gb=total)
    row = next(r for r in rows if (r.target_precision, r.draft_precision) == mix)
    assert (row.weights_gb, row.left_gb, row.verdict) == (weights, left, verdict)


def test_two_h200_keep_1_7_times_the_cache_of_the_recommended_h100_mix() -> None:
    """req: C4"""
    h100 = m.simple_fit(70, 8, total_gb=160)[1]
    h200 = m.simple_fit(70, 8, total_gb=282)[0]
    assert h200.left_gb / h100.left_gb == pytest.approx(1.7, abs=0.05)


def test_kv_budget_and_the_drafts_bytes_one_for_one() -> None:
    """req: C2"""
    row = m.simple_fit(70, 8, total_gb=160)[1]
    assert row.kv_budget_gb == pytest.approx(160 * 0.9 - 70 - 16)
    alone = m.simple_fit(70, 0, total_gb=160)[1]
    assert alone.kv_budget_gb - row.kv_budget_gb == pytest.approx(row.draft_gb)


def test_imbalance_of_draft_tp_one() -> None:
    """req: C6"""
    with_draft, without = m.simple_imbalance(16, 2, 160, 70)
    assert without - with_draft == 16
    assert (with_draft, without) == (29, 45)


def test_nominal_sizes() -> None:
    assert m.nominal_billions(TARGET) == 70
    assert m.nominal_billions(DRAFT) == 8
    assert m.nominal_billions(load_checkpoint("qwen3-30b-a3b")) == 30
    unnamed = replace(DRAFT, name="/models/current")
    assert m.nominal_billions(unnamed) == pytest.approx(8.03, abs=0.01)


def test_rules_of_seventy_and_fifteen_per_cent() -> None:
    """req: C5, I2"""
    two = replace(PLAN, gpus=2, draft_tensor_parallel=2)
    shares = {r.name: (r.value, r.holds) for r in m.memory_rules(two)}
    assert shares["target-share"] == (pytest.approx(0.88, abs=0.01), False)
    assert shares["draft-share"] == (pytest.approx(0.10, abs=0.01), True)
    int8 = {r.name: r.holds for r in m.memory_rules(replace(two, target_precision="int8"))}
    assert int8 == {"target-share": True, "draft-share": True}
    replicated = {r.name: r.value for r in m.memory_rules(replace(two, draft_tensor_parallel=1))}
    assert replicated["draft-share"] == pytest.approx(0.20, abs=0.01)


# ------------------------------------------------------------------------------- the KV cache


def test_bytes_per_token_on_each_rank() -> None:
    """KV heads below the split are replicated; MLA's latent is never split."""
    model = m.CachedModel(TARGET.kv_groups)
    assert m.kv_bytes_per_token(model) == 327_680
    assert m.kv_bytes_per_token(replace(model, tensor_parallel=8)) == 40_960
    assert m.kv_bytes_per_token(replace(model, tensor_parallel=16)) == 40_960
    assert m.kv_bytes_per_token(replace(model, bits=8)) == 163_840
    mla = m.CachedModel(load_checkpoint("deepseek-v3").kv_groups, tensor_parallel=8)
    assert m.kv_bytes_per_token(mla) == 70_272


def test_measured_pools() -> None:
    """The server's log of a 336M model at 1 GiB: 10,880 tokens alone, 9,984 with a 36M draft.

    98,304 and 8,192 bytes a token reproduce both to the block.
    """
    target = m.CachedModel((KvGroup(24, 8, 128),))
    draft = m.CachedModel((KvGroup(4, 4, 128),))
    alone = m.kv_capacity([target], pool_bytes=GIB, max_model_len=2048, block_tokens=128)
    both = m.kv_capacity([target, draft], pool_bytes=GIB, max_model_len=2048, block_tokens=128)
    assert alone.tokens == alone.blocks * 128 == 10_880
    assert both.tokens == 10_032 // 128 * 128 == 9_984


def test_windows_need_less_for_a_long_request() -> None:
    """gpt-oss-20b: half the layers keep 128 tokens and what one step adds."""
    groups = load_checkpoint("gpt-oss-20b").kv_groups
    hybrid = m.kv_capacity([m.CachedModel(groups)], pool_bytes=8 * GIB, max_model_len=131_072)
    plain = tuple(replace(g, window=None) for g in groups)
    full = m.kv_capacity([m.CachedModel(plain)], pool_bytes=8 * GIB, max_model_len=131_072)
    blocks = 8 * GIB // (12 * 16 * 2048)
    needed = 131_072 // 16 + math.ceil((127 + 8192) / 16) + 1
    assert hybrid.concurrency == blocks / needed
    assert 1.8 < hybrid.concurrency / full.concurrency < 2


_GROUPS = st.lists(
    st.builds(
        KvGroup,
        st.integers(1, 40),
        st.integers(1, 16),
        st.sampled_from([32, 64, 128]),
        st.sampled_from([0, 0, 576]),
        st.sampled_from([None, None, 128, 4096]),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@given(_GROUPS, st.integers(0, 2**38), st.integers(1, 200_000), st.sampled_from([1, 2, 8]))
def test_capacity_properties(
    groups: tuple[KvGroup, ...], pool: int, longest: int, ranks: int
) -> None:
    """More pool never holds less; a draft never adds room; a longer request never fits more."""
    model = m.CachedModel(groups, tensor_parallel=ranks)

    def held(models: list[m.CachedModel], size: int, context: int) -> m.KvCapacity:
        return m.kv_capacity(models, pool_bytes=size, max_model_len=context)

    here = held([model], pool, longest)
    assert here.concurrency <= held([model], pool + 2**24, longest).concurrency
    assert here.concurrency >= held([model], pool, longest + 1000).concurrency
    if all(g.window is None for g in groups):
        draft = m.CachedModel((KvGroup(1, 1, 32),))
        assert held([model, draft], pool, longest).concurrency <= here.concurrency
        assert here.blocks * 16 * m.kv_bytes_per_token(model) <= pool


@given(st.integers(1, 400), st.integers(1, 100_000))
def test_longest_context_is_the_longest(concurrency: int, limit: int) -> None:
    model = m.CachedModel(DRAFT.kv_groups)

    def at(longest: int) -> m.KvCapacity:
        return m.kv_capacity([model], pool_bytes=4 * GIB, max_model_len=longest)

    found = m.longest_context(at, concurrency, limit)
    assert found == 0 or at(found).concurrency >= concurrency
    assert found == limit or at(found + 1).concurrency < concurrency


# ------------------------------------------------------------------------------ vLLM's budget


def test_terms_and_ranges() -> None:
    result = m.plan_memory(PLAN)
    assert result.budget_bytes == math.ceil(PLAN.gpu.memory_bytes * 0.92)
    assert result.pool.low < result.pool.likely < result.pool.high
    for end, other in (("low", "high"), ("likely", "likely"), ("high", "low")):
        spent = sum(getattr(t.bytes, other) for t in result.terms)
        assert getattr(result.pool, end) == pytest.approx(result.budget_bytes - spent)
    names = [t.name for t in result.terms]
    assert names[:2] == ["target weights", "draft weights"]
    assert "CUDA graphs" in names
    old = m.plan_memory(replace(PLAN, version=Version(0, 19, 0)))
    assert "CUDA graphs" not in [t.name for t in old.terms]
    assert old.plan.share == 0.9
    assert "CUDA graphs" not in [t.name for t in m.plan_memory(replace(PLAN, eager=True)).terms]


def test_activation_prior_of_a_dense_70b_model() -> None:
    """Start-up logs of dense 70B models put the peak and the logits at 3.5 to 5.5 GiB."""
    terms = {t.name: t.bytes for t in m.plan_memory(replace(PLAN, gpus=1, draft_tensor_parallel=1)).terms}  # fmt: skip  # noqa: E501
    peak = terms["activation peak"]
    assert peak.low / GIB < 3.5
    assert peak.high / GIB > 5.5


def test_what_a_draft_costs() -> None:
    """req: C3, C6"""
    with_draft = m.plan_memory(PLAN)
    alone = m.plan_memory(replace(PLAN, draft=None))
    replicated = m.plan_memory(replace(PLAN, draft_tensor_parallel=1))
    for field in ("tokens", "concurrency", "longest"):
        values = [getattr(p, field).likely for p in (alone, with_draft, replicated)]
        assert values == sorted(values, reverse=True)
    weights = {t.name: t.bytes.likely for t in replicated.terms}
    assert weights["draft weights"] == DRAFT.parameters * 2
    assert m.plan_memory(PLAN).kv_bytes_per_token == (327_680 + 131_072) / 4


def test_quantised_weights_keep_their_embeddings() -> None:
    int8 = m.weight_bytes(TARGET, "int8")
    assert int8.low == TARGET.parameters
    assert int8.high - int8.low == 2 * 128_256 * 8192
    fp8 = m.weight_bytes(load_checkpoint("deepseek-v3"), None)
    assert fp8.low == pytest.approx(671e9, rel=0.01)
    with pytest.raises(InputError, match="precision"):
        m.weight_bytes(TARGET, "int3")


@pytest.mark.parametrize(
    "wrong",
    [{"gpus": 3}, {"draft_tensor_parallel": 2}, {"context": 0}, {"concurrency": 0},
     {"utilization": 1.5}],
)  # fmt: skip
def test_plans_that_vllm_would_refuse(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError) as error:
        m.plan_memory(replace(PLAN, **wrong))
    assert error.value.next_step


def test_v0_did_not_count_the_drafts_cache() -> None:
    assert "9995" in (m.v0_warning(replace(PLAN, version=Version(0, 6, 3))) or "")
    assert m.v0_warning(PLAN) is None


def test_server_defaults_by_gpu() -> None:
    defaults = {
        name: (m.ServingPlan(TARGET, gpu).sequences, m.ServingPlan(TARGET, gpu).batched_tokens)
        for name, gpu in gpus().items()
    }
    assert defaults["h100"] == (1024, 8192)
    assert defaults["a100"] == (256, 2048)
    assert defaults["b200"] == (1024, 16384)
    assert defaults["l4"] == (256, 2048)


# --------------------------------------------------------------------------------- searches


def test_table_covers_mixes_and_gpus() -> None:
    rows = m.mix_table(PLAN, (1, 2, 3, 4))
    assert len(rows) == 3 * len(m.MIXES)
    assert {r.plan.gpus for r in rows} == {1, 2, 4}


def test_smallest_gpu_set() -> None:
    plan = replace(PLAN, concurrency=16)
    found = m.smallest_gpu_set(plan, list(gpus().values()))
    assert found is not None
    assert found.concurrency.low >= 16
    size = found.plan.gpu.vendor_gb * found.plan.gpus
    smaller = [
        m.plan_memory(replace(plan, gpu=gpu, gpus=n, draft_tensor_parallel=n))
        for gpu in gpus().values()
        for n in (1, 2, 4, 8)
        if gpu.vendor_gb * n < size
    ]
    assert all(p.concurrency.low < 16 for p in smaller)
    assert m.smallest_gpu_set(replace(PLAN, concurrency=10**6), [find_gpu("l4")]) is None


def test_best_precision_is_the_most_precise_that_holds() -> None:
    plan = replace(PLAN, gpus=2, draft_tensor_parallel=2)
    found = m.best_precision(replace(plan, concurrency=8))
    assert found is not None
    assert found.plan.target_precision == "int8"
    assert m.best_precision(replace(plan, concurrency=10**6)) is None


def test_lint_with_a_gpu() -> None:
    big = read_command("vllm serve llama-3.1-70b -tp 2 --max-model-len 131072")
    found = m.command_findings(big, Version(0, 33, 0), "h100")
    assert [f.rule for f in found] == ["memory-plan"]
    fine = read_command("vllm serve llama-3.1-70b -tp 4 --max-model-len 8192")
    assert m.command_findings(fine, Version(0, 33, 0), "h100") == ()
    unknown = m.command_findings(read_command("vllm serve a/b"), Version(0, 33, 0), "h100")
    assert [f.severity for f in unknown] == ["advice"]
