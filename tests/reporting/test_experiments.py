"""The pages of the experiments, as text, as JSON, in a terminal and in a real browser."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.analysis.experiment_studies import Request, Truth, experiment_design, experiment_study
from tests.analysis.synthetic import C16, demo_design, demo_study
from tests.reporting.browser import Browser, chromium
from tests.reporting.test_html import CONTRASTS, overlapping

from specwise.analysis.ladder import trials_to_skip
from specwise.analysis.temperature import TemperatureSweep
from specwise.decision.assessment import Assessment, assess
from specwise.domain import StudyData, Trial
from specwise.reporting.console import print_assessment, print_experiment
from specwise.reporting.html import render_report, write_report
from specwise.reporting.json_export import assessment_to_dict

NAMES = ("temperature", "ladder", "mixed")
LOADS = {
    "temperature": "concurrency = [8]\nrequests = 40\nrepeats = 2",
    "ladder": "concurrency = [1, 2, 4, 8, 16, 32]\nrequests = 32\nrepeats = 2\nproduction = 4",
    "mixed": "concurrency = [16]\nrequests = 70\nrepeats = 3",
}
TITLES = {
    "temperature": "Acceptance by temperature",
    "ladder": "The load ladder",
    "mixed": "The mix and its control",
}


def _truth(name: str) -> Truth:
    def truth(
        trial: Trial, segment: str, temperature: float, difficulty: float, rng: np.random.Generator
    ) -> Request:
        load = trial.load.value
        base = 0.01 * load**0.5
        speedup = 1.0
        if trial.arm != "baseline":
            speedup = {"json": 1.5, "prose": 0.8}[segment]
            if name == "ladder":
                speedup *= (1.5 / load) ** 0.3
        noise = math.exp(0.05 * difficulty + rng.normal(0, 0.03))
        return Request(base / speedup * noise, accept=0.9 - 0.5 * temperature)

    return truth


@cache
def assessed(name: str) -> Assessment:
    design = experiment_design(name, LOADS[name])
    study = experiment_study(design, _truth(name), trial_sd=0.02)
    if name == "ladder":
        light = {t.trial_id for t in design.trials if t.load.value <= 4}
        so_far = StudyData(
            design, {}, tuple(t for t in study.trials if t.trial.trial_id in light), "x"
        )
        study = experiment_study(
            design, _truth(name), trial_sd=0.02, skipped=trials_to_skip(so_far)
        )
        assert study.skipped
    return assess(study)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experiments")
    for name in NAMES:
        write_report(assessed(name), folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in NAMES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_a_section_that_answers(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    text = browser.run("return document.querySelector('#experiment').innerText")
    assert text.startswith(TITLES[name])
    assert browser.run("return document.querySelector('nav a').innerText") == TITLES[name]
    wanted = {
        "temperature": [
            "0.65",
            "production's T=0.8",
            "a benchmark at T=0",
            "published",
            "falls by",
        ],
        "ladder": [
            "The climb ended early, without c8, c16, c32",
            "the answer is clear",
            "TPOT P99",
        ],
        "mixed": [
            "hides that prose, 50% of the requests, loses",
            "speculation itself",
            "Mix / alone",
        ],
    }
    for words in wanted[name]:
        assert words in text
    assert browser.run("return document.querySelectorAll('#experiment figure').length") >= 1
    assert browser.console() == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off_or_on_top_of_each_other(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    browser.open_details()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    texts = browser.run(
        """const drawn = [...document.querySelectorAll('#experiment svg.chart')];
           return drawn.filter(s => s.getClientRects().length).flatMap((s, chart) => {
             const frame = s.getBoundingClientRect();
             return [...s.querySelectorAll('text')].map(t => {
               const r = t.getBoundingClientRect();
               return { chart, text: t.textContent, left: r.left, right: r.right, top: r.top,
                        bottom: r.bottom, inside: r.left >= frame.left - 1 &&
                          r.right <= frame.right + 1 && r.top >= frame.top - 1 &&
                          r.bottom <= frame.bottom + 1 } }) })"""
    )
    assert len(texts) > 8
    assert [t["text"] for t in texts if not t["inside"]] == []
    assert overlapping(texts) == []


@pytest.mark.parametrize("name", NAMES)
def test_light_and_dark_are_both_readable(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        browser.open(pages[name], scheme=scheme)
        browser.open_details()
        seen = browser.run(CONTRASTS)
        assert [t for t in seen if t["ratio"] < 4.5] == []
        backgrounds.add(seen[0]["back"])
    assert len(backgrounds) == 2


def printed(assessment: Assessment, *, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_assessment(assessment, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal_gets_it_in_eighty_columns(name: str) -> None:
    out = printed(assessed(name))
    assert TITLES[name] in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80
    flat = " ".join(out.split())
    wanted = {
        "temperature": ["at production's T=0.8", "T=0.4", "published", "calibration only"],
        "ladder": ["without c8, c16, c32", "TTFT P99", "TPOT P50"],
        "mixed": ["all together", "speculation itself"],
    }
    for words in wanted[name]:
        assert words in flat


def test_every_class_reads_differently() -> None:
    experiment = assessed("temperature").experiment
    assert isinstance(experiment, TemperatureSweep)
    console = Console(file=io.StringIO(), width=200)
    print_experiment(experiment, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "likely a win (confirm against a baseline)" in text
    assert ": off; measured here" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_json_holds_the_result_and_what_was_not_run(name: str) -> None:
    found = assessment_to_dict(assessed(name))["experiment"]
    assert found["name"] == name
    assert found["sentences"]
    assert json.loads(json.dumps(found)) == found, "JSON types only"
    assert "NaN" not in json.dumps(found)
    key = {"temperature": "lines", "ladder": "rungs", "mixed": "diagnoses"}[name]
    assert found["result"][key]
    assert bool(found["skipped_trials"]) == (name == "ladder")


def test_skipped_trials_are_said_and_are_not_missing(pages: dict[str, Path]) -> None:
    ladder = assessed("ladder")
    said = " ".join(ladder.warnings)
    assert "did not have to be run: the answer is clear" in said
    assert "not complete" not in said
    planned = len(ladder.study.design.trials) - len(ladder.study.skipped)
    assert f"{planned} of {planned} planned trials" in pages["ladder"].read_text()


def test_a_plain_study_has_no_such_page(tmp_path: Path) -> None:
    plain = assess(demo_study(demo_design(loads=(C16,))))
    assert plain.experiment is None
    assert 'id="experiment"' not in render_report(plain, tmp_path)
    assert assessment_to_dict(plain)["experiment"] is None


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_that_was_hardly_begun_has_a_page_too(name: str, tmp_path: Path) -> None:
    full = assessed(name).study
    for kept in (0, 1, 2):
        part = assess(StudyData(full.design, {}, full.trials[:kept], "x"))
        assert 'id="experiment"' in render_report(part, tmp_path)
        printed(part)
