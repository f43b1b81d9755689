"""How often do the experiments' rules err? Hundreds of simulated studies of known truth.

Studies come from `tests.analysis.experiment_studies`. Printed, each with its Monte-Carlo error:

- temperature: coverage of the 95 % intervals of acceptance and of its drop between temperatures;
- ladder: how often equal arms end the climb, and whether stopping shifts any effect, where the
  candidate crosses 1 in the middle of the climb;
- mixed: how often a segment is blamed on the mix although it does as badly alone, and how often a
  segment that is not harmed is called harmed.

    python -m benchmarks.experiments [--studies 500] [--part temperature|ladder|mixed]

Exits with 1 if a bar is missed: coverage of 93 to 97 % and fewer than 5 % false claims, each within
its Monte-Carlo error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from tests.analysis.experiment_studies import Request, Truth, experiment_design, experiment_study

from specwise.analysis.cells import cells
from specwise.analysis.comparison import compare, speedup_effects
from specwise.analysis.ladder import trials_to_skip
from specwise.analysis.mixture import cause_of, contrast
from specwise.analysis.temperature import sweep
from specwise.domain import Trial


@dataclass(frozen=True)
class Bar:
    """A share that was counted, and what it must be."""

    name: str
    hits: int
    studies: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Hits over studies."""
        return self.hits / self.studies

    @property
    def error(self) -> float:
        """Two standard errors of the share, Monte-Carlo."""
        share = min(max(self.share, 0.01), 0.99)
        return 2 * math.sqrt(share * (1 - share) / self.studies)

    @property
    def met(self) -> bool:
        """Whether the share lies in the bar, allowing for its own error."""
        return self.low - self.error <= self.share <= self.high + self.error

    def __str__(self) -> str:
        wanted = f"{self.low:.0%} to {self.high:.0%}"
        mark = "ok" if self.met else "MISSED"
        return f"{self.name:<66} {self.share:6.1%} +-{self.error:.1%}  ({wanted})  {mark}"


def of_prompts(truth: Truth, seed: int) -> Truth:
    """``truth`` with prompts of this study's own; the arms and temperatures still share them."""
    drawn: dict[tuple[str, int, int], float] = {}
    rng = np.random.default_rng([11, seed])

    def own(
        trial: Trial,
        segment: str,
        temperature: float,
        difficulty: float,
        random: np.random.Generator,
    ) -> Request:
        key = (segment, trial.repeat, hash(difficulty))
        own_difficulty = drawn.setdefault(key, float(rng.normal()))
        return truth(trial, segment, temperature, own_difficulty, random)

    return own


def temperature(studies: int) -> Iterator[Bar]:
    """Acceptance falls from one temperature to another; prompts differ."""

    def truth(
        _: Trial, __: str, temperature: float, difficulty: float, ___: np.random.Generator
    ) -> Request:
        return Request(
            0.01, float(np.clip(0.75 - 0.3 * temperature + 0.1 * difficulty, 0.02, 0.98))
        )

    load = "concurrency = [8]\nrequests = {}\nrepeats = 1\nnoise_floor = false"
    small = experiment_design("temperature", load.format(20), "temperatures = [0.0]")
    large = experiment_design("temperature", load.format(6000), "temperatures = [0.0]")

    def only_prose(design):  # type: ignore[no-untyped-def]
        kept = (
            t for t in design.trials if t.arm == "draft" and t.workload in ("prose", "prose-t0")
        )
        return replace(design, trials=tuple(kept))

    def line_of(design, seed):  # type: ignore[no-untyped-def]
        study = experiment_study(only_prose(design), of_prompts(truth, seed), seed=seed)
        return sweep(study, cells(study), ()).lines[0]

    wanted = line_of(large, 10**6)
    rates, drops = 0, 0
    for seed in range(studies):
        found = line_of(small, seed)
        rate = found.points[0].rate
        rates += rate.low <= wanted.points[0].rate.value <= rate.high
        drops += found.drop.low <= wanted.drop.value <= found.drop.high
    yield Bar("acceptance of 20 prompts: interval holds the truth", rates, studies, 0.93, 0.97)
    yield Bar("drop between temperatures: interval holds the truth", drops, studies, 0.93, 0.97)


def ladder(studies: int) -> Iterator[Bar]:
    """Equal arms, then a candidate that crosses 1 at a load of 3; four loads, production at 2."""
    load = "concurrency = [1, 2, 4, 8]\nrequests = 8\nrepeats = 2\nproduction = 2"
    design = experiment_design("ladder", load)

    def truth_of(at: float) -> Truth:
        def truth(
            trial: Trial, _: str, __: float, difficulty: float, rng: np.random.Generator
        ) -> Request:
            speedup = (at / trial.load.value) ** 0.3 if trial.arm != "baseline" and at else 1.0
            noise = math.exp(0.08 * difficulty + rng.normal(0, 0.05))
            return Request(0.01 * trial.load.value**0.4 / speedup * noise, ttft_s=0.001)

        return truth

    for at in (0.0, 3.0):
        stopped, errors = 0, defaultdict(list)
        for seed in range(studies):
            full = experiment_study(
                design, of_prompts(truth_of(at), seed), seed=seed, trial_sd=0.03
            )
            for heavier in design.loads[1:]:
                begun = tuple(t for t in full.trials if t.trial.load < heavier)
                skipped = trials_to_skip(replace(full, trials=begun))
                if skipped:
                    stopped += 1
                    kept = (t for t in full.trials if t.trial.trial_id not in skipped)
                    full = replace(full, trials=tuple(kept))
                    break
            for effect in speedup_effects(cells(full), "baseline"):
                truth = (at / effect.load.value) ** 0.3 if at else 1.0
                errors[effect.load].append(math.log(effect.ratio / truth))
        if not at:
            yield Bar("equal arms: the climb is ended as clear", stopped, studies, 0.0, 0.05)
        print(f"  crossing at {at or 'never'}: {stopped} of {studies} climbs ended early")
        for held_at, held in sorted(errors.items()):
            error = float(np.std(held)) / math.sqrt(len(held))
            shift = float(np.mean(held))
            line = f"log effect off by {shift:+.4f} +-{2 * error:.4f}"
            print(f"    {held_at.label}: {len(held)} climbs, {line}")


def mixed(studies: int) -> Iterator[Bar]:
    """prose loses as much alone as in the mix; json is not touched at all."""
    design = experiment_design("mixed", "concurrency = [16]\nrequests = 40\nrepeats = 3")
    confidence = 1 - 0.05 / 2

    def truth(
        trial: Trial, segment: str, _: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        slower = 1.15 if segment == "prose" and trial.arm != "baseline" else 1.0
        noise = math.exp(0.08 * difficulty + rng.normal(0, 0.05))
        return Request(0.02 * slower * noise, ttft_s=0.001)

    blamed, harmed = 0, 0
    for seed in range(studies):
        study = experiment_study(design, of_prompts(truth, seed), seed=seed, trial_sd=0.03)
        held = {
            (e.workload, e.segment): e
            for e in compare(study, cells(study)).effects
            if e.metric == "speedup"
        }
        causes = {}
        for segment in ("json", "prose"):
            in_mix, alone = held["mix", segment], held[segment, None]
            between = contrast(in_mix, alone, confidence)
            causes[segment] = cause_of(in_mix, alone, between, confidence)
        blamed += causes["prose"] in ("the mix", "both")
        harmed += causes["json"] not in ("no harm", "cannot tell yet")
    yield Bar("a loser that loses alone too: blamed on the mix", blamed, studies, 0.0, 0.05)
    yield Bar("a segment that is not touched: called harmed", harmed, studies, 0.0, 0.05)


PARTS = {"temperature": temperature, "ladder": ladder, "mixed": mixed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args()
    missed = 0
    for name, part in PARTS.items():
        if options.part in (None, name):
            for bar in part(options.studies):
                print(bar, flush=True)
                missed += not bar.met
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
