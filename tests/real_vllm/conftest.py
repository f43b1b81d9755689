"""Real vLLM servers with the bundled pair, shared by all tests of this folder.

They need the embedded engine; without it the tests fail and name the command that installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from specwise.domain import Deployment, Speculation
from specwise.facts.bundled import bundled_draft, bundled_target
from specwise.vllm import engine
from specwise.vllm.server import Server

MODEL = "demo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real_vllm)


@pytest.fixture(scope="session")
def engine_python() -> Path:
    return engine.engine_python()


@pytest.fixture(scope="session")
def deployment(engine_python: Path) -> Deployment:
    """The trained target as it is, in float32, where greedy outputs can be compared by token."""
    arguments = ("--max-model-len", "1024", "--dtype", "float32", "--seed", "0")
    return Deployment(model=str(bundled_target()), served_name=MODEL, arguments=arguments)


@pytest.fixture(scope="session")
def drafting() -> Speculation:
    return Speculation("draft_model", k=3, draft=str(bundled_draft()))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def baseline_server(deployment: Deployment, logs: Path) -> Iterator[Server]:
    with Server.start(deployment, log_path=logs / "baseline.log") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def drafting_server(deployment: Deployment, drafting: Speculation, logs: Path) -> Iterator[Server]:
    with Server.start(deployment, drafting, log_path=logs / "draft_model.log") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def unrepaired_server(
    deployment: Deployment, drafting: Speculation, logs: Path
) -> Iterator[Server]:
    """The CPU build as its authors shipped it: it samples from the wrong distribution."""
    unrepaired = replace(deployment, environment={"SPECWISE_ENGINE_REPAIRS": "none"})
    with Server.start(unrepaired, drafting, log_path=logs / "unrepaired.log") as server:
        server.wait_ready()
        yield server
