"""The rules that a study is held against: what is asked, where the line is, who drew it.

`RULES` is the catalogue (docs/reference/conditions.md shows it); a `Condition` is one rule applied
to one study. What a rule's value is and when it holds stands in the ``*_conditions`` modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "unknown"]
Kind = Literal["measured", "metadata", "rule of thumb", "published"]

ARTICLE = "Speculative Decoding on vLLM: A Configuration and Decision Framework, July 2026"
_PAIR = "checkpoint metadata, as `specwise pair` judges it"
_MEMORY = "memory plan of the launch arguments, as `specwise memory` computes it"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``advice`` says what to do where it fails or cannot be answered."""

    question: str
    threshold: str
    source: str
    kind: Kind
    advice: str


@dataclass(frozen=True, slots=True)
class Condition:
    """One rule applied to this study.

    ``id`` is the requirement's (G2) or the rule's own short name. ``scope`` names what it was
    applied to: "" for the study, otherwise "arm", "arm/workload" or "arm/workload/segment".
    ``kind`` ranks it: a rule of thumb or a published figure never outranks a measurement.
    ``veto`` is True where failing rules "on" out, whatever the effects say.
    ``evidence`` are the ids of the trials it was computed from. ``advice`` is what to do about a
    condition that does not hold or is not known, empty for one that holds.
    """

    id: str
    question: str
    value: str
    threshold: str
    source: str
    status: Status
    scope: str
    evidence: tuple[str, ...]
    kind: Kind
    veto: bool = False
    advice: str = ""


def condition(
    rule_id: str,
    scope: str,
    value: str,
    status: Status,
    *,
    evidence: tuple[str, ...] = (),
    veto: bool = False,
    threshold: str = "",
    source: str = "",
    kind: Kind | None = None,
) -> Condition:
    """The rule of that id applied; ``threshold``, ``source``, ``kind`` replace the rule's own."""
    rule = RULES[rule_id]
    return Condition(
        id=rule_id,
        question=rule.question,
        value=value,
        threshold=threshold or rule.threshold,
        source=source or rule.source,
        status=status,
        scope=scope,
        evidence=evidence,
        kind=kind or rule.kind,
        veto=veto,
        advice="" if status == "pass" else rule.advice,
    )


def by_sign(better: bool | None) -> Status:
    """pass, fail, or unknown for None."""
    return "unknown" if better is None else "pass" if better else "fail"


RULES: Mapping[str, Rule] = {
    # --- the measurement
    "client": Rule(
        "Did the load generator keep up, so that the times are the server's?",
        "lag at most 5 % of the median TTFT (or 5 ms), at most 85 % of a core",
        "specwise: the client's own lag, lateness and processor share",
        "measured",
        "Measure again from a machine, or a core, that nothing else uses.",
    ),
    "repeats": Rule(
        "Is it known how much one trial differs from the next?",
        "2 repeats, or an A/A trial",
        "specwise: without it an interval only holds the requests' own noise",
        "measured",
        "Set repeats = 3 and noise_floor = true.",
    ),
    "pairs": Rule(
        "Were enough requests compared at the production load?",
        "at least 20; P99 needs 100",
        "specwise: below 20 the resampling itself is unreliable",
        "measured",
        "Raise [load] requests.",
    ),
    "A/A": Rule(
        "Does the baseline equal itself when it is measured again?",
        "within 5 %, or the interval holds 1",
        "A/A trial; its interval is of the requests alone, the effects' are wider",
        "measured",
        "Look for what else runs on the machine; add repeats.",
    ),
    "G3": Rule(
        "Was it measured at several loads up to production's?",
        "production's load and at least one below it",
        ARTICLE,
        "measured",
        "List several loads: `specwise measure --experiment ladder`. Load decides more than size.",
    ),
    # --- the service
    "I2": Rule(
        "Are temperatures alike, and mostly 0.5 or less?",
        "spread at most 0.5, half of the requests at 0.5 or less",
        ARTICLE,
        "rule of thumb",
        "Trust the segments' own effects; route hot segments to a server without speculation.",
    ),
    "I3": Rule(
        "Is the median temperature low enough?",
        "at most 0.7",
        ARTICLE,
        "rule of thumb",
        "Expect low acceptance; n-gram or probabilistic draft sampling may lose less.",
    ),
    "I3-spread": Rule(
        "Do temperatures vary little?",
        "P90 less P10 at most 0.7",
        ARTICLE,
        "rule of thumb",
        "Serve hot and cold requests from different servers.",
    ),
    "B3": Rule(
        "Was it measured at production's temperature?",
        "the temperatures that production uses",
        "the study file; greedy benchmarks flatter acceptance",
        "measured",
        "Check that production is greedy; `specwise measure --experiment temperature` shows more.",
    ),
    "I2-slo": Rule(
        "Is the service bound by TPOT or throughput, which speculation can help?",
        "TPOT or throughput",
        ARTICLE,
        "rule of thumb",
        "TTFT-bound: leave it off unless TTFT P99 is shown to be better.",
    ),
    "I3-monitoring": Rule(
        "Will production's acceptance be watched?",
        "acceptance scraped and alerted on",
        ARTICLE,
        "rule of thumb",
        "`specwise alerts STUDY` writes the rules; then `specwise decide --watched`.",
    ),
    "F2": Rule(
        "Is there a control: each segment of the mix alone, at the same load?",
        "every segment of the production workload",
        ARTICLE,
        "measured",
        "`specwise measure --experiment mixed` runs mix and controls.",
    ),
    # --- an arm's effects at the production load
    "speedup": Rule(
        "Does a token take less time, all told?",
        "whole interval above 1",
        "measured against the baseline on the same prompts",
        "measured",
        "Add repeats if undecided.",
    ),
    "G2-tpot": Rule(
        "Is TPOT better?",
        "whole interval below 1",
        "measured against the baseline on the same prompts",
        "measured",
        "Add repeats if undecided.",
    ),
    "G2-tpot-p99": Rule(
        "Is TPOT P99 no worse?",
        "not worse by more than 10 %",
        "measured against the baseline on the same prompts",
        "measured",
        "At least 100 requests in both arms; look at the segments.",
    ),
    "G2-ttft": Rule(
        "Is TTFT no worse?",
        "not worse by more than 10 %; without a limit in [slo] 50 % is too much",
        "measured against the baseline on the same prompts",
        "measured",
        "State a TTFT limit in [slo]; a smaller draft or n-gram costs less prefill.",
    ),
    "G2-ttft-p99": Rule(
        "Is TTFT P99 no worse?",
        "not worse by more than 10 %",
        "measured against the baseline on the same prompts",
        "measured",
        "At least 100 requests in both arms; look at queueing and preemptions.",
    ),
    "G5": Rule(
        "Does the server emit more tokens/s at production's load?",
        "whole interval above 1",
        "measured against the baseline on the same prompts",
        "measured",
        "Measure in a closed loop: an open loop's arrivals set the rate.",
    ),
    "G5-goodput": Rule(
        "Do more requests per second meet the SLO?",
        "whole interval above 1",
        "measured against the baseline on the same prompts",
        "measured",
        "State limits in [slo]; without limits it is requests per second.",
    ),
    "slo-ttft": Rule(
        "Does TTFT P95 stay within the SLO?",
        "the limit",
        "the study file's [slo]",
        "measured",
        "Lower the load or leave it off; a limit that the baseline breaks too is no veto.",
    ),
    "slo-tpot": Rule(
        "Does TPOT P95 stay within the SLO?",
        "the limit",
        "the study file's [slo]",
        "measured",
        "Lower the load or leave it off; a limit that the baseline breaks too is no veto.",
    ),
    "slo-e2e": Rule(
        "Does E2E P95 stay within the SLO?",
        "the limit",
        "the study file's [slo]",
        "measured",
        "Lower the load or leave it off; a limit that the baseline breaks too is no veto.",
    ),
    "I5": Rule(
        "Is production's load below the crossover?",
        "above production's load",
        "interpolated between the measured loads",
        "measured",
        "Measure loads on both sides: `specwise measure --experiment ladder`.",
    ),
    "E4": Rule(
        "Does k follow the batch size, where load changes the answer?",
        "a schedule, or one answer at every load measured",
        "crossovers of this study; rows are [first batch size, last batch size, k]",
        "measured",
        "Measure the schedule that the verdict proposes, from vLLM 0.24 on.",
    ),
    "A6": Rule(
        "Is this the method for this workload?",
        "no other measured method gains more",
        "measured; rule of thumb: n-gram where output echoes the prompt, a draft for chat and code",
        "measured",
        "Measure an n-gram arm beside it: it costs no memory.",
    ),
    "B4": Rule(
        "Do published measurements of this method point the same way?",
        "the same side of 1",
        "published, another system: calibration only",
        "published",
        "Believe your own measurement.",
    ),
    # --- acceptance
    "B1": Rule(
        "Was acceptance measured in these very trials, at production's temperatures?",
        "the server's figures for each request, or its counters' differences",
        "specwise: never a lifetime gauge, never counted chunks",
        "measured",
        "vLLM 0.29 on: --per-request-spec-decode-metrics summary; else expose /metrics.",
    ),
    "B2": Rule(
        "Is acceptance at production's temperature in the winning range?",
        "above 0.65 likely a win, 0.5 to 0.65 break-even, below 0.5 off",
        ARTICLE,
        "rule of thumb",
        "Look at B5: the cost of a step decides, not the rule of thumb.",
    ),
    "G1": Rule(
        "Do nearly all requests accept enough?",
        "P10 at least 0.5",
        ARTICLE,
        "rule of thumb",
        "See which segment they come from.",
    ),
    "B5": Rule(
        "Is acceptance above what this load's step costs ask for?",
        "the break-even rate",
        "measured: cost of a step = tokens per step x TPOT ratio; rule of thumb: ~0.5",
        "measured",
        "A shorter k or a cheaper draft lowers the cost of a step.",
    ),
    "G6": Rule(
        "Do the server's own counters look healthy?",
        "0.7 and up healthy, below 0.5 unhealthy",
        ARTICLE,
        "rule of thumb",
        "Expose /metrics; if unhealthy see the segments.",
    ),
    # --- what a mix hides
    "I2-mix": Rule(
        "Does the answer not depend on the batch's mix?",
        "no segment wins while another loses",
        "measured in the mix at production's load",
        "measured",
        "Keep the mix as it was measured, or route by segment.",
    ),
    "F3-tpot": Rule(
        "Is TPOT free of the P50-better, P99-worse signature?",
        "not P50 better with P99 worse",
        ARTICLE,
        "measured",
        "P99 needs 100 requests in both arms; controls tell the mix from speculation itself.",
    ),
    "F3-e2e": Rule(
        "Is E2E free of the P50-better, P99-worse signature?",
        "not P50 better with P99 worse",
        ARTICLE,
        "measured",
        "P99 needs 100 requests in both arms; controls tell the mix from speculation itself.",
    ),
    "F4": Rule(
        "Does the average effect speak for every segment?",
        "no segment worse under an average that is not",
        "measured in the mix at production's load",
        "measured",
        "Route the losing segment to a server without speculation.",
    ),
    "F4-acceptance": Rule(
        "Does the average acceptance speak for every segment?",
        "no segment below 0.5 under an average of 0.5 or more",
        ARTICLE,
        "rule of thumb",
        "Watch acceptance per segment: `specwise tap`.",
    ),
    # --- health
    "errors": Rule(
        "Do requests fail no more often than without speculation?",
        "not significantly more (Fisher's exact test, 2.5 %)",
        "specwise: failed requests are never dropped from a comparison in silence",
        "measured",
        "Read the server's log in the study's logs folder.",
    ),
    "G4": Rule(
        "Is there KV cache to spare beside the draft?",
        "no preemptions that the baseline does not have",
        "the server's counters and gauges",
        "measured",
        "Expose /metrics; quantise the draft or lower --max-num-seqs.",
    ),
    "G4-prefix": Rule(
        "Does the prefix cache hit as often as without speculation?",
        "at most 5 points fewer hits than the baseline",
        "the server's counters",
        "measured",
        "A smaller KV pool evicts prefixes sooner: see I2-memory.",
    ),
    "G4-gpu": Rule(
        "Is there GPU memory left for a peak?",
        "below 98 % of every GPU",
        "NVML samples, once a second",
        "measured",
        "Lower --gpu-memory-utilization; measure on the server's machine to see its GPUs.",
    ),
    "I3-memory": Rule(
        "Is the service free of being memory-bound at long contexts?",
        "KV use below 90 % and no preemptions, or requests shorter than 8,192 tokens",
        ARTICLE,
        "rule of thumb",
        "Leave it off, quantise, or add GPUs: the draft takes its bytes from the KV cache.",
    ),
    "G7": Rule(
        "Is the output what it would be without speculation?",
        "`specwise verify`: unchanged; or all greedy digests equal",
        "token equality and two-sample tests; digests of the outputs",
        "measured",
        "Run `specwise verify STUDY`: it tells near-ties from errors.",
    ),
    # --- the deployment
    "A1": Rule(
        "Is the draft of a sensible size?",
        "1:8 to 1:12 of the target's parameters",
        ARTICLE,
        "rule of thumb",
        "Test a draft nearer to 1:10 beside it; the measurement outranks the ratio.",
    ),
    "A3-family": Rule(
        "Is the draft of the target's family?",
        "the same family",
        ARTICLE,
        "rule of thumb",
        "Take a draft of the same family.",
    ),
    "A3-tokenizer": Rule(
        "Do target and draft share a tokenizer?",
        "same vocabulary, merges and special tokens, compared by content",
        _PAIR,
        "metadata",
        "`specwise pair TARGET DRAFT` with folders or hub ids compares them.",
    ),
    "A4": Rule(
        "Was the draft quantised before leaving the family?",
        "same family, or nothing left to quantise",
        ARTICLE,
        "rule of thumb",
        "An INT8 draft of the family costs less acceptance than another family's.",
    ),
    "C2": Rule(
        "Does the deployment fit its GPUs?",
        "one request of the longest context fits",
        _MEMORY,
        "metadata",
        "`specwise memory TARGET --draft DRAFT --gpu NAME` shows each term.",
    ),
    "C3": Rule(
        "Does the KV cache hold production's requests beside the draft?",
        "tokens of production's concurrency",
        _MEMORY,
        "metadata",
        "`specwise memory` with your GPU, --context and --concurrency.",
    ),
    "C5-target": Rule(
        "Does the target leave room on its GPUs?",
        "at most 70 % of GPU memory",
        ARTICLE,
        "rule of thumb",
        "Load-test before anything else: the draft cuts concurrency.",
    ),
    "I2-memory": Rule(
        "Does the draft fit without eating the KV cache?",
        "draft at most ~15 % of GPU memory; more and new preemptions rule it out",
        ARTICLE,
        "rule of thumb",
        "Quantise the draft, take a smaller one or n-gram: `specwise memory`.",
    ),
    "C6": Rule(
        "Is the draft spread over the GPUs as the target is?",
        "one GPU, or the draft split alike",
        _MEMORY,
        "metadata",
        "Measure draft_tensor_parallel_size 1 against the default.",
    ),
    "D1": Rule(
        "Is the target quantised no further than 8 bits?",
        "8 bits or more",
        ARTICLE,
        "rule of thumb",
        "INT8 over INT4 on the target: it decides acceptance.",
    ),
    "D2": Rule(
        "Was acceptance compared before and after quantisation?",
        "at most 5 points lost on the same prompts",
        ARTICLE,
        "rule of thumb",
        "Measure both and run `specwise compare BEFORE AFTER`.",
    ),
    "D3": Rule(
        "Are target and draft quantised to the same level?",
        "the same bits per weight where both are quantised",
        ARTICLE,
        "rule of thumb",
        "Prefer one level for both.",
    ),
    "E2": Rule(
        "Does vLLM take the launch arguments as they are meant?",
        "nothing refused, ignored or renamed",
        "lint of the command against the server's version",
        "metadata",
        "`specwise lint 'vllm serve ...'` writes the corrected command.",
    ),
    "E3": Rule(
        "Is acceptance lossless by design?",
        "standard or block rejection sampling; synthetic acceptance rules it out",
        "the arm's speculative configuration",
        "metadata",
        "Drop rejection_sample_method, or compare the output by hand.",
    ),
}
