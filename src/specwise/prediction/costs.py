"""What one engine step costs in seconds: the shape of a step, and who can price it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one engine step computes; each field a number, or an array over steps.

    ``tokens`` are new tokens through the target: for each decoding request 1 + its drafts, plus the
    chunks of prompts. ``context_tokens`` are the cache entries attended, the new ones included,
    summed over requests. ``requests`` get output in this step: the drafter's batch. ``k`` drafts
    are then proposed for each of them; with speculation on, k = 0 still runs the first pass.
    """

    tokens: Any
    context_tokens: Any
    requests: Any
    k: Any


class StepCosts(Protocol):
    """Seconds for a step and its parts; arrays in give arrays out, by the same formula."""

    @property
    def speculates(self) -> bool:
        """Whether a drafter runs."""
        ...

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:
        """The target's pass."""
        ...

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:
        """The drafter: a first pass over all ``tokens``, then k - 1 over ``requests`` tokens."""
        ...

    def overhead_s(self, requests: Any, k: Any) -> Any:
        """Host work that is not hidden behind the passes."""
        ...

    def step_s(self, shape: StepShape) -> Any:
        """The whole step, with whatever overlap the model says."""
        ...
