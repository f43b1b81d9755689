"""What lint finds, rule by rule, and that its correction is clean. req: E2"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specwise.vllm.command import Flag, ServeCommand, Version, names, read_command, to_words
from specwise.vllm.findings import ADVICE, ERROR, WARNING, ModelFacts, catalogue
from specwise.vllm.lint import LintResult, lint

TODAY = names().newest
ARTICLE_1 = (
    "vllm serve meta-llama/Llama-3.1-70B-Instruct "
    "--speculative-model meta-llama/Llama-3.1-8B-Instruct --num-speculative-tokens 5 "
    "--speculative-draft-tensor-parallel-size 1 --tensor-parallel-size 2 "
    "--gpu-memory-utilization 0.92 --dtype bfloat16"
)
ARTICLE_2 = (
    "vllm serve meta-llama/Llama-3.1-70B-Instruct --quantization bitsandbytes "
    "--load-format bitsandbytes --speculative-model meta-llama/Llama-3.1-8B-Instruct "
    "--speculative-model-quantization bitsandbytes --num-speculative-tokens 5 "
    "--tensor-parallel-size 2 --gpu-memory-utilization 0.92"
)


def run(text: str, version: str | Version = TODAY, **facts: ModelFacts) -> LintResult:
    wanted = Version.parse(version) if isinstance(version, str) else version
    return lint(read_command(text), wanted, **facts)


def spec(config: Mapping[str, Any], rest: str = "") -> str:
    return f"vllm serve m {rest} --speculative-config '{json.dumps(config)}'"


def rules(result: LintResult, *severities: str) -> set[str]:
    return {f.rule for f in result.findings if not severities or f.severity in severities}


def test_the_articles_first_command() -> None:
    result = run(ARTICLE_1)
    told = {w for f in result.findings if f.rule == "v0-flag" for w in f.what.split()}
    assert {"--speculative-model", "--num-speculative-tokens"} <= told
    assert "--speculative-draft-tensor-parallel-size" in told
    assert result.corrected.speculation == {
        "method": "draft_model",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "num_speculative_tokens": 5,
        "draft_tensor_parallel_size": 1,
    }
    assert result.corrected.get("--gpu-memory-utilization") == "0.92"
    assert result.corrected.get("--dtype") == "bfloat16"


def test_the_articles_second_command() -> None:
    result = run(ARTICLE_2)
    assert {"v0-flag", "quantization-unknown", "load-format-unknown"} <= rules(result, ERROR)
    assert result.corrected.get("--quantization") == "int8_per_channel_weight_only"
    assert not result.corrected.has("--load-format")
    assert result.corrected.speculation is not None
    assert result.corrected.speculation["quantization"] == "int8_per_channel_weight_only"


def test_the_articles_commands_suit_their_own_time() -> None:
    for text in (ARTICLE_1, ARTICLE_2):
        assert rules(run(text, "0.6.3"), ERROR, WARNING) == set()
        assert rules(run(text, "0.8.2"), ERROR, WARNING) == {"v0-flag"}


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--speculative-disable-by-batch-size 16", "num_speculative_tokens_per_batch_size"),
        ("--spec-decoding-acceptance-method typical_acceptance_sampler", None),
        ("--typical-acceptance-sampler-posterior-threshold 0.09", None),
        ("--typical-acceptance-sampler-posterior-alpha 0.3", None),
        ("--speculative-disable-mqa-scorer", None),
        ("--disable-logprobs-during-spec-decoding", None),
        ("--speculative-max-model-len 4096", "max_model_len"),
        ("--ngram-prompt-lookup-max 4", "prompt_lookup_max"),
        ("--ngram-prompt-lookup-min 2", "prompt_lookup_min"),
    ],
)
def test_every_other_v0_flag_is_translated_or_explained(flag: str, field: str | None) -> None:
    text = f"vllm serve m --speculative-model d --num-speculative-tokens 3 {flag}"
    result = run(text)
    found = next(f for f in result.findings if f.what.startswith(flag.split(maxsplit=1)[0]))
    assert found.fix
    corrected = result.corrected.speculation or {}
    assert (field in corrected) == (field is not None)


def test_disable_by_batch_size_was_silent_for_a_while() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4, "disable_by_batch_size": 8}
    assert "disable-by-batch-size" in rules(run(spec(config), "0.12.0"), WARNING)
    assert "disable-by-batch-size" in rules(run(spec(config), "0.20.0"), ERROR)
    corrected = run(spec(config, "--max-num-seqs 64"), "0.24.0").corrected.speculation
    assert corrected is not None
    assert corrected["num_speculative_tokens_per_batch_size"] == [[1, 8, 4], [9, 64, 0]]
    assert rules(run(spec(config), "0.9.2"), ERROR, WARNING) == set()


GOOD = {"method": "draft_model", "model": "d", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("text", "rule", "severity"),
    [
        ("vllm serve --port 1", "model-missing", ERROR),
        ("vllm serve m --enforce-eager stray", "stray-words", ERROR),
        ("vllm serve m --max-model-le 5", "flag-abbreviated", ADVICE),
        ("vllm serve m --frobnicate 5", "flag-unknown", ERROR),
        ("vllm serve m --num-scheduler-steps 8", "flag-removed", ERROR),
        ("vllm serve m --port 1 --port 2", "flag-repeated", WARNING),
        ("vllm serve m --max-num-seqs 0", "value-invalid", ERROR),
        ("vllm serve m --tensor-parallel-size two", "value-invalid", ERROR),
        ("vllm serve m --dtype bf16", "value-invalid", ERROR),
        ("vllm serve m --gpu-memory-utilization 2", "value-invalid", ERROR),
        ("vllm serve m --gpu-memory-utilization 0.99", "utilization-high", WARNING),
        ("vllm serve m --per-request-spec-decode-metrics summary",
         "metrics-without-speculation", ERROR),
        ("vllm serve m --speculative-config oops", "json-invalid", ERROR),
        (spec(GOOD), "metrics-off", ADVICE),
        (spec(GOOD), "k-beyond-graphs", ADVICE),
        (spec(GOOD, "-tp 2"), "draft-tensor-parallel-default", ADVICE),
        (spec(GOOD, "--spec-tokens 4"), "shorthand-conflict", ERROR),
        (spec(GOOD, "--speculative-config.method ngram"), "speculation-twice", WARNING),
        (spec(GOOD | {"draft_tensor_parallel_size": 2}, "-tp 4"), "draft-tensor-parallel", ERROR),
        (spec(GOOD | {"tensor_parallel_size": 1}), "tensor-parallel-in-json", ERROR),
        (spec(GOOD | {"num_speculative_token": 3}), "field-unknown", ERROR),
        (spec(GOOD | {"num_speculative_tokens": 0}), "k-invalid", ERROR),
        (spec(GOOD | {"num_speculative_tokens": 200}), "k-huge", WARNING),
        (spec({"method": "ngram"}), "k-missing", ERROR),
        (spec({"num_speculative_tokens": 3}), "method-missing", ERROR),
        (spec({"model": "d", "num_speculative_tokens": 3}), "method-implicit", ADVICE),
        (spec({"method": 3, "num_speculative_tokens": 3}), "field-invalid", ERROR),
        (spec(GOOD | {"max_model_len": -5}), "field-invalid", ERROR),
        (spec({"method": "draft_model", "num_speculative_tokens": 3}), "draft-missing", ERROR),
        (spec({"method": "deepseek_mtp", "num_speculative_tokens": 1}), "method-renamed", ADVICE),
        (spec({"method": "suffix", "num_speculative_tokens": 8}), "suffix-package", ADVICE),
        (spec({"method": "ngram", "num_speculative_tokens": 3}), "lookup-default", ADVICE),
        (spec({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 4,
               "prompt_lookup_max": 2}), "lookup-range", ERROR),
        (spec({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 0}),
         "lookup-invalid", ERROR),
        (spec(GOOD | {"rejection_sample_method": "typical"}), "acceptance-unknown", ERROR),
        (spec(GOOD | {"rejection_sample_method": "fly"}), "acceptance-lossy", ADVICE),
        (spec(GOOD | {"rejection_sample_method": "synthetic"}), "synthetic-invalid", ERROR),
        (spec(GOOD | {"rejection_sample_method": "synthetic",
                      "synthetic_acceptance_length": 2}), "synthetic-on", WARNING),
        (spec(GOOD | {"num_speculative_tokens_per_batch_size": [[2, 4, 3]]}),
         "schedule-invalid", ERROR),
        (spec(GOOD | {"num_speculative_tokens_per_batch_size": [[1, 4, 3], [8, 9, 1]]}),
         "schedule-gap", WARNING),
        (spec(GOOD | {"num_speculative_tokens_per_batch_size": [[1, 4, 5]]}),
         "schedule-above-k", WARNING),
        (spec(GOOD | {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]}, "-dp 2"),
         "schedule-data-parallel", WARNING),
        (spec(GOOD | {"method": "ngram", "use_heterogeneous_vocab": True}),
         "heterogeneous-vocab", ERROR),
        (spec(GOOD | {"quantization": "nonsense"}), "quantization-unknown", ERROR),
        (spec(GOOD, "--logits-processors a:b"), "logits-processors", ERROR),
        (spec(GOOD, """--override-generation-config '{"min_p": 0.1}'"""), "min-p", WARNING),
        (spec(GOOD, "--max-num-seqs 64 --max-num-batched-tokens 128"), "batched-tokens", WARNING),
        (spec({"method": "ngram", "num_speculative_tokens": 3}, "--async-scheduling"),
         "async-scheduling", ERROR),
    ],
)  # fmt: skip
def test_each_rule(text: str, rule: str, severity: str) -> None:
    assert (rule, severity) in {(f.rule, f.severity) for f in run(text).findings}


@pytest.mark.parametrize(
    ("text", "version", "rule"),
    [
        (spec(GOOD), "0.8.1", "json-too-new"),
        (spec(GOOD), "0.12.0", "method-unknown"),
        ("vllm serve m --stream-interval 2", "0.9.2", "flag-too-new"),
        ("vllm serve m", "9.0.0", "version-unknown"),
        ("vllm serve m", "0.5.0", "version-unknown"),
        ("vllm serve m --speculative-model d", "0.6.0", "k-missing"),
        ("vllm serve m --num-speculative-tokens 3", "0.6.0", "draft-missing"),
        ("vllm serve m --speculative-model [ngram] --num-speculative-tokens 3", "0.7.3",
         "lookup-default"),
        ("vllm serve m --speculative-model d --num-speculative-tokens 3 -tp 4 "
         "--speculative-draft-tensor-parallel-size 4", "0.6.3", "draft-tensor-parallel"),
        ("vllm serve m --speculative-model d --num-speculative-tokens 3 -tp 4 "
         "--speculative-draft-tensor-parallel-size 3", "0.6.0", "draft-tensor-parallel"),
    ],
)  # fmt: skip
def test_rules_of_other_versions(text: str, version: str, rule: str) -> None:
    assert rule in rules(run(text, version))


@pytest.mark.parametrize(
    ("config", "target", "draft", "rule"),
    [
        (GOOD, ModelFacts(vocab_size=152064), ModelFacts(vocab_size=151936), "vocab-size"),
        (GOOD | {"quantization": "awq"}, ModelFacts(100), ModelFacts(100), "draft-not-quantized"),
        (GOOD | {"max_model_len": 99}, ModelFacts(1), ModelFacts(1, None, 50), "draft-context"),
    ],
)
def test_rules_that_need_the_checkpoints(
    config: dict[str, Any], target: ModelFacts, draft: ModelFacts, rule: str
) -> None:
    result = run(spec(config), target=target, draft=draft)
    assert rule in rules(result, ERROR)
    again = lint(result.corrected, TODAY, target=target, draft=draft)
    assert rule not in rules(again, ERROR)


def test_the_qwen_trap_is_repaired_by_version() -> None:
    sizes = {"target": ModelFacts(vocab_size=152064), "draft": ModelFacts(vocab_size=151936)}
    today = run(spec(GOOD), **sizes).corrected.speculation
    assert today is not None
    assert today["use_heterogeneous_vocab"] is True
    old = run(spec(GOOD), "0.20.0", **sizes).corrected.speculation
    assert "use_heterogeneous_vocab" not in (old or {})


def test_every_rule_is_documented_and_every_finding_complete() -> None:
    docs = Path(__file__).parents[2] / "docs" / "reference" / "lint.md"
    reference = docs.read_text(encoding="utf-8")
    for rule, entry in catalogue().items():
        assert entry["severity"] in {ERROR, WARNING, ADVICE}, rule
        assert entry["why"], rule
        assert entry["source"], rule
        assert f"| {rule} |" in reference, rule
    for text in (ARTICLE_1, ARTICLE_2, spec(GOOD)):
        for finding in run(text).findings:
            assert finding.what
            assert finding.why
            assert finding.fix
            assert finding.source


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=2),
    max_leaves=5,
)
_FIELDS = st.dictionaries(
    st.sampled_from([*names().spec_fields, "tensor_parallel_size", "nonsense"]),
    _JSON
    | st.sampled_from(["ngram", "draft_model", "synthetic", "eagle3", "mtp", "suffix", "fp8"])
    | st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=3),
    max_size=7,
)
_FLAGS = st.lists(
    st.builds(
        Flag,
        st.sampled_from(sorted(names().flags)) | st.text(max_size=8).map("--".__add__),
        st.lists(st.sampled_from(["1", "2", "0.9", "x", "", "auto", "[]"]), max_size=2).map(tuple),
    ),
    max_size=5,
)
_VERSIONS = st.sampled_from(["0.6.0", "0.8.2", "0.9.2", "0.12.0", "0.20.0", "0.32.0", "0.33.0"])


@settings(max_examples=60, deadline=None)
@given(_FLAGS, st.none() | _FIELDS, _VERSIONS)
def test_any_command_is_judged_and_the_correction_is_stable(
    flags: list[Flag], config: dict[str, Any] | None, version: str
) -> None:
    """Never an exception; a second pass finds no error that the first could have repaired."""
    command = ServeCommand("m", tuple(flags), config)
    wanted = Version.parse(version)
    once = lint(command, wanted)
    twice = lint(once.corrected, wanted)
    unrepairable = {"draft-missing", "method-missing", "method-unknown"}
    assert rules(twice, ERROR) <= unrepairable
    assert lint(twice.corrected, wanted).corrected == twice.corrected
    assert read_command(" ".join(["vllm", "serve", "m"])).model == to_words(twice.corrected)[2]
