"""`specwise predict`: what to expect of speculation before anything runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specwise.errors import InputError

if TYPE_CHECKING:
    from specwise.domain import LoadPoint
    from specwise.prediction.forecast import Candidate, Prior
    from specwise.reporting.prediction import Forecast

METHODS = ("draft_model", "eagle3", "eagle", "mtp", "ngram")

_BATCHES = (1, 4, 16, 64, 128, 256)
_NOT_WITH_FROM = {
    "draft": "--draft",
    "methods": "--method",
    "gpu": "--gpu",
    "count": "--gpus",
    "prompt_tokens": "--prompt-tokens",
    "output_tokens": "--output-tokens",
    "acceptance": "--acceptance",
    "context": "--context",
    "costs": "--costs",
}


def _numbers(text: str, what: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{what} {text!r} is not a list of numbers.", "As 1,4,16.") from None
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise InputError(f"{what} {text!r} holds a number that is not positive.", "As 1,4,16.")
    return values


@click.command(
    epilog="Example: specwise predict llama-3.1-70b --draft llama-3.1-8b --method ngram "
    "--gpu h100 --gpus 4 --concurrency 1,8,32,128"
)
@click.argument("target", required=False)
@click.option(
    "--from",
    "study",
    type=click.Path(path_type=Path),
    help="Extrapolate this finished study instead: its own step costs, acceptance and traffic.",
)
@click.option("--draft", help="A draft model: a folder, a hub id or a built-in name.")
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(METHODS), help="Repeat for several."
)
@click.option(
    "-k",
    "--k",
    "ks",
    multiple=True,
    type=click.IntRange(1, 8),
    help="Draft length (default 3); with --from also others than the study's, repeat for several.",
)
@click.option("--gpu", default="h100", show_default=True, help="The GPU by name.")
@click.option("--gpus", "count", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--concurrency", help="Closed-loop loads, as 1,4,16 (default 1,4,16,64,128).")
@click.option("--rate", help="Open-loop loads in requests/s, as 1,2,4.")
@click.option("--production", type=float, help="Which of them is production's (default: last).")
@click.option("--prompt-tokens", default=500, show_default=True, type=click.IntRange(2, 100_000))
@click.option("--output-tokens", default=250, show_default=True, type=click.IntRange(2, 100_000))
@click.option(
    "--acceptance",
    help="Conditional acceptance, one for all positions or one each, as 0.7 or 0.8,0.7,0.6; "
    "default: a published prior of the method.",
)
@click.option("--context", default=8192, show_default=True, type=click.IntRange(64, 10_000_000))
@click.option("--tpot-ms", type=click.FloatRange(0, min_open=True), help="SLO, for goodput.")
@click.option("--ttft-ms", type=click.FloatRange(0, min_open=True), help="SLO, for goodput.")
@click.option("--costs", type=click.Path(path_type=Path), help="What `specwise calibrate` stored.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page with figures here.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.pass_context
def predict(ctx: click.Context, /, target: str | None, **options: Any) -> None:
    """What should I expect, and where is the crossover?

    TARGET is a folder, a hub id or a built-in name. Every figure is a prediction: acceptance is
    assumed until it is measured. With --from STUDY in place of TARGET, everything comes from that
    study and is asked at more loads: by default also twice and four times production's.
    """
    if (target is None) == (options["study"] is None):
        raise InputError("Give a TARGET or --from STUDY, one of them.", "See --help.")
    forecast = _of_study(ctx, options) if target is None else _of_target(target, options)
    _show(forecast, options)


def _of_target(target: str, options: dict[str, Any]) -> Forecast:
    """Before anything was measured."""
    from specwise.decision.assessment import assess  # noqa: PLC0415 - numpy and scipy load here
    from specwise.domain import Slo  # noqa: PLC0415
    from specwise.facts.checkpoint import load_checkpoint  # noqa: PLC0415
    from specwise.facts.hardware import find_gpu  # noqa: PLC0415
    from specwise.prediction.forecast import (  # noqa: PLC0415
        Scenario,
        by_batch,
        forecast_study,
        sensitivity,
    )
    from specwise.reporting.prediction import Forecast  # noqa: PLC0415

    if len(options["ks"]) > 1:
        raise InputError("Several -k need --from STUDY.", "A page has each k's best anyway.")
    loads, production = _loads(options)
    candidates = _candidates(options)
    scenario = Scenario(
        target=load_checkpoint(target),
        gpu=find_gpu(options["gpu"]),
        gpus=options["count"],
        prompt_tokens=options["prompt_tokens"],
        output_tokens=options["output_tokens"],
        loads=loads,
        production=production,
        candidates=candidates,
        slo=Slo(ttft_s=_seconds(options["ttft_ms"]), tpot_s=_seconds(options["tpot_ms"])),
        context=max(options["context"], 4 * options["prompt_tokens"], 4 * options["output_tokens"]),
        costs=_fitted(options["costs"], candidates),
    )
    assessment = assess(forecast_study(scenario, seed=options["seed"]))
    running = _running(assessment, production)
    return Forecast(
        scenario=scenario,
        assessment=assessment,
        batches=by_batch(scenario, _BATCHES),
        unknowns=sensitivity(scenario, running),
        unknowns_at=round(running, 1),
    )


def _of_study(ctx: click.Context, options: dict[str, Any]) -> Forecast:
    """A finished study at other loads and draft lengths."""
    from specwise.analysis.extrapolation import extrapolate  # noqa: PLC0415 - numpy loads here
    from specwise.decision.assessment import assess  # noqa: PLC0415
    from specwise.domain import Slo  # noqa: PLC0415
    from specwise.measurement.store import read_study  # noqa: PLC0415
    from specwise.prediction.forecast import by_batch, sensitivity  # noqa: PLC0415
    from specwise.reporting.prediction import Forecast  # noqa: PLC0415

    for name, flag in _NOT_WITH_FROM.items():
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise InputError(f"{flag} does not go with --from.", "The study's own is taken.")
    study = read_study(options["study"])
    loads: tuple[LoadPoint, ...] = ()
    production = None
    if options["rate"] or options["concurrency"]:
        own = study.design.production_load
        asked_loads, last = _loads(options)
        loads = tuple(_arriving_as(own, load) for load in asked_loads)
        production = _arriving_as(own, last)
        if options["production"] is None and own in loads:
            production = own
    elif options["production"] is not None:
        raise InputError("--production needs the loads.", "Give --concurrency or --rate too.")
    slo = study.design.slo
    if options["ttft_ms"] or options["tpot_ms"]:
        slo = Slo(ttft_s=_seconds(options["ttft_ms"]), tpot_s=_seconds(options["tpot_ms"]))
    asked = extrapolate(
        study, loads=loads, production=production, ks=options["ks"], slo=slo, seed=options["seed"]
    )
    assessment = assess(asked.predicted)
    running = _running(assessment, asked.production)
    return Forecast(
        scenario=asked,
        assessment=assessment,
        batches=by_batch(asked, _BATCHES),
        unknowns=sensitivity(asked, running),
        unknowns_at=round(running, 1),
    )


def _arriving_as(own: LoadPoint, load: LoadPoint) -> LoadPoint:
    """``load`` with the arrival process of the study's own."""
    return replace(own, value=load.value) if own.loop is load.loop else load


def _show(forecast: Forecast, options: dict[str, Any]) -> None:
    from specwise.reporting.prediction import (  # noqa: PLC0415 - matplotlib loads here
        forecast_to_dict,
        print_forecast,
        write_forecast,
    )

    if options["out"] is not None:
        write_forecast(forecast, options["out"])
    if options["as_json"]:
        import orjson  # noqa: PLC0415

        click.echo(orjson.dumps(forecast_to_dict(forecast), option=orjson.OPT_INDENT_2))
        return
    print_forecast(forecast)
    if options["out"] is not None:
        click.echo(f"Page: {options['out']}")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _loads(options: dict[str, Any]) -> tuple[tuple[LoadPoint, ...], LoadPoint]:
    from specwise.domain import LoadPoint, Loop  # noqa: PLC0415

    if options["rate"] and options["concurrency"]:
        raise InputError("Give --concurrency or --rate, not both.", "One loop a forecast.")
    if options["rate"]:
        values = _numbers(options["rate"], "--rate")
        loads = tuple(LoadPoint(Loop.OPEN, v, "poisson") for v in sorted(set(values)))
    else:
        values = _numbers(options["concurrency"] or "1,4,16,64,128", "--concurrency")
        if not all(value.is_integer() for value in values):
            raise InputError("A --concurrency is a whole number of clients.", "As 1,4,16.")
        loads = tuple(LoadPoint(Loop.CLOSED, value) for value in sorted(set(values)))
    wanted = options["production"]
    if wanted is None:
        return loads, loads[-1]
    for load in loads:
        if load.value == wanted:
            return loads, load
    raise InputError(f"--production {wanted:g} is not among the loads.", "Add it to the list.")


def _candidates(options: dict[str, Any]) -> tuple[Candidate, ...]:
    from specwise.domain import Speculation  # noqa: PLC0415
    from specwise.facts.checkpoint import load_checkpoint  # noqa: PLC0415
    from specwise.prediction.forecast import PRIORS, Candidate  # noqa: PLC0415

    methods = dict.fromkeys(options["methods"])
    if options["draft"]:
        methods = dict.fromkeys(("draft_model", *methods))
    if "draft_model" in methods and not options["draft"]:
        raise InputError("Method draft_model needs a draft.", "Name it: --draft MODEL.")
    found = []
    for method in methods or ("eagle3", "ngram"):
        found.append(
            Candidate(
                name=method,
                speculation=Speculation(method, _k(options), draft=options["draft"]),
                acceptance=_acceptance(options["acceptance"], PRIORS[method]),
                draft=load_checkpoint(options["draft"]) if method == "draft_model" else None,
            )
        )
    return tuple(found)


def _k(options: dict[str, Any]) -> int:
    return int(options["ks"][0]) if options["ks"] else 3


def _acceptance(given: str | None, prior: Prior) -> Prior:
    from specwise.prediction.forecast import Prior  # noqa: PLC0415

    if given is None:
        return prior
    try:
        values = tuple(float(part) for part in given.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 1 for value in values):
        raise InputError(
            f"--acceptance {given!r} is not a list of probabilities.", "As 0.7 or 0.8,0.7,0.6."
        )
    share = max(prior.drafted_share, values[0])
    return Prior(values, share, "given")


def _fitted(path: Path | None, candidates: tuple[Candidate, ...]) -> Any:
    if path is None:
        return None
    from specwise.prediction.fit import read_costs  # noqa: PLC0415

    return read_costs(path, candidates)


def _running(assessment: Any, production: LoadPoint) -> float:
    """Requests that run at production's load without speculation, as simulated."""
    baseline = assessment.study.design.arms[0].name
    for summary in assessment.summaries:
        if (summary.arm, summary.load) == (baseline, production) and summary.running_mean:
            return max(float(summary.running_mean), 1.0)
    return max(production.value, 1.0)
