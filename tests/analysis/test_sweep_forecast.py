from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from specwise.analysis.cells import cells
from specwise.analysis.sweep_forecast import SweepForecast, forecast_sweep, k_at
from specwise.domain import MeasuredTrial, Slo, Speculation, StudyData, StudyDesign
from specwise.measurement.design import parse_study
from specwise.measurement.sweep import families
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.study import SimArm, Traffic, simulate_study
from specwise.prediction.truth import LinearCosts

STUDY = """
name = "sweep"
[serve]
model = "simulated"
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = { method = "draft_model", k = 3, draft = "d" }
[[arm]]
name = "ngram"
speculation = { method = "ngram", k = 3 }
[[segment]]
name = "json"
prompts = "simulated"
[[segment]]
name = "prose"
prompts = "simulated"
temperature = 0.8
[[workload]]
name = "mix"
shares = { json = 0.5, prose = 0.5 }
[load]
concurrency = [1, 4, 16]
requests = [40, 60, 120]
[tune]
k = [1, 2, 4, 6]
draft_sampling = ["greedy"]
repeats = 1
"""
PLAIN = LinearCosts(target_pass_s=0.02, token_s=0.0004)
COSTS = {
    "": PLAIN,
    "draft_model": replace(PLAIN, draft_pass_s=0.002, draft_token_s=2e-5, speculates=True),
    "ngram": replace(PLAIN, draft_pass_s=0.0, overhead_each_s=0.0005, speculates=True),
}
ACCEPTED = {
    "draft_model": {"json": (0.85,) * 6, "prose": (0.5,) * 6},
    "ngram": {"json": (0.6,) * 6, "prose": (0.3,) * 6},
}
HITS = {"json": 0.5, "prose": 0.2}


@pytest.fixture(scope="module")
def design() -> StudyDesign:
    return parse_study(STUDY, name="sweep", experiment="tune")


def played(design: StudyDesign) -> Mapping[str, MeasuredTrial]:
    """Every trial of the sweep, simulated, by its id."""
    arms = {}
    for arm in design.arms:
        s = arm.speculation
        method = s.method if s else ""
        k = s.k if s else 0
        arms[arm.name] = SimArm(
            COSTS[method],
            SchedulerConfig(
                method=method or None, k=k, schedule=s.schedule if s else (), max_num_seqs=64
            ),
            {name: values[:k] for name, values in ACCEPTED.get(method, {}).items()},
            HITS if method == "ngram" else {},
        )
    study = simulate_study(
        design,
        arms=arms,
        traffic={name: Traffic(((120, 48), (160, 64))) for name in ("json", "prose")},
        arrivals=lambda *_: (),
        provenance={},
    )
    return {t.trial.trial_id: t for t in study.trials}


@pytest.fixture(scope="module")
def everything(design: StudyDesign) -> Mapping[str, MeasuredTrial]:
    return played(design)


def forecast(design: StudyDesign, trials: list[MeasuredTrial]) -> SweepForecast:
    return forecast_sweep(design, cells(StudyData(design, {}, tuple(trials), "")), families(design))


def shown(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial], *arms: str
) -> SweepForecast:
    """The forecast from the mix alone, of the baseline at all loads and ``arms`` at two."""
    return forecast(
        design,
        [
            t
            for t in everything.values()
            if t.trial.workload == "mix"
            and (t.trial.arm == "baseline" or (t.trial.arm in arms and t.trial.load.value < 16))
        ],
    )


def test_it_foretells_lengths_loads_and_segments_that_never_ran(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial]
) -> None:
    found = shown(design, everything, "draft-k4", "ngram-k4")
    assert found.rests_on == {"draft": "itself", "ngram": "itself"}
    times = {}
    for t in everything.values():
        seconds = sum(r.finished_s - r.sent_s for r in t.records)
        times[t.trial.arm, t.trial.workload, t.trial.load] = seconds / sum(
            r.output_tokens or 0 for r in t.records
        )
    errors = [
        gain - math.log(times["baseline", workload, load] / times[arm, workload, load])
        for (arm, workload, load), gain in found.log_gain.items()
    ]
    assert len(errors) == 10 * 3 * 3
    assert np.median(np.abs(errors)) < 0.03
    assert np.quantile(np.abs(errors), 0.9) < 0.1


def test_nothing_is_foretold_from_the_baseline_alone(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial]
) -> None:
    assert shown(design, everything).log_gain == {}
    assert forecast(design, []).rests_on == {"draft": "nothing", "ngram": "nothing"}


def test_a_method_that_did_not_run_is_left_out(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial]
) -> None:
    found = shown(design, everything, "draft-k2")
    assert found.rests_on == {"draft": "itself", "ngram": "nothing"}
    assert {arm for arm, _, _ in found.log_gain} == {f"draft-k{k}" for k in (1, 2, 4, 6)} | {
        "draft-idle"
    }


def test_a_short_draft_does_not_make_longer_ones_look_rejected(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial]
) -> None:
    """k = 1 accepts at most one: pooled with k = 4 as it stands it would halve position 2."""
    apart = shown(design, everything, "draft-k4", "ngram-k4")
    pooled = shown(design, everything, "draft-k4", "draft-k1", "ngram-k4")
    for key, gain in apart.log_gain.items():
        assert pooled.log_gain[key] == pytest.approx(gain, abs=0.06)


def test_a_tight_limit_on_tpot_is_a_reason_to_speculate_less(
    design: StudyDesign, everything: Mapping[str, MeasuredTrial]
) -> None:
    tight = replace(design, slo=Slo(tpot_s=0.040))
    key = ("draft-k6", "mix", design.loads[-1])
    assert (
        shown(tight, everything, "draft-k4").log_gain[key]
        < shown(design, everything, "draft-k4").log_gain[key]
    )


def test_the_draft_length_at_a_batch() -> None:
    rows = ((1, 2, 4), (5, 8, 2), (9, 1024, 0))
    speculation = Speculation("draft_model", 4, schedule=rows)
    assert [k_at(speculation, batch) for batch in (1, 2, 3, 5, 9, 2000)] == [4, 4, 4, 2, 0, 0]
    assert k_at(Speculation("draft_model", 3), 99) == 3
