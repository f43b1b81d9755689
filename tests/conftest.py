"""What every test may rely on."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine makes a slow example, not a wrong one.
settings.register_profile("specwise", deadline=None)
settings.load_profile("specwise")

HERE = Path(__file__).parent
# What they compare with the clock would be another test's doing if that ran beside them.
ALONE = [
    HERE / "real_vllm",
    HERE / "measurement" / "test_alarm.py",
    HERE / "measurement" / "test_calibration.py",
    HERE / "measurement" / "test_connection.py",
    HERE / "measurement" / "test_load.py",
    HERE / "measurement" / "test_receiver.py",
    HERE / "monitoring" / "test_tap.py",
    HERE / "monitoring" / "test_tap_reading.py",
    HERE / "prediction" / "test_known_truth.py",
    HERE / "prediction" / "test_twin.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make test` runs one by one, after all others."""
    assert all(path.exists() for path in ALONE)
    for item in items:
        if any(item.path.is_relative_to(path) for path in ALONE):
            item.add_marker(pytest.mark.alone)


def pytest_collection_finish() -> None:
    """Leave thousands of collected tests out of every pass of the garbage collector."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Take Ctrl-C as a terminal would send it.

    A shell starts background jobs with SIGINT ignored, every process below inherits that, and then
    the tests that interrupt something would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
