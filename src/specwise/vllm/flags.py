"""vLLM's flags by version: what a configuration is called, and how to write it down."""

from __future__ import annotations

from typing import Any

from specwise.domain import Speculation


def speculative_config(speculation: Speculation) -> dict[str, Any]:
    """The value of ``--speculative-config`` as vLLM's ``SpeculativeConfig`` names its fields.

    ``options`` win nothing: a key that ``speculation`` itself sets cannot be overridden.
    """
    config: dict[str, Any] = {
        "method": speculation.method,
        "num_speculative_tokens": speculation.k,
    }
    if speculation.draft is not None:
        config["model"] = speculation.draft
    if speculation.schedule:
        config["num_speculative_tokens_per_batch_size"] = [
            list(row) for row in speculation.schedule
        ]
    for name, value in speculation.options.items():
        config.setdefault(name, value)
    return config
