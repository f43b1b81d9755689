"""Lint rules for the speculative configuration; the words around it are in ``lint``."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from specwise.vllm import flags as facts
from specwise.vllm.command import SPECULATIVE_CONFIG, Version, names
from specwise.vllm.findings import (
    ADVICE,
    ERROR,
    METRICS_FLAG,
    SCHEDULE,
    WARNING,
    K,
    Work,
    whole_number,
)

_SHORTHANDS = {"--spec-method": "method", "--spec-model": "model", "--spec-tokens": K}


def _shorthands(work: Work) -> None:
    """--spec-method and its kin are fields of the JSON."""
    for flag, name in _SHORTHANDS.items():
        if not work.command.has(flag):
            continue
        value = work.command.get(flag)
        if name in work.spec:
            work.report(
                "shorthand-conflict",
                f"{flag} and {SPECULATIVE_CONFIG}'s {name!r} are both given.",
                f"{flag} removed, the JSON kept.",
            )
        else:
            number = whole_number(value)
            keep: Any = number if name == K and number is not None else value
            work.set_spec(**{name: keep})
        work.command = work.command.without(flag)


def _readable(work: Work) -> None:
    text = work.command.unreadable_speculation
    if text is None:
        return
    work.report(
        "json-invalid", f"The value of {SPECULATIVE_CONFIG} is no JSON object: {text[:80]!r}."
    )
    work.command = replace(work.command, unreadable_speculation=None)


_GONE_FIELDS = {
    **facts.GONE_WITH_V0,
    "synthetic_acceptance_rate": "synthetic_acceptance_rates (a list of length k) replaces it.",
    "speculative_token_tree": "Tree drafting was removed.",
}


def _disable_by_batch_size(work: Work) -> None:
    """V0's switch-off point became a schedule, after a time in which it was silently ignored."""
    value = work.spec.get("disable_by_batch_size")
    if value is None or work.version < facts.V1_ONLY:
        return
    span = names().spec_fields["disable_by_batch_size"]
    ignored = span.holds(work.version)
    limit = whole_number(str(value))
    k = work.spec.get(K)
    fix = f"Removed; a schedule can replace it from vLLM {facts.SCHEDULE_START} on."
    work.set_spec(disable_by_batch_size=None)
    if work.version >= facts.SCHEDULE_START and limit and limit > 0 and isinstance(k, int):
        last = max(work.whole("--max-num-seqs", 1024), limit + 1)
        if SCHEDULE not in work.spec:
            work.set_spec(**{SCHEDULE: [[1, limit, k], [limit + 1, last, 0]]})
        fix = f"Replaced by {SCHEDULE}; measure where it should switch off."
    work.report(
        "disable-by-batch-size",
        "disable_by_batch_size no longer turns speculation down.",
        fix,
        severity=WARNING if ignored else ERROR,
        why=f"From {facts.V1_ONLY} vLLM accepted and ignored it; from {span.until} it refuses it.",
    )


def _fields(work: Work) -> None:
    """Fields that the version's SpeculativeConfig does not have (pydantic forbids extras)."""
    table = names().spec_fields
    for name in list(work.spec):
        span = table.get(name)
        if name == "tensor_parallel_size":
            work.report(
                "tensor-parallel-in-json",
                f"tensor_parallel_size does not belong into {SPECULATIVE_CONFIG}.",
            )
            value = work.spec[name]
            work.set_spec(tensor_parallel_size=None)
            if "draft_tensor_parallel_size" not in work.spec:
                work.set_spec(draft_tensor_parallel_size=value)
        elif span is None or not span.holds(work.version):
            near = difflib.get_close_matches(name, table, n=1, cutoff=0.75)
            if span is None:
                when = "is no field of it"
            elif span.before(work.version):
                when = f"came with vLLM {span.since}"
            else:
                when = f"was removed in vLLM {span.until}"
            hint = f" Did you mean {near[0]}?" if span is None and near else ""
            work.report(
                "field-unknown",
                f"{name!r} in {SPECULATIVE_CONFIG}: {when}.",
                "Removed." + hint + (" " + _GONE_FIELDS[name] if name in _GONE_FIELDS else ""),
                why=f"vLLM {work.version} refuses fields it does not know.",
            )
            work.set_spec(**{name: None})


_WORDS = (
    "method", "model", "quantization", "rejection_sample_method", "draft_sample_method",
    "revision", "code_revision", "kv_cache_dtype", "moe_backend", "attention_backend",
    "acceptance_method",
)  # fmt: skip
_SWITCHES = (
    "enforce_eager", "disable_padded_drafter_batch", "disable_eagle_block_drop",
    "use_local_argmax_reduction", "use_heterogeneous_vocab", "parallel_drafting",
    "enable_adaptive_verification",
)  # fmt: skip
_NUMBERS: dict[str, tuple[type, float, float]] = {  # kind, least, most
    "draft_tensor_parallel_size": (int, 1, 2**20),
    "max_model_len": (int, 1, 2**40),
    "disable_by_batch_size": (int, 2, 2**40),
    "dspark_draft_topk": (int, 1, 2**40),
    "suffix_decoding_max_tree_depth": (int, 1, 2**40),
    "suffix_decoding_max_cached_requests": (int, 0, 2**40),
    "suffix_decoding_max_spec_factor": (float, 0, 1e9),
    "suffix_decoding_min_token_prob": (float, 0, 1),
    "posterior_threshold": (float, 0, 1e9),
    "posterior_alpha": (float, 0, 1e9),
}


def _types(work: Work) -> None:
    """Values of the wrong kind or outside what SpeculativeConfig's checks allow."""
    for name, value in work.spec.items():
        wanted = None
        if value is None:
            work.set_spec(**{name: None})
        elif name in _WORDS and not isinstance(value, str):
            wanted = "a word"
        elif name in _SWITCHES and not isinstance(value, bool):
            wanted = "true or false"
        elif name in _NUMBERS:
            kind, least, most = _NUMBERS[name]
            number = isinstance(value, int if kind is int else int | float)
            if not number or isinstance(value, bool) or not least <= value <= most:
                wanted = f"{'a whole' if kind is int else 'a'} number from {least:g}"
        if wanted is not None:
            work.report(
                "field-invalid",
                f"{name!r} is {str(value)[:40]!r}.",
                why=f"vLLM wants {wanted} and refuses others.",
            )
            work.set_spec(**{name: None})


def _method(work: Work) -> None:
    """A method the version runs, with the checkpoint it needs."""
    config = work.spec
    method, model = config.get("method"), config.get("model")
    if method is None and model is None:
        work.report("method-missing", f"{SPECULATIVE_CONFIG} names neither a method nor a model.")
        return
    if method is None:
        guessed = "ngram" if model in {"ngram", "[ngram]"} else facts.method_of(str(model))
        work.report(
            "method-implicit",
            "The method is left to vLLM to guess from the checkpoint's name.",
            f"Written out: {guessed}.",
        )
        work.set_spec(method=guessed, **({"model": None} if guessed == "ngram" else {}))
        method = guessed
    if method == "[ngram]":
        method = "ngram"
        work.set_spec(method=method)
    if method.endswith("_mtp") and method != "mtp":
        if work.version >= Version(0, 11, 0):
            work.report("method-renamed", f"Method {method!r} is called 'mtp' now.")
            work.set_spec(method="mtp")
        method = "mtp"
    problem = facts.method_problem(method, work.version)
    if problem:
        work.report(
            "method-unknown",
            f"Method {method!r} does not run on vLLM {work.version}.",
            facts.methods_of(work.version),
            why=problem[0].upper() + problem[1:] + ".",
            source="vllm/config/speculative.py, vllm/engine/arg_utils.py",
        )
    elif method not in facts.WITHOUT_DRAFT and not model:
        work.report(
            "draft-missing",
            f"Method {method!r} has no model.",
            'Add "model": the draft\'s path or hub id.',
            why="vLLM stops: num_speculative_tokens was provided but without speculative model.",
            source="vllm/config/speculative.py __post_init__",
        )
    if method == "suffix" and problem is None:
        work.report("suffix-package", "suffix needs the arctic-inference package.")
    lookup = {"prompt_lookup_max", "prompt_lookup_min"} & work.spec.keys()
    if method in {"ngram", "ngram_gpu"} and not lookup:
        work.report("lookup-default", "No prompt_lookup_max and prompt_lookup_min.")


def _draft_length(work: Work) -> None:
    config = work.spec
    k = config.get(K)
    if k is None:
        if config.get("method") in {"mtp", "suffix", "dspark", "eagle", "eagle3", "dflash"}:
            work.report(
                "k-missing",
                f"No {K}.",
                "Write it out.",
                severity=ADVICE,
                why="The checkpoint's own number counts, if it has one; otherwise vLLM stops.",
                source="vllm/config/speculative.py",
            )
        else:
            work.report(
                "k-missing",
                f"No {K}.",
                "Set to 3: measure 1 to 5.",
                why="vLLM does not start without a draft length.",
                source="vllm/config/speculative.py _verify_args",
            )
            work.set_spec(**{K: 3})
        return
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        work.report("k-invalid", f"{K} is {k!r}.", "Set to 3: measure 1 to 5.")
        work.set_spec(**{K: 3})
    elif k > 16 and config.get("method") != "suffix":  # there k is a cap, 24 by default
        work.report("k-huge", f"k = {k} drafts are proposed in each step.")


def _graphs(work: Work) -> None:
    """Whether the verify batches fit the captured CUDA graphs."""
    k = work.spec.get(K)
    if not isinstance(k, int) or k < 1 or work.command.has("--enforce-eager"):
        return
    if work.version < facts.V1_ONLY:
        return
    covered = 512 // (k + 1)
    seqs = work.whole("--max-num-seqs", 256)
    if seqs > covered and not any(
        f.name.startswith(("--compilation-config", "--cudagraph-capture-sizes", "--max-cudagraph"))
        for f in work.command.flags
    ):
        work.report(
            "k-beyond-graphs",
            f"With k = {k} full CUDA graphs end at {covered} requests; max-num-seqs is {seqs}"
            + ("." if work.command.has("--max-num-seqs") else " or more by default."),
            why=f"A request takes {k + 1} slots of a verify step and graphs are captured up to 512 "
            "(1024 on data-centre Blackwell).",
        )


def _lookup(work: Work) -> None:
    config = work.spec
    low, high = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    for name, value in (("prompt_lookup_min", low), ("prompt_lookup_max", high)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            work.report("lookup-invalid", f"{name} is {value!r}.")
            work.set_spec(**{name: None})
            low, high = None, None
    if isinstance(low, int) and isinstance(high, int) and low > high:
        work.report("lookup-range", f"prompt_lookup_min {low} is above prompt_lookup_max {high}.")
        work.set_spec(prompt_lookup_min=high, prompt_lookup_max=low)


def _schedule(work: Work) -> None:
    rows = work.spec.get(SCHEDULE)
    if rows is None:
        return
    problems = facts.schedule_problems(rows)
    for problem in problems:
        work.report(
            "schedule-invalid", f"The schedule: {problem}.", "Removed; " + facts.SCHEDULE_HELP
        )
    if problems:
        work.set_spec(**{SCHEDULE: None})
        return
    ranges = tuple((int(a), int(b), int(c)) for a, b, c in rows)
    k = work.spec.get(K)
    for first, last, carried in facts.schedule_gaps(ranges):
        work.report(
            "schedule-gap",
            f"The schedule says nothing of batch sizes {first} to {last}.",
            why=f"vLLM carries k = {carried} on.",
        )
        ranges = tuple(sorted((*ranges, (first, last, carried))))
    work.set_spec(**{SCHEDULE: [list(row) for row in ranges]})
    largest = max(row[2] for row in ranges)
    if isinstance(k, int) and largest > k > 0:
        work.report(
            "schedule-above-k",
            f"The schedule asks for k = {largest}, {K} is {k}.",
            f"{K} set to {largest}.",
        )
        work.set_spec(**{K: largest})
    if work.whole("--data-parallel-size", 1) > 1:
        work.report("schedule-data-parallel", "A schedule with data parallelism.")
        work.set_spec(**{SCHEDULE: None})


def _acceptance(work: Work) -> None:
    config = work.spec
    for name, table in (
        ("rejection_sample_method", facts.REJECTION_METHODS),
        ("draft_sample_method", facts.DRAFT_SAMPLING),
    ):
        value = config.get(name)
        if value is None:
            continue
        span = table.get(value) if isinstance(value, str) else None
        if span is None or not span.holds(work.version):
            usable = [n for n, s in table.items() if s.holds(work.version)]
            work.report(
                "acceptance-unknown",
                f"{name} {value!r} is not one of vLLM's.",
                why=f"vLLM {work.version} has: {', '.join(usable)}.",
            )
            work.set_spec(**{name: None})
    _synthetic(work)
    if work.spec.get("rejection_sample_method") == "fly":
        work.report("acceptance-lossy", "rejection_sample_method 'fly' is lossy.")


def _synthetic(work: Work) -> None:
    config = work.spec
    rates, length = (
        config.get("synthetic_acceptance_rates"),
        config.get("synthetic_acceptance_length"),
    )
    on = config.get("rejection_sample_method") == "synthetic"
    k = config.get(K)
    problem = None
    if not on and (rates is not None or length is not None):
        problem = "synthetic rates without rejection_sample_method 'synthetic'"
    elif on and work.version >= Version(0, 20, 0) and (rates is None) == (length is None):
        problem = "'synthetic' needs either rates or a length"
    elif rates is not None and not _good_rates(rates, k):
        problem = f"the rates must be {k} numbers from 0 to 1 that do not rise"
    elif length is not None and not (
        isinstance(length, int | float) and isinstance(k, int) and 1 <= length <= k + 1
    ):
        problem = "the length must lie between 1 and k + 1"
    if problem:
        work.report("synthetic-invalid", f"Synthetic acceptance: {problem}.")
        work.set_spec(synthetic_acceptance_rates=None, synthetic_acceptance_length=None)
        if on:
            work.set_spec(rejection_sample_method=None)
    elif on:
        work.report("synthetic-on", "Acceptance is synthetic.")


def _good_rates(rates: object, k: object) -> bool:
    """Whether they are k numbers from 0 to 1 that do not rise."""
    if not isinstance(rates, list) or not isinstance(k, int) or len(rates) != k:
        return False
    if not all(isinstance(r, int | float) and 0 <= r <= 1 for r in rates):
        return False
    return all(b <= a for a, b in itertools.pairwise(rates))


def _draft_parallel(work: Work) -> None:
    value = work.spec.get("draft_tensor_parallel_size")
    target = work.whole("--tensor-parallel-size", 1)
    if value is not None and value not in (1, target):
        work.report(
            "draft-tensor-parallel",
            f"draft_tensor_parallel_size is {value!r}, the target's is {target}.",
            "Set to 1: a small draft gains nothing from a split.",
        )
        work.set_spec(draft_tensor_parallel_size=1)
    elif value is None and target > 1 and work.spec.get("method") == "draft_model":
        work.report(
            "draft-tensor-parallel-default",
            f"The draft is split over {target} GPUs like the target.",
        )


def _checkpoints(work: Work) -> None:
    """What the checkpoints' metadata says against the configuration."""
    config, target, draft = work.spec, work.target, work.draft
    heterogeneous = config.get("use_heterogeneous_vocab")
    if heterogeneous and config.get("method") != "draft_model":
        work.report(
            "heterogeneous-vocab", "use_heterogeneous_vocab without method draft_model.", "Removed."
        )
        work.set_spec(use_heterogeneous_vocab=None)
    elif heterogeneous and config.get("draft_sample_method", "greedy") != "greedy":
        work.report(
            "heterogeneous-vocab",
            "use_heterogeneous_vocab with probabilistic drafting.",
            "draft_sample_method removed.",
            why="vLLM refuses it: only greedy drafting works over two vocabularies.",
        )
        work.set_spec(draft_sample_method=None)
    sizes = (target.vocab_size, draft.vocab_size)
    if (
        config.get("method") == "draft_model"
        and None not in sizes
        and sizes[0] != sizes[1]
        and not heterogeneous
    ):
        can = names().spec_fields["use_heterogeneous_vocab"].holds(work.version)
        work.report(
            "vocab-size",
            f"The target has {sizes[0]} vocabulary entries, the draft {sizes[1]}.",
            "use_heterogeneous_vocab set: only shared tokens are drafted, greedily."
            if can
            else "Choose a draft with the same vocabulary, or vLLM 0.25 or later.",
        )
        if can:
            work.set_spec(use_heterogeneous_vocab=True, draft_sample_method=None)
    said = config.get("quantization")
    if said is not None and draft.vocab_size is not None and draft.quantization is None:
        online = str(said).startswith(("fp8", "int8_per", "mxfp8", "nvfp4_per", "bitsandbytes"))
        if not online:
            work.report("draft-not-quantized", f"The draft's checkpoint is not {said}-quantised.")
            work.set_spec(quantization=None)
    longest = config.get("max_model_len")
    positions = draft.max_positions
    if isinstance(longest, int) and positions is not None and longest > positions:
        work.report(
            "draft-context", f"The draft's max_model_len {longest} is above its {positions}."
        )
        work.set_spec(max_model_len=None)


def _without_speculation(work: Work) -> None:
    """Flags that only make sense with speculation."""
    if work.command.speculation is not None:
        return
    if work.command.get(METRICS_FLAG) in {"summary", "detailed"}:
        work.report("metrics-without-speculation", f"{METRICS_FLAG} without speculation.")
        work.command = work.command.without(METRICS_FLAG)


def _conflicts(work: Work) -> None:
    """Options that speculation makes useless or fatal."""
    overrides = (work.command.get("--override-generation-config") or "") + (
        work.command.get("--default-sampling-params") or ""
    )
    if work.version >= facts.V1_ONLY and ("min_p" in overrides or "logit_bias" in overrides):
        work.report("min-p", "min_p or logit_bias in the default sampling parameters.")
    if work.command.has("--logits-processors"):
        work.report("logits-processors", "Custom logits processors with speculation.")
        work.command = work.command.without("--logits-processors")
    k = work.spec.get(K)
    seqs, tokens = work.whole("--max-num-seqs", 0), work.whole("--max-num-batched-tokens", 0)
    if isinstance(k, int) and seqs and tokens and tokens < seqs * (k + 1):
        lora = work.command.has("--enable-lora")
        work.report(
            "batched-tokens",
            f"max-num-batched-tokens {tokens} is below max-num-seqs x (k + 1) = {seqs * (k + 1)}.",
            f"Raised to {seqs * (k + 1)}.",
            severity=ERROR if lora else WARNING,
        )
        work.command = work.command.with_flag("--max-num-batched-tokens", str(seqs * (k + 1)))
    if work.command.has("--async-scheduling") and work.spec.get("method") in {"ngram", "suffix"}:
        work.report("async-scheduling", f"--async-scheduling with {work.spec['method']}.")
        work.command = work.command.without("--async-scheduling")


def _metrics(work: Work) -> None:
    span = names().flags[METRICS_FLAG]
    if not span.holds(work.version) or work.command.get(METRICS_FLAG) in {"summary", "detailed"}:
        return
    work.report(
        "metrics-off",
        "Acceptance of single requests is not reported.",
        f"{METRICS_FLAG} summary added.",
        source=f"vllm/config/observability.py {span.since}",
    )
    work.command = work.command.with_flag(METRICS_FLAG, "summary")


def _if_speculating(rule: Callable[[Work], None]) -> Callable[[Work], None]:
    """The rule for commands with a speculative configuration only."""

    def checked(work: Work) -> None:
        if work.command.speculation is not None:
            rule(work)

    return checked


RULES: tuple[Callable[[Work], None], ...] = (
    _readable,
    _shorthands,
    _without_speculation,
    *map(
        _if_speculating,
        (
            _disable_by_batch_size,
            _fields,
            _types,
            _method,
            _draft_length,
            _lookup,
            _schedule,
            _acceptance,
            _draft_parallel,
            _checkpoints,
            _conflicts,
            _graphs,
            _metrics,
        ),
    ),
)
