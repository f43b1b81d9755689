"""What production's records alone decide: never an effect, always where acceptance is lost."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import orjson
import pytest
from click.testing import CliRunner
from rich.console import Console
from tests.analysis.synthetic import demo_study

from specwise.cli.decide import decide
from specwise.decision.assessment import assess
from specwise.decision.verdict import Decision
from specwise.domain import AcceptanceCounts, AcceptanceSource, Outcome
from specwise.monitoring.expectations import Expectations, expectations
from specwise.monitoring.production import judge_production
from specwise.monitoring.production_page import print_production, production_to_dict
from specwise.monitoring.tap_records import RecordWriter, TapRecord
from specwise.monitoring.tap_requests import temperature_bucket

K = 4


@cache
def study() -> Expectations:
    expected = expectations(assess(demo_study()), arm="draft_model")
    return dataclasses.replace(expected, decision=Decision.ON, rate=0.7, break_even=0.45)


def traffic(
    requests: int, rate: float, *, segment: str = "chat", temperature: float | None = 0.4
) -> list[TapRecord]:
    """Requests of 40 verify steps whose drafts are each accepted with probability ``rate``."""
    rng = np.random.default_rng(requests)
    found = []
    for i in range(requests):
        accepted = rng.binomial(K, rate, 40)
        histogram = tuple(int(n) for n in np.bincount(accepted, minlength=K + 1))
        counts = AcceptanceCounts(AcceptanceSource.PER_REQUEST, histogram, 40 * K)
        found.append(
            TapRecord(
                at=1_790_000_000.0 + i,
                segment=segment,
                bucket=temperature_bucket(temperature),
                path="/v1/completions",
                stream=True,
                outcome=Outcome.OK,
                e2e_s=2.0,
                temperature=temperature,
                status=200,
                ttft_s=0.5,
                tpot_s=0.01,
                last_token_s=2.0,
                output_tokens=40 + int(accepted.sum()),
                acceptance=counts,
            )
        )
    return found


def test_good_acceptance_without_a_baseline_is_still_no_verdict() -> None:
    production = judge_production(traffic(100, 0.9))
    assert production.exit_code == 3
    assert "no effect can be claimed" in production.answer
    assert any("baseline" in line for line in production.next_study)
    assert production.in_flight == pytest.approx(200 / 101)


def test_the_average_hides_the_segment_that_loses_and_the_groups_show_it() -> None:
    """req F4: 60 % at 0.82 and 40 % at 0.38 average to about 0.65."""
    records = traffic(60, 0.82, segment="json", temperature=0.0)
    records += traffic(40, 0.38, segment="prose", temperature=1.0)
    groups = {(g.kind, g.name): g for g in judge_production(records).groups}
    assert groups["all", "all"].rate == pytest.approx(0.65, abs=0.02)
    assert groups["all", "all"].p10 is not None
    assert groups["all", "all"].p10 < 0.5
    assert groups["segment", "json"].health == "healthy"
    assert groups["segment", "prose"].health == "unhealthy"
    assert "without speculation" in groups["segment", "prose"].advice
    assert groups["temperature", "0"].rate == groups["segment", "json"].rate
    assert groups["temperature", "0.7-1"].below_half == groups["segment", "prose"].below_half
    whole = groups["all", "all"]
    assert whole.drafted_tokens == 100 * 40 * K
    parts = [groups["segment", "json"], groups["segment", "prose"]]
    assert whole.accepted_tokens == sum(g.accepted_tokens for g in parts)


@pytest.mark.parametrize(
    ("rate", "requests", "holds", "says"),
    [
        (0.70, 200, True, "stands"),
        (0.55, 200, False, "no longer holds"),
        (0.30, 200, False, "break-even"),
        (0.70, 20, None, "least"),
    ],
)
def test_a_studys_verdict_stands_or_falls(
    rate: float, requests: int, holds: bool | None, says: str
) -> None:
    production = judge_production(traffic(requests, rate), study())
    assert production.holds is holds
    assert says in production.answer


def test_a_study_that_does_not_say_on_is_not_upheld() -> None:
    off = dataclasses.replace(study(), decision=Decision.OFF)
    assert judge_production(traffic(200, 0.7), off).exit_code == 3


def test_requests_that_tell_nothing_are_counted_and_explained() -> None:
    silent = [
        dataclasses.replace(record, acceptance=None, tpot_s=None, ttft_s=None)
        for record in traffic(5, 0.5)
    ]
    production = judge_production(silent)
    whole = production.groups[0]
    assert (whole.rate, whole.p10, whole.ttft_s, whole.health) == (None, None, None, "unknown")
    assert "--per-request-spec-decode-metrics" in production.next_study[-1]
    shown = io.StringIO()
    print_production(production, Console(file=shown, width=80))
    assert "told no acceptance" in " ".join(shown.getvalue().split())


def test_the_command_reads_the_folder(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {})
    records = traffic(40, 0.8)
    for record in records:
        writer.write(record)
    writer.close()
    ran = CliRunner().invoke(decide, ["--from-tap", str(tmp_path), "--json"])
    assert ran.exit_code == 3
    expected = orjson.loads(orjson.dumps(production_to_dict(judge_production(records))))
    assert json.loads(ran.stdout) == expected
    ran = CliRunner().invoke(decide, ["--from-tap", str(tmp_path)])
    assert "no effect can be claimed" in " ".join(ran.stdout.split())
    assert CliRunner().invoke(decide, []).exit_code == 2
