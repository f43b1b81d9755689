"""Findings made by hand, one effect at a time, so that a test says exactly what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tests.analysis.synthetic import C1, C4, C16, demo_design

from specwise.analysis.comparison import Effect, find_signatures, t_quantile
from specwise.analysis.crossover import find_crossovers
from specwise.decision.findings import Findings
from specwise.domain import Arm, LoadPoint, Slo, Speculation, StudyData, Workload

BASELINE = Arm("baseline", url="http://127.0.0.1:1")
DRAFT = Arm("draft", Speculation("draft_model", 4, draft="d"), url="http://127.0.0.1:2")
SCHEDULED = Arm(
    "draft",
    Speculation("draft_model", 4, draft="d", schedule=((1, 4, 4), (5, 1024, 0))),
    url="http://127.0.0.1:2",
)
SUFFIX = Arm("draft", Speculation("suffix", 4), url="http://127.0.0.1:2")

Cell = tuple[str, str | None, LoadPoint]
WHOLE: Cell = ("mix", None, C16)
JSON: Cell = ("mix", "json", C16)
PROSE: Cell = ("mix", "prose", C16)


def effect(
    metric: str,
    gain: float,
    cell: Cell,
    *,
    arm: str = "draft",
    se: float = 0.02,
    dof: float = 20,
    repeats: int = 2,
    known: bool = True,
) -> Effect:
    """An effect whose gain (above 1 is good, whatever the metric) is ``gain``."""
    workload, segment, load = cell
    higher = metric == "speedup" or metric.endswith("per_s")
    ratio = gain if higher else 1 / gain
    half = t_quantile(dof, 0.95) * se
    return Effect(
        metric=metric,
        better="higher" if higher else "lower",
        arm=arm,
        workload=workload,
        segment=segment,
        load=load,
        ratio=ratio,
        low=ratio * math.exp(-half),
        high=ratio * math.exp(half),
        confidence=0.95,
        pairs=64,
        repeats=repeats,
        baseline_value=0.02,
        candidate_value=0.02 * (1 / ratio if metric == "speedup" else ratio),
        se_log=se,
        dof=dof,
        trial_noise_known=known,
        note="",
        trial_ids=("0001", "0002"),
    )


def situation(
    gains: Mapping[Cell, float],
    *,
    arms: tuple[Arm, ...] = (BASELINE, DRAFT),
    slo: Slo | None = None,
    production: LoadPoint = C16,
    workload: str = "mix",
    others: tuple[Effect, ...] = (),
    se: float = 0.02,
) -> Findings:
    """Findings in which ``draft`` has these gains in speedup and TPOT, and ``others`` besides.

    The production workload mixes json and prose, half and half, at concurrency 1, 4 and 16.
    """
    design = demo_design(arms=arms, slo=slo or Slo(), production_load=production)
    pure = tuple(w for w in design.workloads if not w.is_mix)
    mix = Workload("mix", (("json", 0.5), ("prose", 0.5)))
    design = replace(
        design, workloads=(*pure, mix), loads=(C1, C4, C16), production_workload=workload
    )
    effects = [
        effect(metric, gain, cell, se=se)
        for cell, gain in gains.items()
        for metric in ("speedup", "tpot_mean")
    ]
    held = {(e.metric, e.arm, e.workload, e.segment, e.load): e for e in effects}
    held |= {(e.metric, e.arm, e.workload, e.segment, e.load): e for e in others}
    return Findings(
        study=StudyData(design, {}, (), "study"),
        summaries=(),
        acceptance=(),
        effects=tuple(held.values()),
        noise_floors=(),
        signatures=find_signatures(
            [
                e
                for e in held.values()
                if e.metric.endswith(("p50", "p99")) and "ttft" not in e.metric
            ]
        ),
        crossovers=find_crossovers(list(held.values())),
    )
