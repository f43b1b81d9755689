"""The simulated engine in real time behind HTTP: it answers like vLLM, with a known truth.

Each `Twin` runs a `SimulatedEngine` on the wall clock. A step's chunks leave when the step ends by
the engine's own clock, which never waits for the wall's: a late wake-up delays chunks, not the
schedule, and is reported as lag (``/twin``, and in ``/metrics``).

Formats are those of vLLM 0.32 (``entrypoints/openai``, ``v1/metrics``) and, for ``generation =
"V0"``, of 0.6 (``engine/metrics.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from specwise.errors import InputError, ServerError
from specwise.prediction.live_request import LiveRequest
from specwise.prediction.scheduler import SimulatedEngine
from specwise.prediction.simulation import SimRequest, draw_acceptance
from specwise.prediction.truth import Fault, SegmentTruth, ServerTruth
from specwise.prediction.twin_metrics import TwinMetrics

# A timer of the event loop fires up to 1 ms late: the rest of a wait is slept through, which is
# exact to some 0.1 ms.
_TIMER_S = 0.0012
_RECENT_STEPS = 4096
_CLOSING_S = 0.01  # aiohttp takes 0 for no limit
_TEXT = (
    "the step of a draft is verified in one pass and each token that holds is kept while the "
    "first that fails is drawn anew so that nothing of the answer changes but its time"
)
_WORDS = _TEXT.split()
_DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class _Stream:
    """A request between the engine and its connection."""

    live: LiveRequest
    acceptance: tuple[float, ...]
    steps: deque[int] = field(default_factory=deque)  # tokens of chunks not sent yet
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request's body, as far as the twin cares."""

    chat: bool
    stream: bool
    usage: bool
    running_usage: bool
    prompt: str
    prompt_tokens: int
    max_tokens: int | None
    temperature: float
    seed: int | None
    segment: SegmentTruth


class _RefusedError(Exception):
    """The request gets an error instead of an answer."""

    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Lag:
    """How late chunks left, over the latest steps (p50, p99) and all (max), in seconds."""

    steps: int
    p50_s: float
    p99_s: float
    max_s: float


class Twin:
    """One server of a truth file. ``url`` is where it listens once it has started."""

    def __init__(self, truth: ServerTruth, *, host: str = "127.0.0.1") -> None:
        self.truth = truth
        self.host = host
        self.port = truth.port
        self._steps = 0
        self._lags: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._worst_s = 0.0
        self._asked = 0
        self._begin()

    @property
    def url(self) -> str:
        """Base address, e.g. ``http://127.0.0.1:8100``."""
        return f"http://{self.host}:{self.port}"

    def lag(self) -> Lag:
        """How far the twin fell behind its own schedule so far."""
        if not self._lags:
            return Lag(0, 0.0, 0.0, 0.0)
        p50, p99 = np.percentile(np.array(self._lags), (50, 99)).tolist()
        return Lag(self._steps, p50, p99, self._worst_s)

    async def run(self, started: Callable[[], None], stop: asyncio.Event) -> None:
        """Serve until ``stop``; ServerError if the port cannot be had.

        A ``restart`` fault closes the port and every connection, and comes back with nothing kept.
        """
        restarts = sorted(
            (fault for fault in self.truth.faults if fault.kind == "restart"),
            key=lambda fault: fault.at_s,
        )
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while True:
            restart = restarts.pop(0) if restarts else None
            async with self._listening() as steps:
                started()
                wait_s = None if restart is None else began_s + restart.at_s - loop.time()
                stopping = asyncio.create_task(stop.wait())
                await asyncio.wait(
                    {steps, stopping}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
                )
                stopping.cancel()
                if steps.done():
                    steps.result()  # an engine that stops by itself has failed: say so
            if stop.is_set() or restart is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), restart.down_s)
                return
            self._begin()

    def _begin(self) -> None:
        """The state of a process that has just started."""
        self._engine = SimulatedEngine(self.truth.config, self.truth.costs, keep_ends=False)
        self._metrics = TwinMetrics(self.truth)
        self._streams: dict[LiveRequest, _Stream] = {}
        self._arrived: deque[LiveRequest] = deque()
        self._work = asyncio.Event()

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Task[None]]:
        """The port open and the engine running; yields the engine's task."""
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/twin", self._describe)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        # Cancelling a handler when its client leaves is what aborts the request, as in vLLM.
        runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=_CLOSING_S, access_log=None
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.host, self.port, reuse_address=True)
            try:
                await site.start()
            except OSError as error:
                raise ServerError(
                    f"Twin {self.truth.name!r} cannot listen on {self.url}: {error.strerror}.",
                    "Choose another port in the truth file; 0 takes a free one.",
                ) from error
            self.port = runner.addresses[0][1]
            self._origin_s = time.monotonic()
            steps = asyncio.create_task(self._run_engine())
            try:
                yield steps
            finally:
                steps.cancel()
                await asyncio.gather(steps, return_exceptions=True)
        finally:
            await runner.cleanup()

    # The engine on the wall clock.

    def _clock_s(self) -> float:
        return time.monotonic() - self._origin_s

    async def _run_engine(self) -> None:
        engine, arrived = self._engine, self._arrived
        while True:
            if not engine.busy:
                self._work.clear()
                if not arrived:
                    await self._work.wait()
                engine.idle_until(arrived[0].arrival_s)
            while arrived and arrived[0].arrival_s <= engine.seen_until_s:
                engine.submit(arrived.popleft())
            if not engine.busy:
                continue
            number, preempted = engine.step_number, engine.preemptions
            engine.step()
            await self._sleep_until(engine.now_s)
            self._deliver(number)
            self._metrics.preempted(engine.preemptions - preempted)

    async def _sleep_until(self, at_s: float) -> None:
        wait_s = at_s - self._clock_s()
        if wait_s > _TIMER_S:
            await asyncio.sleep(wait_s - _TIMER_S)
            wait_s = at_s - self._clock_s()
            if wait_s > 0:
                time.sleep(wait_s)
        else:
            await asyncio.sleep(0)
            if wait_s > 0:
                time.sleep(max(at_s - self._clock_s(), 0.0))
        late_s = self._clock_s() - at_s
        self._steps += 1
        self._lags.append(late_s)
        self._worst_s = max(self._worst_s, late_s)

    def _deliver(self, number: int) -> None:
        """Hand every request the tokens that step ``number`` gave it."""
        engine = self._engine
        finished, engine.finished = engine.finished, []
        for live in (*engine.running, *finished):
            tokens, drafts, accepted = live.output_of(number)
            stream = self._streams.get(live)
            if tokens and stream is not None:
                stream.steps.append(tokens)
                stream.news.set()
                self._metrics.generated(tokens)
                if drafts:
                    self._metrics.verified(drafts, accepted, stream.acceptance)

    # Requests.

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        arrival_s = self._clock_s()
        self._asked += 1
        fault = self._fault()
        if fault is not None and fault.kind == "hang":
            await asyncio.Event().wait()
        if fault is not None and fault.kind == "status":
            return _error(fault.status, "made to fail by the truth file", "InternalServerError")
        try:
            ask = self._read(await _json_of(request), request)
            stream = self._submit(ask, arrival_s)
        except (_RefusedError, InputError) as error:
            status = error.status if isinstance(error, _RefusedError) else 400
            kind = error.kind if isinstance(error, _RefusedError) else "BadRequestError"
            return _error(status, str(error), kind)
        try:
            if ask.stream:
                return await self._stream(request, ask, stream, fault)
            return await self._whole(ask, stream)
        finally:
            del self._streams[stream.live]
            if stream.live.finished_s < 0:
                self._engine.cancel(stream.live)
                with contextlib.suppress(ValueError):
                    self._arrived.remove(stream.live)
                self._metrics.finished(stream.live, "abort", self._clock_s())

    def _fault(self) -> Fault | None:
        for fault in self.truth.faults:
            if fault.kind != "restart" and self._asked % fault.every == 0:
                return fault
        return None

    def _read(self, body: Mapping[str, Any], request: web.Request) -> _Ask:
        """What is asked for; _RefusedError as vLLM would refuse it."""
        truth = self.truth
        if body.get("model") not in (None, truth.model):
            raise _RefusedError(
                404, f"The model `{body.get('model')}` does not exist.", "NotFoundError"
            )
        if truth.k and any(body.get(key) for key in ("min_p", "logit_bias")):
            raise _RefusedError(
                400,
                "The min_p and logit_bias sampling parameters are not yet supported with "
                "speculative decoding.",
                "BadRequestError",
            )
        if body.get("n") not in (None, 1):
            raise _RefusedError(
                400, "The twin answers with one choice: n must be 1.", "BadRequestError"
            )
        chat = request.path.endswith("/chat/completions")
        prompt = _prompt_text(body, chat)
        options = body.get("stream_options") or {}
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        if max_tokens is None and not chat:
            max_tokens = 16
        temperature, seed = body.get("temperature", 1.0), body.get("seed")
        if not isinstance(max_tokens, int | None) or not isinstance(temperature, int | float):
            raise _RefusedError(
                400, "max_tokens or temperature is not a number.", "BadRequestError"
            )
        if max_tokens is not None and max_tokens < 1:
            raise _RefusedError(400, "max_tokens must be at least 1.", "BadRequestError")
        return _Ask(
            chat=chat,
            stream=bool(body.get("stream")),
            usage=bool(options.get("include_usage")),
            running_usage=bool(options.get("continuous_usage_stats")),
            prompt=prompt,
            prompt_tokens=max(1, round(len(prompt) / truth.characters_per_token)),
            max_tokens=max_tokens,
            temperature=float(temperature),
            seed=seed if isinstance(seed, int) else None,
            segment=truth.segment_of(prompt, request.headers.get("X-Specwise-Segment")),
        )

    def _submit(self, ask: _Ask, arrival_s: float) -> _Stream:
        truth, segment = self.truth, ask.segment
        room = truth.max_model_len - ask.prompt_tokens
        output = ask.max_tokens or room
        if room < 1 or (ask.max_tokens or 0) > room:
            raise _RefusedError(
                400,
                f"This model's maximum context length is {truth.max_model_len} tokens. However, "
                f"you requested {ask.prompt_tokens + (ask.max_tokens or 1)} tokens.",
                "BadRequestError",
            )
        if segment.output_tokens is not None:
            low, high = segment.output_tokens
            output = min(output, low + zlib.crc32(ask.prompt.encode()) % (high - low + 1))
        acceptance = truth.acceptance_of(segment.name, ask.temperature)
        request = SimRequest(
            prompt_tokens=ask.prompt_tokens,
            output_tokens=output,
            acceptance=acceptance,
            draft_probability=truth.draft_probability.get(segment.name, 1.0),
        )
        rng = np.random.default_rng([truth.seed, self._asked])
        runs, hits, _ = draw_acceptance([request], rng)
        live = LiveRequest(
            self._asked,
            prompt=ask.prompt_tokens,
            output=output,
            arrival_s=arrival_s,
            runs=runs,
            hits=hits,
            cached=int(ask.prompt_tokens * segment.cached_share),
        )
        self._engine.check(live)
        stream = _Stream(live, acceptance)
        self._streams[live] = stream
        self._arrived.append(live)
        self._work.set()
        self._metrics.received(live)
        return stream

    async def _chunks(self, stream: _Stream) -> AsyncIterator[tuple[int, int]]:
        """(tokens of the chunk, tokens so far) as the engine makes them."""
        so_far = 0
        while so_far < stream.live.output:
            await stream.news.wait()
            stream.news.clear()
            while stream.steps:
                tokens = stream.steps.popleft()
                so_far += tokens
                if so_far == tokens:
                    self._metrics.first_token(stream.live, self._clock_s())
                yield tokens, so_far
        self._metrics.finished(stream.live, "length", self._clock_s())

    async def _stream(
        self, request: web.Request, ask: _Ask, stream: _Stream, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        message = _Message(ask, stream.live, self.truth.model)
        sent = 0
        async for tokens, so_far in self._chunks(stream):
            if sent == 0 and ask.chat:
                await response.write(message.role())
            if fault is not None and sent == fault.after_chunks:
                if fault.kind == "cut":
                    if request.transport is not None:
                        request.transport.close()
                    return response
                await response.write(b'data: {"choices": [{"index"\n\n')
            await response.write(message.chunk(tokens, so_far))
            sent += 1
        if ask.usage:
            await response.write(message.final(self._speculation(stream.live)))
        await response.write(_DONE)
        return response

    async def _whole(self, ask: _Ask, stream: _Stream) -> web.Response:
        async for _ in self._chunks(stream):
            pass
        body = _Message(ask, stream.live, self.truth.model).whole(self._speculation(stream.live))
        return web.Response(body=body, content_type="application/json")

    def _speculation(self, live: LiveRequest) -> dict[str, Any] | None:
        """vLLM's `RequestSpecDecodeMetrics` of a finished request; None if not reported."""
        truth = self.truth
        if not (truth.k and truth.per_request_metrics):
            return None
        histogram = live.steps_by_accepted(truth.k)
        steps = sum(histogram)
        accepted = sum(i * n for i, n in enumerate(histogram))
        return {
            "mean_acceptance_length": 1.0 + accepted / steps if steps else 1.0,
            "draft_acceptance_rate": accepted / live.drafted if live.drafted else 0.0,
            "acceptance_histogram": list(histogram),
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": live.drafted,
            "num_spec_tokens": truth.k,
        }

    # The quiet endpoints.

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return _json({"version": self.truth.version})

    async def _models(self, _: web.Request) -> web.Response:
        truth = self.truth
        model = {
            "id": truth.model,
            "object": "model",
            "created": 0,
            "owned_by": "specwise-twin",
            "max_model_len": truth.max_model_len,
        }
        return _json({"object": "list", "data": [model]})

    async def _scrape(self, _: web.Request) -> web.Response:
        text = self._metrics.text(
            running=len(self._engine.running),
            waiting=len(self._engine.waiting) + len(self._arrived),
            kv_use=self._engine.kv_use,
            lag_s=(self.lag().p99_s, self._worst_s),
        )
        return web.Response(text=text)

    async def _describe(self, _: web.Request) -> web.Response:
        truth, lag = self.truth, self.lag()
        return _json(
            {
                "twin": truth.name,
                "k": truth.k,
                "acceptance": {
                    segment: {f"{at:g}": row for at, row in rows}
                    for segment, rows in truth.acceptance.items()
                },
                "steps": lag.steps,
                "lag_p50_s": lag.p50_s,
                "lag_p99_s": lag.p99_s,
                "lag_max_s": lag.max_s,
            }
        )


class _Message:
    """The JSON of one answer, in vLLM's form."""

    def __init__(self, ask: _Ask, live: LiveRequest, model: str) -> None:
        self._ask, self._live = ask, live
        kind, prefix = ("chat.completion", "chatcmpl") if ask.chat else ("text_completion", "cmpl")
        self._head = {
            "id": f"{prefix}-twin-{live.number}",
            "object": f"{kind}.chunk" if ask.chat and ask.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        # Greedy answers depend on the prompt alone, sampled ones on the request too.
        source = ask.prompt if ask.temperature == 0 else f"{ask.prompt}{ask.seed or live.number}"
        self._start = zlib.crc32(source.encode("utf-8", "surrogatepass"))

    def role(self) -> bytes:
        """Chat's opening chunk, without a token."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": 0, "delta": delta, "finish_reason": None}], 0)

    def chunk(self, tokens: int, so_far: int) -> bytes:
        """The output of one engine step."""
        text = self._text(so_far - tokens, so_far)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason(so_far)}
        choice |= {"delta": {"content": text}} if self._ask.chat else {"text": text}
        return self._event([choice], so_far)

    def final(self, speculation: dict[str, Any] | None) -> bytes:
        """The trailing chunk: no choice, the usage, and the figures on speculation."""
        return b"data: " + orjson.dumps(self._closing([], speculation)) + b"\n\n"

    def whole(self, speculation: dict[str, Any] | None) -> bytes:
        """The answer in one piece."""
        count = self._live.output
        text = self._text(0, count)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish_reason(count)}
        choice |= (
            {"message": {"role": "assistant", "content": text}}
            if self._ask.chat
            else {"text": text}
        )
        return orjson.dumps(self._closing([choice], speculation))

    def _closing(
        self, choices: list[dict[str, Any]], speculation: dict[str, Any] | None
    ) -> dict[str, Any]:
        usage = self._usage(self._live.output)
        usage["prompt_tokens_details"] = {"cached_tokens": self._live.cached}
        message = {**self._head, "choices": choices, "usage": usage}
        if speculation is not None:
            message["metrics"] = {"speculative_decoding": speculation}
        return message

    def _finish_reason(self, so_far: int) -> str | None:
        if so_far < self._live.output:
            return None
        return "length" if self._live.output == self._ask.max_tokens else "stop"

    def _text(self, first: int, last: int) -> str:
        return "".join(
            f" {_WORDS[(self._start + i * i) % len(_WORDS)]}" for i in range(first, last)
        )

    def _usage(self, count: int) -> dict[str, Any]:
        prompt = self._live.prompt
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + count,
            "completion_tokens": count,
        }

    def _event(self, choices: list[dict[str, Any]], count: int) -> bytes:
        message = {**self._head, "choices": choices}
        if self._ask.running_usage:
            message["usage"] = self._usage(count)
        return b"data: " + orjson.dumps(message) + b"\n\n"


async def _json_of(request: web.Request) -> Mapping[str, Any]:
    try:
        body = orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        raise _RefusedError(400, "The body is not a JSON object.", "BadRequestError")
    return body


def _prompt_text(body: Mapping[str, Any], chat: bool) -> str:
    """All text of the prompt; _RefusedError if there is none."""
    if not chat:
        prompt = body.get("prompt")
        if isinstance(prompt, str) and prompt:
            return prompt
        raise _RefusedError(400, "The twin takes a prompt of text.", "BadRequestError")
    try:
        contents = [message["content"] for message in body["messages"]]
        parts = [
            part if isinstance(part, str) else "".join(p.get("text", "") for p in part)
            for part in contents
        ]
    except (KeyError, TypeError, AttributeError):
        parts = []
    text = "\n".join(parts)
    if not text:
        raise _RefusedError(400, "messages holds no text.", "BadRequestError")
    return text


def _json(content: Any) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json")


def _error(status: int, message: str, kind: str) -> web.Response:
    error = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.Response(status=status, body=orjson.dumps(error), content_type="application/json")


async def serve(
    truths: Sequence[ServerTruth],
    *,
    host: str = "127.0.0.1",
    started: Callable[[Sequence[Twin]], None] = lambda _: None,
    stop: asyncio.Event,
) -> Sequence[Twin]:
    """Play all servers until ``stop``; ``started`` is called once, when all listen.

    Raises ServerError if a port cannot be had.
    """
    twins = [Twin(truth, host=host) for truth in truths]
    waiting = {twin.truth.name for twin in twins}

    def one_started(name: str) -> None:
        if name in waiting:
            waiting.remove(name)
            if not waiting:
                started(twins)

    tasks = [
        asyncio.create_task(twin.run(partial(one_started, twin.truth.name), stop)) for twin in twins
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return twins


@contextlib.contextmanager
def playing(truths: Sequence[ServerTruth]) -> Iterator[Sequence[Twin]]:
    """The twins on a thread of this process, for the time of the block; ServerError as `serve`."""
    ready = threading.Event()
    twins: list[Twin] = []
    failure: list[BaseException] = []
    handles: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        stop = asyncio.Event()
        handles.append((asyncio.get_running_loop(), stop))

        def started(playing_now: Sequence[Twin]) -> None:
            twins.extend(playing_now)
            ready.set()

        await serve(truths, started=started, stop=stop)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="twin", daemon=True)
    thread.start()
    ready.wait()
    try:
        if failure:
            raise failure[0]
        yield twins
    finally:
        if thread.is_alive():
            loop, stop = handles[0]
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)
        thread.join()
