"""`specwise verify` on the real engine: the repaired one passes, the unrepaired one does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specwise.cli.main import main
from specwise.vllm.server import Server

QUICK = (
    *("--prompts", "bundled:prose", "--prompt-count", "16", "--greedy-tokens", "24"),
    *("--sampling-prompts", "6", "--samples", "60", "--sample-tokens", "5", "--effect", "0.25"),
    *("--concurrency", "128", "--json"),
)


def verified(
    baseline: Server, candidate: Server, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any]]:
    """The exit code and the result."""
    urls = ("--baseline", baseline.url, "--candidate", candidate.url)
    with pytest.raises(SystemExit) as caught:
        main(["verify", *urls, *QUICK, *more])
    assert isinstance(caught.value.code, int)
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["results"][0]
    return caught.value.code, result


def test_the_repaired_engine_passes(
    baseline_server: Server, drafting_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = verified(baseline_server, drafting_server, capsys)
    assert (code, result["verdict"]) == (0, "unchanged"), result["reasons"]
    assert result["greedy"]["equal"] == 16  # float32: to the token
    assert result["greedy"]["self_differing"] == 0
    assert result["greedy"]["logprob_noise"] < 0.001
    assert result["sampling"]["power"] >= 0.9
    assert result["accepted_tokens"] > 100


def test_the_unrepaired_engine_fails_in_sampling(
    baseline_server: Server, unrepaired_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = verified(baseline_server, unrepaired_server, capsys)
    assert (code, result["verdict"]) == (1, "changed"), result["reasons"]
    assert result["greedy"]["equal"] == 16
    tests = {test["name"]: test for test in result["sampling"]["tests"]}
    assert tests["tokens"]["p_adjusted"] <= 0.01
    for later in result["sampling"]["positions"][2:]:
        assert later["distance"] > later["null_high"]


def test_a_baseline_that_speculates_is_refused(
    drafting_server: Server, unrepaired_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ("--baseline", drafting_server.url, "--candidate", unrepaired_server.url)
    with pytest.raises(SystemExit) as caught:
        main(["verify", *urls, *QUICK])
    assert caught.value.code == 2
    assert "is the baseline, but the server" in capsys.readouterr().err
