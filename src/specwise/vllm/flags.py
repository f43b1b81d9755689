"""What a speculative configuration is called in each vLLM version, and the command that uses it.

Three generations: flags of their own (V0, up to 0.8.2), ``--speculative-config`` JSON (0.8.2 on)
served by V0, and the same JSON served by V1 alone (0.10 on), with other fields. Read off the
released sources; see ``flags.toml`` for when each name came and went.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from specwise.domain import Speculation
from specwise.errors import CommandError
from specwise.vllm.command import (
    SPECULATIVE_CONFIG,
    Flag,
    ServeCommand,
    Span,
    Version,
    names,
)

V0_FLAGS_END = Version(0, 8, 3)  # EngineArgs lost --speculative-model and its kin
JSON_START = Version(0, 8, 2)
V1_ONLY = Version(0, 10, 0)  # vllm/spec_decode (the V0 workers) is gone
V0_DRAFT_TP_LIKE_TARGET = Version(0, 6, 4)  # before that a draft ran on one GPU only
DRAFT_MODEL_BACK = Version(0, 15, 0)  # until then EngineArgs raises NotImplementedError
SCHEDULE_START = Version(0, 24, 0)
METHODS_WITH_SCHEDULE = ("draft_model", "ngram", "eagle", "eagle3", "mtp")
"""Methods whose draft length may follow the batch size. vLLM 0.32 looks k up in the scheduler
whatever the method (v1/core/sched/scheduler.py); draft_model and ngram were tried."""
DEFAULT_UTILIZATION_CHANGE = Version(0, 20, 0)

# V0 flag -> field of SpeculativeConfig in 0.8.2, which took every one of them over.
V0_FLAGS: dict[str, str] = {
    "--speculative-model": "model",
    "--num-speculative-tokens": "num_speculative_tokens",
    "--speculative-draft-tensor-parallel-size": "draft_tensor_parallel_size",
    "--speculative-model-quantization": "quantization",
    "--speculative-max-model-len": "max_model_len",
    "--speculative-disable-by-batch-size": "disable_by_batch_size",
    "--speculative-disable-mqa-scorer": "disable_mqa_scorer",
    "--ngram-prompt-lookup-max": "prompt_lookup_max",
    "--ngram-prompt-lookup-min": "prompt_lookup_min",
    "--spec-decoding-acceptance-method": "acceptance_method",
    "--typical-acceptance-sampler-posterior-threshold": "posterior_threshold",
    "--typical-acceptance-sampler-posterior-alpha": "posterior_alpha",
    "--disable-logprobs-during-spec-decoding": "disable_logprobs",
}

# Fields that V1 does not have, and what a user should know instead.
GONE_WITH_V0: dict[str, str] = {
    "acceptance_method": "Today's default is lossless rejection sampling; the lossy option of 0.33 "
    "is rejection_sample_method 'fly'.",
    "posterior_threshold": "Typical acceptance went with V0.",
    "posterior_alpha": "Typical acceptance went with V0.",
    "disable_mqa_scorer": "V0's scorer is gone.",
    "disable_logprobs": "Logprobs work with speculation now.",
}


def _since(first: str, gone: str = "") -> Span:
    return Span(Version.parse(first), Version.parse(gone) if gone else None)


METHODS: dict[str, Span] = {
    "draft_model": Span(None, None),  # with the gap 0.10.0 to 0.14, see method_problem
    "ngram": Span(None, None),
    "eagle": _since("0.6.4"),
    "eagle3": _since("0.8.5"),
    "mtp": _since("0.9.0"),
    "suffix": _since("0.11.1"),
    "medusa": Span(None, Version(0, 33, 0)),
    "mlp_speculator": Span(None, Version(0, 33, 0)),
    "extract_hidden_states": _since("0.17.0"),
    "ngram_gpu": _since("0.18.0"),
    "dflash": _since("0.20.0"),
    "custom_class": _since("0.22.0"),
    "dspark": _since("0.25.0"),
}
WITHOUT_DRAFT = frozenset({"ngram", "ngram_gpu", "suffix", "mtp", "extract_hidden_states"})
REJECTION_METHODS: dict[str, Span] = {
    "strict": _since("0.18.0", "0.21.0"),
    "probabilistic": _since("0.18.0", "0.21.0"),
    "standard": _since("0.21.0"),
    "synthetic": _since("0.19.0"),
    "block": _since("0.25.0"),
    "fly": _since("0.33.0"),
}
DRAFT_SAMPLING: dict[str, Span] = {
    "greedy": _since("0.21.0"),
    "gumbel": _since("0.21.0", "0.22.0"),
    "probabilistic": _since("0.22.0"),
}


def speculative_config(speculation: Speculation, version: Version | None = None) -> dict[str, Any]:
    """The value of ``--speculative-config`` as vLLM's ``SpeculativeConfig`` names its fields.

    ``options`` win nothing: a key that ``speculation`` itself sets cannot be overridden. Without a
    version the names are today's.
    """
    method = speculation.method
    if method == "mtp" and version is not None and version < Version(0, 11, 0):
        method = "deepseek_mtp"
    config: dict[str, Any] = {
        "method": method,
        "num_speculative_tokens": speculation.k,
    }
    if speculation.draft is not None:
        config["model"] = speculation.draft
    if speculation.schedule:
        config["num_speculative_tokens_per_batch_size"] = [
            list(row) for row in speculation.schedule
        ]
    for name, value in speculation.options.items():
        config.setdefault(name, value)
    return config


def default_utilization(version: Version) -> float:
    """``--gpu-memory-utilization`` when it is not given (vllm/config/cache.py: 0.92 since 0.20)."""
    return 0.92 if version >= DEFAULT_UTILIZATION_CHANGE else 0.9


def method_problem(method: str, version: Version) -> str | None:
    """Why this version cannot run the method, None if it can."""
    span = METHODS.get(method)
    if span is None:
        return f"vLLM has no speculative method {method!r}"
    if span.before(version):
        return f"{method} came with vLLM {span.since}"
    if not span.holds(version):
        return f"{method} was removed in vLLM {span.until}"
    if method == "draft_model" and V1_ONLY <= version < DRAFT_MODEL_BACK:
        return f"vLLM {V1_ONLY} to 0.14 cannot run a separate draft model; 0.15 can again"
    return None


def v0_flags(config: Mapping[str, Any]) -> tuple[Flag, ...]:
    """The V0 flags that say what ``config`` says; unknown fields are left out."""
    flags: list[Flag] = []
    config = dict(config)
    if config.get("method") == "ngram":
        config["model"] = "[ngram]"
    for flag, name in V0_FLAGS.items():
        value = config.get(name)
        if value is True and flag in names().switches:
            flags.append(Flag(flag))
        elif value is not None and value is not False:
            flags.append(Flag(flag, (str(value),)))
    return tuple(flags)


def config_from_v0(command: ServeCommand) -> dict[str, Any]:
    """The JSON fields that the command's V0 flags stand for, values as numbers where they are."""
    config: dict[str, Any] = {}
    for flag in command.flags:
        name = V0_FLAGS.get(flag.name)
        if name is not None:
            config[name] = True if flag.value is None else _number(flag.value)
    if config.get("model") in {"[ngram]", "ngram"}:
        del config["model"]
        config = {"method": "ngram", **config}
    elif config:
        config = {"method": method_of(str(config.get("model", ""))), **config}
    return config


def method_of(model: str) -> str:
    """The method V0 found in the checkpoint, as far as its name tells."""
    lower = model.lower()
    for part, method in (
        ("eagle3", "eagle3"),
        ("eagle", "eagle"),
        ("medusa", "medusa"),
        ("speculator", "mlp_speculator"),
        ("accelerator", "mlp_speculator"),
    ):
        if part in lower:
            return method
    return "draft_model"


def _number(text: str) -> Any:
    """An int or float if the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user wants served; None leaves vLLM's default.

    ``acceptance`` is "standard" (lossless), or "block", "synthetic", "fly", or V0's "typical".
    ``extra`` are further vLLM arguments, passed on. ``as_measured`` leaves a speculation that ran
    in a study as it is: no choice is added that vLLM itself did not make there.
    """

    model: str
    version: Version
    speculation: Speculation | None = None
    tensor_parallel: int = 1
    draft_tensor_parallel: int | None = None
    utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    draft_quantization: str | None = None
    kv_cache_dtype: str | None = None
    acceptance: str = "standard"
    draft_sampling: str | None = None
    extra: tuple[Flag, ...] = ()
    as_measured: bool = False


def serve_command(options: ServeOptions) -> ServeCommand:
    """The complete command for that version, with a note on each choice.

    Raises CommandError where the version cannot do what is asked, saying which can.
    """
    version = options.version
    if version < names().oldest:
        raise CommandError(
            f"specwise knows vLLM {names().oldest} and later, not {version}.", "Upgrade vLLM."
        )
    command = ServeCommand(model=options.model, version=version)
    notes: dict[str, str] = {}

    def add(flag: str, value: object, note: str) -> None:
        nonlocal command
        if value is not None:
            command = command.with_flag(flag, str(value))
            notes[flag] = note

    if options.tensor_parallel != 1:
        add("--tensor-parallel-size", options.tensor_parallel, "GPUs that share the target")
    add("--dtype", options.dtype, "precision of weights that are not quantised")
    if options.quantization is not None:
        _check_quantization(options.quantization, version)
        add("--quantization", options.quantization, "the target decides acceptance: INT8 over INT4")
        loader = options.quantization if options.quantization == "bitsandbytes" else None
        add("--load-format", loader, "bitsandbytes quantises while loading")
    add("--kv-cache-dtype", options.kv_cache_dtype, "half the bytes per token with fp8")
    default = default_utilization(version)
    note = f"share of GPU memory for weights, draft and KV cache (default here: {default})"
    add("--gpu-memory-utilization", options.utilization, note)
    add("--max-model-len", options.max_model_len, "longest request: bounds the KV cache it needs")
    add("--max-num-seqs", options.max_num_seqs, "most requests in a step")
    for flag in options.extra:
        command = command.with_flag(flag.name, *flag.values)
    command = _add_speculation(command, options, notes)
    return _noted(command, notes)


def _add_speculation(
    command: ServeCommand, options: ServeOptions, notes: dict[str, str]
) -> ServeCommand:
    """Put the speculative configuration in, in the form that the version reads."""
    speculation, version = options.speculation, options.version
    if speculation is None:
        return command
    config = _config(speculation, options)
    k = config["num_speculative_tokens"]
    if version < JSON_START:
        flags = v0_flags(config)
        notes.update(
            {
                "--speculative-model": "the draft; V0 does not count its KV cache in the budget",
                "--num-speculative-tokens": f"k = {k}: tokens proposed for each verify step",
            }
        )
        return replace(command, flags=(*command.flags, *flags))
    notes[SPECULATIVE_CONFIG] = _speculation_note(config, version)
    command = replace(command, speculation=config)
    metrics = names().flags["--per-request-spec-decode-metrics"]
    if metrics.holds(version) and not command.has("--per-request-spec-decode-metrics"):
        command = command.with_flag("--per-request-spec-decode-metrics", "summary")
        notes["--per-request-spec-decode-metrics"] = "acceptance of each request, in its response"
    return command


# vLLM's own default is 5 and 5, which finds repeats of five tokens only; V0 has none at all.
_LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


def _config(speculation: Speculation, options: ServeOptions) -> dict[str, Any]:
    """The speculative configuration for the version; CommandError for what it cannot do."""
    version = options.version
    problem = method_problem(speculation.method, version)
    if problem:
        raise CommandError(problem[0].upper() + problem[1:] + ".", methods_of(version))
    if speculation.method not in WITHOUT_DRAFT and speculation.draft is None:
        raise CommandError(
            f"Method {speculation.method} needs a draft checkpoint.", "Name it with --draft."
        )
    if speculation.k < 1:
        raise CommandError(f"k = {speculation.k} drafts nothing.", "Use 1 or more, 3 to start.")
    config = speculative_config(speculation, version)
    looks_up = speculation.method in {"ngram", "ngram_gpu"} and not options.as_measured
    if looks_up and not _LOOKUP.keys() & config.keys():
        config.update(_LOOKUP)
    _set_draft_tp(config, options)
    if options.draft_quantization is not None:
        _check_quantization(options.draft_quantization, version)
        config["quantization"] = options.draft_quantization
    if speculation.schedule:
        _set_schedule(config, speculation, version)
    _set_acceptance(config, options)
    for name in config:
        span = names().spec_fields.get(name)
        if version >= JSON_START and (span is None or not span.holds(version)):
            when = f"came with {span.since}" if span and span.before(version) else "is not known"
            raise CommandError(
                f"The speculative field {name!r} {when}; vLLM {version} refuses it.",
                "Leave it out or choose another version.",
            )
    return config


def methods_of(version: Version) -> str:
    """Methods the version can run."""
    usable = [m for m in METHODS if method_problem(m, version) is None]
    return f"vLLM {version} runs: {', '.join(usable)}."


def _set_draft_tp(config: dict[str, Any], options: ServeOptions) -> None:
    draft_tp = options.draft_tensor_parallel
    if draft_tp is None:
        return
    both = options.version >= V0_DRAFT_TP_LIKE_TARGET
    if draft_tp not in {1, options.tensor_parallel if both else 1}:
        raise CommandError(
            "A draft's tensor parallel size is 1"
            + (f" or the target's ({options.tensor_parallel})" if both else " before 0.6.4")
            + "; vLLM refuses others.",
            "Use 1: a small draft gains nothing from being split.",
        )
    config["draft_tensor_parallel_size"] = draft_tp


def _set_schedule(config: dict[str, Any], speculation: Speculation, version: Version) -> None:
    """A draft length per batch size, or V0's one switch-off point."""
    problems = schedule_problems(speculation.schedule)
    if problems:
        raise CommandError(f"The schedule is not usable: {problems[0]}.", SCHEDULE_HELP)
    if version >= SCHEDULE_START:
        return
    del config["num_speculative_tokens_per_batch_size"]
    off = next((row for row in speculation.schedule if row[2] == 0), None)
    if version >= V1_ONLY:
        raise CommandError(
            f"vLLM {version} cannot change the draft length under load "
            f"(disable_by_batch_size is accepted and ignored from {V1_ONLY} on).",
            f"Use {SCHEDULE_START} or later.",
        )
    if (
        off is None
        or off[0] < 3
        or any(row[2] not in {0, speculation.k} for row in speculation.schedule)
    ):
        raise CommandError(
            f"vLLM {version} has no draft length per batch size, only a batch size above which "
            "speculation stops.",
            f"Use rows with k = {speculation.k} and then 0, or vLLM {SCHEDULE_START} or later.",
        )
    config["disable_by_batch_size"] = off[0] - 1


def _set_acceptance(config: dict[str, Any], options: ServeOptions) -> None:
    """The acceptance method in the version's own words."""
    version, wanted = options.version, options.acceptance
    if options.draft_sampling is not None:
        _check_span("draft sampling", options.draft_sampling, DRAFT_SAMPLING, version)
        config["draft_sample_method"] = options.draft_sampling
    if wanted == "standard":
        return  # every version's default is lossless
    if wanted == "typical":
        if version >= V1_ONLY:
            raise CommandError(
                f"Typical acceptance was removed in vLLM {V1_ONLY}.",
                "Today's lossy choice is `--acceptance fly` (0.33 on); the default is lossless.",
            )
        config["acceptance_method"] = "typical_acceptance_sampler"
        config.setdefault("posterior_threshold", 0.09)
        config.setdefault("posterior_alpha", 0.3)
        return
    _check_span("acceptance method", wanted, REJECTION_METHODS, version)
    config["rejection_sample_method"] = wanted


def _check_span(what: str, value: str, table: Mapping[str, Span], version: Version) -> None:
    span = table.get(value)
    if span is None or not span.holds(version):
        usable = [name for name, s in table.items() if s.holds(version)]
        raise CommandError(
            f"vLLM {version} has no {what} {value!r}.",
            f"It has: {', '.join(usable) or 'none to choose'}.",
        )


def _check_quantization(value: str, version: Version) -> None:
    span = names().quantization.get(value)
    if version <= names().newest and (span is None or not span.holds(version)):
        raise CommandError(
            f"vLLM {version} has no quantisation method {value!r}.",
            "Serve a checkpoint that is quantised already (its config says how), or "
            + quantization_instead(value, version),
        )


def quantization_instead(value: str, version: Version) -> str:
    """What to use in place of a quantisation method that this version does not have."""
    if value == "bitsandbytes" and names().quantization["int8_per_channel_weight_only"].holds(
        version
    ):
        return (
            "int8_per_channel_weight_only, which quantises while loading too. It is INT8 where "
            "bitsandbytes was 4-bit unless told otherwise: check `specwise memory`."
        )
    near = sorted(n for n, s in names().quantization.items() if s.holds(version))
    return f"one of: {', '.join(near)}."


SCHEDULE_HELP = (
    "Rows are [first batch size, last batch size, k]: start at 1, no overlaps, k from 0, e.g. "
    "[[1, 8, 4], [9, 32, 2], [33, 1024, 0]]."
)


def schedule_problems(rows: object) -> list[str]:
    """What vLLM would die of, some 40 s after accepting it, in a draft length schedule.

    The rules of ``vllm/v1/spec_decode/dynamic/utils.py`` (0.32).
    """
    if not isinstance(rows, list | tuple) or not rows:
        return ["it must be a non-empty list of rows"]
    problems: list[str] = []
    good: list[tuple[int, int, int]] = []
    for row in rows:
        whole = isinstance(row, list | tuple) and len(row) == 3
        if not whole or not all(isinstance(x, int) and not isinstance(x, bool) for x in row):
            problems.append(f"row {row!r} is not three whole numbers")
            continue
        first, last, k = row
        if first < 1 or last < 1:
            problems.append(f"row {list(row)} has a batch size below 1")
        elif first > last:
            problems.append(f"row {list(row)} ends before it starts")
        elif k < 0:
            problems.append(f"row {list(row)} has a negative k")
        else:
            good.append((first, last, k))
    good.sort()
    for (_, last, _), (first, _, _) in itertools.pairwise(good):
        if first <= last:
            problems.append(f"batch size {first} is in two rows")
    if good and not problems and good[0][0] != 1:
        problems.append(f"it starts at batch size {good[0][0]}, not at 1")
    return problems


def schedule_gaps(rows: tuple[tuple[int, int, int], ...]) -> list[tuple[int, int, int]]:
    """Batch sizes between the rows of a valid schedule as (first, last, k that vLLM carries on)."""
    ordered = sorted(rows)
    return [
        (last + 1, first - 1, k)
        for (_, last, k), (first, _, _) in itertools.pairwise(ordered)
        if first > last + 1
    ]


def _speculation_note(config: Mapping[str, Any], version: Version) -> str:
    """One line on the choices inside the JSON."""
    parts = [f"{config['method']} proposes {config['num_speculative_tokens']} tokens a step"]
    if "draft_tensor_parallel_size" in config:
        parts.append(
            "the draft whole on every rank"
            if config["draft_tensor_parallel_size"] == 1
            else "the draft split like the target"
        )
    if "num_speculative_tokens_per_batch_size" in config:
        parts.append("rows are [from, to, k] by batch size")
    if "disable_by_batch_size" in config:
        parts.append(f"off above {config['disable_by_batch_size']} queued requests")
    if config.get("rejection_sample_method") == "synthetic":
        parts.append("synthetic acceptance: output is not the model's, for load tests only")
    elif config.get("rejection_sample_method") == "fly":
        parts.append("fly is lossy: compare the output")
    elif "acceptance_method" in config:
        parts.append("typical acceptance is lossy: compare the output")
    if "prompt_lookup_max" in config:
        low = config.get("prompt_lookup_min", config["prompt_lookup_max"])
        parts.append(f"after repeats of {low} to {config['prompt_lookup_max']} tokens")
    if config["method"] == "suffix":
        parts.append("needs the arctic-inference package")
    if version >= V1_ONLY and config.get("draft_sample_method") == "probabilistic":
        parts.append("more acceptance above temperature 0 for a second set of logits")
    return "; ".join(parts)


def _noted(command: ServeCommand, notes: Mapping[str, str]) -> ServeCommand:
    return replace(command, notes=notes)
