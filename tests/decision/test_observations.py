from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.decision.tunings import Tuning

from specwise.decision.observations import log_goodput


def test_goodput_counts_only_what_meets_the_limits(tuned: Tuning) -> None:
    tables = next(iter(tuned.measured.values()))
    whole = log_goodput(tables[0])
    halved = replace(tables[0], meets_slo=np.arange(len(tables[0].ok)) % 2 == 0)
    share = halved.meets_slo.mean()
    assert log_goodput(halved) == pytest.approx(whole + math.log(share))
    none = replace(tables[0], ok=np.zeros_like(tables[0].ok))
    assert math.isnan(log_goodput(none))
