from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.synthetic import C4, HEALTHY_CLIENT

from specwise.analysis.cells import (
    cells,
    final_records,
    loaded_window,
    segments_of,
    table_of,
    token_arrivals,
    tpot_s,
)
from specwise.domain import (
    LoadPoint,
    Loop,
    MeasuredTrial,
    Outcome,
    Purpose,
    RequestRecord,
    Slo,
    Trial,
    TrialPart,
)


def record(**changes: object) -> RequestRecord:
    """Sent at 1.001, first token at 1.1, nine more tokens in steps of 20 ms, usage chunk after."""
    base = RequestRecord(
        index=0,
        prompt_id="p0",
        segment="json",
        temperature=0.0,
        part=0,
        intended_s=1.0,
        sent_s=1.001,
        chunk_s=(1.1, 1.12, 1.14, 1.16, 1.2),
        chunk_tokens=(1, 3, 3, 3, 0),
        finished_s=1.25,
        outcome=Outcome.OK,
        output_tokens=10,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def trial(*records: RequestRecord, load: LoadPoint = C4) -> MeasuredTrial:
    planned = Trial("0001-a-json-c4-r0", "a", "json", load, 0, Purpose.MEASURE, len(records))
    part = TrialPart("2026-11-22T20:00:00Z", 10.0, HEALTHY_CLIENT)
    return MeasuredTrial(planned, records, (part,), complete=True)


def test_tpot_ends_at_the_last_chunk_that_carried_tokens() -> None:
    assert tpot_s(record()) == pytest.approx(0.06 / 9)


def test_tpot_without_token_counts_ends_with_the_stream() -> None:
    assert tpot_s(record(chunk_tokens=None)) == pytest.approx((1.25 - 1.1) / 9)


@pytest.mark.parametrize("tokens", [0, 1, None])
def test_tpot_needs_two_tokens(tokens: int | None) -> None:
    assert tpot_s(record(output_tokens=tokens)) is None


def test_ttft_and_e2e_count_from_intended_and_from_sent() -> None:
    table = table_of(trial(record(sent_s=1.05)), Slo())
    assert table.ttft_s[0] == pytest.approx(0.1)
    assert table.ttft_from_sent_s[0] == pytest.approx(0.05)
    assert table.e2e_s[0] == pytest.approx(0.25)
    assert table.e2e_from_sent_s[0] == pytest.approx(0.2)


def test_failed_requests_stay_as_rows_without_latencies() -> None:
    failed = record(index=1, outcome=Outcome.TIMEOUT)
    table = table_of(trial(record(), failed), Slo())
    assert table.ok.tolist() == [True, False]
    assert np.isnan(table.ttft_s[1])
    assert np.isnan(table.output_tokens[1])
    assert table.meets_slo.tolist() == [True, False]


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(ttft_s=0.11), True),
        (Slo(ttft_s=0.09), False),
        (Slo(tpot_s=0.007), True),
        (Slo(tpot_s=0.006), False),
        (Slo(e2e_s=0.24), False),
    ],
)
def test_each_limit_of_the_slo_counts(slo: Slo, met: bool) -> None:
    assert table_of(trial(record()), slo).meets_slo.tolist() == [met]


def test_a_request_too_short_for_tpot_cannot_miss_its_limit() -> None:
    short = record(chunk_s=(1.1,), chunk_tokens=(1,), output_tokens=1)
    assert table_of(trial(short), Slo(tpot_s=0.001)).meets_slo.tolist() == [True]


def test_closed_loop_window_ends_when_the_first_client_runs_out_of_work() -> None:
    records = [
        record(index=i, intended_s=start, sent_s=start, finished_s=end)
        for i, (start, end) in enumerate([(0, 2), (0, 3), (2, 5), (3, 4)])
    ]
    # Both clients work until the last request is sent at 3; the first to end after that is at 3.
    assert loaded_window(records, C4) == (0, 3)
    assert loaded_window(records[:2], C4) == (0, 2)


def test_open_loop_window_is_the_span_of_the_arrivals() -> None:
    records = [record(index=i, intended_s=float(i), finished_s=i + 9.0) for i in range(4)]
    assert loaded_window(records, LoadPoint(Loop.OPEN, 1.0)) == (0.0, 3.0)


def test_window_tokens_are_those_that_arrived_inside() -> None:
    early = record(index=0, intended_s=1.0, finished_s=1.25)
    late = record(
        index=1, intended_s=1.0, sent_s=1.0, chunk_s=(1.2, 1.3), chunk_tokens=(4, 6), finished_s=1.4
    )
    table = table_of(trial(early, late), Slo())
    assert table.window_s == pytest.approx(0.25)
    assert table.window_tokens.tolist() == [10, 4]


def test_tokens_spread_over_chunks_that_do_not_say() -> None:
    times, tokens = token_arrivals(record(chunk_tokens=None))
    assert len(times) == 5
    assert tokens.sum() == pytest.approx(10)


def test_a_resumed_request_counts_once_by_its_last_record_that_was_not_cancelled() -> None:
    cancelled = record(outcome=Outcome.CANCELLED)
    done = record(part=1, finished_s=1.5)
    assert final_records((cancelled, done)) == (done,)
    assert final_records((done, cancelled)) == (done,)
    assert final_records((cancelled,)) == (cancelled,)


def test_interrupted_trials_are_left_out() -> None:
    from tests.analysis.synthetic import demo_design, demo_study, without

    study = demo_study(demo_design(repeats=1))
    name = study.trials[0].trial.trial_id
    assert len(cells(without(study, trials={name}))) == len(cells(study)) - 1


def test_a_mix_is_seen_as_a_whole_and_by_segment() -> None:
    from tests.analysis.synthetic import demo_design, demo_study

    study = demo_study(demo_design(repeats=1))
    assert segments_of(study, "json") == (None,)
    assert segments_of(study, "mix") == (None, "json", "prose", "copy")
