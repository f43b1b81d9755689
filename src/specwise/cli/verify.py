"""`specwise verify`: does speculation leave the output as it is?"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from specwise.domain import (
    Api,
    Arm,
    LoadPoint,
    Loop,
    Losslessness,
    LosslessnessResult,
    Segment,
    Slo,
    Speculation,
    StudyDesign,
)
from specwise.errors import InputError, SpecwiseError, StoppedError

_EXIT_CODES = {Losslessness.UNCHANGED: 0, Losslessness.CHANGED: 1, Losslessness.UNKNOWN: 3}


@click.command(
    epilog="Example: specwise verify --baseline http://127.0.0.1:8000 "
    "--candidate http://127.0.0.1:8001 --prompts bundled:prose"
)
@click.argument("study", required=False, type=click.Path(path_type=Path))
@click.option("--arm", "arms", multiple=True, help="Check this arm of the study only; repeatable.")
@click.option("--baseline", metavar="URL", help="A server without speculation.")
@click.option("--candidate", metavar="URL", help="The same model with speculation.")
@click.option("--model", help="The model's served name; default: the first that each serves.")
@click.option("--prompts", metavar="SOURCE", help="Prompts for two URLs: bundled:prose, a file.")
@click.option(
    "--api",
    type=click.Choice(["chat", "completions"]),
    default="chat",
    help="Endpoint for two URLs.",
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable with both URLs' key.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Study folder to keep the result in; default: STUDY, if that is a folder.",
)
@click.option("--only", type=click.Choice(["greedy", "sampling"]), help="Leave out the other half.")
@click.option("--prompt-count", default=24, show_default=True, type=click.IntRange(1))
@click.option("--greedy-tokens", default=48, show_default=True, type=click.IntRange(2))
@click.option(
    "--sampling-prompts",
    default=12,
    show_default=True,
    type=click.IntRange(1),
    help="How many of the prompts are sampled: the most informative ones.",
)
@click.option(
    "--samples", default=200, show_default=True, type=click.IntRange(20), help="For each of them."
)
@click.option("--sample-tokens", default=8, show_default=True, type=click.IntRange(2, 64))
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(0.01, 2))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0.01, 1))
@click.option(
    "--effect",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0.001, 1),
    help="Total variation per token that must not go unseen.",
)
@click.option(
    "--false-alarm-rate",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0.001, 0.2),
    help="Of all sampling tests together.",
)
@click.option(
    "--concurrency",
    default=32,
    show_default=True,
    type=click.IntRange(1, 512),
    help="Outputs at once.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def verify(
    *,
    study: Path | None,
    arms: tuple[str, ...],
    baseline: str | None,
    candidate: str | None,
    model: str | None,
    prompts: str | None,
    api: str,
    api_key_env: str | None,
    store: Path | None,
    only: str | None,
    prompt_count: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Is the output unchanged by speculation?

    STUDY is a study file or folder, whose servers are started as for `measure`; or give two servers
    with --baseline and --candidate. Greedy outputs are compared token by token, sampled ones by
    tests with a stated false-alarm rate and power.

    Exit code 0: unchanged. 1: changed. 3: cannot tell.
    """
    from specwise.analysis.losslessness import evaluate  # noqa: PLC0415 - numpy loads here
    from specwise.measurement.store import StudyFolder  # noqa: PLC0415
    from specwise.measurement.verification import (  # noqa: PLC0415
        VerifyPlan,
        collect,
        prompts_of,
        write_losslessness,
    )

    folder = None
    if study is not None and study.is_dir():
        store = store or study
    if store is not None:
        folder = StudyFolder.open(store)
    if (study is None) == (baseline is None or candidate is None):
        raise InputError(
            "Give a study file or folder, or two servers with --baseline and --candidate.",
            "`specwise verify --help` shows both.",
        )
    if study is None:
        design = _two_servers(
            baseline,
            candidate,
            model=model,
            prompts=prompts,
            api=Api(api),
            api_key_env=api_key_env,
            arms=arms,
        )
        base = Path.cwd()
    else:
        design, base = _from_study(study, arms)
    if folder is not None:
        _check_belongs(design, folder.design, folder.path)
    plan = VerifyPlan(
        greedy=only != "sampling", sampling=only != "greedy", prompts=prompt_count, **options
    )
    known = folder.provenance.get("arms", {}) if folder and study is not None else {}
    chosen = prompts_of(design, base, prompt_count)
    results: list[LosslessnessResult] = []
    with _logs(folder.path if folder else None) as logs:
        for answers in collect(
            design,
            chosen,
            plan,
            log_path=lambda arm: logs / f"{arm}.log",
            known=known,
            note=lambda text: click.echo(f"  {text}", err=True),
        ):
            result = evaluate(
                plan,
                answers.baseline,
                answers.candidate,
                arm=answers.arm.name,
                model=answers.model,
                measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                versions=answers.versions,
            )
            results.append(result)
            if folder is not None:
                write_losslessness(folder.path, result)
            if not as_json:
                _show(result)
    if as_json:
        import orjson  # noqa: PLC0415

        click.echo(orjson.dumps({"results": results}, option=orjson.OPT_INDENT_2))
    sys.exit(exit_code([result.verdict for result in results]))


@contextmanager
def _logs(study: Path | None) -> Iterator[Path]:
    """Where servers log: the study's folder, else one that outlives a failure, which names it."""
    logs = study / "logs" if study else Path(tempfile.mkdtemp(prefix="specwise-verify-"))
    try:
        yield logs
    except KeyboardInterrupt:
        raise StoppedError("Stopped; results of arms that were finished are kept.") from None
    except SpecwiseError:
        if study is None and not any(logs.iterdir()):
            logs.rmdir()
        raise
    if study is None:
        shutil.rmtree(logs, ignore_errors=True)


def exit_code(verdicts: Sequence[Losslessness]) -> int:
    """1 if any arm's output is changed, else 3 if any cannot be told, else 0."""
    for verdict in (Losslessness.CHANGED, Losslessness.UNKNOWN):
        if verdict in verdicts:
            return _EXIT_CODES[verdict]
    return 0


def _show(result: LosslessnessResult) -> None:
    from specwise.reporting.losslessness import print_losslessness  # noqa: PLC0415

    print_losslessness(result)


def _from_study(path: Path, arms: tuple[str, ...]) -> tuple[StudyDesign, Path]:
    """The design of a study file or folder with the wanted arms, and where its paths count from."""
    from specwise.measurement.design import read_study_file  # noqa: PLC0415
    from specwise.measurement.store import StudyFolder  # noqa: PLC0415

    if path.is_dir():
        folder = StudyFolder.open(path)
        design, base = folder.design, Path(folder.provenance.get("base", "."))
    else:
        design, _ = read_study_file(path)
        base = path.resolve().parent
    candidates = {arm.name: arm for arm in design.arms[1:]}
    unknown = [name for name in arms if name not in candidates]
    if unknown:
        raise InputError(
            f"{path} has no speculating arm {unknown[0]!r}.",
            f"It has {', '.join(candidates)}.",
        )
    chosen = [candidates[name] for name in arms] or list(candidates.values())
    return replace(design, arms=(design.arms[0], *chosen)), base


def _two_servers(
    baseline: str | None,
    candidate: str | None,
    *,
    model: str | None,
    prompts: str | None,
    api: Api,
    api_key_env: str | None,
    arms: tuple[str, ...],
) -> StudyDesign:
    """A design of two servers that run already, as far as the check needs one."""
    assert baseline is not None  # noqa: S101 - checked by the caller
    assert candidate is not None  # noqa: S101
    if prompts is None:
        raise InputError(
            "Two servers need prompts to answer.",
            "Add --prompts with bundled:prose, or a file of yours as a study's segment names it.",
        )
    for url in (baseline, candidate):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is not a URL.", "Give http://HOST:PORT.")
    if len(arms) > 1:
        raise InputError("Two servers are one arm.", "Give --arm once, or not at all.")

    def arm(name: str, url: str, speculation: Speculation | None) -> Arm:
        bare = url.rstrip("/").removesuffix("/v1")
        return Arm(name, speculation, url=bare, model=model, api_key_env=api_key_env)

    name = arms[0] if arms else "candidate"
    load = LoadPoint(Loop.CLOSED, 1)
    return StudyDesign(
        name="verify",
        seed=0,
        arms=(
            arm("baseline", baseline, None),
            arm(name, candidate, Speculation("as its server was started", k=0)),
        ),
        segments=(Segment("prompts", prompts, api=api),),
        workloads=(),
        loads=(load,),
        production_load=load,
        production_workload="prompts",
        slo=Slo(),
        trials=(),
        timeout_s=600.0,
    )


def _check_belongs(design: StudyDesign, stored: StudyDesign, path: Path) -> None:
    """A result may only be kept with the study that has its arms."""
    known = {arm.name for arm in stored.arms[1:]}
    foreign = [arm.name for arm in design.arms[1:] if arm.name not in known]
    if foreign:
        raise InputError(
            f"The study in {path} has no speculating arm {foreign[0]!r}.",
            f"Name the arm that was checked with --arm: {', '.join(sorted(known))}.",
        )
