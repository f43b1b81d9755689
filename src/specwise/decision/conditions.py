"""Each rule as a condition: measured value, threshold, where it came from, pass or fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "unknown"]
Kind = Literal["measured", "rule of thumb", "published"]


@dataclass(frozen=True, slots=True)
class Condition:
    """One rule applied to this study.

    ``id`` is the requirement's (G2) or the rule's own short name. ``scope`` names what it was
    applied to: "" for the study, otherwise "arm", "arm/workload" or "arm/workload/segment".
    ``kind`` ranks it: a rule of thumb or a published figure never outranks a measurement.
    ``veto`` is True where failing rules "on" out, whatever the effects say.
    ``evidence`` are the ids of the trials it was computed from.
    """

    id: str
    question: str
    value: str
    threshold: str
    source: str
    status: Status
    scope: str
    evidence: tuple[str, ...]
    kind: Kind
    veto: bool = False
