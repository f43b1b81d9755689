from __future__ import annotations

import pytest
from tests.decision.tunings import HOPELESS, TURNING, Tuning


@pytest.fixture(scope="session")
def tuned() -> Tuning:
    return Tuning(TURNING).to_its_end()


@pytest.fixture(scope="session")
def hopeless() -> Tuning:
    return Tuning(HOPELESS).to_its_end()
