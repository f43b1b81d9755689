"""GPU memory and utilisation of the server's machine while a trial part runs, through NVML.

NVML knows the GPUs of this machine only, so a server elsewhere has no figures; neither has a
machine without an NVIDIA driver. Both are said, and nothing is filled in. A server that answers on
a loopback address is taken to run here, which a tunnel can make untrue.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from specwise.domain import Arm, GpuSeries
from specwise.vllm.server import EMBEDDED

SAMPLE_PERIOD_S = 1.0

_Value = TypeVar("_Value")


class Nvml(Protocol):
    """What is used of the module ``pynvml`` (package nvidia-ml-py)."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802, D102 (NVML's names)
    def nvmlShutdown(self) -> None: ...  # noqa: N802, D102
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802, D102
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802, D102
    def nvmlDeviceGetName(self, handle: Any) -> str | bytes: ...  # noqa: N802, D102
    def nvmlDeviceGetUUID(self, handle: Any) -> str | bytes: ...  # noqa: N802, D102
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802, D102
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: N802, D102


class GpuSampler:
    """Samples the GPUs that serve ``arm`` on a thread of its own; a context manager.

    Afterwards `series` holds a series for each GPU, or `note` says why there is none. ``nvml`` is
    the library; by default the installed one is loaded.
    """

    def __init__(
        self, arm: Arm, *, nvml: Nvml | None = None, period_s: float | None = None
    ) -> None:
        self._arm = arm
        self._nvml = nvml
        self._period_s = period_s or SAMPLE_PERIOD_S
        self._devices: list[tuple[int, Any]] = []  # index and handle
        self._identities: list[tuple[str, int | None]] = []  # name and memory
        self._samples: list[tuple[float, list[tuple[int | None, float | None]]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._note = ""

    def __enter__(self) -> GpuSampler:
        self._began = time.monotonic()
        self._note = self._open()
        if not self._note:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join(timeout=10)

    @property
    def running(self) -> bool:
        """Whether it samples at present."""
        return self._thread.is_alive()

    @property
    def note(self) -> str:
        """Why there is no series; empty where there is one."""
        if self._note or self._samples:
            return self._note
        return "the trial was over before the first sample"

    def series(self) -> tuple[GpuSeries, ...]:
        """What was sampled, a series for each GPU; empty where `note` says why."""
        samples = list(self._samples)
        if not samples:
            return ()
        at_s = tuple(round(at, 3) for at, _ in samples)
        return tuple(
            GpuSeries(
                index=index,
                name=name,
                memory_total_bytes=total_bytes,
                at_s=at_s,
                memory_used_bytes=tuple(values[place][0] for _, values in samples),
                utilisation=tuple(values[place][1] for _, values in samples),
            )
            for place, ((index, _), (name, total_bytes)) in enumerate(
                zip(self._devices, self._identities, strict=True)
            )
        )

    def _open(self) -> str:
        """Find the GPUs; the reason if there are none to sample."""
        if reason := _out_of_reach(self._arm):
            return reason
        if self._nvml is None:
            try:
                import pynvml  # noqa: PLC0415 (only while measuring)
            except ImportError:
                return "nvidia-ml-py is not installed"
            self._nvml = pynvml
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return f"no NVIDIA driver on this machine ({error})"
        try:
            handles = [
                (i, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())
            ]
            uuids = {i: _text(nvml.nvmlDeviceGetUUID(handle)) for i, handle in handles}
        except nvml.NVMLError as error:
            self._close()
            return f"NVML failed: {error}"
        chosen = visible_indices(visible_devices(self._arm), uuids)
        self._devices = [(i, handle) for i, handle in handles if i in chosen]
        if not self._devices:
            self._close()
            return "NVML sees no GPU that the server may use"
        for _, handle in self._devices:
            name = self._ask(nvml.nvmlDeviceGetName, handle)
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            self._identities.append(
                (_text(name or "NVIDIA GPU"), None if memory is None else int(memory.total))
            )
        return ""

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            values = [self._sample(handle) for _, handle in self._devices]
            self._samples.append((time.monotonic() - self._began, values))
        self._close()

    def _sample(self, handle: Any) -> tuple[int | None, float | None]:
        """(memory used in bytes, utilisation from 0 to 1) of one GPU, now."""
        assert self._nvml is not None  # noqa: S101 - opened
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates, handle)
        return (
            None if memory is None else int(memory.used),
            None if rates is None else rates.gpu / 100,
        )

    def _ask(self, question: Callable[[Any], _Value], handle: Any) -> _Value | None:
        """The answer, None where this GPU (a MIG slice, unified memory) does not give it."""
        assert self._nvml is not None  # noqa: S101 - opened
        try:
            return question(handle)
        except self._nvml.NVMLError:
            return None

    def _close(self) -> None:
        assert self._nvml is not None  # noqa: S101 - opened
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def _out_of_reach(arm: Arm) -> str:
    """Why no GPU of this machine serves ``arm``; empty where one may."""
    if not is_here(arm):
        return "the server is not on this machine"
    if arm.deployment is not None and arm.deployment.engine == EMBEDDED:
        return "the embedded engine computes on the CPU"
    return ""


def is_here(arm: Arm) -> bool:
    """Whether the server of ``arm`` runs on this machine, as far as its address tells."""
    if arm.url is None:
        return True
    host = urlsplit(arm.url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def visible_devices(arm: Arm) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` of the server that specwise starts for ``arm``; None if unknown."""
    if arm.deployment is None:
        return None
    own = arm.deployment.environment.get("CUDA_VISIBLE_DEVICES")
    return os.environ.get("CUDA_VISIBLE_DEVICES") if own is None else own


def visible_indices(visible: str | None, uuids: dict[int, str]) -> set[int]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` lets through; all where it cannot be understood.

    Numbers count in NVML's order, which is CUDA's among like GPUs; otherwise an entry is the start
    of a UUID. An empty list hides every GPU, and CUDA stops reading at an entry that is none.
    """
    if visible is None:
        return set(uuids)
    chosen: set[int] = set()
    for entry in (entry.strip() for entry in visible.split(",")):
        if re.fullmatch(r"\d+", entry):
            matching = {int(entry)} & uuids.keys()
        elif entry.startswith("MIG-"):
            return set(uuids)
        else:
            matching = {i for i, uuid in uuids.items() if entry and uuid.startswith(entry)}
        if not matching:
            break
        chosen |= matching
    return chosen


def _text(value: str | bytes) -> str:
    """Older bindings give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
