"""Step costs fitted to measured steps: what `specwise calibrate` stores and `predict` reads.

A step takes T(n) for n tokens through the target, plus a slope over the cache, plus for a drafter
its first pass over the n tokens and k - 1 passes over one token a request:

    step = T(n) + c C + [first pass] (p + d n) + (k - 1) (p + d r),
    T(n) = t0 + t1 n + sum over knots m of h_m max(n - m, 0) + g_m min(n, m),

with n tokens, C cached tokens, r requests. All coefficients are non-negative (Lawson and Hanson's
NNLS, on relative errors), so that more work never costs less; the two kinds of knots let T bend
either way: flat while weights are loaded, steeper once compute binds, or less steep where threads
fill up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray
from scipy.optimize import nnls

from specwise.errors import InputError, StoreError
from specwise.prediction.costs import StepShape

SCHEMA_VERSION = 1
KNOTS = (4, 16, 64, 256)
_STEP_NOISE = 0.02  # relative; weighs a slope that was found apart against the steps
_FEWEST_ABOVE = 3
_REWEIGHTED = 6
_NEXT = "Make one with `specwise calibrate --out FILE`."


@dataclass(frozen=True, slots=True)
class ObservedStep:
    """The median time of steps of one shape, of the baseline (``k`` None) or a speculating server.

    ``tokens``, ``context_tokens`` and ``requests`` as in `StepShape`; ``steps`` is how many were
    seen. A first step over prompts only (prefill) has ``prefill`` set: no later draft passes.
    """

    tokens: float
    context_tokens: float
    requests: float
    k: int | None
    seconds: float
    steps: int
    prefill: bool = False


@dataclass(frozen=True, slots=True)
class FittedCosts:
    """Coefficients of the module's formula, in seconds; ``method`` is "" for a baseline.

    ``lookup`` says that the method drafts without a model: p is then its only cost.
    """

    base_s: float
    token_s: float
    above_s: tuple[float, ...]
    below_s: tuple[float, ...]
    context_token_s: float
    pass_s: float = 0.0
    draft_token_s: float = 0.0
    method: str = ""

    @property
    def speculates(self) -> bool:
        """Whether a drafter runs."""
        return bool(self.method)

    def target_s(self, tokens: Any, context_tokens: Any, requests: Any) -> Any:  # noqa: ARG002
        """T(n) + c C."""
        found = self.base_s + self.token_s * tokens + self.context_token_s * context_tokens
        for knot, above_s, below_s in zip(KNOTS, self.above_s, self.below_s, strict=True):
            found = found + above_s * np.maximum(tokens - knot, 0)
            found = found + below_s * np.minimum(tokens, knot)
        return found

    def draft_s(self, tokens: Any, context_tokens: Any, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """(p + d n) + (k - 1)(p + d r); a lookup's p alone."""
        if not self.method:
            return 0.0 * tokens
        if self.method in ("ngram", "suffix"):
            return self.pass_s * np.minimum(k, 1)
        later = np.maximum(k - 1, 0)
        first_s = self.pass_s + self.draft_token_s * tokens
        return first_s + later * (self.pass_s + self.draft_token_s * requests)

    def overhead_s(self, requests: Any, k: Any) -> Any:  # noqa: ARG002
        """Nothing apart: the host's work is inside what was measured."""
        return 0.0 * requests

    def step_s(self, shape: StepShape) -> Any:
        """The whole step."""
        return self.target_s(shape.tokens, shape.context_tokens, shape.requests) + self.draft_s(
            shape.tokens, shape.context_tokens, shape.requests, shape.k
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs of the baseline and of one speculating configuration, with what they were fitted to.

    ``residuals[i]`` is predicted / observed - 1 of ``observed[i]``.
    """

    baseline: FittedCosts
    candidate: FittedCosts
    observed: tuple[ObservedStep, ...]
    residuals: tuple[float, ...]
    about: Mapping[str, Any]

    @property
    def median_error(self) -> float:
        """Median absolute relative error over the observations."""
        return float(np.median(np.abs(self.residuals)))


def fit_steps(observed: Sequence[ObservedStep], *, method: str, about: Mapping[str, Any]) -> Fit:
    """The coefficients that fit ``observed`` best, of the baseline's steps and one method's."""
    plain = [o for o in observed if o.k is None]
    speculating = [o for o in observed if o.k is not None]
    return fit_methods(plain, {method: speculating}, about=about)[method]


def fit_methods(
    plain: Sequence[ObservedStep],
    by_method: Mapping[str, Sequence[ObservedStep]],
    *,
    about: Mapping[str, Any],
    methods: Mapping[str, str] | None = None,
    context_slope: tuple[float, float] | None = None,
) -> dict[str, Fit]:
    """The coefficients that fit the baseline's ``plain`` steps and every method's best, together.

    The target's T is shared by all: a verify step is a step over more tokens. Each method has a p
    and a d of its own; ``methods`` has the method of a name in ``by_method`` that is not one
    itself, such as a second draft model's. ``context_slope`` is (c, its standard error) where it
    was found apart, from steps of one batch size: over steps of several, more requests and more
    cache look the same.
    Raises InputError where there are too few different shapes.
    """
    if len({o.tokens for o in plain}) < 3 or not all(by_method.values()):
        raise InputError(
            "Too few different steps were observed to fit costs.",
            "Measure at three concurrencies or more, with and without speculation.",
        )
    names = list(by_method)
    methods = {name: name for name in names} | dict(methods or {})
    groups = [plain, *by_method.values()]
    seconds = np.array([o.seconds for group in groups for o in group])
    rows = np.array([_target_basis(o) for group in groups for o in group])
    drafting = np.zeros((len(rows), 2 * len(names)))
    begins = np.cumsum([0, *(len(group) for group in groups)])
    for place, name in enumerate(names):
        own = [_draft_basis(o, methods[name]) for o in by_method[name]]
        drafting[begins[place + 1] : begins[place + 2], 2 * place : 2 * place + 2] = own
    rows = np.hstack([rows, drafting])
    coefficients = _coefficients(rows, seconds, context_slope)
    residuals = rows @ coefficients / seconds - 1
    count = len(KNOTS)
    base, token, context = (float(c) for c in coefficients[:3])
    above = tuple(float(c) for c in coefficients[3 : 3 + count])
    below = tuple(float(c) for c in coefficients[3 + count : 3 + 2 * count])
    baseline = FittedCosts(base, token, above, below, context)
    found = {}
    for place, name in enumerate(names):
        at = 3 + 2 * count + 2 * place
        pass_s, draft_token_s = (float(c) for c in coefficients[at : at + 2])
        own_residuals = residuals[begins[place + 1] : begins[place + 2]]
        found[name] = Fit(
            baseline=baseline,
            candidate=replace(
                baseline, pass_s=pass_s, draft_token_s=draft_token_s, method=methods[name]
            ),
            observed=(*plain, *by_method[name]),
            residuals=tuple(float(r) for r in (*residuals[: begins[1]], *own_residuals)),
            about=about,
        )
    return found


def _coefficients(
    rows: NDArray[np.float64],
    seconds: NDArray[np.float64],
    context_slope: tuple[float, float] | None,
) -> NDArray[np.float64]:
    """NNLS on relative errors, those far above the usual counting less (Huber's weights).

    A knot that hardly any step lies above is left alone: one slow step would be its slope.
    """
    relative = rows / seconds[:, None]
    for place, knot in enumerate(KNOTS):
        if (rows[:, 1] > knot).sum() < _FEWEST_ABOVE:
            relative[:, [_CONTEXT + 1 + place, _CONTEXT + 1 + len(KNOTS) + place]] = 0.0
    prior = np.zeros((1, rows.shape[1]))
    wanted = 0.0
    if context_slope is not None:
        slope, error = context_slope
        prior[0, _CONTEXT] = _STEP_NOISE / error
        wanted = max(slope, 0.0) * prior[0, _CONTEXT]
    weights = np.ones(len(seconds))
    for _ in range(_REWEIGHTED):
        found, _ = nnls(np.vstack([relative * weights[:, None], prior]), np.append(weights, wanted))
        errors = np.abs(relative @ found - 1)
        usual = max(_STEP_NOISE, 1.4826 * float(np.median(errors)))
        weights = np.sqrt(np.minimum(1.0, 2 * usual / np.maximum(errors, 1e-12)))
    return np.asarray(found)


_CONTEXT = 2  # the place of c in `_target_basis`


def _target_basis(step: ObservedStep) -> list[float]:
    """What each coefficient of T and c is multiplied with for this step."""
    n = step.tokens
    above = [max(n - knot, 0.0) for knot in KNOTS]
    return [1.0, n, step.context_tokens, *above, *(min(n, float(knot)) for knot in KNOTS)]


def _draft_basis(step: ObservedStep, method: str) -> tuple[float, float]:
    """What the drafter's p and d are multiplied with for this step."""
    if method in ("ngram", "suffix"):
        return (0.0 if step.prefill else 1.0, 0.0)
    later = 0 if step.prefill or step.k is None else max(step.k - 1, 0)
    return (1.0 + later, step.tokens + later * step.requests)


def write_fit(fit: Fit, path: Path) -> None:
    """Store ``fit`` as JSON; raises StoreError when it cannot be written."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "about": dict(fit.about),
        "median_error": fit.median_error,
        "baseline": asdict(fit.baseline),
        "candidate": asdict(fit.candidate),
        "observed": [asdict(o) for o in fit.observed],
        "residuals": fit.residuals,
    }
    try:
        path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}.", "Give another --out.") from error


def read_fit(path: Path) -> Fit:
    """What `write_fit` stored; raises InputError for a file that is something else."""
    try:
        held = orjson.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"Costs file {path} cannot be read: {error}.", _NEXT) from error
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path} is not a costs file: {error}.", _NEXT) from error
    if not isinstance(held, dict) or held.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is not a costs file of schema {SCHEMA_VERSION}.", _NEXT)
    try:
        return Fit(
            baseline=_costs(held["baseline"]),
            candidate=_costs(held["candidate"]),
            observed=tuple(ObservedStep(**o) for o in held["observed"]),
            residuals=tuple(float(r) for r in held["residuals"]),
            about=dict(held["about"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a whole costs file: {error}.", _NEXT) from error


def _costs(held: Mapping[str, Any]) -> FittedCosts:
    # A file of fewer knots is of the same form: what it lacks is 0.
    knots = {name: [float(v) for v in held[name]] for name in ("above_s", "below_s")}
    tuples = {name: (*v, *[0.0] * (len(KNOTS) - len(v))) for name, v in knots.items()}
    costs = FittedCosts(**{**held, **tuples})
    numbers = (costs.base_s, costs.token_s, costs.pass_s, *costs.above_s, *costs.below_s)
    lengths = {len(costs.above_s), len(costs.below_s)}
    if not all(math.isfinite(n) and n >= 0 for n in numbers) or lengths != {len(KNOTS)}:
        raise ValueError("coefficients are not finite non-negative numbers")
    return costs


class _Speculating(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def speculation(self) -> Any: ...


def read_costs(path: Path, candidates: Sequence[_Speculating]) -> dict[str, FittedCosts]:
    """Fitted costs by arm name for a forecast of ``candidates``.

    Raises InputError where a candidate's method is not the one that was calibrated.
    """
    fit = read_fit(path)
    for candidate in candidates:
        if candidate.speculation.method != fit.candidate.method:
            raise InputError(
                f"{path} was calibrated for {fit.candidate.method}, not "
                f"{candidate.speculation.method}.",
                "Ask for that method only, or calibrate the other.",
            )
    return {"baseline": fit.baseline} | {c.name: fit.candidate for c in candidates}
