"""Prometheus recording and alerting rules from a study's own thresholds (req H2).

An alert waits (``for``) so that one odd window wakes nobody, asks for traffic before it judges, and
says in its annotations what was expected, from where, and what to do. Rules stand on recording
rules (`specwise.monitoring.promql`), so that the dashboard and the alerts cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from specwise.errors import InputError
from specwise.monitoring.expectations import FULL_KV_USE, Expectations
from specwise.monitoring.promql import WINDOW, Figure, plain_figures, tap_figures

_RATE = "specwise:acceptance_rate:rate5m"
_RUNNING = "specwise:running:avg5m"
_TPOT = "specwise:tpot_s:mean5m"
_TTFT = "specwise:ttft_s:mean5m"
_TRAFFIC_PER_S = 0.1
"""Verify steps a second below which acceptance is a matter of single requests."""

_MATCHER = re.compile(r'[A-Za-z_][A-Za-z0-9_]*\s*(=|!=|=~|!~)\s*"(?:[^"\\]|\\.)*"')


def check_selector(selector: str) -> str:
    """``selector`` if it is a list of PromQL label matchers; raises InputError otherwise."""
    rest = _MATCHER.sub("", selector)
    if rest.replace(",", "").strip():
        raise InputError(
            f"{selector!r} is not a list of label matchers.", "Write it as 'job=\"vllm\"'."
        )
    return selector.strip().strip(",")


def alert_rules(expected: Expectations, *, selector: str = "", tap: bool = False) -> str:
    """A Prometheus rule file as YAML: recording rules, then alerts.

    ``selector`` are label matchers that pick the vLLM servers among all series, for example
    ``job="vllm"``; with ``tap`` there are rules by segment over what `specwise tap` exports.
    Raises InputError for a selector that PromQL would not read.
    """
    selector = check_selector(selector)
    groups = [
        _group("specwise-recording", [_recording(f) for f in plain_figures(selector)]),
        _group("specwise", [*_plain_alerts(expected, selector)]),
    ]
    if tap:
        # tap is scraped as a job of its own: the servers' matchers would not find it.
        groups += [
            _group("specwise-tap-recording", [_recording(f) for f in tap_figures("")]),
            _group("specwise-tap", [*_tap_alerts(expected)]),
        ]
    header = (
        f"# Made by `specwise alerts` from study {expected.study}, arm {expected.arm}, measured at "
        f"{expected.production_load.label}.\n# Check with: promtool check rules FILE\n"
    )
    return header + yaml.safe_dump({"groups": groups}, sort_keys=False, width=96)


def _group(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "interval": "30s", "rules": rules}


def _recording(figure: Figure) -> dict[str, Any]:
    return {"record": figure.record, "expr": figure.expression}


def _alert(
    name: str,
    expression: str,
    *,
    wait: str,
    severity: str,
    summary: str,
    description: str,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": wait,
        "labels": {"severity": severity, **(labels or {})},
        "annotations": {"summary": summary, "description": description},
    }


def _plain_alerts(expected: Expectations, selector: str) -> Iterator[dict[str, Any]]:
    study = f"study {expected.study} ({expected.arm})"
    busy = f"specwise:drafts_per_s:rate5m > {_TRAFFIC_PER_S}"
    low_from = (
        "the break-even rate measured there"
        if expected.break_even is not None
        else "a rule of thumb; the study could not compute a break-even rate"
    )
    yield _alert(
        "SpeculationAcceptanceLow",
        f"{_RATE} < {expected.low_rate:.4f} and {busy}",
        wait="15m",
        severity="critical",
        summary="Speculation costs more than it gives on {{ $labels.instance }}",
        description=(
            "Acceptance is {{ $value | humanizePercentage }}, below "
            f"{expected.low_rate:.0%} ({low_from}); {study} measured {expected.rate:.0%}. "
            "Turn speculation off, or route the segment that lost it elsewhere; then measure again "
            "with `specwise measure`."
        ),
    )
    yield _alert(
        "SpeculationAcceptanceDrift",
        f"avg_over_time({_RATE}[1h]) < {expected.drifted_rate:.4f} and {busy}",
        wait="30m",
        severity="warning",
        summary="Acceptance on {{ $labels.instance }} is no longer what was measured",
        description=(
            "The last hour's acceptance is {{ $value | humanizePercentage }}; "
            f"{study} measured {expected.rate:.0%}, and more than 5 points below that the verdict "
            "no longer stands on its evidence. Look for a change of prompts, temperatures, model "
            "or quantisation; `specwise watch` says since when."
        ),
    )
    ceiling = expected.baseline_tpot_s.mean
    at_most = "" if expected.running is None else f" and {_RUNNING} <= {expected.running:.2f}"
    load = (
        f"at {expected.production_load.label}"
        if expected.running is None
        else f"with {expected.running:.0f} requests running or fewer"
    )
    yield _alert(
        "SpeculationTpotAboveBaseline",
        f"{_TPOT} > {ceiling:.6f}{at_most} and {busy}",
        wait="15m",
        severity="critical",
        summary="{{ $labels.instance }} is slower than it was without speculation",
        description=(
            f"Mean TPOT is {{{{ $value | humanizeDuration }}}} {load}; without speculation "
            f"{study} measured {ceiling * 1000:.1f} ms at that load. Turn speculation off, "
            "then look for the cause."
        ),
    )
    yield _alert(
        "SpeculationTtftRegression",
        f"{_TTFT} > {expected.ttft_limit_s:.6f}{at_most} and {busy}",
        wait="15m",
        severity="warning",
        summary="First tokens come late on {{ $labels.instance }}",
        description=(
            f"Mean TTFT is {{{{ $value | humanizeDuration }}}} {load}; {study} measured "
            f"{expected.ttft_s.mean * 1000:.0f} ms ({expected.baseline_ttft_s.mean * 1000:.0f} ms "
            "without speculation). Drafting slows prefill: check queue and prompt lengths first."
        ),
    )
    yield _alert(
        "SpeculationKvSqueeze",
        f"specwise:kv_use:max > {FULL_KV_USE} and specwise:preemptions_per_s:rate5m > 0 and {busy}",
        wait="10m",
        severity="warning",
        summary="The KV cache of {{ $labels.instance }} is full and requests are preempted",
        description=(
            "{{ $value | humanizePercentage }} of the KV cache is in use and requests are "
            "recomputed. The draft's weights and cache come out of this memory: "
            "`specwise memory` says how much; lower --max-num-seqs, or serve without the draft."
        ),
    )
    if expected.crossover_running is not None:
        yield _alert(
            "SpeculationOnAboveCrossover",
            f"{_RUNNING} > {expected.crossover_running:.2f} and {busy}",
            wait="15m",
            severity="warning",
            summary="{{ $labels.instance }} speculates at a load where it loses",
            description=(
                "{{ $value | humanize }} requests are running; speculation stopped paying at "
                f"{expected.crossover_running:.1f} in {study}. Add replicas, or use a schedule of "
                "draft lengths (num_speculative_tokens_per_batch_size)."
            ),
        )
    servers = f"vllm:num_requests_running{{{selector}}}"
    drafts = f"vllm:spec_decode_num_drafts_total{{{selector}}}"
    yield _alert(
        "SpeculationNotRunning",
        f"count by (job, instance) ({servers})"
        f" unless on (job, instance) count by (job, instance) ({drafts})",
        wait="15m",
        severity="warning",
        summary="{{ $labels.instance }} exports no speculation metrics",
        description=(
            f"{study} decided on a server that speculates; this one does not, or its version "
            "calls the counters differently. Check its --speculative-config."
        ),
    )
    yield _alert(
        "SpeculationServersGone",
        f"absent({servers})",
        wait=WINDOW,
        severity="warning",
        summary="No vLLM server is seen",
        description=(
            "No series matches. Check the scrape targets, and the selector that these rules were "
            "made with."
        ),
    )


def _tap_alerts(expected: Expectations) -> Iterator[dict[str, Any]]:
    study = f"study {expected.study} ({expected.arm})"
    for segment in expected.segments:
        series = f'specwise:tap_acceptance_rate:segment_rate15m{{segment="{segment.segment}"}}'
        yield _alert(
            "SpeculationSegmentAcceptanceLow",
            f"{series} < {expected.segment_floor(segment):.4f}",
            wait="30m",
            severity="warning",
            summary=f"Acceptance of {segment.segment} is no longer what was measured",
            description=(
                "Acceptance is {{ $value | humanizePercentage }}; "
                f"{study} measured {segment.rate:.0%} for {segment.segment} at "
                f"T={segment.temperature:g}. Other segments hide this in the server's counters."
            ),
            labels={"segment": segment.segment},
        )
    for by in ("segment", "temperature"):
        yield _alert(
            "SpeculationRequestsLosing",
            f"specwise:tap_acceptance_p10:{by}_rate15m < 0.5",
            wait="30m",
            severity="warning",
            summary=f"One request in ten of {by} {{{{ $labels.{by} }}}} accepts too little",
            description=(
                "The P10 of single requests' acceptance is {{ $value | humanizePercentage }}, "
                "below 50 % (rule of thumb): a share of the traffic is net-negative. Serve this "
                f"{by} without speculation, or measure it alone."
            ),
        )
