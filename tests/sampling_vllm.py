"""A server that samples from a language model of known truth, right or wrong on purpose.

The model is a Markov chain: the logits of a token depend on the prompt and the token before it.
Every instance has the same one, so two instances sample alike unless one is told not to.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
from aiohttp import web
from tests.fake_vllm import FakeVllm

VOCABULARY = 12
END = 0


@dataclass
class SamplingVllm(FakeVllm):
    """``FakeVllm`` for whole answers with token ids.

    ``wrong`` is the share of tokens after the first that a lossy acceptance rule replaces by the
    likeliest one (greedy: by the second likeliest). ``noise`` is the standard deviation of the
    logits' rounding, another with another ``seed``. ``peaked`` multiplies the logits. ``refuses``
    names body fields that are answered with 400, ``silent`` fields that are ignored.

    What is drawn depends on the seed, the body, and how often that body came, so on no port and on
    no order in which requests arrive.
    """

    wrong: float = 0.0
    noise: float = 1e-6
    peaked: float = 1.0
    drafts: bool = True
    refuses: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._times: Counter[int] = Counter()

    def logits(self, prompt: int, before: int, *, read: bool = False) -> np.ndarray:
        """``read`` computes them in another shape, with other rounding."""
        truth = np.random.default_rng([prompt, before]).normal(size=VOCABULARY) * 1.5 * self.peaked
        truth[END] -= 2
        rounding = np.random.default_rng([self.seed, read, prompt, before])
        return np.asarray(truth + rounding.normal(size=VOCABULARY) * self.noise)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        for name in self.refuses:
            if body.get(name):
                return web.json_response({"error": {"message": f"no {name} here"}}, status=400)
        if self.fail_status:
            return web.json_response({"error": {"message": "broken"}}, status=self.fail_status)
        chat = "messages" in body
        prompt = body["messages"] if chat else body["prompt"]
        ids = prompt if isinstance(prompt, list) and not chat else [self._id_of(prompt), 1]
        asked = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        numbers = np.random.default_rng([self.seed, asked, self._times[asked]])
        self._times[asked] += 1
        choices = []
        for index in range(1 if "n" in self.silent else body.get("n", 1)):
            tokens = self._tokens(ids, body, numbers)
            choice: dict[str, object] = {"index": index, "text": ""}
            if "return_token_ids" not in self.silent:
                choice["token_ids"] = tokens
                if not chat:
                    choice["prompt_token_ids"] = ids
            if body.get("logprobs"):
                choice["logprobs"] = self._logprobs(ids, tokens, chat)
            if body.get("prompt_logprobs"):
                choice["prompt_logprobs"] = [
                    None,
                    *(
                        {
                            str(token): {"logprob": value}
                            for token, value in self._top(ids[0], ids[i - 1], ids[i], read=True)
                        }
                        for i in range(1, len(ids))
                    ),
                ]
            choices.append(choice)
        answer: dict[str, object] = {"choices": choices[::-1]}  # order is not promised
        if chat and "return_token_ids" not in self.silent:
            answer["prompt_token_ids"] = ids
        return web.json_response(answer)

    def _id_of(self, prompt: object) -> int:
        return 1000 + zlib.crc32(repr(prompt).encode()) % 100_000

    def _tokens(self, ids: list[int], body: dict, rng: np.random.Generator) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < body["max_tokens"] and END not in tokens:
            logits = self.logits(ids[0], tokens[-1] if tokens else ids[-1])
            order = np.argsort(-logits)
            lossy = bool(tokens) and rng.random() < self.wrong
            if body["temperature"] == 0:
                tokens.append(int(order[1 if lossy else 0]))
                continue
            p = np.exp(logits / body["temperature"])
            tokens.append(int(order[0] if lossy else rng.choice(VOCABULARY, p=p / p.sum())))
        if self.conditional and self.drafts:
            self._count("spec_decode_num_draft_tokens", 3)
            self._count("spec_decode_num_accepted_tokens", 1)
        return tokens

    def _top(
        self, prompt: int, before: int, token: int, *, read: bool = False
    ) -> list[tuple[int, float]]:
        logits = self.logits(prompt, before, read=read)
        logprobs = logits - np.log(np.exp(logits).sum())
        listed = {int(i) for i in np.argsort(-logprobs)[:5]} | {token % VOCABULARY}
        return [(i, float(logprobs[i])) for i in sorted(listed)]

    def _logprobs(self, ids: list[int], tokens: list[int], chat: bool) -> dict[str, object]:
        before = [ids[-1], *tokens]
        top = [
            [(f"token_id:{i}", value) for i, value in self._top(ids[0], before[at], token)]
            for at, token in enumerate(tokens)
        ]
        if not chat:
            return {"top_logprobs": [dict(at) for at in top]}
        return {
            "content": [
                {
                    "token": f"token_id:{token}",
                    "logprob": dict(at)[f"token_id:{token}"],
                    "top_logprobs": [{"token": name, "logprob": value} for name, value in at],
                }
                for token, at in zip(tokens, top, strict=True)
            ]
        }
