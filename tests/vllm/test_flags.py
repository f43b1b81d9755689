"""Commands for every vLLM version: what each can say, and what it cannot. req: E1, E3, E4"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Speculation
from specwise.errors import CommandError
from specwise.vllm import flags as f
from specwise.vllm.command import Version, names, read_command, to_shell, to_words
from specwise.vllm.findings import ADVICE
from specwise.vllm.lint import lint

VERSIONS = [
    Version.parse(v)
    for v in ("0.6.0", "0.6.6", "0.7.3", "0.8.2", "0.8.5", "0.9.2", "0.10.2", "0.12.0", "0.14.1",
              "0.15.1", "0.18.0", "0.20.2", "0.24.0", "0.28.0", "0.32.0", "0.33.0")
]  # fmt: skip


def command(version: str, speculation: Speculation, **options: object) -> str:
    made = f.serve_command(
        f.ServeOptions("target", Version.parse(version), speculation, **options)  # type: ignore[arg-type]
    )
    return " ".join(to_words(made))


DRAFT = Speculation("draft_model", 5, "draft")


def test_v0_takes_flags() -> None:
    text = command("0.6.3", DRAFT, tensor_parallel=2, draft_tensor_parallel=1, utilization=0.92)
    assert text == (
        "vllm serve target --tensor-parallel-size 2 --gpu-memory-utilization 0.92 "
        "--speculative-model draft --num-speculative-tokens 5 "
        "--speculative-draft-tensor-parallel-size 1"
    )


def test_today_takes_json() -> None:
    text = command("0.33.0", DRAFT, draft_quantization="fp8")
    assert "--speculative-config" in text
    assert '"quantization": "fp8"' in text
    assert "--per-request-spec-decode-metrics summary" in text
    assert "per-request" not in command("0.28.0", DRAFT)


def test_typical_acceptance_by_version() -> None:
    assert "--typical-acceptance-sampler-posterior-threshold 0.09" in command(
        "0.7.3", DRAFT, acceptance="typical"
    )
    assert '"posterior_alpha": 0.3' in command("0.9.2", DRAFT, acceptance="typical")
    with pytest.raises(CommandError, match=r"removed in vLLM 0\.10"):
        command("0.33.0", DRAFT, acceptance="typical")
    assert '"fly"' in command("0.33.0", DRAFT, acceptance="fly")
    with pytest.raises(CommandError, match="no acceptance method"):
        command("0.32.0", DRAFT, acceptance="fly")


def test_schedules_by_version() -> None:
    rows = ((1, 16, 5), (17, 1024, 0))
    speculation = Speculation("draft_model", 5, "draft", rows)
    assert "--speculative-disable-by-batch-size 16" in command("0.6.3", speculation)
    assert '"disable_by_batch_size": 16' in command("0.9.2", speculation)
    with pytest.raises(CommandError, match="ignored"):
        command("0.16.0", speculation)
    assert "[[1, 16, 5], [17, 1024, 0]]" in command("0.24.0", speculation)
    with pytest.raises(CommandError, match="no draft length per batch size"):
        command("0.6.3", Speculation("draft_model", 5, "draft", ((1, 4, 5), (5, 99, 2))))


def test_methods_by_version() -> None:
    with pytest.raises(CommandError, match=r"0\.15 can again"):
        command("0.12.0", DRAFT)
    assert '"method": "deepseek_mtp"' in command("0.9.2", Speculation("mtp", 1))
    assert '"method": "mtp"' in command("0.11.0", Speculation("mtp", 1))
    v0_ngram = command("0.6.0", Speculation("ngram", 4))
    assert "--speculative-model [ngram]" in v0_ngram
    assert "--ngram-prompt-lookup-max 4 --ngram-prompt-lookup-min 2" in v0_ngram
    with pytest.raises(CommandError, match=r"before 0\.6\.4"):
        command("0.6.0", DRAFT, tensor_parallel=2, draft_tensor_parallel=2)
    with pytest.raises(CommandError, match=r"came with vLLM 0\.11\.1"):
        command("0.10.0", Speculation("suffix", 8))
    with pytest.raises(CommandError, match="has no speculative method"):
        command("0.33.0", Speculation("magic", 3))


@pytest.mark.parametrize(
    ("speculation", "options", "words"),
    [
        (Speculation("draft_model", 3), {}, "needs a draft"),
        (Speculation("ngram", 0), {}, "drafts nothing"),
        (DRAFT, {"tensor_parallel": 4, "draft_tensor_parallel": 2}, "1 or the target's"),
        (DRAFT, {"quantization": "bitsandbytes"}, "int8_per_channel_weight_only"),
        (Speculation("ngram", 3, options={"nonsense": 1}), {}, "nonsense"),
        (Speculation("ngram", 3, None, ((2, 4, 1),)), {}, "starts at batch size 2"),
    ],
)
def test_what_cannot_be_written(
    speculation: Speculation, options: dict[str, object], words: str
) -> None:
    with pytest.raises(CommandError) as error:
        command("0.33.0", speculation, **options)
    assert words in str(error.value)
    assert error.value.next_step


@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("method", f.METHODS)
def test_lint_agrees_with_every_command(version: Version, method: str) -> None:
    speculation = Speculation(method, 3, None if method in f.WITHOUT_DRAFT else "some/draft")
    try:
        made = f.serve_command(f.ServeOptions("target", version, speculation))
    except CommandError as error:
        assert f.method_problem(method, version) is not None, error  # noqa: PT017
        return
    result = lint(read_command(to_shell(made)), version)
    assert [x for x in result.findings if x.severity != ADVICE] == []


def test_every_choice_has_a_comment() -> None:
    made = f.serve_command(f.ServeOptions("target", names().newest, DRAFT, 2, 1, 0.9, 4096, 64))
    text = to_shell(made)
    for flag in made.flags:
        assert f"# {flag.name}:" in text
    assert "# --speculative-config:" in text


def test_v0_and_json_say_the_same() -> None:
    config = f.speculative_config(Speculation("draft_model", 5, "d", options={"max_model_len": 9}))
    made = f.ServeOptions("t", Version(0, 6, 6), Speculation("draft_model", 5, "d"))
    back = f.config_from_v0(f.serve_command(made))
    assert back == {k: v for k, v in config.items() if k != "max_model_len"}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "non-empty"),
        ("x", "non-empty"),
        ([[1, 2]], "three whole numbers"),
        ([[1, 2, True]], "three whole numbers"),
        ([[0, 2, 1]], "below 1"),
        ([[3, 2, 1]], "ends before"),
        ([[1, 2, -1]], "negative k"),
        ([[2, 3, 1]], "not at 1"),
        ([[1, 4, 2], [4, 5, 1]], "in two rows"),
        ([[1, 4, 2], [5, 9, 0]], None),
        ([[5, 9, 0], [1, 4, 2]], None),
    ],
)
def test_schedules(rows: object, problem: str | None) -> None:
    found = f.schedule_problems(rows)
    assert bool(found) == (problem is not None)
    if problem is not None:
        assert problem in found[0]


@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9), st.integers(-2, 4)), max_size=4))
def test_a_good_schedule_covers_each_batch_size_once(rows: list[tuple[int, int, int]]) -> None:
    """Against vLLM's own lookup, rebuilt: every size from 1 on has exactly one row or a gap."""
    if f.schedule_problems(rows):
        return
    gaps = f.schedule_gaps(tuple(rows))
    last = max(r[1] for r in rows)
    for size in range(1, last + 1):
        assert sum(a <= size <= b for a, b, _ in [*rows, *gaps]) == 1


@pytest.mark.parametrize(("version", "share"), [("0.19.1", 0.9), ("0.20.0", 0.92)])
def test_default_utilisation(version: str, share: float) -> None:
    assert f.default_utilization(Version.parse(version)) == share
