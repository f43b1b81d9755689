"""`specwise flags --from STUDY`: the command that a study's verdict recommends, and its rollout."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import orjson

from specwise.cli.checked_command import FORMATS, Checked, answer, check, say_findings
from specwise.cli.studies import read_assessment
from specwise.decision.assessment import Assessment
from specwise.decision.verdict import Decision
from specwise.domain import Arm, Deployment, Speculation, StudyData
from specwise.errors import CommandError, InputError, MeasurementError
from specwise.monitoring.rollout import Serving, plan_rollout, to_markdown
from specwise.reporting.json_export import json_types
from specwise.vllm.command import Flag, ServeCommand, Version, names, read_words, to_words
from specwise.vllm.findings import SCHEDULE
from specwise.vllm.flags import ServeOptions, serve_command
from specwise.vllm.server import EMBEDDED, EMBEDDED_ENVIRONMENT

_API_SERVER = ("python", "-m", "vllm.entrypoints.openai.api_server")
_SECRET_FLAGS = ("--api-key", "--hf-token")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_EAGER = ("--enforce-eager", "--no-enforce-eager", "--compilation-config")
_NOTHING = "# Nothing to add: serve without a speculative configuration."


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be served: the deployment of ``arm`` with ``speculation``, None for without.

    ``confirmed`` is False for a schedule that no trial has run; ``forced`` says that the user named
    the arm. ``remark`` says where the choice comes from.
    """

    arm: Arm
    speculation: Speculation | None
    remark: str
    confirmed: bool = True
    forced: bool = False


def choose(assessment: Assessment, *, arm: str | None = None) -> Choice:
    """The arm of the verdict, or ``arm`` as it was measured.

    Raises InputError for an arm that the study does not have, MeasurementError (exit code 3) where
    the verdict is to measure more.
    """
    design, verdict = assessment.study.design, assessment.verdict
    if arm is not None:
        named = next((a for a in design.arms if a.name == arm), None)
        if named is None:
            raise InputError(
                f"Study {design.name} has no arm {arm!r}.",
                f"It has {', '.join(a.name for a in design.arms)}.",
            )
        remark = f"{arm} as it was measured. The verdict is {verdict.decision}: {verdict.headline}"
        return Choice(named, named.speculation, remark, forced=True)
    if verdict.decision is Decision.OFF:
        return Choice(design.arms[0], None, verdict.headline)
    if verdict.decision is Decision.MEASURE_MORE or verdict.arm is None:
        following = [trial.what for trial in verdict.next_trials[:1]] or verdict.reasons[-1:]
        arms = ", ".join(a.name for a in design.arms)
        raise MeasurementError(
            f"Study {design.name} cannot say what to serve. {verdict.headline}",
            " ".join([*following, f"Or name an arm yourself with --arm: {arms}."]),
        )
    chosen = design.arm(verdict.arm)
    speculation, confirmed = chosen.speculation, True
    if verdict.schedule is not None and speculation is not None:
        rows, confirmed = verdict.schedule.rows, verdict.schedule.confirmed
        longest = max(row[2] for row in rows)
        k = speculation.k if confirmed else longest
        speculation = replace(speculation, schedule=rows, k=k)
    return Choice(chosen, speculation, verdict.headline, confirmed)


@dataclass(frozen=True, slots=True)
class Served:
    """A choice as a command for one vLLM version.

    ``checked`` is None where nothing has to be added to a server that specwise did not start;
    ``complete`` is False where the command holds the speculative flags alone.
    """

    version: Version
    checked: Checked | None
    complete: bool
    remarks: tuple[str, ...]

    def text(self, form: str) -> str:
        """The command as shell, yaml or k8s."""
        return _NOTHING if self.checked is None else FORMATS[form](self.checked.command)


def served(
    study: StudyData,
    choice: Choice,
    *,
    version: Version | None = None,
    further: Sequence[str] = (),
) -> Served:
    """The command for ``choice`` on the vLLM that measured it, or on ``version``.

    ``further`` are vLLM arguments of the user's that add to those of the deployment, or replace
    them. Raises CommandError where the version cannot do it, or where a schedule would be lost.
    """
    remarks: list[str] = []
    if version is None:
        version, remarks = _version(_described(study, choice.arm).get("vllm"))
    extra = argument_flags(further)
    if choice.arm.deployment is not None:
        checked = _whole(study, choice, version, extra, remarks)
        return Served(version, checked, complete=True, remarks=tuple(remarks))
    address_only = f"The study knows {choice.arm.name} by its address only: "
    if choice.speculation is None and not extra:
        remarks.append(f"{address_only}it is served as it is.")
        return Served(version, None, complete=False, remarks=tuple(remarks))
    remarks.append(
        f"{address_only}these are the flags to add to the command of a server without speculation."
    )
    checked = _checked(study, choice.arm.model or "MODEL", choice.speculation, version, extra)
    bare = replace(checked.command, model=None, launcher=())
    return Served(version, replace(checked, command=bare), False, tuple(remarks))


def _whole(
    study: StudyData,
    choice: Choice,
    version: Version,
    extra: tuple[Flag, ...],
    remarks: list[str],
) -> Checked:
    """The complete command of a server that specwise started itself; adds to ``remarks``."""
    deployment = choice.arm.deployment
    if deployment is None:
        raise ValueError(f"arm {choice.arm.name} has no deployment")
    recorded = _recorded(_described(study, choice.arm))
    speculation = choice.speculation
    if speculation is not None and speculation.draft is not None:
        ran = (recorded.speculation or {}).get("model")
        speculation = replace(speculation, draft=_where(speculation.draft, ran))
    model = _where(deployment.model, recorded.model)
    draft = speculation.draft if speculation else None
    ours = [name for name in (model, draft) if _is_bundled(name)]
    if ours:
        remarks.append(f"Only specwise knows {' and '.join(map(str, ours))}: give vLLM its folder.")
    replaced = {flag.name for flag in extra}
    own = [f for f in _deployment_flags(deployment, model, remarks) if f.name not in replaced]
    # What ran goes on unchanged where lint could only guess: it would drop these.
    times = Counter(flag.name for flag in own)
    unchecked = tuple(flag for flag in own if times[flag.name] > 1 or not _is_known(flag))
    known = tuple(flag for flag in own if flag not in unchecked)
    checked = _checked(study, model, speculation, version, (*known, *extra))
    launcher: tuple[str, ...] = ("vllm", "serve")
    if deployment.engine == EMBEDDED:
        remarks.append("The study ran on specwise's own engine: vLLM's CPU build.")
        launcher = recorded.launcher if recorded.model else _API_SERVER
    command = replace(
        checked.command,
        flags=(*checked.command.flags, *unchecked),
        environment=_environment(deployment, remarks),
        launcher=launcher,
    )
    return replace(checked, command=command)


def without_speculation(study: StudyData, choice: Choice) -> Choice:
    """What to go back to: the baseline, or the arm's own deployment where that is all there is."""
    baseline = study.design.arms[0]
    if baseline.deployment is None and choice.arm.deployment is not None:
        baseline = choice.arm
    return Choice(baseline, None, "")


def _version(described: object) -> tuple[Version, list[str]]:
    """The version that a server said it has, else the newest known, and a remark."""
    version = Version.of(described)
    if version is not None:
        return version, []
    newest = names().newest
    return newest, [f"The study does not say its vLLM version: written for {newest} (--vllm)."]


def _checked(
    study: StudyData,
    model: str,
    speculation: Speculation | None,
    version: Version,
    extra: tuple[Flag, ...],
) -> Checked:
    """The command after lint; CommandError if that would lose the schedule."""
    instead = f"Until then: `--arm {study.design.arms[0].name}`, without speculation."
    try:
        made = serve_command(
            ServeOptions(model, version, speculation, extra=extra, as_measured=True)
        )
    except CommandError as error:
        if speculation is None or not speculation.schedule:
            raise
        raise CommandError(error.what, f"{error.next_step} {instead}") from error
    draft = None if speculation is None else speculation.draft
    checked = check(made, version, target=model, draft=draft)
    if SCHEDULE in (made.speculation or {}) and SCHEDULE not in (checked.command.speculation or {}):
        why = next((f for f in checked.findings if f.rule.startswith("schedule")), None)
        raise CommandError(
            "The schedule that was decided on cannot work here"
            + (f": {why.what} {why.why}" if why else "."),
            f"Serve it without that. {instead}",
        )
    return checked


def argument_flags(words: Sequence[str]) -> tuple[Flag, ...]:
    """vLLM arguments as flags by their long names; InputError for what belongs to no flag.

    Every word up to the next flag is a value, whether specwise knows the flag or not.
    """
    groups: list[list[str]] = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise InputError(f"{word!r} belongs to no vLLM argument.", "Begin with a --flag.")
    flags = []
    for first, *values in groups:
        read = read_words(["vllm", "serve", "MODEL", first]).flags
        if not read:
            raise InputError(
                f"{first} comes from the study.", "Name another arm with --arm, or leave it out."
            )
        flags.append(replace(read[0], values=(*read[0].values, *values)))
    return tuple(flags)


def _is_known(flag: Flag) -> bool:
    """Whether any vLLM version that specwise knows has the flag."""
    name = flag.name.split(".")[0]
    return name in names().flags or "--" + name.removeprefix("--no-") in names().flags


def _deployment_flags(deployment: Deployment, model: str, remarks: list[str]) -> tuple[Flag, ...]:
    """The deployment's own arguments, without secrets."""
    flags = argument_flags(deployment.arguments)
    secret = [flag.name for flag in flags if flag.name in _SECRET_FLAGS]
    if secret:
        remarks.append(f"Left out, because it is a secret: {', '.join(secret)}. Add it yourself.")
    flags = tuple(flag for flag in flags if flag.name not in _SECRET_FLAGS)
    name = deployment.served_name or (deployment.model if deployment.model != model else "")
    if name:
        flags = (Flag("--served-model-name", (name,)), *flags)
    given = {flag.name for flag in flags}
    if deployment.engine == EMBEDDED and not given.intersection(_EAGER):
        flags = (*flags, Flag("--enforce-eager"))
    return flags


def _environment(deployment: Deployment, remarks: list[str]) -> tuple[tuple[str, str], ...]:
    found = dict(EMBEDDED_ENVIRONMENT) if deployment.engine == EMBEDDED else {}
    found |= deployment.environment
    secret = sorted(name for name in found if _SECRET_NAME.search(name))
    if secret:
        remarks.append(
            f"Left out, because it may be a secret: {', '.join(secret)}. Set it where you serve."
        )
    return tuple((name, value) for name, value in found.items() if name not in secret)


def _described(study: StudyData, arm: Arm) -> Mapping[str, Any]:
    """What the study found out about the server of ``arm``, empty if nothing."""
    found: Mapping[str, Any] = (study.provenance.get("arms") or {}).get(arm.name) or {}
    return found


def _recorded(described: Mapping[str, Any]) -> ServeCommand:
    """The command that the study started, empty if it is not known."""
    words = [str(word) for word in described.get("command") or ()]
    try:
        return read_words(words) if words else ServeCommand(None)
    except CommandError:
        return ServeCommand(None)


def _is_bundled(name: str | None) -> bool:
    return name is not None and name.startswith("bundled:")


def _where(name: str, recorded: object) -> str:
    """A bundled model's folder on the machine that measured; other names as they are."""
    return recorded if _is_bundled(name) and isinstance(recorded, str) else name


def flags_from_study(
    path: Path,
    *,
    arm: str | None,
    version: str | None,
    further: Sequence[str],
    form: str,
    rollout: bool,
    as_json: bool,
) -> int:
    """Print the command, or the rollout note; returns the exit code."""
    folder, assessment = read_assessment(path)
    study = assessment.study
    choice = choose(assessment, arm=arm)
    wanted = Version.parse(version) if version else None
    result = served(study, choice, version=wanted, further=further)
    remarks = [choice.remark, *result.remarks]
    if not choice.confirmed:
        remarks.append(
            "This schedule is put together from trials of fixed k; nobody has run it yet. Measure "
            "it first: `specwise decide` has the lines for the study file."
        )
    if study.predicted or study.provenance.get("predicted"):
        remarks.append("A simulation made this study: it predicts, it did not measure.")
    environment = result.checked.command.environment if result.checked else ()
    if form == "yaml" and environment:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment)
        remarks.append(f"A config file holds no environment. Set: {variables}")
    findings = result.checked.findings if result.checked else ()
    if rollout:
        note = plan_rollout(
            assessment,
            _serving(study, choice, result, form, version=wanted, further=further),
            folder=str(folder),
        )
        text = to_markdown(note)
        content: dict[str, Any] = {"rollout": json_types(note), "markdown": text}
    else:
        text = result.text(form) + "\n"
        content = _answer(result, form)
    if as_json:
        where = {
            "study": study.design.name,
            "arm": choice.arm.name,
            "decision": assessment.verdict.decision.value,
            "confirmed": choice.confirmed,
            "complete": result.complete,
            "remarks": remarks,
        }
        click.echo(orjson.dumps(where | content, option=orjson.OPT_INDENT_2))
    else:
        for remark in remarks:
            click.echo(f"note: {remark}", err=True)
        say_findings(findings)
        click.echo(text, nl=False)
    return 1 if result.checked is not None and result.checked.refused else 0


def _serving(
    study: StudyData,
    choice: Choice,
    result: Served,
    form: str,
    *,
    version: Version | None,
    further: Sequence[str],
) -> Serving:
    """What the rollout note says of the command and of the way back."""
    back = served(study, without_speculation(study, choice), version=version, further=further)
    without = back.text(form)
    if choice.speculation is not None and result.checked is not None and not result.complete:
        flags = [word for word in to_words(result.checked.command) if word.startswith("--")]
        without = f"# Restart the server without {' '.join(flags)}."
    return Serving(
        arm=choice.arm.name,
        speculation=choice.speculation,
        command=result.text(form),
        without=without,
        vllm=str(result.version),
        complete=result.complete,
        confirmed=choice.confirmed,
        forced=choice.forced,
    )


def _answer(result: Served, form: str) -> dict[str, Any]:
    if result.checked is None:
        return {
            "vllm": str(result.version),
            "words": [],
            "speculative_config": None,
            "notes": {},
            "findings": [],
            form: _NOTHING,
        }
    return answer(result.checked, result.version, form)
