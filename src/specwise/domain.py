"""The nouns of specwise: frozen values that every other module speaks in.

Nothing here reads a file, opens a socket or knows a vLLM flag. Times are seconds unless the name
says otherwise; a time inside a record counts from the start of its trial part, on a monotonic
clock, so that two records of one part can be compared to the microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)


@dataclass(frozen=True, slots=True)
class Speculation:
    """How an arm speculates.

    ``k`` is the draft length (``num_speculative_tokens``); ``draft`` the draft model's path or hub
    id, None for methods without one (ngram, suffix). ``schedule`` holds (first batch size, last
    batch size, k) rows, empty when k is static. ``options`` are further fields of the engine's
    speculative configuration, passed on as they are.
    """

    method: str
    k: int
    draft: str | None = None
    schedule: tuple[tuple[int, int, int], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deployment:
    """How specwise starts a server: the model, the engine that runs it and its arguments.

    ``engine`` is "embedded" for the vLLM that specwise installs itself, otherwise the path of a
    Python interpreter that can import vLLM. ``arguments`` are vLLM's own, one list entry per word.
    """

    model: str
    engine: str = "embedded"
    served_name: str = ""
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arm:
    """One serving configuration under test; the baseline arm has no ``speculation``.

    Exactly one of ``deployment`` (specwise starts it) and ``url`` (it runs already) is set.
    ``speculation`` of a ``url`` arm is what its owner says it runs; the probe checks what it can.
    """

    name: str
    speculation: Speculation | None = None
    deployment: Deployment | None = None
    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this arm serves without speculation."""
        return self.speculation is None


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that cache alike: keys and values of ``heads`` heads, or one compressed ``latent``.

    ``latent`` (MLA) is the width cached per token and layer; it is not split over GPUs. ``window``
    is the sliding window in tokens, None for full attention.
    """

    layers: int
    heads: int
    head_dim: int
    latent: int = 0
    window: int | None = None

    @property
    def elements_per_token(self) -> int:
        """Numbers cached per token over the group's layers, unsplit."""
        return self.layers * (self.latent or 2 * self.heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are stored: the method's name and bits per weight."""

    method: str
    weight_bits: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model's metadata says, without its weights.

    ``parameters_from`` is "safetensors" (counted in the headers), "config" (by formula) or "table";
    ``weight_bytes`` is the size of the stored tensors where the headers were read. ``source`` says
    where the metadata came from, ``folder`` where its files lie, ``notes`` what is uncertain.
    """

    name: str
    source: str
    architecture: str
    parameters: int
    active_parameters: int
    parameters_from: str
    weight_bytes: int | None
    layers: int
    hidden_size: int
    attention_heads: int
    vocab_size: int
    max_positions: int | None
    kv_groups: tuple[KvGroup, ...]
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    tied_embeddings: bool = False
    mtp_layers: int = 0
    experts: int = 0  # of a sparse layer; 0 for a dense model
    active_experts: int = 0  # that one token goes through
    head_method: str | None = None  # eagle, eagle3, medusa: a head, not a model of its own
    family: str = ""
    tokenizer_family: str = ""
    folder: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers cached per token over all layers, as if none had a window."""
        return sum(group.elements_per_token for group in self.kv_groups)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An accelerator by its data sheet; ``memory_bytes`` is what a process can see of it.

    ``vendor_gb`` is the number on the box, ``*_flops`` dense operations per second, ``link`` bytes
    per second in one direction to the next GPU.
    """

    name: str
    vendor_gb: float
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    int8_flops: float | None
    link_bytes_per_s: float
    compute_capability: tuple[int, int]
    source: str


class Api(StrEnum):
    """The OpenAI endpoint a segment's prompts are sent to."""

    CHAT = "chat"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True)
class Segment:
    """Requests of one kind: where the prompts come from and how they are sampled.

    ``template`` makes the prompts of a source with columns, ``{column}`` each; empty for others.
    ``same_prompts_as`` names the segment that this one is a variant of: it is sent the very same
    prompts, sampled otherwise; empty for a segment of its own.
    """

    name: str
    prompts: str
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    api: Api = Api.CHAT
    template: str = ""
    same_prompts_as: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one trial sends: shares of segments, adding up to 1. A pure segment has one share."""

    name: str
    shares: tuple[tuple[str, float], ...]

    @property
    def is_mix(self) -> bool:
        """Whether requests of several segments share the server."""
        return len(self.shares) > 1


class Loop(StrEnum):
    """Who paces the requests: the clients (closed) or the schedule (open)."""

    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True, slots=True, order=True)
class LoadPoint:
    """An arrival rate (open loop, requests per second) or a concurrency (closed loop).

    ``arrivals`` names the open loop's process: constant, poisson, gamma or trace. ``burstiness``
    is the gamma process's shape (1 is Poisson, below 1 bursts); ``trace`` a file of send times.
    """

    loop: Loop
    value: float
    arrivals: str = ""
    burstiness: float = 1.0
    trace: str = ""

    @property
    def label(self) -> str:
        """Short form for tables and folder names: ``c16`` or ``2.5rps``."""
        return f"c{self.value:g}" if self.loop is Loop.CLOSED else f"{self.value:g}rps"


@dataclass(frozen=True, slots=True)
class Slo:
    """What each request must meet to count as goodput, and what the service is bound by.

    A limit of None does not apply. ``bound`` is "ttft", "tpot" or "throughput".
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    bound: str = "tpot"


class AcceptanceSource(StrEnum):
    """Where an acceptance figure came from, best first."""

    PER_REQUEST = "per_request"  # the server's own figures in the response
    COUNTERS = "counters"  # /metrics differences around a trial on an otherwise idle server
    CHUNKS = "chunks"  # inferred from tokens per streamed chunk: an estimate


@dataclass(frozen=True, slots=True)
class AcceptanceCounts:
    """Verify steps of one request (or trial) by the number of drafts accepted.

    ``steps_by_accepted[i]`` is how many verify steps accepted exactly i drafts.
    ``drafted_tokens`` is None where the source cannot tell (chunks).
    """

    source: AcceptanceSource
    steps_by_accepted: tuple[int, ...]
    drafted_tokens: int | None

    @property
    def steps(self) -> int:
        """Number of verify steps."""
        return sum(self.steps_by_accepted)

    @property
    def accepted_tokens(self) -> int:
        """Drafts accepted over all steps."""
        return sum(i * n for i, n in enumerate(self.steps_by_accepted))


class Outcome(StrEnum):
    """How a request ended. Everything but OK counts against goodput."""

    OK = "ok"
    HTTP_ERROR = "http_error"  # a status other than 200
    STREAM_ERROR = "stream_error"  # malformed or server-reported error inside the stream
    CUT = "cut"  # the connection closed before the stream ended
    TIMEOUT = "timeout"
    REFUSED = "refused"  # no connection
    CANCELLED = "cancelled"  # stopped by the user or by the end of the run


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as it happened: the raw material of every figure.

    Times are seconds from the start of the trial part ``part``. ``intended_s`` is when the
    schedule wanted it on the wire (closed loop: when a client became free), ``sent_s`` just before
    the socket write. ``chunk_s[i]`` is when SSE chunk i arrived and ``chunk_tokens[i]`` the output
    tokens it carried, or None where the server does not say. ``prompt_tokens`` and
    ``output_tokens`` are the server's usage, never counted from chunks. ``output_sha256`` allows
    equality checks without keeping text.
    """

    index: int
    prompt_id: str
    segment: str
    temperature: float
    part: int
    intended_s: float
    sent_s: float
    chunk_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...] | None
    finished_s: float
    outcome: Outcome
    status: int | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    acceptance: AcceptanceCounts | None = None
    output_sha256: str | None = None
    output_text: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """Arrival of the first chunk that carried output, None if none did."""
        if self.chunk_tokens is None:
            return self.chunk_s[0] if self.chunk_s else None
        return next((t for t, n in zip(self.chunk_s, self.chunk_tokens, strict=True) if n), None)


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """The load generator's own condition during a trial part.

    ``lateness_s_p99`` is sent minus intended (open loop), ``loop_lag_s_p99`` how late its own
    timer ran, ``cpu_share`` its processor time over wall time, per worker.
    """

    lateness_s_p50: float
    lateness_s_p99: float
    loop_lag_s_p99: float
    cpu_share: float


@dataclass(frozen=True, slots=True)
class GaugeSample:
    """Server gauges at one moment of a trial part; None is "not exported", never zero."""

    at_s: float
    running: float | None
    waiting: float | None
    kv_use: float | None


@dataclass(frozen=True, slots=True)
class GpuSeries:
    """One GPU of the server's machine over a trial part, about one sample a second.

    ``at_s[i]`` is when sample i was taken; ``utilisation`` the share of time in which a kernel ran,
    0 to 1, over the driver's last sampling period (a sixth of a second to a second). None is "the
    driver does not say", never zero.
    """

    index: int
    name: str
    memory_total_bytes: int | None
    at_s: tuple[float, ...]
    memory_used_bytes: tuple[int | None, ...]
    utilisation: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class TrialPart:
    """One uninterrupted stretch of a trial; a resumed trial has several.

    ``number`` is the ``part`` of its records. A part that was killed leaves records and no
    `TrialPart`. ``counters`` are the differences of the server's counters over the part, by
    canonical name; ``counters_reset`` says that the server restarted inside it, which makes them
    unusable. ``gpu_note`` says why ``gpus`` is empty, where it was tried.
    """

    started_at: str
    duration_s: float
    client: ClientHealth
    counters: Mapping[str, float] = field(default_factory=dict)
    counters_reset: bool = False
    gauges: tuple[GaugeSample, ...] = ()
    number: int = 0
    gpus: tuple[GpuSeries, ...] = ()
    gpu_note: str = ""


class Purpose(StrEnum):
    """Why a trial runs."""

    MEASURE = "measure"
    NOISE_FLOOR = "noise_floor"  # the baseline once more, same prompts: the A/A trial


@dataclass(frozen=True, slots=True)
class Trial:
    """One arm at one load point, once: its place in the design."""

    trial_id: str
    arm: str
    workload: str
    load: LoadPoint
    repeat: int
    purpose: Purpose
    requests: int


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """When a tuning has searched enough: ``tolerance`` is the share of goodput, averaged over the
    loads, that its answer may lose (95 %); ``budget_s`` what it may take, None for any time."""

    tolerance: float = 0.02
    budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class PickRecord:
    """One trial that a tuning chose, in its journal, in the order in which they ended.

    ``regret_bound`` is what choosing then and there could have lost, None where the chooser did not
    say. ``seconds`` is what the trial took, ``start_s`` what starting its server took, where it had
    to be started. A trial whose server failed stands there too, with what trying took.
    """

    trial_id: str
    reason: str
    regret_bound: float | None
    started_server: bool
    start_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class StudyDesign:
    """Everything that was decided before the first request.

    ``arms[0]`` is the baseline. ``production_load`` is the load point that the verdict is about.
    ``trials`` stand in the order of execution. ``warmup`` is the number of warm-up prompts per
    segment; ``servers_together`` keeps all servers that specwise starts in memory, the idle ones
    suspended, so that arms can alternate; ``keep_text`` stores the outputs because the user asked.
    ``experiment`` names what the design was made for ("temperature", "ladder", "mixed"): the report
    has a page for it. Empty for a plain study; "tune" for the sweep of a tuning, whose ``trials``
    are chosen from as it goes, until ``tune`` says that it is enough.
    """

    name: str
    seed: int
    arms: tuple[Arm, ...]
    segments: tuple[Segment, ...]
    workloads: tuple[Workload, ...]
    loads: tuple[LoadPoint, ...]
    production_load: LoadPoint
    production_workload: str
    slo: Slo
    trials: tuple[Trial, ...]
    timeout_s: float
    warmup: int = 2
    servers_together: bool = True
    keep_text: bool = False
    experiment: str = ""
    tune: TuneSettings | None = None

    def arm(self, name: str) -> Arm:
        """The arm of that name; KeyError if there is none."""
        return _named(name, self.arms)

    def segment(self, name: str) -> Segment:
        """The segment of that name; KeyError if there is none."""
        return _named(name, self.segments)

    def workload(self, name: str) -> Workload:
        """The workload of that name; KeyError if there is none."""
        return _named(name, self.workloads)


def _named(name: str, items: Sequence[_Named]) -> _Named:
    """The item whose ``name`` matches; KeyError with the name if none does."""
    for item in items:
        if item.name == name:
            return item
    raise KeyError(name)


@dataclass(frozen=True, slots=True)
class MeasuredTrial:
    """A trial and what happened in it. ``complete`` is False for one that was interrupted."""

    trial: Trial
    records: tuple[RequestRecord, ...]
    parts: tuple[TrialPart, ...]
    complete: bool


@dataclass(frozen=True, slots=True)
class StudyData:
    """A study folder read back: the design, its provenance and every trial measured so far.

    ``predicted`` marks data that a simulation made; everything shown from it must say so.
    ``skipped`` holds the trials that the study decided not to run, by id, with the reason.
    """

    design: StudyDesign
    provenance: Mapping[str, Any]
    trials: tuple[MeasuredTrial, ...]
    folder: str
    predicted: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)


class Losslessness(StrEnum):
    """Whether an arm's output is what it would be without speculation."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    UNKNOWN = "unknown"  # nothing was seen, and a change could have gone unseen


@dataclass(frozen=True, slots=True)
class GreedyDifference:
    """The first token at which the greedy outputs of one prompt part.

    ``position`` counts output tokens from 0. Before it both servers saw the same tokens, so their
    logprobs are comparable: ``baseline_gap`` is the logprob of the baseline's token less that of
    the candidate's token on the baseline, ``candidate_gap`` the reverse on the candidate, in nats;
    None where the server did not tell. ``near_tie`` says that the gap on the baseline is within
    numerical noise; None if that cannot be told.
    """

    prompt_id: str
    position: int
    baseline_token: int | None
    candidate_token: int | None
    baseline_gap: float | None
    candidate_gap: float | None
    near_tie: bool | None


@dataclass(frozen=True, slots=True)
class GreedyComparison:
    """Token equality at temperature 0.

    ``logprob_noise`` is the largest difference between logprobs of one token after the same tokens,
    computed by another server or in another batch, ``tolerance`` the gap up to which a difference
    counts as a near-tie (nats).
    ``self_differing`` is how many prompts the baseline itself answers differently when asked twice.
    """

    prompts: int
    tokens: int
    equal: int
    differences: tuple[GreedyDifference, ...]
    logprob_noise: float | None
    tolerance: float | None
    self_differing: int | None


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """A two-sample test: its statistic on the data and how often chance alone reaches it.

    ``p_adjusted`` is Holm's, so that the false-alarm rate holds for all tests of a comparison.
    """

    name: str
    statistic: float
    null_mean: float
    p_value: float
    p_adjusted: float


@dataclass(frozen=True, slots=True)
class PositionDistance:
    """Total variation between the servers' tokens at an output position (from 0), prompts' mean.

    ``null_low`` and ``null_high`` hold 95 % of what two samples of one distribution would show.
    """

    position: int
    distance: float
    null_low: float
    null_high: float


@dataclass(frozen=True, slots=True)
class SamplingComparison:
    """The two-sample tests at a temperature above 0, ``samples`` per prompt and server.

    ``power`` is the probability that a total variation of ``effect`` at every speculated token is
    found, ``detectable`` the smallest one found with probability ``power_wanted`` (None: none up
    to 1), ``samples_needed`` the samples at which ``effect`` is found with it (None: not known).
    ``room`` is the mean probability of all but the likeliest token at a speculated position.
    """

    prompts: int
    samples: int
    tokens: int
    temperature: float
    top_p: float
    false_alarm_rate: float
    tests: tuple[PermutationTest, ...]
    positions: tuple[PositionDistance, ...]
    effect: float
    power: float
    power_wanted: float
    detectable: float | None
    samples_needed: int | None
    room: float

    @property
    def changed(self) -> bool:
        """Whether any test rejects equality at the stated false-alarm rate."""
        return any(test.p_adjusted <= self.false_alarm_rate for test in self.tests)


@dataclass(frozen=True, slots=True)
class LosslessnessResult:
    """What `specwise verify` found for one arm; ``reasons`` say it in words, weightiest first.

    ``drafted_tokens`` and ``accepted_tokens`` are the candidate's counters over the check, None
    where it exports none: a candidate that drafted nothing has shown nothing.
    """

    arm: str
    model: str
    verdict: Losslessness
    reasons: tuple[str, ...]
    greedy: GreedyComparison | None
    sampling: SamplingComparison | None
    drafted_tokens: int | None
    accepted_tokens: int | None
    baseline_version: str | None
    candidate_version: str | None
    seed: int
    measured_at: str
