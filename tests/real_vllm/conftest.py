"""Real vLLM servers with the bundled pair, shared by all tests of this folder.

They need the embedded engine; without it the tests fail and name the command that installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.real_vllm.side_by_side import started

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
def arms(deployment: Deployment, drafting: Speculation, logs: Path) -> Iterator[list[Server]]:
    with started(logs, baseline=(deployment, None), draft_model=(deployment, drafting)) as servers:
        yield servers


@pytest.fixture(scope="session")
def baseline_server(arms: list[Server]) -> Server:
    return arms[0]


@pytest.fixture(scope="session")
def drafting_server(arms: list[Server]) -> Server:
    return arms[1]


@pytest.fixture(scope="session")
def synthetic_rates() -> list[float]:
    return [0.6, 0.36, 0.216]


@pytest.fixture(scope="session")
def oddities(
    deployment: Deployment, drafting: Speculation, synthetic_rates: list[float], logs: Path
) -> Iterator[list[Server]]:
    environment = {"SPECWISE_ENGINE_REPAIRS": "none"}
    options = {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": synthetic_rates,
    }
    talkative = replace(
        deployment,
        arguments=(*deployment.arguments, "--enable-log-requests"),
        environment={"VLLM_LOGGING_LEVEL": "DEBUG"},
    )
    with started(
        logs,
        unrepaired=(replace(deployment, environment=environment), drafting),
        synthetic=(talkative, replace(drafting, options=options)),
    ) as servers:
        yield servers


@pytest.fixture(scope="session")
def unrepaired_server(oddities: list[Server]) -> Server:
    """The CPU build as its authors shipped it: it samples from the wrong distribution."""
    return oddities[0]


@pytest.fixture(scope="session")
def synthetic_server(oddities: list[Server]) -> Server:
    """It accepts drafts at `synthetic_rates`, and its log holds every request."""
    return oddities[1]
