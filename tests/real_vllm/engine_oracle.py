"""Run by the engine's own Python: asks vLLM about commands and KV caches, answers in JSON lines.

Standard input: {"commands": {id: [words]}, "caches": {id: [words]}}. Each command goes through
vLLM's argument parser and ``EngineArgs.create_engine_config``; each cache starts an in-process
engine with dummy weights, whose log line "KV cache size: N tokens" is the answer.
"""

import contextlib
import gc
import io
import json
import logging
import os
import re
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="auto",
)


def answer(kind, name, value):
    print("ANSWER " + json.dumps([kind, name, value]), flush=True)


def main():
    asked = json.load(sys.stdin)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm import LLM  # the engine

    def engine_args(words):
        parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
        args = parser.parse_args(words)
        args.model = args.model_tag  # as vllm/entrypoints/cli/serve.py does
        return EngineArgs.from_cli_args(args)

    for name, words in asked["commands"].items():
        refusal = None
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                engine_args(words).create_engine_config()
        except SystemExit:
            refusal = errors.getvalue().strip().splitlines()[-1]
        except Exception as error:  # noqa: BLE001 (whatever vLLM refuses with is the answer)
            refusal = f"{type(error).__name__}: {error}"[:2000]
        answer("command", name, refusal)

    lines = []

    def keep(record):
        lines.append(record.getMessage())
        return True

    # A filter, because vLLM's own set-up of logging takes handlers away again.
    logging.getLogger("vllm.v1.core.kv_cache_utils").addFilter(keep)
    from vllm.distributed import cleanup_dist_env_and_memory

    for name, options in asked["caches"].items():
        lines.clear()
        engine = None
        # An engine may stop after the line (FP8 needs AVX-512): the cache is planned before that.
        with contextlib.suppress(NotImplementedError):
            engine = LLM(load_format="dummy", enforce_eager=True, seed=0, **options)
        found = [m for m in map(re.compile(r"KV cache size: ([\d,]+) tok").search, lines) if m]
        answer("cache", name, int(found[-1][1].replace(",", "")) if found else None)
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


main()
