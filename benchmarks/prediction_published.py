"""How near the cost model comes to what others measured.

    python benchmarks/prediction_published.py
    python benchmarks/prediction_published.py --points FILE.json

The second predicts points that are not in the table, in the form of the published file.

Three things are reproduced: the 76 speedups of SpecDecode-Bench (bar: mean error 4 %, largest
12 %; the authors' own simulator, on part of them: 4.4 to 7.0 % mean, up to 21.9 %), the EAGLE-3
sweep over k (TPOT within 5 %, the best k), and the crossovers of the vLLM blog of October 2024
(inside their brackets). Acceptance comes from published traces where there are some, otherwise from
the point at batch 1 alone; never from the points that are judged.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares

from specwise.domain import Checkpoint, Speculation
from specwise.facts.checkpoint import from_table
from specwise.facts.hardware import find_gpu
from specwise.facts.published import (
    PublishedSpeedups,
    PublishedWorkload,
    Source,
    published,
)
from specwise.prediction.costs import (
    Efficiency,
    Overheads,
    RooflineCosts,
    efficiency_of,
    overheads_of,
    roofline,
)
from specwise.prediction.scheduler import SchedulerConfig
from specwise.prediction.simulation import SimRequest, simulate
from specwise.prediction.speedup import Floats, Point, StaticBatch, tokens_per_step

TABLE = published()
WORKLOADS = dict(TABLE.workloads)
H100 = find_gpu("h100")
V1, SWEEP_VERSION, V0 = (0, 10, 1), (0, 9, 0), (0, 6, 0)
# Llama 3 70B and 3.1 70B have one shape; so have 3 8B and 3.1 8B.
SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": ("meta-llama/Llama-3.1-8B-Instruct", 1),
    "meta-llama/Llama-3-70B-Instruct": ("meta-llama/Llama-3.1-70B-Instruct", 4),
    "meta-llama/Llama-3-8B-Instruct": ("meta-llama/Llama-3.1-8B-Instruct", 1),
    "turboderp/Qwama-0.5B-Instruct": ("Qwen/Qwen2.5-0.5B-Instruct", 1),
}
HIT_ACCEPTANCE = 0.75
"""Acceptance at each position once a lookup has found a match, where no trace tells: the traces'
is 0.55 (arithmetic) to 0.9 (code edits)."""


@dataclass(frozen=True)
class Reproduced:
    """A published point beside its prediction."""

    series: PublishedSpeedups
    batch: int
    published: float
    predicted: float
    inferred: bool

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1


def shape(name: str) -> Checkpoint:
    return from_table(SHAPES[name][0])


def batch_series() -> list[PublishedSpeedups]:
    return [series for series in TABLE.speedups if series.load == "batch"]


@dataclass(frozen=True)
class Requests:
    """Kinds of requests: how many, their tokens, tokens per step, share of steps with drafts."""

    weights: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    lengths: Floats
    drafted_share: Floats

    def scaled(self, factor: float, k: int) -> Requests:
        """The same with ``factor`` times the accepted tokens; lookups match more as they gain."""
        drafted = self.drafted_share
        if not np.all(drafted == 1):
            drafted = np.minimum(drafted * factor, 1)
        lengths = np.minimum(1 + (self.lengths - 1) * factor, k + 1)
        return replace(self, lengths=lengths, drafted_share=drafted)


def reproduce(
    series: Sequence[PublishedSpeedups],
    *,
    efficiency: Efficiency | None = None,
    overheads: Overheads | None = None,
    given: bool = True,
) -> Iterator[Reproduced]:
    """Predictions for every point of ``series``.

    The published metric is a mean of throughputs over batches, each of copies of one request: so is
    the prediction, over the traces' requests. Where there is no trace of that target and method, or
    ``given`` is False, acceptance is inferred from the point at batch 1 alone: the workload's
    requests of the nearest method, all their accepted tokens scaled by one factor.
    """
    for one in series:
        yield from _reproduce(one, efficiency, overheads, given)


def _reproduce(
    one: PublishedSpeedups,
    efficiency: Efficiency | None,
    overheads: Overheads | None,
    given: bool,
) -> Iterator[Reproduced]:
    def costs(speculation: Speculation | None) -> RooflineCosts:
        return roofline(
            shape(one.target),
            H100,
            tensor_parallel=SHAPES[one.target][1],
            speculation=speculation,
            draft=shape(one.draft) if one.draft and speculation else None,
            version=V1,
            efficiency=efficiency,
            overheads=overheads,
        )

    def predict(batch: float, requests: Requests) -> float:
        context = requests.prompt_tokens + requests.output_tokens / 2
        work = StaticBatch(
            np.minimum(batch, pool / context),
            requests.prompt_tokens,
            requests.output_tokens,
            requests.drafted_share,
        )
        after = work.tokens_per_s(candidate, one.k, requests.lengths)
        before = work.tokens_per_s(baseline, None)
        return float(requests.weights @ after / (requests.weights @ before))

    baseline, candidate = costs(None), costs(Speculation(one.method, one.k))
    pool = _pool_tokens(baseline)
    points = dict(one.points)
    requests, exact = requests_of(one)
    inferred = not (exact and given)
    if inferred:
        requests = _inferred(requests, one.k, lambda some: predict(1, some) - points[1])
    for batch, speedup in points.items():
        yield Reproduced(one, int(batch), speedup, predict(batch, requests), inferred)


def _inferred(typical: Requests, k: int, excess: Callable[[Requests], float]) -> Requests:
    """``typical`` scaled so that ``excess`` is 0, or as near as acceptances from 0 to 1 come."""
    low, high = 0.0, k / float((typical.lengths - 1).min())
    if excess(typical.scaled(high, k)) <= 0:
        return typical.scaled(high, k)
    if excess(typical.scaled(low, k)) >= 0:
        return typical.scaled(low, k)
    return typical.scaled(brentq(lambda f: excess(typical.scaled(f, k)), low, high, xtol=1e-6), k)


def _pool_tokens(costs: RooflineCosts) -> float:
    """Tokens that the KV cache has room for: longer batches wait, they do not run together."""
    gpus, target = costs.tensor_parallel, costs.target
    weights = (target.body + 2 * target.head) * target.weight_bits / 8
    room = gpus * (0.9 * costs.gpu.memory_bytes - 4e9) - weights
    return float(room / (target.kv_bytes(1, 1, gpus) * gpus))


def requests_of(one: PublishedSpeedups) -> tuple[Requests, bool]:
    """The trace of the workload and method, and whether it is of this very target, method and k.

    Without one, a lookup takes the lookup's trace and any drafter EAGLE-3's; an unknown workload is
    one request of its mean tokens, whose lookups accept `HIT_ACCEPTANCE` at each position.
    """
    kind = "ngram" if one.method == "ngram" else "eagle3"
    traces = [t for t in TABLE.traces if (t.workload, t.method) == (one.workload, kind)]
    traces.sort(key=lambda t: t.k != one.k)
    if traces:
        trace = traces[0]
        columns = (
            trace.requests,
            trace.prompt_tokens,
            trace.output_tokens,
            trace.length,
            trace.drafted_share,
        )
        exact = (trace.target, trace.method, trace.k) == (one.target, one.method, one.k)
        return Requests(*(np.array(column, dtype=float) for column in columns)), exact
    work, drafted = WORKLOADS[one.workload], 0.2 if kind == "ngram" else 1.0
    each_hit = tokens_per_step([HIT_ACCEPTANCE] * one.k) - 1
    single = (1.0, work.prompt_tokens, work.output_tokens, 1 + drafted * each_hit, drafted)
    return Requests(*(np.array([value], dtype=float) for value in single)), False


def errors(points: Sequence[Reproduced]) -> tuple[float, float]:
    """(mean, largest) absolute relative error."""
    sizes = [abs(point.error) for point in points]
    return fmean(sizes), max(sizes)


# ---------------------------------------------------------------------------------------------
# Does the model know, or was it told? Refit without a part, predict that part.

_FITTED = (
    ("bandwidth", "flops", "overlap", "kv_bandwidth", "all_reduce_s"),
    ("step_s", "speculation_s", "draft_pass_s"),
)


def fit(series: Sequence[PublishedSpeedups]) -> tuple[Efficiency, Overheads]:
    """Constants fitted to ``series``, drawn to priors by 15 %: TurboSpec's fit or round guesses."""
    priors = (
        replace(
            efficiency_of(H100),
            bandwidth=0.814,
            flops=0.77,
            overlap=2.0,
            kv_bandwidth=1.0,
            all_reduce_s=8e-6,
        ),
        replace(overheads_of(V1), step_s=1.2e-3, speculation_s=0.3e-3, draft_pass_s=0.5e-3),
    )

    def constants(moved: Sequence[float]) -> tuple[Efficiency, Overheads]:
        steps = iter(np.exp(moved))

        def moved_by(prior: Any, names: Sequence[str]) -> Any:
            values = {name: getattr(prior, name) * float(next(steps)) for name in names}
            return replace(prior, **values)

        return moved_by(priors[0], _FITTED[0]), moved_by(priors[1], _FITTED[1])

    def residuals(moved: Sequence[float]) -> list[float]:
        efficiency, overheads = constants(moved)
        points = reproduce(series, efficiency=efficiency, overheads=overheads)
        return [p.error / 0.03 for p in points] + [m / 0.15 for m in moved]

    free = sum(len(names) for names in _FITTED)
    return constants(least_squares(residuals, np.zeros(free), loss="soft_l1").x)


def left_out(by: Callable[[PublishedSpeedups], str]) -> Iterator[tuple[str, float, float]]:
    """(name, mean, largest error) of each part, predicted with constants fitted to the others."""
    series = batch_series()
    for name in sorted({by(one) for one in series}):
        efficiency, overheads = fit([one for one in series if by(one) != name])
        judged = [one for one in series if by(one) == name]
        points = list(reproduce(judged, efficiency=efficiency, overheads=overheads))
        yield name, *errors(points)


# ---------------------------------------------------------------------------------------------
# The sweep over k, and the blog's crossovers


def k_sweep() -> list[tuple[int, float, float]]:
    """(k, published TPOT, predicted TPOT) in seconds; lengths are the published ones."""
    sweep = TABLE.k_sweep
    at = Point(1, sweep.workload.prompt_tokens + sweep.workload.output_tokens / 2)
    found = []
    for k, length, tpot_s in sweep.points:
        costs = roofline(
            shape(sweep.target),
            H100,
            speculation=Speculation(sweep.method, k),
            version=SWEEP_VERSION,
        )
        found.append((k, tpot_s, float(at.step_s(costs, k)) / length))
    return found


@dataclass(frozen=True)
class Ladder:
    """A method of the blog: by requests per second, published and predicted speedup."""

    method: str
    qps: tuple[float, ...]
    published: tuple[float, ...]
    predicted: tuple[float, ...]

    def bracket(self, values: Sequence[float]) -> tuple[float, float]:
        """The two neighbouring rates between which the speedup falls below 1."""
        for low, high, after in zip(self.qps, self.qps[1:], values[1:], strict=False):
            if after < 1:
                return low, high
        return self.qps[-1], float("inf")


@dataclass(frozen=True)
class _Blog:
    """One method of the blog, served by V0 on four H100."""

    series: PublishedSpeedups
    requests: int

    def costs(self, speculation: Speculation | None) -> RooflineCosts:
        """V0's costs, the draft on one GPU."""
        draft = self.series.draft
        return roofline(
            shape(self.series.target),
            H100,
            tensor_parallel=4,
            speculation=speculation,
            draft=shape(draft) if draft else None,
            version=V0,
        )

    def latency_s(self, qps: float, output_tokens: float, alpha: float) -> float:
        """Mean end-to-end latency; ``alpha`` 0 is the baseline. The same draws whatever the arm."""
        rng, n = np.random.default_rng(1), self.requests
        arrivals = np.cumsum(rng.exponential(1 / qps, n))
        prompt = WORKLOADS[self.series.workload].prompt_tokens
        prompts = np.maximum(rng.exponential(prompt, n), 4).astype(int)
        outputs = np.maximum(rng.exponential(output_tokens, n), 2).astype(int)
        method, k = (self.series.method, self.series.k) if alpha else (None, 0)
        sent = [
            SimRequest(int(p), int(o), float(t), acceptance=(alpha,) * k)
            for p, o, t in zip(prompts, outputs, arrivals, strict=True)
        ]
        options = {"draft_tensor_parallel_size": 1}
        run = simulate(
            sent,
            self.costs(Speculation(method, k, options=options) if method else None),
            SchedulerConfig(kv_tokens=400_000, method=method, k=k),
            rng=np.random.default_rng(2),
        )
        return float((run.finished_s - run.arrival_s)[n // 10 :].mean())

    def ladder(self, baseline_s: float) -> Ladder:
        """Predictions, given the baseline's latency and the speedup at 1 request/s."""
        points = dict(self.series.points)
        output = brentq(lambda o: self.latency_s(1, o, 0) - baseline_s, 20, 600, xtol=0.5)
        slow_s = self.latency_s(1, output, 0)
        alpha = brentq(
            lambda a: slow_s / self.latency_s(1, output, a) - points[1], 0.05, 0.999, xtol=1e-3
        )
        predicted = tuple(
            self.latency_s(q, output, 0) / self.latency_s(q, output, alpha) for q in points
        )
        return Ladder(self.series.method, tuple(points), tuple(points.values()), predicted)


def blog(requests: int = 400) -> list[Ladder]:
    """The blog's ladders, simulated with V0's overheads.

    The output length, which the blog does not give, is the one at which the baseline's latency at 1
    request/s is the published one; acceptance is inferred from the speedup at 1 request/s. The rest
    is predicted, with two constants of V0 that were fitted to these ladders.
    """
    ladders = [series for series in TABLE.speedups if series.load == "qps"]
    return [
        _Blog(series, requests).ladder(baseline_s)
        for series, baseline_s in zip(ladders, (2.55, 2.75), strict=True)
    ]


# ---------------------------------------------------------------------------------------------
# Points from a file, in the form of the published JSON

_NAMES = {
    "Llama3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama3-70B": "meta-llama/Llama-3-70B-Instruct",
    "Qwen3-8B": "Qwen/Qwen3-8B",
}
_METHODS = {"EAGLE": "eagle", "EAGLE3": "eagle3", "draft": "draft_model", "MTP": "mtp"}
_DRAFTS = {"Llama3-70B": "meta-llama/Llama-3-8B-Instruct", "Qwen3-8B": "Qwen/Qwen3-0.6B"}
_UNKNOWN = (300, 600)


def read_points(path: Path) -> list[PublishedSpeedups]:
    """Series of a JSON file: ``points`` of target, method, k, dataset, batch and speedup.

    Targets and drafts are names of the figure or of the built-in table; ``about.hardware`` may say
    "4x H100" by target. ``workloads`` gives prompt_tokens and output_tokens of further datasets;
    for one that nobody gives, 300 and 600 are assumed, and said.
    """
    table = json.loads(path.read_text())
    for name, tokens in table.get("workloads", {}).items():
        WORKLOADS[name] = PublishedWorkload(name, **tokens)
    for name, hardware in table.get("about", {}).get("hardware", {}).items():
        count = re.match(r"(\d+)x", hardware)
        full = _NAMES.get(name, name)
        SHAPES.setdefault(full, (full, int(count[1]) if count else 1))
    series: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for point in table["points"]:
        key = tuple(str(point[name]) for name in ("target", "method", "k", "dataset"))
        series.setdefault(key, []).append(point)
    source = Source(path.name, str(path), "vLLM 0.10.1 (V1)", "H100 80GB", "speedup by batch")
    found = []
    for (target, short, k, dataset), points in series.items():
        if dataset not in WORKLOADS:
            print(f"{dataset}: tokens not given, {_UNKNOWN} assumed")
            WORKLOADS[dataset] = PublishedWorkload(dataset, *_UNKNOWN)
        method = _METHODS.get(short, short)
        draft = points[0].get("draft", _DRAFTS.get(target)) if method == "draft_model" else None
        for name in (_NAMES.get(target, target), draft):
            if name is not None:
                SHAPES.setdefault(name, (name, 1))
        found.append(
            PublishedSpeedups(
                source=source,
                target=_NAMES.get(target, target),
                method=method,
                draft=draft,
                k=int(k),
                workload=dataset,
                load="batch",
                points=tuple(sorted((float(p["batch"]), float(p["speedup"])) for p in points)),
            )
        )
    return found


# ---------------------------------------------------------------------------------------------
# What is printed; each part says whether its bar is met


def print_points(series: Sequence[PublishedSpeedups]) -> bool:
    """The error of every point, and their mean and largest against the bar."""
    points = list(reproduce(series))
    batches = sorted({batch for one in series for batch, _ in one.points})
    head = "".join(f"{f'b={b:g}':>7}" for b in batches)
    print(f"{'target':<18}{'method':<12}{'k':>2} {'workload':<14}{head}")
    for one in series:
        cells = {p.batch: p for p in points if p.series is one}
        name = one.target.split("/")[-1].removesuffix("-Instruct")
        row = "".join(
            f"{100 * cells[int(b)].error:+7.1f}" if int(b) in cells else f"{'':>7}" for b in batches
        )
        origin = "  acceptance from batch 1" if next(iter(cells.values())).inferred else ""
        print(f"{name:<18}{one.method:<12}{one.k:>2} {one.workload:<14}{row}{origin}")
    mean, largest = errors(points)
    print(f"mean {100 * mean:.1f} % (bar 4), largest {100 * largest:.1f} % (bar 12)")
    judged = [p for p in points if not (p.inferred and p.batch == 1)]
    if judged:
        of_judged = errors(judged)
        print(
            f"without the points that acceptance was inferred from ({len(judged)} left): "
            f"mean {100 * of_judged[0]:.1f} %, largest {100 * of_judged[1]:.1f} %"
        )
    for title, key in (
        ("target", lambda p: p.series.target.split("/")[-1]),
        ("method", lambda p: p.series.method),
        ("workload", lambda p: p.series.workload),
        ("batch", lambda p: f"{p.batch}"),
    ):
        for name in sorted({key(p) for p in points}):
            part = errors([p for p in points if key(p) == name])
            print(f"  {title:<9}{name:<28}{100 * part[0]:6.1f}{100 * part[1]:7.1f}")
    return mean <= 0.04 and largest <= 0.12


def print_speedups() -> bool:
    """The 76 points, beside the authors' simulator, and predicted by constants fitted without."""
    print("76 published speedups (SpecDecode-Bench, vLLM 0.10.1, H100); errors in percent")
    met = print_points(batch_series())
    mean, largest = errors(list(reproduce(batch_series(), given=False)))
    print(f"all acceptance from batch 1: mean {100 * mean:.1f} %, largest {100 * largest:.1f} %")
    theirs = {"eagle3": (4.6, 11.6), "ngram": (4.4, 8.2), "eagle": (7.0, 21.9)}
    for method, (their_mean, their_largest) in theirs.items():
        same = [
            one
            for one in batch_series()
            if one.method == method and one.workload != "InstructCoder" and "8B" in one.target
        ]
        mean, largest = (100 * value for value in errors(list(reproduce(same))))
        print(
            f"{method} on Llama-3.1-8B GSM8K, CNN, ShareGPT: {mean:.1f} % mean, {largest:.1f} % "
            f"largest; the authors' simulator {their_mean} and {their_largest} %: "
            f"ratios {mean / their_mean:.2f} and {largest / their_largest:.2f}"
        )
    print("constants fitted without a part, judged on that part (mean, largest error in percent)")
    parts: tuple[tuple[str, Callable[[PublishedSpeedups], str]], ...] = (
        ("target", lambda one: one.target.split("/")[1]),
        ("method", lambda one: one.method),
        ("workload", lambda one: one.workload),
    )
    for title, by in parts:
        for name, mean, largest in left_out(by):
            print(f"  {title:<9}{name:<28}{100 * mean:6.1f}{100 * largest:7.1f}")
    used = ", ".join(
        f"{f.name} {getattr(efficiency_of(H100), f.name)}"
        for f in fields(Efficiency)
        if f.name != "source"
    )
    print(f"H100: {used}")
    return met


def print_sweep() -> bool:
    """TPOT by k, bar 5 % and the best k."""
    print("EAGLE-3 over k (issue 20780), TPOT in ms")
    sweep = k_sweep()
    for k, tpot_s, predicted_s in sweep:
        print(
            f"  k={k}  published {1000 * tpot_s:.2f}  predicted {1000 * predicted_s:.2f}  "
            f"{100 * (predicted_s / tpot_s - 1):+.1f} %"
        )
    published_k = min(sweep, key=lambda row: row[1])[0]
    predicted_k = min(sweep, key=lambda row: row[2])[0]
    print(f"  best k: published {published_k}, predicted {predicted_k}")
    return published_k == predicted_k and all(abs(p / t - 1) <= 0.05 for _, t, p in sweep)


def print_blog() -> bool:
    """The blog's ladders; bar: the crossover between the same two rates."""
    print("vLLM blog, October 2024 (V0, Llama-3-70B, 4x H100): speedup by requests/s")
    met = True
    for ladder in blog():
        for title, values in (("published", ladder.published), ("predicted", ladder.predicted)):
            low, high = ladder.bracket(values)
            row = "".join(f"{q:>6g}: {v:.2f}" for q, v in zip(ladder.qps, values, strict=True))
            print(f"  {ladder.method:<12}{title:<10}{row}   crosses between {low:g} and {high:g}")
        met = met and ladder.bracket(ladder.published) == ladder.bracket(ladder.predicted)
    return met


def print_published() -> bool:
    """All three; whether every bar is met."""
    return all([print_speedups(), print_sweep(), print_blog()])


def main() -> int:
    """Everything, or the points of a file: 0 where the bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=Path, help="JSON in the form of the published file")
    path = parser.parse_args().points
    return 0 if (print_points(read_points(path)) if path else print_published()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
