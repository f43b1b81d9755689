from __future__ import annotations

import pytest

from specwise.facts.published import published, similar_speedups


def test_there_are_76_speedups_at_fixed_batches_and_the_blogs_by_qps() -> None:
    table = published()
    batches = [s for s in table.speedups if s.load == "batch"]
    assert sum(len(s.points) for s in batches) == 76
    assert all(s.workload in table.workloads for s in table.speedups)
    blog = {s.method: dict(s.points) for s in table.speedups if s.load == "qps"}
    assert blog["draft_model"][1] == pytest.approx(2.55 / 1.65)
    assert blog["draft_model"][8] > 1 > blog["draft_model"][10]
    assert blog["ngram"][4] > 1 > blog["ngram"][8]
    assert blog["ngram"][1] == pytest.approx(2.8, abs=0.05)  # "up to 2.8x"
    assert blog["ngram"][8] == pytest.approx(1 / 1.8, abs=0.03)  # "1.8x slower"


def test_published_speedups_fall_with_batch() -> None:
    for series in published().speedups:
        speedups = [speedup for _, speedup in sorted(series.points)]
        assert speedups == sorted(speedups, reverse=True)


def test_lengths_are_what_their_positions_say() -> None:
    """length = 1 + sum of u_i, u_i the running product of the conditional acceptances."""
    for entry in published().acceptance:
        if not entry.conditional:
            continue
        reached, total = 1.0, 1.0
        for conditional in entry.conditional:
            reached *= conditional
            total += reached
        assert total == pytest.approx(entry.length, abs=0.012), entry.workload
        assert len(entry.conditional) == entry.k


def test_the_k_sweeps_step_time_is_linear_in_k() -> None:
    sweep = published().k_sweep
    for k, length, tpot_s in sweep.points:
        assert length * tpot_s == pytest.approx(8.35e-3 + 1.016e-3 * k, rel=0.025)


def test_similar_ones_are_of_the_same_method() -> None:
    assert {s.method for s in similar_speedups("eagle3")} == {"eagle3"}
    assert similar_speedups("no such method") == ()


def test_the_traces_are_the_requests_behind_the_lengths() -> None:
    lengths = {(a.method, a.k, a.workload): a.request_mean_length for a in published().acceptance}
    workloads = published().workloads
    for trace in published().traces:
        weights = [n / sum(trace.requests) for n in trace.requests]

        def mean(values: tuple[float, ...], weights: list[float] = weights) -> float:
            return sum(w * v for w, v in zip(weights, values, strict=True))

        published_length = lengths[trace.method, trace.k, trace.workload]
        assert mean(trace.length) == pytest.approx(published_length, abs=0.005)
        work = workloads[trace.workload]
        assert mean(trace.prompt_tokens) == pytest.approx(work.prompt_tokens, abs=1)
        assert mean(trace.output_tokens) == pytest.approx(work.output_tokens, abs=1)
        assert all(0 <= share <= 1 for share in trace.drafted_share)
        assert all(1 <= length <= trace.k + 1 for length in trace.length)


def test_a_longer_draft_never_shortens_a_published_length() -> None:
    for finding in published().findings:
        if finding.by == "k":
            values = [value for _, value in finding.points]
            assert values == sorted(values)
