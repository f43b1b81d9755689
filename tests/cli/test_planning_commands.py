"""pair, memory, flags and lint as a user runs them: answers, codes, JSON, speed, no traceback."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specwise.cli.main import specwise
from specwise.errors import SpecwiseError

COMMANDS: dict[str, list[str]] = {
    "pair": ["pair", "llama-3.1-70b", "llama-3.1-8b", "llama-3.2-1b"],
    "memory": ["memory", "llama-3.1-70b", "--draft", "llama-3.1-8b", "--gpus", "4"],
    "flags": ["flags", "llama-3.1-70b", "--draft", "llama-3.1-8b", "--k", "5", "--tp", "2"],
    "lint": ["lint", "vllm serve m --speculative-model d --num-speculative-tokens 5"],
}


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(specwise, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, SpecwiseError), result.exception
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def ask(*words: str) -> Any:
    return json.loads(run(words[0], "--json", *words[1:])[1])


@pytest.mark.parametrize("name", COMMANDS)
def test_json_and_text(name: str) -> None:
    words = COMMANDS[name]
    code, text = run(*words)
    assert code == (1 if name == "lint" else 0)
    assert text
    answer = json.loads(run(words[0], "--json", *words[1:])[1])
    assert isinstance(answer, dict)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_that_runs(name: str) -> None:
    import shlex

    code, text = run(name, "--help")
    assert code == 0
    example = " ".join(text.split("Example: specwise ")[1].split())
    assert run(*shlex.split(example))[0] in {0, 1}


@pytest.mark.parametrize("name", COMMANDS)
def test_speed(name: str) -> None:
    """Under 0.6 s from a cold process.

    Processor time of the process, since these commands wait for nothing and the machine that runs
    the tests may be busy; the best of three.
    """
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "specwise.cli.main", *COMMANDS[name]],
            check=False,
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.6


def test_memory_simple_view() -> None:
    """req: C4"""
    answer = ask("memory", "llama-3.1-70b", "--draft", "llama-3.1-8b", "--gpus", "2", "--simple")
    rows = [(r["weights_gb"], r["left_gb"], r["verdict"]) for r in answer["rows"]]
    assert rows[:2] == [(156, 4, "unusable"), (86, 74, "recommended")]
    assert answer["imbalance_gb"] == {"with_draft": 29, "without": 45}


def test_memory_with_and_without_the_draft() -> None:
    """req: C3"""
    answer = ask(*COMMANDS["memory"], "--context", "16384", "--concurrency", "16")
    before, after = answer["without_draft"], answer["with_draft"]
    for field in ("kv_tokens", "concurrency", "longest_context"):
        assert after[field]["likely"] < before[field]["likely"]


def test_memory_beyond_the_models_own_context() -> None:
    assert "ends at 32,768" in run("memory", "qwen2.5-7b", "--context", "65536")[1]


def test_memory_that_does_not_fit() -> None:
    assert run("memory", "llama-3.1-70b", "--gpu", "l4")[0] == 1
    assert run("memory", "llama-3.1-70b", "--gpus", "3")[0] == 2
    assert run("memory", "llama-3.1-70b", "--gpu", "abacus")[0] == 2


def test_memory_searches_tables_and_pools() -> None:
    base = ["memory", "llama-3.1-70b", "--draft", "llama-3.1-8b", "--concurrency", "16"]
    assert ask(*base, "--search", "gpus")["found"]
    fewer = [*base[:-1], "8", "--gpus", "2"]
    assert ask(*fewer, "--search", "precision")["found"] == "int8 + bf16"
    assert run(*base, "--search", "precision", "--gpu", "l4")[0] == 1
    assert len(ask(*base, "--table")["plans"]) == 20
    assert run(*base, "--table")[0] == 0
    pool = ask("memory", "llama-3.1-8b", "--pool", "1", "--block-size", "128", "--context", "2048")
    assert pool["tokens"] == 8192


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_memory_chart(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"chart.{ending}"
    assert run(*COMMANDS["memory"], "--chart", str(path))[0] == 0
    assert path.read_bytes()[:5] in {b"\x89PNG\r", b"<?xml"}


def test_bad_charts(tmp_path: Path) -> None:
    for name in ("chart.gif", "nowhere/chart.png"):
        assert run(*COMMANDS["memory"], "--chart", str(tmp_path / name))[0] == 2


def test_the_bundled_pair() -> None:
    import specwise as package

    bundled = Path(package.__file__).parent / "bundled"
    pair = [str(bundled / "target"), str(bundled / "draft")]
    answer = ask("pair", *pair)
    assert answer["drafts"][0]["tokenizers"]["verdict"] == "same"
    assert answer["drafts"][0]["sensible"]
    words = ["memory", pair[0], "--draft", pair[1], "--pool", "1", "--block-size", "128"]
    assert run(*words, "--context", "2048")[0] == 0


def test_pair_says_no() -> None:
    assert run("pair", "llama-3.1-70b", "llama-3.2-1b")[0] == 1
    assert run("pair", "llama-3.1-70b", "no-such-model")[0] == 2
    assert ask("pair", "qwen2.5-72b", "--workload", "rag")["methods"][0]["method"] == "ngram"


def test_flags_forms_and_versions() -> None:
    assert "--speculative-model" in run(*COMMANDS["flags"], "--vllm", "0.6.3")[1]
    assert "speculative-config: '" in run(*COMMANDS["flags"], "--format", "yaml")[1]
    assert "args:" in run(*COMMANDS["flags"], "--format", "k8s")[1]
    config = ask(
        "flags", "t", "--draft", "d", "--schedule", "1-8:3,9-64:0", "--set", "max_model_len=9"
    )
    assert config["speculative_config"]["max_model_len"] == 9
    ks = {m: ask("flags", "t", "--method", m)["speculative_config"]["num_speculative_tokens"]
          for m in ("ngram", "mtp", "suffix")}  # fmt: skip
    assert ks == {"ngram": 3, "mtp": 1, "suffix": 24}
    falling = ask("flags", "t", "--draft", "d", "--schedule", "1-4:5,5-9:2")
    assert falling["speculative_config"]["num_speculative_tokens"] == 5
    further = ask("flags", "t", "--k", "2", "--", "--port", "8001", "--enforce-eager")
    assert further["words"][3:6] == ["--port", "8001", "--enforce-eager"]
    for bad in (["--vllm", "x"], ["--schedule", "1-2"], ["--set", "x"], ["--schedule", "[[1"]):
        assert run("flags", "t", "--draft", "d", *bad)[0] == 2


def test_flags_know_the_pair() -> None:
    """The Qwen trap is repaired where the version can, and refused where it cannot."""
    words = ["flags", "qwen2.5-72b", "--draft", "qwen2.5-3b"]
    today = ask(*words, "--vllm", "0.33.0")
    assert today["speculative_config"]["use_heterogeneous_vocab"] is True
    assert today["words"][2] == "Qwen/Qwen2.5-72B-Instruct"
    assert run(*words, "--vllm", "0.33.0")[0] == 0
    assert run(*words, "--vllm", "0.20.0")[0] == 1


def test_lint_inputs(tmp_path: Path) -> None:
    assert run("lint", "vllm", "serve", "m", "--max-model-len", "5")[0] == 0
    (tmp_path / "serve.yaml").write_text('model: m\nspeculative-config: \'{"method": "ngram"}\'')
    assert run("lint", str(tmp_path / "serve.yaml"))[0] == 1
    (tmp_path / "serve.sh").write_text("#!/bin/sh\nexec vllm serve m --dtype bf16\n")
    answer = json.loads(run("lint", "--json", str(tmp_path / "serve.sh"))[1])
    assert answer["findings"][0]["rule"] == "value-invalid"
    assert run("lint")[0] == 2
    assert run("lint", "--pid", "999999999")[0] == 2
    result = CliRunner().invoke(specwise, ["lint", "-"], input="vllm serve m --swap-space 4")
    assert "flag-removed" in result.output
    docker = json.loads(run("lint", "--json", "docker run vllm/vllm-openai:v0.6.3 --model m")[1])
    assert docker["vllm"] == "0.6.3"
    gpu = run("lint", "--gpu", "l4", "vllm serve llama-3.1-70b --max-model-len 8192")
    assert gpu[0] == 1
    assert "memory-plan" in gpu[1]


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
_JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 500) | _TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(_TEXT, x, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(_TEXT, _JSONISH)
def test_lint_never_shows_a_traceback(text: str, value: Any) -> None:
    run("lint", text)
    run("lint", "vllm serve m " + text)
    run("lint", f"vllm serve m --speculative-config '{json.dumps(value)}'")


_FLAG_WORDS = st.lists(
    st.sampled_from(
        ["--draft", "--k", "--vllm", "--tp", "--schedule", "--set", "--method", "--acceptance",
         "--json", "--format", "yaml", "0.6.3", "0.33.0", "3", "ngram", "x=1", "1-4:2"]
    )
    | _TEXT,
    max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(_FLAG_WORDS)
def test_flags_never_show_a_traceback(words: list[str]) -> None:
    run("flags", "target", *words)


_CONFIGS = st.dictionaries(
    st.sampled_from(
        ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type",
         "head_dim", "sliding_window", "num_key_value_heads", "max_position_embeddings",
         "quantization_config", "num_experts", "kv_lora_rank"]
    ),
    _JSONISH | st.integers(1, 4096),
)  # fmt: skip
_WHOLE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_CONFIGS, st.booleans())
def test_pair_and_memory_never_show_a_traceback(
    tmp_path: Path, config: dict[str, Any], whole: bool
) -> None:
    if whole:  # otherwise nearly every config stops at its first missing size
        config = dict.fromkeys(_WHOLE, 64) | config
    (tmp_path / "config.json").write_text(json.dumps(config))
    run("pair", str(tmp_path), str(tmp_path))
    run("memory", str(tmp_path), "--draft", str(tmp_path))
    run("memory", str(tmp_path), "--table", "--json")


def test_pair_gives_a_predicted_range_for_each_draft() -> None:
    (draft,) = ask("pair", "llama-3.1-70b", "llama-3.1-8b")["drafts"]
    assert [found["batch"] for found in draft["predicted"]] == [1, 64]
    _, text = run("pair", "llama-3.1-70b", "llama-3.1-8b", "--gpu", "h200", "--gpus", "2")
    assert "predicted, k = 3 on 2 x h200:" in text
