"""Calibrated on the embedded engine, what does the prediction miss on what it has not seen?

    python benchmarks/prediction.py embedded

Bars: calibrated in at most two minutes with the servers up, median error of TPOT and throughput at
most 10 % over concurrencies, acceptances and k that the calibration did not see, and the crossover
within one step of a doubling ladder. Takes about eight minutes on two cores.

The calibration runs on a server with k = 4 and whatever the bundled draft accepts. Judged are a
server with k = 2 that accepts 0.8 of each position and one with k = 4 that accepts 0.45, both by
vLLM's synthetic acceptance, and the baseline, at concurrencies 1 to 32.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np

from specwise.domain import Api, Arm, Outcome, RequestRecord
from specwise.measurement.calibration import BASELINE_WAVES, SPECULATING_WAVES, observe
from specwise.measurement.design import parse_study
from specwise.measurement.fleet import Fleet
from specwise.measurement.load import PlannedRequest, Target, run_load
from specwise.prediction.fit import FittedCosts, fit_steps
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, simulate
from specwise.vllm.response import request_body

LADDER = (1, 2, 4, 8, 16, 32)
OUTPUT_TOKENS = 48
STUDY = """
schema = 1
name = "embedded"
[serve]
model = "bundled:target"
arguments = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64",
             "--enforce-eager"]
[[arm]]
name = "baseline"
[[arm]]
name = "calibrated"
speculation = { method = "draft_model", k = 4, draft = "bundled:draft" }
[[arm]]
name = "k2"
[arm.speculation]
method = "draft_model"
k = 2
draft = "bundled:draft"
[arm.speculation.options]
rejection_sample_method = "synthetic"
synthetic_acceptance_rates = [0.8, 0.64]
[[arm]]
name = "k4"
[arm.speculation]
method = "draft_model"
k = 4
draft = "bundled:draft"
[arm.speculation.options]
rejection_sample_method = "synthetic"
synthetic_acceptance_rates = [0.45, 0.2025, 0.0911, 0.0410]
[[segment]]
name = "any"
prompts = "bundled:json"
[load]
concurrency = [1]
"""
UNSEEN = {"k2": (2, 0.8), "k4": (4, 0.45)}


@dataclass(frozen=True)
class Figures:
    """Mean TPOT and output tokens per second of one trial."""

    tpot_s: float
    tokens_per_s: float


def measured(target: Target, concurrency: int, name: str) -> tuple[Figures, int]:
    """Figures of a closed loop of equal requests, and the prompts' tokens."""
    count = max(6, 2 * concurrency)
    plan = [
        PlannedRequest(
            index=index,
            prompt_id=f"{name}-{index}",
            segment="any",
            temperature=0.0,
            path="/v1/completions",
            body=request_body(
                Api.COMPLETIONS,
                model=target.model,
                prompt=f"{name} {index} " + " ".join(str((37 * i) % 100) for i in range(20)),
                max_tokens=OUTPUT_TOKENS,
                temperature=0.0,
                extra={"ignore_eos": True},
            ),
        )
        for index in range(count)
    ]
    records: list[RequestRecord] = []
    run = run_load(plan, target=target, concurrency=concurrency, part=0, on_record=records.append)
    assert all(r.outcome is Outcome.OK for r in records)
    tpots = [
        (r.finished_s - (r.first_token_s or 0.0)) / ((r.output_tokens or 0) - 1) for r in records
    ]
    tokens = sum(r.output_tokens or 0 for r in records)
    prompt = round(fmean(r.prompt_tokens or 0 for r in records))
    return Figures(fmean(tpots), tokens / run.duration_s), prompt


def predicted(costs: FittedCosts, concurrency: int, prompt: int, k: int, alpha: float) -> Figures:
    """The same closed loop, simulated."""
    requests = [
        SimRequest(prompt, OUTPUT_TOKENS, acceptance=(alpha,) * k)
        for _ in range(max(6, 2 * concurrency))
    ]
    config = SchedulerConfig(
        max_num_seqs=64, method="draft_model" if k else None, k=k, async_scheduling=False
    )
    run = simulate(requests, costs, config, rng=np.random.default_rng(1), concurrency=concurrency)
    return Figures(float(run.tpot_s.mean()), float(run.output_tokens.sum()) / run.duration_s)


def crossing(speedups: list[float]) -> int:
    """The rung of the ladder at which the speedup is first below 1; past the last if never."""
    return next((i for i, s in enumerate(speedups) if s < 1), len(speedups))


def print_embedded() -> bool:
    """Print the table; whether every bar is met."""
    design = parse_study(STUDY, name="the benchmark's study")
    arms = {arm.name: arm for arm in design.arms}
    with tempfile.TemporaryDirectory() as logs:

        def fleet(*names: str) -> Fleet:
            chosen: tuple[Arm, ...] = tuple(arms[name] for name in names)
            return Fleet(
                replace(design, arms=chosen),
                known={},
                log_path=lambda name: Path(logs) / f"{name}.log",
                on_described=lambda _: None,
                note=lambda _: None,
            )

        truth: dict[str, list[Figures]] = {}
        with fleet("baseline", "calibrated") as servers:
            servers.start()
            began = time.monotonic()
            observed = observe(servers.ready(arms["baseline"]), BASELINE_WAVES, k=None)
            observed += observe(servers.ready(arms["calibrated"]), SPECULATING_WAVES, k=4)
            took_s = time.monotonic() - began
            target = servers.ready(arms["baseline"])
            rows = [measured(target, c, f"b{c}") for c in LADDER]
            truth["baseline"], prompt = [figures for figures, _ in rows], rows[0][1]
        fit = fit_steps(observed, method="draft_model", about={})
        with fleet("k2", "k4") as servers:
            servers.start()
            for name in UNSEEN:
                target = servers.ready(arms[name])
                truth[name] = [measured(target, c, f"{name}{c}")[0] for c in LADDER]
    print(
        f"calibrated in {took_s:.0f} s beside the servers' start (bar 120); its own steps are "
        f"missed by {fit.median_error:.1%} in the median"
    )
    errors: list[float] = []
    forecast = {
        "baseline": [predicted(fit.baseline, c, prompt, 0, 0.0) for c in LADDER],
        **{
            name: [predicted(fit.candidate, c, prompt, k, alpha) for c in LADDER]
            for name, (k, alpha) in UNSEEN.items()
        },
    }
    print("arm        c   TPOT ms seen  predicted    error   tokens/s seen  predicted    error")
    for name, expected in forecast.items():
        for c, seen, guess in zip(LADDER, truth[name], expected, strict=True):
            tpot = guess.tpot_s / seen.tpot_s - 1
            rate = guess.tokens_per_s / seen.tokens_per_s - 1
            errors += [abs(tpot), abs(rate)]
            print(
                f"{name:<9}{c:>3}{1000 * seen.tpot_s:>15.1f}{1000 * guess.tpot_s:>11.1f}"
                f"{tpot:>+9.1%}{seen.tokens_per_s:>16.1f}{guess.tokens_per_s:>11.1f}{rate:>+9.1%}"
            )
    met = median(errors) <= 0.10 and took_s <= 120
    print(f"median error {median(errors):.1%} (bar 10 %)")
    for name in UNSEEN:
        found = []
        for source in (truth, forecast):
            pairs = zip(source["baseline"], source[name], strict=True)
            found.append(crossing([b.tpot_s / s.tpot_s for b, s in pairs]))
        rungs = [LADDER[i] if i < len(LADDER) else f"above {LADDER[-1]}" for i in found]
        met = met and abs(found[0] - found[1]) <= 1
        print(f"{name}: first slower than the baseline at {rungs[0]}, predicted {rungs[1]}")
    return met


if __name__ == "__main__":
    raise SystemExit(0 if print_embedded() else 1)
