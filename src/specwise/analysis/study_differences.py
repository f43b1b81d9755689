"""What differs between two studies, and what each difference does to a comparison of them.

A comparison of two sittings is only as good as what stayed the same. Differences of what was asked
(prompts, sampling) make it invalid, differences of the machine spoil its times, and the rest is
either the change under test or a suspect beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from specwise.domain import Arm, Segment, StudyData
from specwise.errors import InputError


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same in the two studies.

    ``where`` is "arm NAME", "segment NAME", "machine" or "study"; ``before`` and ``after`` are
    words for a table. ``effect`` says what it does to the comparison: "change" is what may have
    caused an effect, "times" makes times incomparable, "caution" weakens it; ``consequence`` says
    how.
    """

    where: str
    what: str
    before: str
    after: str
    effect: Literal["change", "times", "caution"]
    consequence: str = ""


@dataclass(frozen=True, slots=True)
class ArmPair:
    """The arm of the first study and the one of the second that it is compared with."""

    before: Arm
    after: Arm

    @property
    def name(self) -> str:
        """The arm's name, both names where they differ."""
        if self.before.name == self.after.name:
            return self.before.name
        return f"{self.before.name} → {self.after.name}"


def pair_arms(before: StudyData, after: StudyData) -> tuple[ArmPair, ...]:
    """Arms of one name; where no candidate's name is shared, the only candidate of each study.

    The baselines (first arms) are paired whatever they are called. Raises InputError when no
    speculating arm can be paired: then there is no acceptance to compare.
    """
    arms_before, arms_after = before.design.arms, after.design.arms
    pairs = []
    if arms_before[0].is_baseline and arms_after[0].is_baseline:
        pairs.append(ArmPair(arms_before[0], arms_after[0]))
    candidates = [[a for a in arms if not a.is_baseline] for arms in (arms_before, arms_after)]
    by_name = {arm.name: arm for arm in candidates[1]}
    named = [ArmPair(arm, by_name[arm.name]) for arm in candidates[0] if arm.name in by_name]
    if not named and len(candidates[0]) == len(candidates[1]) == 1:
        named = [ArmPair(candidates[0][0], candidates[1][0])]
    if not named:
        raise InputError(
            "The studies have no speculating arm in common: "
            f"{_names(candidates[0])} in {before.folder}, {_names(candidates[1])} in "
            f"{after.folder}.",
            "Give the arms to compare the same name in both study files and measure again.",
        )
    return (*pairs, *named)


def shared_segments(before: StudyData, after: StudyData) -> tuple[str, ...]:
    """Segments that asked both servers the same thing.

    Raises InputError, naming every obstacle, when a segment of one name has other prompts, another
    temperature, top_p or API: its acceptance would differ for that reason alone. Also when no
    segment is shared.
    """
    names = [s.name for s in before.design.segments]
    shared = [s.name for s in after.design.segments if s.name in names]
    if not shared:
        raise InputError(
            "The studies have no segment in common: "
            f"{', '.join(names)} before, {_names(after.design.segments)} after.",
            "Measure both with the same study file; only the change under test may differ.",
        )
    obstacles = [
        f"segment {name!r}: {obstacle}"
        for name in shared
        for obstacle in _obstacles(before, after, name)
    ]
    if obstacles:
        raise InputError(
            f"These studies cannot be compared: {'; '.join(obstacles)}.",
            "Measure again with the same segments; only the change under test may differ.",
        )
    return tuple(shared)


def _obstacles(before: StudyData, after: StudyData, name: str) -> Iterator[str]:
    a, b = before.design.segment(name), after.design.segment(name)
    digests = [study.provenance.get("prompts", {}).get(name) for study in (before, after)]
    if None not in digests and digests[0] != digests[1]:
        yield "other prompts (their digests differ)"
    if a.temperature != b.temperature:
        yield f"temperature {a.temperature:g} before, {b.temperature:g} after"
    if a.top_p != b.top_p:
        yield f"top_p {a.top_p:g} before, {b.top_p:g} after"
    if a.api is not b.api:
        yield f"sent to {a.api} before, {b.api} after"


def find_differences(
    before: StudyData, after: StudyData, arms: Iterable[ArmPair]
) -> tuple[Difference, ...]:
    """Everything that the manifests show to differ, the changes of the arms first."""
    found: list[Difference] = []
    for pair in arms:
        found += _of_arm(pair, _served(before, pair.before), _served(after, pair.after))
    found += _of_machine(before.provenance, after.provenance)
    found += _of_design(before, after)
    return tuple(found)


def identical(before: StudyData, after: StudyData, pair: ArmPair) -> bool:
    """Whether an arm was served the same in both studies: a control for the machine's drift."""
    return not list(_of_arm(pair, _served(before, pair.before), _served(after, pair.after)))


def target_bits(study: StudyData, arm: Arm) -> float | None:
    """Bits per weight of the arm's target: 16 where not quantised, None where it is not known."""
    return _bits(_served(study, arm).get("checkpoint"))


def draft_bits(study: StudyData, arm: Arm) -> float | None:
    """Bits per weight of the arm's draft model, None where there is none or it is not known."""
    return _bits(_served(study, arm).get("draft_checkpoint"))


def _bits(checkpoint: Any) -> float | None:
    if not isinstance(checkpoint, Mapping) or "weight_bits" not in checkpoint:
        return None
    return float(checkpoint["weight_bits"])


def _served(study: StudyData, arm: Arm) -> Mapping[str, Any]:
    """What the study noted about the arm's server; empty for a study that noted nothing."""
    described: Mapping[str, Any] = study.provenance.get("arms", {}).get(arm.name, {})
    return described


def _of_arm(pair: ArmPair, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    where = f"arm {pair.name}"

    def changed(what: str, before: object, after: object) -> Iterator[Difference]:
        if before != after:
            yield Difference(where, what, _words(before), _words(after), "change")

    yield from changed("target", _target(pair.before, a), _target(pair.after, b))
    yield from changed("vLLM", a.get("vllm"), b.get("vllm"))
    yield from changed("longest context", a.get("max_model_len"), b.get("max_model_len"))
    deployments = (pair.before.deployment, pair.after.deployment)
    for what in ("engine", "arguments"):
        values = [getattr(d, what) if d is not None else None for d in deployments]
        yield from changed(what, *values)
    # Names only: an environment may hold a token.
    environments = [dict(d.environment) if d is not None else {} for d in deployments]
    for variable in sorted({*environments[0], *environments[1]}):
        if environments[0].get(variable) != environments[1].get(variable):
            words = ["set" if variable in held else "not set" for held in environments]
            after = "another value" if words == ["set", "set"] else words[1]
            yield Difference(where, f"variable {variable}", words[0], after, "change")
    first, second = pair.before.speculation, pair.after.speculation
    if first is not None and second is not None:
        yield from changed(
            "draft",
            _with_weights(first.draft, a.get("draft_checkpoint")),
            _with_weights(second.draft, b.get("draft_checkpoint")),
        )
        for what in ("method", "k", "schedule", "options"):
            yield from changed(what, getattr(first, what), getattr(second, what))


def _target(arm: Arm, served: Mapping[str, Any]) -> object:
    if arm.deployment is not None:
        return _with_weights(arm.deployment.model, served.get("checkpoint"))
    return arm.model or served.get("served_models")


def _with_weights(model: str | None, described: Any) -> str | None:
    """A model's name with what identifies its weights, where the study noted it."""
    if not described:
        return model
    bits, digest = described.get("weight_bits"), described.get("config_and_headers_sha256", "")
    size = described.get("weights_bytes")
    words = [f"{bits:g}-bit"] if bits else []
    words += [f"{size / 1e6:,.0f} MB"] if size else []
    return f"{model} ({', '.join([*words, f'sha256 {digest[:8]}'])})"


def _of_machine(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for key, what in (("processor", "processor"), ("cores", "cores"), ("gpus", "GPUs")):
        if key in a and key in b and a[key] != b[key]:
            yield Difference(
                "machine",
                what,
                _words(a[key]),
                _words(b[key]),
                "times",
                "times are of two machines: only acceptance is compared",
            )
    for key, what in (("system", "system"), ("specwise", "specwise"), ("python", "Python")):
        if key in a and key in b and a[key] != b[key]:
            yield Difference("machine", what, _words(a[key]), _words(b[key]), "caution")


def _of_design(before: StudyData, after: StudyData) -> Iterator[Difference]:
    a, b = before.design, after.design
    if a.seed != b.seed:
        yield Difference(
            "study",
            "seed",
            str(a.seed),
            str(b.seed),
            "caution",
            "other prompts were drawn from the same sources; only shared ones are paired",
        )
    if a.slo != b.slo:
        yield Difference(
            "study",
            "SLO",
            _words(a.slo),
            _words(b.slo),
            "caution",
            "goodput of both is judged by the second study's SLO",
        )
    loads = [sorted({load.label for load in design.loads}) for design in (a, b)]
    if loads[0] != loads[1]:
        yield Difference(
            "study",
            "loads",
            ", ".join(loads[0]),
            ", ".join(loads[1]),
            "caution",
            "only loads that both measured are compared",
        )
    for segment in a.segments:
        other = next((s for s in b.segments if s.name == segment.name), None)
        if other is not None and other.max_tokens != segment.max_tokens:
            yield Difference(
                f"segment {segment.name}",
                "max_tokens",
                str(segment.max_tokens),
                str(other.max_tokens),
                "times",
                "outputs of other lengths take other times, and acceptance varies along an output",
            )
    for name, where in _unshared([s.name for s in a.segments], [s.name for s in b.segments]):
        yield Difference("study", f"segment {name}", *where, "caution", "it is not compared")


def _unshared(a: list[str], b: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for name in a:
        if name not in b:
            yield name, ("measured", "not measured")
    for name in b:
        if name not in a:
            yield name, ("not measured", "measured")


def _words(value: object) -> str:
    match value:
        case None | "" | () | []:
            return "–"
        case Mapping():
            return " ".join(f"{key}={_words(held)}" for key, held in value.items()) or "–"
        case tuple() | list():
            return " ".join(_words(item) for item in value)
        case _:
            return str(value)


def _names(items: Iterable[Arm | Segment]) -> str:
    return ", ".join(item.name for item in items) or "none"
