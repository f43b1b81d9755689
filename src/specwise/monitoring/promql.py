"""PromQL over vLLM's metrics and tap's: each question is asked in one place.

vLLM's names are those of `specwise.vllm.metrics`; a recording rule gives each figure one name over
all generations (V0 and V1 call the KV gauge differently). Counters are read through ``rate``, which
corrects for restarts. TPOT and TTFT are means (sum over count): vLLM's TPOT buckets are 10 to 25 ms
wide where it matters, so a quantile of them says less than it seems to.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = "5m"
BY = "job, instance, model_name"
"""Figures are per replica: an average over replicas hides the one that is broken."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A recorded series: its name, the expression behind it and what it is, with its unit."""

    record: str
    expression: str
    title: str
    unit: str


def plain_figures(selector: str) -> tuple[Figure, ...]:
    """What vLLM's own metrics give, one series per replica; ``selector`` as ``job="vllm"``."""

    def rate(name: str) -> str:
        return f"sum by ({BY}) (rate({name}{{{selector}}}[{WINDOW}]))"

    def mean(histogram: str) -> str:
        return f"{rate(histogram + '_sum')} / ({rate(histogram + '_count')} > 0)"

    accepted = rate("vllm:spec_decode_num_accepted_tokens_total")
    drafted = rate("vllm:spec_decode_num_draft_tokens_total")
    drafts = rate("vllm:spec_decode_num_drafts_total")
    kv_v1 = f"max by ({BY}) (vllm:kv_cache_usage_perc{{{selector}}})"
    kv_v0 = f"max by ({BY}) (vllm:gpu_cache_usage_perc{{{selector}}})"
    queries = f"({rate('vllm:prefix_cache_queries_total')} > 0)"
    return (
        Figure(
            "specwise:acceptance_rate:rate5m",
            f"{accepted} / ({drafted} > 0)",
            "Acceptance rate (accepted / drafted)",
            "percentunit",
        ),
        Figure(
            "specwise:acceptance_length:rate5m",
            f"1 + {accepted} / ({drafts} > 0)",
            "Acceptance length (tokens per verify step)",
            "none",
        ),
        Figure(
            "specwise:drafts_per_s:rate5m", drafts, "Verify steps with drafts, per second", "ops"
        ),
        Figure(
            "specwise:tpot_s:mean5m",
            mean("vllm:request_time_per_output_token_seconds"),
            "TPOT, mean",
            "s",
        ),
        Figure(
            "specwise:ttft_s:mean5m", mean("vllm:time_to_first_token_seconds"), "TTFT, mean", "s"
        ),
        Figure("specwise:kv_use:max", f"{kv_v1} or {kv_v0}", "KV cache in use", "percentunit"),
        Figure(
            "specwise:preemptions_per_s:rate5m",
            rate("vllm:num_preemptions_total"),
            "Preemptions per second",
            "ops",
        ),
        Figure(
            "specwise:prefix_hit_rate:rate5m",
            f"{rate('vllm:prefix_cache_hits_total')} / {queries}",
            "Prefix-cache hit rate",
            "percentunit",
        ),
        Figure(
            "specwise:running:avg5m",
            f"sum by ({BY}) (avg_over_time(vllm:num_requests_running{{{selector}}}[{WINDOW}]))",
            "Requests running",
            "none",
        ),
        Figure(
            "specwise:waiting:avg5m",
            f"sum by ({BY}) (avg_over_time(vllm:num_requests_waiting{{{selector}}}[{WINDOW}]))",
            "Requests waiting",
            "none",
        ),
    )


def per_position(selector: str) -> str:
    """Share of verify steps that accepted a draft at each position, per replica."""
    accepted = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    drafts = "vllm:spec_decode_num_drafts_total"
    return (
        f"sum by ({BY}, position) (rate({accepted}{{{selector}}}[{WINDOW}]))"
        f" / on ({BY}) group_left ()"
        f" (sum by ({BY}) (rate({drafts}{{{selector}}}[{WINDOW}])) > 0)"
    )


def tap_figures(selector: str) -> tuple[Figure, ...]:
    """What `specwise tap` adds: acceptance and TPOT by segment and by temperature."""

    def rate(name: str, by: str) -> str:
        return f"sum by ({by}) (rate({name}{{{selector}}}[15m]))"

    def p10(by: str) -> str:
        buckets = rate("specwise_tap_acceptance_rate_bucket", f"{by}, le")
        return f"histogram_quantile(0.1, {buckets})"

    found = []
    for by in ("segment", "temperature"):
        accepted = rate("specwise_tap_accepted_tokens_total", by)
        drafted = rate("specwise_tap_draft_tokens_total", by)
        found += [
            Figure(
                f"specwise:tap_acceptance_rate:{by}_rate15m",
                f"{accepted} / ({drafted} > 0)",
                f"Acceptance rate by {by}",
                "percentunit",
            ),
            Figure(
                f"specwise:tap_acceptance_p10:{by}_rate15m",
                p10(by),
                f"Acceptance of single requests, P10 by {by}",
                "percentunit",
            ),
        ]
    tpot_sum = rate("specwise_tap_tpot_seconds_sum", "segment")
    tpot_count = rate("specwise_tap_tpot_seconds_count", "segment")
    found.append(
        Figure(
            "specwise:tap_tpot_s:segment_mean15m",
            f"{tpot_sum} / ({tpot_count} > 0)",
            "TPOT by segment, mean",
            "s",
        )
    )
    return tuple(found)
