"""The clients that ``load_client.py`` compares, each run as a process of its own.

    python benchmarks/load_clients.py specwise|aiohttp|bound '{"url": ..., "rate": ...}'

sends ``count`` requests at Poisson times and prints what the client saw and the processor time of
the whole process as JSON; with ``times_file``, the send times are read from there, so that all
clients send at the same ones. ``bound`` is what a uvloop protocol costs that counts the bytes it is
handed, and reads, stores and checks nothing.

Imports stand inside: what a client does not need must not count against its start-up.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

CHUNKS = 64
PROMPT = "word " * 32


def specwise_client(setting: dict[str, Any]) -> dict[str, Any]:
    from specwise.domain import Api, RequestRecord  # noqa: PLC0415
    from specwise.measurement.load import PlannedRequest, Target, run_load  # noqa: PLC0415
    from specwise.vllm.response import endpoint, request_body  # noqa: PLC0415

    body = request_body(Api.CHAT, model="m", prompt=PROMPT, max_tokens=CHUNKS, temperature=0.0)
    plan = [
        PlannedRequest(i, f"p{i}", "s", 0.0, endpoint(Api.CHAT), body, t)
        for i, t in enumerate(send_times(setting))
    ]
    records: list[RequestRecord] = []
    run = run_load(
        plan,
        target=Target(setting["url"], "m"),
        concurrency=None,
        part=0,
        on_record=records.append,
    )
    return {
        "ttft_s": [(r.first_token_s or 0.0) - r.sent_s for r in records],
        "lateness_s": [r.sent_s - r.intended_s for r in records],
        "failed": sum(
            r.outcome != "ok" or r.chunk_tokens != (1,) * CHUNKS or len(r.chunk_s) != CHUNKS
            for r in records
        ),
        "limits": run.limits,
    }


def aiohttp_client(setting: dict[str, Any]) -> dict[str, Any]:
    import asyncio  # noqa: PLC0415

    import aiohttp  # noqa: PLC0415

    ttft_s, lateness_s = [], []

    async def one(session: aiohttp.ClientSession, due_s: float) -> None:
        sent_s = time.perf_counter()
        lateness_s.append(sent_s - due_s)
        first_s = 0.0
        chunk_s = []
        url = setting["url"] + "/v1/chat/completions"
        async with session.post(url, json=_body()) as response:
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                now_s = time.perf_counter()
                message = json.loads(line[6:])
                if message["choices"] and message["choices"][0]["delta"].get("content"):
                    first_s = first_s or now_s
                    chunk_s.append(now_s)
        ttft_s.append(first_s - sent_s)

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            times_s = send_times(setting)
            start_s = time.perf_counter()
            tasks = []
            for intended_s in times_s:
                due_s = start_s + intended_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                tasks.append(asyncio.create_task(one(session, due_s)))
            await asyncio.gather(*tasks)

    asyncio.run(run())
    return {"ttft_s": ttft_s, "lateness_s": lateness_s, "failed": setting["count"] - len(ttft_s)}


def bound_client(setting: dict[str, Any]) -> dict[str, Any]:
    import asyncio  # noqa: PLC0415
    import gc  # noqa: PLC0415

    import uvloop  # noqa: PLC0415

    host, port = setting["url"].removeprefix("http://").split(":")
    body = json.dumps(_body()).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        host.encode(),
        len(body),
        body,
    )
    lateness_s: list[float] = []

    class Counter(asyncio.Protocol):
        received_bytes = 0

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.received_bytes += len(data)
            if data.endswith(b"0\r\n\r\n"):
                self.ended.set_result(None)

        async def perform(self) -> None:
            self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.transport.write(request)
            await self.ended

    async def run() -> None:
        loop = asyncio.get_running_loop()
        idle: list[Counter] = []

        async def one(due_s: float) -> None:
            lateness_s.append(time.perf_counter() - due_s)
            if idle:
                counter = idle.pop()
            else:
                _, counter = await loop.create_connection(Counter, host, int(port))
            await counter.perform()
            idle.append(counter)

        times_s = send_times(setting)
        start_s = time.perf_counter()
        tasks = []
        for intended_s in times_s:
            due_s = start_s + intended_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(loop.create_task(one(due_s)))
        await asyncio.gather(*tasks)

    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return {"ttft_s": [], "lateness_s": lateness_s, "failed": setting["count"] - len(lateness_s)}


def send_times(setting: dict[str, Any]) -> tuple[float, ...]:
    """When to send, from the start: drawn beforehand, as a study does, or else here."""
    if "times_file" in setting:
        return tuple(json.loads(Path(setting["times_file"]).read_bytes()))
    import numpy as np  # noqa: PLC0415

    from specwise.measurement.arrivals import intended_times  # noqa: PLC0415

    return intended_times(
        "poisson", setting["rate"], setting["count"], np.random.default_rng(setting["seed"])
    )


def _body() -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": CHUNKS,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


CLIENTS = {"specwise": specwise_client, "aiohttp": aiohttp_client, "bound": bound_client}


def main() -> None:
    result = CLIENTS[sys.argv[1]](json.loads(sys.argv[2]))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["cpu_s"] = usage.ru_utime + usage.ru_stime
    os.set_blocking(sys.stdout.fileno(), True)  # a loop may have left the pipe otherwise
    print(json.dumps(result))


if __name__ == "__main__":
    main()
