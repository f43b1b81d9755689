"""How often `specwise verify` is right on a real vLLM: the repaired and the unrepaired CPU build.

    python benchmarks/verify.py [--repetitions 20]

Starts the bundled pair four times with the embedded engine: without speculation, with a draft
model, with a draft model and no repair of the rejection sampler (vLLM issue 55005: it samples from
the wrong distribution), and with synthetic acceptance, which is lossy by design. Then checks each
speculating server against the baseline, and the two draft models again and again. Every repetition
samples both sides anew. Prints verdicts, exact 95 % intervals of their rates, and what was seen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import beta

from specwise.analysis.losslessness import evaluate
from specwise.domain import Api, Deployment, Losslessness, LosslessnessResult, Speculation
from specwise.facts.bundled import bundled_draft, bundled_prompts, bundled_target
from specwise.measurement.load import Target
from specwise.measurement.prompts import load_prompts
from specwise.measurement.verification import (
    VerifyPlan,
    VerifyPrompt,
    ask_baseline,
    ask_candidate,
)
from specwise.reporting.losslessness import print_losslessness
from specwise.vllm.server import Server

# One check as `specwise verify` makes it, at a size that a CPU answers within a minute; then
# smaller ones of the prompts that it chose.
FIRST = VerifyPlan(
    prompts=16,
    greedy_tokens=24,
    sampling_prompts=6,
    samples=150,
    sample_tokens=5,
    effect=0.15,
    concurrency=128,
)
AGAIN = replace(
    FIRST, greedy=False, greedy_tokens=2, prompts=4, sampling_prompts=4, samples=100, effect=0.2,
    sample_tokens=4,
)  # fmt: skip


def servers(stack: ExitStack, logs: Path) -> dict[str, Server]:
    arguments = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "128")
    deployment = Deployment(str(bundled_target()), served_name="demo", arguments=arguments)
    unrepaired = replace(deployment, environment={"SPECWISE_ENGINE_REPAIRS": "none"})
    drafting = Speculation("draft_model", k=3, draft=str(bundled_draft()))
    lossy = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}
    arms = {
        "baseline": (deployment, None),
        "repaired": (deployment, drafting),
        "unrepaired": (unrepaired, drafting),
        "synthetic": (deployment, replace(drafting, options=lossy)),
    }
    started = {
        name: stack.enter_context(Server.start(*arm, log_path=logs / f"{name}.log"))
        for name, arm in arms.items()
    }
    for server in started.values():
        server.wait_ready()
    return started


def rate(count: int, of: int) -> str:
    low = beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    return f"{count} of {of} [{low:.2f}, {high:.2f}]"


def describe(name: str, results: list[LosslessnessResult]) -> None:
    verdicts = [result.verdict for result in results]
    print(f"\n{name}")
    for verdict in Losslessness:
        print(f"  {verdict.value:<10} {rate(verdicts.count(verdict), len(verdicts))}")
    sampled = [result.sampling for result in results if result.sampling]
    detectable = np.median([s.detectable or 1 for s in sampled])
    print(
        f"  power at {AGAIN.effect:g}: {min(s.power for s in sampled):.2f} or more; "
        f"smallest effect found with 0.9: {detectable:.2f}"
    )
    for number, test in enumerate(sampled[0].tests):
        p_values = [s.tests[number].p_value for s in sampled]
        low, middle, high = np.quantile(p_values, [0, 0.5, 1])
        print(f"  p of {test.name:<12} {low:.4f} to {high:.4f}, median {middle:.4f}")
    second = [s.positions[1] for s in sampled]
    print(
        f"  total variation at token 2: {min(p.distance for p in second):.3f} to "
        f"{max(p.distance for p in second):.3f}; equal servers show "
        f"{min(p.null_low for p in second):.3f} to {max(p.null_high for p in second):.3f}"
    )
    drafted = sum(result.drafted_tokens or 0 for result in results)
    print(f"  accepted {sum(r.accepted_tokens or 0 for r in results) / max(drafted, 1):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    prompts = [
        VerifyPrompt(prompt.prompt_id, Api.CHAT, prompt)
        for prompt in load_prompts("bundled:prose", Path(), bundled_prompts)[: FIRST.prompts]
    ]
    results: dict[str, list[LosslessnessResult]] = {"repaired": [], "unrepaired": []}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        began = time.monotonic()
        running = servers(stack, logs)
        print(f"four servers up after {time.monotonic() - began:.0f} s", flush=True)
        targets = {name: Target(s.url, s.model, timeout_s=300) for name, s in running.items()}
        began = time.monotonic()

        def check(
            plan: VerifyPlan, asked: list[VerifyPrompt], names: list[str]
        ) -> tuple[list[LosslessnessResult], list[str]]:
            baseline = ask_baseline(targets["baseline"], asked, plan)
            found = []
            for stream, name in enumerate(names, start=1):
                answers = ask_candidate(targets[name], asked, plan, baseline, stream=stream)
                found.append(
                    evaluate(plan, baseline, answers, arm=name, model="demo", measured_at="")
                )
            return found, list(baseline.samples)

        first, chosen = check(FIRST, prompts, ["repaired", "unrepaired", "synthetic"])
        for result in first:
            print_losslessness(result)
        print(f"\nfirst check: {time.monotonic() - began:.0f} s", flush=True)
        few = [prompt for prompt in prompts if prompt.prompt_id in chosen[: AGAIN.prompts]]
        for repetition in range(repetitions):
            found, _ = check(replace(AGAIN, seed=repetition), few, list(results))
            for result in found:
                results[result.arm].append(result)
                tests = result.sampling.tests if result.sampling else ()
                p_values = " ".join(f"{test.p_value:.4f}" for test in tests)
                took_s = time.monotonic() - began
                print(f"{repetition:2} {result.arm:<11} {result.verdict:<10} p {p_values}", end=" ")
                print(f" after {took_s:.0f} s", flush=True)
    for name, found in results.items():
        describe(name, found)


if __name__ == "__main__":
    main()
