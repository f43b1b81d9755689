"""How a request ended: its outcome from what came over the wire, and a reason fit to be stored."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from specwise.domain import Outcome
from specwise.measurement.connection import Exchange
from specwise.vllm.response import Fault, StreamedResponse, error_message


def outcome_of(exchange: Exchange, response: StreamedResponse) -> tuple[Outcome, str | None]:
    """How a request ended, and the reason (not yet fit to be stored: ``presentable``) if not well.

    A status other than 200 goes before what the body says, and that before a cut connection.
    """
    status = exchange.status
    if status is not None and status != 200:
        return Outcome.HTTP_ERROR, f"HTTP {status}: {_http_reason(exchange, status)}"
    stopped = exchange.fault is not None and exchange.fault[0] is not Outcome.CUT
    if response.fault is not None and not stopped:
        return Outcome.STREAM_ERROR, _fault_reason(response.fault)
    if exchange.fault is not None:
        return exchange.fault
    if exchange.until_close and not response.done:
        return Outcome.CUT, "the server closed the connection before the stream was complete"
    if not response.done and (response.finish_reason is None or response.incomplete):
        kind = exchange.headers.get(b"content-type", b"?").decode("latin-1").split(";")[0]
        reason = (
            "the stream ended without a finish reason or [DONE]"
            if response.chunk_s
            else f"the answer ({kind}) is not a stream of completion chunks"
        )
        return Outcome.STREAM_ERROR, reason
    return Outcome.OK, None


def _fault_reason(fault: Fault) -> str:
    if not fault.by_server:
        return fault.message
    return f"the server reported an error in the stream: {fault.message or 'no message'}"


def _http_reason(exchange: Exchange, status: int) -> str:
    if 300 <= status < 400:
        place = exchange.headers.get(b"location", b"?").decode("latin-1").split("?")[0]
        return f"redirect to {place} not followed: give the final address"
    body = b"".join(exchange.pieces[:64])[:65536]
    try:
        message = error_message(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = ""
    return message or body[:200].decode("utf-8", "replace").strip() or "no message"


def presentable(message: str, headers: Mapping[str, str], request_body: bytes) -> str:
    """A message fit for a study: one line, short, without header values or parts of the prompt."""
    text = " ".join(message.split())[:2000]
    for value in headers.values():
        for secret in (value, *value.split()):
            if len(secret) > 5:
                text = text.replace(secret, "[redacted]")
    sent = " ".join(request_body.decode("utf-8", "replace").replace("\\n", " ").split())
    width = 24
    hidden = [False] * len(text)
    for i in range(len(text) - width + 1):
        if text[i : i + width] in sent:
            hidden[i : i + width] = [True] * width
    shown: list[str] = []
    for character, hide in zip(text, hidden, strict=True):
        if not hide:
            shown.append(character)
        elif not shown or shown[-1] != "[request text]":
            shown.append("[request text]")
    short = "".join(shown)
    return short if len(short) <= 300 else short[:299] + "…"
