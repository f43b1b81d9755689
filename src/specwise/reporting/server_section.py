"""The report's section on the servers themselves: KV cache, queue, preemptions, GPUs (req: G4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from specwise.analysis.latency import ServingSummary
from specwise.analysis.server_figures import GpuFigures
from specwise.decision.assessment import Assessment
from specwise.domain import LoadPoint, Purpose
from specwise.reporting.wording import MISSING, milliseconds, number, percent

_GIB = 2**30

_FIGURES: tuple[tuple[str, Callable[[ServingSummary], str]], ...] = (
    ("KV cache use, peak", lambda s: percent(s.kv_use_max)),
    ("KV cache use, mean", lambda s: percent(s.kv_use_mean)),
    ("Running requests, mean", lambda s: number(s.running_mean)),
    ("Waiting requests, peak", lambda s: number(s.waiting_max)),
    ("Wait before prefill, mean, ms", lambda s: milliseconds(s.queue_mean_s)),
    ("Preemptions", lambda s: MISSING if s.preemptions is None else f"{s.preemptions:,.0f}"),
    ("Prefix-cache hits", lambda s: percent(s.prefix_hit_rate)),
)


@dataclass(frozen=True, slots=True)
class ServerCell:
    """One workload at one load: a row a figure, with the value of each of ``arms``."""

    workload: str
    load: LoadPoint
    arms: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class ServerSection:
    """The cell of the verdict, every other cell, and what is to be said of the GPUs."""

    production: ServerCell | None
    others: tuple[ServerCell, ...]
    gpu_notes: tuple[str, ...]
    has_gpus: bool


def server_section(assessment: Assessment) -> ServerSection | None:
    """The section; None where no server said anything (a prediction, a server without /metrics)."""
    design = assessment.study.design
    cells: dict[tuple[str, LoadPoint], list[ServingSummary]] = {}
    for summary in assessment.summaries:
        if summary.segment is None and summary.purpose is Purpose.MEASURE:
            cells.setdefault((summary.workload, summary.load), []).append(summary)
    held = [summary for summaries in cells.values() for summary in summaries]
    shown = {key: _cell(*key, summaries) for key, summaries in cells.items()}
    said = any(value != MISSING for cell in shown.values() for _, row in cell.rows for value in row)
    if not said and not any(summary.gpu_note for summary in held):
        return None
    production = (design.production_workload, design.production_load)
    return ServerSection(
        production=shown.get(production),
        others=tuple(cell for key, cell in shown.items() if key != production),
        gpu_notes=_gpu_notes(held),
        has_gpus=any(summary.gpus for summary in held),
    )


def _cell(workload: str, load: LoadPoint, summaries: Sequence[ServingSummary]) -> ServerCell:
    rows = [(label, tuple(figure(s) for s in summaries)) for label, figure in _FIGURES]
    by_arm = [{gpu.index: gpu for gpu in summary.gpus} for summary in summaries]
    for index in sorted({index for gpus in by_arm for index in gpus} - _idle(summaries)):
        rows += _gpu_rows(index, by_arm)
    return ServerCell(workload, load, tuple(summary.arm for summary in summaries), tuple(rows))


def _gpu_rows(
    index: int, by_arm: Sequence[Mapping[int, GpuFigures]]
) -> list[tuple[str, tuple[str, ...]]]:
    gpus = [gpus.get(index) for gpus in by_arm]
    known = next(gpu for gpu in gpus if gpu is not None)
    total = known.memory_total_bytes
    of = f" of {total / _GIB:.1f}" if total else ""
    return [
        (
            f"GPU {index} memory, peak{of} GiB ({known.name})",
            tuple(
                MISSING
                if gpu is None or gpu.memory_used_max_bytes is None
                else f"{gpu.memory_used_max_bytes / _GIB:.1f}"
                for gpu in gpus
            ),
        ),
        (
            f"GPU {index} utilisation, mean",
            tuple(MISSING if gpu is None else percent(gpu.utilisation_mean) for gpu in gpus),
        ),
    ]


def _idle(summaries: Sequence[ServingSummary]) -> set[int]:
    """GPUs on which no kernel was seen to run for any arm, where others were busy."""
    busy: dict[int, bool] = {}
    for gpu in (gpu for summary in summaries for gpu in summary.gpus):
        busy[gpu.index] = busy.get(gpu.index, False) or gpu.utilisation_mean != 0
    return {index for index, used in busy.items() if not used} if any(busy.values()) else set()


def _gpu_notes(summaries: Sequence[ServingSummary]) -> tuple[str, ...]:
    """Why GPU figures are missing, by arm where the reasons differ, and which GPUs idled."""
    reasons: dict[str, dict[str, None]] = {}
    measured = {summary.arm for summary in summaries if summary.gpus}
    for summary in summaries:
        if summary.arm not in measured:
            reason = summary.gpu_note or "not recorded"
            reasons.setdefault(reason, {})[summary.arm] = None
    everyone = {summary.arm for summary in summaries}
    notes = [
        f"GPU figures not measured{'' if arms.keys() == everyone else ' for ' + ', '.join(arms)}: "
        f"{reason}."
        for reason, arms in reasons.items()
    ]
    if idle := sorted(_idle(summaries)):
        notes.append(f"Idle throughout, and not shown: GPU {', '.join(map(str, idle))}.")
    return tuple(notes)
