"""The rules, judged by the real promtool."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.monitoring.prometheus import promtool

from specwise.analysis.latency import Percentiles
from specwise.decision.verdict import Decision
from specwise.domain import LoadPoint, Loop
from specwise.errors import InputError
from specwise.monitoring.alerts import alert_rules
from specwise.monitoring.dashboard import dashboard
from specwise.monitoring.expectations import Expectations, SegmentExpectation, Spread


def latency(mean: float) -> Percentiles:
    return Percentiles(100, mean, mean, 2 * mean, 3 * mean)


EXPECTED = Expectations(
    study="chat",
    arm="draft_model",
    decision=Decision.ON,
    k=4,
    production_load=LoadPoint(Loop.CLOSED, 16),
    rate=0.76,
    length=4.04,
    spread=Spread(200, 0.1, 0.62, 300.0),
    segments=(
        SegmentExpectation("json", 0.0, 0.9, Spread(100, 0.05, 0.8, 300.0)),
        SegmentExpectation("prose", 0.8, 0.6, Spread(100, 0.1, 0.45, 300.0)),
    ),
    break_even=0.5,
    ttft_s=latency(0.2),
    tpot_s=latency(0.030),
    baseline_ttft_s=latency(0.15),
    baseline_tpot_s=latency(0.045),
    running=14.0,
    crossover_running=24.0,
    kv_use_max=0.4,
)

Series = Mapping[str, Callable[[int], float]]
_LABELS = 'job="vllm", instance="a:8000", model_name="m", engine="0"'


def server(
    *,
    rate: Callable[[int], float] = lambda _m: 0.76,
    tpot_s: float = 0.030,
    ttft_s: float = 0.2,
    running: float = 12,
    kv_use: float = 0.4,
    preemptions_per_minute: float = 0,
    restart_at: int | None = None,
    minutes: int = 180,
    silent: tuple[str, ...] = (),
) -> list[dict[str, str]]:
    """Series of one replica, one sample a minute: counters add up what happens in each minute."""
    drafted = 48_200 / 60
    per_minute = {
        "vllm:spec_decode_num_draft_tokens_total": lambda _m: drafted,
        "vllm:spec_decode_num_drafts_total": lambda _m: drafted / 4,
        "vllm:spec_decode_num_accepted_tokens_total": lambda m: drafted * rate(m),
        "vllm:request_time_per_output_token_seconds_sum": lambda _m: 10 * tpot_s,
        "vllm:request_time_per_output_token_seconds_count": lambda _m: 10,
        "vllm:time_to_first_token_seconds_sum": lambda _m: 10 * ttft_s,
        "vllm:time_to_first_token_seconds_count": lambda _m: 10,
        "vllm:num_preemptions_total": lambda _m: preemptions_per_minute,
    }
    gauges = {"vllm:num_requests_running": running, "vllm:kv_cache_usage_perc": kv_use}
    series = []
    for name, added in per_minute.items():
        total, values = 0.0, []
        for minute in range(minutes):
            total = 0.0 if minute == restart_at else total + added(minute)
            values.append(f"{total:.4f}")
        series.append({"series": f"{name}{{{_LABELS}}}", "values": " ".join(values)})
    for name, value in gauges.items():
        series.append({"series": f"{name}{{{_LABELS}}}", "values": f"{value}x{minutes}"})
    return [s for s in series if not s["series"].startswith(silent or "-")]


ALL = (
    "SpeculationAcceptanceLow",
    "SpeculationAcceptanceDrift",
    "SpeculationTpotAboveBaseline",
    "SpeculationTtftRegression",
    "SpeculationKvSqueeze",
    "SpeculationOnAboveCrossover",
    "SpeculationNotRunning",
    "SpeculationServersGone",
)


def firing(
    folder: Path,
    series: list[dict[str, str]],
    *,
    at: str = "170m",
    names: tuple[str, ...] = ALL,
    expected: Expectations = EXPECTED,
    selector: str = 'job="vllm"',
    tap: bool = False,
) -> set[str]:
    """Which alerts fire: all are asserted silent, and promtool names each that is not."""
    (folder / "rules.yml").write_text(alert_rules(expected, selector=selector, tap=tap))
    silent = [{"eval_time": at, "alertname": name, "exp_alerts": []} for name in names]
    tests = [{"interval": "1m", "input_series": series, "alert_rule_test": silent}]
    (folder / "test.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = promtool("test", "rules", "test.yml", folder=folder)
    output = done.stdout + done.stderr
    found = {name for name in names if re.search(rf"alertname:\s*{name},", output)}
    assert bool(found) == (done.returncode != 0), output
    return found


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    for selector, tap in (("", False), ('job="vllm", env=~"prod|canary"', True)):
        (tmp_path / "rules.yml").write_text(alert_rules(EXPECTED, selector=selector, tap=tap))
        done = promtool("check", "rules", "rules.yml", folder=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("state", "alerts"),
    [
        ({}, set()),
        # The article's unhealthy server: 51,000 drafted, 19,400 accepted.
        (
            {"rate": lambda _m: 19_400 / 51_000},
            {"SpeculationAcceptanceLow", "SpeculationAcceptanceDrift"},
        ),
        # Decays from 0.76 by 0.1 over three hours: below 0.71 for longer than the rule waits.
        ({"rate": lambda m: 0.76 - 0.1 * m / 180 - 0.02}, {"SpeculationAcceptanceDrift"}),
        ({"tpot_s": 0.050}, {"SpeculationTpotAboveBaseline"}),
        ({"tpot_s": 0.050, "running": 20}, set()),  # slower, but at another load than measured
        ({"ttft_s": 0.4}, {"SpeculationTtftRegression"}),
        ({"kv_use": 0.97, "preemptions_per_minute": 2.0}, {"SpeculationKvSqueeze"}),
        ({"kv_use": 0.97}, set()),  # full but nobody suffers
        ({"running": 30}, {"SpeculationOnAboveCrossover"}),
        ({"restart_at": 165}, set()),
        ({"silent": ("vllm:spec_decode",)}, {"SpeculationNotRunning"}),
        ({"silent": ("vllm:",)}, {"SpeculationServersGone"}),
        (
            {"silent": ("vllm:request_time_per_output_token", "vllm:kv_cache")},
            set(),
        ),  # an old version
    ],
)
def test_each_alert_fires_for_its_cause_and_no_other(
    tmp_path: Path, state: dict[str, Any], alerts: set[str]
) -> None:
    assert firing(tmp_path, server(**state)) == alerts


def test_the_v0_gauge_counts_as_kv_use(tmp_path: Path) -> None:
    series = server(kv_use=0.97, preemptions_per_minute=2.0)
    for entry in series:
        entry["series"] = entry["series"].replace("vllm:kv_cache_", "vllm:gpu_cache_")
    assert firing(tmp_path, series) == {"SpeculationKvSqueeze"}


def test_a_server_of_another_job_is_not_looked_at(tmp_path: Path) -> None:
    series = server(rate=lambda _m: 0.2)
    found = firing(tmp_path, series, selector='job="other"')
    assert found == {"SpeculationServersGone"}


def test_without_a_crossover_there_is_no_rule_about_it() -> None:
    rules = alert_rules(dataclasses.replace(EXPECTED, crossover_running=None))
    assert "SpeculationOnAboveCrossover" not in rules


def tapped(segment: str, rate: float, p10_bucket: float) -> list[dict[str, str]]:
    """tap's series of one segment: a tenth and more of the requests fall at ``p10_bucket``."""
    labels = f'job="tap", segment="{segment}", temperature="0"'
    name = "specwise_tap_acceptance_rate_bucket"
    none = [f'{name}{{{labels}, le="{p10_bucket - 0.05:.2f}"}}', "0x180"]
    low = [f'{name}{{{labels}, le="{p10_bucket}"}}', "0+2x180"]
    top = [f'{name}{{{labels}, le="+Inf"}}', "0+10x180"]
    drafted = [f"specwise_tap_draft_tokens_total{{{labels}}}", "0+1000x180"]
    accepted = [f"specwise_tap_accepted_tokens_total{{{labels}}}", f"0+{1000 * rate}x180"]
    return [{"series": s, "values": v} for s, v in (none, low, top, drafted, accepted)]


@pytest.mark.parametrize(
    ("rate", "p10_bucket", "alerts"),
    [
        (0.9, 0.95, set()),
        (0.8, 0.95, {"SpeculationSegmentAcceptanceLow"}),
        (0.9, 0.4, {"SpeculationRequestsLosing"}),
    ],
)
def test_tap_finds_the_segment_that_the_servers_counters_hide(
    tmp_path: Path, rate: float, p10_bucket: float, alerts: set[str]
) -> None:
    names = ("SpeculationSegmentAcceptanceLow", "SpeculationRequestsLosing", *ALL)
    series = [*server(), *tapped("json", rate, p10_bucket)]
    assert firing(tmp_path, series, names=names, tap=True) == alerts


def test_a_selector_that_promql_would_not_read_is_refused() -> None:
    for wrong in ("vllm", 'job="a"} or up{', "job=vllm"):
        with pytest.raises(InputError, match="label matchers"):
            alert_rules(EXPECTED, selector=wrong)


def test_every_query_of_the_dashboard_is_one_that_prometheus_reads(tmp_path: Path) -> None:
    model = dashboard(EXPECTED, selector='job="vllm"', tap=True)
    queries = [target["expr"] for panel in model["panels"] for target in panel["targets"]]
    rules = [{"record": f"q{n}", "expr": query} for n, query in enumerate(queries)]
    (tmp_path / "q.yml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]}))
    done = promtool("check", "rules", "q.yml", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_dashboard_reads_what_the_rules_record() -> None:
    recorded = {
        rule["record"]
        for group in yaml.safe_load(alert_rules(EXPECTED, tap=True))["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    model = dashboard(EXPECTED, tap=True)
    read = [panel["targets"][0]["expr"] for panel in model["panels"]]
    assert recorded <= set(read)
    assert {q for q in read if q.startswith("specwise:")} <= recorded


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = dashboard(EXPECTED, tap=True)["panels"]
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    assert len({p["id"] for p in panels}) == len(panels)
