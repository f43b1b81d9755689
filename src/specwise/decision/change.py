"""What to do about a change: the 5-point rule and the order of remedies (req: D1, D2, D3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from specwise.analysis.before_after import DROP, AcceptanceChange, BeforeAfter
from specwise.analysis.comparison import Effect
from specwise.analysis.study_differences import draft_bits, target_bits
from specwise.decision.findings import counted, listed

SLOWER = 1.05
"""A time per output token this much longer is harm; less is within what a machine drifts."""

RULE = (
    "Rule (req D2): a drop of the acceptance rate by more than 5 percentage points calls for a "
    "remedy. It is a rule of thumb, judged here by the 95 % interval."
)


class Outcome(StrEnum):
    """What can be said about a change."""

    FELL = "fell"
    SLOWER = "slower"
    CANNOT_TELL = "cannot-tell"
    NO_HARM = "no-harm"


EXIT_CODES = {Outcome.FELL: 1, Outcome.SLOWER: 1, Outcome.CANNOT_TELL: 3, Outcome.NO_HARM: 0}


@dataclass(frozen=True, slots=True)
class ChangeVerdict:
    """The outcome in one sentence, why, and what to do, first things first."""

    outcome: Outcome
    headline: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def judge(change: BeforeAfter) -> ChangeVerdict:
    """The verdict on a change.

    "fell" if the acceptance of any segment dropped by more than 5 points for certain; else
    "slower" if a speculating arm's time per output token in the second study's production cell is
    more than 5 % longer for certain (the margin is for drift, which no interval holds); else
    "cannot tell" if any segment is open; else no harm.
    """
    fell = [a for a in change.acceptance if a.verdict == "fell"]
    open_ = [a for a in change.acceptance if a.verdict == "cannot tell"]
    slower = [e for e in production_speedups(change) if e.high < 1 / SLOWER and e.trial_noise_known]
    reasons = [_acceptance_words(a) for a in (*fell, *open_)]
    reasons += [_slower_words(e) for e in slower]
    if fell:
        headline = f"Acceptance fell by more than 5 points on {_places(fell)}."
        return ChangeVerdict(Outcome.FELL, headline, tuple(reasons), tuple(_remedies(change, fell)))
    if slower:
        times = [f"{e.arm} takes {1 / e.ratio:.2f}x the time per output token" for e in slower]
        headline = f"Slower for certain: {listed(times)} at production load."
        return ChangeVerdict(Outcome.SLOWER, headline, tuple(reasons), tuple(_faster(change)))
    if open_:
        headline = f"Not enough to tell whether acceptance fell on {_places(open_)}."
        advice = (_measure_more(open_),)
        return ChangeVerdict(Outcome.CANNOT_TELL, headline, tuple(reasons), advice)
    segments = len({a.segment for a in change.acceptance})
    return ChangeVerdict(
        Outcome.NO_HARM,
        f"No drop of more than 5 points on {counted(segments, 'segment')}, no certain slowdown.",
        tuple(_acceptance_words(a) for a in change.acceptance),
        ("Keep the change. Go on watching acceptance: prompts drift.",),
    )


def production_speedups(change: BeforeAfter) -> list[Effect]:
    """Time per output token, before / after, of the speculating arms in the production cell."""
    design = change.after.design
    speculating = {pair.name for pair in change.arms if not pair.after.is_baseline}
    return [
        e
        for e in change.effects
        if e.metric == "speedup"
        and e.arm in speculating
        and (e.workload, e.segment, e.load)
        == (design.production_workload, None, design.production_load)
    ]


def points(share: float) -> str:
    """A difference of rates in percentage points, signed: ``-7.3``."""
    return f"{share * 100:+.1f}"


def _acceptance_words(change: AcceptanceChange) -> str:
    e = change.estimate
    said = (
        f"{change.segment} ({change.arm}): {e.before:.1%} before, {e.after:.1%} after, "
        f"{points(e.difference)} points"
    )
    if e.low == e.low:  # not NaN
        said += f" [{points(e.low)}, {points(e.high)}]"
    said += f" over {change.units} {change.unit}"
    if change.verdict == "cannot tell":
        said += f"; {_more_words(change)}"
    return f"{said}."


def _more_words(change: AcceptanceChange) -> str:
    if change.units < 2:
        return f"an interval needs at least two {change.unit}"
    if change.more is None:
        return f"it lies so close to -{DROP * 100:.0f} points that no feasible number would tell"
    return f"about {change.more} more {change.unit} would tell"


def _slower_words(effect: Effect) -> str:
    return (
        f"{effect.arm}: {1 / effect.ratio:.2f}x the time per output token "
        f"[{1 / effect.high:.2f}, {1 / effect.low:.2f}]."
    )


def _places(changes: Sequence[AcceptanceChange]) -> str:
    several_arms = len({c.arm for c in changes}) > 1
    return listed([f"{c.segment} ({c.arm})" if several_arms else c.segment for c in changes])


def _measure_more(open_: Sequence[AcceptanceChange]) -> str:
    feasible = [c for c in open_ if c.more is not None]
    if not feasible:
        return (
            "Treat it as a drop of about 5 points: what it costs is in the times, not in the rule."
        )
    most = max(feasible, key=lambda c: c.more or 0)
    return (
        f"Measure about {most.more} more {most.unit} of {most.segment} on both sides: raise "
        "`requests` or `repeats` in both study files alike."
    )


def _remedies(change: BeforeAfter, fell: Sequence[AcceptanceChange]) -> list[str]:
    """What may bring acceptance back, in the order of D3, as far as the manifests tell."""
    pair = next(p for p in change.arms if p.name == fell[0].arm)
    targets = target_bits(change.before, pair.before), target_bits(change.after, pair.after)
    drafts = draft_bits(change.before, pair.before), draft_bits(change.after, pair.after)
    advice = []
    if targets[0] is not None and targets[1] is not None and targets[1] < targets[0]:
        if targets[1] <= 4:
            advice.append(
                "Go from INT4 to INT8 on the target and compare again: the target decides "
                "acceptance, and INT4 costs it more than INT8 does."
            )
        else:
            advice.append(
                f"Take the target back from {targets[1]:g} to {targets[0]:g} bits, or accept the "
                "drop if the times below still pay for it."
            )
        if drafts[1] is not None and drafts[1] != targets[1]:
            advice.append(
                "Then try the draft at the target's level: same-level pairs agree better than "
                "mixed ones."
            )
    elif drafts[0] is not None and drafts[1] is not None and drafts[1] < drafts[0]:
        advice.append(
            "Take the draft back to its former precision: an INT8 draft is nearly free, so a drop "
            "this large is its own."
        )
    else:
        named = sorted({d.what for d in change.differences if d.effect == "change"})
        advice.append(
            f"Undo the change ({listed(named)}) and compare again."
            if named
            else "Nothing in the manifests explains it: look for what changed outside them."
        )
    advice.append(
        "Or change the acceptance method (`specwise flags` lists what your vLLM has), or turn "
        f"speculation off for {_places(fell)}."
    )
    return advice


def _faster(change: BeforeAfter) -> list[str]:
    advice = ["Measure the first study again: if it has become slower too, the machine drifted."]
    if change.controls:
        advice[0] = (
            f"Look at arm {change.controls[0]}, which did not change: if it has become slower too, "
            "the machine drifted."
        )
    advice.append("If it has not, undo the change: acceptance held, its times did not.")
    return advice
