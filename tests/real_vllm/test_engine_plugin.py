"""The repairs of the CPU build: their arithmetic, and what they change in a real server."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from specwise.vllm import metrics
from specwise.vllm.server import Server

# Runs in the engine's Python, which has torch and vLLM: each repair against the plain rule.
ARITHMETIC = """
import torch, specwise_engine as plugin
generator = torch.Generator().manual_seed(7)
for trial in range(200):
    requests = int(torch.randint(1, 6, (1,), generator=generator))
    counts = torch.randint(0, 4, (requests,), generator=generator)
    ends = counts.cumsum(0).to(torch.int32)
    total = int(counts.sum())
    owner = [r for r in range(requests) for _ in range(int(counts[r]))]

    for dtype in (torch.float32, torch.int32, torch.int64):
        values = torch.randint(0, 3, (requests,), generator=generator).to(dtype)
        output = torch.full((total,), -7).to(dtype)
        plugin.expand(output, values, ends, 0, 1)
        assert output.tolist() == [float(values[r]) or 1.0 for r in owner]

    drafts = torch.randint(-1, 9, (total,), generator=generator, dtype=torch.int32)
    fallback = torch.arange(100, 100 + total)
    bonus = torch.arange(200, 200 + requests)[:, None]
    uniform = torch.rand(total, generator=generator, dtype=torch.float64)
    rates = torch.tensor([0.9, 0.6, 0.5])
    rows = torch.rand(requests, generator=generator) < 0.7
    output = torch.full((requests, 4), -1, dtype=torch.int32)
    plugin.accept_at_rates(output, ends, drafts, fallback, bonus, rows, uniform, rates)
    start = 0
    for r in range(requests):
        expected, rejected = [], False
        for i in range(int(counts[r])):
            at = start + i
            rejected = not (uniform[at] < rates[i] and drafts[at] >= 0)
            expected.append(int(fallback[at] if rejected else drafts[at]))
            if rejected:
                break
        start += int(counts[r])
        if not rejected:
            expected.append(int(bonus[r, 0]))
        expected = expected if rows[r] else []
        assert output[r].tolist() == expected + [-1] * (4 - len(expected))
print("agrees")
"""


def test_the_repairs_compute_what_the_kernels_should(engine_python: Path) -> None:
    result = subprocess.run(
        [engine_python, "-c", ARITHMETIC], capture_output=True, text=True, check=False
    )
    assert result.stdout.endswith("agrees\n"), result.stderr


def test_the_log_says_which_repairs_the_worker_has(drafting_server: Server, logs: Path) -> None:
    log = (logs / "draft_model.log").read_text().splitlines()
    said = [line for line in log if "Worker" in line and "specwise repair" in line]
    assert [line.partition("specwise ")[2] for line in said] == [
        "repair 'sampling' applied",
        "repair 'synthetic' applied",
        "repair 'int4' applied",
        "repair 'int8' applied",
    ]


def _complete(server: Server, **options: Any) -> list[dict[str, Any]]:
    body = {"model": server.model, "prompt": "The ", "ignore_eos": True} | options
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300, trust_env=False)
    response.raise_for_status()
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def _sampled_tokens(server: Server) -> np.ndarray[Any, np.dtype[Any]]:
    """800 continuations of one prompt at temperature 1, as (sample, position) token texts."""

    def batch(number: int) -> list[list[str]]:
        # vLLM gives choice i the seed plus i: seeds must be further apart than n.
        choices = _complete(
            server, max_tokens=4, temperature=1.0, n=50, seed=1000 * number, logprobs=0
        )
        return [choice["logprobs"]["tokens"] for choice in choices]

    with ThreadPoolExecutor(2) as pool:
        return np.array([tokens for part in pool.map(batch, range(16)) for tokens in part])


def _excess_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Total variation distance of two samples, in standard deviations above its null mean.

    The null is made by dealing the pooled samples out anew: two samples of one distribution.
    """
    _, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    rng = np.random.default_rng(5)

    def distance(pooled: np.ndarray[Any, Any]) -> float:
        counts = [np.bincount(half, minlength=codes.max() + 1) for half in np.split(pooled, 2)]
        return float(np.abs(counts[0] - counts[1]).sum() / len(pooled))

    null = [distance(rng.permutation(codes)) for _ in range(300)]
    return float((distance(codes) - np.mean(null)) / np.std(null))


@pytest.fixture(scope="module")
def baseline_samples(baseline_server: Server) -> np.ndarray[Any, Any]:
    return _sampled_tokens(baseline_server)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_sampling_with_speculation_follows_the_target(
    baseline_samples: np.ndarray[Any, Any],
    drafting_samples: np.ndarray[Any, Any],
    position: int,
) -> None:
    """The first token is sampled without drafts; the ones after it show the rejection sampler."""
    assert _excess_distance(baseline_samples[:, position], drafting_samples[:, position]) < 4


@pytest.fixture(scope="module")
def drafting_samples(drafting_server: Server) -> np.ndarray[Any, Any]:
    return _sampled_tokens(drafting_server)


def test_without_the_repair_sampling_is_wrong(
    unrepaired_server: Server, baseline_samples: np.ndarray[Any, Any], logs: Path
) -> None:
    """What the repair is for, and proof that the test above can fail."""
    samples = _sampled_tokens(unrepaired_server)
    assert (
        "repair 'sampling' not applied: SPECWISE_ENGINE_REPAIRS=none"
        in (logs / "unrepaired.log").read_text()
    )
    assert _excess_distance(baseline_samples[:, 2], samples[:, 2]) > 10


@pytest.mark.parametrize(
    "temperatures", [[0.0], [0.8], [0.0, 0.8]], ids=["greedy", "sampled", "both in one batch"]
)
def test_synthetic_acceptance_accepts_at_the_rates_that_were_asked_for(
    synthetic_server: Server, synthetic_rates: list[float], temperatures: list[float]
) -> None:
    before = metrics.scrape(synthetic_server.url)

    def answer(temperature: float) -> None:
        # Many and short: a batch costs little more than a request.
        _complete(synthetic_server, prompt=["The "] * 80, max_tokens=48, temperature=temperature)

    with ThreadPoolExecutor() as pool:
        list(pool.map(answer, temperatures))
    time.sleep(0.5)  # the last step's counters follow the answer
    counts = metrics.acceptance_from(
        metrics.difference(before, metrics.scrape(synthetic_server.url))
    )
    assert counts is not None
    assert counts.steps > 1000
    by_accepted = counts.steps_by_accepted
    shares = [sum(by_accepted[i:]) / counts.steps for i in (1, 2, 3)]
    assert shares == pytest.approx(synthetic_rates, abs=0.05)
