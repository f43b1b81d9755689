"""The load at which speculation stops paying, with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specwise.domain import Loop

Outcome = Literal["crosses", "always better", "always worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Crossover:
    """Where the speedup of an arm passes 1 as the load grows (req I5).

    ``load_value`` is the estimate in the unit of ``loop`` (concurrency or requests/s), None where
    the measured loads show no change of sign. ``low`` and ``high`` bound it at 95 %; None means
    "outside the measured loads" (below the smallest, above the largest). "always" means over the
    loads measured, ``loads``, never beyond them.
    """

    arm: str
    workload: str
    segment: str | None
    outcome: Outcome
    load_value: float | None
    low: float | None
    high: float | None
    loop: Loop
    loads: tuple[float, ...]
    note: str
