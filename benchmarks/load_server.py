"""A streaming server fast enough to load a load generator, whose log is the truth.

One thread, one epoll loop, answers prepared beforehand. Every answer starts ``FIRST_S`` after its
request was read and goes on with a chunk every ``GAP_S``, ``max_tokens`` chunks in all: two queues
that stay sorted by themselves are the whole schedule. ``GET /log`` returns, and forgets, one row
(received, first chunk sent, last chunk sent: seconds of the machine's monotonic clock) a request.

    python benchmarks/load_server.py [core]     prints its port
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import time
from collections import deque

FIRST_S = 0.050
GAP_S = 0.020
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
_CHUNKS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')


def _framed(message: dict[str, object]) -> bytes:
    data = b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _answer(chunks: int, chat: bool) -> list[bytes]:
    """What is written for each chunk: headers and role chunk with the first, the end with the last.

    The fields are those that vLLM 0.32 sends.
    """
    base = {
        "id": "chatcmpl-9f86d081884c7d659a2feaa0c55ad015",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 1_760_000_000,
        "model": "m",
    }

    def usage(count: int) -> dict[str, int]:
        return {"prompt_tokens": 32, "total_tokens": 32 + count, "completion_tokens": count}

    writes = []
    for i in range(chunks):
        last = i == chunks - 1
        choice: dict[str, object] = {"index": 0, "logprobs": None}
        choice |= {"delta": {"content": " word"}} if chat else {"text": " word"}
        choice |= {"finish_reason": "length" if last else None}
        writes.append(_framed(base | {"choices": [choice], "usage": usage(i + 1)}))
    head = (
        b"HTTP/1.1 200 OK\r\ndate: Sun, 01 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
        b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    if chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        head += _framed(base | {"choices": [role], "usage": usage(0)})
    writes[0] = head + writes[0]
    writes[-1] += _framed(base | {"choices": [], "usage": usage(chunks)})
    writes[-1] += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    return writes


class _Stream:
    __slots__ = ("at", "due_s", "row", "sock", "writes")

    def __init__(
        self, sock: socket.socket, writes: list[bytes], due_s: float, row: list[float]
    ) -> None:
        self.sock = sock
        self.writes = writes
        self.at = 0
        self.due_s = due_s
        self.row = row


class _Server:
    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.poller = select.epoll()
        self.poller.register(self.listener.fileno(), select.EPOLLIN)
        self.connections: dict[int, socket.socket] = {}
        self.partial: dict[int, bytes] = {}
        self.starting: deque[_Stream] = deque()
        self.going_on: deque[_Stream] = deque()
        self.answers: dict[tuple[int, bool], list[bytes]] = {}
        self.log: list[list[float]] = []

    def serve(self) -> None:
        listening = self.listener.fileno()
        while True:
            due_s = min(
                self.starting[0].due_s if self.starting else 1e18,
                self.going_on[0].due_s if self.going_on else 1e18,
            )
            wait_s = min(1.0, max(0.0, due_s - time.perf_counter()))
            for fd, _ in self.poller.poll(wait_s, 4096):
                if fd == listening:
                    self.accept()
                else:
                    self.read(fd)
            self.send_due(self.going_on)
            self.send_due(self.starting)

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections[sock.fileno()] = sock
            self.poller.register(sock.fileno(), select.EPOLLIN)

    def read(self, fd: int) -> None:
        sock = self.connections[fd]
        try:
            data = sock.recv(1 << 20)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.poller.unregister(fd)
            del self.connections[fd]
            self.partial.pop(fd, None)
            sock.close()
            return
        now_s = time.perf_counter()
        data = self.partial.pop(fd, b"") + data
        head, found, body = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or (length and len(body) < int(length[1])):
            self.partial[fd] = data
        elif head.startswith(b"GET "):
            self.answer_get(sock, head)
        else:
            chunks = _CHUNKS.search(body)
            key = (int(chunks[1]) if chunks else 64, b"chat/completions" in head[:80])
            if key not in self.answers:
                self.answers[key] = _answer(*key)
            row = [now_s, 0.0, 0.0]
            self.starting.append(_Stream(sock, self.answers[key], now_s + FIRST_S, row))

    def answer_get(self, sock: socket.socket, head: bytes) -> None:
        body = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'
        if head.startswith(b"GET /log"):
            body = json.dumps(self.log).encode()
            self.log.clear()
        sock.setblocking(True)
        sock.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        sock.setblocking(False)

    def send_due(self, queue: deque[_Stream]) -> None:
        now = time.perf_counter
        while queue and queue[0].due_s <= now():
            stream = queue.popleft()
            data = stream.writes[stream.at]
            sent_s = now()
            try:
                if stream.sock.send(data) != len(data):
                    raise BlockingIOError
            except OSError:
                continue  # the client went away, or reads nothing: its row stays out of the log
            if stream.at == 0:
                stream.row[1] = sent_s
            stream.at += 1
            if stream.at < len(stream.writes):
                stream.due_s += GAP_S
                self.going_on.append(stream)
            else:
                stream.row[2] = sent_s
                self.log.append(stream.row)


def main() -> None:
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, {int(sys.argv[1])})
    server = _Server()
    print(server.listener.getsockname()[1], flush=True)
    server.serve()


if __name__ == "__main__":
    main()
