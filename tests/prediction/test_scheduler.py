"""The simulated engine against a plain step-by-step oracle, and what no step may ever break."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prediction.stepwise import simulate_stepwise

from specwise.errors import InputError
from specwise.prediction.costs import StepShape
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, SimRun, simulate
from specwise.prediction.truth import LinearCosts

COSTS = LinearCosts(
    target_pass_s=5.9e-3, token_s=2.1e-5, context_token_s=3.9e-8, draft_pass_s=1e-3, speculates=True
)


def config(**changes: object) -> SchedulerConfig:
    return replace(SchedulerConfig(), **changes)  # type: ignore[arg-type]


def run(
    requests: list[SimRequest],
    limits: SchedulerConfig | None = None,
    concurrency: int | None = None,
    seed: int = 0,
    **more: bool,
) -> SimRun:
    rng = np.random.default_rng(seed)
    return simulate(requests, COSTS, limits or config(), rng=rng, concurrency=concurrency, **more)


def speculating(k: int, method: str = "eagle3", **changes: object) -> SchedulerConfig:
    return config(method=method, k=k, **changes)


def poisson(count: int, rate_per_s: float, **fields: object) -> list[SimRequest]:
    times = np.cumsum(np.random.default_rng(5).exponential(1 / rate_per_s, count))
    base = SimRequest(**({"prompt_tokens": 300, "output_tokens": 60} | fields))  # type: ignore[arg-type]
    return [replace(base, arrival_s=float(t)) for t in times]


# Situations of every kind: crowded, tiny pools and budgets, schedules, misses, cached prompts.

acceptances = st.lists(st.floats(0.0, 1.0), min_size=0, max_size=4).map(tuple)
schedules = st.sampled_from(
    [(), ((1, 2, 4), (3, 64, 0)), ((1, 1, 3), (4, 6, 1)), ((1, 3, 0), (5, 5, 2))]
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[SimRequest], SchedulerConfig, int | None]:
    method = draw(st.sampled_from([None, "draft_model", "eagle3", "ngram"]))
    k = draw(st.integers(1, 4)) if method else 0
    limits = config(
        method=method,
        k=k,
        schedule=draw(schedules) if method else (),
        max_num_batched_tokens=draw(st.sampled_from([9, 16, 40, 8192])),
        max_num_seqs=draw(st.sampled_from([64, 8, 2])),
        block_size=draw(st.sampled_from([1, 4, 16])),
        kv_tokens=draw(st.sampled_from([None, 128, 200])),
        async_scheduling=draw(st.booleans()),
    )
    concurrency = draw(st.sampled_from([None, 16, 3]))
    # In a closed loop a request comes when a client is free, whatever its own time says.
    arrivals = st.just(0.0) | st.floats(0, 0.1) if concurrency is None else st.just(0.0)
    requests = [
        SimRequest(
            prompt_tokens=draw(st.integers(1, 60) | st.just(3)),
            output_tokens=draw(st.integers(1, 30) | st.integers(20, 30)),
            arrival_s=draw(arrivals),
            acceptance=draw(acceptances),
            draft_probability=draw(st.sampled_from([1.0, 0.5])) if method == "ngram" else 1.0,
            cached_prompt_tokens=draw(st.sampled_from([0, 0, 20])),
        )
        for _ in range(draw(st.integers(1, 16)))
    ]
    return requests, limits, concurrency


@settings(deadline=None)
@given(situations())
def test_equal_to_the_step_by_step_oracle(
    situation: tuple[list[SimRequest], SchedulerConfig, int | None],
) -> None:
    requests, limits, concurrency = situation
    oracle = simulate_stepwise(
        requests, COSTS, limits, rng=np.random.default_rng(0), concurrency=concurrency
    )
    for leaps in (True, False):
        found = run(requests, limits, concurrency, leaps=leaps)
        assert found.preemptions == oracle.preemptions
        np.testing.assert_allclose(found.ends_s, oracle.ends_s, rtol=0, atol=1e-9)
        for index, expected in enumerate(oracle.requests):
            times, tokens = found.chunks(index)
            assert tokens.tolist() == expected.chunk_tokens
            np.testing.assert_allclose(times, expected.chunk_s, rtol=0, atol=1e-9)
            counts = np.bincount(np.array(expected.accepted, int), minlength=limits.k + 1)
            assert found.served[index].steps_by_accepted(limits.k) == tuple(counts)


@settings(deadline=None)
@given(situations())
def test_nothing_is_lost_and_no_limit_is_passed(
    situation: tuple[list[SimRequest], SchedulerConfig, int | None],
) -> None:
    requests, limits, concurrency = situation
    found = run(requests, limits, concurrency, trace=True)
    steps = found.trace
    assert steps is not None
    assert (steps.tokens <= limits.max_num_batched_tokens).all()
    assert (steps.tokens > 0).all()
    assert (steps.running <= limits.max_num_seqs).all()
    assert (steps.requests <= steps.running).all()
    assert (steps.blocks <= limits.blocks).all()
    assert (steps.blocks >= 0).all()
    assert (np.diff(steps.end_s) > 0).all()
    # Every step has the drafts its number of requests asks for.
    assert steps.k.tolist() == [limits.k_by_batch()[n] for n in steps.requests]
    # Every token of every prompt is computed once, and again after each preemption.
    cached = sum(live.cached for live in found.served)
    prompts = sum(request.prompt_tokens for request in requests)
    if found.preemptions == 0:
        assert steps.prefill_tokens.sum() == prompts - cached
    else:
        assert steps.prefill_tokens.sum() > prompts - cached
    # Every token that decodes put through is an output token, or a draft that was rejected, or an
    # accepted one that max_tokens cut off.
    drafted = accepted = decode_steps = 0
    for index, (request, live) in enumerate(zip(requests, found.served, strict=True)):
        times, tokens = found.chunks(index)
        assert tokens.sum() == request.output_tokens == live.done
        assert (tokens > 0).all()
        assert (np.diff(times) > 0).all()
        assert times[-1] == live.finished_s
        assert times[0] > live.arrival_s
        assert live.plan is None
        drafted += live.drafted
        accepted += sum(i * n for i, n in enumerate(live.steps_by_accepted(limits.k)))
        decode_steps += len(tokens) - 1 - live.preemptions
    assert steps.tokens.sum() - steps.prefill_tokens.sum() >= decode_steps
    if found.preemptions == 0:
        assert steps.tokens.sum() - steps.prefill_tokens.sum() == decode_steps + drafted
        assert (steps.sampled.sum()) == decode_steps + len(requests)
    assert accepted <= drafted
    emitted_beyond_one = sum(
        int(found.chunks(i)[1].sum()) - len(found.chunks(i)[1]) for i in range(len(requests))
    )
    assert accepted >= emitted_beyond_one


# What the rules mean, one by one.


def test_a_lone_request_takes_a_prompt_step_and_one_step_a_token() -> None:
    found = run([SimRequest(100, 11, arrival_s=3.0)])
    (live,) = found.served
    prompt_s = COSTS.step_s(StepShape(100, 100, 1, 0))
    assert found.first_token_s[0] == pytest.approx(3.0 + prompt_s)
    decode_s = [COSTS.step_s(StepShape(1, 101 + i, 1, 0)) for i in range(10)]
    assert live.finished_s == pytest.approx(3.0 + prompt_s + sum(decode_s))
    assert found.tpot_s[0] == pytest.approx(np.mean(decode_s))


def test_speculation_emits_up_to_k_plus_one_and_counts_before_the_cut() -> None:
    perfect = SimRequest(10, 12, arrival_s=0.0, acceptance=(1.0, 1.0, 1.0))
    found = run([perfect], speculating(3))
    assert found.chunks(0)[1].tolist() == [1, 4, 4, 3]
    assert found.served[0].steps_by_accepted(3) == (0, 0, 0, 3)
    assert found.served[0].drafted == 9
    hopeless = replace(perfect, acceptance=(0.0, 1.0, 1.0))
    found = run([hopeless], speculating(3))
    assert found.chunks(0)[1].tolist() == [1] * 12
    assert found.served[0].steps_by_accepted(3) == (11, 0, 0, 0)


def test_acceptance_drawn_is_the_acceptance_given() -> None:
    request = SimRequest(10, 20_000, arrival_s=0.0, acceptance=(0.8, 0.5, 0.9))
    counts = np.array(run([request], speculating(3)).served[0].steps_by_accepted(3))
    at_least = counts[::-1].cumsum()[::-1]
    assert at_least[1:] / at_least[:-1] == pytest.approx([0.8, 0.5, 0.9], abs=0.02)


def test_a_lookup_that_finds_nothing_drafts_nothing() -> None:
    request = SimRequest(10, 5000, arrival_s=0.0, acceptance=(1.0,), draft_probability=0.25)
    found = run([request], speculating(1, "ngram"), trace=True)
    live = found.served[0]
    steps = len(found.chunks(0)[1]) - 1
    assert live.drafted == sum(live.steps_by_accepted(1)) == pytest.approx(steps / 4, rel=0.1)
    assert found.trace is not None
    assert found.trace.tokens.sum() == 10 + steps + live.drafted


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ((), [4] * 9),
        (((1, 2, 3), (5, 6, 2)), [3, 3, 3, 3, 2, 2, 2, 2]),  # gaps and the tail carry forward
        (((1, 1, 9), (2, 3, 0)), [4, 0, 0, 0, 0, 0, 0, 0]),  # never more than k
        (((5, 8, 1), (1, 2, 3)), [3, 3, 3, 3, 1, 1, 1, 1]),  # order does not matter
    ],
)
def test_a_schedule_carries_forward_and_is_limited_by_k(
    schedule: tuple[tuple[int, int, int], ...], expected: list[int]
) -> None:
    limits = speculating(4, schedule=schedule, max_num_seqs=8)
    assert list(limits.k_by_batch())[1 if schedule else 0 :] == expected


def test_k_follows_the_batch_of_the_step_that_drafts() -> None:
    two = [SimRequest(4, 9, arrival_s=0.0), SimRequest(4, 3, arrival_s=0.0)]
    two = [replace(r, acceptance=(0.0, 0.0)) for r in two]
    found = run(two, speculating(2, schedule=((1, 1, 2), (2, 8, 0))), trace=True)
    assert found.trace is not None
    # Two requests for three steps without drafts, then one alone: it drafts in the step in which it
    # is alone, and verifies in the next.
    assert found.trace.k.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2]
    assert found.trace.tokens.tolist() == [8, 2, 2, 1, 3, 3, 3, 3, 3]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    requests = [SimRequest(4, 30, arrival_s=0.0), SimRequest(100, 2, arrival_s=0.001)]
    found = run(requests, config(max_num_batched_tokens=40), trace=True)
    assert found.trace is not None
    assert found.trace.prefill_tokens[:5].tolist() == [4, 39, 39, 22, 0]
    assert found.trace.tokens[:5].tolist() == [4, 40, 40, 23, 2]


def test_a_draft_model_takes_one_more_slot_a_request() -> None:
    many = [SimRequest(1, 2, arrival_s=0.0, acceptance=(0.0,)) for _ in range(20)]
    for method, admitted in (("eagle3", 12), ("draft_model", 6)):
        found = run(many, speculating(1, method, max_num_batched_tokens=12), trace=True)
        assert found.trace is not None
        assert found.trace.requests[0] == admitted


def test_admission_waits_for_room_for_the_whole_prompt() -> None:
    requests = [SimRequest(60, 5, arrival_s=0.0), SimRequest(60, 5, arrival_s=0.0)]
    limits = config(kv_tokens=112, block_size=16, max_num_batched_tokens=64)  # 6 usable blocks
    found = run(requests, limits, trace=True)
    assert found.trace is not None
    assert found.trace.running.max() == 1
    assert found.first_token_s[1] > found.finished_s[0]


def test_the_last_admitted_is_preempted_and_recomputed() -> None:
    requests = [SimRequest(16, 40, arrival_s=0.0), SimRequest(16, 40, arrival_s=0.0)]
    found = run(requests, config(kv_tokens=96, block_size=16), trace=True)  # 5 usable blocks
    first, last = found.served
    assert (first.preemptions, last.preemptions) == (0, 1)
    assert found.trace is not None
    # At 33 tokens each needs a third block: the last one loses its two, and computes prompt and
    # output so far again.
    assert found.trace.prefill_tokens.tolist().count(33) == 1
    assert found.chunks(1)[1].sum() == 40
    assert last.finished_s > first.finished_s


def test_asynchronous_scheduling_sees_an_arrival_one_step_later() -> None:
    busy = SimRequest(4, 50, arrival_s=0.0)
    late = SimRequest(4, 5, arrival_s=0.05)
    waits = []
    for async_scheduling in (False, True):
        found = run([busy, late], config(async_scheduling=async_scheduling))
        step = int(found.ends_s.searchsorted(found.served[1].admitted_s - 1e-9))
        waits.append(step)
    assert waits[1] == waits[0] + 1


def test_an_idle_engine_starts_with_the_first_of_those_sent_together() -> None:
    """And who is sent when another ends misses the step that begins then."""
    requests = [SimRequest(100, 5), SimRequest(100, 20), *[SimRequest(100, 5)] * 3]
    found = simulate(
        requests,
        COSTS,
        config(),
        rng=np.random.default_rng(0),
        concurrency=4,
        spacing_s=0.0005,
        trace=True,
    )
    assert found.trace is not None
    assert found.arrival_s[:4] == pytest.approx([0, 0.0005, 0.001, 0.0015])
    assert found.trace.prefill_tokens[:2].tolist() == [100, 300]
    assert found.arrival_s[4] == pytest.approx(found.finished_s[0] + 0.0005)
    step = int(found.ends_s.searchsorted(found.finished_s[0]))
    assert found.trace.prefill_tokens[step + 1 : step + 3].tolist() == [0, 100]
    together = simulate(requests, COSTS, config(), rng=np.random.default_rng(0), concurrency=4)
    assert len(set(together.first_token_s[:4])) == 1


def test_a_cached_prompt_costs_its_last_block() -> None:
    requests = [SimRequest(100, 2, arrival_s=0.0, cached_prompt_tokens=100)]
    found = run(requests, trace=True)
    assert found.served[0].cached == 96
    assert found.trace is not None
    assert found.trace.prefill_tokens[0] == 4
    assert found.trace.context_tokens[0] == 100


def test_the_context_limit_ends_an_answer() -> None:
    found = run([SimRequest(90, 50, arrival_s=0.0)], config(max_model_len=100))
    assert found.output_tokens.tolist() == [10]
    with pytest.raises(InputError, match="does not fit max_model_len"):
        run([SimRequest(100, 1, arrival_s=0.0)], config(max_model_len=100))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_num_batched_tokens": 1, "method": "draft_model", "k": 1}, "no room"),
        ({"kv_tokens": 16}, "no usable block"),
        ({"method": "ngram"}, "k = 0"),
        ({"method": "ngram", "k": 2, "schedule": ((2, 4, 1),)}, "batch size 1"),
    ],
)
def test_impossible_limits_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        config(**changes)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InputError, match="does not fit a KV pool"):
        run([SimRequest(500, 10, arrival_s=0.0)], config(kv_tokens=400))
    with pytest.raises(InputError, match="arrival time of every request"):
        run([SimRequest(5, 10)])
    with pytest.raises(InputError, match="no requests"):
        run([])
    with pytest.raises(InputError, match="0 clients"):
        run([SimRequest(5, 10)], concurrency=0)


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    requests = poisson(50, 20, acceptance=(0.5, 0.5))
    runs = [run(requests, speculating(2), seed=seed).finished_s for seed in (1, 1, 2)]
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()


# What must come out of it (theory.md's invariants, with costs of an 8B model on one GPU).


def throughput(k: int, concurrency: int, prompt: int, conditional: float = 0.8) -> float:
    limits = speculating(k) if k else config()
    costs = replace(COSTS, speculates=k > 0)
    request = SimRequest(prompt, 60, acceptance=(conditional,) * k)
    rng = np.random.default_rng(0)
    found = simulate([request] * (4 * concurrency), costs, limits, rng=rng, concurrency=concurrency)
    # The time of a decode token, free of the ramps at either end of a closed loop.
    return float(1 / np.mean(found.tpot_s))


def test_speedup_does_not_rise_with_the_batch_for_short_contexts() -> None:
    speedups = [throughput(4, c, 20) / throughput(0, c, 20) for c in (1, 8, 32, 128)]
    assert all(later < earlier for earlier, later in pairwise(speedups))
    assert speedups[0] > 1.5


def test_speedup_comes_back_where_the_cache_dominates() -> None:
    short, long = (throughput(4, 64, p) / throughput(0, 64, p) for p in (20, 20_000))
    assert long > short


def test_the_best_k_does_not_rise_with_load() -> None:
    best = [
        max(range(1, 7), key=lambda k, c=concurrency: throughput(k, c, 20, 0.7))
        for concurrency in (1, 16, 128)
    ]
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1]


def test_an_overloaded_server_queues_without_end_and_speculation_moves_that_point() -> None:
    requests = poisson(300, 40, output_tokens=200, acceptance=(0.9,) * 4)
    limits = {"max_num_seqs": 16}
    plain = run(requests, config(**limits))
    drafting = run(requests, speculating(4, **limits))
    assert plain.ttft_s[-50:].mean() > 10 * plain.ttft_s[:20].mean()
    assert drafting.ttft_s[-50:].mean() < plain.ttft_s[-50:].mean() / 2
