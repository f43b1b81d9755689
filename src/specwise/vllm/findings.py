"""What lint finds, and the working copy of a command that its rules look at and repair."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from specwise.vllm.command import ServeCommand, Version

ERROR, WARNING, ADVICE = "error", "warning", "advice"
METRICS_FLAG = "--per-request-spec-decode-metrics"
K = "num_speculative_tokens"
SCHEDULE = "num_speculative_tokens_per_batch_size"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know about a command: what, why it matters, what to do, and who says so."""

    rule: str
    severity: str
    what: str
    why: str
    fix: str
    source: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What lint needs to know of a checkpoint, where its metadata can be read."""

    vocab_size: int | None = None
    quantization: str | None = None
    max_positions: int | None = None


@functools.cache
def catalogue() -> Mapping[str, Mapping[str, str]]:
    """Severity, why and source of every rule (``lint.toml``), by rule id."""
    text = resources.files("specwise.vllm").joinpath("lint.toml").read_text(encoding="utf-8")
    rules: dict[str, dict[str, str]] = tomllib.loads(text)
    return rules


@dataclass(slots=True)
class Work:
    """The command being repaired and what was found so far."""

    command: ServeCommand
    version: Version
    target: ModelFacts
    draft: ModelFacts
    findings: list[Finding] = field(default_factory=list)

    def report(self, rule: str, what: str, fix: str = "", **sharper: str) -> None:
        """Add a finding of a rule; ``fix`` and ``sharper`` replace what the catalogue says."""
        entry = {"fix": "", **catalogue()[rule], **sharper}
        if fix:
            entry["fix"] = fix
        self.findings.append(Finding(rule=rule, what=what, **entry))

    @property
    def spec(self) -> dict[str, Any]:
        """A copy of the speculative configuration, empty if there is none."""
        return dict(self.command.speculation or {})

    def set_spec(self, **values: Any) -> None:
        """Change fields of the speculative configuration; None removes a field."""
        config = self.spec
        for name, value in values.items():
            if value is None:
                config.pop(name, None)
            else:
                config[name] = value
        self.command = replace(self.command, speculation=config)

    def whole(self, flag: str, default: int) -> int:
        """The flag as a whole number, the default if it is absent or none."""
        value = whole_number(self.command.get(flag))
        return default if value is None else value


def whole_number(text: str | None) -> int | None:
    """A whole number, 1k and 1K included as vLLM reads them."""
    if text is None:
        return None
    factors = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}
    try:
        if text[-1:] in factors:
            return int(float(text[:-1]) * factors[text[-1]])
        return int(text)
    except (ValueError, OverflowError):
        return None
