"""How near `specwise predict --from STUDY` comes: known truths, and what studies held back.

    python benchmarks/prediction_from_study.py              # known truths, about a minute
    python benchmarks/prediction_from_study.py STUDY...     # each load, then each k, left out

A known truth is a study that was simulated from data sheets, measured at 1, 4 and 16 requests at
once and asked at others. Trials are predicted with as many requests as were measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from specwise.analysis.extrapolation import extrapolate
from specwise.analysis.latency import summarise
from specwise.domain import LoadPoint, Loop, Purpose, Slo, Speculation, StudyData
from specwise.errors import InputError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.measurement.store import read_study
from specwise.prediction.forecast import (
    PRIORS,
    Candidate,
    Prior,
    Scenario,
    forecast_study,
)

SEEN = (1.0, 4.0, 16.0)
ASKED = (2.0, 8.0, 32.0, 64.0, 128.0)
REPEATS = 8
BAR = 0.1

Figures = Mapping[tuple[str, LoadPoint], tuple[float, float]]


def figures(study: StudyData) -> Figures:
    """(median TPOT, output tokens/s) of production's workload by arm and load."""
    found = {}
    for summary in summarise(study):
        if (
            summary.workload == study.design.production_workload
            and summary.segment is None
            and summary.purpose is Purpose.MEASURE
            and summary.tpot_s is not None
            and summary.output_tokens_per_s
        ):
            at = summary.arm, summary.load
            found[at] = summary.tpot_s.p50, summary.output_tokens_per_s
    return found


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """What is asked of the known truths: models, GPUs, drafters and prompts that differ."""
    prior = Prior((0.75, 0.6, 0.5), 1.0, "the truth")
    for name, target, draft, gpu, gpus, prompt in (
        ("8B, H100", "llama-3.1-8b", "llama-3.2-1b", "h100", 1, 200),
        ("8B, H100, long prompts", "llama-3.1-8b", "llama-3.2-1b", "h100", 1, 1000),
        ("8B, A100", "llama-3.1-8b", "llama-3.2-1b", "a100", 1, 500),
        ("70B, 4 x H100", "llama-3.1-70b", "llama-3.1-8b", "h100", 4, 500),
    ):
        model = load_checkpoint(draft)
        speculation = Speculation("draft_model", 3, draft="d")
        yield (
            name,
            _scenario(target, gpu, gpus, prompt, (Candidate("draft", speculation, prior, model),)),
        )
    lookups = tuple(Candidate(m, Speculation(m, 3), PRIORS[m]) for m in ("ngram", "eagle3"))
    yield "8B, H100, n-gram and EAGLE-3", _scenario("llama-3.1-8b", "h100", 1, 200, lookups)


def _scenario(
    target: str, gpu: str, gpus: int, prompt: int, candidates: tuple[Candidate, ...]
) -> Scenario:
    return Scenario(
        target=load_checkpoint(target),
        gpu=find_gpu(gpu),
        gpus=gpus,
        prompt_tokens=prompt,
        output_tokens=100,
        loads=_closed(SEEN),
        production=_closed(SEEN)[-1],
        candidates=candidates,
        slo=Slo(),
    )


def _closed(values: Sequence[float]) -> tuple[LoadPoint, ...]:
    return tuple(LoadPoint(Loop.CLOSED, value) for value in values)


def known_truths() -> bool:
    """The errors at loads that were not measured, by load; whether no median passes the bar."""
    errors: dict[float, list[tuple[float, float]]] = {value: [] for value in ASKED}
    for name, scenario in scenarios():
        asked = _closed(ASKED)
        truth = figures(forecast_study(replace(scenario, loads=asked, production=asked[-1])))
        told = figures(extrapolate(forecast_study(scenario), loads=asked).predicted)
        print(f"\n{name}")
        for (arm, load), predicted in told.items():
            found = _errors(predicted, truth[arm, load])
            errors[load.value].append(found)
            print(f"  {arm:8} {load.label:>5}  TPOT {found[0]:+6.1%}  tokens/s {found[1]:+6.1%}")
    print("\nMedian and largest error, measured at 1, 4 and 16")
    met = True
    for value, held in errors.items():
        tpot, rate = ([abs(pair[i]) for pair in held] for i in (0, 1))
        print(
            f"  {value:5g}  TPOT {statistics.median(tpot):5.1%} {max(tpot):6.1%}"
            f"   tokens/s {statistics.median(rate):5.1%} {max(rate):6.1%}"
        )
        met = met and max(statistics.median(tpot), statistics.median(rate)) <= BAR
    return met


def held_out(study: StudyData) -> None:
    """Every load left out in turn, then every arm of a draft that ran with several k."""
    measured = figures(study)
    print(f"\n{study.design.name}: each load left out")
    errors: list[tuple[float, float]] = []
    for load in study.design.loads:
        rest = replace(study, trials=tuple(t for t in study.trials if t.trial.load != load))
        errors += _compared(_told(study, rest, (load,)), measured)
    _summed_up(errors)
    print(f"{study.design.name}: each k left out, where the draft ran with others")
    errors = []
    for arm in study.design.arms:
        spoken = arm.speculation
        if spoken is not None and not spoken.schedule:
            rest = replace(study, trials=tuple(t for t in study.trials if t.trial.arm != arm.name))
            told = _told(study, rest, study.design.loads, (spoken.k,))
            own = {
                (arm.name, load): figures
                for (name, load), figures in told.items()
                if name.endswith(f", k={spoken.k}") and name[:4] == arm.name[:4]
            }
            errors += _compared(own, measured)
    _summed_up(errors)


def _told(
    study: StudyData, rest: StudyData, loads: Sequence[LoadPoint], ks: Sequence[int] = ()
) -> Figures:
    """What ``rest`` foretells, its trials as long as those of ``study``."""
    workload = study.design.production_workload
    counts = {t.trial.load: t.trial.requests for t in study.trials if t.trial.workload == workload}
    try:
        told = extrapolate(rest, loads=loads, ks=ks, repeats=REPEATS, requests_at=counts)
    except InputError as error:
        print(f"  {error}")
        return {}
    return figures(told.predicted)


def _errors(predicted: tuple[float, float], truth: tuple[float, float]) -> tuple[float, float]:
    return predicted[0] / truth[0] - 1, predicted[1] / truth[1] - 1


def _compared(told: Figures, measured: Figures) -> Iterator[tuple[float, float]]:
    for at, predicted in told.items():
        if at in measured:
            seen, (arm, load) = measured[at], at
            errors = _errors(predicted, seen)
            print(
                f"  {arm:16} {load.label:>5}  TPOT {1000 * seen[0]:7.1f} ms, predicted "
                f"{1000 * predicted[0]:7.1f} {errors[0]:+6.1%}   tokens/s {seen[1]:7.1f}, "
                f"predicted {predicted[1]:7.1f} {errors[1]:+6.1%}"
            )
            yield errors


def _summed_up(errors: Sequence[tuple[float, float]]) -> None:
    if errors:
        tpot, rate = ([abs(pair[i]) for pair in errors] for i in (0, 1))
        print(
            f"  median error: TPOT {statistics.median(tpot):.1%}, tokens/s "
            f"{statistics.median(rate):.1%}, all {statistics.median(tpot + rate):.1%}"
        )


def main(arguments: Sequence[str]) -> None:
    """As the module says."""
    if not arguments:
        known_truths()
    for folder in arguments:
        held_out(read_study(Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
