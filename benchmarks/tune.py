"""What `specwise tune` promises, printed with its bars.

    python benchmarks/tune.py truths [--truths 200] [--processes 2]
    python benchmarks/tune.py embedded FOLDER [--repeats 1]

``truths`` tunes on random engines that the simulator plays and whose truth is known
(`tune_truths.py`; half an hour on two cores), and on one so noisy that nothing can be decided.
``embedded`` tunes on the real engine, then runs the exhaustive sweep of the same arms, and holds
the first against the second (an hour on two idle cores). FOLDER keeps both: what is there already
is not measured again, so it can be stopped and started. A sweep's own figures are noisy: its best
arm is partly luck. So a cell's regret is that of the belief after the whole sweep, with an
interval, and counts as none where that holds 0. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

if "truths" in sys.argv:  # one process a core: threads would only wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarks import tune_truths

from specwise.analysis.cells import cells
from specwise.cli.tune import read_tuning
from specwise.decision.confirmation import SCHEDULED
from specwise.decision.deployment import Tuned
from specwise.decision.standing import Standing, survey
from specwise.decision.tuning import Spent
from specwise.decision.verdict import Decision
from specwise.decision.ways import KEPT
from specwise.domain import StudyData
from specwise.measurement.store import read_study

HERE = Path(__file__).resolve().parent
TOLERANCE, SHARE_OF_SWEEP, AT_ONE = 0.02, 0.25, 1.2
_SPECWISE = (sys.executable, "-m", "specwise.cli.main")


def bar(name: str, value: float, limit: float, *, at_least: bool = False) -> bool:
    """Print one bar; whether it is met."""
    met = value >= limit if at_least else value <= limit
    side = "at least" if at_least else "at most"
    print(f"{name}: {value:.3f} ({side} {limit:g}) {'met' if met else 'MISSED'}")
    return met


def undecidable() -> bool:
    """A machine whose trials differ by a third for no reason, and ten minutes: measure more."""
    found = [tune_truths.tune_truth(seed, noise=0.35, budget_s=600.0) for seed in range(5)]
    for outcome in found:
        print(f"noise 35 %, 10 min: {outcome.decision}, bound reached {outcome.bound:.1%}")
    return all(
        o.decision is Decision.MEASURE_MORE and o.stopped == "budget" and o.bound > TOLERANCE
        for o in found
    )


def embedded(folder: Path, repeats: int) -> bool:
    """Tune and sweep on the embedded engine, as far as ``folder`` has not got them yet."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (HERE / "tune.toml").read_text(encoding="utf-8")
    (folder / "tune.toml").write_text(text, encoding="utf-8")
    tuned = tune(folder / "tune.toml", folder / "tuning")
    sweep, study = folder / "sweep", folder / "sweep.toml"
    study.write_text(f"{text}repeats = {repeats}\n", encoding="utf-8")
    words = ["--resume", str(sweep)] if (sweep / "manifest.json").exists() else []
    words = words or [str(study), "--experiment", "tune", "--out", str(sweep)]
    began = time.monotonic()
    subprocess.run([*_SPECWISE, "measure", *words], check=True)
    print(f"the sweep took {(time.monotonic() - began) / 60:.1f} min in this sitting")
    return judge(tuned, read_study(sweep))


def tune(study: Path, tuning: Path) -> Tuned:
    """Run `specwise tune` in the folder ``tuning`` unless it has ended there; what it came to."""
    if not (tuning / "tuning.json").exists():
        resume = (tuning / "search" / "manifest.json").exists()
        what = ["--resume", str(tuning)] if resume else [str(study), "--out", str(tuning)]
        subprocess.run([*_SPECWISE, "tune", *what], check=False)
    return read_tuning(tuning)


def judge(tuned: Tuned, sweep: StudyData) -> bool:
    """Print what the search had lost against the sweep after a quarter of its time and at its end,
    and what was confirmed."""
    spent = Spent.of(tuned.picks)
    sweep_s = sweep_seconds(tuned.search, sweep, spent)
    print(
        f"search {spent.total_s / 60:.1f} min ({len(tuned.picks)} trials, {len(spent.starts)} "
        f"server starts), {spent.total_s / sweep_s:.0%} of the sweep's {sweep_s / 60:.1f} min "
        f"({len(sweep.trials)} trials); stopped by {tuned.stopped}, bound "
        f"{tuned.standing.regret_bound:.1%}"
    )
    early = [p for p in tuned.picks if p.trial_id in _first(tuned, SHARE_OF_SWEEP * sweep_s)]
    trials = {pick.trial_id for pick in early}
    cut = replace(
        tuned.search,
        trials=tuple(t for t in tuned.search.trials if t.trial.trial_id in trials),
    )
    print(f"\nafter {SHARE_OF_SWEEP:.0%} of the sweep's time ({len(early)} trials):")
    met = judge_choices(survey(cut.design, cells(cut)), sweep)
    print("\nat the end of the search:")
    judge_choices(tuned.standing, sweep)
    return judge_confirmation(tuned) and met


def _first(tuned: Tuned, seconds: float) -> set[str]:
    """The trials that were over by then."""
    found, passed = set(), 0.0
    for pick in tuned.picks:
        passed += pick.seconds + pick.start_s
        if passed <= seconds:
            found.add(pick.trial_id)
    return found


def judge_choices(standing: Standing, sweep: StudyData) -> bool:
    """Print each cell's choice beside the sweep's best; whether no regret is above 2 % for sure.

    Gains are those of the belief after every trial of the sweep: a single trial of each arm would
    name the luckiest, and on a machine that drifts the one that ran at a good time.
    """
    truth = survey(sweep.design, cells(sweep)).belief
    rows = [sweep.design.arms[0].name, *(c.arm for c in truth.candidates)]
    gains = truth.draws(4000, np.random.default_rng(7))
    means, best = np.vstack([np.zeros(len(truth.cells)), truth.mean]), truth.best()
    print(
        f"(a trial of the sweep differs by {truth.machine_deviation:.1%} for no reason of its own, "
        f"{truth.drift_deviation:.1%} of it drift)"
    )
    print(f"{'workload':<8}{'load':>5}  {'chosen':<14}{'sweep best':<14}regret [95 %]")
    lost, outside = [], []
    for j, (workload, load) in enumerate(truth.cells):
        chosen = standing.cell(workload, load).best
        row = rows.index(chosen)
        lost.append(1 - math.exp(means[row, j] - means[best[j], j]))
        drawn = 1 - np.exp(gains[:, row, j] - gains[:, best[j], j])
        low, high = np.quantile(drawn, [0.025, 0.975])
        if low > 0 and lost[-1] > TOLERANCE:
            outside.append(f"{workload} {load.label}")
        print(
            f"{workload:<8}{load.label:>5}  {chosen:<14}{rows[best[j]]:<14}"
            f"{lost[-1]:6.1%} [{low:.1%}, {high:.1%}]"
        )
    print(f"regret against the sweep's best: mean {np.mean(lost):.2%}, largest {max(lost):.1%}")
    print(
        "cells with a regret above 2 % and outside the noise interval: "
        f"{', '.join(outside) or 'none'} {'MISSED' if outside else 'met'}"
    )
    return not outside


def judge_confirmation(tuned: Tuned) -> bool:
    """The confirmed arm against the better of off and the best static arm, at every load."""
    print(f"\nrecommendation: {tuned.recommendation.headline}")
    scheduled = [c for c in tuned.confirmations if c.arm == SCHEDULED]
    if not scheduled:
        print("no schedule was confirmed: MISSED")
        return False
    found = scheduled[-1]
    for cell in found.cells:
        print(
            f"{cell.workload:<8}{cell.load.label:>5}  to off {cell.to_baseline.ratio:.2f} "
            f"[{cell.to_baseline.low:.2f}, {cell.to_baseline.high:.2f}]   to the better of off and "
            f"{found.static_arm} {cell.ratio:.2f} [{cell.low:.2f}, {cell.high:.2f}]"
        )
    production = tuned.search.design.production_workload
    ours = [c.ratio for c in found.cells if c.workload == production]
    met = bar(f"schedule / better of both, {production}, least of loads", min(ours), KEPT,
              at_least=True)  # fmt: skip
    alone = [c.to_baseline.ratio for c in found.cells if (c.workload, c.load.value) == ("json", 1)]
    met &= bar("schedule / off, json at c1", alone[0] if alone else math.nan, AT_ONE, at_least=True)
    return met


def sweep_seconds(search: StudyData, sweep: StudyData, spent: Spent) -> float:
    """The sweep's trials, and a start of every arm at what a start took in the search.

    A study keeps how long load ran in a trial; warm-up and reading counters come on top. What they
    add in the search, whose journal has both, they are taken to add in the sweep.
    """

    def load_s(study: StudyData) -> float:
        return sum(part.duration_s for trial in study.trials for part in trial.parts)

    overhead = sum(spent.trials.values()) / load_s(search)
    return overhead * load_s(sweep) + spent.start_s * len(sweep.design.arms)


def main() -> int:
    """Run one part; 0 if all its bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    truths = parts.add_parser("truths")
    truths.add_argument("--truths", type=int, default=200)
    truths.add_argument("--first", type=int, default=0)
    truths.add_argument("--processes", type=int, default=2)
    real = parts.add_parser("embedded")
    real.add_argument("folder", type=Path)
    real.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.part == "embedded":
        return 0 if embedded(options.folder, options.repeats) else 1
    met = tune_truths.run(options.truths, options.first, options.processes)
    return 0 if undecidable() and met else 1


if __name__ == "__main__":
    raise SystemExit(main())
