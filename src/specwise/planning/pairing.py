"""Is this draft sensible for this target? Rules over metadata, each with its reason and source.

Everything here ranks what to *test*: no rule replaces a measurement at the user's own load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from specwise.domain import Checkpoint
from specwise.facts.checkpoint import load_local
from specwise.facts.tokenizer import TokenizerComparison, compare_tokenizers, read_tokenizer
from specwise.planning.memory import nominal_billions, weight_bytes
from specwise.vllm.command import Version, names
from specwise.vllm.findings import ADVICE, ERROR, WARNING, Finding, ModelFacts
from specwise.vllm.flags import method_problem

GOOD = "good"
SWEET_SPOT = (8.0, 12.0)  # target : draft parameters (req: A1)
LARGEST_USUAL_GPU_BYTES = 80e9  # a target above this spans GPUs
_RATIO_SOURCE = "rule of thumb: draft between 1:8 and 1:12 of the target"


@dataclass(frozen=True, slots=True)
class Band:
    """A range of size ratios, up to ``below``, and what it means."""

    below: float
    name: str
    severity: str
    why: str


BANDS: tuple[Band, ...] = (
    Band(4, "too large", WARNING, "each draft pass costs a quarter of a target pass or more"),
    Band(
        SWEET_SPOT[0],
        "large",
        ADVICE,
        "it predicts well, but costs memory and compute and moves the crossover to lower loads",
    ),
    Band(SWEET_SPOT[1], "good", GOOD, "inside the sweet spot of 1:8 to 1:12"),
    Band(40, "small", ADVICE, "cheap to run; acceptance has to be measured"),
    Band(55, "weak", WARNING, "a draft this much smaller diverges from its target early"),
    Band(
        math.inf, "too small", WARNING, "a draft this much smaller diverges from its target early"
    ),
)


def ratio_band(ratio: float) -> Band:
    """The band of a target : draft ratio of parameters (req: A1, A2)."""
    return next(band for band in BANDS if ratio < band.below)


@dataclass(frozen=True, slots=True)
class PairReport:
    """A draft judged for a target.

    ``ratio`` is of real parameter counts; ``active_ratio`` of those that work for one token (they
    differ for mixtures of experts); ``nominal_ratio`` of the sizes in the names.
    """

    target: Checkpoint
    draft: Checkpoint
    ratio: float
    active_ratio: float
    nominal_ratio: float
    band: Band
    tokenizers: TokenizerComparison | None
    findings: tuple[Finding, ...]

    @property
    def sensible(self) -> bool:
        """Whether nothing forbids the pair and its ratio is not far off."""
        refused = any(f.severity == ERROR for f in self.findings)
        return not refused and self.band.name not in {"too small", "too large"}


def judge_pair(
    target: Checkpoint,
    draft: Checkpoint,
    version: Version | None = None,
    *,
    round_trip: bool = False,
) -> PairReport:
    """All findings for a draft, worst first; ``round_trip`` as in ``compare_tokenizers``."""
    version = version or names().newest
    ratio = target.parameters / max(draft.parameters, 1)
    active = target.active_parameters / max(draft.active_parameters, 1)
    comparison = _compare(target, draft, round_trip)
    band = ratio_band(active)
    findings: list[Finding] = []
    if draft.head_method:
        findings.append(_head(draft))
    else:
        findings += _ratio(target, draft, ratio, active, band)
        findings += _tokenizers(target, draft, comparison)
        findings += _vocabulary(target, draft, version)
        findings += _family(target, draft)
        problem = method_problem("draft_model", version)
        if problem:
            findings.append(
                Finding("method", ERROR, f"vLLM {version} cannot run this pair.", problem,
                        "Upgrade vLLM, or use n-gram or an EAGLE head.", "vllm/engine/arg_utils.py")
            )  # fmt: skip
    findings += _context(target, draft)
    findings += _parallel(target, draft)
    findings += _quantization(target, draft)
    order = [ERROR, WARNING, ADVICE, GOOD]
    findings.sort(key=lambda f: order.index(f.severity))
    return PairReport(
        target=target,
        draft=draft,
        ratio=ratio,
        active_ratio=active,
        nominal_ratio=nominal_billions(target) / max(nominal_billions(draft), 1e-9),
        band=band if not draft.head_method else BANDS[2],
        tokenizers=comparison,
        findings=tuple(findings),
    )


def model_facts(name: object) -> ModelFacts:
    """What lint needs to know of a model, if it is a folder or a built-in one; never the hub."""
    checkpoint = load_local(name) if isinstance(name, str) else None
    if checkpoint is None:
        return ModelFacts()
    method = checkpoint.quantization.method if checkpoint.quantization else None
    return ModelFacts(checkpoint.vocab_size, method, checkpoint.max_positions)


def rank_pairs(reports: Sequence[PairReport]) -> tuple[PairReport, ...]:
    """The order in which to test drafts: nothing forbids it, verified tokenizer, then the ratio."""

    def key(report: PairReport) -> tuple[int, int, float]:
        errors = sum(f.severity == ERROR for f in report.findings)
        verified = report.tokenizers is not None and report.tokenizers.verdict != "different"
        return errors, int(not verified), abs(math.log(max(report.active_ratio, 1e-9) / 10))

    return tuple(sorted(reports, key=key))


def _head(draft: Checkpoint) -> Finding:
    return Finding(
        "head", GOOD, f"{draft.name} is an {draft.head_method} head, not a model of its own.",
        "Heads read the target's hidden states: the size ratio and tokenizer rules do not apply.",
        f"Use method {draft.head_method}, with the target it was trained for.",
        "vllm/config/speculative.py",
    )  # fmt: skip


def _ratio(
    target: Checkpoint, draft: Checkpoint, ratio: float, active: float, band: Band
) -> Iterator[Finding]:
    counted = f"{_size(target.parameters)} to {_size(draft.parameters)}"
    what = f"The draft is 1:{ratio:.3g} of the target ({counted}): {band.name}."
    if abs(active - ratio) > 0.05 * ratio:
        what += f" By the parameters active for a token it is 1:{active:.3g}, which sets the cost."
    fix = {
        "too large": "Take a smaller member of the family.",
        "large": "Test a smaller one beside it.",
        "weak": "Test a larger member of the family beside it.",
        "too small": "Take a larger member of the family.",
        "small": "Test it beside one nearer to 1:10.",
    }.get(band.name, "Test it.")
    yield Finding(
        "ratio", band.severity, what, band.why[0].upper() + band.why[1:] + ".", fix, _RATIO_SOURCE
    )
    yield Finding(
        "load", ADVICE, "Load decides more than the ratio.",
        "vLLM's own 0.5B draft for a 70B target (1:140) was 1.5 times faster at 1 request/s and "
        "1.4 times slower at high load.", "Measure at your own load: `specwise measure`.",
        "vLLM blog, October 2024: calibration only",
    )  # fmt: skip


def _size(parameters: int) -> str:
    """Parameters in billions or millions."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _compare(target: Checkpoint, draft: Checkpoint, round_trip: bool) -> TokenizerComparison | None:
    """The tokenizers' contents compared, None if one of them is not at hand."""
    if target.folder is None or draft.folder is None:
        return None
    files = [Path(c.folder or "") / "tokenizer.json" for c in (target, draft)]
    configs = [f.with_name("tokenizer_config.json") for f in files]
    if all(f.is_file() for f in (*files, *configs)):
        same = [[f.read_bytes() for f in pair] for pair in (files, configs)]
        if all(a == b for a, b in same):
            return TokenizerComparison("same", ())
    one, other = (read_tokenizer(f.parent) for f in files)
    return compare_tokenizers(one, other, round_trip=round_trip) if one and other else None


def _tokenizers(
    target: Checkpoint, draft: Checkpoint, comparison: TokenizerComparison | None
) -> Iterator[Finding]:
    source = "tokenizer.json of both, compared by content"
    if comparison is None:
        same = bool(target.tokenizer_family) and target.tokenizer_family == draft.tokenizer_family
        known = (
            "Their owners publish one tokenizer for both."
            if same
            else "Without both tokenizer.json files nobody can tell whether they agree."
        )
        yield Finding(
            "tokenizer-unverified", ADVICE if same else WARNING,
            "The tokenizers were not compared.", known,
            "Give local folders or hub ids of both.", source,
        )  # fmt: skip
        return
    if comparison.verdict == "same":
        yield Finding(
            "tokenizer", GOOD, "The tokenizers are the same.",
            "Vocabulary, merges, rules and added tokens agree.", "Nothing to do.", source,
        )  # fmt: skip
    elif comparison.verdict == "extended":
        text = "; ".join(e for d in comparison.differences for e in d.examples)
        yield Finding(
            "tokenizer-extended", ADVICE, f"One tokenizer knows more added tokens ({text}).",
            "Every text without them encodes alike; a draft never proposes what it does not know.",
            "Check that your prompts do not lean on them.", source,
        )  # fmt: skip
    else:
        shown = "; ".join(f"{d.what} ({', '.join(d.examples)})" for d in comparison.differences[:3])
        alike = comparison.round_trip
        corpus = "" if alike is None else f" {alike:.0%} of the test texts encode alike."
        yield Finding(
            "tokenizer-different", ERROR, f"The tokenizers differ: {shown}.{corpus}",
            "vLLM compares vocabulary sizes only: with other ids or merges every draft is noise.",
            "Choose a draft of the same family; quantise it rather than leaving the family.",
            source,
        )  # fmt: skip


def _vocabulary(target: Checkpoint, draft: Checkpoint, version: Version) -> Iterator[Finding]:
    if target.vocab_size == draft.vocab_size:
        return
    can = names().spec_fields["use_heterogeneous_vocab"].holds(version)
    yield Finding(
        "vocab-size",
        WARNING if can else ERROR,
        f"Vocabulary sizes differ: {target.vocab_size} and {draft.vocab_size}.",
        "vLLM refuses a draft model of another vocabulary size, even where only padding differs "
        "(Qwen2.5: 151,936 up to 3B, 152,064 from 7B on).",
        'Set "use_heterogeneous_vocab": true; drafting is greedy then.'
        if can
        else "Choose a draft with the same size, or vLLM 0.25 or later.",
        "vllm/config/speculative.py verify_equal_vocab_size_if_draft_model",
    )


def _family(target: Checkpoint, draft: Checkpoint) -> Iterator[Finding]:
    if target.family and draft.family and target.family != draft.family:
        yield Finding(
            "family", WARNING, f"Different families: {target.family} and {draft.family}.",
            "Acceptance comes from a shared training distribution.",
            "Stay in the family and quantise: INT8 costs less acceptance than leaving it.",
            "rule of thumb: same family",
        )  # fmt: skip


def _context(target: Checkpoint, draft: Checkpoint) -> Iterator[Finding]:
    if target.max_positions and draft.max_positions and draft.max_positions < target.max_positions:
        yield Finding(
            "context", ADVICE,
            f"The draft's context is {draft.max_positions:,} tokens, the target's "
            f"{target.max_positions:,}.",
            "Requests longer than the draft's context are served without drafts.",
            "Fine if your requests stay below it.", "vllm/config/speculative.py",
        )  # fmt: skip


def _parallel(target: Checkpoint, draft: Checkpoint) -> Iterator[Finding]:
    if weight_bytes(target, None).likely > LARGEST_USUAL_GPU_BYTES and not draft.head_method:
        size = weight_bytes(draft, None).likely / 1e9
        yield Finding(
            "draft-tp", ADVICE, "The target spans GPUs; the draft need not.",
            f"vLLM splits the draft alike by default. At draft TP 1 each of k passes skips the "
            f"network, for {size:.3g} GB on every GPU.",
            "Measure draft_tensor_parallel_size 1 against the default; see `specwise memory`.",
            "vllm/config/speculative.py _verify_and_get_draft_tp",
        )  # fmt: skip


def _quantization(target: Checkpoint, draft: Checkpoint) -> Iterator[Finding]:
    if target.quantization and target.quantization.weight_bits < 8:
        yield Finding(
            "target-quantization", ADVICE,
            f"The target is stored in {target.quantization.weight_bits:g} bits.",
            "The target decides acceptance: 4 bits cost more of it than 8, more so when sampling.",
            "Measure acceptance against an 8-bit target; above 5 points lost, take 8 bits.",
            "rule of thumb",
        )  # fmt: skip
    bits = [q.weight_bits for q in (target.quantization, draft.quantization) if q]
    if len(bits) == 2 and abs(bits[0] - bits[1]) > 1:
        yield Finding(
            "mixed-quantization", ADVICE,
            f"The target is stored in {bits[0]:g} bits, the draft in {bits[1]:g}.",
            "Errors of the same kind agree more often than errors of two kinds.",
            "Prefer the same level for both, and measure acceptance before and after.",
            "rule of thumb",
        )  # fmt: skip
    if draft.quantization is None and not draft.head_method and draft.parameters > 2e9:
        yield Finding(
            "quantize-draft", ADVICE, "The draft is not quantised.",
            "An 8-bit draft is nearly free in acceptance and halves its memory.",
            "Quantise the draft before looking outside the family.", "rule of thumb",
        )  # fmt: skip
