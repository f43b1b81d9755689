from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Speculation
from specwise.errors import InputError
from specwise.prediction.costs import StepShape
from specwise.prediction.fit import (
    FittedCosts,
    ObservedStep,
    fit_methods,
    fit_steps,
    read_costs,
    read_fit,
    write_fit,
)
from specwise.prediction.forecast import PRIORS, Candidate

TRUE_BASE = FittedCosts(0.020, 0.0005, (0.0, 0.001, 0.0, 0.0), (0.0,) * 4, 1e-7)
TRUE_SPEC = FittedCosts(
    0.020, 0.0005, (0.0, 0.001, 0.0, 0.0), (0.0,) * 4, 1e-7, 0.003, 0.0001, method="draft_model"
)


def observations(noise: float = 0.0, k: int = 4) -> list[ObservedStep]:
    rng = np.random.default_rng(1)
    found = []
    for kind, costs in ((None, TRUE_BASE), (k, TRUE_SPEC)):
        for requests in (1, 2, 4, 8, 16, 32):
            for each in (60, 600):
                tokens = requests * (1 + (kind or 0))
                shape = StepShape(tokens, requests * each, requests, kind or 0)
                seconds = float(costs.step_s(shape) * (1 + noise * rng.normal()))
                found.append(ObservedStep(tokens, requests * each, requests, kind, seconds, 20))
    return found


def test_costs_of_the_same_form_are_found_again() -> None:
    fit = fit_steps(observations(), method="draft_model", about={})
    assert fit.median_error < 1e-6
    for shape in (StepShape(3, 900, 3, 0), StepShape(24, 4000, 12, 0), StepShape(96, 9000, 32, 0)):
        assert fit.baseline.step_s(shape) == pytest.approx(TRUE_BASE.step_s(shape), rel=1e-4)


def test_methods_share_the_target_that_either_of_them_saw() -> None:
    """A method that was seen in small steps only knows large ones from the others."""
    lookup = replace(TRUE_BASE, pass_s=0.001, method="ngram")
    plain = [o for o in observations() if o.k is None and o.requests <= 4]
    drafted = [o for o in observations() if o.k is not None]
    looked_up = []
    for requests in (1, 2, 4):
        shape = StepShape(3 * requests, 100 * requests, requests, 4)
        seconds = float(lookup.step_s(shape))
        looked_up.append(ObservedStep(3 * requests, 100 * requests, requests, 4, seconds, 20))
    fits = fit_methods(plain, {"draft_model": drafted, "ngram": looked_up}, about={})
    assert fits["ngram"].baseline == fits["draft_model"].baseline
    assert len(fits["ngram"].residuals) == len(fits["ngram"].observed) == len(plain) + 3
    shape = StepShape(100, 9000, 32, 4)
    assert fits["ngram"].candidate.step_s(shape) == pytest.approx(lookup.step_s(shape), rel=1e-3)
    assert fits["draft_model"].candidate.step_s(shape) == pytest.approx(
        TRUE_SPEC.step_s(shape), rel=1e-3
    )


@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_draft_length_that_was_not_measured_is_extrapolated(k: int) -> None:
    fit = fit_steps(observations(noise=0.03), method="draft_model", about={})
    for requests in (1, 6, 20):
        shape = StepShape(requests * (1 + k), requests * 300, requests, k)
        assert fit.candidate.step_s(shape) == pytest.approx(TRUE_SPEC.step_s(shape), rel=0.08)


@given(st.integers(1, 300), st.integers(0, 20_000), st.integers(1, 64), st.integers(1, 8))
def test_more_work_never_costs_less(tokens: int, context: int, requests: int, k: int) -> None:
    fit = fit_steps(observations(noise=0.2), method="draft_model", about={})
    here = fit.candidate.step_s(StepShape(tokens, context, requests, k))
    for more in (
        StepShape(tokens + 1, context, requests, k),
        StepShape(tokens, context + 1, requests, k),
        StepShape(tokens, context, requests + 1, k),
        StepShape(tokens, context, requests, k + 1),
    ):
        assert fit.candidate.step_s(more) >= here


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    fit = fit_steps(observations(noise=0.02), method="draft_model", about={"study": "s"})
    write_fit(fit, tmp_path / "costs.json")
    assert read_fit(tmp_path / "costs.json") == fit
    draft = Candidate("d", Speculation("draft_model", 3), PRIORS["draft_model"])
    assert read_costs(tmp_path / "costs.json", [draft])["d"] == fit.candidate
    ngram = Candidate("n", Speculation("ngram", 3), PRIORS["ngram"])
    with pytest.raises(InputError, match="calibrated for draft_model, not ngram"):
        read_costs(tmp_path / "costs.json", [ngram])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a costs file"),
        ("[]", "not a costs file of schema"),
        ('{"schema_version": 9}', "not a costs file of schema"),
        ('{"schema_version": 1, "about": {}}', "not a whole costs file"),
    ],
)
def test_a_file_of_something_else_is_one_clear_error(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_fit(tmp_path / "c.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_fit(tmp_path / "none.json")


def test_a_file_of_fewer_knots_means_the_same(tmp_path: Path) -> None:
    fit = fit_steps(observations(), method="draft_model", about={})
    write_fit(fit, tmp_path / "costs.json")
    held = orjson.loads((tmp_path / "costs.json").read_bytes())
    for costs in (held["baseline"], held["candidate"]):
        costs["above_s"], costs["below_s"] = costs["above_s"][:3], costs["below_s"][:3]
    (tmp_path / "costs.json").write_bytes(orjson.dumps(held))
    read = read_fit(tmp_path / "costs.json").candidate
    assert read.above_s == (*fit.candidate.above_s[:3], 0)
    shape = StepShape(50, 900, 10, 4)
    assert read.step_s(shape) == pytest.approx(fit.candidate.step_s(shape), rel=1e-9)


def test_a_slope_found_apart_tells_cached_tokens_from_requests() -> None:
    """Each request has the same cache: without it the two are one column."""
    alike = [o for o in observations(noise=0.01) if o.context_tokens == 60 * o.requests]
    plain = [o for o in alike if o.k is None]
    drafted = {"draft_model": [o for o in alike if o.k is not None]}
    given = fit_methods(plain, drafted, about={}, context_slope=(1e-7, 1e-9))["draft_model"]
    assert given.baseline.context_token_s == pytest.approx(1e-7, rel=0.02)
    vague = fit_methods(plain, drafted, about={}, context_slope=(1e-5, 1.0))["draft_model"]
    assert vague.residuals == pytest.approx(
        fit_methods(plain, drafted, about={})["draft_model"].residuals, abs=1e-6
    )


def test_too_little_is_refused() -> None:
    with pytest.raises(InputError, match="Too few"):
        fit_steps(observations()[:2], method="draft_model", about={})


def test_a_lookup_costs_its_search_alone() -> None:
    steps = [s for s in observations(k=3) if s.k is None]
    steps += [
        ObservedStep(s.tokens, s.context_tokens, s.requests, 3, s.seconds + 0.002, 20)
        for s in steps
    ]
    fit = fit_steps(steps, method="ngram", about={})
    assert fit.candidate.draft_s(40, 0, 10, 3) == pytest.approx(0.002, rel=0.05)
    assert fit.candidate.draft_s(40, 0, 10, 0) == 0
