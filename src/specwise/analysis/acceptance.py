"""How much of what was drafted was accepted, per cell, position and request."""

from __future__ import annotations

from dataclasses import dataclass

from specwise.domain import AcceptanceSource, LoadPoint


@dataclass(frozen=True, slots=True)
class RequestSpread:
    """Acceptance rate per request: a distribution, because the mean hides the losing requests.

    ``below_half`` is the share of requests with a rate below 0.5.
    """

    requests: int
    source: AcceptanceSource
    p10: float
    p50: float
    p90: float
    below_half: float


@dataclass(frozen=True, slots=True)
class AcceptanceSummary:
    """Acceptance of one cell (``segment`` None: the whole workload).

    ``rate`` is accepted / drafted tokens, None where the source cannot tell what was drafted;
    ``length`` is 1 + accepted / verify steps. ``unconditional[i]`` is the share of verify steps
    that accepted at least i + 1 drafts; ``conditional[i]`` the same among those that accepted i.
    Both are empty for an arm whose draft length follows the batch size: its positions are not
    drafted equally often, so only ``rate`` and ``length`` mean something (``note`` says so).
    ``temperature`` is None where the cell's requests differ in it.
    """

    arm: str
    workload: str
    segment: str | None
    load: LoadPoint
    source: AcceptanceSource
    requests: int
    steps: int
    drafted: int | None
    accepted: int
    rate: float | None
    length: float | None
    unconditional: tuple[float, ...]
    conditional: tuple[float, ...]
    per_request: RequestSpread | None
    k: int | None
    temperature: float | None
    note: str
    trial_ids: tuple[str, ...]
