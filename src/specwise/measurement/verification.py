"""Losslessness evidence in a study folder: written by `specwise verify`, read by the decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from specwise.domain import LosslessnessResult
from specwise.errors import StoreError

EVIDENCE_FILE = "verify.json"
EVIDENCE_SCHEMA = 1

_RESULT = TypeAdapter(LosslessnessResult)


def read_losslessness(folder: Path) -> tuple[LosslessnessResult, ...]:
    """The latest result for each arm of the study in ``folder``; empty if none was ever stored.

    Raises StoreError for a file that is damaged or of another schema.
    """
    path = folder / EVIDENCE_FILE
    try:
        content: Any = orjson.loads(path.read_bytes())
        version = content["schema_version"]
        if version != EVIDENCE_SCHEMA:
            raise StoreError(
                f"{path} was written with schema {version}; this specwise reads {EVIDENCE_SCHEMA}.",
                "Remove it and run `specwise verify` again.",
            )
        return tuple(_RESULT.validate_python(result) for result in content["results"])
    except FileNotFoundError:
        return ()
    except (orjson.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise StoreError(
            f"{path} is damaged.", "Remove it and run `specwise verify` again."
        ) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error


def write_losslessness(folder: Path, result: LosslessnessResult) -> Path:
    """Store ``result`` beside the study's trials, in place of an earlier one of the same arm."""
    others = [kept for kept in read_losslessness(folder) if kept.arm != result.arm]
    content = {"schema_version": EVIDENCE_SCHEMA, "results": [*others, result]}
    path = folder / EVIDENCE_FILE
    temporary = path.with_suffix(".json.new")
    try:
        temporary.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
    return path
