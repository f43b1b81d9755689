"""A request inside the simulated engine: what it will accept, where it stands, what it gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Piece(NamedTuple):
    """Consecutive steps in which a request had output: the tokens of each, and what it accepted.

    ``accepted`` is -1 in a step without drafts, None where no step had any; all others verified
    ``drafts``.
    """

    first: int
    tokens: Ints
    accepted: Ints | None
    drafts: int


class LiveRequest:
    """A request inside the engine: the caller reads, the engine writes.

    ``runs[j]`` is how many drafts verify step j would accept if that many were drafted, ``hits[j]``
    whether it has drafts at all (None: always). ``pieces`` is its output so far.
    """

    def __init__(
        self,
        number: int,
        *,
        prompt: int,
        output: int,
        arrival_s: float,
        runs: Ints,
        hits: NDArray[np.bool_] | None = None,
        cached: int = 0,
    ) -> None:
        self.number = number
        self.prompt = prompt
        self.output = output
        self.arrival_s = arrival_s
        self.runs = runs
        self.hits = hits
        self.cached = cached
        self.admitted_s = self.finished_s = -1.0
        self.preemptions = 0
        self.pieces: list[Piece] = []
        # The state at the start of the open plan, or now if there is none.
        self.done = 0  # output tokens
        self.cursor = 0  # decode steps taken
        self.held = 0  # cache blocks
        self.computed = 0  # tokens in the cache, while in prefill
        self.plan: Plan | None = None
        self.ticket = 0  # tells current entries of the completion heap from outdated ones

    @property
    def target(self) -> int:
        """Tokens to compute before the next output: the prompt, and what a preemption took."""
        return self.prompt + self.done

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(
            piece.drafts * int((piece.accepted >= 0).sum())
            for piece in self.pieces
            if piece.accepted is not None
        )

    def steps_by_accepted(self, k: int) -> tuple[int, ...]:
        """Verify steps by accepted drafts, 0 to k; vLLM counts before max_tokens cuts."""
        accepted = [piece.accepted for piece in self.pieces if piece.accepted is not None]
        found = np.concatenate(accepted) if accepted else np.empty(0, np.int64)
        return tuple(np.bincount(found[found >= 0], minlength=k + 1).tolist())

    def output_of(self, step: int) -> tuple[int, int, int]:
        """(output tokens, drafts verified, drafts accepted) of that step; zeros if it had none."""
        plan = self.plan
        if plan is not None and step >= plan.start:
            index = step - plan.start
            drafts = int(plan.tokens if isinstance(plan.tokens, int) else plan.tokens[index]) - 1
            accepted = min(int(self.runs[self.cursor + index]), drafts)
            return int(plan.emitted[index]), drafts, accepted
        for piece in reversed(self.pieces):
            index = step - piece.first
            if index >= len(piece.tokens):
                break
            if index >= 0:
                accepted = -1 if piece.accepted is None else int(piece.accepted[index])
                return int(piece.tokens[index]), piece.drafts * (accepted >= 0), max(accepted, 0)
        return 0, 0, 0


@dataclass(slots=True)
class Plan:
    """A decoding request's steps to its end if nothing intervenes; arrays run over these steps."""

    start: int
    k: int
    emitted: Ints
    output: Ints  # output tokens after the step, counted from the plan's start
    tokens: Ints | int  # of the budget
    context: Ints  # cache entries attended
    blocks: Ints | None  # cache blocks held
