"""A server of known timing and known faults, for tests of whatever talks to vLLM's endpoints.

``ScriptedServer`` runs in a thread of the test, ``scripted_server_process`` in a process of its
own, for tests that compare times: its log (read back with ``ServerProcess.log``) is the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Script:
    """How one request is answered.

    ``fault`` is one of:
    status (``status`` with a JSON error), redirect, hang (never answers), cut (closes after
    ``fault_at`` chunks), reset (the same, with a TCP reset), silent-close (closes before
    answering), error-event and malformed (in the place of chunk ``fault_at``), stall (stops
    sending after ``fault_at`` chunks), garbage (no HTTP), not-a-stream (plain JSON), no-done
    (neither [DONE] nor finish reason), upgrade (101).

    ``framing`` is chunked, length or close (body until the end of the connection, HTTP/1.0).
    ``cuts`` splits what is written at every position where a parser could stumble; ``slow_s`` > 0
    sends byte for byte with that pause every 16. ``line_end`` ends SSE lines.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    chunks: int = 5
    tokens_per_chunk: int = 1
    prompt_tokens: int = 7
    cached_tokens: int | None = None
    finish_reason: str = "length"
    running_counts: bool = True
    usage: bool = True
    speculation: dict[str, Any] | None = None
    fault: str = ""
    fault_at: int = 2
    status: int = 200
    message: str = "made to fail"
    framing: str = "chunked"
    encoding: str = ""
    keep_alive: bool = True
    close_after: bool = False  # closes without having said so
    interim: bool = False  # sends 100 Continue first
    cuts: bool = False
    slow_s: float = 0.0
    line_end: str = "\n"
    comments: bool = False
    words: tuple[str, ...] = ()
    reasoning: int = 0  # the first chunks are reasoning


@dataclass
class Served:
    """What the server did with one request, times on the machine's monotonic clock."""

    connection: int
    received_s: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    chunk_sent_s: list[float] = field(default_factory=list)


def word(i: int) -> str:
    """The text of chunk i unless the script gives words."""
    return f" w{i}é" if i % 3 == 0 else f" w{i}"


def events(script: Script, path: str) -> Iterator[tuple[str, bytes]]:
    """(kind, SSE event) of an answer; kind is "" for what carries no output, else "chunk"."""
    chat = path.endswith("chat/completions")

    def event(message: dict[str, Any]) -> bytes:
        text = "data: " + json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        return (text + script.line_end * 2).encode()

    def usage(count: int, final: bool = False) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": script.prompt_tokens,
            "total_tokens": script.prompt_tokens + count,
            "completion_tokens": count,
        }
        if final and script.cached_tokens is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": script.cached_tokens}
        return counts

    def message(choices: list[dict[str, Any]], count: int) -> dict[str, Any]:
        base = {"id": "cmpl-1", "object": "chunk", "created": 1, "model": "m", "choices": choices}
        return base | ({"usage": usage(count)} if script.running_counts else {})

    if chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield "", event(message([role], 0))
    for i in range(script.chunks):
        text = script.words[i] if i < len(script.words) else word(i)
        last = i == script.chunks - 1
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": script.finish_reason if last and script.fault != "no-done" else None,
        }
        if chat:
            choice["delta"] = {"reasoning" if i < script.reasoning else "content": text}
        else:
            choice["text"] = text
        if script.comments:
            yield "", f": still here{script.line_end * 2}".encode()
        yield "chunk", event(message([choice], (i + 1) * script.tokens_per_chunk))
    if script.usage:
        final = message([], 0) | {"usage": usage(script.chunks * script.tokens_per_chunk, True)}
        if script.speculation is not None:
            final["metrics"] = {"speculative_decoding": script.speculation}
        yield "", event(final)
    if script.fault != "no-done":
        yield "", f"data: [DONE]{script.line_end * 2}".encode()


class _Handler:
    """One connection: requests in turn until either side closes."""

    def __init__(self, server: ScriptedServer, number: int) -> None:
        self.server = server
        self.number = number

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        received_s = time.perf_counter()
        lines = head.decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        served = Served(self.number, received_s, lines[0].split()[1], headers, body)
        self.server.served.append(served)
        script = self.server.script
        if callable(script):
            script = script(len(self.server.served) - 1, body)
        return await _Answer(script, served, writer).send()


class _Answer:
    def __init__(self, script: Script, served: Served, writer: asyncio.StreamWriter) -> None:
        self.script = script
        self.served = served
        self.writer = writer

    async def send(self) -> bool:  # noqa: PLR0911
        """Whether the connection goes on."""
        script = self.script
        if script.interim:
            await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        match script.fault:
            case "hang":
                await asyncio.sleep(3600)
            case "silent-close":
                return False
            case "garbage":
                await self._write(b"SSH-2.0-OpenSSH_9.6\r\n")
                return False
            case "upgrade":
                await self._write(
                    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n"
                    b"Connection: Upgrade\r\n\r\n"
                )
                return False
            case "status":
                error = {"error": {"message": script.message, "type": "e", "code": script.status}}
                return await self._plain(script.status, json.dumps(error).encode())
            case "redirect":
                there = "Location: http://elsewhere.example/v1/x?token=abc\r\n"
                return await self._plain(307, b"moved", there)
            case "not-a-stream":
                return await self._plain(200, b'{"choices": 3}')
        return await self._stream()

    async def _plain(self, status: int, body: bytes, more: str = "") -> bool:
        await self._write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return True

    async def _stream(self) -> bool:  # noqa: PLR0912
        script = self.script
        headers = ["Content-Type: text/event-stream; charset=utf-8"]
        parts = list(events(script, self.served.path))
        compress = _compressor(script.encoding)
        if script.encoding:
            headers.append(f"Content-Encoding: {script.encoding}")
        if script.framing == "chunked":
            headers.append("Transfer-Encoding: chunked")
        if script.framing == "length":
            whole = b"".join(data for _, data in parts)
            size = len(compress(whole, True)) if script.encoding else len(whole)
            compress = _compressor(script.encoding)
            headers.append(f"Content-Length: {size}")
        if not script.keep_alive:
            headers.append("Connection: close")
        version = "1.0" if script.framing == "close" else "1.1"
        if script.close_after:
            # The end of the answer and the end of the connection leave in one segment.
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        head = "\r\n".join([f"HTTP/{version} 200 OK", *headers, "", ""])
        await self._write(head.encode())
        start_s = self.served.received_s + script.first_s
        sent = 0
        if script.framing == "length" and script.encoding:
            parts = [("chunk", b"".join(data for _, data in parts))]
        for i, (kind, part) in enumerate(parts):
            data = part
            if kind:
                wait_s = start_s + sent * script.gap_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                if sent == script.fault_at and script.fault:
                    if script.fault in ("cut", "reset"):
                        if script.fault == "reset":
                            self.writer.transport.abort()
                        return False
                    if script.fault == "stall":
                        await asyncio.sleep(3600)
                    if script.fault == "malformed":
                        data = b'data: {"choices": [{"index"\n\n'
                    if script.fault == "error-event":
                        error = {"error": {"message": script.message, "code": 500}}
                        data = b"data: " + json.dumps(error).encode() + b"\n\n"
                sent += 1
                self.served.chunk_sent_s.append(time.perf_counter())
            elif i == 0:
                # Like vLLM, the role chunk leaves with the first token.
                wait_s = start_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
            if script.encoding:
                data = compress(data, i == len(parts) - 1)
            if script.framing == "chunked":
                data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            await self._write(data)
        if script.framing == "chunked":
            await self._write(b"0\r\n\r\n")
        if script.close_after:
            self.writer.write_eof()
        return script.keep_alive and script.framing != "close" and not script.close_after

    async def _write(self, data: bytes) -> None:
        script = self.script
        if script.slow_s > 0:
            for i in range(len(data)):
                self.writer.write(data[i : i + 1])
                await self.writer.drain()
                await asyncio.sleep(script.slow_s if i % 16 == 0 else 0)
        elif script.cuts:
            rng = random.Random(len(data))
            at = 0
            while at < len(data):
                # Right after CR, inside LF LF and within multi-byte characters above all.
                size = rng.choice((1, 1, 2, 3, 7, 40))
                self.writer.write(data[at : at + size])
                await self.writer.drain()
                await asyncio.sleep(0)
                at += size
        else:
            self.writer.write(data)
            await self.writer.drain()


def _compressor(encoding: str) -> Callable[[bytes, bool], bytes]:
    if encoding not in ("gzip", "deflate"):
        return lambda data, _last: data
    compressor = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)

    def compress(data: bytes, last: bool) -> bytes:
        mode = zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH
        return compressor.compress(data) + compressor.flush(mode)

    return compress


class ScriptedServer:
    """The server in a thread: ``with ScriptedServer(Script(...)) as server: server.url``.

    ``script`` is one Script, or a function of (request number, body). ``served`` is its log.
    """

    def __init__(
        self,
        script: Script | Callable[[int, dict[str, Any]], Script] = Script(),
        *,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.script = script
        self.served: list[Served] = []
        self.connections = 0
        self.port = port
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            self.connections += 1
            with contextlib.suppress(asyncio.CancelledError):
                await _Handler(self, self.connections).run(reader, writer)

        transports: list[asyncio.Transport] = []

        class Protocol(asyncio.StreamReaderProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                transports.append(transport)
                super().connection_made(transport)

        server = await self._loop.create_server(
            lambda: Protocol(asyncio.StreamReader(), connected),
            "127.0.0.1",
            self.port,
            ssl=self._tls,
            backlog=2048,
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        # A connection that is being accepted while the server closes would leak (Python 3.11).
        self._loop.remove_reader(server.sockets[0].fileno())
        await asyncio.sleep(0.002)
        await asyncio.sleep(0.002)
        server.close()
        for _ in range(3):
            for transport in transports:
                transport.abort()
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.002)


@dataclass
class ServerProcess:
    """A scripted server in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    def log(self) -> list[Served]:
        """Stop it and read what it did."""
        out, _ = self.process.communicate("stop\n", timeout=20)
        return [Served(**json.loads(line)) for line in out.splitlines()]


@contextlib.contextmanager
def scripted_server_process(script: Script, *, core: int | None = None) -> Iterator[ServerProcess]:
    """Start it, pinned to ``core`` if given; it ends with the block."""
    command = [sys.executable, str(Path(__file__)), json.dumps({"core": core, **vars(script)})]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield ServerProcess(process.stdout.readline().strip(), process)
    finally:
        process.kill()
        process.communicate()


def throwaway_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for 127.0.0.1 (path of its PEM) and a server context with it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def _main() -> None:
    import os

    setting = json.loads(sys.argv[1])
    core = setting.pop("core")
    if core is not None:
        os.sched_setaffinity(0, {core})
    setting["words"] = tuple(setting["words"])
    with ScriptedServer(Script(**setting)) as server:
        print(server.url, flush=True)
        sys.stdin.readline()
        for served in server.served:
            print(json.dumps(vars(served)))


if __name__ == "__main__":
    _main()
