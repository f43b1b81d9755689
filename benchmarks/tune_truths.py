"""Random engines of known truth, for `benchmarks/tune.py`: what does tuning lose on them?

Every truth is an engine (when compute binds, what a draft costs, how well two segments' drafts are
accepted, how much a trial varies for no reason, how much the machine drifts) drawn at random and
played by the simulator. A tuning runs on it exactly as on a real one: the same design, the same
choices, records instead of sockets. Then every arm is simulated at length without noise, and what
was chosen is held against the best there was.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from specwise.analysis.cells import Cells, cells
from specwise.decision.confirmation import (
    Confirmation,
    confirm,
    confirmation_design,
    next_confirmation,
    next_way,
)
from specwise.decision.deployment import Recommendation, recommend
from specwise.decision.tuning import Next, Spent, next_pick, sweep_seconds
from specwise.decision.verdict import Decision
from specwise.decision.ways import FamilyStanding, family_standings
from specwise.domain import (
    Arm,
    LoadPoint,
    MeasuredTrial,
    PickRecord,
    StudyData,
    StudyDesign,
    Trial,
    Workload,
)
from specwise.measurement.design import parse_study
from specwise.measurement.sweep import families
from specwise.prediction.costs import StepShape
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, simulate
from specwise.prediction.study import SimArm, Traffic, simulate_study

STUDY = """
name = "truth"
[slo]
bound = "throughput"
[serve]
model = "simulated"
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = { method = "draft_model", k = 3, draft = "simulated-draft" }
[[arm]]
name = "ngram"
speculation = { method = "ngram", k = 3 }
[[segment]]
name = "json"
prompts = "simulated"
[[segment]]
name = "prose"
prompts = "simulated"
temperature = 0.8
[[workload]]
name = "mix"
shares = { json = 0.5, prose = 0.5 }
[load]
concurrency = [1, 2, 4, 8, 16, 32]
requests = [8, 12, 24, 48, 80, 160]
[tune]
k = [1, 2, 3, 4, 6, 8]
draft_sampling = ["greedy"]
"""

START_S = 60.0
DRIFT_LASTS_S = 200.0  # longer than the belief takes it to last


@dataclass(frozen=True, slots=True)
class TrueCosts:
    """Step times of a random engine: (memory^n + compute^n)^(1/n), and a drafter on top.

    The form is not the one that specwise fits: its knots have to bend around it.
    """

    memory_s: float
    token_s: float
    sharpness: float
    context_s: float
    overhead_s_each: float
    draft_pass_s: float = 0.0
    draft_token_s: float = 0.0
    lookup: bool = False
    speculates: bool = False
    pace: float = 1.0  # the trial's own: how fast the machine happens to be

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:  # noqa: ARG002
        """The target's pass."""
        compute = self.token_s * np.asarray(tokens, float)
        n = self.sharpness
        passed = (self.memory_s**n + compute**n) ** (1 / n)
        return self.pace * (passed + self.context_s * context_tokens + self.overhead_s_each)

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """The drafter's passes."""
        if not self.speculates:
            return 0.0 * tokens
        if self.lookup:
            return self.pace * self.draft_pass_s * np.minimum(k, 1)
        later = np.maximum(k - 1, 0)
        each = self.draft_pass_s + self.draft_token_s * tokens
        return self.pace * (each + later * (self.draft_pass_s + self.draft_token_s * requests))

    def overhead_s(self, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """Nothing apart."""
        return 0.0 * requests

    def step_s(self, shape: StepShape) -> Any:
        """The whole step."""
        return self.target_s(shape.tokens, shape.context_tokens, shape.requests) + self.draft_s(
            shape.tokens, shape.context_tokens, shape.requests, shape.k
        )


@dataclass(frozen=True, slots=True)
class Truth:
    """One random engine and its traffic.

    ``noise`` is the deviation of a trial's log pace, ``drift`` that of the machine's, which wanders
    over minutes and is the same for all that runs at a time.
    """

    costs: Mapping[str, TrueCosts]  # by method, "" the baseline's
    acceptance: Mapping[str, Mapping[str, tuple[float, ...]]]  # by method and segment
    hits: Mapping[str, float]  # by segment: share of steps in which a lookup finds something
    sizes: Mapping[str, tuple[tuple[int, int], ...]]
    noise: float
    drift: float = 0.0


def draw_truth(rng: np.random.Generator, *, noise: float | None = None) -> Truth:
    """A truth in which speculation may pay, lose, or turn from one to the other with the load."""
    memory_s = float(rng.uniform(0.008, 0.03))
    knee_tokens = float(np.exp(rng.uniform(np.log(6), np.log(200))))
    plain = TrueCosts(
        memory_s=memory_s,
        token_s=memory_s / knee_tokens,
        sharpness=float(rng.uniform(1.3, 3.0)),
        context_s=float(rng.uniform(0, 4e-7)),
        overhead_s_each=float(rng.uniform(0.0, 0.002)),
    )
    ratio = float(np.exp(rng.uniform(np.log(0.03), np.log(0.4))))
    draft = replace(
        plain,
        speculates=True,
        draft_pass_s=ratio * memory_s,
        draft_token_s=ratio * plain.token_s,
        overhead_s_each=plain.overhead_s_each + float(rng.uniform(0, 0.001)),
    )
    ngram = replace(
        plain, speculates=True, lookup=True, draft_pass_s=float(rng.uniform(0.0001, 0.002))
    )
    steps = np.linspace(0, 1, 8)
    accepted: dict[str, dict[str, tuple[float, ...]]] = {"draft_model": {}, "ngram": {}}
    hits = {}
    for segment, low, high in (("json", 0.5, 0.95), ("prose", 0.2, 0.75)):
        first, drift = float(rng.uniform(low, high)), float(rng.uniform(-0.15, 0.05))
        accepted["draft_model"][segment] = tuple(np.clip(first + drift * steps, 0.05, 0.98))
        accepted["ngram"][segment] = tuple(
            np.clip(float(rng.uniform(0.2, 0.8)) + 0.15 * steps, 0.05, 0.98)
        )
        hits[segment] = float(rng.uniform(0.05, 0.8 if segment == "json" else 0.4))
    sizes = {
        name: tuple(
            (int(p), int(o))
            for p, o in zip(
                rng.lognormal(math.log(rng.uniform(60, 400)), 0.4, 200).clip(8, 1500),
                rng.lognormal(math.log(rng.uniform(32, 120)), 0.3, 200).clip(8, 300),
                strict=True,
            )
        )
        for name in ("json", "prose")
    }
    deviation = float(np.exp(rng.uniform(np.log(0.003), np.log(0.03)))) if noise is None else noise
    drifts = noise is None and rng.random() < 0.5
    drift = float(np.exp(rng.uniform(np.log(0.005), np.log(0.05)))) if drifts else 0.0
    return Truth(
        {"": plain, "draft_model": draft, "ngram": ngram}, accepted, hits, sizes, deviation, drift
    )


class Played:
    """A truth as an engine that runs one trial after another."""

    def __init__(self, truth: Truth, rng: np.random.Generator) -> None:
        self._truth = truth
        self._rng = rng
        self._clock_s = 0.0
        self._drift = rng.standard_normal()  # of `Truth.drift`

    def elapse(self, seconds: float) -> None:
        """Time passes, and the machine's pace with it: an Ornstein-Uhlenbeck process."""
        self._clock_s += seconds
        kept = math.exp(-seconds / DRIFT_LASTS_S)
        fresh = math.sqrt(1 - kept**2)
        self._drift = kept * self._drift + fresh * self._rng.standard_normal()

    def run(self, design: StudyDesign, trial: Trial) -> MeasuredTrial:
        """The records of one trial, at the machine's pace and one of its own."""
        noise = self._truth.noise * self._rng.standard_normal()
        pace = math.exp(noise + self._truth.drift * self._drift)
        arm = design.arm(trial.arm)
        found = simulate_study(
            replace(design, trials=(trial,), arms=(arm,), tune=None),
            arms={trial.arm: self._arm(arm, pace)},
            traffic={name: Traffic(sizes) for name, sizes in self._truth.sizes.items()},
            arrivals=lambda *_: (),
            provenance={},
            own_luck=True,
        )
        done = found.trials[0]
        began = datetime.fromtimestamp(self._clock_s, UTC).isoformat()
        self.elapse(seconds_of(done))
        return replace(done, parts=tuple(replace(part, started_at=began) for part in done.parts))

    def long_run(self, arm: Arm, workload: Workload, load: LoadPoint, requests: int) -> float:
        """log(output tokens / request seconds) of many requests at the true pace."""
        sim = self._arm(arm, 1.0)
        rng = np.random.default_rng(zlib.crc32(f"{workload.name} {load.label}".encode()))
        names = [name for name, _ in workload.shares]
        sent = []
        for number in range(requests):
            name = names[number % len(names)]  # equal shares
            prompt, output = self._truth.sizes[name][int(rng.integers(200))]
            sent.append(
                SimRequest(
                    prompt,
                    output,
                    segment=name,
                    acceptance=sim.acceptance.get(name, ()),
                    draft_probability=sim.draft_probability.get(name, 1.0),
                )
            )
        run = simulate(sent, sim.costs, sim.config, rng=rng, concurrency=int(load.value))
        return math.log(run.output_tokens.sum() / (run.finished_s - run.arrival_s).sum())

    def _arm(self, arm: Arm, pace: float) -> SimArm:
        speculation = arm.speculation
        method = speculation.method if speculation else ""
        config = SchedulerConfig(
            max_num_seqs=64,
            method=method or None,
            k=speculation.k if speculation else 0,
            schedule=speculation.schedule if speculation else (),
            async_scheduling=method != "ngram",
        )
        accepted = self._truth.acceptance.get(method, {})
        return SimArm(
            costs=replace(self._truth.costs[method], pace=pace),
            config=config,
            acceptance={segment: values[: config.k] for segment, values in accepted.items()},
            draft_probability=self._truth.hits if method == "ngram" else {},
        )


def seconds_of(measured: MeasuredTrial) -> float:
    return sum(part.duration_s for part in measured.parts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tuning came to on one truth; regrets are shares of the true goodput."""

    seed: int
    regret: float  # average over cells
    worst_regret: float
    bound: float
    share_of_sweep: float
    stopped: str
    decision: Decision
    worst_gain: float  # of what was recommended against off, over the loads; 0 for none
    trials: int
    started: int
    noise: float
    drift: float


class Search:
    """A tuning's search on a played engine, one trial after another, and its confirmations.

    What `specwise tune` does with servers, with records in their place; a server start takes
    ``start_s``.
    """

    def __init__(
        self,
        played: Played,
        design: StudyDesign,
        *,
        tolerance: float = 0.02,
        budget_s: float | None = None,
        start_s: float = START_S,
    ) -> None:
        self.played, self.design = played, design
        self.tolerance, self.budget_s = tolerance, budget_s
        self.trials: list[MeasuredTrial] = []
        self.picks: list[PickRecord] = []
        self.running: set[str] = set()
        self._start_s = start_s

    @property
    def study(self) -> StudyData:
        """The study so far."""
        return StudyData(self.design, {}, tuple(self.trials), "")

    @property
    def measured(self) -> Cells:
        """Its trials by cell."""
        return cells(self.study)

    def next(self) -> Next:
        """What would be tried now."""
        return next_pick(
            self.design,
            self.measured,
            spent=Spent.of(self.picks),
            running=self.running,
            tolerance=self.tolerance,
            budget_s=self.budget_s,
        )

    def step(self) -> Next:
        """Run what is to be tried now, if anything."""
        chosen = self.next()
        if chosen.trial is not None:
            starts = chosen.trial.arm not in self.running
            if starts:
                self.played.elapse(self._start_s)
            done = self.played.run(self.design, chosen.trial)
            self.running.add(chosen.trial.arm)
            self.trials.append(done)
            self.picks.append(
                PickRecord(
                    trial_id=chosen.trial.trial_id,
                    reason=chosen.reason,
                    regret_bound=chosen.standing.regret_bound,
                    started_server=starts,
                    start_s=self._start_s if starts else 0.0,
                    seconds=seconds_of(done),
                )
            )
        return chosen

    def run(self) -> Next:
        """Every step to the end; what ended it."""
        while (chosen := self.step()).trial is not None:
            pass
        return chosen

    def confirm(self, way: FamilyStanding, *, repeats: int, all_workloads: bool) -> StudyData:
        """The confirmation of ``way``, on every workload or on the production workload only."""
        design = confirmation_design(self.design, way, repeats=repeats)
        wanted = tuple(
            t for t in design.trials if all_workloads or t.workload == design.production_workload
        )
        design = replace(design, trials=wanted)
        ran: list[MeasuredTrial] = []
        while (trial := next_confirmation(StudyData(design, {}, tuple(ran), ""))) is not None:
            ran.append(self.played.run(design, trial))
        return StudyData(design, {}, tuple(ran), "")


def tune_truth(
    seed: int,
    *,
    noise: float | None = None,
    tolerance: float = 0.02,
    budget_s: float | None = None,
    truth_requests: int = 100,
) -> Outcome:
    """Tune on truth number ``seed``, confirm, recommend, and hold it against the truth."""
    rng = np.random.default_rng([seed, 20261123])
    truth = draw_truth(rng, noise=noise)
    played = Played(truth, rng)
    design = replace(
        parse_study(STUDY, name="truth", experiment="tune"), seed=int(rng.integers(1 << 30))
    )
    search = Search(played, design, tolerance=tolerance, budget_s=budget_s)
    chosen = search.run()
    standing = chosen.standing
    ways = family_standings(design, standing, search.measured)
    confirmations: tuple[Confirmation, ...] = ()
    confirming: list[StudyData] = []
    while (way := next_way(search.study, confirming, tolerance)) is not None:
        confirming.append(search.confirm(way, repeats=6, all_workloads=False))
        confirmations += confirm(design, confirming[-1], number=len(confirming))
        if any(c.outcome == "confirmed" for c in confirmations):
            break
    answer = recommend(
        design,
        standing,
        ways,
        confirmations,
        stopped=chosen.stopped,
        tolerance=tolerance,
    )
    gains = true_gains(design, played, truth_requests)
    lost = [
        1 - math.exp(gains[cell.best, cell.workload, cell.load] - best)
        for cell in standing.cells
        for best in [
            max(g for (_, w, at), g in gains.items() if (w, at) == (cell.workload, cell.load))
        ]
    ]
    spent = Spent.of(search.picks)
    return Outcome(
        seed=seed,
        regret=float(np.mean(lost)),
        worst_regret=max(lost),
        bound=standing.regret_bound,
        share_of_sweep=spent.total_s / sweep_seconds(design, search.measured, spent),
        stopped=chosen.stopped,
        decision=answer.decision,
        worst_gain=worst_true_gain(design, played, answer, truth_requests),
        trials=len(search.trials),
        started=len(search.running),
        noise=truth.noise,
        drift=truth.drift,
    )


def true_gains(
    design: StudyDesign, played: Played, requests: int
) -> dict[tuple[str, str, LoadPoint], float]:
    """log goodput over the baseline's of every arm in every cell: many requests, no noise, the
    same requests and the same luck for all arms."""
    values: dict[tuple[str, str, LoadPoint], float] = {}
    for arm in design.arms:
        for workload in design.workloads:
            for load in design.loads:
                values[arm.name, workload.name, load] = played.long_run(
                    arm, workload, load, requests + int(3 * load.value)
                )
    baseline = design.arms[0].name
    return {(a, w, at): v - values[baseline, w, at] for (a, w, at), v in values.items()}


def worst_true_gain(
    design: StudyDesign, played: Played, answer: Recommendation, requests: int
) -> float:
    """The least true log gain over the loads of what was recommended; 0 for nothing."""
    if answer.family is None:
        return 0.0
    arm = design.arm(families(design)[answer.family][0])
    if answer.schedule:
        assert arm.speculation is not None
        longest = max(k for _, _, k in answer.schedule)
        arm = replace(
            arm, speculation=replace(arm.speculation, k=longest, schedule=answer.schedule)
        )
    else:
        assert answer.arm is not None
        arm = design.arm(answer.arm)
    workload = design.workload(design.production_workload)
    gains = []
    for load in design.loads:
        long = requests + int(3 * load.value)
        ours, off = (played.long_run(a, workload, load, long) for a in (arm, design.arms[0]))
        gains.append(ours - off)
    return min(gains)


def run(truths: int, first: int, processes: int) -> bool:
    """Tune on that many truths and print what was lost; whether the bars are met."""
    began = time.perf_counter()
    with ProcessPoolExecutor(processes) as pool:
        found = list(pool.map(tune_truth, range(first, first + truths)))
    return report(found, time.perf_counter() - began)


def report(found: list[Outcome], seconds: float) -> bool:
    """The bars, and what helps to read them."""
    regrets = np.array([o.regret for o in found])
    worse = [o for o in found if o.worst_gain < math.log(0.97)]
    bars = [
        ("median regret", float(np.median(regrets)), 0.01),
        ("95th percentile of regret", float(np.quantile(regrets, 0.95)), 0.05),
        ("recommended, and over 3 % worse than off at a load", len(worse) / len(found), 0.01),
    ]
    print(f"{len(found)} random truths in {seconds:.0f} s")
    for name, value, bar in bars:
        print(f"{name}: {value:.2%} (bar {bar:.0%}) {'met' if value <= bar else 'MISSED'}")
    held = np.mean([o.regret <= o.bound for o in found])
    print(f"the stated 95 % bound on the regret holds in {held:.1%}")
    shares = [o.share_of_sweep for o in found]
    print(
        f"time, as a share of the sweep's with one repeat: median {np.median(shares):.0%}, "
        f"95th percentile {np.quantile(shares, 0.95):.0%}"
    )
    print(f"worst cell's regret: median {np.median([o.worst_regret for o in found]):.1%}")
    for decision in Decision:
        print(f"decision {decision}: {sum(o.decision is decision for o in found)}")
    for stop in ("tolerance", "budget", "exhausted"):
        print(f"stopped by {stop}: {sum(o.stopped == stop for o in found)}")
    return all(value <= bar for _, value, bar in bars)
