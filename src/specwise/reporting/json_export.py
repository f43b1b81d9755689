"""The whole assessment as JSON: stable keys, no NaN, no prompt, no output text, no secret."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import orjson

from specwise.analysis.comparison import Effect
from specwise.decision.assessment import Assessment
from specwise.domain import Arm, LoadPoint, MeasuredTrial, Outcome, StudyDesign
from specwise.reporting.experiment_sheets import findings_of
from specwise.reporting.export import whole_file

SCHEMA_VERSION: Final = 1

_SECRET_FLAG = re.compile(r"(--(?:api-key|hf-token)(?:=|\s+))(?:\"[^\"]*\"|'[^']*'|\S+)")
_HIDDEN = "***"


def assessment_to_dict(assessment: Assessment) -> dict[str, Any]:
    """Everything but the raw records, as JSON types only.

    A number that is not finite becomes None. Every object of a kind has the same keys. Values of
    environment variables, API keys inside arguments and passwords inside URLs are left out.
    """
    study = assessment.study
    return {
        "schema_version": SCHEMA_VERSION,
        "predicted": study.predicted,
        "provenance": without_secrets(json_types(study.provenance)),
        "design": _design(study.design),
        "verdict": json_types(assessment.verdict),
        "conditions": json_types(assessment.conditions),
        "effects": json_types(assessment.effects),
        "noise_floors": json_types(assessment.noise_floors),
        "signatures": json_types(assessment.signatures),
        "crossovers": json_types(assessment.crossovers),
        "summaries": json_types(assessment.summaries),
        "acceptance": json_types(assessment.acceptance),
        "experiment": _experiment(assessment),
        "warnings": list(assessment.warnings),
        "trials": [_trial(measured) for measured in study.trials],
    }


def _experiment(assessment: Assessment) -> dict[str, Any] | None:
    """The experiment's name, its answer in sentences, its result, and what was not run, and why."""
    if assessment.experiment is None:
        return None
    return {
        "name": assessment.study.design.experiment,
        "sentences": list(findings_of(assessment.experiment).sentences),
        "result": json_types(assessment.experiment),
        "skipped_trials": dict(assessment.study.skipped),
    }


def write_json(assessment: Assessment, path: Path) -> None:
    """Write `assessment_to_dict` to ``path``, indented; StoreError when it cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_bytes(
            orjson.dumps(
                assessment_to_dict(assessment),
                option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE,
            )
        )


def without_secrets(value: Any) -> Any:
    """JSON types with API keys in commands and passwords in URLs replaced by ``***``."""
    if isinstance(value, str):
        return _SECRET_FLAG.sub(rf"\1{_HIDDEN}", _without_password(value))
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        hide_next = False
        shown = []
        for item in value:
            shown.append(_HIDDEN if hide_next else without_secrets(item))
            hide_next = item in ("--api-key", "--hf-token")
        return shown
    return value


def _without_password(text: str) -> str:
    if "://" not in text or "@" not in text or " " in text:
        return text
    parts = urlsplit(text)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _design(design: StudyDesign) -> dict[str, Any]:
    plain: dict[str, Any] = json_types(design)
    del plain["trials"]  # what was measured of them stands under the top-level "trials"
    plain["arms"] = [_arm(arm) for arm in design.arms]
    return plain


def _arm(arm: Arm) -> dict[str, Any]:
    plain: dict[str, Any] = without_secrets(json_types(arm))
    if arm.deployment is not None:
        plain["deployment"]["environment"] = sorted(arm.deployment.environment)
    return plain


def _trial(measured: MeasuredTrial) -> dict[str, Any]:
    plain: dict[str, Any] = json_types(measured.trial)
    failed = sum(record.outcome is not Outcome.OK for record in measured.records)
    return plain | {
        "complete": measured.complete,
        "recorded": len(measured.records),
        "failed": failed,
        "parts": json_types(measured.parts),
    }


def json_types(value: Any) -> Any:  # noqa: PLR0911 (one return a kind of value)
    """``value`` in JSON types: fields by name, what is not finite as None, else as text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: json_types(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Effect):
            fields["direction"] = value.direction
        elif isinstance(value, LoadPoint):
            fields["label"] = value.label
        return fields
    if isinstance(value, Mapping):
        return {str(key): json_types(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [json_types(item) for item in value]
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
