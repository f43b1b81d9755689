"""What every test may rely on."""

from __future__ import annotations

import signal

from hypothesis import settings

# A busy machine makes a slow example, not a wrong one.
settings.register_profile("specwise", deadline=None)
settings.load_profile("specwise")


def pytest_configure() -> None:
    """Take Ctrl-C as a terminal would send it.

    A shell starts background jobs with SIGINT ignored, every process below inherits that, and then
    the tests that interrupt something would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
