"""A stand-in for vLLM that specwise starts itself: this Python with a package called vllm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_ENTRY_POINT = """
import argparse, json, signal, sys, time
sys.path.insert(0, {root!r})
from tests.fake_vllm import FakeVllm
options = argparse.ArgumentParser()
for name in ("--port", "--model", "--served-model-name", "--speculative-config"):
    options.add_argument(name)
asked, _ = options.parse_known_args()
k = json.loads(asked.speculative_config or "{{}}").get("num_speculative_tokens", 0)
{before}
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with FakeVllm(
    port=int(asked.port), model=asked.served_model_name, conditional={conditional},
    step_s=lambda running: {step_s},
):
    time.sleep(600)
"""


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    conditional: str,
    step_s: str,
    before: str = "",
) -> None:
    """Put the package, a model folder and 60 prompts (prompts.jsonl) into ``folder``.

    ``conditional`` (acceptance by position) and ``step_s`` are expressions over k, the draft length
    that the server was started with, and ``running``; ``before`` is a statement that runs first.
    """
    package = folder / "engine" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    root = str(Path(__file__).parents[1])
    text = _ENTRY_POINT.format(root=root, before=before, conditional=conditional, step_s=step_s)
    (package / "api_server.py").write_text(text)
    info = folder / "engine" / "vllm-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "engine"))
    (folder / "model").mkdir()
    prompts = [json.dumps({"prompt": f"say {i} words"}) for i in range(60)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts))
