"""What is wrong with a vLLM command, and the corrected one.

Each rule looks at one thing, reports findings and repairs its working copy; the corrected command
is that copy after the last rule. Severities: ``error``, vLLM refuses the command or dies of it;
``warning``, it starts and does something else than written; ``advice``, it works and could be
better.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from specwise.vllm import flags as facts
from specwise.vllm import lint_speculation
from specwise.vllm.command import SPECULATIVE_CONFIG, Flag, ServeCommand, Version, names
from specwise.vllm.findings import (
    ADVICE,
    ERROR,
    SCHEDULE,
    WARNING,
    Finding,
    K,
    ModelFacts,
    Work,
    whole_number,
)


@dataclass(frozen=True, slots=True)
class LintResult:
    """Findings in the order of the rules, and the command with every repair made."""

    version: Version
    findings: tuple[Finding, ...]
    corrected: ServeCommand

    @property
    def clean(self) -> bool:
        """Whether there is nothing but advice."""
        return all(f.severity == ADVICE for f in self.findings)


def lint(
    command: ServeCommand,
    version: Version,
    *,
    target: ModelFacts | None = None,
    draft: ModelFacts | None = None,
) -> LintResult:
    """Check ``command`` against the rules of that vLLM version.

    ``target`` and ``draft`` add the checks that need the checkpoints' metadata.
    """
    work = Work(command, version, target or ModelFacts(), draft or ModelFacts())
    for rule in _RULES:
        rule(work)
    return LintResult(version, tuple(work.findings), replace(work.command, notes={}))


# ------------------------------------------------------------------- the words of the command


def _version_known(work: Work) -> None:
    table = names()
    if work.version > table.newest:
        work.report(
            "version-unknown",
            f"vLLM {work.version} is newer than specwise's tables ({table.newest}).",
            "Upgrade specwise, or check `vllm serve --help=all` of your version.",
        )
    if work.version < table.oldest:
        work.report(
            "version-unknown",
            f"vLLM {work.version} is older than specwise's tables ({table.oldest}).",
            "Upgrade vLLM.",
            severity=WARNING,
            why="Its flags are judged by younger rules.",
        )


def _model_given(work: Work) -> None:
    if work.command.model is None and not work.command.has("--config"):
        work.report("model-missing", "No model is named.")
    if work.command.stray:
        work.report(
            "stray-words",
            f"These words belong to no flag: {' '.join(map(repr, work.command.stray))}.",
        )
        work.command = replace(work.command, stray=())


def _v0_flags(work: Work) -> None:
    """Translate V0's speculative flags into the JSON of later versions."""
    given = [f for f in work.command.flags if f.name in facts.V0_FLAGS]
    if not given or work.version < facts.JSON_START:
        return
    severity = WARNING if work.version < facts.V0_FLAGS_END else ERROR
    config = facts.config_from_v0(work.command)
    for flag in given:
        name = facts.V0_FLAGS[flag.name]
        work.report(
            "v0-flag",
            f"{flag.name} is a flag of the V0 engine.",
            _v0_fix(name, flag, work.version),
            severity=severity,
            why=f"Deprecated in {facts.JSON_START}; {facts.V0_FLAGS_END} and later end in "
            "'unrecognized arguments'.",
        )
    work.command = work.command.without(*facts.V0_FLAGS)
    # V0 did not speculate without one of the first two, whatever else was said.
    if config.keys() & {"model", K} or config.get("method") == "ngram" or work.spec:
        if work.version >= facts.V1_ONLY:
            config = {n: v for n, v in config.items() if n not in facts.GONE_WITH_V0}
        merged = {**config, **work.spec}
        work.command = replace(work.command, speculation=merged, unreadable_speculation=None)


def _v0_fix(name: str, flag: Flag, version: Version) -> str:
    """What replaces one V0 flag today."""
    if name == "disable_by_batch_size" and version >= facts.V1_ONLY:
        return (
            "A draft length per batch size replaces it: "
            f"{SCHEDULE}: [[1, {flag.value}, k], [{flag.value} + 1, ..., 0]] (0.24 on)."
        )
    if name in facts.GONE_WITH_V0 and version >= facts.V1_ONLY:
        return "Removed. " + facts.GONE_WITH_V0[name]
    value = "" if flag.value is None else f" = {flag.value}"
    return f"Field {name!r}{value} of {SPECULATIVE_CONFIG}."


def _json_for_v0(work: Work) -> None:
    """A version older than the JSON reads the flags only."""
    if work.version >= facts.JSON_START or work.command.speculation is None:
        return
    work.report(
        "json-too-new",
        f"{SPECULATIVE_CONFIG} came with vLLM {facts.JSON_START}.",
        why=f"vLLM {work.version} ends in 'unrecognized arguments'.",
    )
    new = facts.v0_flags(work.spec)
    kept = work.command.without(*(f.name for f in new))
    work.command = replace(kept, flags=(*kept.flags, *new), speculation=None)


def _flag_names(work: Work) -> None:
    """Flags that this version does not know."""
    table = names()
    for flag in dict.fromkeys(f.name.split(".")[0] for f in work.command.flags):
        positive = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag
        span = table.flags.get(positive) or table.flags.get(flag)
        if span is not None and span.holds(work.version):
            continue
        if span is None:
            _unknown_flag(work, flag)
        elif span.before(work.version):
            work.report(
                "flag-too-new",
                f"{flag} came with vLLM {span.since}.",
                f"Removed; upgrade to {span.since} if you need it.",
                why=f"vLLM {work.version} ends in 'unrecognized arguments'.",
                source=f"vllm/engine/arg_utils.py {span.since}",
            )
            _drop(work, flag)
        else:
            work.report(
                "flag-removed",
                f"{flag} was removed in vLLM {span.until}.",
                _RENAMED.get(flag, (None, "Removed; nothing takes its place."))[1],
                why=f"vLLM {work.version} ends in 'unrecognized arguments'.",
                source=f"vllm/engine/arg_utils.py {span.until}",
            )
            _rename(work, flag)


# flag -> (new name or None, what the fix says)
_RENAMED: dict[str, tuple[str | None, str]] = {
    "--disable-log-requests": (
        None,
        "Removed; request logging is off unless --enable-log-requests.",
    ),
    "--task": (None, "Removed; --runner and --convert replace it."),
    "--cuda-graph-sizes": ("--cudagraph-capture-sizes", "Renamed --cudagraph-capture-sizes."),
    "--swap-space": (None, "Removed; V1 recomputes preempted requests instead of swapping."),
    "--num-scheduler-steps": (None, "Removed; V1 overlaps scheduling by itself."),
    "--use-v2-block-manager": (None, "Removed; it is the only block manager."),
    "--device": (None, "Removed; the installed build decides the device."),
    "--worker-use-ray": (None, "Removed; use --distributed-executor-backend ray."),
    "--guided-decoding-backend": (None, "Removed; --structured-outputs-config replaces it."),
    "--num-lookahead-slots": (None, "Removed; vLLM derives it from the draft length."),
    "--rope-scaling": (None, "Removed; use --hf-overrides '{\"rope_scaling\": ...}'."),
    "--rope-theta": (None, "Removed; use --hf-overrides '{\"rope_theta\": ...}'."),
}


def _rename(work: Work, flag: str) -> None:
    new = _RENAMED.get(flag, (None, ""))[0]
    if new is None:
        _drop(work, flag)
        return
    renamed = tuple(replace(f, name=new) if f.name == flag else f for f in work.command.flags)
    work.command = replace(work.command, flags=renamed)


def _drop(work: Work, flag: str) -> None:
    """Remove a flag with its dotted forms."""
    gone = [f.name for f in work.command.flags if f.name.split(".")[0] == flag]
    work.command = work.command.without(*gone)


def _unknown_flag(work: Work, flag: str) -> None:
    """A name no version had: an abbreviation that argparse completes, a slip, or a plugin's."""
    usable = [n for n, s in names().flags.items() if s.holds(work.version)]
    completed = [n for n in usable if n.startswith(flag)] if flag.startswith("--") else []
    if len(completed) == 1:
        work.report(
            "flag-abbreviated",
            f"{flag} is short for {completed[0]}.",
            f"Written out as {completed[0]}.",
        )
        renamed = tuple(
            replace(f, name=completed[0]) if f.name == flag else f for f in work.command.flags
        )
        work.command = replace(work.command, flags=renamed)
        return
    near = difflib.get_close_matches(flag, usable, n=1, cutoff=0.75)
    work.report(
        "flag-unknown",
        f"{flag} is no flag of vLLM {work.version}.",
        f"Did you mean {near[0]}? Removed here." if near else "Removed.",
        severity=ERROR if work.version <= names().newest else WARNING,
        source=f"vllm/engine/arg_utils.py {min(work.version, names().newest)}",
    )
    _drop(work, flag)


def _repeated(work: Work) -> None:
    seen: dict[str, Flag] = {}
    for flag in work.command.flags:
        earlier = seen.get(flag.name)
        if earlier is not None and earlier.values != flag.values:
            work.report(
                "flag-repeated",
                f"{flag.name} is given more than once.",
                why=f"The last one counts: {' '.join(flag.values) or 'on'}.",
            )
        seen[flag.name] = flag
    work.command = replace(work.command, flags=tuple(seen.values()))
    if work.command.speculation_given_twice:
        work.report(
            "speculation-twice", f"{SPECULATIVE_CONFIG} is given as JSON and with dotted keys."
        )
        work.command = replace(work.command, speculation_given_twice=False)


_WHOLE = {
    "--tensor-parallel-size": 1,
    "--pipeline-parallel-size": 1,
    "--data-parallel-size": 1,
    "--max-num-seqs": 1,
    "--max-num-batched-tokens": 1,
    "--block-size": 1,
}
_CHOICES = {"--dtype": ("auto", "half", "float16", "bfloat16", "float", "float32")}


def _values(work: Work) -> None:
    """Values that argparse or the config classes refuse."""
    for flag, least in _WHOLE.items():
        if not work.command.has(flag):
            continue
        text = work.command.get(flag)
        value = whole_number(text)
        if value is None or value < least:
            _bad_value(work, flag, text, f"a whole number of {least} or more")
    for flag, choices in _CHOICES.items():
        text = work.command.get(flag)
        if work.command.has(flag) and text not in choices:
            _bad_value(work, flag, text, "one of " + ", ".join(choices))


def _bad_value(work: Work, flag: str, text: str | None, wanted: str) -> None:
    work.report(
        "value-invalid",
        f"{flag} {'has no value' if text is None else f'is {text!r}'}.",
        why=f"vLLM wants {wanted}.",
    )
    work.command = work.command.without(flag)


def _utilization(work: Work) -> None:
    flag = "--gpu-memory-utilization"
    if not work.command.has(flag):
        return
    text = work.command.get(flag) or ""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        _bad_value(work, flag, text, "a share above 0 and up to 1")
    elif value > 0.95:
        work.report(
            "utilization-high",
            f"{flag} {text} leaves {100 * (1 - value):.0f} % of the GPU for everything else.",
        )


def _quantization(work: Work) -> None:
    """Quantisation methods of target and draft that the version does not have."""
    for where, value in (
        ("--quantization", work.command.get("--quantization")),
        ("the draft's quantization", work.spec.get("quantization")),
    ):
        if value is None:
            continue
        span = names().quantization.get(str(value))
        if span is not None and span.holds(work.version):
            continue
        gone = span is not None and not span.before(work.version)
        instead = facts.quantization_instead(str(value), work.version)
        replacement = "int8_per_channel_weight_only" if value == "bitsandbytes" else None
        work.report(
            "quantization-unknown",
            f"{where} {value!r} "
            + (f"was removed in vLLM {span.until}." if gone and span else "is not known."),
            ("Replaced by " if replacement and gone else "Use ") + instead,
            why=f"vLLM {work.version} refuses to start.",
        )
        if where == "--quantization":
            work.command = (
                work.command.with_flag("--quantization", replacement)
                if replacement and gone
                else work.command.without("--quantization")
            )
        else:
            work.set_spec(quantization=replacement if gone else None)
    loader = work.command.get("--load-format")
    if loader == "bitsandbytes" and not names().quantization["bitsandbytes"].holds(work.version):
        work.report(
            "load-format-unknown",
            "--load-format bitsandbytes went with the quantisation method.",
            why=f"vLLM {work.version} refuses to start.",
        )
        work.command = work.command.without("--load-format")


def _v0_values(work: Work) -> None:
    """V0's own limits on its flags, for the versions that read them."""
    if work.version >= facts.JSON_START:
        return
    config: Mapping[str, Any] = facts.config_from_v0(work.command)
    if not config:
        return
    if "model" not in config and config.get("method") != "ngram":
        work.report(
            "draft-missing",
            "Speculative flags without --speculative-model.",
            "Name the draft, or [ngram].",
        )
    if config.get("method") == "ngram" and "prompt_lookup_max" not in config:
        work.report(
            "lookup-default",
            "[ngram] without --ngram-prompt-lookup-max.",
            "Set to 4.",
            severity=ERROR,
            why="V0 stops: it has no default.",
            source="vllm/config.py 0.6",
        )
        work.command = work.command.with_flag("--ngram-prompt-lookup-max", "4")
    k = config.get(K)
    if k is None or not isinstance(k, int) or k < 1:
        work.report(
            "k-missing" if k is None else "k-invalid",
            "--num-speculative-tokens is missing or not above 0.",
            "Set to 3.",
            why="V0 stops.",
            source="vllm/config.py 0.6",
        )
        work.command = work.command.with_flag("--num-speculative-tokens", "3")
    tp = config.get("draft_tensor_parallel_size")
    both = work.version >= facts.V0_DRAFT_TP_LIKE_TARGET
    if tp not in {None, 1, work.whole("--tensor-parallel-size", 1) if both else 1}:
        work.report(
            "draft-tensor-parallel",
            f"The draft's tensor parallel size is {tp}.",
            "Set to 1.",
            why="V0 takes 1 or the target's." if both else "V0 before 0.6.4 takes 1 only.",
            source="vllm/config.py 0.6",
        )
        work.command = work.command.with_flag("--speculative-draft-tensor-parallel-size", "1")


_RULES: tuple[Callable[[Work], None], ...] = (
    _version_known,
    _model_given,
    _repeated,
    _v0_flags,
    _json_for_v0,
    _flag_names,
    _values,
    _utilization,
    _v0_values,
    *lint_speculation.RULES,
    _quantization,
)
