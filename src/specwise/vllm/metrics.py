"""/metrics of a vLLM server as plain numbers under names of our own, and differences of them.

The names come from vLLM 0.32 (``v1/metrics/loggers.py``, ``v1/spec_decode/metrics.py``), earlier V1
releases and V0 (0.6, ``engine/metrics.py``). A server that does not export something has no entry
for it here: absent is not zero.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from specwise.domain import AcceptanceCounts, AcceptanceSource
from specwise.errors import InputError, ServerError

Generation = Literal["V0", "V1"]
_Value = TypeVar("_Value")

# Canonical names by the names that stand in the text. Some releases export a metric under its old
# name and its new one at once: the new name comes first here, and wins.
_COUNTERS = {
    "vllm:spec_decode_num_drafts_total": "spec_drafts",
    "vllm:spec_decode_num_draft_tokens_total": "spec_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "spec_accepted_tokens",
    "vllm:spec_decode_num_emitted_tokens_total": "spec_emitted_tokens",  # V0 only
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:gpu_prefix_cache_queries_total": "prefix_cache_queries",  # V1 up to 0.9
    "vllm:gpu_prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:request_success_total": "request_success",
    "vllm:request_queue_time_seconds_sum": "queue_s",
    "vllm:request_queue_time_seconds_count": "queued_requests",
}
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_use",
    "vllm:gpu_cache_usage_perc": "kv_use",  # V0, and V1 up to 0.9
}
_SHARES = {name for name, canonical in _GAUGES.items() if canonical == "kv_use"}
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": "ttft_s",
    "vllm:request_time_per_output_token_seconds": "tpot_s",
    "vllm:inter_token_latency_seconds": "step_gap_s",  # counts engine steps, not tokens
    "vllm:time_per_output_token_seconds": "step_gap_s",  # the same under its name up to 0.10
    "vllm:e2e_request_latency_seconds": "e2e_s",
    "vllm:request_queue_time_seconds": "queue_s",
    "vllm:request_prefill_time_seconds": "prefill_s",
    "vllm:request_decode_time_seconds": "decode_s",
    "vllm:request_inference_time_seconds": "inference_s",
}
# Only V0 swapped requests; only V1 counts prefix-cache queries.
_V0_MARK = "vllm:num_requests_swapped"
_V1_MARKS = ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total")
# V0 exports its speculation counters at the first verify step, this gauge with them.
_V0_SPECULATES = "vllm:spec_decode_draft_acceptance_rate"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative: ``at_most[i]`` observations were at most ``bounds[i]``; the last bound is inf."""

    bounds: tuple[float, ...]
    at_most: tuple[float, ...]
    total: float

    @property
    def count(self) -> float:
        """Observations in all."""
        return self.at_most[-1] if self.at_most else 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of /metrics, summed over engines (``kv_use``, a share, is the fullest engine's).

    Keys are canonical names; what the server does not export is not there. ``process_start_s`` is
    when the server process started (Unix time), where it says so.
    """

    counters: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    generation: Generation | None = None
    speculative: bool | None = None
    process_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What happened between two snapshots. ``reset`` says that the server restarted in between.

    After a reset both mappings are empty: what was counted before the restart is lost.
    """

    counters: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    reset: bool = False


def scrape(
    url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 10.0
) -> Snapshot:
    """Read and parse the server's /metrics; raises ServerError as `fetch` and `parse` do."""
    return parse(fetch(url, headers=headers, timeout_s=timeout_s))


def fetch(
    url: str,
    path: str = "/metrics",
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 10.0,
    verify_tls: bool = True,
    client: httpx.Client | None = None,
) -> str:
    """The text that a server answers to GET ``url`` + ``path``, redirects not followed.

    ``client`` reuses one (see `quiet_client`) and with it the connection; its own TLS and proxy
    settings hold then. Raises InputError for a URL that is none, ServerError when nothing answers
    in time, access is refused, or the status is not 200. Proxies of the environment are not used
    for servers on this machine.
    """
    address = url.rstrip("/") + path
    try:
        with contextlib.ExitStack() as stack:
            if client is None:
                client = stack.enter_context(quiet_client(url, verify_tls=verify_tls))
            response = client.get(address, headers=dict(headers or {}), timeout=timeout_s)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(
            f"{url!r} is not a server's address: {error}.", "Write it as http://host:port."
        ) from error
    except httpx.TimeoutException as error:
        raise ServerError(
            f"{address} did not answer within {timeout_s:g} s.",
            "Check that the server is not overloaded or stopped, or allow more time.",
        ) from error
    except httpx.HTTPError as error:
        raise ServerError(
            f"Cannot reach {url}: {error}.",
            "Check the address and port, and that the server is up.",
        ) from error
    if response.status_code in (401, 403):
        raise ServerError(
            f"{url} refuses access (HTTP {response.status_code} at {path}).",
            "Put the API key into an environment variable and name it as api_key_env.",
        )
    if response.is_redirect:
        raise ServerError(
            f"{address} redirects to {response.headers.get('location')}, which is not followed.",
            "Give the address that it redirects to.",
        )
    if response.status_code != 200:
        raise ServerError(
            f"{address} answers HTTP {response.status_code}.",
            "Check that the address is that of a vLLM server, without a path such as /v1.",
        )
    return response.text


def quiet_client(url: str, *, verify_tls: bool = True) -> httpx.Client:
    """A client for repeated `fetch` calls beside a running load: each costs well under 1 ms."""
    local = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    return httpx.Client(verify=_tls_context() if verify_tls else False, trust_env=not local)


@cache
def _tls_context() -> ssl.SSLContext:
    """Loading the certificates takes 50 ms, which a gauge sampled during a run cannot afford."""
    return httpx.create_ssl_context()


def parse(text: str, *, histograms: Collection[str] | None = None) -> Snapshot:
    """The vLLM part of a Prometheus text; raises ServerError when it is not such a text.

    With ``histograms``, canonical names, no other histogram is read and lines of no interest are
    not parsed: a seventh of the time, for those who read a hundred servers every few seconds.
    """
    if histograms is not None:
        text = _lines_of_interest(text, frozenset(histograms))
    sums: dict[str, float] = {}
    largest: dict[str, float] = {}
    per_position: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for sample in _samples(text):
        name, value = sample.name, sample.value
        sums[name] = sums.get(name, 0.0) + value
        largest[name] = max(largest.get(name, value), value)
        if name == _PER_POSITION:
            position = f"spec_accepted_pos_{sample.labels['position']}"
            per_position[position] = per_position.get(position, 0.0) + value
        elif name.removesuffix("_bucket") in _HISTOGRAMS and "le" in sample.labels:
            bounds = buckets.setdefault(name.removesuffix("_bucket"), {})
            bound = float(sample.labels["le"])
            bounds[bound] = bounds.get(bound, 0.0) + value
    histograms = {
        family: _histogram(bounds, sums.get(f"{family}_sum", 0.0))
        for family, bounds in buckets.items()
    }
    return Snapshot(
        counters=_canonical(_COUNTERS, sums) | per_position,
        gauges=_canonical(_GAUGES, sums | {name: largest[name] for name in _SHARES & sums.keys()}),
        histograms=_canonical(_HISTOGRAMS, histograms),
        generation=_generation(sums.keys()),
        speculative=_speculates(sums.keys()),
        process_start_s=sums.get("process_start_time_seconds"),
    )


def difference(before: Snapshot, after: Snapshot) -> Delta:
    """What was counted between two snapshots of one server.

    A counter that first appears in ``after`` started from zero, as Prometheus counters do; one that
    is absent from both stays absent. A counter that fell or vanished, or another start time of the
    process, means a restart: ``reset``, and nothing else.
    """
    fell = any(after.counters.get(name, -1.0) < value for name, value in before.counters.items())
    starts = (before.process_start_s, after.process_start_s)
    if fell or (None not in starts and starts[0] != starts[1]):
        return Delta(reset=True)
    return Delta(
        counters={
            name: value - before.counters.get(name, 0.0) for name, value in after.counters.items()
        },
        histograms={
            name: _subtract(histogram, before.histograms.get(name))
            for name, histogram in after.histograms.items()
        },
    )


def acceptance_from(delta: Delta) -> AcceptanceCounts | None:
    """Verify steps by number of accepted drafts, from V1's counters per draft position.

    ``spec_accepted_pos_i`` counts the steps that accepted at least i + 1 drafts, so neighbouring
    positions differ by the steps that accepted exactly that many. None where the server does not
    export these counters (V0, or no speculation), counted no verify step, restarted, or was read
    in the middle of an update so that the counts contradict each other.
    """
    steps = delta.counters.get("spec_drafts", 0.0)
    at_least = [steps]
    while (position := f"spec_accepted_pos_{len(at_least) - 1}") in delta.counters:
        at_least.append(delta.counters[position])
    drafted = delta.counters.get("spec_draft_tokens")
    if steps <= 0 or len(at_least) == 1 or drafted is None:
        return None
    exactly = [more - less for more, less in zip(at_least, [*at_least[1:], 0.0], strict=True)]
    if min(exactly) < 0:
        return None
    return AcceptanceCounts(
        source=AcceptanceSource.COUNTERS,
        steps_by_accepted=tuple(round(count) for count in exactly),
        drafted_tokens=round(drafted),
    )


def _samples(text: str) -> Iterable[Sample]:
    try:
        for family in text_string_to_metric_families(text):
            yield from family.samples
    except (ValueError, KeyError, IndexError) as error:
        raise ServerError(
            f"/metrics is not in Prometheus' text format: {error}.",
            "Check that the address is that of a vLLM server.",
        ) from error


def _lines_of_interest(text: str, histograms: frozenset[str]) -> str:
    wanted = _prefixes(histograms)
    return "\n".join(line for line in text.splitlines() if line.startswith(wanted)) + "\n"


@cache
def _prefixes(histograms: frozenset[str]) -> tuple[str, ...]:
    families = [name for name, canonical in _HISTOGRAMS.items() if canonical in histograms]
    marks = (_PER_POSITION, _V0_MARK, *_V1_MARKS, _V0_SPECULATES, "process_start_time_seconds")
    return (*_COUNTERS, *_GAUGES, *marks, *families)


def _canonical(names: Mapping[str, str], values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Values under canonical names; where a release exports an old and a new name, the new one."""
    found: dict[str, _Value] = {}
    for name, canonical in names.items():
        if name in values:
            found.setdefault(canonical, values[name])
    return found


def _histogram(buckets: Mapping[float, float], total: float) -> Histogram:
    bounds = tuple(sorted(buckets))
    return Histogram(bounds, tuple(buckets[bound] for bound in bounds), total)


def _subtract(after: Histogram, before: Histogram | None) -> Histogram:
    if before is None or before.bounds != after.bounds:
        return after
    at_most = tuple(a - b for a, b in zip(after.at_most, before.at_most, strict=True))
    return Histogram(after.bounds, at_most, after.total - before.total)


def _generation(seen: Collection[str]) -> Generation | None:
    if _V0_MARK in seen:
        return "V0"
    return "V1" if any(mark in seen for mark in _V1_MARKS) else None


def _speculates(seen: Collection[str]) -> bool | None:
    """V1 exports its speculation counters from the start, or never; V0 says nothing until it has.

    None when it cannot be told.
    """
    if "vllm:spec_decode_num_drafts_total" in seen or _V0_SPECULATES in seen:
        return True
    return False if _generation(seen) == "V1" else None
