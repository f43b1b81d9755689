"""Run by `idle_price.py` in the engine's environment: decodes in one process and times its steps.

    python idle_steps.py MODEL DRAFT BATCHES

DRAFT may be empty: no speculation. Prints a line of JSON per batch size: requests, seconds of a
step in which all of them decode, and the seconds of it that go to drafting and to sampling;
medians over the steps.
"""

import json
import sys
import time
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm import LLM, SamplingParams

TOKENS, PROMPT_TOKENS = 40, 120


class Step(NamedTuple):
    """When a step of the model began, what it computed, and the seconds of its parts so far."""

    began_s: float
    tokens: int
    spent_s: dict[str, float]


STEPS: list[Step] = []
PARTS = ("sample_tokens", "propose_draft_token_ids")


def record_steps() -> None:
    """Have every step of the model runner and its parts be timed into `STEPS`."""
    execute = GPUModelRunner.execute_model

    def step(self: object, scheduled: object, *args: object, **kwargs: object) -> object:
        tokens = scheduled.total_num_scheduled_tokens
        STEPS.append(Step(time.perf_counter(), tokens, dict.fromkeys(PARTS, 0.0)))
        return execute(self, scheduled, *args, **kwargs)

    GPUModelRunner.execute_model = step
    for name in PARTS:
        setattr(GPUModelRunner, name, timed(name))


def timed(name: str) -> object:
    """The model runner's method of that name, which adds its seconds to the step's."""
    original = getattr(GPUModelRunner, name)

    def run(*args: object, **kwargs: object) -> object:
        began_s = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            STEPS[-1].spent_s[name] += time.perf_counter() - began_s

    return run


def main(model: str, draft: str, batches: list[int]) -> None:
    """Load the engine, then decode each batch once to warm up and once to be timed."""
    speculation = {
        "method": "draft_model",
        "model": draft,
        "num_speculative_tokens": 1,
        "num_speculative_tokens_per_batch_size": [[1, 1024, 0]],
    }
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=64,
        enforce_eager=True,
        **({"speculative_config": speculation} if draft else {}),
    )
    record_steps()
    rng = np.random.default_rng(1)
    for batch in batches:
        for tokens in (2, TOKENS):
            prompts = [
                {"prompt_token_ids": rng.integers(10, 4000, PROMPT_TOKENS).tolist()}
                for _ in range(batch)
            ]
            STEPS.clear()
            sampling = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True)
            llm.generate(prompts, sampling, use_tqdm=False)
        decoding = [
            (after.began_s - step.began_s, step.spent_s)
            for step, after in pairwise(STEPS)
            if step.tokens == after.tokens == batch
        ]
        step_s = median(seconds for seconds, _ in decoding)
        sampling_s, drafting_s = (median(spent[name] for _, spent in decoding) for name in PARTS)
        parts = (step_s, drafting_s, sampling_s - drafting_s)
        print(json.dumps([batch, *parts]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(batch) for batch in sys.argv[3].split(",")])
