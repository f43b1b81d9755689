"""A draft length for each batch size, from the loads that were measured (req E4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScheduleProposal:
    """Rows (first batch size, last batch size, k) that start at 1, touch, and never grow in k.

    ``confirmed`` is False for a proposal: no trial has run it yet.
    """

    arm: str
    rows: tuple[tuple[int, int, int], ...]
    reason: str
    confirmed: bool
