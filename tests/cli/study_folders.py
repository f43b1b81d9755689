"""Studies of the tests, written as the folders that commands read."""

from __future__ import annotations

from pathlib import Path

from specwise.domain import StudyData
from specwise.measurement.store import StudyFolder


def write_study(path: Path, data: StudyData) -> Path:
    """``data`` as a study folder at ``path``."""
    folder = StudyFolder.create(path, data.design, data.provenance, "")
    for measured in data.trials:
        with folder.recording(measured.trial) as writer:
            for record in measured.records:
                writer.request(record)
            for part in measured.parts:
                writer.part(part)
            if measured.complete:
                writer.complete()
    return folder.path
