"""The scrape loop: reads every replica at once, each round, and judges it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from pydantic import TypeAdapter, ValidationError

from specwise.errors import InputError, ServerError, StoreError
from specwise.monitoring.expectations import Expectations
from specwise.monitoring.standing import Memory, ReplicaStanding, Watched
from specwise.monitoring.windows import Reading
from specwise.vllm import metrics

_HISTOGRAMS = ("ttft_s", "tpot_s")
_THREADS = 16
_MEMORY_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall and monotonic time; a test brings its own."""

    wall_s: Callable[[], float] = time.time
    monotonic_s: Callable[[], float] = time.monotonic


class Watch:
    """Follows any number of replicas, which may come and go from one round to the next.

    ``headers`` go to every replica. A context manager: it holds connections and threads.
    """

    def __init__(
        self,
        expected: Expectations | None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 5.0,
        false_alarm_rate: float = 0.01,
        clock: Clock | None = None,
        memories: Iterable[Memory] = (),
    ) -> None:
        self._expected = expected
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s
        self._false_alarm_rate = false_alarm_rate
        self._clock = clock or Clock()
        self._watched = {memory.url: self._new(memory) for memory in memories}
        self._clients: dict[str, httpx.Client] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="watch")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for client in self._clients.values():
            client.close()

    def round(self, urls: Sequence[str]) -> tuple[ReplicaStanding, ...]:
        """One reading of each of ``urls``, judged, in their order; never raises for a replica."""
        for url in urls:
            if url not in self._watched:
                self._watched[url] = self._new(Memory(url))
            if url not in self._clients:
                self._clients[url] = metrics.quiet_client(url)
        for url in self._clients.keys() - set(urls):
            self._clients.pop(url).close()
        readings = self._threads.map(self._read, urls)
        return tuple(
            self._watched[url].read(reading) for url, reading in zip(urls, readings, strict=True)
        )

    def memories(self) -> tuple[Memory, ...]:
        """What to keep so that another process can go on."""
        return tuple(watched.memory for watched in self._watched.values())

    def _new(self, memory: Memory) -> Watched:
        return Watched(memory, self._expected, false_alarm_rate=self._false_alarm_rate)

    def _read(self, url: str) -> Reading:
        snapshot, error = None, ""
        try:
            text = metrics.fetch(
                url, headers=self._headers, timeout_s=self._timeout_s, client=self._clients[url]
            )
            snapshot = metrics.parse(text, histograms=_HISTOGRAMS)
        except ServerError as found:
            error = str(found)
        return Reading(self._clock.wall_s(), self._clock.monotonic_s(), snapshot, error)


def read_targets(path: Path) -> tuple[str, ...]:
    """Server addresses in a file, one a line; blank lines and # comments are skipped.

    Raises InputError when the file cannot be read or a line is no address.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Targets file {path} cannot be read: {error}.", "Write one http://host:port a line."
        ) from error
    return tuple(
        check_url(line.split("#")[0].strip()) for line in lines if line.split("#")[0].strip()
    )


def check_url(url: str) -> str:
    """``url`` without a trailing slash or /v1; raises InputError unless it is http(s)://host."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(
            f"{url!r} is not a server's address: {error}.", "Write it as http://host:port."
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"{url!r} is not a server's address.", "Write it as http://host:port.")
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1")


def save_memories(path: Path, memories: Sequence[Memory]) -> None:
    """Write what a later process needs to go on; whole or not at all. Raises StoreError."""
    text = json.dumps({"schema": _MEMORY_SCHEMA, "replicas": [asdict(m) for m in memories]})
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)  # noqa: PTH105 - Path.replace reads like a string's
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}.", "Give another --state.") from error


def load_memories(path: Path) -> tuple[Memory, ...]:
    """What `save_memories` wrote; nothing for a file that is not there yet.

    Raises StoreError for a file that is something else.
    """
    if not path.exists():
        return ()
    next_step = "Give another --state, or remove it; the drift test then starts afresh."
    try:
        held = json.loads(path.read_text(encoding="utf-8"))  # bounds hold inf: json reads it back
        if held["schema"] != _MEMORY_SCHEMA:
            raise StoreError(
                f"{path} is of schema {held['schema']}, not {_MEMORY_SCHEMA}.", next_step
            )
        return TypeAdapter(tuple[Memory, ...]).validate_python(held["replicas"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(f"{path} is not a state of `specwise watch`.", next_step) from error
