from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specwise.analysis.latency import summarise
from specwise.decision.assessment import assess
from specwise.domain import LoadPoint, Loop, Slo, Speculation, StudyData
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.prediction.forecast import (
    PRIORS,
    Candidate,
    Prior,
    Scenario,
    by_batch,
    forecast_study,
    sensitivity,
)
from specwise.prediction.speedup import Point, break_even_alpha, step_speedup


def candidate(method: str, acceptance: Prior | None = None, draft: str | None = None) -> Candidate:
    return Candidate(
        name=method,
        speculation=Speculation(method, 3, draft=draft),
        acceptance=acceptance or PRIORS[method],
        draft=load_checkpoint(draft) if draft else None,
    )


def closed(*values: float) -> tuple[LoadPoint, ...]:
    return tuple(LoadPoint(Loop.CLOSED, value) for value in values)


def scenario(
    *candidates: Candidate, loads: tuple[LoadPoint, ...] = closed(1, 8), gpus: int = 4
) -> Scenario:
    return Scenario(
        target=load_checkpoint("llama-3.1-70b"),
        gpu=find_gpu("h100"),
        gpus=gpus,
        prompt_tokens=200,
        output_tokens=60,
        loads=loads,
        production=loads[-1],
        candidates=candidates or (candidate("ngram"),),
        slo=Slo(tpot_s=0.05),
    )


def speedups(study: StudyData) -> dict[tuple[str, str], float]:
    found = assess(study).effects
    return {(e.arm, e.load.label): e.ratio for e in found if e.metric == "speedup"}


def test_by_batch_is_the_closed_forms_at_each_batch() -> None:
    asked = scenario(candidate("eagle3"), candidate("ngram"))
    rows = by_batch(asked, (1, 64))
    assert [(r.candidate, r.batch) for r in rows] == [
        ("eagle3", 1), ("eagle3", 64), ("ngram", 1), ("ngram", 64)
    ]  # fmt: skip
    baseline = asked.baseline_costs()
    for row in rows:
        chosen = next(c for c in asked.candidates if c.name == row.candidate)
        costs = asked.candidate_costs(chosen)
        at = Point(row.batch, asked.mean_context, chosen.acceptance.drafted_share)
        held = chosen.acceptance.positions(3)
        assert row.speedup == pytest.approx(step_speedup(costs, baseline, at=at, conditional=held))
        assert row.break_even == break_even_alpha(costs, baseline, at=at, k=3)
        assert row.best_speedup >= max(row.speedup, 1.0)


def test_break_even_rises_and_the_best_k_does_not_as_the_batch_grows() -> None:
    rows = by_batch(scenario(candidate("eagle3")), (1, 8, 64, 256))
    needed = [1.0 if row.break_even is None else row.break_even for row in rows]
    assert needed == sorted(needed)
    assert [row.best_k for row in rows] == sorted((row.best_k for row in rows), reverse=True)


def test_sensitivity_puts_the_largest_move_first_and_says_what_decides() -> None:
    asked = scenario(candidate("draft_model", draft="llama-3.1-8b"))
    found = sensitivity(asked, 96)
    assert [u.swing for u in found] == sorted((u.swing for u in found), reverse=True)
    assert {"acceptance", "running requests", "context", "launch time of a draft pass"} <= {
        u.name for u in found
    }
    acceptance = next(u for u in found if u.name == "acceptance")
    assert acceptance.speedup_low < acceptance.speedup_high
    for unknown in found:
        ends = sorted((unknown.speedup_low, unknown.speedup_high))
        assert unknown.decides == (ends[0] < 1 < ends[1])


def test_a_forecast_is_marked_and_the_same_for_a_seed() -> None:
    first, again = (forecast_study(scenario(), seed=5) for _ in range(2))
    other = forecast_study(scenario(), seed=6)
    assert first.predicted
    assert first == again
    assert [t.records for t in first.trials] != [t.records for t in other.trials]
    assert any("prediction" in words for words in assess(first).warnings)


def test_a_slow_useless_draft_loses_and_a_small_good_one_wins() -> None:
    useless = candidate("draft_model", Prior((0.1,), 1.0, "test"), "llama-3.1-8b")
    good = candidate("eagle3", Prior((0.9,), 1.0, "test"))
    found = speedups(forecast_study(scenario(useless, good, loads=closed(1, 32))))
    assert all(found["draft_model", load] < 0.95 for load in ("c1", "c32"))
    assert all(found["eagle3", load] > 1.3 for load in ("c1", "c32"))


def test_the_simulation_agrees_with_the_closed_form_at_batch_1() -> None:
    asked = scenario(candidate("eagle3"), loads=closed(1))
    row = by_batch(asked, (1,))[0]
    assert speedups(forecast_study(asked))["eagle3", "c1"] == pytest.approx(row.speedup, rel=0.06)


def test_a_model_that_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="leaves no KV cache") as caught:
        forecast_study(scenario(gpus=1))
    assert "specwise memory" in str(caught.value)


def test_in_an_open_loop_requests_come_at_the_rate_asked_for() -> None:
    loads = tuple(LoadPoint(Loop.OPEN, rate, "poisson") for rate in (0.5, 4.0))
    study = forecast_study(scenario(loads=loads), repeats=4)
    for load in loads:
        trials = [t for t in study.trials if t.trial.load == load and t.trial.arm == "baseline"]
        sent = [t.records[-1].sent_s / len(t.records) for t in trials]
        assert 1 / float(np.mean(sent)) == pytest.approx(load.value, rel=0.2)
    arrivals = {arm: [r.sent_s for t in study.trials if t.trial.arm == arm for r in t.records]
                for arm in ("baseline", "ngram")}  # fmt: skip
    assert arrivals["baseline"] == arrivals["ngram"]


def test_in_a_closed_loop_no_more_run_than_were_asked_for() -> None:
    study = forecast_study(scenario(loads=closed(1, 8)))
    for trial in study.trials:
        running = [g.running or 0.0 for part in trial.parts for g in part.gauges]
        assert 0 < max(running) <= trial.trial.load.value
    rates = [s.output_tokens_per_s for s in summarise(study) if s.arm == "baseline"]
    assert rates[1] is not None
    assert rates[0] is not None
    assert rates[1] > 4 * rates[0]


def test_the_ngram_prior_accepts_its_first_draft_as_often_as_it_says() -> None:
    """u_1 over all steps is the drafted share times acceptance given a draft."""
    prior = PRIORS["ngram"]
    asked = replace(scenario(loads=closed(1)), output_tokens=400)
    records = [
        r
        for t in forecast_study(asked, repeats=4).trials
        if t.trial.arm == "ngram"
        for r in t.records
    ]
    steps = sum(len(r.chunk_s) - 1 for r in records)
    histograms = [r.acceptance.steps_by_accepted for r in records if r.acceptance]
    drafted, first = (sum(sum(h[i:]) for h in histograms) for i in (0, 1))
    given_drafted = prior.at(1) / prior.drafted_share
    assert drafted / steps == pytest.approx(prior.drafted_share, abs=0.02)
    assert first / drafted == pytest.approx(given_drafted, abs=0.02)
    assert first / steps == pytest.approx(prior.drafted_share * given_drafted, abs=0.02)
