from __future__ import annotations

import re
import sys
import time
from dataclasses import replace

import pytest
from tests.fake_nvml import FakeGpu, FakeNvml

from specwise.domain import Arm, Deployment
from specwise.measurement.gpu import GpuSampler, is_here, visible_indices

GIB = 2**30
HERE = Arm("a", url="http://127.0.0.1:8000")
VENV = Deployment("m", engine="/venv/bin/python")
STARTED = Arm("a", deployment=VENV)
UUIDS = {0: "GPU-aa11", 1: "GPU-bb22", 2: "GPU-bb33"}


def sampled(arm: Arm, nvml: FakeNvml | None, samples: int = 3) -> GpuSampler:
    """A sampler that ran until it had so many samples, or had said why it cannot."""
    sampler = GpuSampler(arm, nvml=nvml, period_s=0.001)
    with sampler:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            series = sampler.series()
            if not sampler.running or (series and len(series[0].at_s) >= samples):
                break
            time.sleep(0.001)
    return sampler


def test_every_gpu_has_a_series_of_what_nvml_says() -> None:
    nvml = FakeNvml(
        FakeGpu(memory_used_bytes=(0, 10 * GIB, 12 * GIB), utilisation_percent=(0, 100, 40)),
        FakeGpu(name=b"NVIDIA L4", memory_total_bytes=24 * GIB, uuid="GPU-1"),
    )
    sampler = sampled(HERE, nvml)
    first, second = sampler.series()
    assert sampler.note == ""
    assert (first.index, first.name, first.memory_total_bytes) == (
        0,
        "NVIDIA H100 80GB HBM3",
        80 * GIB,
    )
    assert first.memory_used_bytes[:2] == (10 * GIB, 12 * GIB)  # the total took the first answer
    assert first.utilisation[:3] == (0.0, 1.0, 0.4)
    assert list(first.at_s) == sorted(first.at_s)
    assert (second.index, second.name, second.utilisation[0]) == (1, "NVIDIA L4", 0.5)
    assert nvml.open == 0, "NVML was shut down"


def test_what_a_gpu_does_not_say_is_none_and_the_rest_stays() -> None:
    nvml = FakeNvml(FakeGpu(memory_used_bytes=(None,), utilisation_percent=(None, 30)))
    (series,) = sampled(HERE, nvml).series()
    assert set(series.memory_used_bytes) == {None}
    assert series.memory_total_bytes is None
    assert series.utilisation[:2] == (None, 0.3)


@pytest.mark.parametrize(
    ("arm", "nvml", "reason"),
    [
        (HERE, FakeNvml(init_error="Library Not Found"), "no NVIDIA driver .*Library Not Found"),
        (HERE, FakeNvml(), "NVML sees no GPU"),
        (replace(HERE, url="http://gpu7.example:8000"), FakeNvml(FakeGpu()), "not on this machine"),
        (
            Arm("a", deployment=replace(VENV, environment={"CUDA_VISIBLE_DEVICES": ""})),
            FakeNvml(FakeGpu()),
            "no GPU that the server may use",
        ),
        (Arm("a", deployment=Deployment("m")), FakeNvml(FakeGpu()), "computes on the CPU"),
    ],
)
def test_where_there_is_none_the_reason_is_said(arm: Arm, nvml: FakeNvml, reason: str) -> None:
    sampler = sampled(arm, nvml)
    assert sampler.series() == ()
    assert re.search(reason, sampler.note)
    assert nvml.open == 0


def test_without_the_bindings_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert sampled(HERE, None).note == "nvidia-ml-py is not installed"


def test_the_installed_bindings_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeGpu()))
    assert len(sampled(STARTED, None).series()) == 1


def test_a_part_shorter_than_the_period_says_so() -> None:
    sampler = GpuSampler(HERE, nvml=FakeNvml(FakeGpu()), period_s=60)
    with sampler:
        pass
    assert (sampler.series(), sampler.note) == ((), "the trial was over before the first sample")


def test_the_gpus_of_a_started_server_are_those_it_may_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml(*(FakeGpu(uuid=uuid) for uuid in UUIDS.values()))
    own = replace(VENV, environment={"CUDA_VISIBLE_DEVICES": "1,2"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [s.index for s in sampled(Arm("a", deployment=own), nvml).series()] == [1, 2]
    assert [s.index for s in sampled(STARTED, nvml).series()] == [0]
    assert [s.index for s in sampled(HERE, nvml).series()] == [0, 1, 2], "not ours to know"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, {0, 1, 2}),
        ("", set()),
        ("-1", set()),
        ("2, 0", {0, 2}),
        ("0,-1,2", {0}),  # CUDA stops at the first that is none
        ("GPU-bb2", {1}),
        ("MIG-3b7a", {0, 1, 2}),
        ("7", set()),
    ],
)
def test_cuda_visible_devices(visible: str | None, indices: set[int]) -> None:
    assert visible_indices(visible, UUIDS) == indices


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        ("http://10.0.0.7:1", False),
        ("https://llm.example.com", False),
    ],
)
def test_which_servers_run_here(url: str, here: bool) -> None:
    assert is_here(Arm("a", url=url)) is here
