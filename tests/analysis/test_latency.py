from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.synthetic import C1, C16, Truth, demo_design, demo_study

from specwise.analysis.latency import ServingSummary, percentiles, summarise
from specwise.domain import Purpose, Slo, StudyData


@pytest.fixture(scope="module")
def study() -> StudyData:
    return demo_study()


@pytest.fixture(scope="module")
def summaries(study: StudyData) -> tuple[ServingSummary, ...]:
    return summarise(study)


def one(
    summaries: tuple[ServingSummary, ...], arm: str, workload: str, segment: str | None = None
) -> ServingSummary:
    (found,) = (
        s
        for s in summaries
        if (s.arm, s.workload, s.segment, s.load, s.purpose)
        == (arm, workload, segment, C16, Purpose.MEASURE)
    )
    return found


def test_percentiles_leave_out_missing_values() -> None:
    found = percentiles(np.array([np.nan, *range(101)], dtype=np.float64))
    assert found is not None
    assert (found.count, found.mean, found.p50, found.p95, found.p99) == (101, 50, 50, 95, 99)
    assert percentiles(np.array([np.nan])) is None


def test_every_cell_is_there_and_a_mix_by_segment_too(
    study: StudyData, summaries: tuple[ServingSummary, ...]
) -> None:
    # 3 arms and the A/A trials; 3 pure workloads, the mix and its 3 segments; 3 loads.
    assert len(summaries) == 3 * 3 * 7 + 3 * 4
    assert {s.purpose for s in summaries} == {Purpose.MEASURE, Purpose.NOISE_FLOOR}


def test_segments_of_a_mix_add_up_to_the_whole(summaries: tuple[ServingSummary, ...]) -> None:
    whole = one(summaries, "draft_model", "mix")
    parts = [one(summaries, "draft_model", "mix", name) for name in ("json", "prose", "copy")]
    assert sum(p.requests for p in parts) == whole.requests
    assert sum(p.output_tokens for p in parts) == whole.output_tokens
    assert sum(p.output_tokens_per_s or 0 for p in parts) == pytest.approx(
        whole.output_tokens_per_s
    )


def test_closed_loop_throughput_is_concurrency_over_time_per_token(
    summaries: tuple[ServingSummary, ...],
) -> None:
    """Little's law for tokens: c requests in flight, each emitting 1 / (time per token)."""
    for arm in ("baseline", "draft_model"):
        found = one(summaries, arm, "json")
        assert found.time_per_output_token_s is not None
        expected = 16 / found.time_per_output_token_s
        assert found.output_tokens_per_s == pytest.approx(expected, rel=0.15)


def test_failures_are_counted_by_outcome_and_against_goodput() -> None:
    truth = Truth(failure_share={"draft_model": 0.25})
    design = demo_design(repeats=1, slo=Slo())
    found = one(summarise(demo_study(design, truth)), "draft_model", "json")
    assert found.failures == {"http_error": found.failed}
    assert 0 < found.failed < found.requests
    assert found.slo_share == pytest.approx(1 - found.failure_share)
    assert found.ttft_s is not None
    assert found.ttft_s.count == found.requests - found.failed


def test_goodput_counts_only_what_meets_the_slo() -> None:
    loose = demo_study(demo_design(repeats=1, slo=Slo()))
    strict = replace(loose, design=replace(loose.design, slo=Slo(ttft_s=0.001)))
    generous, none = (one(summarise(s), "baseline", "json") for s in (loose, strict))
    assert generous.goodput_per_s == pytest.approx(generous.requests_per_s)
    assert none.goodput_per_s == 0
    assert none.slo_share == 0


def test_server_figures_belong_to_whole_workloads(summaries: tuple[ServingSummary, ...]) -> None:
    whole, part = one(summaries, "baseline", "mix"), one(summaries, "baseline", "mix", "json")
    assert whole.prefix_hit_rate == pytest.approx(0.2)
    assert whole.kv_use_max == pytest.approx(0.32)
    assert whole.preemptions == 0
    assert part.prefix_hit_rate is None
    assert part.preemptions is None


def test_what_the_server_does_not_export_stays_none() -> None:
    study = demo_study(demo_design(repeats=1, loads=(C1,), production_load=C1))
    bare = replace(
        study,
        trials=tuple(
            replace(t, parts=tuple(replace(p, counters={}, gauges=()) for p in t.parts))
            for t in study.trials
        ),
    )
    found = summarise(bare)[0]
    assert (found.prefix_hit_rate, found.kv_use_max, found.preemptions) == (None, None, None)


def test_chunk_gaps_are_not_tpot_when_chunks_carry_several_tokens(
    summaries: tuple[ServingSummary, ...],
) -> None:
    found = one(summaries, "draft_model", "json")
    assert found.inter_chunk_gap_s is not None
    assert found.tpot_s is not None
    assert found.inter_chunk_gap_s.mean > 2 * found.tpot_s.mean
