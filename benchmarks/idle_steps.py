"""Run by `idle_price.py` in the engine's environment: decodes in one process and times its steps.

    python idle_steps.py MODEL DRAFT BATCHES

DRAFT may be empty: no speculation. Prints a line of JSON per batch size: requests, seconds a step,
and the seconds of it that go to drafting and to sampling.
"""

import json
import sys
import time

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm import LLM, SamplingParams

TOKENS, PROMPT_TOKENS = 40, 120


def timed(spent: dict[str, float], name: str) -> None:
    """Have every call of the model runner's method ``name`` add its seconds to ``spent``."""
    original = getattr(GPUModelRunner, name)

    def run(*args: object, **kwargs: object) -> object:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - began

    setattr(GPUModelRunner, name, run)


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
    spent = {"sample_tokens": 0.0, "propose_draft_token_ids": 0.0}
    for name in spent:
        timed(spent, name)
    rng = np.random.default_rng(1)
    for batch in batches:
        seconds = 0.0
        for tokens in (2, TOKENS):
            prompts = [
                {"prompt_token_ids": rng.integers(10, 4000, PROMPT_TOKENS).tolist()}
                for _ in range(batch)
            ]
            spent.update(dict.fromkeys(spent, 0.0))
            began = time.perf_counter()
            sampling = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True)
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
        drafting = spent["propose_draft_token_ids"]
        parts = (seconds, drafting, spent["sample_tokens"] - drafting)
        print(json.dumps([batch, *(part / TOKENS for part in parts)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(batch) for batch in sys.argv[3].split(",")])
