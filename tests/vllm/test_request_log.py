from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from specwise.vllm.request_log import LoggedRequest, RequestLog, looks_like_request_log

SAMPLING = (
    "SamplingParams(n=1, presence_penalty=0.0, repetition_penalty=1.0, temperature=0.7, top_p=0.95,"
    " top_k=0, seed=None, stop=[], max_tokens=100, min_tokens=0, structured_outputs=None)"
)
PARAMS = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 100.0}


def requests(*lines: str) -> list[LoggedRequest]:
    return list(RequestLog(lambda: lines).requests())


def test_the_line_of_each_generation_gives_the_prompt_and_its_sampling() -> None:
    v02 = (
        "INFO 01-02 async_llm_engine.py:379] Received request cmpl-1: prompt: 'a \\'b\\'', "
        f"sampling_params: {SAMPLING}, prompt_token_ids: None, lora_request: None."
    )
    v06 = (
        'INFO 10-01 18:43:28 logger.py:36] Received request cmpl-2-0: prompt: "it\'s", params: '
        f"{SAMPLING}, prompt_token_ids: [6526, 349], lora_request: None, "
        "prompt_adapter_request: None."
    )
    v11 = (
        "\x1b[1;36m(APIServer pid=9)\x1b[0;0m INFO 08-13 11:33:33 [logger.py:41] Received request "
        "chatcmpl-3: prompt: '<|im_start|>user\\nhi<|im_end|>', params: "
        f"{SAMPLING}, prompt_token_ids: None, prompt_embeds shape: None, lora_request: None."
    )
    found = requests(v02, "INFO:  ::1:51372 - POST /v1/completions 200 OK", v06, v11)
    assert [(r.request_id, r.prompt) for r in found] == [
        ("cmpl-1", "a 'b'"),
        ("cmpl-2-0", "it's"),
        ("chatcmpl-3", "<|im_start|>user\nhi<|im_end|>"),
    ]
    assert all(r.params == PARAMS for r in found)


def test_details_at_debug_are_joined_to_the_parameters_that_follow() -> None:
    log = RequestLog(
        lambda: (
            "DEBUG [logger.py:50] Request a details: prompt: 'one', prompt_token_ids: [1, 2], "
            "prompt_embeds shape: None.",
            f"INFO [logger.py:60] Received request a: params: {SAMPLING}, lora_request: None.",
            "DEBUG [logger.py:50] Request b details: prompt: 'two', prompt_token_ids: [3].",
        )
    )
    assert list(log.requests()) == [
        LoggedRequest("a", prompt="one", params=PARAMS),
        LoggedRequest("b", prompt="two"),
    ]
    assert log.without_prompt == 0


def test_requests_without_a_prompt_are_counted_not_returned() -> None:
    log = RequestLog(
        lambda: (
            f"INFO Received request a: params: {SAMPLING}, lora_request: None.",
            f"INFO Received request b: prompt: None, params: {SAMPLING}, prompt_token_ids: [1].",
        )
    )
    assert list(log.requests()) == []
    assert log.without_prompt == 2


def test_embeddings_are_no_generations() -> None:
    pooling = "params: PoolingParams(dimensions=None), lora_request: None."
    log = RequestLog(
        lambda: (
            f"INFO Received request embd-1: prompt: 'text', {pooling}",
            "DEBUG Request embd-2 details: prompt: 'text', prompt_token_ids: [1].",
            f"INFO Received request embd-2: {pooling}",
        )
    )
    assert (list(log.requests()), log.without_prompt) == ([], 0)


def test_whole_json_bodies_win_over_the_rendered_prompt() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi {x}"}], "temperature": 0.3}
    log = RequestLog(
        lambda: (
            f"DEBUG Request N/A JSON body: {json.dumps(body)}",
            "DEBUG Request N/A JSON body: " + json.dumps(body)[:20],
            f"INFO Received request a: prompt: '<user>hi', params: {SAMPLING}, lora_request: None.",
        )
    )
    assert list(log.requests()) == [LoggedRequest("N/A", body=body)]
    assert log.cut == 1


def test_a_structured_log() -> None:
    message = f"Received request a: prompt: 'one', params: {SAMPLING}, lora_request: None."
    (found,) = requests(json.dumps({"levelname": "INFO", "message": message}))
    assert (found.prompt, found.params) == ("one", PARAMS)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_survives(prompt: str) -> None:
    (found,) = requests(
        f"INFO Received request x: prompt: {prompt!r}, params: {SAMPLING}, a: None."
    )
    assert (found.prompt, found.params) == (prompt, PARAMS)


def test_what_is_no_request_log() -> None:
    assert not looks_like_request_log(["Received request from a friend: prompt reply", "{}"])
    assert looks_like_request_log(["x Request abc details: prompt: None, prompt_token_ids: [1]"])
