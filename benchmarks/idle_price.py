"""What a server pays a step for speculation that is on but idle, and what for.

Where a schedule says k = 0 vLLM drafts nothing. It still runs the draft once a step, to keep the
draft's KV cache, and samples through the rejection sampler although there is nothing to reject
(0.32: v1/spec_decode/llm_base_proposer.py and v1/worker/gpu_model_runner.py). Each padded target of
the bundled pair decodes the same prompts at T = 0.8 in the embedded engine (`idle_steps.py`),
without speculation and with the draft idle, alternated; medians over the rounds, with their range.

    python benchmarks/idle_price.py [--rounds 3] [--batches 1,8,16,32]

"draft" and "sampling" are what these two cost more than without speculation, as shares of a step
without it: what an idle schedule loses at least. Nothing to pass: a measurement, not a bar.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median

from specwise.measurement.fleet import resolve_model
from specwise.vllm.engine import engine_python

TARGETS = ("bundled:target", "bundled:target-300m")
Parts = tuple[float, float, float]  # seconds a step: all of it, drafting, sampling


def measure(model: str, draft: str, batches: str) -> dict[int, Parts]:
    """One process of the engine: its seconds a step by batch size."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("idle_steps.py")
    done = subprocess.run(
        [str(engine_python()), str(script), model, draft, batches],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {batch: (step, drafting, sampling) for batch, step, drafting, sampling in rows}


def spread(values: list[float]) -> str:
    """Median and range of shares, in percent."""
    return f"{median(values):5.1%} [{min(values):.1%}, {max(values):.1%}]"


def main() -> None:
    """Print the price of idling of every target at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,8,16,32")
    options = parser.parse_args()
    draft = resolve_model("bundled:draft")
    for target in TARGETS:
        model = resolve_model(target)
        off, idle = [], []
        for _ in range(options.rounds):
            off.append(measure(model, "", options.batches))
            idle.append(measure(model, draft, options.batches))
        print(f"\n{target}, {options.rounds} rounds")
        print(f"{'requests':>8}  {'step off':>9}  {'draft':<22}{'sampling':<22}step idle / off")
        for batch in off[0]:
            pairs = [(a[batch], b[batch]) for a, b in zip(off, idle, strict=True)]
            step_ms = 1e3 * median(a[0] for a, _ in pairs)
            drafting = spread([b[1] / a[0] for a, b in pairs])
            sampling = spread([(b[2] - a[2]) / a[0] for a, b in pairs])
            ratios = [b[0] / a[0] for a, b in pairs]
            print(
                f"{batch:>8}  {step_ms:6.1f} ms  {drafting:<22}{sampling:<22}"
                f"{median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
            )


if __name__ == "__main__":
    main()
