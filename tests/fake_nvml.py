"""The few functions of ``pynvml`` that specwise calls, over GPUs that a test describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace


class FakeNvmlError(Exception):
    """Stands in for ``pynvml.NVMLError``."""


@dataclass
class FakeGpu:
    """A GPU; each sample takes the next of its values, None is "not supported"."""

    memory_used_bytes: Sequence[int | None] = (10 * 2**30,)
    utilisation_percent: Sequence[int | None] = (50,)
    memory_total_bytes: int = 80 * 2**30
    name: str | bytes = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-0"
    asked: dict[str, int] = field(default_factory=dict)

    def next(self, what: str, values: Sequence[int | None]) -> int:
        count = self.asked[what] = self.asked.get(what, -1) + 1
        value = values[min(count, len(values) - 1)]
        if value is None:
            raise FakeNvmlError("Not Supported")
        return value


class FakeNvml:
    """Use as the ``nvml`` of a sampler, or put it into ``sys.modules["pynvml"]``."""

    NVMLError = FakeNvmlError

    def __init__(self, *gpus: FakeGpu, init_error: str = "") -> None:
        self.gpus = gpus
        self.init_error = init_error
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise FakeNvmlError(self.init_error)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str | bytes:  # noqa: N802
        return handle.name

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:  # noqa: N802
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> SimpleNamespace:  # noqa: N802
        if None in handle.memory_used_bytes and len(handle.memory_used_bytes) == 1:
            raise FakeNvmlError("Not Supported")
        used = handle.next("memory", handle.memory_used_bytes)
        return SimpleNamespace(used=used, total=handle.memory_total_bytes)

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=handle.next("utilisation", handle.utilisation_percent))
