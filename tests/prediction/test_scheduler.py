"""The simulated engine against a plain step-by-step oracle, and what no step may ever break."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.prediction.stepwise import simulate_stepwise

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
    requests = [
        SimRequest(
            prompt_tokens=draw(st.integers(1, 60) | st.just(3)),
            output_tokens=draw(st.integers(1, 30) | st.integers(20, 30)),
            arrival_s=draw(st.just(0.0) | st.floats(0, 0.1)),
            acceptance=draw(acceptances),
            draft_probability=draw(st.sampled_from([1.0, 0.5])) if method == "ngram" else 1.0,
            cached_prompt_tokens=draw(st.sampled_from([0, 0, 20])),
        )
        for _ in range(draw(st.integers(1, 16)))
    ]
    return requests, limits, draw(st.sampled_from([None, 16, 3]))


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=300, deadline=None)
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
