"""Executes a study: every trial of the design, in order, into its folder; resumes where it stopped.

For each trial: the arm's server is made ready and the others are suspended, warm-up requests go
out (prompts of their own, never recorded), the server's counters are read, the load runs with
every record written as its request ends, and the counters are read again.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from specwise.domain import (
    Api,
    GaugeSample,
    LoadPoint,
    Loop,
    MeasuredTrial,
    Outcome,
    PickRecord,
    RequestRecord,
    Segment,
    StudyData,
    StudyDesign,
    Trial,
    TrialPart,
    Workload,
)
from specwise.errors import InputError, ServerError, StoppedError, StoreError
from specwise.measurement.arrivals import intended_times
from specwise.measurement.fleet import Fleet
from specwise.measurement.gpu import GpuSampler
from specwise.measurement.load import PlannedRequest, Target, run_load
from specwise.measurement.prompts import (
    ChosenPrompt,
    PromptPlan,
    digest,
    load_source,
    read_trace,
    remarks,
)
from specwise.measurement.store import StudyFolder, remaining
from specwise.vllm import metrics
from specwise.vllm.response import endpoint, request_body
from specwise.vllm.server import EMBEDDED

GAUGE_PERIOD_S = 1.0
WARMUP_MAX_TOKENS = 8
MAX_PARTS_PER_SITTING = 3
REFUSALS_BEFORE_PAUSE = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a study stands: ``done`` of ``total`` trials.

    ``to_go_s`` is None while unknown, ``total`` where trials are chosen as it goes.
    """

    done: int
    total: int | None
    to_go_s: float | None


@dataclass(frozen=True, slots=True)
class Listener:
    """What the command line wants to hear while a study runs. Each is called on the main thread."""

    note: Callable[[str], None] = lambda _: None
    trial_started: Callable[[Trial, Progress], None] = lambda *_: None
    trial_finished: Callable[[MeasuredTrial, Progress], None] = lambda *_: None


Skip = Callable[[StudyData], Mapping[str, str]]
"""Which trials need not be run, by id, with the reason, given what was measured so far."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a tuning wants next: the trial ``trial_id``, or no more trials where it is None.

    ``skip`` holds trials that will not be run, by id, with the reason; ``retire`` arms whose
    servers can be stopped. ``reason`` and ``regret_bound`` (None: not known) are for the journal;
    ``to_go_s`` is None while unknown.
    """

    trial_id: str | None
    reason: str
    regret_bound: float | None = None
    skip: Mapping[str, str] = field(default_factory=dict)
    retire: tuple[str, ...] = ()
    to_go_s: float | None = None


Choose = Callable[[StudyData, Collection[str]], Choice]
"""The next trial, given what was measured so far and the arms whose servers are up."""

MOST_EMBEDDED_SERVERS = 5
"""Servers of the embedded engine that are held in memory where there are more arms than fit."""
_MOST_SERVERS = 2  # of any other engine: two arms fit wherever a study says that its arms do


def conduct(
    folder: StudyFolder,
    *,
    base: Path,
    listener: Listener,
    stop: Callable[[], bool],
    skip: Skip | None = None,
    choose: Choose | None = None,
    resume_command: str = "",
) -> None:
    """Measure what is left of the study in ``folder``: the whole job of ``specwise measure``.

    Relative paths of the study count from ``base``. Starts and stops the servers the design asks
    for. ``skip`` is asked before each load begins. With ``choose`` trials are not taken in the
    design's order: it is asked before each one, servers start when they are first needed, and each
    choice goes to the folder's journal. ``resume_command`` is what errors tell the user to go on
    with, by default that of ``specwise measure``.

    Raises PromptError or InputError for a design that cannot be run here, ServerError or
    EngineError for servers that cannot, StoppedError when ``stop`` asked for it.
    """
    design = folder.design
    if choose is None and design.experiment == "tune" and folder.picks():
        raise InputError(
            f"{folder.path} is the search of a tuning, which chooses its trials as it goes.",
            f"Go on with `specwise tune --resume {folder.path.parent}`.",
        )
    segments = [segment for segment in design.segments if not segment.same_prompts_as]
    sources = {s.name: load_source(s.prompts, base, template=s.template) for s in segments}
    texts = {name: source.prompts for name, source in sources.items()}
    prompts = PromptPlan(texts, segments, seed=design.seed, warmup=design.warmup)
    digests = {name: digest(source) for name, source in texts.items()}
    known = folder.provenance.get("prompts", digests)
    changed = [name for name, value in digests.items() if known.get(name) != value]
    if changed:
        raise StoreError(
            f"The prompts of segment {', '.join(changed)} changed since {folder.path} was begun.",
            "Restore the file, or measure into a new folder: arms must see the same prompts.",
        )
    if all(folder.is_over(trial) for trial in design.trials):
        listener.note("every trial is measured already")
        return
    notes = {s.name: list(remarks(s, sources[s.name])) for s in segments}
    for name, sentences in notes.items():
        for sentence in sentences:
            listener.note(f"segment {name}: {sentence}")
    folder.add_provenance({"prompts": digests, "prompt_notes": notes, "base": str(base)})
    one_by_one = choose is not None or design.experiment == "tune"  # more arms than fit together
    with (
        folder.locked(),
        Fleet(
            design,
            known=folder.provenance.get("arms", {}),
            log_path=folder.log_path,
            on_described=lambda arms: folder.add_provenance({"arms": arms}),
            note=listener.note,
            most_servers=_most_servers(design) if one_by_one else None,
        ) as fleet,
    ):
        if not one_by_one:
            fleet.start()
        measure(
            folder,
            prompts,
            fleet,
            base=base,
            listener=listener,
            stop=stop,
            skip=skip,
            choose=choose,
            resume_command=resume_command,
        )


def _most_servers(design: StudyDesign) -> int:
    deployments = [arm.deployment for arm in design.arms if arm.deployment is not None]
    embedded = all(deployment.engine == EMBEDDED for deployment in deployments)
    return MOST_EMBEDDED_SERVERS if embedded else _MOST_SERVERS


def measure(
    folder: StudyFolder,
    prompts: PromptPlan,
    fleet: Fleet,
    *,
    base: Path,
    listener: Listener,
    stop: Callable[[], bool],
    skip: Skip | None = None,
    choose: Choose | None = None,
    resume_command: str = "",
) -> None:
    """Run every trial of ``folder`` that is neither complete nor skipped, or those ``choose`` asks.

    ``base`` is where a trace file's relative path counts from. Raises StoppedError when ``stop``
    asked for it, ServerError when a server cannot be brought back; both leave the folder ready to
    be resumed.
    """
    resume = resume_command or f"specwise measure --resume {folder.path}"
    sitting = _Sitting(folder, prompts, fleet, base, listener, stop, resume)
    cells = {trial.trial_id: sitting.deal(trial) for trial in folder.design.trials}
    for segment in prompts.reused:
        listener.note(
            f"segment {segment}: more requests than prompts, so some prompts are used twice "
            "(a prefix cache may answer them faster)"
        )
    if thin := _thin_loads(folder.design):
        listener.note(
            f"{', '.join(thin)}: fewer than two requests for each client, so a trial is mostly its "
            "beginning and its end (a steady load takes four)"
        )
    if choose is None:
        _measure_in_order(sitting, cells, skip)
    else:
        _measure_chosen(sitting, cells, choose)


def _thin_loads(design: StudyDesign) -> list[str]:
    """Closed loops in which a client's first request is about its last.

    All clients start at once and end one by one: prompts are computed in a burst, and what follows
    runs in a batch that shrinks.
    """
    thin = {trial.load for trial in design.trials if trial.requests < 2 * trial.load.value}
    return [load.label for load in sorted(thin) if load.loop is Loop.CLOSED and load.value > 1]


_Cells = Mapping[str, tuple[ChosenPrompt, ...]]  # what to send, by trial id


def _measure_in_order(sitting: _Sitting, cells: _Cells, skip: Skip | None) -> None:
    folder, listener, design = sitting.folder, sitting.listener, sitting.design
    clock = _TrialClock(design)
    clock.done.update(trial.trial_id for trial in design.trials if folder.is_over(trial))
    asked_before: LoadPoint | None = None
    for trial in design.trials:
        if skip is not None and trial.load != asked_before and trial.trial_id not in clock.done:
            asked_before = trial.load
            clock.done.update(_skip(folder, skip(folder.read()), listener))
        if trial.trial_id in clock.done:
            continue
        listener.trial_started(trial, clock.progress())
        began = time.monotonic()
        measured = sitting.run_trial(trial, cells[trial.trial_id])
        clock.add(trial, time.monotonic() - began)
        listener.trial_finished(measured, clock.progress())


def _measure_chosen(sitting: _Sitting, cells: _Cells, choose: Choose) -> None:
    """Run what ``choose`` asks for, trial by trial, and keep the journal.

    A trial that was interrupted is finished first. An arm whose server cannot be brought up, or
    fails again and again, is given up: its trials are skipped with the reason. Raises ServerError
    if that is the baseline. What was measured is read from the folder once.
    """
    folder, fleet, listener, design = (
        sitting.folder, sitting.fleet, sitting.listener, sitting.design,
    )  # fmt: skip
    by_id = {trial.trial_id: trial for trial in design.trials}
    study = folder.read()
    measured = {t.trial.trial_id: t for t in study.trials}
    skipped = dict(study.skipped)
    _complete_journal(folder, study)
    interrupted = [i for i, t in measured.items() if not t.complete and i not in skipped]
    while True:
        sitting.check_stop()
        if interrupted:
            choice = Choice(interrupted.pop(0), "it was interrupted")
        else:
            trials = tuple(measured[i] for i in by_id if i in measured)
            choice = choose(replace(study, trials=trials, skipped=dict(skipped)), fleet.running)
        for name in choice.retire:
            fleet.retire(name)
        skipped |= {i: choice.skip[i] for i in _skip(folder, choice.skip, listener)}
        if choice.trial_id is None:
            return
        trial = by_id[choice.trial_id]
        if folder.is_over(trial):
            raise ValueError(f"{trial.trial_id} was chosen, but it is over")
        done = sum(t.complete for t in measured.values())
        earlier_s = _duration_s(measured[trial.trial_id]) if trial.trial_id in measured else 0.0
        starts_s = fleet.start_s.get(trial.arm, 0.0)
        began = time.monotonic()
        reason, result = choice.reason, None
        try:
            fleet.ready(design.arm(trial.arm))
            listener.trial_started(trial, Progress(done, None, choice.to_go_s))
            result = sitting.run_trial(trial, cells[trial.trial_id])
        except ServerError as error:
            if trial.arm == design.arms[0].name:
                raise
            reason = f"the server of arm {trial.arm} failed: {error.what}"
            listener.note(f"arm {trial.arm} is given up: {error}")
        start_s = fleet.start_s.get(trial.arm, 0.0) - starts_s
        folder.note_pick(
            PickRecord(
                trial_id=trial.trial_id,
                reason=reason,
                regret_bound=choice.regret_bound,
                started_server=start_s > 0,
                start_s=start_s,
                seconds=earlier_s + max(0.0, time.monotonic() - began - start_s),
            )
        )
        if result is None:
            fleet.retire(trial.arm)
            lost = {t.trial_id: reason for t in design.trials if t.arm == trial.arm}
            skipped |= dict.fromkeys(_skip(folder, lost, listener), reason)
            interrupted = [i for i in interrupted if i not in skipped]
        else:
            measured[trial.trial_id] = result
            listener.trial_finished(result, Progress(done + 1, None, choice.to_go_s))


def _complete_journal(folder: StudyFolder, study: StudyData) -> None:
    """Add the trial that was complete when specwise was killed before it could note it."""
    noted = {pick.trial_id for pick in folder.picks()}
    for measured in study.trials:
        if measured.complete and measured.trial.trial_id not in noted:
            folder.note_pick(
                PickRecord(
                    trial_id=measured.trial.trial_id,
                    reason="it was interrupted",
                    regret_bound=None,
                    started_server=False,
                    start_s=0.0,
                    seconds=_duration_s(measured),
                )
            )


def _duration_s(measured: MeasuredTrial) -> float:
    """How long a trial has run so far; a part that was killed counts up to its last record."""
    ended: dict[int, float] = {}
    for record in measured.records:
        ended[record.part] = max(ended.get(record.part, 0.0), record.finished_s)
    return sum((ended | {part.number: part.duration_s for part in measured.parts}).values())


def _skip(folder: StudyFolder, reasons: Mapping[str, str], listener: Listener) -> set[str]:
    """Record the trials that need not be run and say so, a line for each reason."""
    by_reason: dict[str, list[Trial]] = {}
    for trial in folder.design.trials:
        if trial.trial_id in reasons and not folder.is_over(trial):
            folder.skip(trial, reasons[trial.trial_id])
            by_reason.setdefault(reasons[trial.trial_id], []).append(trial)
    for reason, trials in by_reason.items():
        loads = dict.fromkeys(trial.load.label for trial in trials)
        listener.note(f"skipping {', '.join(loads)} ({len(trials)} trials): {reason}")
    return {trial.trial_id for trials in by_reason.values() for trial in trials}


@dataclass(frozen=True, slots=True)
class _Sitting:
    """One uninterrupted execution of (what is left of) a study."""

    folder: StudyFolder
    prompts: PromptPlan
    fleet: Fleet
    base: Path
    listener: Listener
    stop: Callable[[], bool]
    resume: str  # the command to go on with

    @property
    def design(self) -> StudyDesign:
        return self.folder.design

    def deal(self, trial: Trial) -> tuple[ChosenPrompt, ...]:
        workload, sent_as = self._prompts_of(trial)
        chosen = self.prompts.deal(workload, trial.load, trial.repeat, trial.requests)
        return tuple(replace(c, segment=sent_as[c.segment.name]) for c in chosen)

    def _warmup(self, trial: Trial) -> tuple[ChosenPrompt, ...]:
        workload, sent_as = self._prompts_of(trial)
        chosen = self.prompts.warmup(workload)
        return tuple(replace(c, segment=sent_as[c.segment.name]) for c in chosen)

    def _prompts_of(self, trial: Trial) -> tuple[Workload, Mapping[str, Segment]]:
        """The workload whose prompts ``trial`` sends, and what each of its segments is sent as.

        Variants of a segment are dealt that segment's own cell: the very same prompts.
        """
        workload = self.design.workload(trial.workload)
        segments = [self.design.segment(name) for name, _ in workload.shares]
        sent_as = {s.same_prompts_as or s.name: s for s in segments}
        if not any(s.same_prompts_as for s in segments):
            return workload, sent_as
        shares = tuple(zip(sent_as, (share for _, share in workload.shares), strict=True))
        return Workload("+".join(sent_as), shares), sent_as

    def run_trial(self, trial: Trial, chosen: Sequence[ChosenPrompt]) -> MeasuredTrial:
        """Send what is left of one trial, in as many parts as the server's health demands."""
        arm = self.design.arm(trial.arm)
        measured = self.folder.read_trial(trial)
        for attempt in range(MAX_PARTS_PER_SITTING):
            left = remaining(measured)
            if not left:
                break
            self.check_stop()
            if attempt:
                self.listener.note(f"{trial.trial_id}: the server went away; going on")
            target = self.fleet.ready(arm)
            _warm_up(target, self._warmup(trial), trial)
            self.check_stop()
            measured = self._run_part(measured, [c for c in chosen if c.index in left], target)
        if remaining(measured):
            self.check_stop()
            raise ServerError(
                f"The server of arm {trial.arm!r} failed {MAX_PARTS_PER_SITTING} times in trial "
                f"{trial.trial_id}.{self.fleet.last_words(arm)}",
                f"Everything measured is kept. When the server is well, run `{self.resume}`.",
            )
        with self.folder.recording(trial) as writer:
            writer.complete()
        return replace(measured, complete=True)

    def check_stop(self) -> None:
        if self.stop():
            raise StoppedError(
                "Stopped; everything measured is kept.",
                f"Go on with `{self.resume}`.",
            )

    def _run_part(
        self, before_it: MeasuredTrial, chosen: Sequence[ChosenPrompt], target: Target
    ) -> MeasuredTrial:
        """One stretch of load: records as they end, counters and gauges around them.

        Returns the trial as it stands in the folder afterwards.
        """
        trial = before_it.trial
        arm = self.design.arm(trial.arm)
        part = 1 + max((r.part for r in before_it.records), default=-1)
        records = {r.index: r for r in before_it.records}
        requests = self._plan(trial, chosen, target, part)
        refused: list[RequestRecord] = []

        def away() -> bool:
            return len(refused) >= REFUSALS_BEFORE_PAUSE or not self.fleet.alive(arm)

        before = _scrape(target)
        with self.folder.recording(trial) as writer:

            def write(request: RequestRecord) -> None:
                writer.request(request)
                records[request.index] = request

            def record(request: RequestRecord) -> None:
                # A refused connection is the arm's failure if the server answers what was sent
                # later: one that shuts down refuses while it still answers what it has. Otherwise
                # it is away: the run pauses or ends, and what was refused is sent again in the next
                # part. A few at the end count if they were refused there too.
                if request.outcome is Outcome.REFUSED:
                    refused.append(request)
                    return
                if request.outcome in (Outcome.OK, Outcome.HTTP_ERROR):
                    flush(request.sent_s)
                write(request)

            def flush(before_s: float) -> None:
                for held in [r for r in refused if r.finished_s <= before_s]:
                    write(held)
                    refused.remove(held)

            with _GaugeSampler(target) as gauges, GpuSampler(arm) as gpus:
                run = run_load(
                    requests,
                    target=target,
                    concurrency=int(trial.load.value) if trial.load.loop is Loop.CLOSED else None,
                    part=part,
                    on_record=record,
                    keep_text=self.design.keep_text,
                    stop=lambda: self.stop() or away(),
                )
            if before_it.parts and not away():
                flush(math.inf)
            after = _scrape(target)
            delta = metrics.difference(before, after) if before and after else None
            ended = TrialPart(
                started_at=run.started_at,
                duration_s=run.duration_s,
                client=run.client,
                counters=delta.counters if delta else {},
                counters_reset=delta.reset if delta else False,
                gauges=gauges.samples(),
                number=part,
                gpus=gpus.series(),
                gpu_note=gpus.note,
            )
            writer.part(ended)
        return replace(
            before_it,
            records=tuple(records[index] for index in sorted(records)),
            parts=(*before_it.parts, ended),
        )

    def _plan(
        self, trial: Trial, chosen: Sequence[ChosenPrompt], target: Target, part: int
    ) -> list[PlannedRequest]:
        times: Sequence[float | None] = [None] * len(chosen)
        if trial.load.loop is Loop.OPEN:
            times = self._arrival_times(trial.load, trial.repeat, len(chosen), part)
        salt = f"{self.design.name}-{trial.trial_id}-{part}"
        return [_planned(c, target, at, salt) for c, at in zip(chosen, times, strict=True)]

    def _arrival_times(
        self, load: LoadPoint, repeat: int, count: int, part: int
    ) -> tuple[float, ...]:
        """The same for every arm: the draw depends on the load, the repeat and the part only."""
        trace = read_trace(self.base, load.trace) if load.trace else ()
        rng = np.random.default_rng([self.design.seed, 3, int(load.value * 1000), repeat, part])
        return intended_times(
            load.arrivals, load.value, count, rng, burstiness=load.burstiness, trace=trace
        )


def _planned(
    chosen: ChosenPrompt,
    target: Target,
    intended_s: float | None,
    salt: str,
    max_tokens: int | None = None,
) -> PlannedRequest:
    """The request for a prompt. ``salt`` keeps the prefix cache of one trial from another's.

    vLLM hashes ``cache_salt`` into its prefix-cache keys (0.9 and later; earlier versions ignore
    it), so a prompt finds what its own trial cached, as in production, and nothing else.
    """
    segment, prompt = chosen.segment, chosen.prompt
    limit = min(prompt.max_tokens or segment.max_tokens, segment.max_tokens)
    return PlannedRequest(
        index=chosen.index,
        prompt_id=prompt.prompt_id,
        segment=segment.name,
        temperature=segment.temperature,
        path=endpoint(segment.api),
        body=request_body(
            segment.api,
            model=target.model,
            prompt=prompt.as_messages() if segment.api is Api.CHAT else prompt.as_text(),
            max_tokens=min(limit, max_tokens or limit),
            temperature=segment.temperature,
            top_p=segment.top_p,
            extra={"cache_salt": salt},
        ),
        intended_s=intended_s,
    )


def _warm_up(target: Target, chosen: Sequence[ChosenPrompt], trial: Trial) -> None:
    """Send the warm-up requests together; ServerError if the server refuses their kind."""
    refused: list[RequestRecord] = []

    def look(record: RequestRecord) -> None:
        if record.outcome is Outcome.HTTP_ERROR and 400 <= (record.status or 0) < 500:
            refused.append(record)

    if not chosen:
        return
    run_load(
        [_planned(c, target, None, f"warm-up-{trial.trial_id}", WARMUP_MAX_TOKENS) for c in chosen],
        target=target,
        concurrency=len(chosen),
        part=0,
        on_record=look,
    )
    permanent = [record for record in refused if record.status != 429]
    if len(permanent) == len(chosen):
        raise ServerError(
            f"{target.url} refuses every warm-up request: HTTP {permanent[0].status}, "
            f"{permanent[0].error}",
            "Correct the segment (model, prompt length, sampling options) or the server.",
        )


def _scrape(target: Target) -> metrics.Snapshot | None:
    try:
        return metrics.scrape(target.url, headers=target.headers)
    except ServerError:
        return None


class _GaugeSampler:
    """Fetches /metrics once a second on a thread while a part runs; parses when it is over."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = threading.Event()
        self._raw: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    def __enter__(self) -> _GaugeSampler:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        url, headers = self._target.url, self._target.headers
        with metrics.quiet_client(url) as client:
            while not self._stop.wait(GAUGE_PERIOD_S):
                try:
                    text = metrics.fetch(url, headers=headers, client=client)
                except ServerError:
                    continue  # a gap in the series, not a failure of the trial
                self._raw.append((time.monotonic() - self._began, text))

    def samples(self) -> tuple[GaugeSample, ...]:
        """The gauges over time; parsing waits until the load is over so as not to disturb it."""
        snapshots = [(at, metrics.parse(text)) for at, text in self._raw]
        return tuple(
            GaugeSample(
                at_s=round(at, 3),
                running=snapshot.gauges.get("running"),
                waiting=snapshot.gauges.get("waiting"),
                kv_use=snapshot.gauges.get("kv_use"),
            )
            for at, snapshot in snapshots
        )


class _TrialClock:
    """Estimates the time to go from trials that are over: the same cell, else the same load."""

    def __init__(self, design: StudyDesign) -> None:
        self._trials = design.trials
        self._took: list[tuple[Trial, float]] = []
        self.done: set[str] = set()

    def add(self, trial: Trial, took_s: float) -> None:
        self._took.append((trial, took_s))
        self.done.add(trial.trial_id)

    def progress(self) -> Progress:
        left = [trial for trial in self._trials if trial.trial_id not in self.done]
        to_go = [self._expected_s(trial) for trial in left] if self._took else None
        return Progress(
            done=len(self._trials) - len(left),
            total=len(self._trials),
            to_go_s=sum(to_go) if to_go is not None else None,
        )

    def _expected_s(self, trial: Trial) -> float:
        likenesses: Iterable[Callable[[Trial], object]] = (
            lambda t: (t.arm, t.workload, t.load),
            lambda t: (t.workload, t.load),
            lambda t: t.load,
        )
        for likeness in likenesses:
            like = [took for other, took in self._took if likeness(other) == likeness(trial)]
            if like:
                return statistics.fmean(like)
        per_request = [took / other.requests for other, took in self._took]
        return statistics.fmean(per_request) * trial.requests
