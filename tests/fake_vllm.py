"""A server that answers like vLLM with a known truth: step times and acceptance are configured.

Each request advances by steps of its own: a step takes ``step_s(running)`` and emits one token, or
1 + accepted tokens when the server speculates. So the true speedup at concurrency c is
E[tokens a step] * baseline.step_s(c) / speculative.step_s(c).
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class FakeVllm:
    """A context manager; ``url`` is where it listens. ``conditional`` () means no speculation."""

    step_s: Callable[[int], float] = lambda _running: 0.005
    conditional: tuple[float, ...] = ()
    model: str = "fake"
    version: str = "0.32.0"
    api_key: str | None = None
    per_request_metrics: bool = True
    fail_status: int | None = None
    more_metrics: Callable[[FakeVllm], str] = lambda _server: ""
    seed: int = 1
    port: int = 0
    goes_at: int | None = None  # the request whose arrival ends the server
    bodies: list[dict[str, object]] = field(default_factory=list)
    running: int = 0
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeVllm:
        ready = threading.Event()
        self._rng = random.Random(self.seed)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self.join()

    def join(self) -> None:
        self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._authorise])
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        runner = web.AppRunner(app, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _authorise(self, request: web.Request, handler):  # type: ignore[no-untyped-def]
        wanted = f"Bearer {self.api_key}"
        if (
            self.api_key
            and request.path.startswith("/v1")
            and request.headers.get("Authorization") != wanted
        ):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model, "max_model_len": 2048}]})

    def _count(self, name: str, amount: int) -> None:
        self.counters[name] = self.counters.get(name, 0) + amount

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _metrics(self, _: web.Request) -> web.Response:
        label = f'{{engine="0",model_name="{self.model}"}}'
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{label} {self.running}",
            "# TYPE vllm:kv_cache_usage_perc gauge",
            f"vllm:kv_cache_usage_perc{label} {self.running / 100}",
            "# TYPE vllm:prefix_cache_queries counter",
            f"vllm:prefix_cache_queries_total{label} 0",
            "# TYPE vllm:generation_tokens counter",
            f"vllm:generation_tokens_total{label} {self.counters.get('generation_tokens', 0)}",
        ]
        if self.conditional:
            for name in (
                "spec_decode_num_drafts",
                "spec_decode_num_draft_tokens",
                "spec_decode_num_accepted_tokens",
            ):
                lines.append(f"# TYPE vllm:{name} counter")
                lines.append(f"vllm:{name}_total{label} {self.counters.get(name, 0)}")
            lines.append("# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter")
            for position in range(len(self.conditional)):
                value = self.counters.get(f"pos{position}", 0)
                lines.append(
                    "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                    f'{{engine="0",model_name="{self.model}",position="{position}"}} {value}'
                )
        return web.Response(text="\n".join(lines) + "\n" + self.more_metrics(self))

    def _accepted(self) -> int:
        for position, probability in enumerate(self.conditional):
            if self._rng.random() >= probability:
                return position
            self._count(f"pos{position}", 1)
        return len(self.conditional)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        last = len(self.bodies) == self.goes_at
        if last:
            self._stop.set()
        if body.get("model") != self.model:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if self.fail_status:
            return web.json_response(
                {"error": {"message": "made to fail"}}, status=self.fail_status
            )
        chat = request.path.endswith("chat/completions")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if last:
            response.force_close()  # "Connection: close": the next request needs a new one
        await response.prepare(request)
        wanted, sent, histogram = int(body["max_tokens"]), 0, [0] * (len(self.conditional) + 1)

        async def send(choices: list[object], **more: object) -> None:
            usage = {"prompt_tokens": 9, "completion_tokens": sent, "total_tokens": 9 + sent}
            event = {"choices": choices, "usage": usage, **more}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        self.running += 1
        try:
            if chat:
                await send([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            while sent < wanted:
                await asyncio.sleep(self.step_s(self.running))
                emitted = 1
                if self.conditional and sent:
                    accepted = self._accepted()
                    histogram[accepted] += 1
                    emitted += accepted
                    self._count("spec_decode_num_drafts", 1)
                    self._count("spec_decode_num_draft_tokens", len(self.conditional))
                    self._count("spec_decode_num_accepted_tokens", accepted)
                emitted = min(emitted, wanted - sent)
                sent += emitted
                self._count("generation_tokens", emitted)
                text = "w " * emitted
                reason = "length" if sent == wanted else None
                delta = {"delta": {"content": text}} if chat else {"text": text}
                await send([{"index": 0, "finish_reason": reason, **delta}])
            await send([], **self._per_request(histogram))
            await response.write(b"data: [DONE]\n\n")
        except ConnectionResetError:
            pass  # the client left, or this server is being stopped
        finally:
            self.running -= 1
        return response

    def _per_request(self, histogram: list[int]) -> dict[str, object]:
        if not (self.conditional and self.per_request_metrics):
            return {}
        steps = sum(histogram)
        accepted = sum(i * n for i, n in enumerate(histogram))
        return {
            "metrics": {
                "speculative_decoding": {
                    "num_spec_steps": steps,
                    "num_draft_tokens": steps * len(self.conditional),
                    "num_accepted_draft_tokens": accepted,
                    "num_spec_tokens": len(self.conditional),
                    "acceptance_histogram": histogram,
                    "mean_acceptance_length": 1 + accepted / steps if steps else None,
                    "draft_acceptance_rate": None,
                }
            }
        }
