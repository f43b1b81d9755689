"""Four repairs of vLLM's CPU build, applied by vLLM itself when it loads its general plugins.

On the CPU vLLM replaces its Triton kernels by functions of `vllm/utils/cpu_triton_utils.py`, which
every worker registers after it has loaded the plugins. Two repairs swap such a function before
that; two give quantised weights a product where vLLM has no kernel, or takes the wrong one. Each
applies to the versions it was tested on, and says in the server's log that it did, or why not.
The environment variable SPECWISE_ENGINE_REPAIRS lists the repairs to apply: "none", or any of
"sampling,synthetic,int4,int8" (the default). This file runs inside the engine's Python, without
specwise.
"""

# ruff: noqa: PLR0917  (vLLM passes the arguments of a kernel by position)
from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils

import vllm

# vLLM configures the handlers of the logger "vllm" and its children only.
logger = init_logger("vllm.specwise_engine")

SWITCH = "SPECWISE_ENGINE_REPAIRS"
TESTED_VERSIONS = ("0.32.0",)
HALVES = (torch.bfloat16, torch.float16)


def repair_sampling() -> None:
    """Let temperature, top-p and top-k reach the rejection sampler.

    vLLM 0.32 copies the expanded values into a temporary when they are not int64, and drops it:
    the sampler then reads uninitialised memory (vLLM issue 55005).
    """
    _apply("sampling", _swap_expand)


def allow_synthetic_acceptance() -> None:
    """Accept drafts at the rates of ``rejection_sample_method: synthetic``.

    vLLM 0.32 takes the option and then stops the engine at the first request, because its CPU
    kernels lack that mode.
    """
    _apply("synthetic", _swap_rejection)


def serve_int4() -> None:
    """Let W4A16 checkpoints be served in float32, and on processors without AVX-512.

    vLLM 0.32 has a CPU kernel for them in bfloat16 and float16 only, and only in its AVX-512
    builds; elsewhere such a server dies at its first request. Here their weights are dequantised
    once, when they are loaded, and multiplied as they are then: the same function, at the price in
    memory and time of a model that is not quantised.
    """
    _apply("int4", _swap_int4)


def serve_int8() -> None:
    """Let W8A8 checkpoints be served in float32 on processors with AMX.

    There vLLM 0.32 takes an AMX kernel by the weights' type alone. That kernel wants activations of
    16 bits, so a float32 server dies at its first request; oneDNN's, which every other processor
    gets, takes them.
    """
    _apply("int8", _swap_int8)


def _apply(repair: str, swap: Callable[[], None]) -> None:
    reason = _reason_not_to_apply(repair)
    if reason is None:
        swap()
        logger.info("specwise repair '%s' applied", repair)
    else:
        logger.info("specwise repair '%s' not applied: %s", repair, reason)


def _reason_not_to_apply(repair: str) -> str | None:
    wanted = os.environ.get(SWITCH, "sampling,synthetic,int4,int8")
    version = vllm.__version__.partition("+")[0]
    if repair not in (name.strip() for name in wanted.split(",")):
        return f"{SWITCH}={wanted}"
    if version not in TESTED_VERSIONS:
        return f"tested on vLLM {', '.join(TESTED_VERSIONS)}, this is {version}"
    if not current_platform.is_cpu():
        return "this is not the CPU platform"
    if HAS_TRITON and repair in ("sampling", "synthetic"):
        return "Triton runs these kernels itself"
    return None


def _swap_expand() -> None:
    cpu_triton_utils._expand_kernel_impl = expand


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: float,
    replace_to: float,
    max_tokens: int | None = None,  # noqa: ARG001  (the kernel's compile-time bound)
) -> None:
    """Write each request's value once per draft token, ``replace_from`` turned to ``replace_to``.

    ``values`` and ``ends`` have one entry a request, ``ends`` cumulative draft counts; ``output``
    one entry a draft token.
    """
    counts = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.long))
    replaced = torch.where(values == replace_from, replace_to, values).to(output.dtype)
    output.copy_(replaced.repeat_interleave(counts))


def _swap_rejection() -> None:
    greedy_kernel = cpu_triton_utils._rejection_greedy_sample_kernel_impl
    random_kernel = cpu_triton_utils._rejection_random_sample_kernel_impl

    # The parameters keep the order of the kernels: vLLM passes them by position.
    def greedy(
        output: torch.Tensor,
        ends: torch.Tensor,
        drafts: torch.Tensor,
        target_argmax: torch.Tensor,
        bonus: torch.Tensor,
        is_greedy: torch.Tensor | None,
        max_spec_len: int,
        uniform: torch.Tensor | None = None,
        rates: torch.Tensor | None = None,
        synthetic: bool = False,
    ) -> None:
        if not synthetic or uniform is None or rates is None:
            greedy_kernel(output, ends, drafts, target_argmax, bonus, is_greedy, max_spec_len)
            return
        rows = torch.ones(len(ends), dtype=torch.bool) if is_greedy is None else is_greedy
        accept_at_rates(output, ends, drafts, target_argmax, bonus, rows, uniform, rates)

    def random(
        output: torch.Tensor,
        ends: torch.Tensor,
        drafts: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_probs: torch.Tensor,
        bonus: torch.Tensor,
        recovered: torch.Tensor,
        uniform: torch.Tensor,
        is_greedy: torch.Tensor,
        max_spec_len: int,
        vocab_size: int,
        rates: torch.Tensor | None = None,
        no_draft_probs: bool = False,
        synthetic: bool = False,
    ) -> None:
        if not synthetic or rates is None:
            random_kernel(
                *(output, ends, drafts, draft_probs, target_probs, bonus, recovered),
                *(uniform, is_greedy, max_spec_len, vocab_size, None, no_draft_probs),
            )
            return
        accept_at_rates(output, ends, drafts, recovered, bonus, ~is_greedy, uniform, rates)

    cpu_triton_utils._rejection_greedy_sample_kernel_impl = greedy
    cpu_triton_utils._rejection_random_sample_kernel_impl = random


def accept_at_rates(
    output: torch.Tensor,
    ends: torch.Tensor,
    drafts: torch.Tensor,
    fallback: torch.Tensor,
    bonus: torch.Tensor,
    rows: torch.Tensor,
    uniform: torch.Tensor,
    rates: torch.Tensor,
) -> None:
    """Accept draft i of a request with the conditional probability ``rates[i]``.

    The first rejected draft becomes its ``fallback`` token; where none is rejected the ``bonus``
    token follows. ``output`` is (requests, longest draft + 1) and only ``rows`` of it are written;
    ``drafts``, ``fallback`` and ``uniform`` have one entry a draft token; a draft of -1 is padding
    and is rejected. Tokens after the rejected one keep what ``output`` held.
    """
    thresholds = rates.tolist()
    for row, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if not rows[row]:
            continue
        accepted = 0
        draws, tokens = uniform[start:end].tolist(), drafts[start:end].tolist()
        while accepted < end - start and draws[accepted] < thresholds[accepted]:
            if tokens[accepted] < 0:
                break
            accepted += 1
        last = bonus[row, 0] if accepted == end - start else fallback[start + accepted]
        output[row, :accepted] = drafts[start : start + accepted]
        output[row, accepted] = last


def _swap_int4() -> None:
    load, multiply = (
        CPUWNA16LinearKernel.process_weights_after_loading,
        CPUWNA16LinearKernel.apply_weights,
    )

    def process_weights_after_loading(self: CPUWNA16LinearKernel, layer: torch.nn.Module) -> None:
        if self.config.zero_points or _has_int4_kernel(self.config.act_type):
            load(self, layer)
            return
        logger.info_once("specwise: 4-bit weights are dequantised and served as floats")
        packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        by_input = packed.data.t() if packed.input_dim == 1 else packed.data
        by_group = scales.data.t() if scales.output_dim == 0 else scales.data
        values = unpack_quantized_values_into_int32(by_input, self.config.weight_type, 0)
        layer.specwise_weight = dequantise(values - self.config.weight_type.bias, by_group)
        packed.data = packed.data.new_empty(0)

    def apply_weights(
        self: CPUWNA16LinearKernel,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight = getattr(layer, "specwise_weight", None)
        if weight is None:
            return multiply(self, layer, x, bias)
        return torch.nn.functional.linear(x, weight, bias)

    CPUWNA16LinearKernel.process_weights_after_loading = process_weights_after_loading
    CPUWNA16LinearKernel.apply_weights = apply_weights


def _swap_int8() -> None:
    load = CPUInt8ScaledMMLinearKernel.process_weights_after_loading

    def process_weights_after_loading(
        self: CPUInt8ScaledMMLinearKernel, layer: torch.nn.Module
    ) -> None:
        # vLLM loads a model with its dtype as torch's default.
        if torch.get_default_dtype() in HALVES:
            load(self, layer)
        else:
            self.linear_method = self._apply_weights_onednn
            self.process_weights_for_onednn(layer)

    CPUInt8ScaledMMLinearKernel.process_weights_after_loading = process_weights_after_loading


def _has_int4_kernel(dtype: torch.dtype) -> bool:
    """Whether this build multiplies 4-bit weights by activations of ``dtype``."""
    return dtype in HALVES and hasattr(torch.ops._C, "cpu_gemm_wna16")


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights [out, in] from integers [in, out] and scales [groups, out], in the scales' dtype."""
    group = values.size(0) // scales.size(0)
    return (values.to(scales.dtype) * scales.repeat_interleave(group, 0)).t().contiguous()
