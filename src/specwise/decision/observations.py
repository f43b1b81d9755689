"""What each trial of a sweep says of its arm: log goodput, and how much requests make it vary.

Arms are compared request by request: the same request of the baseline and of the arm shares its
prompt and its place, so what both have in common does not count as noise. How much trials vary
beyond their requests is not told here; `decision.belief` finds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells, TrialTable
from specwise.decision.belief import Belief, Observed
from specwise.domain import LoadPoint, Purpose, StudyDesign

Floats = NDArray[np.float64]

_SHRUNK_BY = 6.0  # requests that the pooled variance counts for beside a trial's own


def log_goodput(table: TrialTable) -> float:
    """log(output tokens / request seconds) + log(share of requests that meet the SLO).

    In a closed loop of c clients goodput is c / (mean request time) x (share that meets it), so
    the difference of two arms is that of their log goodputs. In an open loop all arms are offered
    the same; the first term then ranks what the second leaves equal. NaN if no request ended OK.
    """
    seconds = float(np.nansum(table.e2e_s[table.ok]))
    tokens = float(np.nansum(table.output_tokens[table.ok]))
    if not (seconds > 0 and tokens > 0):
        return math.nan
    share = max(float(table.meets_slo.mean()), 0.5 / len(table.meets_slo))
    return math.log(tokens / seconds) + math.log(share)


def observed(design: StudyDesign, measured: Cells) -> list[Observed]:
    """Every trial in ``measured`` as the belief takes it; none of a trial without an answer."""
    baseline = design.arms[0].name
    bases = _bases(measured, baseline)
    pooled = _pooled_variance(measured, bases, baseline)
    found = []
    for (arm, workload, load, purpose), tables in measured.items():
        for table in tables:
            value = log_goodput(table)
            if math.isnan(value):
                continue
            base = bases.get((workload, load, table.trial.repeat))
            is_baseline = arm == baseline
            if is_baseline and purpose is Purpose.MEASURE:
                variance = pooled / len(table.index)
            elif base is None:
                variance = 2 * pooled / len(table.index)
            else:
                variance = _shrunk(_pair_residuals(base, table), pooled)
            found.append(
                Observed(
                    arm=None if is_baseline else arm,
                    cell=(workload, load),
                    repeat=table.trial.repeat,
                    value=value,
                    # Half of a pair's variance each, so that the pair has it all.
                    request_variance=variance / 2 + _share_variance(table),
                    at_s=_middle_s(table),
                )
            )
    return found


def _middle_s(table: TrialTable) -> float | None:
    """The middle of a trial in seconds of the wall clock; None where it has no times."""
    try:
        began = [datetime.fromisoformat(part.started_at).timestamp() for part in table.parts]
    except ValueError:
        return None
    ended = [at + part.duration_s for at, part in zip(began, table.parts, strict=True)]
    return (min(began) + max(ended)) / 2 if began else None


def _bases(measured: Cells, baseline: str) -> dict[tuple[str, LoadPoint, int], TrialTable]:
    return {
        (workload, load, table.trial.repeat): table
        for (arm, workload, load, purpose), tables in measured.items()
        if arm == baseline and purpose is Purpose.MEASURE
        for table in tables
    }


def _pair_residuals(base: TrialTable, table: TrialTable) -> Floats:
    """What each request contributes to the log ratio of time per token, beyond the ratio itself.

    Linearised (the delta method): u = (e - R t) / mean(e) of each arm, R = sum e / sum t, with
    time e and tokens t; their variance over requests / n is the log ratio's.
    """
    _, a, b = np.intersect1d(base.index[base.ok], table.index[table.ok], return_indices=True)
    rows = [(base, np.flatnonzero(base.ok)[a]), (table, np.flatnonzero(table.ok)[b])]
    residuals = []
    for of, chosen in rows:
        seconds, tokens = of.e2e_s[chosen], of.output_tokens[chosen]
        known = np.isfinite(seconds) & np.isfinite(tokens)
        if not known.any():
            return np.zeros(0)
        ratio = seconds[known].sum() / tokens[known].sum()
        residuals.append(np.where(known, (seconds - ratio * tokens) / seconds[known].mean(), 0.0))
    return np.asarray(residuals[1] - residuals[0])


def _pooled_variance(
    measured: Cells, bases: Mapping[tuple[str, LoadPoint, int], TrialTable], baseline: str
) -> float:
    """Variance of a request's residual, over all pairs of trials that there are."""
    squares, count = 0.0, 0
    for (arm, workload, load, _), tables in measured.items():
        for table in tables if arm != baseline else ():
            base = bases.get((workload, load, table.trial.repeat))
            if base is not None:
                residuals = _pair_residuals(base, table)
                squares += float((residuals**2).sum())
                count += max(len(residuals) - 1, 0)
    return squares / count if count else 0.05


def _shrunk(residuals: Floats, pooled: float) -> float:
    """A trial's variance of the log ratio: its own requests', drawn to the pool's by few."""
    n = max(len(residuals), 1)
    each = (float((residuals**2).sum()) + _SHRUNK_BY * pooled) / (n - 1 + _SHRUNK_BY)
    return each / n


def _share_variance(table: TrialTable) -> float:
    """Variance of log(share that meets the SLO): (1 - p) / (n p), binomial."""
    n = len(table.meets_slo)
    share = max(float(table.meets_slo.mean()), 0.5 / n)
    return (1 - share) / (n * share)


def expected_variances(design: StudyDesign, measured: Cells, belief: Belief) -> Floats:
    """The request variance that a trial of each pair would have, against its baseline."""
    baseline = design.arms[0].name
    pooled = _pooled_variance(measured, _bases(measured, baseline), baseline)
    requests = {trial.load: trial.requests for trial in design.trials}
    row = np.array([pooled / requests[load] for _, load in belief.cells])
    return np.broadcast_to(row, belief.mean.shape)
