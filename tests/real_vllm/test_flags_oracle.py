"""vLLM itself judges what specwise writes, what it calls broken, and the KV cache it predicts.

Two processes of the engine's Python answer all questions (see ``engine_oracle``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.analysis.synthetic import demo_design
from tests.real_vllm.tiny_models import make_all

from specwise.cli.flags_from import Choice, served
from specwise.domain import Arm, Deployment, Speculation, StudyData
from specwise.facts.bundled import bundled_draft, bundled_target
from specwise.facts.checkpoint import from_folder
from specwise.planning.memory import CachedModel, kv_capacity
from specwise.vllm.command import Version, read_command, read_words, to_words
from specwise.vllm.engine import embedded_version, engine_python
from specwise.vllm.findings import ADVICE, ModelFacts
from specwise.vllm.flags import ServeOptions, serve_command
from specwise.vllm.lint import lint

HERE = Path(__file__).parent
VERSION = Version.parse(embedded_version())

ARTICLE_COMMANDS = {
    "two gpus": "python -m vllm.entrypoints.openai.api_server --model {target} "
    "--speculative-model {draft} --num-speculative-tokens 5 "
    "--speculative-draft-tensor-parallel-size 1 --tensor-parallel-size 2 "
    "--gpu-memory-utilization 0.92 --dtype bfloat16",
    "quantised": "python -m vllm.entrypoints.openai.api_server --model {target} "
    "--quantization bitsandbytes --load-format bitsandbytes --speculative-model {draft} "
    "--speculative-model-quantization bitsandbytes --num-speculative-tokens 5 "
    "--spec-decoding-acceptance-method typical_acceptance_sampler "
    "--typical-acceptance-sampler-posterior-threshold 0.09 "
    "--typical-acceptance-sampler-posterior-alpha 0.3 --speculative-disable-by-batch-size 16",
}


# ------------------------------------------------------------------- what `flags` can write


def emitted(models: dict[str, str]) -> dict[str, list[str]]:
    """Commands over every method, each option of each, for the embedded engine's version."""
    target, draft = models["target"], models["draft"]
    found: dict[str, list[str]] = {}

    def add(name: str, speculation: Speculation, model: str = target, **options: Any) -> None:
        command = serve_command(
            ServeOptions(model=model, version=VERSION, speculation=speculation, **options)
        )
        found[name] = to_words(command)[2:]

    schedules = {
        "falling": ((1, 4, 4), (5, 16, 2), (17, 256, 0)),
        "short": ((1, 8, 3),),
        "gap": ((1, 2, 4), (10, 64, 1)),
    }
    for k in range(1, 9):
        for sampling in ("greedy", "probabilistic"):
            model = Speculation("draft_model", k, draft)
            add(f"draft k={k} {sampling}", model, draft_sampling=sampling)
        add(f"ngram k={k}", Speculation("ngram", k))
        lookup = {"prompt_lookup_min": k, "prompt_lookup_max": k + 2}
        add(f"ngram lookup {k}", Speculation("ngram", 4, options=lookup))
        add(f"eagle3 k={k}", Speculation("eagle3", k, models["eagle3"]))
    for name, rows in schedules.items():
        add(f"draft {name}", Speculation("draft_model", 4, draft, rows))
        add(f"ngram {name}", Speculation("ngram", 4, None, rows))
    for k in (1, 2, 3):
        add(f"eagle k={k}", Speculation("eagle", k, models["eagle"]))
        add(f"mtp k={k}", Speculation("mtp", k), models["mtp"])
        add(f"block k={k}", Speculation("draft_model", k, draft), acceptance="block")
        rates = {"synthetic_acceptance_rates": [0.5] * k}
        add(f"rates {k}", Speculation("draft_model", k, draft, (), rates), acceptance="synthetic")
        length = {"synthetic_acceptance_length": 1.5}
        add(f"length {k}", Speculation("ngram", k, options=length), acceptance="synthetic")
        depth = {"suffix_decoding_max_tree_depth": 8 * k, "suffix_decoding_min_token_prob": 0.2}
        add(f"suffix {k}", Speculation("suffix", 8 * k, options=depth))
    one = Speculation("draft_model", 3, draft)
    add("draft tp", one, tensor_parallel=2, draft_tensor_parallel=1)
    add("draft tp like the target", one, tensor_parallel=2, draft_tensor_parallel=2)
    add("both quantised", one, quantization="int8_per_channel_weight_only",
        draft_quantization="int8_per_channel_weight_only")  # fmt: skip
    add("draft quantised", one, draft_quantization="int8_per_channel_weight_only")
    add("fp8 cache", one, kv_cache_dtype="fp8")
    add("limits", one, utilization=0.8, max_model_len=2048, max_num_seqs=64, dtype="bfloat16")
    other = Speculation(
        "draft_model", 3, models["other-vocabulary"], options={"use_heterogeneous_vocab": True}
    )
    add("two vocabularies", other)
    add("own cache dtype", Speculation("draft_model", 3, draft, (), {"kv_cache_dtype": "bfloat16"}))
    add("eager draft", Speculation("draft_model", 3, draft, (), {"enforce_eager": True}))
    add("short draft", Speculation("draft_model", 3, draft, (), {"max_model_len": 1024}))
    return found | from_a_study(models)


def from_a_study(models: dict[str, str]) -> dict[str, list[str]]:
    """What `flags --from` writes for a scheduled arm and for its baseline."""
    words = ("--max-model-len", "1024", "--middleware", "a.b", "--no-enable-prefix-caching")
    deployment = Deployment(models["target"], "/opt/vllm/bin/python", "chat", words)
    rows = ((1, 4, 4), (5, 1024, 0))
    scheduled = Speculation("draft_model", 4, models["draft"], rows)
    arms = (Arm("baseline", None, deployment), Arm("scheduled", scheduled, deployment))
    study = StudyData(demo_design(arms=arms), {}, (), "")
    found = {}
    for arm in arms:
        command = served(study, Choice(arm, arm.speculation, ""), version=VERSION).checked
        assert command is not None
        found[f"study: {arm.name}"] = to_words(command.command)[2:]
    return found


# ---------------------------------------------------------------------------- what is broken

# Words after the target; {draft} and {other} are folders. Each is refused by vLLM.
REFUSED: dict[str, str] = {
    "v0 model": "--speculative-model {draft} --num-speculative-tokens 3",
    "v0 acceptance": "--spec-decoding-acceptance-method typical_acceptance_sampler",
    "v0 switch-off": "--speculative-disable-by-batch-size 8",
    "unknown flag": "--speculative-tokens 3",
    "removed flag": "--swap-space 4",
    "removed scheduler": "--num-scheduler-steps 8",
    "stray word": "--enforce-eager oops",
    "utilization": "--gpu-memory-utilization 1.5",
    "utilization of zero": "--gpu-memory-utilization 0",
    "dtype": "--dtype bf16",
    "parallel": "--tensor-parallel-size two",
    "bitsandbytes": "--quantization bitsandbytes",
    "no json": "--speculative-config {{method:ngram}}",
    "no k": """-sc '{{"method": "ngram"}}'""",
    "k of zero": """-sc '{{"method": "ngram", "num_speculative_tokens": 0}}'""",
    "k below zero": """-sc '{{"method": "ngram", "num_speculative_tokens": -2}}'""",
    "no model": """-sc '{{"method": "draft_model", "num_speculative_tokens": 3}}'""",
    "method": """-sc '{{"method": "lookahead", "num_speculative_tokens": 3}}'""",
    "field": """-sc '{{"method": "ngram", "num_speculative_tokens": 3, "k": 3}}'""",
    "old field": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "disable_by_batch_size": 8}}'""",
    "acceptance field": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "acceptance_method": "typical_acceptance_sampler"}}'""",
    "tp in the json": """-sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 3, "tensor_parallel_size": 1}}'""",
    "draft tp": """-tp 2 -sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 3, "draft_tensor_parallel_size": 4}}'""",
    "vocabulary size": """-sc '{{"method": "draft_model", "model": "{other}",
        "num_speculative_tokens": 3}}'""",
    "two vocabularies, sampled": """-sc '{{"method": "draft_model", "model": "{other}",
        "num_speculative_tokens": 3, "use_heterogeneous_vocab": true,
        "draft_sample_method": "probabilistic"}}'""",
    "two vocabularies, ngram": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "use_heterogeneous_vocab": true}}'""",
    "lookup range": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "prompt_lookup_min": 4, "prompt_lookup_max": 2}}'""",
    "lookup of zero": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "prompt_lookup_max": 0}}'""",
    "rejection method": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "rejection_sample_method": "strict"}}'""",
    "draft sampling": """-sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 3, "draft_sample_method": "gumbel"}}'""",
    "rates of the wrong length": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5]}}'""",
    "rising rates": """-sc '{{"method": "ngram", "num_speculative_tokens": 2,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5, 0.6]}}'""",
    "rates without synthetic": """-sc '{{"method": "ngram", "num_speculative_tokens": 2,
        "synthetic_acceptance_rates": [0.5, 0.4]}}'""",
    "synthetic alone": """-sc '{{"method": "ngram", "num_speculative_tokens": 2,
        "rejection_sample_method": "synthetic"}}'""",
    "length above k + 1": """-sc '{{"method": "ngram", "num_speculative_tokens": 2,
        "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 4}}'""",
    "shorthand twice": """--spec-tokens 3 -sc '{{"method": "ngram",
        "num_speculative_tokens": 2}}'""",
    "metrics without speculation": "--per-request-spec-decode-metrics summary",
    "async ngram": """--async-scheduling -sc '{{"method": "ngram",
        "num_speculative_tokens": 3}}'""",
    "lora budget": """--enable-lora --max-num-seqs 64 --max-num-batched-tokens 128
        -sc '{{"method": "ngram", "num_speculative_tokens": 5}}'""",
    "draft context": """-sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 3, "max_model_len": 999999}}'""",
}
# The same, but vLLM's config check lets them pass: it ignores them, or dies of them later.
SILENT: dict[str, str] = {
    "schedule from 2": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[2, 8, 3]]}}'""",
    "overlapping schedule": """-sc '{{"method": "ngram", "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": [[1, 8, 3], [8, 16, 1]]}}'""",
    "schedule with data parallelism": """-dp 2 -sc '{{"method": "ngram",
        "num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 8, 3]]}}'""",
    "k of 200": """-sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 200}}'""",
    "awq on a bf16 draft": """-sc '{{"method": "draft_model", "model": "{draft}",
        "num_speculative_tokens": 3, "quantization": "awq"}}'""",
    "logits processors": """--logits-processors a:b -sc '{{"method": "ngram",
        "num_speculative_tokens": 3}}'""",
}


def broken(models: dict[str, str], texts: dict[str, str]) -> dict[str, list[str]]:
    """Words of the broken commands, target first."""
    found = {}
    for name, text in texts.items():
        filled = text.format(draft=models["draft"], other=models["other-vocabulary"])
        command = "vllm serve " + models["target"] + " " + " ".join(filled.split())
        found[name] = _split(command)[2:]
    return found


def _split(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


# -------------------------------------------------------------------------------- KV caches

POOL = {"64 MiB": 2**26, "100 MB": 100_000_000, "1 GiB less a byte": 2**30 - 1}
BATCHED = 512  # max_num_batched_tokens: how far a window reaches in one step
CACHES: dict[str, tuple[str, str | None, int, str, int]] = {
    # target, draft, pool, KV dtype, longest request
    "alone": ("target", None, POOL["64 MiB"], "auto", 1000),
    "one kv head": ("wide", None, POOL["100 MB"], "auto", 4096),
    "with a draft": ("target", "draft", POOL["64 MiB"], "auto", 2048),
    "wide with a draft": ("wide", "draft", POOL["1 GiB less a byte"], "auto", 777),
    "fp8": ("wide", None, POOL["64 MiB"], "fp8", 2048),
    "fp8 with a draft": ("target", "draft", POOL["100 MB"], "fp8", 1000),
    "float32": ("target", "draft", POOL["100 MB"], "float32", 1536),
    "all windows": ("mistral", None, POOL["64 MiB"], "auto", 2048),
    "five windows to one": ("gemma3", None, POOL["64 MiB"], "auto", 2048),
}
_KV_BITS = {"auto": 16, "fp8": 8, "float32": 32}


def caches(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Arguments of ``vllm.LLM`` for each cache."""
    found: dict[str, dict[str, Any]] = {}
    for name, (target, draft, pool, dtype, longest) in CACHES.items():
        options: dict[str, Any] = {
            "model": models[target],
            "max_model_len": longest,
            "kv_cache_memory_bytes": pool,
            "max_num_seqs": 8,
            "max_num_batched_tokens": BATCHED,
        }
        if dtype == "float32":
            options["dtype"] = dtype
        else:
            options["kv_cache_dtype"] = dtype
        if draft is not None:
            options["speculative_config"] = {
                "method": "draft_model",
                "model": models[draft],
                "num_speculative_tokens": 3,
            }
        found[name] = options
    return found


# ------------------------------------------------------------------------------------ answers


class Answers:
    """What vLLM said: a refusal or None by command, tokens by cache."""

    def __init__(self, models: dict[str, str], root: Path) -> None:
        self.models = models
        self.emitted = emitted(models)
        self.refused = broken(models, REFUSED)
        self.silent = broken(models, SILENT)
        self.article = {
            name: to_words(
                lint(read_command(text.format(**models)), VERSION, draft=ModelFacts()).corrected
            )[4:]
            for name, text in ARTICLE_COMMANDS.items()
        }
        self.repaired = {}
        for name, words in (self.refused | self.silent).items():
            target, draft = self.facts(words)
            command = read_words(["vllm", "serve", *words])
            result = lint(command, VERSION, target=target, draft=draft)
            self.repaired[name] = to_words(result.corrected)[2:]
        commands = {}
        for group in ("emitted", "refused", "silent", "article", "repaired"):
            commands |= {f"{group}: {n}": words for n, words in getattr(self, group).items()}
        # suffix decoding asks whether this package is there, and for no more in the config check
        (root / "stub" / "arctic_inference").mkdir(parents=True)
        (root / "stub" / "arctic_inference" / "__init__.py").touch()
        self.said: dict[str, str | None] = {}
        self.tokens: dict[str, int | None] = {}
        # Two engines side by side: each keeps one core busy.
        asked = ({"commands": commands, "caches": {}}, {"commands": {}, "caches": caches(models)})
        with ThreadPoolExecutor() as pool:
            for lines in pool.map(lambda questions: _ask(questions, root / "stub"), asked):
                for kind, name, value in lines:
                    (self.said if kind == "command" else self.tokens)[name] = value
        assert set(self.said) == set(commands)

    def facts(self, words: list[str]) -> tuple[ModelFacts, ModelFacts]:
        """The metadata that lint would read for those words."""
        command = read_words(["vllm", "serve", *words])
        draft = (command.speculation or {}).get("model")
        return _facts(command.model), _facts(draft)


def _ask(questions: dict[str, Any], packages: Path) -> list[Any]:
    """The answers of one process of the engine's Python, which finds ``packages`` as well."""
    done = subprocess.run(
        [str(engine_python()), str(HERE / "engine_oracle.py")],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return [json.loads(line.removeprefix("ANSWER ")) for line in answers]


def _facts(folder: object) -> ModelFacts:
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return ModelFacts()
    checkpoint = from_folder(Path(folder))
    method = checkpoint.quantization.method if checkpoint.quantization else None
    return ModelFacts(checkpoint.vocab_size, method, checkpoint.max_positions)


@pytest.fixture(scope="module")
def vllm_says(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("oracle")
    return Answers(make_all(root), root)


@pytest.mark.real_vllm
def test_vllm_accepts_every_emitted_configuration(vllm_says: Answers) -> None:
    assert len(vllm_says.emitted) >= 60
    refused = {n: vllm_says.said[f"emitted: {n}"] for n in vllm_says.emitted}
    assert {n: why for n, why in refused.items() if why is not None} == {}


@pytest.mark.real_vllm
def test_lint_finds_nothing_wrong_in_emitted_configurations(vllm_says: Answers) -> None:
    for name, words in vllm_says.emitted.items():
        target, draft = vllm_says.facts(words)
        result = lint(read_words(["vllm", "serve", *words]), VERSION, target=target, draft=draft)
        rules = {f.rule for f in result.findings if f.severity != ADVICE}
        assert rules <= {"synthetic-on", "schedule-gap"}, name


@pytest.mark.real_vllm
@pytest.mark.parametrize("group", ["refused", "silent"])
def test_lint_reports_every_broken_command(vllm_says: Answers, group: str) -> None:
    for name, words in getattr(vllm_says, group).items():
        target, draft = vllm_says.facts(words)
        result = lint(read_words(["vllm", "serve", *words]), VERSION, target=target, draft=draft)
        assert not result.clean, name


@pytest.mark.real_vllm
def test_vllm_refuses_the_broken_commands(vllm_says: Answers) -> None:
    assert len(REFUSED) >= 30
    accepted = [n for n in REFUSED if vllm_says.said[f"refused: {n}"] is None]
    assert accepted == []


@pytest.mark.real_vllm
def test_vllm_accepts_the_silent_ones(vllm_says: Answers) -> None:
    said = {n: vllm_says.said[f"silent: {n}"] for n in SILENT}
    assert {n: why for n, why in said.items() if why is not None} == {}


@pytest.mark.real_vllm
def test_vllm_accepts_the_corrected_commands(vllm_says: Answers) -> None:
    """All but two: which draft and which method was meant only the user knows."""
    said = {n: vllm_says.said[f"repaired: {n}"] for n in vllm_says.repaired}
    assert {n for n, why in said.items() if why is not None} == {"no model", "method"}


@pytest.mark.real_vllm
def test_vllm_accepts_the_articles_commands_rewritten(vllm_says: Answers) -> None:
    """req: E1, E2"""
    for name in ARTICLE_COMMANDS:
        assert vllm_says.said[f"article: {name}"] is None, vllm_says.said[f"article: {name}"]


@pytest.mark.real_vllm
@pytest.mark.parametrize("name", CACHES)
def test_predicted_kv_tokens_are_vllms_own(vllm_says: Answers, name: str) -> None:
    target, draft, pool, dtype, longest = CACHES[name]
    capacity = kv_capacity(
        [
            CachedModel(from_folder(Path(vllm_says.models[role])).kv_groups, _KV_BITS[dtype])
            for role in (target, draft)
            if role is not None
        ],
        pool_bytes=pool,
        max_model_len=longest,
        block_tokens=128,
        max_batched_tokens=BATCHED,
    )
    assert capacity.tokens == vllm_says.tokens[name]


@pytest.mark.parametrize("drafts", [False, True], ids=["baseline", "with the draft"])
def test_predicted_kv_tokens_are_a_servers_own(
    drafts: bool, request: pytest.FixtureRequest, logs: Path
) -> None:
    """The same for the bundled pair behind a real HTTP server, from its log file."""
    server = request.getfixturevalue("drafting_server" if drafts else "baseline_server")
    assert server.url
    log = (logs / ("draft_model.log" if drafts else "baseline.log")).read_text()
    said = re.search(r"KV cache size: ([\d,]+) tokens", log)
    pool = re.search(r"Explicitly set \(([\d.]+)/", log)
    assert said is not None
    assert pool is not None
    folders = [bundled_target(), *([bundled_draft()] if drafts else [])]
    capacity = kv_capacity(
        [CachedModel(from_folder(Path(folder)).kv_groups, 32) for folder in folders],
        pool_bytes=float(pool[1]) * 2**30,
        max_model_len=1024,
        block_tokens=128,
    )
    assert capacity.tokens == int(said[1].replace(",", ""))
