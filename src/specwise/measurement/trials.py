"""The trials of a design, in their order of execution (architecture rule 2).

Within a block (workload, load, repeat) every arm runs once on the same prompts. The order of arms
is reversed from one block to the next and from one repeat to the next (A B C, C B A, ...), so that
slow drift of the machine falls on all arms alike. In one block per load point the baseline runs a
second time at the far end of the block: the A/A trial. With servers that cannot stay in memory
together, one arm runs all its blocks of a repeat before the next starts, and the order of arms is
reversed between repeats.
"""

from __future__ import annotations

from collections.abc import Mapping

from specwise.domain import Arm, LoadPoint, Purpose, Trial, Workload

_Planned = tuple[str, str, LoadPoint, int, Purpose]


def order_trials(
    arms: tuple[Arm, ...],
    workloads: tuple[Workload, ...],
    loads: tuple[LoadPoint, ...],
    *,
    requests: Mapping[LoadPoint, int],
    repeats: int,
    noise_workload: str | None,
    together: bool,
    load_by_load: bool = False,
) -> tuple[Trial, ...]:
    """Every trial of the design in the order described at the top of this module.

    ``requests`` is the size of a trial at each load. ``noise_workload`` gets the A/A trials, None
    for none. ``load_by_load`` finishes all repeats of a load before the next load begins, so that
    a study can end there.
    """
    stages = [(load,) for load in loads] if load_by_load else [loads]
    planned: list[_Planned] = []
    for number, stage in enumerate(stages):
        planned += _stage(
            arms, workloads, stage, repeats, noise_workload, together=together, first=number
        )
    return tuple(
        Trial(
            trial_id=f"{number:04d}-{arm}-{workload}-{load.label}-r{repeat}"
            + ("-aa" if purpose is Purpose.NOISE_FLOOR else ""),
            arm=arm,
            workload=workload,
            load=load,
            repeat=repeat,
            purpose=purpose,
            requests=requests[load],
        )
        for number, (arm, workload, load, repeat, purpose) in enumerate(planned, start=1)
    )


def _stage(
    arms: tuple[Arm, ...],
    workloads: tuple[Workload, ...],
    loads: tuple[LoadPoint, ...],
    repeats: int,
    noise_workload: str | None,
    *,
    together: bool,
    first: int,
) -> list[_Planned]:
    """The trials of these loads, repeat by repeat; ``first`` numbers the first block."""
    baseline = arms[0].name
    names = [arm.name for arm in arms]
    blocks = [(workload.name, load) for workload in workloads for load in loads]
    planned: list[_Planned] = []
    for repeat in range(repeats):
        if not together:
            ordered = names if (first + repeat) % 2 == 0 else names[::-1]
            for name in ordered:
                for workload, load in blocks:
                    planned.append((name, workload, load, repeat, Purpose.MEASURE))
                    if name == baseline and workload == noise_workload and repeat == 0:
                        planned.append((name, workload, load, repeat, Purpose.NOISE_FLOOR))
            continue
        for number, (workload, load) in enumerate(blocks, start=first):
            forward = (number + repeat) % 2 == 0
            ordered = names if forward else names[::-1]
            block = [(name, workload, load, repeat, Purpose.MEASURE) for name in ordered]
            if workload == noise_workload and repeat == 0:
                again = (baseline, workload, load, repeat, Purpose.NOISE_FLOOR)
                block = [*block, again] if forward else [again, *block]
            planned.extend(block)
    return planned
