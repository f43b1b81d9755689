from __future__ import annotations

import pytest
from tests.fake_vllm import FakeVllm

from specwise.errors import ServerError
from specwise.measurement.calibration import Wave, observe
from specwise.measurement.load import Target

WAVES = (Wave(1, 24, 30), Wave(4, 24, 30), Wave(8, 24, 30))


def step_s(running: int) -> float:
    return 0.010 + 0.002 * running


@pytest.mark.parametrize(("k", "conditional"), [(None, ()), (4, (0.5, 0.5, 0.5, 0.5))])
def test_the_configured_step_times_are_found(k: int | None, conditional: tuple[float, ...]) -> None:
    notes: list[str] = []
    with FakeVllm(step_s=step_s, conditional=conditional) as server:
        found = observe(Target(server.url, server.model), WAVES, k=k, note=notes.append)
    decoding = [step for step in found if not step.prefill]
    assert [step.requests for step in decoding] == [1, 4, 8]
    for step in decoding:
        assert step.k == k
        assert step.tokens == step.requests * (1 + (k or 0))
        # An event loop on a shared machine wakes up late, never early.
        assert step.seconds == pytest.approx(step_s(int(step.requests)), rel=0.15)
        assert step.seconds > 0.98 * step_s(int(step.requests))
    assert [step.requests for step in found if step.prefill] == [1]
    assert len(notes) == len(WAVES)


def test_no_prompt_is_sent_twice() -> None:
    with FakeVllm(step_s=lambda _: 0.002) as server:
        observe(Target(server.url, server.model), (Wave(2, 24, 6),), k=None)
        prompts = [str(body["prompt"]) for body in server.bodies]
    assert len(prompts) == len(set(prompts)) == 6  # a warm-up and two rounds


def test_a_failing_server_is_one_clear_error() -> None:
    with FakeVllm(fail_status=500) as server, pytest.raises(ServerError) as caught:
        observe(Target(server.url, server.model), WAVES, k=None)
    assert "1 of 1 calibration requests failed" in str(caught.value)
    assert "log" in str(caught.value)
