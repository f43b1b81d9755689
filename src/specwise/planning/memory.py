"""What a target and its draft cost in GPU memory, and what that leaves for the KV cache.

Two views. ``simple_fit`` is the back-of-envelope of vendor gigabytes and bytes per parameter.
``plan_memory`` follows what vLLM does: one rank's budget is its memory times the utilisation; from
it go the weights, the draft, the context, the activation peak of a dummy run, CUDA graphs and the
verify logits; the rest is cut into blocks that target and draft share. Terms that depend on the
machine are ranges, from ``low`` to ``high``, and so is everything computed from them.

Sources: vllm/v1/worker/gpu_worker.py determine_available_memory, vllm/v1/core/kv_cache_utils.py
(0.32); the figures of the ranges are planning priors from reported start-up logs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specwise.domain import Checkpoint, Gpu, KvGroup
from specwise.errors import InputError
from specwise.vllm.command import Version, names
from specwise.vllm.flags import V1_ONLY, default_utilization

if TYPE_CHECKING:
    from specwise.vllm.command import ServeCommand
    from specwise.vllm.findings import Finding

GIB = 2**30
TARGET_SHARE_LIMIT = 0.70  # of total memory: above it a draft cuts concurrency (req: C5)
DRAFT_SHARE_LIMIT = 0.15  # of total memory (req: C5, I2)
GRAPHS_COUNTED_SINCE = Version(0, 21, 0)

# Bits per weight as stored, scales of the usual group sizes included; `simple` takes the name's.
PRECISIONS: dict[str, tuple[float, float]] = {
    "fp32": (32, 32),
    "bf16": (16, 16),
    "fp16": (16, 16),
    "fp8": (8, 8),
    "int8": (8, 8),
    "int4": (4, 4.25),
}
MIXES: tuple[tuple[str, str], ...] = (
    ("bf16", "bf16"),
    ("int8", "bf16"),
    ("int8", "int8"),
    ("int4", "bf16"),
    ("int4", "int4"),
)


@dataclass(frozen=True, slots=True)
class Range:
    """A figure between ``low`` and ``high`` with the most likely value between them."""

    low: float
    likely: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Range:
        """A figure that is known."""
        return cls(value, value, value)

    def scaled(self, factor: float) -> Range:
        """All three times a positive factor."""
        return Range(self.low * factor, self.likely * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Term:
    """One thing that takes memory on a GPU, in bytes, and why it takes that much."""

    name: str
    bytes: Range
    note: str


# ------------------------------------------------------------------------------ the KV cache


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model's KV layers, the bits of a cached number, and over how many GPUs it is split."""

    groups: tuple[KvGroup, ...]
    bits: float = 16
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class KvCapacity:
    """What a pool holds: its blocks, and requests of the longest length (``concurrency``).

    ``tokens`` is vLLM's log figure "KV cache size", concurrency times the longest request.
    """

    blocks: int
    tokens: int
    concurrency: float


def kv_bytes_per_token(model: CachedModel) -> float:
    """Bytes one token takes on one rank over all layers, as if none had a window."""
    return sum(_layer_bytes(group, model) * group.layers for group in model.groups)


def _layer_bytes(group: KvGroup, model: CachedModel) -> float:
    """Bytes per token and layer on one rank; heads below the split are replicated."""
    if group.latent:
        return group.latent * model.bits / 8
    heads = math.ceil(group.heads / model.tensor_parallel)
    return 2 * heads * group.head_dim * model.bits / 8


def kv_capacity(
    models: Sequence[CachedModel],
    *,
    pool_bytes: float,
    max_model_len: int,
    block_tokens: int = 16,
    max_batched_tokens: int = 8192,
) -> KvCapacity:
    """Blocks and requests that ``pool_bytes`` hold on one rank for target and draft together.

    vllm/v1/core/kv_cache_utils.py (0.32): layers of one kind share a block table; with sliding
    windows the kinds are cut into groups of equal layer counts that draw from one pool.
    """
    layers = [(g, _layer_bytes(g, m)) for m in models for g in m.groups if g.layers]
    block_bytes, needed = _blocks(layers, max_model_len, block_tokens, max_batched_tokens)
    if not block_bytes or pool_bytes <= 0:
        return KvCapacity(0, 0, 0.0)
    blocks = int(pool_bytes // block_bytes)
    concurrency = blocks / needed
    return KvCapacity(blocks, int(concurrency * max_model_len), concurrency)


def _blocks(
    layers: list[tuple[KvGroup, float]], longest: int, block_tokens: int, batched: int
) -> tuple[float, int]:
    """(bytes of a block of the pool, blocks that one request of ``longest`` tokens needs)."""
    full = math.ceil(longest / block_tokens)
    windows = {g.window for g, _ in layers}
    if windows == {None} or not layers:
        return sum(g.layers * size for g, size in layers) * block_tokens, full
    kinds: dict[tuple[int | None, float], int] = {}
    for group, size in layers:
        key = (group.window, size)
        kinds[key] = kinds.get(key, 0) + group.layers
    fewest, most = min(kinds.values()), max(kinds.values())
    group_size = most if most < fewest * 1.5 else fewest
    widest = max(size for _, size in kinds)
    needed = 0
    for (window, _), count in kinds.items():
        tables = math.ceil(count / group_size)
        if window is None:
            needed += tables * full
        else:
            reach = min(window - 1 + batched, longest)
            needed += tables * (math.ceil(reach / block_tokens) + 1)
    return group_size * widest * block_tokens, needed


def longest_context(capacity: Callable[[int], KvCapacity], concurrency: float, limit: int) -> int:
    """The longest request, up to ``limit``, of which ``concurrency`` fit at once; 0 if none do."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if capacity(middle).concurrency >= concurrency:
            low = middle
        else:
            high = middle - 1
    return low


# ----------------------------------------------------------------------------- vLLM's budget


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What is to be served on what; None leaves vLLM's default for the version and GPU."""

    target: Checkpoint
    gpu: Gpu
    gpus: int = 1
    draft: Checkpoint | None = None
    draft_tensor_parallel: int = 1
    k: int = 3
    context: int = 8192
    concurrency: int = 1
    version: Version | None = None
    utilization: float | None = None
    target_precision: str | None = None
    draft_precision: str | None = None
    kv_bits: float = 16
    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    eager: bool = False
    probabilistic: bool = False

    @property
    def vllm(self) -> Version:
        """The version that is planned for."""
        return self.version or names().newest

    @property
    def share(self) -> float:
        """GPU memory utilisation."""
        return self.utilization or default_utilization(self.vllm)

    @property
    def sequences(self) -> int:
        """--max-num-seqs: vllm/engine/arg_utils.py, by the GPU's size."""
        big = self.gpu.memory_bytes >= 70 * GIB and self.gpu.compute_capability != (8, 0)
        return self.max_num_seqs or (1024 if big else 256)

    @property
    def batched_tokens(self) -> int:
        """--max-num-batched-tokens of the server, by the GPU's size."""
        if self.max_batched_tokens:
            return self.max_batched_tokens
        if self.gpu.compute_capability == (8, 0) or self.gpu.memory_bytes < 70 * GIB:
            return 2048
        return 16384 if self.gpu.memory_bytes >= 160 * GIB else 8192


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One rank's memory and what its KV pool is good for.

    ``tokens``, ``concurrency`` and ``longest`` are for the whole deployment (every rank holds its
    part of the same tokens): tokens of KV cache, requests at the asked context, and the longest
    context at the asked concurrency.
    """

    plan: ServingPlan
    budget_bytes: float
    terms: tuple[Term, ...]
    pool: Range
    kv_bytes_per_token: float
    tokens: Range
    concurrency: Range
    longest: Range

    @property
    def fits(self) -> bool:
        """Whether at least one request of the asked context fits, as far as can be told."""
        return self.concurrency.likely >= 1


def weight_bytes(checkpoint: Checkpoint, precision: str | None) -> Range:
    """Bytes of the weights at a precision; as stored if ``precision`` is None.

    Quantised checkpoints usually leave embeddings and head in 16 bits: the high end.
    """
    if precision is None and checkpoint.weight_bytes is not None:
        return Range.exactly(checkpoint.weight_bytes)
    if precision is None and checkpoint.quantization is not None:
        nominal = stored = checkpoint.quantization.weight_bits
    elif precision is None:
        nominal = stored = 32 if checkpoint.dtype == "float32" else 16
    elif precision in PRECISIONS:
        nominal, stored = PRECISIONS[precision]
    else:
        raise InputError(
            f"No precision is called {precision!r}.", f"Known: {', '.join(PRECISIONS)}."
        )
    total = checkpoint.parameters
    if stored >= 16:
        return Range.exactly(total * stored / 8)
    matrices = 1 if checkpoint.tied_embeddings else 2
    embedding = min(total, checkpoint.vocab_size * checkpoint.hidden_size * matrices)
    high = (total - embedding) * stored / 8 + embedding * 2
    return Range(total * nominal / 8, high, high)


def plan_memory(plan: ServingPlan) -> MemoryPlan:
    """One rank's memory, and the KV cache that is left, for ``plan``.

    Raises InputError where vLLM could not split the model over the GPUs.
    """
    _check(plan)
    budget = math.ceil(plan.gpu.memory_bytes * plan.share)
    terms = tuple(_terms(plan))
    pool = Range(
        budget - sum(t.bytes.high for t in terms),
        budget - sum(t.bytes.likely for t in terms),
        budget - sum(t.bytes.low for t in terms),
    )
    models = cached_models(plan)
    positions = plan.target.max_positions or 2**20
    if plan.draft is not None and plan.draft.max_positions:
        positions = max(positions, plan.draft.max_positions)

    def at(pool_bytes: float) -> Callable[[int], KvCapacity]:
        return lambda longest: kv_capacity(
            models,
            pool_bytes=pool_bytes,
            max_model_len=longest,
            max_batched_tokens=plan.batched_tokens,
        )

    pools = (pool.low, pool.likely, pool.high)
    held = [at(p)(plan.context) for p in pools]
    longest = [longest_context(at(p), plan.concurrency, positions) for p in pools]
    return MemoryPlan(
        plan=plan,
        budget_bytes=budget,
        terms=terms,
        pool=pool,
        kv_bytes_per_token=sum(kv_bytes_per_token(m) for m in models),
        tokens=Range(*(float(h.tokens) for h in held)),
        concurrency=Range(*(h.concurrency for h in held)),
        longest=Range(*(float(x) for x in longest)),
    )


def cached_models(plan: ServingPlan) -> list[CachedModel]:
    """Target and draft as the shared pool sees them, on one rank."""
    models = [CachedModel(plan.target.kv_groups, plan.kv_bits, plan.gpus)]
    if plan.draft is not None:
        models.append(CachedModel(plan.draft.kv_groups, plan.kv_bits, plan.draft_tensor_parallel))
    return models


def _check(plan: ServingPlan) -> None:
    heads = plan.target.attention_heads
    if plan.gpus < 1 or heads % plan.gpus:
        raise InputError(
            f"{plan.target.name} has {heads} attention heads, which {plan.gpus} GPUs cannot share.",
            "Choose a number of GPUs that divides it, such as "
            + ", ".join(str(n) for n in (1, 2, 4, 8, 16) if heads % n == 0)
            + ".",
        )
    if plan.draft is not None and plan.draft_tensor_parallel not in {1, plan.gpus}:
        raise InputError(
            f"A draft is split over 1 GPU or all {plan.gpus}, not {plan.draft_tensor_parallel}.",
            "Use --draft-tp 1 or leave it out.",
        )
    if not 0 < plan.share <= 1:
        raise InputError(f"A utilisation of {plan.share} is no share.", "Use 0.9, for example.")
    if min(plan.context, plan.concurrency) < 1:
        raise InputError("Context and concurrency start at 1.", "Give positive numbers.")


def _terms(plan: ServingPlan) -> Iterator[Term]:
    """What takes memory on one rank before the KV cache."""
    target, draft, ranks = plan.target, plan.draft, plan.gpus
    split = f", a {ranks}th of them" if ranks > 2 else ", half of them" if ranks == 2 else ""
    weights = weight_bytes(target, plan.target_precision).scaled(1 / ranks)
    yield Term("target weights", weights, f"{target.parameters / 1e9:.2f} B parameters{split}")
    if draft is not None:
        copies = ranks if plan.draft_tensor_parallel == ranks else 1
        note = f"{draft.parameters / 1e9:.3g} B parameters"
        if ranks > 1:
            note += (
                ", whole on every rank (draft TP 1)" if copies == 1 else ", split like the target"
            )
        yield Term(
            "draft weights", weight_bytes(draft, plan.draft_precision).scaled(1 / copies), note
        )
    context = Range(0.6, 0.8, 1.0).scaled(GIB)
    yield Term("context and NCCL", context, "CUDA context, communication buffers: by machine")
    yield Term("activation peak", _activations(plan), f"dummy run of {plan.batched_tokens} tokens")
    if not plan.eager and plan.vllm >= GRAPHS_COUNTED_SINCE:
        factor = 1.15 if draft is not None else 1.0
        graphs = Range(0.3, 0.7, 1.5).scaled(GIB * factor)
        yield Term(
            "CUDA graphs", graphs, f"counted in the budget since vLLM {GRAPHS_COUNTED_SINCE}"
        )
    if draft is not None:
        yield Term("verify logits", _verify_logits(plan), "B (k + 1) vocabulary x 4 bytes")


def _activations(plan: ServingPlan) -> Range:
    """Peak of a dummy run: the MLP's inner rows, the residual stream, one set of logits.

    A rough count of the live tensors; reported peaks lie between once and 2.3 times it.
    """
    target, tokens = plan.target, plan.batched_tokens
    layers = max(target.layers, 1)
    embedding = target.vocab_size * target.hidden_size * (1 if target.tied_embeddings else 2)
    inner = max(0, target.active_parameters - embedding) / layers / (3 * target.hidden_size)
    moe = 2.0 if target.active_parameters < 0.9 * target.parameters else 1.0
    rows = tokens * (2 * inner / plan.gpus * moe + 4 * target.hidden_size) * 2
    logits = min(plan.sequences, tokens) * target.vocab_size * 4 * 2
    return Range(1.0, 1.6, 2.3).scaled(rows + logits)


def _verify_logits(plan: ServingPlan) -> Range:
    """Logits of a full verify batch in float32, once more if the draft's are kept.

    vllm/v1/sample/rejection_sampler.py: (batch (k + 1)) x vocabulary.
    """
    rows = min(plan.sequences * (plan.k + 1), plan.batched_tokens)
    full = rows * plan.target.vocab_size * 4 * (2 if plan.probabilistic else 1)
    return Range(0.25 * full, 0.6 * full, full)


# ---------------------------------------------------------------------------- the rules of C5


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule of thumb: its value, its limit and whether it holds."""

    name: str
    value: float
    limit: float
    text: str

    @property
    def holds(self) -> bool:
        """Whether the value stays within the limit."""
        return self.value <= self.limit


def memory_rules(plan: ServingPlan) -> tuple[RuleResult, ...]:
    """The 70 % and 15 % rules over all GPUs' memory, in vendor gigabytes (req: C5).

    A draft that V1 replicates counts once for each GPU.
    """
    total = plan.gpu.vendor_gb * 1e9 * plan.gpus
    target = weight_bytes(plan.target, plan.target_precision).likely / total
    rules = [
        RuleResult(
            "target-share",
            target,
            TARGET_SHARE_LIMIT,
            "above 70 % of GPU memory a draft cuts concurrency: load-test before anything else",
        )
    ]
    if plan.draft is not None:
        copies = plan.gpus if plan.draft_tensor_parallel == 1 and plan.vllm >= V1_ONLY else 1
        draft = copies * weight_bytes(plan.draft, plan.draft_precision).likely / total
        rules.append(
            RuleResult(
                "draft-share",
                draft,
                DRAFT_SHARE_LIMIT,
                "a draft above 15 % of total VRAM costs more cache than it is likely to win back",
            )
        )
    return tuple(rules)


# --------------------------------------------------------------- tables and searches over plans


def mix_table(plan: ServingPlan, counts: Sequence[int]) -> tuple[MemoryPlan, ...]:
    """The plan for every precision mix and number of GPUs that can be split."""
    return tuple(
        plan_memory(
            replace(
                plan,
                gpus=count,
                target_precision=target,
                draft_precision=draft if plan.draft is not None else None,
                draft_tensor_parallel=1 if plan.draft_tensor_parallel == 1 else count,
            )
        )
        for count in counts
        if plan.target.attention_heads % count == 0
        for target, draft in (MIXES if plan.draft is not None else _target_mixes())
    )


def _target_mixes() -> tuple[tuple[str, str], ...]:
    return tuple(dict.fromkeys((target, "bf16") for target, _ in MIXES))


def smallest_gpu_set(
    plan: ServingPlan, gpus: Sequence[Gpu], counts: Sequence[int] = (1, 2, 4, 8)
) -> MemoryPlan | None:
    """The plan with the least total memory that holds the asked concurrency at the asked context.

    Judged by the low end of the ranges; None if no set of these GPUs does.
    """
    fitting = [
        result
        for gpu in gpus
        for count in counts
        if plan.target.attention_heads % count == 0
        for result in [plan_memory(_on(plan, gpu, count))]
        if result.concurrency.low >= plan.concurrency
    ]
    return min(
        fitting, key=lambda r: (r.plan.gpu.vendor_gb * r.plan.gpus, r.plan.gpus), default=None
    )


def _on(plan: ServingPlan, gpu: Gpu, count: int) -> ServingPlan:
    whole = plan.draft_tensor_parallel == 1
    return replace(plan, gpu=gpu, gpus=count, draft_tensor_parallel=1 if whole else count)


def best_precision(plan: ServingPlan) -> MemoryPlan | None:
    """The first of MIXES, most precise first, that holds the asked concurrency; None if none do."""
    for result in mix_table(plan, [plan.gpus]):
        if result.concurrency.low >= plan.concurrency:
            return result
    return None


# ------------------------------------------------------------------------- the simple view


@dataclass(frozen=True, slots=True)
class SimpleFit:
    """Vendor gigabytes: the weights of a mix, what is left, and the KV budget at a utilisation."""

    target_precision: str
    draft_precision: str
    target_gb: float
    draft_gb: float
    total_gb: float
    left_gb: float
    kv_budget_gb: float
    verdict: str

    @property
    def weights_gb(self) -> float:
        """Target and draft together."""
        return self.target_gb + self.draft_gb


def nominal_billions(checkpoint: Checkpoint) -> float:
    """The size a model is called by (70 for Llama-3.1-70B), else its parameters in billions."""
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z])", checkpoint.name.lower())
    actual = checkpoint.parameters / 1e9
    near = [float(s) for s in sizes if 0.8 * actual <= float(s) <= 1.25 * actual]
    return near[0] if near else actual


def simple_fit(
    target_billions: float,
    draft_billions: float,
    *,
    total_gb: float,
    utilization: float = 0.9,
    mixes: Sequence[tuple[str, str]] = MIXES,
) -> tuple[SimpleFit, ...]:
    """A fit table in vendor gigabytes: bytes per parameter times billions (req: C1, C2, C4).

    After "Speculative Decoding on vLLM: A Configuration and Decision Framework" (July 2026).

    The first mix, most precise first, whose KV budget is at least a quarter of the memory is the
    recommended one; a mix that leaves less than a tenth of the memory is unusable.
    """
    rows: list[SimpleFit] = []
    recommended = False
    for target, draft in mixes:
        target_gb = target_billions * PRECISIONS[target][0] / 8
        draft_gb = draft_billions * PRECISIONS[draft][0] / 8
        left = total_gb - target_gb - draft_gb
        budget = total_gb * utilization - target_gb - draft_gb
        verdict = "fits"
        if left < 0:
            verdict = "does not fit"
        elif left < 0.1 * total_gb:
            verdict = "unusable"
        elif budget >= 0.25 * total_gb and not recommended:
            verdict, recommended = "recommended", True
        rows.append(SimpleFit(target, draft, target_gb, draft_gb, total_gb, left, budget, verdict))
    return tuple(rows)


def simple_imbalance(
    draft_gb: float, gpus: int, total_gb: float, weights_gb: float
) -> tuple[float, float]:
    """(GB left on the GPU that holds the draft, GB left on each other one) at draft TP 1.

    ``weights_gb`` is the target's, spread evenly (req: C6).
    """
    each = total_gb / gpus - weights_gb / gpus
    return each - draft_gb, each


# ------------------------------------------------------------------- for lint, with a GPU named


def command_findings(command: ServeCommand, version: Version, gpu_name: str) -> tuple[Finding, ...]:
    """What the memory plan says against a command's utilisation, context and sequences.

    Models that are no local folder and not in the built-in table are skipped with an advice.
    """
    from specwise.facts.checkpoint import load_local  # noqa: PLC0415
    from specwise.facts.hardware import find_gpu  # noqa: PLC0415
    from specwise.vllm.findings import Finding, whole_number  # noqa: PLC0415

    gpu = find_gpu(gpu_name)
    target = load_local(command.model or "")
    config = command.speculation or {}
    named = config.get("model")
    draft = load_local(named) if isinstance(named, str) else None
    if target is None or (named and draft is None):
        return (
            Finding(
                "memory-unknown", "advice", "The memory plan needs both checkpoints' metadata.",
                "They are neither local folders nor built-in models.",
                "Run `specwise memory` with a hub id or a folder.", "specwise memory",
            ),
        )  # fmt: skip
    text = command.get("--gpu-memory-utilization")
    ranks = whole_number(command.get("--tensor-parallel-size")) or 1
    k = config.get("num_speculative_tokens")
    plan = ServingPlan(
        target=target,
        draft=draft,
        gpu=gpu,
        gpus=ranks,
        draft_tensor_parallel=1 if config.get("draft_tensor_parallel_size") == 1 else ranks,
        k=k if isinstance(k, int) else 3,
        context=whole_number(command.get("--max-model-len")) or target.max_positions or 8192,
        version=version,
        utilization=float(text) if text else None,
        max_num_seqs=whole_number(command.get("--max-num-seqs")),
        max_batched_tokens=whole_number(command.get("--max-num-batched-tokens")),
        eager=command.has("--enforce-eager"),
    )
    result = plan_memory(plan)
    if result.fits:
        return ()
    return (
        Finding(
            "memory-plan",
            "error",
            f"One request of {plan.context:,} tokens does not fit on {ranks} x {gpu.name} "
            f"(KV pool {result.pool.likely / GIB:.1f} GiB a GPU).",
            "vLLM stops at start-up when a longest request does not fit.",
            f"Lower --max-model-len to {int(result.longest.low):,}, quantise the target, or add "
            "GPUs: `specwise memory` shows each term."
            if result.longest.low
            else "Quantise the target or add GPUs: `specwise memory` shows each term.",
            "vllm/v1/core/kv_cache_utils.py",
        ),
    )


def v0_warning(plan: ServingPlan) -> str | None:
    """What V0 did not count, None for V1."""
    if plan.draft is None or plan.vllm >= V1_ONLY:
        return None
    return (
        f"vLLM {plan.vllm} does not count the draft's KV cache in its budget (issue 9995): it "
        "runs out of memory under load unless --gpu-memory-utilization leaves room for it."
    )
