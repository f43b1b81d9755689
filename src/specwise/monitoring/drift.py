"""Has acceptance fallen from what the study measured? A sequential test with a stated error.

Page's CUSUM (Biometrika 1954) on the log-likelihood ratio of "fallen by delta" against "as
measured", for window rates p_t that are normal about the true rate with a known deviation s_t:

    L_t = (delta / s_t^2) (mu - delta / 2 - p_t),   S_t = max(0, S_(t-1) + L_t),   alarm: S_t >= h.

For any fixed start j the product of likelihood ratios exceeds e^h with probability at most e^-h
while nothing has changed (Ville's inequality), whatever the s_t; a union over the starts gives

    P(false alarm within m windows) <= m e^-h,

so h = ln(m / false_alarm_rate) states the error before anything is seen. A rate above ``mu`` only
makes alarms rarer. After a real fall to mu - delta the alarm takes about 2 h s^2 / delta^2 windows.
The bound holds for windows whose noise is independent; what varies slowly (a mix that changes over
the day) is borne as long as it stays within delta / 2. The study's own rate is uncertain as well:
mu is the lower end of its 95 % interval, so that a small study raises no alarm about itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specwise.monitoring.expectations import MEANINGFUL_DROP, Expectations, Spread

DAY_S = 86_400.0
_UNKNOWN = Spread(requests=100, deviation=0.25, p10=0.0, drafted_tokens=100.0)
"""Where the study has no figures of single requests: half of the deviation that a rate can have."""
_BETWEEN_WINDOWS = 0.01
"""Deviation of the true rate from window to window: prompts of a minute resemble each other."""


@dataclass(frozen=True, slots=True)
class DriftTest:
    """The test's constants, decided before the first window.

    ``measured`` is the study's rate, ``expected`` mu, ``drop`` delta; ``deviation`` is that of a
    `Spread` and ``drafted_per_request`` its mean number of drafts; ``limit`` is h.
    ``false_alarm_rate`` bounds the probability of one false alarm or more over ``horizon_s``.
    """

    measured: float
    expected: float
    drop: float
    deviation: float
    drafted_per_request: float
    window_s: float
    false_alarm_rate: float
    horizon_s: float

    @property
    def limit(self) -> float:
        """h = ln(m / false_alarm_rate) for the m windows of the horizon."""
        return math.log(self.horizon_s / self.window_s / self.false_alarm_rate)

    def window_variance(self, drafted_tokens: float) -> float:
        """s_t^2 of a window's rate: requests vary, and windows vary a little among themselves."""
        requests = max(drafted_tokens / self.drafted_per_request, 1e-9)
        return self.deviation**2 / requests + _BETWEEN_WINDOWS**2

    def expected_delay_s(self, drafted_per_s: float) -> float:
        """About how long a sudden fall by ``drop`` stays unseen at this traffic: 2 h s^2 / d^2."""
        variance = self.window_variance(drafted_per_s * self.window_s)
        return self.window_s * max(1.0, 2 * self.limit * variance / self.drop**2)


@dataclass(frozen=True, slots=True)
class DriftState:
    """Where the test stands: S_t, and when S last left zero, which dates the change.

    ``drafted_tokens`` and ``accepted_tokens`` are those since then. ``alarm_at_s`` is when S first
    reached the limit, None before; times are Unix seconds.
    """

    evidence: float = 0.0
    since_s: float | None = None
    drafted_tokens: float = 0.0
    accepted_tokens: float = 0.0
    alarm_at_s: float | None = None

    @property
    def rate(self) -> float | None:
        """Acceptance since the change began; None while there is no sign of one."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


def drift_test(
    expected: Expectations,
    *,
    segment: str | None = None,
    window_s: float = 60.0,
    false_alarm_rate: float = 0.01,
    horizon_s: float = 30 * DAY_S,
    drop: float = MEANINGFUL_DROP,
) -> DriftTest:
    """The test of one replica (or one ``segment``) against a study.

    By default at most one of a hundred healthy replicas raises an alarm within 30 days. A segment
    that the study does not know raises KeyError.
    """
    rate, spread = expected.rate, expected.spread
    if segment is not None:
        known = {s.segment: s for s in expected.segments}[segment]
        rate, spread = known.rate, known.spread
    spread = spread or _UNKNOWN
    return DriftTest(
        measured=rate,
        expected=rate - 1.96 * spread.deviation / math.sqrt(spread.requests),
        drop=drop,
        deviation=spread.deviation,
        drafted_per_request=spread.drafted_tokens,
        window_s=window_s,
        false_alarm_rate=false_alarm_rate,
        horizon_s=horizon_s,
    )


def step(
    test: DriftTest,
    state: DriftState,
    *,
    at_s: float,
    drafted_tokens: float,
    accepted_tokens: float,
) -> DriftState:
    """The state after a window that ended ``at_s``; a window without drafts changes nothing.

    An alarm stays until S falls back to zero: the test says that acceptance fell, and S that it
    has not come back.
    """
    if drafted_tokens <= 0:
        return state
    rate = accepted_tokens / drafted_tokens
    ratio = (test.drop / test.window_variance(drafted_tokens)) * (
        test.expected - test.drop / 2 - rate
    )
    # Capped at twice the limit: a week of bad acceptance must not take a week to forget.
    evidence = min(max(0.0, state.evidence + ratio), 2 * test.limit)
    if evidence == 0.0:
        return DriftState()
    alarm = state.alarm_at_s
    if alarm is None and evidence >= test.limit:
        alarm = at_s
    return replace(
        state,
        evidence=evidence,
        since_s=at_s - test.window_s if state.since_s is None else state.since_s,
        drafted_tokens=state.drafted_tokens + drafted_tokens,
        accepted_tokens=state.accepted_tokens + accepted_tokens,
        alarm_at_s=alarm,
    )
