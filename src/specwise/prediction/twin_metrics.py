"""/metrics of a twin, under the names and labels of vLLM V1 (0.32) or V0 (0.6)."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from specwise.prediction.live_request import LiveRequest
from specwise.prediction.truth import ServerTruth

# Bounds of `v1/metrics/loggers.py`, in seconds.
_TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class TwinMetrics:
    """Counts what the twin does and writes it down the way the engine it plays would."""

    def __init__(self, truth: ServerTruth) -> None:
        self._truth = truth
        self._v1 = truth.generation == "V1"
        self._registry = CollectorRegistry()
        self._labels = {"model_name": truth.model} | ({"engine": "0"} if self._v1 else {})
        self._first_s: dict[LiveRequest, float] = {}
        self._declare()

    def received(self, live: LiveRequest) -> None:
        """A request was accepted."""
        if self._v1:
            self._queries.inc(live.prompt)
            self._hits.inc(live.cached)

    def first_token(self, live: LiveRequest, now_s: float) -> None:
        """A request's first token left."""
        self._prompt_tokens.inc(live.prompt)
        self._ttft.observe(now_s - live.arrival_s)
        self._first_s[live] = now_s

    def generated(self, tokens: int) -> None:
        """Output tokens of one request in one step."""
        self._generation_tokens.inc(tokens)

    def verified(self, drafts: int, accepted: int, acceptance: tuple[float, ...]) -> None:
        """One request's verify step; ``acceptance`` is the conditional truth of its positions."""
        if self._drafts is None:
            self._declare_speculation()
        assert self._drafts is not None  # noqa: S101 - just declared
        self._draft_tokens.inc(drafts)
        if self._v1:
            self._drafts.inc()
            self._accepted.inc(accepted)
            for position in self._positions[:accepted]:
                position.inc()
            return
        # V0 counted a position whose draft would pass, even behind one that did not: add what the
        # positions behind the rejected one give on average.
        self._accepted.inc(accepted + sum(acceptance[accepted + 1 : drafts]))
        self._drafts.inc(accepted + 1)

    def preempted(self, requests: int) -> None:
        """Requests that lost their cache in a step."""
        if requests:
            self._preemptions.inc(requests)

    def finished(self, live: LiveRequest, reason: str, now_s: float) -> None:
        """A request ended: ``length`` or ``stop``, or ``abort`` when its client left."""
        self._success.labels(*self._labels.values(), reason).inc()
        first_s = self._first_s.pop(live, None)
        if first_s is not None and reason != "abort":
            self._e2e.observe(now_s - live.arrival_s)
            if self._v1:
                self._queue.observe(live.admitted_s - live.arrival_s)
                self._prefill.observe(first_s - live.admitted_s)
                self._decode.observe(now_s - first_s)
                self._inference.observe(now_s - live.admitted_s)
            if live.output > 1:
                self._tpot.observe((now_s - first_s) / (live.output - 1))

    def text(self, *, running: int, waiting: int, kv_use: float, lag_s: tuple[float, float]) -> str:
        """The Prometheus text; ``lag_s`` is the twin's own (p99, max)."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_use.set(kv_use)
        if self._drafts is not None and not self._v1:
            drafted, k = _value(self._draft_tokens), self._truth.k
            self._rate.set(_value(self._accepted) / drafted)
            self._efficiency.set(_value(self._drafts) / (drafted / k * (k + 1)))
        self._lag_p99.set(lag_s[0])
        self._lag_max.set(lag_s[1])
        return generate_latest(self._registry).decode()

    def _declare(self) -> None:
        v1 = self._v1
        self._running = self._gauge("num_requests_running", "Requests in execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting.")
        usage = "kv_cache_usage_perc" if v1 else "gpu_cache_usage_perc"
        self._kv_use = self._gauge(usage, "KV-cache usage; 1 means 100 percent.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prefill tokens processed.")
        self._generation_tokens = self._counter("generation_tokens", "Generation tokens.")
        self._preemptions = self._counter("num_preemptions", "Preemptions.")
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", _TTFT_BOUNDS_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", _REQUEST_BOUNDS_S)
        per_token = "request_time_per_output_token" if v1 else "time_per_output_token"
        self._tpot = self._histogram(f"{per_token}_seconds", _TOKEN_BOUNDS_S)
        if v1:
            self._queries = self._counter("prefix_cache_queries", "Prefix cache queries, tokens.")
            self._hits = self._counter("prefix_cache_hits", "Prefix cache hits, tokens.")
            self._queue = self._histogram("request_queue_time_seconds", _REQUEST_BOUNDS_S)
            self._prefill = self._histogram("request_prefill_time_seconds", _REQUEST_BOUNDS_S)
            self._decode = self._histogram("request_decode_time_seconds", _REQUEST_BOUNDS_S)
            self._inference = self._histogram("request_inference_time_seconds", _REQUEST_BOUNDS_S)
        else:
            self._gauge("num_requests_swapped", "Requests swapped to CPU.")
            self._gauge("cpu_cache_usage_perc", "CPU KV-cache usage.")
        self._drafts: Counter | None = None
        if self._truth.k and v1:
            self._declare_speculation()  # V0 exports these at its first verify step
        start = Gauge(
            "process_start_time_seconds", "Start of the process.", registry=self._registry
        )
        start.set(time.time())
        lag = "Lateness of chunks against the twin's own schedule, seconds: "
        self._lag_p99 = Gauge("specwise_twin_lag_p99_seconds", lag + "p99", registry=self._registry)
        self._lag_max = Gauge("specwise_twin_lag_max_seconds", lag + "max", registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", text, [*self._labels], registry=self._registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vllm:{name}", text, [*self._labels], registry=self._registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, bounds_s: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", name, [*self._labels], buckets=bounds_s, registry=self._registry
        )
        return histogram.labels(**self._labels)

    def _declare_speculation(self) -> None:
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted tokens.")
        if self._v1:
            self._drafts = self._counter("spec_decode_num_drafts", "Verify steps.")
            positions = Counter(
                "vllm:spec_decode_num_accepted_tokens_per_pos",
                "Accepted tokens per draft position.",
                [*self._labels, "position"],
                registry=self._registry,
            )
            self._positions = [
                positions.labels(*self._labels.values(), str(position))
                for position in range(self._truth.k)
            ]
        else:
            self._drafts = self._counter("spec_decode_num_emitted_tokens", "Emitted tokens.")
            self._rate = self._gauge("spec_decode_draft_acceptance_rate", "Acceptance rate.")
            self._efficiency = self._gauge("spec_decode_efficiency", "System efficiency.")


def _value(counter: Counter) -> float:
    (sample,) = [
        s for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")
    ]
    return float(sample.value)
