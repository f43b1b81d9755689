from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.analysis.experiment_studies import Request, Truth, experiment_design, experiment_study

from specwise.analysis.acceptance import summarise_acceptance
from specwise.analysis.cells import cells
from specwise.analysis.comparison import Effect, compare
from specwise.analysis.mixture import DIAGNOSED, Diagnosis, Mixture, cause_of, contrast, diagnose
from specwise.domain import LoadPoint, Loop, StudyData, Trial

DESIGN = experiment_design("mixed", "concurrency = [16]\nrequests = 80\nrepeats = 3")


def diagnosed(study: StudyData) -> Mixture:
    measured = cells(study)
    comparison = compare(study, measured)
    return diagnose(
        study, comparison.effects, summarise_acceptance(study, measured), comparison.signatures
    )


def slowing(*, json: tuple[float, float], prose: tuple[float, float], tail: float = 1.0) -> Truth:
    """TPOT of the draft arm over the baseline's: (in the mix, alone) for each segment.

    One request in 5 of prose in the mix waits ``tail`` times longer: what only a P99 sees.
    """

    def truth(
        trial: Trial, segment: str, _: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        in_mix, alone = {"json": json, "prose": prose}[segment]
        factor = 1.0
        if trial.arm != "baseline":
            factor = in_mix if trial.workload == "mix" else alone
            if trial.workload == "mix" and segment == "prose" and rng.random() < 0.2:
                factor *= tail
        noise = math.exp(0.02 * difficulty + rng.normal(0, 0.01))
        return Request(
            0.02 * factor * noise, ttft_s=0.001, accept=0.9 if segment == "json" else 0.3
        )

    return truth


def of(mixture: Mixture, segment: str, metric: str = "tpot_p99") -> Diagnosis:
    (found,) = [d for d in mixture.diagnoses if (d.segment, d.metric) == (segment, metric)]
    return found


@pytest.mark.parametrize(
    ("prose", "cause"),
    [
        ((1.4, 1.0), "the mix"),
        ((1.4, 1.4), "speculation itself"),
        ((1.6, 1.25), "both"),
        ((0.8, 0.8), "no harm"),
        ((0.8, 1.4), "no harm"),
    ],
)
@pytest.mark.parametrize("metric", DIAGNOSED)
def test_every_cause_is_told_from_the_others(
    prose: tuple[float, float], cause: str, metric: str
) -> None:
    study = experiment_study(DESIGN, slowing(json=(0.7, 0.7), prose=prose))
    found = of(diagnosed(study), "prose", metric)
    assert found.cause == cause
    assert found.contrast is not None
    assert found.contrast.low < prose[1] / prose[0] < found.contrast.high
    assert of(diagnosed(study), "json", metric).cause == "no harm"


def test_a_noisy_study_and_a_missing_control_cannot_tell_yet() -> None:
    noisy = experiment_study(DESIGN, slowing(json=(0.7, 0.7), prose=(1.12, 1.0)), trial_sd=0.12)
    found = of(diagnosed(noisy), "prose")
    assert found.cause == "cannot tell yet"
    assert "more repeats" in found.reason
    study = experiment_study(DESIGN, slowing(json=(0.7, 0.7), prose=(1.4, 1.4)))
    alone = replace(study, trials=tuple(t for t in study.trials if t.trial.workload != "prose"))
    without = of(diagnosed(alone), "prose")
    assert without.cause == "cannot tell yet"
    assert without.contrast is None
    assert "no control" in without.reason
    once = experiment_design(
        "mixed", "concurrency = [16]\nrequests = 60\nrepeats = 1\nnoise_floor = false"
    )
    unknown = of(
        diagnosed(experiment_study(once, slowing(json=(0.7, 0.7), prose=(1.4, 1.4)))), "prose"
    )
    assert unknown.cause == "cannot tell yet"
    assert "repeat them" in unknown.reason


def test_a_tail_of_too_few_requests_is_not_diagnosed() -> None:
    few = experiment_design("mixed", "concurrency = [16]\nrequests = 40\nrepeats = 3")
    mixture = diagnosed(experiment_study(few, slowing(json=(0.7, 0.7), prose=(1.4, 1.4))))
    tail = of(mixture, "prose")
    assert tail.cause == "cannot tell yet"
    assert "P99 needs 100 requests in both arms, there are 60" in tail.reason
    assert of(mixture, "prose", "speedup").cause == "speculation itself"


def test_the_average_hides_the_segment_that_loses() -> None:
    study = experiment_study(DESIGN, slowing(json=(0.6, 0.6), prose=(1.25, 1.25)))
    mixture = diagnosed(study)
    (view,) = mixture.aggregates
    assert view.hidden
    assert view.losing == ("prose",)
    assert view.losing_share == 0.5
    rates = {s.segment: s.acceptance.rate for s in view.segments if s.acceptance}
    assert rates["json"] is not None
    assert rates["prose"] is not None
    assert view.acceptance is not None
    assert view.acceptance.rate is not None
    assert rates["json"] > 0.65
    assert rates["prose"] < 0.5
    assert rates["prose"] < view.acceptance.rate < rates["json"]
    assert mixture.sentences[0].startswith("draft: the average of mix (1.")
    assert "hides that prose, 50% of the requests, loses." in mixture.sentences[0]


def test_an_average_that_loses_itself_hides_nothing() -> None:
    study = experiment_study(DESIGN, slowing(json=(1.2, 1.2), prose=(1.3, 1.3)))
    (view,) = diagnosed(study).aggregates
    assert view.losing == ("json", "prose")
    assert not view.hidden
    good = experiment_study(DESIGN, slowing(json=(0.7, 0.7), prose=(0.8, 0.8)))
    (view,) = diagnosed(good).aggregates
    assert view.losing == ()
    assert not view.hidden


@pytest.mark.parametrize(
    ("prose", "tail", "present", "said"),
    [
        ((0.8, 0.8), 2.5, True, "is there"),
        ((0.8, 0.8), 1.0, False, "is not there"),
    ],
)
def test_the_signature_is_tested(
    prose: tuple[float, float], tail: float, present: bool, said: str
) -> None:
    study = experiment_study(DESIGN, slowing(json=(0.8, 0.8), prose=prose, tail=tail))
    mixture = diagnosed(study)
    (tpot,) = [s for s in mixture.signatures if s.metric == "tpot" and s.segment is None]
    assert tpot.present is present
    assert any(said in sentence for sentence in mixture.sentences)


def effect(ratio: float, half: float, *, better: str = "lower", known: bool = True) -> Effect:
    return Effect(
        "tpot_p99", better, "draft", "mix", "prose", LoadPoint(Loop.CLOSED, 16),  # type: ignore[arg-type]
        ratio, ratio * math.exp(-half), ratio * math.exp(half), 0.95, 90, 3, 0.02, 0.02 * ratio,
        half / 2, 20.0, known, "", (),
    )  # fmt: skip


ratios = st.floats(0.3, 3)
halves = st.floats(0.005, 0.5)


@given(ratios, halves, ratios, halves)
def test_a_contrast_turns_round_with_its_sides_and_with_the_metric(
    mix: float, half: float, alone: float, other: float
) -> None:
    there = contrast(effect(mix, half), effect(alone, other), 0.95)
    back = contrast(effect(alone, other), effect(mix, half), 0.95)
    assert there.ratio == pytest.approx(alone / mix)
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))
    higher = contrast(
        effect(1 / mix, half, better="higher"), effect(1 / alone, other, better="higher"), 0.95
    )
    assert (higher.low, higher.high) == pytest.approx((there.low, there.high))
    for e, again in ((effect(mix, half), effect(mix, half)),):
        assert contrast(e, again, 0.95).ratio == pytest.approx(1)


@given(ratios, halves, ratios, halves)
def test_a_cause_is_named_only_for_a_sure_harm(
    mix: float, half: float, alone: float, other: float
) -> None:
    in_mix, control = effect(mix, half), effect(alone, other)
    cause = cause_of(in_mix, control, contrast(in_mix, control, 0.95), 0.95)
    low, high = in_mix.interval(0.95)
    if cause in ("the mix", "both", "speculation itself"):
        assert low > 1
    if cause in ("speculation itself", "both"):
        assert control.interval(0.95)[0] > 1
    if cause == "no harm":
        assert high <= 1 / 0.95 + 1e-12
    unknown = effect(mix, half, known=False)
    named = cause_of(unknown, control, contrast(unknown, control, 0.95), 0.95)
    assert named in ("no harm", "cannot tell yet")
