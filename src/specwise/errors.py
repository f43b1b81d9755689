"""What can go wrong, as a tree. Each message says what is wrong and what to do next.

SpecwiseError
├── InputError            the user's file, flag or value is wrong               exit code 2
│   ├── StudyFileError    a study TOML that cannot be used
│   ├── PromptError       a prompt source that is missing, empty or malformed
│   ├── CheckpointError   a model folder, hub id or config that cannot be read
│   └── CommandError      a vLLM command that cannot be parsed
├── MeasurementError      it could not be measured                              exit code 3
│   ├── ServerError       a server did not start, died or cannot be reached
│   ├── EngineError       the embedded engine could not be installed or used
│   └── StoreError        a study folder that cannot be read or written
└── StoppedError          the user stopped it; what was measured is kept        exit code 3
"""

from __future__ import annotations


class SpecwiseError(Exception):
    """Root of the tree: ``what`` is wrong and what the user can do ``next``."""

    exit_code = 2

    def __init__(self, what: str, next_step: str = "") -> None:
        super().__init__(f"{what}\n{next_step}" if next_step else what)
        self.what = what
        self.next_step = next_step


class InputError(SpecwiseError):
    """The user's file, flag or value is wrong."""


class StudyFileError(InputError):
    """A study TOML that cannot be used."""


class PromptError(InputError):
    """A prompt source that is missing, empty or malformed."""


class CheckpointError(InputError):
    """A model folder, hub id or config that cannot be read."""


class CommandError(InputError):
    """A vLLM command that cannot be parsed."""


class MeasurementError(SpecwiseError):
    """It could not be measured."""

    exit_code = 3


class ServerError(MeasurementError):
    """A server did not start, died or cannot be reached."""


class EngineError(MeasurementError):
    """The embedded engine could not be installed or used."""


class StoreError(MeasurementError):
    """A study folder that cannot be read or written."""


class StoppedError(MeasurementError):
    """The user stopped it; what was measured is kept."""
