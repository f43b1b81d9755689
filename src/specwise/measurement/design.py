"""The study file: TOML in, a `StudyDesign` out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from specwise.domain import (
    Api,
    Arm,
    Deployment,
    LoadPoint,
    Loop,
    Segment,
    Slo,
    Speculation,
    StudyDesign,
    TuneSettings,
    Workload,
)
from specwise.errors import StudyFileError
from specwise.measurement.experiments import VersionOf, as_experiment
from specwise.measurement.sweep import LENGTHS, SweepPlan, tuning_sweep
from specwise.measurement.trials import order_trials

STUDY_FILE_SCHEMA = 1

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Temperature = Annotated[float, Field(ge=0, le=2)]
DraftSampling = Literal["greedy", "probabilistic"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _SloTable(_Table):
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
    bound: Literal["ttft", "tpot", "throughput"] = "tpot"


class _ServeTable(_Table):
    """How specwise starts the arms that have no url; an arm may override any of it."""

    model: str | None = None
    engine: str | None = None
    served_name: str | None = None
    arguments: list[str] = []
    environment: dict[str, str] = {}
    together: bool = True


class _SpeculationTable(_Table):
    method: str
    k: PositiveInt
    draft: str | None = None
    schedule: list[tuple[int, int, int]] = []
    options: dict[str, Any] = {}


class _ArmTable(_Table):
    name: Name
    speculation: _SpeculationTable | None = None
    url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    engine: str | None = None
    arguments: list[str] = []
    environment: dict[str, str] = {}


class _SegmentTable(_Table):
    name: Name
    prompts: str
    temperature: Temperature = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 128
    api: Api = Api.CHAT
    template: str = ""


class _WorkloadTable(_Table):
    name: Name
    shares: dict[str, Positive]


class _LoadTable(_Table):
    concurrency: list[PositiveInt] = []
    rate_per_s: list[Positive] = []
    arrivals: Literal["constant", "poisson", "gamma", "trace"] = "poisson"
    burstiness: Positive = 1.0
    trace: str = ""
    requests: PositiveInt | list[PositiveInt] = 32
    production: Positive | None = None
    production_workload: str | None = None
    repeats: PositiveInt = 2
    noise_floor: bool = True
    warmup: Annotated[int, Field(ge=0)] = 2
    timeout_s: Positive = 120.0


class _TuneTable(_Table):
    k: Annotated[list[PositiveInt], Field(min_length=1)] = list(LENGTHS)
    draft_sampling: Annotated[list[DraftSampling], Field(min_length=1)] | None = None
    tolerance: Annotated[float, Field(gt=0, le=0.5)] = 0.02
    budget_minutes: Positive | None = None
    repeats: Annotated[int, Field(ge=1, le=40)] = 4
    idle: bool = True


class _StudyTable(_Table):
    schema_version: Annotated[int, Field(alias="schema")] = STUDY_FILE_SCHEMA
    name: Name
    seed: int = 0
    keep_text: bool = False
    experiment: Literal["temperature", "ladder", "mixed", "tune"] | None = None
    temperatures: list[Temperature] = []
    slo: _SloTable = _SloTable()
    serve: _ServeTable = _ServeTable()
    arm: list[_ArmTable]
    segment: list[_SegmentTable]
    workload: list[_WorkloadTable] = []
    load: _LoadTable
    tune: _TuneTable | None = None


def read_study_file(
    path: Path,
    *,
    experiment: str | None = None,
    temperatures: Sequence[float] = (),
    version_of: VersionOf = lambda _: None,
) -> tuple[StudyDesign, str]:
    """The design in the TOML file at ``path``, and the file's text; see `parse_study`.

    Raises StudyFileError that names the offending key if the file is missing or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyFileError(
            f"Study file {path} does not exist.",
            "`specwise measure --example` or `specwise tune --example` prints one to start from.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyFileError(f"Study file {path} cannot be read: {error}.") from error
    design = parse_study(
        text,
        name=str(path),
        experiment=experiment,
        temperatures=temperatures,
        version_of=version_of,
    )
    return design, text


def bundled_study(name: str) -> str:
    """The text of a study file that ships with specwise.

    ``example`` (the user's own servers), ``demo``, ``demo-quick``, and one for each experiment:
    ``temperature``, ``ladder``, ``mixed`` (the embedded engine); ``tune`` for a tuning there.
    """
    folder = Path(__file__).resolve().parents[1] / "bundled" / "studies"
    return (folder / f"{name}.toml").read_text(encoding="utf-8")


def parse_study(
    text: str,
    *,
    name: str,
    experiment: str | None = None,
    temperatures: Sequence[float] = (),
    version_of: VersionOf = lambda _: None,
) -> StudyDesign:
    """The design in TOML ``text``; ``name`` is what error messages call it.

    ``experiment`` and ``temperatures`` stand above what the file says of them; see
    `experiments.as_experiment` for them and for ``version_of``.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyFileError(f"{name} is not valid TOML: {error}.") from error
    if raw.get("schema", STUDY_FILE_SCHEMA) != STUDY_FILE_SCHEMA:
        raise StudyFileError(
            f"{name} says schema = {raw['schema']}; this specwise reads {STUDY_FILE_SCHEMA}.",
            "Use the specwise it was written for, or see docs/reference/study-file.md.",
        )
    try:
        table = _StudyTable.model_validate(raw)
    except ValidationError as error:
        raise StudyFileError(f"{name}: {_explain(error)}", _NEXT) from error
    design = _design(table, name)
    chosen = experiment or table.experiment or ""
    wanted = tuple(temperatures) or tuple(table.temperatures)
    if not chosen and not wanted:
        return design
    if chosen == "tune" and not wanted:
        return _sweep(design, table.tune or _TuneTable(), version_of)
    return as_experiment(design, chosen, temperatures=wanted, version_of=version_of)


def _sweep(design: StudyDesign, table: _TuneTable, version_of: VersionOf) -> StudyDesign:
    minutes = table.budget_minutes
    return tuning_sweep(
        design,
        SweepPlan(
            lengths=tuple(table.k),
            draft_sampling=None if table.draft_sampling is None else tuple(table.draft_sampling),
            repeats=table.repeats,
            idle=table.idle,
        ),
        TuneSettings(table.tolerance, None if minutes is None else 60 * minutes),
        version_of=version_of,
    )


_NEXT = "docs/reference/study-file.md lists every key; `specwise measure --example` prints a file."


def _explain(error: ValidationError) -> str:
    """All problems of a study file, one clause each, with the key as it stands in the TOML."""
    clauses = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            clauses.append(f"unknown key {key}")
        elif problem["type"] == "missing":
            clauses.append(f"{key} is missing")
        else:
            clauses.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "; ".join(clauses) + "."


def _design(table: _StudyTable, name: str) -> StudyDesign:
    arms = tuple(_arm(arm, table.serve, name) for arm in table.arm)
    _unique(name, "arm", [arm.name for arm in arms])
    _unique(name, "segment", [segment.name for segment in table.segment])
    baselines = [arm for arm in arms if arm.is_baseline]
    if len(baselines) != 1 or len(arms) < 2:
        raise StudyFileError(
            f"{name} needs one arm without speculation (the baseline) and at least one with; "
            f"it has {len(baselines)} without and {len(arms) - len(baselines)} with.",
            "Add or correct an [[arm]]; [arm.speculation] says how an arm speculates.",
        )
    arms = (*baselines, *(arm for arm in arms if not arm.is_baseline))
    segments = tuple(Segment(**segment.model_dump()) for segment in table.segment)
    workloads = _workloads(table, name)
    loads = _loads(table.load, name)
    per_load = _requests(table.load, loads, name)
    production = _production_load(table.load, loads, name)
    production_workload = table.load.production_workload or _production_workload(workloads, name)
    if production_workload not in [w.name for w in workloads]:
        raise StudyFileError(
            f"{name}: load.production_workload {production_workload!r} is neither a segment nor "
            "a workload of this study."
        )
    return StudyDesign(
        name=table.name,
        seed=table.seed,
        arms=arms,
        segments=segments,
        workloads=workloads,
        loads=loads,
        production_load=production,
        production_workload=production_workload,
        slo=Slo(
            ttft_s=_seconds(table.slo.ttft_ms),
            tpot_s=_seconds(table.slo.tpot_ms),
            e2e_s=_seconds(table.slo.e2e_ms),
            bound=table.slo.bound,
        ),
        trials=order_trials(
            arms,
            workloads,
            loads,
            requests=per_load,
            repeats=table.load.repeats,
            noise_workload=production_workload if table.load.noise_floor else None,
            together=table.serve.together,
        ),
        timeout_s=table.load.timeout_s,
        warmup=table.load.warmup,
        servers_together=table.serve.together,
        keep_text=table.keep_text,
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _unique(name: str, what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for item in names:
        if item in seen:
            raise StudyFileError(f"{name} has two {what}s named {item!r}.", "Rename one.")
        seen.add(item)


def _arm(arm: _ArmTable, serve: _ServeTable, name: str) -> Arm:
    speculation = None
    if arm.speculation is not None:
        speculation = Speculation(
            method=arm.speculation.method,
            k=arm.speculation.k,
            draft=arm.speculation.draft,
            schedule=tuple(arm.speculation.schedule),
            options=arm.speculation.options,
        )
    _refuse_secrets(arm, serve, name)
    if arm.url is not None:
        if arm.arguments or arm.environment or arm.engine:
            raise StudyFileError(
                f"{name}: arm {arm.name!r} has a url and also says how to start a server.",
                "Keep the url, or the arguments, environment and engine.",
            )
        if not arm.url.startswith(("http://", "https://")):
            raise StudyFileError(f"{name}: arm {arm.name!r}: url must start with http(s)://.")
        return Arm(
            name=arm.name,
            speculation=speculation,
            url=arm.url.rstrip("/").removesuffix("/v1"),
            model=arm.model or serve.model,
            api_key_env=arm.api_key_env,
        )
    model = arm.model or serve.model
    if model is None:
        raise StudyFileError(
            f"{name}: arm {arm.name!r} has neither a url nor a model to serve.",
            "Set url, or model in the arm or in [serve].",
        )
    return Arm(
        name=arm.name,
        speculation=speculation,
        deployment=Deployment(
            model=model,
            engine=arm.engine or serve.engine or "embedded",
            served_name=serve.served_name or "",
            arguments=(*serve.arguments, *arm.arguments),
            environment={**serve.environment, **arm.environment},
        ),
        api_key_env=arm.api_key_env,
    )


_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


def _refuse_secrets(arm: _ArmTable, serve: _ServeTable, name: str) -> None:
    """A study folder is made to be passed around: no key may enter it."""
    if any(word.split("=")[0] == "--api-key" for word in (*serve.arguments, *arm.arguments)):
        raise StudyFileError(
            f"{name}: arm {arm.name!r} has an API key among its arguments.",
            "Servers that specwise starts listen on loopback only and need none: remove it.",
        )
    for variable in (*serve.environment, *arm.environment):
        if _SECRET.search(variable):
            raise StudyFileError(
                f"{name}: environment variable {variable} looks like a secret.",
                "Export it in the shell that runs specwise; servers inherit the environment.",
            )


def _workloads(table: _StudyTable, name: str) -> tuple[Workload, ...]:
    segments = [segment.name for segment in table.segment]
    workloads = [Workload(segment, ((segment, 1.0),)) for segment in segments]
    for mix in table.workload:
        unknown = [segment for segment in mix.shares if segment not in segments]
        if unknown or len(mix.shares) < 2:
            raise StudyFileError(
                f"{name}: workload {mix.name!r} must mix two or more segments of this study"
                + (f"; {', '.join(unknown)} is not one." if unknown else "."),
                "Every segment is already a workload of its own.",
            )
        total = sum(mix.shares.values())
        shares = tuple((segment, share / total) for segment, share in mix.shares.items())
        workloads.append(Workload(mix.name, shares))
    _unique(name, "workload", [workload.name for workload in workloads])
    return tuple(workloads)


def _loads(load: _LoadTable, name: str) -> tuple[LoadPoint, ...]:
    if bool(load.concurrency) == bool(load.rate_per_s):
        raise StudyFileError(
            f"{name}: [load] needs either concurrency (closed loop) or rate_per_s (open loop).",
            "For example concurrency = [1, 4, 16].",
        )
    if (load.arrivals == "trace") != bool(load.trace):
        raise StudyFileError(f'{name}: arrivals = "trace" and load.trace = "FILE" go together.')
    if load.concurrency:
        points = [LoadPoint(Loop.CLOSED, value) for value in load.concurrency]
    else:
        points = [
            LoadPoint(Loop.OPEN, value, load.arrivals, load.burstiness, load.trace)
            for value in load.rate_per_s
        ]
    _unique(name, "load point", [point.label for point in points])
    return tuple(sorted(points))


def _requests(load: _LoadTable, loads: tuple[LoadPoint, ...], name: str) -> Mapping[LoadPoint, int]:
    if isinstance(load.requests, int):
        return dict.fromkeys(loads, load.requests)
    values = load.concurrency or load.rate_per_s
    if len(load.requests) != len(values):
        raise StudyFileError(
            f"{name}: load.requests has {len(load.requests)} entries for {len(values)} load points."
        )
    by_value = dict(zip(values, load.requests, strict=True))
    return {point: by_value[point.value] for point in loads}


def _production_workload(workloads: tuple[Workload, ...], name: str) -> str:
    """The only mix, or the only segment; what production sends cannot be guessed beyond that."""
    candidates = [w for w in workloads if w.is_mix] or list(workloads)
    if len(candidates) == 1:
        return candidates[0].name
    raise StudyFileError(
        f"{name}: which workload is production's? It could be any of "
        f"{', '.join(w.name for w in candidates)}.",
        "Add the mix that production sends as a [[workload]], or set load.production_workload.",
    )


def _production_load(load: _LoadTable, loads: tuple[LoadPoint, ...], name: str) -> LoadPoint:
    if load.production is None:
        return loads[-1]
    for point in loads:
        if point.value == load.production:
            return point
    raise StudyFileError(
        f"{name}: load.production = {load.production:g} is not among the load points.",
        "The verdict is about production's load, so it must be measured: add it to the list.",
    )
