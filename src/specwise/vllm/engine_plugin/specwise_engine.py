"""Two repairs of vLLM's CPU build, applied by vLLM itself when it loads its general plugins.

On the CPU vLLM replaces its Triton kernels by functions of `vllm/utils/cpu_triton_utils.py`, which
every worker registers after it has loaded the plugins. Each repair swaps such a function before
that, in the versions it was tested on, and says in the server's log that it did, or why not.
The environment variable SPECWISE_ENGINE_REPAIRS lists the repairs to apply: "none", or any of
"sampling,synthetic" (the default). This file runs inside the engine's Python, without specwise.
"""

# ruff: noqa: PLR0917  (vLLM passes the arguments of a kernel by position)
from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.utils import cpu_triton_utils

import vllm

# vLLM configures the handlers of the logger "vllm" and its children only.
logger = init_logger("vllm.specwise_engine")

SWITCH = "SPECWISE_ENGINE_REPAIRS"
TESTED_VERSIONS = ("0.32.0",)


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


def _apply(repair: str, swap: Callable[[], None]) -> None:
    reason = _reason_not_to_apply(repair)
    if reason is None:
        swap()
        logger.info("specwise repair '%s' applied", repair)
    else:
        logger.info("specwise repair '%s' not applied: %s", repair, reason)


def _reason_not_to_apply(repair: str) -> str | None:
    wanted = os.environ.get(SWITCH, "sampling,synthetic")
    version = vllm.__version__.partition("+")[0]
    if repair not in (name.strip() for name in wanted.split(",")):
        return f"{SWITCH}={wanted}"
    if version not in TESTED_VERSIONS:
        return f"tested on vLLM {', '.join(TESTED_VERSIONS)}, this is {version}"
    if not current_platform.is_cpu():
        return "this is not the CPU platform"
    if HAS_TRITON:
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
