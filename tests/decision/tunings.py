"""Tunings of simulated engines whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from benchmarks.tune_truths import Played, Search, TrueCosts, Truth

from specwise.decision.confirmation import Confirmation, confirm
from specwise.decision.ways import FamilyStanding, family_standings, to_confirm
from specwise.domain import MeasuredTrial, StudyData, StudyDesign, Trial
from specwise.measurement.design import parse_study

STUDY = """
name = "tuned"
[slo]
bound = "throughput"
[serve]
model = "simulated"
{serve}
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[arm]]
name = "ngram"
speculation = {{ method = "ngram", k = 3 }}
[[segment]]
name = "json"
prompts = "simulated"
[[segment]]
name = "prose"
prompts = "simulated"
temperature = 0.8
[[workload]]
name = "mix"
shares = {{ json = 0.5, prose = 0.5 }}
[load]
concurrency = [1, 4, 16]
requests = [12, 24, 80]
[tune]
k = [1, 2, 4]
draft_sampling = ["greedy"]
"""
SIZES = tuple((100 + 10 * i, 40 + i) for i in range(20)) * 10
# Compute binds at about ten tokens: speculation wins alone and loses in a crowd.
PLAIN = TrueCosts(0.02, 0.002, 2.0, 1e-7, 0.0005)
DRAFT = replace(PLAIN, draft_pass_s=0.0012, draft_token_s=0.00004, speculates=True)
NGRAM = replace(PLAIN, draft_pass_s=0.0004, lookup=True, speculates=True)
TURNING = Truth(
    {"": PLAIN, "draft_model": DRAFT, "ngram": NGRAM},
    {
        "draft_model": {"json": (0.85,) * 8, "prose": (0.7,) * 8},
        "ngram": {"json": (0.5,) * 8, "prose": (0.3,) * 8},
    },
    {"json": 0.3, "prose": 0.1},
    {"json": SIZES, "prose": SIZES},
    noise=0.005,
)
HOPELESS = replace(
    TURNING,
    acceptance={m: dict.fromkeys(("json", "prose"), (0.05,) * 8) for m in ("draft_model", "ngram")},
)


def design_of(serve: str = "") -> StudyDesign:
    return parse_study(STUDY.format(serve=serve), name="t", experiment="tune")


class SlowAtFirst(Played):
    """An engine that something else slows while its first trials run."""

    def __init__(self, truth: Truth, rng: np.random.Generator, trials: int) -> None:
        super().__init__(truth, rng)
        self._left = trials

    def run(self, design: StudyDesign, trial: Trial) -> MeasuredTrial:
        found = super().run(design, trial)
        self._left -= 1
        return found if self._left < 0 else slowed(found, 2.2)


def slowed(found: MeasuredTrial, times: float) -> MeasuredTrial:
    records = tuple(
        replace(
            r,
            intended_s=r.intended_s * times,
            sent_s=r.sent_s * times,
            chunk_s=tuple(s * times for s in r.chunk_s),
            finished_s=r.finished_s * times,
        )
        for r in found.records
    )
    parts = tuple(replace(part, duration_s=part.duration_s * times) for part in found.parts)
    return replace(found, records=records, parts=parts)


class Tuning(Search):
    """A search on a simulated engine; ``last`` is what ended it."""

    def __init__(
        self,
        truth: Truth,
        *,
        design: StudyDesign | None = None,
        tolerance: float = 0.02,
        budget_s: float | None = None,
    ) -> None:
        self.truth = truth
        engine = Played(truth, np.random.default_rng(5))
        super().__init__(
            engine, design or design_of(), tolerance=tolerance, budget_s=budget_s, start_s=20.0
        )

    @classmethod
    def slow_at_first(cls, trials: int) -> Tuning:
        """Something else takes most of the machine while the first ``trials`` run."""
        tuning = cls(TURNING)
        tuning.played = SlowAtFirst(TURNING, np.random.default_rng(5), trials)
        return tuning

    def confirm(self, way: FamilyStanding, *, repeats: int, all_workloads: bool) -> StudyData:
        """As if nothing had been confirmed before: its noise is its own."""
        self.played = Played(self.truth, np.random.default_rng(6))
        return super().confirm(way, repeats=repeats, all_workloads=all_workloads)

    def to_its_end(self) -> Tuning:
        self.last = self.run()
        return self


def confirmed(tuning: Tuning) -> tuple[StudyData, tuple[Confirmation, ...]]:
    ways = family_standings(tuning.design, tuning.last.standing, tuning.measured)
    way = to_confirm(ways, 0.02)[0]
    study = tuning.confirm(way, repeats=6, all_workloads=True)
    return study, confirm(tuning.design, study)
