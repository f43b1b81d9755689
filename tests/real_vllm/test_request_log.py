"""The log of a real vLLM, read back as prompts: what was sent is what is found."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from specwise.domain import Api
from specwise.errors import PromptError
from specwise.measurement.prompt_files import read_prompts
from specwise.vllm.server import Server

TEXT = 'It\'s a "test":\n\ttab, backslash \\ and é'


def test_prompts_of_a_debug_log(synthetic_server: Server, logs: Path, tmp_path: Path) -> None:
    written = logs / "synthetic.log"
    before = written.stat().st_size
    with httpx.Client(base_url=synthetic_server.url, trust_env=False, timeout=60) as client:
        body = {"model": synthetic_server.model, "max_tokens": 2, "temperature": 0.7}
        client.post("/v1/completions", json={**body, "prompt": TEXT}).raise_for_status()
        chat = {**body, "messages": [{"role": "user", "content": TEXT}], "top_p": 0.9}
        client.post("/v1/chat/completions", json=chat).raise_for_status()
    log = tmp_path / "server.log"
    log.write_bytes(written.read_bytes()[before:])

    # The clients' own JSON bodies are in the log: exact, chat as chat.
    source = read_prompts(log)
    completion, chatted = source.prompts
    assert source.format == "vllm-log"
    assert (completion.text, completion.temperature, completion.api) == (TEXT, 0.7, Api.COMPLETIONS)
    assert (chatted.messages, chatted.top_p) == ((("user", TEXT),), 0.9)
    assert (chatted.api, chatted.max_tokens) == (Api.CHAT, 2)

    # Without them, as earlier versions log, the prompt is what the engine got.
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    rendered = tmp_path / "rendered.log"
    rendered.write_text("".join(line for line in lines if "JSON body" not in line))
    completion, chatted = read_prompts(rendered).prompts
    assert completion.text == TEXT
    assert (completion.temperature, completion.max_tokens) == (0.7, 2)
    assert chatted.text is not None
    assert TEXT in chatted.text
    assert len(chatted.text) > len(TEXT), "the chat template is in it"
    assert chatted.top_p == 0.9

    # At level INFO a log names requests and holds no prompt.
    bare = tmp_path / "bare.log"
    bare.write_text("".join(line for line in lines if "DEBUG" not in line))
    with pytest.raises(PromptError, match="2 requests without their text"):
        read_prompts(bare)
