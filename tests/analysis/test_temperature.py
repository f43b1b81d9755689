from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.analysis.experiment_studies import K, Request, Truth, experiment_design, experiment_study

from specwise.analysis.cells import cells
from specwise.analysis.comparison import speedup_effects
from specwise.analysis.temperature import (
    TemperatureLine,
    TemperatureSweep,
    classify,
    sweep,
)
from specwise.domain import AcceptanceSource, StudyData, StudyDesign, Trial
from specwise.facts.published import published


def swept(study: StudyData) -> TemperatureSweep:
    measured = cells(study)
    return sweep(study, measured, speedup_effects(measured, "baseline"))


def line(result: TemperatureSweep, segment: str) -> TemperatureLine:
    (found,) = [each for each in result.lines if each.segment == segment]
    return found


def accepting(slope: float, *, at_zero: float = 0.9, prompt_sd: float = 0.0) -> Truth:
    """Conditional acceptance that falls linearly with temperature; prompts may differ."""

    def truth(
        _: Trial, segment: str, temperature: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        accept = at_zero - slope * temperature + prompt_sd * difficulty
        return Request(0.01, float(np.clip(accept, 0.01, 0.99)))

    return truth


def rate_of(conditional: float) -> float:
    return sum(conditional**i for i in range(1, K + 1)) / K


def test_the_line_falls_and_is_read_off_at_productions_temperature() -> None:
    result = swept(experiment_study(experiment_design("temperature"), accepting(0.5)))
    prose = line(result, "prose")
    assert [p.temperature for p in prose.points] == [0.0, 0.4, 0.8, 1.0]
    for point in prose.points:
        truth = 0.9 - 0.5 * point.temperature
        assert point.rate.low < rate_of(truth) < point.rate.high
        assert point.rate.value == pytest.approx(rate_of(truth), abs=0.04)
        assert point.length == pytest.approx(1 + K * point.rate.value)
        for share in point.conditional:
            assert share.value == pytest.approx(truth, abs=0.06)
            assert share.low < share.value < share.high
        assert point.speedup is not None
    assert prose.at_production is not None
    assert prose.at_production.temperature == 0.8
    assert prose.falls is True
    assert prose.monotone is True
    assert prose.drop.low > 0.3
    assert [p.temperature for p in line(result, "json").points] == [0.0, 0.1, 0.4, 0.8, 1.0]


@pytest.mark.parametrize(
    ("conditional", "klass", "classes"),
    [
        (0.45, "off", ("off",)),
        (0.75, "break-even", ("break-even",)),
        (0.95, "likely a win", ("likely a win",)),
        (0.691, "off", ("off", "break-even")),
        (0.8, "break-even", ("break-even", "likely a win")),
    ],
)
def test_every_class_and_what_an_interval_across_a_line_says(
    conditional: float, klass: str, classes: tuple[str, ...]
) -> None:
    study = experiment_study(
        experiment_design("temperature", "concurrency = [8]\nrequests = 80\nrepeats = 2"),
        accepting(0.0, at_zero=conditional),
        seed=4,
    )
    point = line(swept(study), "prose").at_production
    assert point is not None
    assert set(point.classes) == set(classes)
    assert point.certain == (len(classes) == 1)
    assert point.klass in classes
    if len(classes) == 1:
        assert point.klass == klass


def test_the_lines_themselves_belong_to_break_even() -> None:
    assert [classify(r) for r in (0.499, 0.5, 0.65, 0.651)] == [
        "off", "break-even", "break-even", "likely a win",
    ]  # fmt: skip
    assert [classify(rate) for _, rate in published().temperature_shape.points] == [
        "likely a win", "likely a win", "break-even", "off",
    ]  # fmt: skip


def test_a_flat_line_neither_falls_nor_rises_and_a_rising_one_is_not_monotone() -> None:
    flat = line(swept(experiment_study(experiment_design("temperature"), accepting(0.0))), "prose")
    assert flat.falls is None
    assert flat.monotone is True
    rising = experiment_study(experiment_design("temperature"), accepting(-0.3, at_zero=0.5))
    rose = line(swept(rising), "prose")
    assert rose.falls is False
    assert rose.monotone is False


def test_a_benchmark_at_another_temperature_is_warned_about() -> None:
    result = swept(experiment_study(experiment_design("temperature"), accepting(0.5)))
    (warning,) = [w for w in result.warnings if "prose" in w]
    assert "a benchmark at T=0 shows 0.8" in warning
    assert "(likely a win); production's T=0.8" in warning
    assert "(off)" in warning
    flat = swept(experiment_study(experiment_design("temperature"), accepting(0.0)))
    assert flat.warnings == ()


def test_differences_are_taken_on_the_same_prompts() -> None:
    """Prompts that differ widely make each rate unsure, but not what temperature does to it."""
    study = experiment_study(
        experiment_design("temperature"), accepting(0.15, at_zero=0.7, prompt_sd=0.2)
    )
    prose = line(swept(study), "prose")
    half = (prose.points[0].rate.high - prose.points[0].rate.low) / 2
    assert (prose.drop.high - prose.drop.low) / 2 < 0.75 * math.sqrt(2) * half


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    design = experiment_design(
        "temperature", "concurrency = [8]\nrequests = 20\nrepeats = 1", "temperatures = [0.8]"
    )
    design = only_prose_drafted(design)
    truth = accepting(0.0, at_zero=0.6, prompt_sd=0.12)
    wanted = _true_rate(truth)
    held = []
    for seed in range(200):
        study = experiment_study(design, _fresh_prompts(truth, seed), seed=seed)
        share = line(swept(study), "prose").points[0].rate
        held.append(share.low <= wanted <= share.high)
    assert 0.91 <= np.mean(held) <= 0.98


def only_prose_drafted(design: StudyDesign) -> StudyDesign:
    kept = (t for t in design.trials if (t.arm, t.workload) == ("draft", "prose"))
    return replace(design, trials=tuple(kept))


def _fresh_prompts(truth: Truth, seed: int) -> Truth:
    rng = np.random.default_rng([11, seed])
    return lambda trial, segment, t, _, random: truth(
        trial, segment, t, float(rng.normal()), random
    )


def _true_rate(truth: Truth) -> float:
    design = experiment_design("temperature", "concurrency = [8]\nrequests = 4000\nrepeats = 1")
    study = experiment_study(only_prose_drafted(design), _fresh_prompts(truth, 99))
    return line(swept(study), "prose").points[0].rate.value


def test_counters_give_the_same_line_with_repeats_as_units() -> None:
    design = experiment_design("temperature", "concurrency = [8]\nrequests = 40\nrepeats = 4")
    exact = line(swept(experiment_study(design, accepting(0.5))), "prose")
    counted = line(
        swept(experiment_study(design, accepting(0.5), source=AcceptanceSource.COUNTERS)), "prose"
    )
    assert {p.source for p in counted.points} == {AcceptanceSource.COUNTERS}
    assert [p.rate.value for p in counted.points] == pytest.approx(
        [p.rate.value for p in exact.points]
    )
    assert all(p.rate.low < p.rate.value < p.rate.high for p in counted.points)
    assert counted.falls is True


def test_one_window_of_counters_gives_no_interval_and_says_so() -> None:
    design = experiment_design("temperature", "concurrency = [8]\nrequests = 40\nrepeats = 1")
    result = swept(experiment_study(design, accepting(0.5), source=AcceptanceSource.COUNTERS))
    prose = line(result, "prose")
    assert prose.falls is None
    assert prose.monotone is None
    assert math.isnan(prose.points[0].rate.low)
    assert not prose.points[0].certain
    assert any("no interval" in w for w in result.warnings)


def test_chunks_are_an_estimate_and_nothing_at_all_gives_no_line() -> None:
    design = experiment_design("temperature")
    guessed = experiment_study(design, accepting(0.5), source=AcceptanceSource.CHUNKS)
    guessed = replace(
        guessed,
        trials=tuple(
            replace(t, parts=tuple(replace(p, counters={}) for p in t.parts))
            for t in guessed.trials
        ),
    )
    result = swept(guessed)
    assert {p.source for p in line(result, "prose").points} == {AcceptanceSource.CHUNKS}
    assert any("estimated" in w for w in result.warnings)
    assert swept(experiment_study(design, accepting(0.5), source=None)).lines == ()


def test_an_unfinished_sweep_says_that_production_is_missing() -> None:
    study = experiment_study(experiment_design("temperature"), accepting(0.5))
    study = replace(
        study,
        trials=tuple(replace(t, complete=t.trial.workload != "prose") for t in study.trials),
    )
    result = swept(study)
    prose = line(result, "prose")
    assert prose.at_production is None
    assert prose.flattering() == ()
    assert any("was not measured" in w for w in result.warnings)


def test_a_surely_higher_rate_flatters_even_within_one_class() -> None:
    study = experiment_study(experiment_design("temperature"), accepting(0.35, at_zero=0.6))
    result = swept(study)
    (warning,) = [w for w in result.warnings if "prose" in w]
    assert "(off); production's T=0.8 has 0." in warning
    assert warning.endswith("(off).")
