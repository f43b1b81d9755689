"""Engine steps read from the records of a study.

The gap between two chunks of a request is one engine step, and the other requests' records say
what that step computed (vLLM 0.32 streams one chunk a step and request, every load tried).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from specwise.analysis.cells import Cells, TrialTable, token_arrivals
from specwise.domain import AcceptanceSource, LoadPoint, RequestRecord, Speculation
from specwise.prediction.fit import ObservedStep

Floats = NDArray[np.float64]

LOOKUPS = ("ngram", "suffix")
LONGEST_PROMPT = 2048  # more may be computed in several steps: max_num_batched_tokens of vLLM
_FEWEST_STEPS = 5
_FEWEST_ALONE = 3
_SLOWED = 1.4
_MOST_SLOWED = 0.2


def observed_steps(
    table: TrialTable,
    speculation: Speculation | None,
    *,
    longest_prompt: float = LONGEST_PROMPT,
) -> tuple[ObservedStep, ...]:
    """Steps of one trial, alike ones together: decoding alone, with prompts, and prompts alone.

    A step that ends at time b began where the request's chunk before came, at a. It decoded the
    requests that had their first token by a and their last at b or later, and computed the prompts
    of those whose first token came with b. A third or less between chunks of one step is the
    client's clock. Prompts beyond ``longest_prompt`` tokens a step may be computed in several and
    are left out, as are chunks of several steps. ``speculation`` is None for a baseline.
    """
    return tuple(steps_of([table], speculation, longest_prompt))


def steps_of(
    tables: Sequence[TrialTable], speculation: Speculation | None, longest_prompt: float
) -> list[ObservedStep]:
    """Steps of one arm: those with prompts are rare, so they are put together over all trials."""
    k = speculation.k if speculation else None
    held = list(gaps_of(tables, speculation))
    found = [step for gaps in held for step in _decoding(gaps, k)]
    if held:
        found += _mixed(_joined(held), k, longest_prompt)
    return [*found, *_alone(tables, k, longest_prompt)]


@dataclass(frozen=True, slots=True)
class Gaps:
    """Columns: a row is the time between two chunks of one request, and what its step computed.

    ``running`` decoded, ``prompts`` of ``prompt_tokens`` joined; ``context_tokens`` as `StepShape`.
    """

    seconds: Floats
    tokens: Floats
    context_tokens: Floats
    running: Floats
    prompts: Floats
    prompt_tokens: Floats


def gaps_of(tables: Sequence[TrialTable], speculation: Speculation | None) -> Iterator[Gaps]:
    """The gaps of each trial that has any."""
    for table in tables:
        drafted = 0.0
        if speculation:
            share = drafted_share(table.records) if speculation.method in LOOKUPS else 1.0
            drafted = speculation.k * share
        known_until, parts = _known_until(table), []
        for part in dict.fromkeys(r.part for r in table.records):
            records = [r for r in table.records if r.part == part and r.first_token_s is not None]
            known = [r.prompt_tokens for r in records if r.prompt_tokens]
            if known:
                most = 1 + (speculation.k if speculation else 0)
                until_s = known_until.get(part, math.inf)
                parts.append(_part(records, statistics.fmean(known), drafted, most, until_s))
        if parts:
            yield _joined(parts)


def _joined(gaps: Sequence[Gaps]) -> Gaps:
    columns = zip(*([getattr(g, f.name) for f in fields(Gaps)] for g in gaps), strict=True)
    return Gaps(*(np.concatenate(column) for column in columns))


def _known_until(table: TrialTable) -> dict[int, float]:
    """When the first request was sent that a stop cut off, by part of a resumed trial.

    Cells hold its later answer only, so that from then on nobody knows who else was running.
    """
    found = {}
    for part in sorted({r.part for r in table.records})[:-1]:
        found[part] = 0.0
        for record in (r for r in table.records if r.part >= part):
            if record.part > part:
                break
            found[part] = record.sent_s
    return found


def _part(
    records: Sequence[RequestRecord],
    mean_prompt: float,
    drafted: float,
    most_tokens: int,
    until_s: float,
) -> Gaps:
    arrivals = [token_arrivals(r) for r in records]
    prompts = np.array([r.prompt_tokens or mean_prompt for r in records])
    computed = np.maximum(prompts - [r.cached_tokens or 0 for r in records], 0)
    first, last = (np.array([times[i] for times, _ in arrivals]) for i in (0, -1))
    # A request's last step may have been cut short in what it shows: it is left out.
    begins = np.concatenate([times[:-2] for times, _ in arrivals])
    ends = np.concatenate([times[1:-1] for times, _ in arrivals])
    brought = np.concatenate([tokens[1:-1] for _, tokens in arrivals])
    one_step = (ends > begins) & (ends <= until_s) & (brought <= most_tokens)
    begins, ends = begins[one_step], ends[one_step]
    slack = 0.3 * (ends - begins)
    by_first, by_last = np.argsort(first), np.argsort(last)
    before = np.searchsorted(first[by_first], begins + slack, side="right")
    after = np.searchsorted(first[by_first], ends + slack, side="right")
    gone = np.searchsorted(last[by_last], ends - slack, side="left")
    chunk_s, chunk_tokens = (np.concatenate(column) for column in zip(*arrivals, strict=True))
    by_time = np.argsort(chunk_s)
    output = np.searchsorted(chunk_s[by_time], begins + slack, side="right")
    lengths = prompts + [tokens.sum() for _, tokens in arrivals]
    running = np.maximum(before - gone, 1).astype(float)
    cached = (
        _summed(prompts[by_first])[before]
        + _summed(chunk_tokens[by_time])[output]
        - _summed(lengths[by_last])[gone]
    )
    added = _summed(computed[by_first])[after] - _summed(computed[by_first])[before]
    whole = _summed(prompts[by_first])[after] - _summed(prompts[by_first])[before]
    return Gaps(
        seconds=ends - begins,
        tokens=running * (1 + drafted) + added,
        context_tokens=np.maximum(cached, 0) + running * drafted + whole,
        running=running,
        prompts=(after - before).astype(float),
        prompt_tokens=added,
    )


def _summed(values: Floats) -> Floats:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate(([0.0], np.cumsum(values)))


def _decoding(gaps: Gaps, k: int | None) -> Iterator[ObservedStep]:
    """By number of requests, each in up to three by what is cached, where there are enough."""
    alone = gaps.prompts == 0
    for count in np.unique(gaps.running[alone]):
        alike = alone & (gaps.running == count)
        for chosen in _groups(gaps.context_tokens, alike, weights=1 / gaps.running, most=3):
            yield _step(gaps, chosen, k)


def _mixed(gaps: Gaps, k: int | None, longest_prompt: float) -> Iterator[ObservedStep]:
    with_prompts = (gaps.prompts > 0) & (gaps.prompt_tokens <= longest_prompt)
    for chosen in _groups(gaps.tokens, with_prompts, weights=1 / gaps.running, most=8):
        yield _step(gaps, chosen, k)


def context_slope(gaps: Iterable[Gaps]) -> tuple[float, float] | None:
    """(seconds a cached token, standard error) between steps of one trial and number of requests.

    Nothing else differs between those. None where too few of them do.
    """
    time, cache, weights = [], [], []
    groups = 0
    for held in gaps:
        for count in np.unique(held.running):
            alike = (held.prompts == 0) & (held.running == count)
            seconds, context = held.seconds[alike], held.context_tokens[alike]
            usual = seconds < 1.5 * np.median(seconds) if len(seconds) else alike[:0]
            if usual.sum() >= _FEWEST_STEPS * count:
                groups += 1
                time.append(seconds[usual] - seconds[usual].mean())
                cache.append(context[usual] - context[usual].mean())
                weights.append(np.full(int(usual.sum()), 1 / count))
    if not groups:
        return None
    y, x, w = (np.concatenate(column) for column in (time, cache, weights))
    spread, free = float((w * x * x).sum()), float(w.sum()) - groups - 1
    if spread <= 0 or free <= 0:
        return None
    slope = float((w * x * y).sum()) / spread
    error = math.sqrt(float((w * (y - slope * x) ** 2).sum()) / free / spread)
    return slope, max(error, 0.01 * abs(slope), 1e-15)


def _step(gaps: Gaps, chosen: NDArray[np.bool_], k: int | None) -> ObservedStep:
    def middle(column: Floats) -> float:
        return float(np.median(column[chosen]))

    return ObservedStep(
        tokens=middle(gaps.tokens),
        context_tokens=middle(gaps.context_tokens),
        requests=middle(gaps.running) + middle(gaps.prompts),
        k=k,
        seconds=middle(gaps.seconds),
        steps=max(round(float((1 / gaps.running[chosen]).sum())), 1),
    )


def _groups(
    values: Floats,
    among: NDArray[np.bool_],
    *,
    weights: Floats,
    most: int,
    fewest: int = _FEWEST_STEPS,
) -> Iterator[NDArray[np.bool_]]:
    """``among`` in up to ``most`` groups by size of ``values``, of ``fewest`` steps or more."""
    groups = min(most, int(weights[among].sum() / fewest + 1e-9))
    if not groups:
        return
    edges = np.quantile(values[among], np.linspace(0, 1, groups + 1))
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, groups - 1)
    for group in range(groups):
        chosen = among & (place == group)
        if weights[chosen].sum() >= fewest - 1:
            yield chosen


def _alone(
    tables: Sequence[TrialTable], k: int | None, longest_prompt: float
) -> Iterator[ObservedStep]:
    """First steps of requests that had the server to themselves, in up to four sizes."""
    tokens, seconds = [], []
    for table in tables:
        known_until = _known_until(table)
        for part in dict.fromkeys(r.part for r in table.records):
            until_s = known_until.get(part, math.inf)
            held = sorted((r for r in table.records if r.part == part), key=lambda r: r.sent_s)
            busy_until = -math.inf
            for record, following in zip_longest(held, held[1:]):
                first, computed = record.first_token_s, _computed(record)
                begun_s = math.inf if following is None else following.sent_s
                if (
                    first is not None
                    and busy_until <= record.sent_s
                    and begun_s >= first
                    and first <= until_s
                    and 0 < computed <= longest_prompt
                ):
                    tokens.append(computed)
                    seconds.append(first - record.sent_s)
                busy_until = max(busy_until, record.finished_s)
    sizes, took = np.array(tokens), np.array(seconds)
    every = np.ones(len(sizes), dtype=np.bool_)
    weights = np.ones(len(sizes))
    for chosen in _groups(sizes, every, weights=weights, most=4, fewest=_FEWEST_ALONE):
        yield ObservedStep(
            tokens=float(np.median(sizes[chosen])),
            context_tokens=float(np.median(sizes[chosen])),
            requests=1,
            k=k,
            seconds=float(np.median(took[chosen])),
            steps=int(chosen.sum()),
            prefill=True,
        )


def _computed(record: RequestRecord) -> float:
    """Prompt tokens that were not in the prefix cache."""
    return max((record.prompt_tokens or 0) - (record.cached_tokens or 0), 0)


def drafted_share(records: Iterable[RequestRecord]) -> float:
    """Share of decoding steps that had drafts, where the server says; else 1."""
    steps = chunks = 0
    for record in records:
        if record.acceptance and record.acceptance.source is AcceptanceSource.PER_REQUEST:
            steps += record.acceptance.steps
            chunks += decoding_chunks(record)
    return min(steps / chunks, 1.0) if steps and chunks else 1.0


def decoding_chunks(record: RequestRecord) -> int:
    """How many steps of a request came after its first token: a chunk each."""
    return max(len(token_arrivals(record)[0]) - 1, 0)


def slowed_trials(measured: Cells) -> Mapping[str, float]:
    """Trials that something else on the machine slowed, by id: how many times too long a step took.

    Nothing makes an engine quicker than it is. So of the trials of one arm in one cell the quickest
    shows its pace, and one whose median gap between chunks is over 1.4 times as long was held up.
    Where that is more than a fifth of the trials that can be compared, it is how the machine is,
    and none is named.
    """
    paces: dict[tuple[str, str, LoadPoint], list[tuple[str, float]]] = {}
    for (arm, workload, load, _), tables in measured.items():
        for table in tables:
            gaps = [np.diff(r.chunk_s) for r in table.records if len(r.chunk_s) > 1]
            if gaps:
                pace = (table.trial.trial_id, float(np.median(np.concatenate(gaps))))
                paces.setdefault((arm, workload, load), []).append(pace)
    found: dict[str, float] = {}
    compared = 0
    for trials in paces.values():
        if len(trials) > 1:
            compared += len(trials)
            quickest_s = min(gap_s for _, gap_s in trials)
            found |= {
                trial_id: gap_s / quickest_s
                for trial_id, gap_s in trials
                if gap_s > _SLOWED * quickest_s
            }
    return found if len(found) <= _MOST_SLOWED * compared else {}
