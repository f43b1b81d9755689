"""Whole answers of vLLM's OpenAI endpoints as token ids and logprobs: bodies out, tokens in.

Written against vLLM 0.32 (``entrypoints/openai/{completion,chat_completion}/serving.py``).
``return_token_ids`` came with 0.10.2 and leaves speculation on. Logprobs do not: from 0.11.1 to
0.13 a request that wants them is served without drafts (vLLM issue 34497), and earlier V1 releases
have none for a speculating server. So outputs are asked for as ids, and logprobs by other requests,
which read a finished output as a prompt (``prompt_logprobs``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specwise.domain import Api

TOP_LOGPROBS = 5
_AS_ID = "token_id:"

Logprobs = tuple[Mapping[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One choice: its token ids (the end token among them) and what was said beside them.

    ``logprobs`` maps the likeliest token ids at each position, and the one chosen, to nats; empty
    where none were asked for. ``prompt_tokens`` are the prompt's ids, empty if not given.
    """

    tokens: tuple[int, ...]
    logprobs: Logprobs = ()
    prompt_tokens: tuple[int, ...] = ()


def generate_body(
    api: Api,
    *,
    model: str,
    prompt: str | Sequence[Mapping[str, str]],
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    samples: int = 1,
    logprobs: bool = False,
) -> dict[str, Any]:
    """A request for ``samples`` outputs as token ids."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "n": samples,
        "return_token_ids": True,
    }
    body |= {"messages": list(prompt)} if api is Api.CHAT else {"prompt": prompt}
    if logprobs:
        chat = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        body |= chat if api is Api.CHAT else {"logprobs": TOP_LOGPROBS}
        body["return_tokens_as_token_ids"] = True
    return body


def score_body(*, model: str, tokens: Sequence[int]) -> dict[str, Any]:
    """A request, for the completions endpoint, for the logprobs of ``tokens`` read as a prompt."""
    return {
        "model": model,
        "prompt": list(tokens),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": TOP_LOGPROBS,
    }


def parse_outputs(answer: Mapping[str, Any]) -> tuple[TokenOutput, ...]:
    """The choices of an answer in their order; ValueError if it has no token ids."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return tuple(_output(choice, answer.get("prompt_token_ids")) for choice in choices)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the answer holds no token ids") from error


def parse_scores(answer: Mapping[str, Any], prompt_tokens: int) -> Logprobs:
    """Logprobs of the tokens after the first ``prompt_tokens``; ValueError if there are none."""
    try:
        positions = answer["choices"][0]["prompt_logprobs"][prompt_tokens:]
        return tuple(
            {int(token): float(value["logprob"]) for token, value in position.items()}
            for position in positions
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("the answer holds no logprobs of its prompt") from error


def _output(choice: Mapping[str, Any], prompt_tokens: Sequence[int] | None) -> TokenOutput:
    given = choice.get("logprobs") or {}
    logprobs: Logprobs = ()
    if given.get("content"):  # chat
        logprobs = tuple(
            {_id(entry["token"]): float(entry["logprob"]) for entry in [*at["top_logprobs"], at]}
            for at in given["content"]
        )
    elif given.get("top_logprobs"):  # completions
        logprobs = tuple(
            {_id(token): float(value) for token, value in at.items()}
            for at in given["top_logprobs"]
        )
    return TokenOutput(
        tokens=tuple(int(token) for token in choice["token_ids"]),
        logprobs=logprobs,
        prompt_tokens=tuple(prompt_tokens or choice.get("prompt_token_ids") or ()),
    )


def _id(token: str) -> int:
    return int(token.removeprefix(_AS_ID))
