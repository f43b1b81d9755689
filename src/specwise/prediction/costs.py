"""What one engine step costs in seconds: the shape of a step, and who can price it.

`RooflineCosts` prices a step from checkpoint, GPU and parallelism before anything runs. Its
constants are few: one `Efficiency` a GPU, one `Overheads` a generation of vLLM.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specwise.domain import Checkpoint, Gpu, KvGroup, Speculation
from specwise.errors import InputError


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one engine step computes; each field a number, or an array over steps.

    ``tokens`` are new tokens through the target: for each decoding request 1 + its drafts, plus the
    chunks of prompts. ``context_tokens`` are the cache entries attended, the new ones included,
    summed over requests. ``requests`` get output in this step: the drafter's batch. ``k`` drafts
    are then proposed for each of them; with speculation on, k = 0 still runs the first pass.
    """

    tokens: Any
    context_tokens: Any
    requests: Any
    k: Any


class StepCosts(Protocol):
    """Seconds for a step and its parts; arrays in give arrays out, by the same formula."""

    @property
    def speculates(self) -> bool:
        """Whether a drafter runs."""
        ...

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:
        """The target's pass."""
        ...

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:
        """The drafter: a first pass over all ``tokens``, then k - 1 over ``requests`` tokens."""
        ...

    def overhead_s(self, requests: Any, k: Any) -> Any:
        """Host work that is not hidden behind the passes."""
        ...

    def step_s(self, shape: StepShape) -> Any:
        """The whole step, with whatever overlap the model says."""
        ...


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What share of its data sheet a GPU reaches in serving, and what a message costs.

    ``bandwidth`` and ``flops`` are shares for weights and matrix products, ``kv_bandwidth`` for
    reading the cache. ``overlap`` is the exponent n of (memory^n + compute^n)^(1/n): 1 would add
    them, infinity take the larger. ``all_reduce_s`` is the latency of one all-reduce, ``link`` the
    share of the link's bandwidth that it gets. ``source`` says where the figures come from.
    """

    bandwidth: float
    kv_bandwidth: float
    flops: float
    overlap: float
    all_reduce_s: float
    link: float
    source: str


@dataclass(frozen=True, slots=True)
class Overheads:
    """What an engine's version adds to a step on the host, where it is not hidden, in seconds.

    ``step_s`` each step and ``request_s`` for each request in it; ``speculation_s`` each
    speculating step (metadata, sampler) and ``speculation_request_s`` for each request in it;
    ``draft_pass_s`` each pass of a drafter that is launched from the host; ``lookup_s`` and
    ``lookup_request_s`` an n-gram search. ``launch_layer_s`` is what launching one layer takes
    where no full CUDA graph runs it: in a drafter's passes, and in the target's over more than
    ``graph_tokens``. Launches hide behind the GPU's work; a pass takes at least its launches.
    """

    step_s: float
    request_s: float
    speculation_s: float
    speculation_request_s: float
    draft_pass_s: float
    lookup_s: float
    lookup_request_s: float
    launch_layer_s: float
    graph_tokens: int
    source: str


_H100 = Efficiency(
    bandwidth=0.81,
    kv_bandwidth=0.90,
    flops=0.81,
    overlap=2.1,
    all_reduce_s=8.2e-6,
    link=0.7,
    source="fitted to SpecDecode-Bench's Fig. 1 from priors; docs/concepts/prediction.md",
)
_PRIOR = Efficiency(
    bandwidth=0.80,
    kv_bandwidth=0.90,
    flops=0.75,
    overlap=2.1,
    all_reduce_s=10e-6,
    link=0.7,
    source="prior: no published measurement was fitted for this GPU",
)


def efficiency_of(gpu: Gpu) -> Efficiency:
    """The constants of ``gpu``: fitted for Hopper (H100, H200), else a prior."""
    return _H100 if gpu.compute_capability == (9, 0) else _PRIOR


_LAUNCH_LAYER_S = 70e-6
"""From SpecDecode-Bench (arXiv 2601.11580): a pass of a 0.6B draft (28 layers) takes 37.5 % of an
8B target's on an H100, four times what its weights need; an 8B draft's (32 layers, TP 4) takes
12.5 % of a 70B target's, about what its weights need."""

_V0 = Overheads(
    step_s=2.0e-3,
    request_s=60e-6,
    speculation_s=2.0e-3,
    speculation_request_s=0.7e-3,
    draft_pass_s=2.0e-3,
    lookup_s=1.0e-3,
    lookup_request_s=0.7e-3,
    launch_layer_s=0.0,
    graph_tokens=256,
    source="V0, each sequence handled in Python; fitted to the vLLM blog of October 2024",
)
_V1_EAGER = Overheads(
    step_s=1.5e-3,
    request_s=0.0,
    speculation_s=1.0e-3,
    speculation_request_s=0.0,
    draft_pass_s=0.70e-3,
    lookup_s=50e-6,
    lookup_request_s=1e-6,
    launch_layer_s=_LAUNCH_LAYER_S,
    graph_tokens=512,
    source="V1 up to 0.9, drafter launched kernel by kernel; fitted to vLLM issue 20780",
)
_V1 = Overheads(
    step_s=1.16e-3,
    request_s=0.0,
    speculation_s=0.15e-3,
    speculation_request_s=0.0,
    draft_pass_s=0.43e-3,
    lookup_s=50e-6,
    lookup_request_s=1e-6,
    launch_layer_s=_LAUNCH_LAYER_S,
    graph_tokens=512,
    source="V1 from 0.10, drafter in piecewise CUDA graphs; fitted with the H100's shares",
)


def overheads_of(version: tuple[int, ...]) -> Overheads:
    """The constants of a vLLM version, as (0, 10, 1)."""
    if version < (0, 8):
        return _V0
    return _V1_EAGER if version < (0, 10) else _V1


@dataclass(frozen=True, slots=True)
class Model:
    """What one forward pass of a model moves and computes.

    ``body`` parameters work on every token, ``head`` (the output matrix) on every token that is
    sampled from; the input embedding is a table of which a pass reads a few rows. ``weight_bits``
    are stored, ``flops_bits`` what the products are computed in. ``sparse`` of the body's
    parameters belong to ``experts`` of which each token goes through ``active_experts``.
    """

    body: float
    head: float
    kv_groups: tuple[KvGroup, ...]
    layers: int
    hidden_size: int
    weight_bits: float = 16.0
    flops_bits: int = 16
    kv_bits: float = 16.0
    sparse: float = 0.0
    experts: int = 0
    active_experts: int = 0

    def read_parameters(self, tokens: Any) -> Any:
        """Parameters that a pass over ``tokens`` reads: all, or the experts that were chosen.

        Distinct experts among t tokens that choose K of E at random: E (1 - (1 - K/E)^t).
        """
        dense = self.body - self.sparse + self.head
        if not self.experts:
            return dense
        missed = (1 - self.active_experts / self.experts) ** tokens
        return dense + self.sparse * (1 - missed)

    @property
    def active_body(self) -> float:
        """Parameters of the body that one token is multiplied with."""
        if not self.experts:
            return self.body
        return self.body - self.sparse * (1 - self.active_experts / self.experts)

    def kv_bytes(self, context_tokens: Any, requests: Any, tensor_parallel: int) -> Any:
        """Cache that one GPU reads for ``context_tokens`` of ``requests`` together."""
        total: Any = 0.0
        for group in self.kv_groups:
            attended = context_tokens
            if group.window is not None:
                attended = np.minimum(context_tokens, group.window * _larger(requests, 1))
            split = 1 if group.latent else min(tensor_parallel, group.heads)
            total = total + attended * group.elements_per_token * self.kv_bits / 8 / split
        return total


def model_of(checkpoint: Checkpoint) -> Model:
    """The pass of a checkpoint, from its metadata."""
    table = checkpoint.vocab_size * checkpoint.hidden_size
    head = float(table)
    embedding = 0 if checkpoint.tied_embeddings else table
    body = checkpoint.parameters - head - embedding
    sparse = 0.0
    if checkpoint.experts:
        unused = 1 - checkpoint.active_experts / checkpoint.experts
        sparse = (checkpoint.parameters - checkpoint.active_parameters) / unused
    bits = checkpoint.quantization.weight_bits if checkpoint.quantization else 16.0
    method = checkpoint.quantization.method if checkpoint.quantization else ""
    return Model(
        body=body,
        head=head,
        kv_groups=checkpoint.kv_groups,
        layers=checkpoint.layers,
        hidden_size=checkpoint.hidden_size,
        weight_bits=bits,
        flops_bits=8 if bits == 8 and "bitsandbytes" not in method else 16,
        sparse=sparse,
        experts=checkpoint.experts,
        active_experts=checkpoint.active_experts,
    )


def eagle_head(target: Checkpoint, *, draft_vocabulary: int | None = None) -> Model:
    """An EAGLE or MTP head: one layer of the target's shape, a fusing matrix and an output matrix.

    EAGLE fuses the token's embedding with one hidden state (2 h -> h) and uses the target's output
    matrix; EAGLE-3 fuses three (3 h -> h), widens the layer's input to 2 h and has an output matrix
    of its own over ``draft_vocabulary`` words (32,000 in the published heads).
    """
    whole = model_of(target)
    h = target.hidden_size
    group = target.kv_groups[0]
    cache = KvGroup(1, group.heads, group.head_dim, latent=group.latent, window=group.window)
    layer = (whole.body - whole.sparse) / target.layers + whole.sparse / target.layers
    fuse, head = 2 * h * h, whole.head
    if draft_vocabulary is not None:
        widened = h * (target.attention_heads + 2 * group.heads) * group.head_dim
        fuse, head = 3 * h * h + widened, float(draft_vocabulary * h)
    return replace(
        whole,
        body=layer + fuse,
        head=head,
        kv_groups=(cache,),
        layers=1,
        sparse=whole.sparse / target.layers,
    )


def graph_tokens(tokens: Any, largest: int) -> Any:
    """``tokens`` padded to the next size that has a CUDA graph; as they are above ``largest``.

    vLLM 0.33 captures 1, 2, 4, then every 8 to 256 and every 16 above, so
    a step's cost is a staircase.
    """
    if isinstance(tokens, int | float):  # the simulation asks step by step
        if tokens <= 4 or tokens > largest:
            return tokens if tokens > largest else 1 << max(math.ceil(tokens) - 1, 0).bit_length()
        by = 16 if tokens > 256 else 8
        return math.ceil(tokens / by) * by
    steps = np.minimum(np.ceil(tokens), largest + 1).astype(int)
    return np.where(tokens > largest, tokens, _staircase(largest)[steps])


@functools.cache
def _staircase(largest: int) -> NDArray[np.float64]:
    return np.array([graph_tokens(tokens, largest) for tokens in range(largest + 2)], dtype=float)


def _larger(one: Any, other: Any) -> Any:
    """The larger, element by element; without NumPy's price for two plain numbers."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return max(one, other)
    return np.maximum(one, other)


@dataclass(frozen=True, slots=True)
class RooflineCosts:
    """A step's price from checkpoint, GPU and parallelism (requirement A7).

    A pass takes

        (memory^n + compute^n)^(1/n) + cache + communication,

    with memory = weight bytes / (bandwidth share x bandwidth), compute = 2 parameters tokens /
    (share x FLOP/s), cache = cached bytes attended / bandwidth, and two all-reduces a layer of
    2 (p - 1) / p x tokens x hidden x 2 bytes under tensor parallelism p. A smooth maximum instead
    of a sum: weights are loaded while others are multiplied. A step is the target's pass, the
    drafter's first pass over all tokens, k - 1 more over one token a request, and the host's work.
    """

    target: Model
    gpu: Gpu
    tensor_parallel: int
    efficiency: Efficiency
    overheads: Overheads
    method: str = ""
    drafter: Model | None = None
    drafter_tensor_parallel: int = 1

    @property
    def speculates(self) -> bool:
        """Whether a drafter runs."""
        return bool(self.method)

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:
        """Seconds of the target's pass."""
        return self._pass_s(self.target, tokens, tokens, context_tokens, requests)

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:
        """Seconds of the drafter's passes, or of the lookup."""
        if not self.method:
            return 0.0 * tokens
        if self.drafter is None:
            over = self.overheads
            searching = -_larger(-k, -1)
            return (over.lookup_s + over.lookup_request_s * requests) * searching
        first = self._pass_s(self.drafter, tokens, requests, context_tokens, requests)
        later = self._pass_s(self.drafter, requests, requests, context_tokens, requests)
        more = _larger(k - 1, 0)
        return first + more * later + (1 + more) * self.overheads.draft_pass_s

    def overhead_s(self, requests: Any, k: Any) -> Any:  # noqa: ARG002 - the protocol's
        """Seconds of host work between passes."""
        over = self.overheads
        found = over.step_s + over.request_s * requests
        if self.method:
            found = found + over.speculation_request_s * requests
        return found + over.speculation_s if self.drafter is not None else found

    def step_s(self, shape: StepShape) -> Any:
        """Seconds of the whole step: the three in turn."""
        tokens, context, requests = shape.tokens, shape.context_tokens, shape.requests
        return (
            self.target_s(tokens, context, requests)
            + self.draft_s(tokens, context, requests, shape.k)
            + self.overhead_s(requests, shape.k)
        )

    def _pass_s(
        self, model: Model, tokens: Any, sampled: Any, context_tokens: Any, requests: Any
    ) -> Any:
        drafts = model is self.drafter
        split = self.drafter_tensor_parallel if drafts else self.tensor_parallel
        gpu, eff = self.gpu, self.efficiency
        largest = self.overheads.graph_tokens
        launched = drafts or tokens > largest
        tokens = graph_tokens(tokens, largest)
        weights = model.read_parameters(tokens) * model.weight_bits / 8 / split
        memory_s = weights / (eff.bandwidth * gpu.bandwidth_bytes_per_s)
        products = 2 * (model.active_body * tokens + model.head * sampled) / split
        compute_s = products / (eff.flops * self._flops(model))
        n = eff.overlap
        linear_s = (memory_s**n + compute_s**n) ** (1 / n)
        cache = model.kv_bytes(context_tokens, requests, split)
        cache_s = cache / (eff.kv_bandwidth * gpu.bandwidth_bytes_per_s)
        gpu_s = linear_s + cache_s + self._communication_s(model, tokens, split)
        return _larger(gpu_s, launched * model.layers * self.overheads.launch_layer_s)

    def _flops(self, model: Model) -> float:
        faster = self.gpu.fp8_flops or self.gpu.int8_flops
        return faster if model.flops_bits == 8 and faster else self.gpu.bf16_flops

    def _communication_s(self, model: Model, tokens: Any, split: int) -> Any:
        if split == 1:
            return 0.0
        eff = self.efficiency
        message = 2 * (split - 1) / split * tokens * model.hidden_size * 2
        moved_s = message / (eff.link * self.gpu.link_bytes_per_s)
        return 2 * model.layers * (eff.all_reduce_s + moved_s)


def roofline(
    target: Checkpoint,
    gpu: Gpu,
    *,
    tensor_parallel: int = 1,
    speculation: Speculation | None = None,
    draft: Checkpoint | None = None,
    version: tuple[int, ...] = (0, 33, 0),
    efficiency: Efficiency | None = None,
    overheads: Overheads | None = None,
) -> RooflineCosts:
    """The costs of serving ``target`` with ``speculation`` on ``tensor_parallel`` of ``gpu``.

    ``draft`` is the draft model's checkpoint, which draft_model needs; EAGLE and MTP heads follow
    from the target's shape, lookup methods have none. The draft runs on as many GPUs as
    ``speculation.options`` say, by default the target's. Raises InputError for a draft model
    without a checkpoint.
    """
    method = speculation.method if speculation is not None else ""
    drafter = None
    if method == "draft_model":
        if draft is None:
            raise InputError(
                "A draft model's cost needs its checkpoint.", "Name the draft: --draft MODEL."
            )
        drafter = model_of(draft)
    elif method in ("eagle", "mtp"):
        drafter = eagle_head(target)
    elif method == "eagle3":
        drafter = eagle_head(target, draft_vocabulary=min(32_000, target.vocab_size))
    options = speculation.options if speculation is not None else {}
    return RooflineCosts(
        target=model_of(target),
        gpu=gpu,
        tensor_parallel=tensor_parallel,
        efficiency=efficiency or efficiency_of(gpu),
        overheads=overheads or overheads_of(version),
        method=method,
        drafter=drafter,
        drafter_tensor_parallel=int(options.get("draft_tensor_parallel_size", tensor_parallel)),
    )
