"""The truth file of a twin: which servers it plays, and what is true of each."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from specwise.domain import Speculation
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.prediction.costs import StepCosts, StepShape, roofline
from specwise.prediction.scheduler import SchedulerConfig

TRUTH_SCHEMA = 1

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
# One probability for every position, one for each, or one of these by temperature.
Acceptance = Probability | list[Probability] | dict[str, Probability | list[Probability]]


@dataclass(frozen=True, slots=True)
class LinearCosts:
    """Step times as a plane over tokens and cache entries: simple enough to write into a file.

    The draft's ``draft_pass_s`` is for one pass with one token; its first pass runs over all tokens
    of the step, the others over one a request.
    """

    target_pass_s: float
    token_s: float = 0.0
    context_token_s: float = 0.0
    draft_pass_s: float = 0.0
    draft_token_s: float = 0.0
    overhead_each_s: float = 0.0
    speculates: bool = False

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:  # noqa: ARG002
        """Seconds of the target's pass."""
        return self.target_pass_s + self.token_s * tokens + self.context_token_s * context_tokens

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """Seconds of the drafter: a first pass even where k is 0, as in vLLM, then k - 1."""
        if not self.speculates:
            return 0.0 * tokens
        later = np.maximum(k - 1, 0)
        return self.draft_pass_s * (1 + later) + self.draft_token_s * (tokens + later * requests)

    def overhead_s(self, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """Seconds of host work between passes."""
        return self.overhead_each_s + 0.0 * requests

    def step_s(self, shape: StepShape) -> Any:
        """Seconds of the whole step: the three in turn."""
        tokens, context, requests, k = (
            shape.tokens,
            shape.context_tokens,
            shape.requests,
            shape.k,
        )
        return (
            self.target_s(tokens, context, requests)
            + self.draft_s(tokens, context, requests, k)
            + self.overhead_s(requests, k)
        )


@dataclass(frozen=True, slots=True)
class SegmentTruth:
    """A kind of request: how it is recognised, and how long its answers are.

    ``match`` is searched for in the prompt; None takes what no other segment does.
    ``output_tokens`` (low, high) is drawn from the prompt, so that all servers agree; None answers
    with max_tokens. ``cached_share`` of each prompt is found in the prefix cache.
    """

    name: str
    match: re.Pattern[str] | None
    output_tokens: tuple[int, int] | None
    cached_share: float


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, with every n-th request; ``restart`` once, ``at_s`` after the start."""

    kind: str
    every: int
    status: int
    after_chunks: int
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class ServerTruth:
    """One server of a twin: all that it will answer by."""

    name: str
    port: int
    model: str
    generation: Literal["V0", "V1"]
    version: str
    per_request_metrics: bool
    seed: int
    characters_per_token: float
    max_model_len: int
    config: SchedulerConfig
    costs: StepCosts
    segments: tuple[SegmentTruth, ...]
    # By segment: (temperature, conditional acceptance by position), temperatures ascending.
    acceptance: Mapping[str, tuple[tuple[float, tuple[float, ...]], ...]]
    draft_probability: Mapping[str, float]
    faults: tuple[Fault, ...]

    @property
    def k(self) -> int:
        """The configured draft length, 0 without speculation."""
        return self.config.k if self.config.method is not None else 0

    def segment_of(self, prompt: str, named: str | None) -> SegmentTruth:
        """The segment that ``named`` names, else the first whose rule matches, else the default."""
        for segment in self.segments:
            if segment.name == named:
                return segment
        for segment in self.segments:
            if segment.match is not None and segment.match.search(prompt):
                return segment
        return next(segment for segment in self.segments if segment.match is None)

    def acceptance_of(self, segment: str, temperature: float) -> tuple[float, ...]:
        """Conditional acceptance by position, interpolated between the temperatures given."""
        rows = self.acceptance.get(segment, ())
        if not rows or not self.k:
            return ()
        temperatures = [at for at, _ in rows]
        return tuple(
            float(np.interp(temperature, temperatures, [row[i] for _, row in rows]))
            for i in range(self.k)
        )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _CostsTable(_Table):
    target_pass_ms: Positive
    token_us: NotNegative = 0.0
    context_token_ns: NotNegative = 0.0
    draft_pass_ms: NotNegative = 0.0
    draft_token_us: NotNegative = 0.0
    overhead_ms: NotNegative = 0.0


class _RooflineTable(_Table):
    target: str
    gpu: str
    gpus: PositiveInt = 1


class _LimitsTable(_Table):
    max_num_batched_tokens: PositiveInt = 8192
    max_num_seqs: PositiveInt = 256
    kv_tokens: PositiveInt | None = None
    block_size: PositiveInt = 16


class _SpeculationTable(_Table):
    method: str
    k: PositiveInt
    draft: str | None = None
    schedule: list[tuple[PositiveInt, PositiveInt, Annotated[int, Field(ge=0)]]] = []


class _SegmentTable(_Table):
    name: Name
    match: str | None = None
    output_tokens: tuple[PositiveInt, PositiveInt] | None = None
    cached_share: Probability = 0.0


class _FaultTable(_Table):
    kind: Literal["status", "hang", "cut", "malformed", "restart"]
    every: PositiveInt = 1
    status: Annotated[int, Field(ge=400, le=599)] = 500
    after_chunks: Annotated[int, Field(ge=0)] = 2
    at_s: NotNegative = 0.0
    down_s: NotNegative = 1.0


class _ServerTable(_Table):
    name: Name
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    model: str | None = None
    generation: Literal["V0", "V1"] = "V1"
    version: str | None = None
    per_request_metrics: bool = True
    seed: int | None = None
    speculation: _SpeculationTable | None = None
    acceptance: dict[str, Acceptance] = {}
    draft_probability: dict[str, Probability] = {}
    costs: _CostsTable | None = None
    roofline: _RooflineTable | None = None
    limits: _LimitsTable | None = None
    fault: list[_FaultTable] = []


class _TruthTable(_Table):
    schema_version: Annotated[int, Field(alias="schema")] = TRUTH_SCHEMA
    model: str = "twin"
    seed: int = 0
    characters_per_token: Positive = 4.0
    max_model_len: PositiveInt = 32768
    costs: _CostsTable | None = None
    roofline: _RooflineTable | None = None
    limits: _LimitsTable = _LimitsTable()
    segment: list[_SegmentTable]
    server: Annotated[list[_ServerTable], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_default(self) -> _TruthTable:
        if sum(segment.match is None for segment in self.segment) != 1:
            raise ValueError("exactly one segment must have no match: it takes all other prompts")
        return self


def bundled_text(name: str) -> str:
    """The text of a bundled file: ``truth``, or ``rehearse``, the study that measures it."""
    folder = Path(__file__).resolve().parents[1] / "bundled" / "studies"
    return (folder / f"{name}.toml").read_text(encoding="utf-8")


def read_truth(path: Path) -> tuple[ServerTruth, ...]:
    """The servers in the TOML file at ``path``; InputError, naming the key, if it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"Truth file {path} does not exist.", "`specwise twin --example` prints one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Truth file {path} cannot be read: {error}.") from error
    return parse_truth(text, name=str(path))


def parse_truth(text: str, *, name: str) -> tuple[ServerTruth, ...]:
    """The servers in TOML ``text``; ``name`` is what error messages call it."""
    try:
        table = _TruthTable.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is not valid TOML: {error}.") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise InputError(f"{name}: {'; '.join(problems)}.", _NEXT) from error
    if table.schema_version != TRUTH_SCHEMA:
        raise InputError(
            f"{name} says schema = {table.schema_version}; this specwise reads {TRUTH_SCHEMA}."
        )
    segments = tuple(_segment(segment, name) for segment in table.segment)
    servers = tuple(_server(table, server, segments, name) for server in table.server)
    for values in ([s.name for s in servers], [s.port for s in servers if s.port]):
        if len(set(values)) < len(values):
            raise InputError(f"{name}: two servers share a name or a port.", "Change one.")
    return servers


_NEXT = "docs/how-to/rehearse.md lists every key; `specwise twin --example` prints a file."


def _segment(table: _SegmentTable, name: str) -> SegmentTruth:
    try:
        match = None if table.match is None else re.compile(table.match)
    except re.error as error:
        raise InputError(
            f"{name}: segment {table.name!r}: match is no regular expression: {error}."
        ) from error
    return SegmentTruth(table.name, match, table.output_tokens, table.cached_share)


def _server(
    table: _TruthTable, server: _ServerTable, segments: Sequence[SegmentTruth], name: str
) -> ServerTruth:
    where = f"{name}: server {server.name!r}"
    speculation = server.speculation
    limits = server.limits or table.limits
    config = SchedulerConfig(
        **limits.model_dump(),
        max_model_len=table.max_model_len,
        method=speculation.method if speculation else None,
        k=speculation.k if speculation else 0,
        schedule=tuple(speculation.schedule) if speculation else (),
    )
    known = {segment.name for segment in segments}
    acceptance = {}
    if speculation:
        missing = sorted(known ^ server.acceptance.keys())
        if missing:
            raise InputError(
                f"{where}: acceptance must be given for every segment, and only for these: "
                f"{', '.join(missing)}.",
                _NEXT,
            )
        acceptance = {
            segment: _acceptance(given, speculation.k, f"{where}: acceptance.{segment}")
            for segment, given in server.acceptance.items()
        }
    elif server.acceptance:
        raise InputError(f"{where} has acceptance but no speculation.", _NEXT)
    return ServerTruth(
        name=server.name,
        port=server.port,
        model=server.model or table.model,
        generation=server.generation,
        version=server.version or ("0.32.0" if server.generation == "V1" else "0.6.6"),
        per_request_metrics=server.per_request_metrics and server.generation == "V1",
        seed=table.seed if server.seed is None else server.seed,
        characters_per_token=table.characters_per_token,
        max_model_len=table.max_model_len,
        config=config,
        costs=_costs(table, server, where),
        segments=tuple(segments),
        acceptance=acceptance,
        draft_probability=dict(server.draft_probability),
        faults=tuple(Fault(**fault.model_dump()) for fault in server.fault),
    )


def _acceptance(
    given: Acceptance, k: int, where: str
) -> tuple[tuple[float, tuple[float, ...]], ...]:
    by_temperature = given if isinstance(given, dict) else {"0": given}
    rows = []
    for temperature, values in by_temperature.items():
        row = tuple(values) if isinstance(values, list) else (values,) * k
        if len(row) < k:
            raise InputError(
                f"{where} has {len(row)} positions for k = {k}.",
                "Give one conditional probability for each draft position, or one for all.",
            )
        try:
            rows.append((float(temperature), row[:k]))
        except ValueError:
            raise InputError(f"{where}: {temperature!r} is no temperature.", _NEXT) from None
    if not rows:
        raise InputError(f"{where} is empty.", _NEXT)
    return tuple(sorted(rows))


def _costs(table: _TruthTable, server: _ServerTable, where: str) -> StepCosts:
    """The server's own costs, else the file's."""
    for owner in (server, table):
        if owner.costs is not None and owner.roofline is not None:
            raise InputError(f"{where} has both [costs] and [roofline].", "Keep one of them.")
        if owner.costs is not None:
            return _linear(owner.costs, speculates=server.speculation is not None)
        if owner.roofline is not None:
            return _roofline(owner.roofline, server.speculation)
    raise InputError(f"{where} has neither [costs] nor [roofline], nor has the file.", _NEXT)


def _linear(table: _CostsTable, *, speculates: bool) -> LinearCosts:
    return LinearCosts(
        target_pass_s=table.target_pass_ms / 1e3,
        token_s=table.token_us / 1e6,
        context_token_s=table.context_token_ns / 1e9,
        draft_pass_s=table.draft_pass_ms / 1e3,
        draft_token_s=table.draft_token_us / 1e6,
        overhead_each_s=table.overhead_ms / 1e3,
        speculates=speculates,
    )


def _roofline(table: _RooflineTable, speculation: _SpeculationTable | None) -> StepCosts:
    draft = speculation.draft if speculation else None
    return roofline(
        load_checkpoint(table.target),
        find_gpu(table.gpu),
        tensor_parallel=table.gpus,
        speculation=Speculation(speculation.method, speculation.k) if speculation else None,
        draft=load_checkpoint(draft) if draft else None,
    )
