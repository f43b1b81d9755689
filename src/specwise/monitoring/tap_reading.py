"""What an answer said about itself, read after it passed: never before the client has it.

A chunk costs a time stamp when it passes. Reading it waits in a queue that takes a slice of an
answer at a time, so that no stream waits for the reading of another for more than about a tenth of
a millisecond.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from specwise.domain import Outcome
from specwise.monitoring.tap_records import TapRecord
from specwise.monitoring.tap_requests import RequestFacts
from specwise.vllm.response import StreamReader, whole_answer

_SLICE_PIECES = 12
_QUEUE_EARLY_PIECES = 512
_PAUSE_S = 0.001
_TURN_S = 0.0001
_LONGEST_TURN_S = 0.002
_HURRY_ANSWERS = 32
_MAX_WHOLE_BYTES = 8 * 2**20


class Answer:
    """One answer as it passes: times and pieces, read in slices, then one record.

    Times are on the tap's clock; ``at`` is Unix seconds. ``status``, ``streamed`` (an event stream)
    and ``plain`` (not compressed) are set when the head of the answer passes.
    """

    __slots__ = (
        "_pieces",
        "_reader",
        "_times_s",
        "_whole_bytes",
        "at",
        "began_s",
        "ended_s",
        "facts",
        "outcome",
        "plain",
        "queued",
        "segment",
        "status",
        "streamed",
    )

    def __init__(self, *, at: float, began_s: float) -> None:
        self.at = at
        self.began_s = began_s
        self.ended_s: float | None = None
        self.facts: RequestFacts | None = None
        self.segment = ""
        self.status: int | None = None
        self.streamed = False
        self.plain = True
        self.outcome: Outcome | None = None
        self.queued = False
        self._times_s: list[float] = []
        self._pieces: list[bytes] = []
        self._whole_bytes = 0
        self._reader: StreamReader | None = None

    def passed(self, at_s: float, piece: bytes) -> None:
        """Note a piece of the body that has just gone to the client."""
        if not self.plain or self.status != 200:
            return
        if not self.streamed:
            self._whole_bytes += len(piece)
            if self._whole_bytes > _MAX_WHOLE_BYTES:
                self._pieces.clear()
                return
        self._times_s.append(at_s)
        self._pieces.append(piece)

    @property
    def unread_pieces(self) -> int:
        """Pieces that wait to be read."""
        return len(self._pieces)

    def read_slice(self, pieces: int) -> bool:
        """Read up to ``pieces``; whether all that has passed was read."""
        if not self.streamed:
            return True
        if self._reader is None:
            self._reader = StreamReader()
        self._reader.feed_all(self._times_s[:pieces], self._pieces[:pieces])
        del self._times_s[:pieces], self._pieces[:pieces]
        return not self._pieces

    def record(self) -> TapRecord:
        """The record of an answer that has ended and been read."""
        facts, outcome, ended_s = self.facts, self.outcome, self.ended_s
        if facts is None or outcome is None or ended_s is None:
            raise RuntimeError("an answer was recorded before it ended")
        ttft_s = tpot_s = last_s = acceptance = finish_reason = None
        prompt = output = cached = None
        chunks = 0
        if self._reader is not None:
            read = self._reader.finish(ended_s)
            prompt, output, cached = read.prompt_tokens, read.output_tokens, read.cached_tokens
            acceptance, finish_reason = read.acceptance, read.finish_reason
            chunks = len(read.chunk_s)
            if read.chunk_s:
                ttft_s = read.chunk_s[0] - self.began_s
                last_s = read.chunk_s[-1] - self.began_s
                if output is not None and output > 1 and read.done:
                    tpot_s = (last_s - ttft_s) / (output - 1)
            if read.fault is not None and outcome is Outcome.OK:
                outcome = Outcome.STREAM_ERROR
        elif self.status == 200 and 0 < self._whole_bytes <= _MAX_WHOLE_BYTES:
            whole = whole_answer(b"".join(self._pieces))
            if whole is not None:
                summary, finish_reason = whole
                prompt, output = summary.prompt_tokens, summary.output_tokens
                cached, acceptance = summary.cached_tokens, summary.acceptance
        self._pieces.clear()
        self._times_s.clear()
        return TapRecord(
            at=self.at,
            segment=self.segment,
            bucket=facts.bucket,
            path=facts.path,
            stream=self.streamed,
            outcome=outcome,
            e2e_s=ended_s - self.began_s,
            model=facts.model,
            temperature=facts.temperature,
            max_tokens=facts.max_tokens,
            response_format=facts.response_format,
            status=self.status,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            last_token_s=last_s,
            chunks=chunks,
            prompt_tokens=prompt,
            output_tokens=output,
            cached_tokens=cached,
            finish_reason=finish_reason,
            acceptance=acceptance,
        )


class ReadingQueue:
    """Reads answers while nothing else is due, a slice at a time, and hands on their records."""

    def __init__(self, on_record: Callable[[TapRecord], None]) -> None:
        self._on_record = on_record
        self._waiting: deque[Answer] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def passed(self, answer: Answer) -> None:
        """Queue an answer that goes on but has grown long, so that it does not pile up."""
        if answer.unread_pieces >= _QUEUE_EARLY_PIECES and answer.streamed and not answer.queued:
            self._add(answer)

    def ended(self, answer: Answer, outcome: Outcome, at_s: float) -> None:
        """An answer that has ended, once; its record follows when it has been read."""
        if answer.ended_s is not None:
            return
        answer.ended_s, answer.outcome = at_s, outcome
        if not answer.queued:
            self._add(answer)

    def _add(self, answer: Answer) -> None:
        answer.queued = True
        self._waiting.append(answer)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        # Turns grow with what waits, so that the queue stays short under any traffic.
        turn_s = min(_LONGEST_TURN_S, _TURN_S * (1 + len(self._waiting) // _HURRY_ANSWERS))
        until_s = time.monotonic() + turn_s
        while self._waiting:
            answer = self._waiting[0]
            if answer.unread_pieces and answer.streamed:
                answer.read_slice(_SLICE_PIECES)
            else:
                self._waiting.popleft()
                answer.queued = False
                if answer.ended_s is not None:
                    self._on_record(answer.record())
            if time.monotonic() >= until_s:  # not loop.time(), which stands still in a turn
                break
        if self._waiting:
            self._timer = loop.call_later(_PAUSE_S, self._tick)

    def finish(self) -> None:
        """Read all that waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            answer = self._waiting.popleft()
            answer.read_slice(answer.unread_pieces)
            if answer.ended_s is not None:
                self._on_record(answer.record())
