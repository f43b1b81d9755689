"""The forecast in the terminal, as JSON and as a page in a real Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tests.reporting.browser import Browser, chromium

from specwise.decision.assessment import assess
from specwise.domain import LoadPoint, Loop, Slo, Speculation
from specwise.errors import StoreError
from specwise.facts.checkpoint import load_checkpoint
from specwise.facts.hardware import find_gpu
from specwise.prediction.forecast import (
    PRIORS,
    Candidate,
    Prior,
    Scenario,
    by_batch,
    forecast_study,
    sensitivity,
)
from specwise.prediction.speedup import tokens_per_step
from specwise.reporting.prediction import (
    Forecast,
    equal_acceptance,
    forecast_to_dict,
    print_forecast,
    write_forecast,
)

SECTIONS = ("verdict", "speedup", "loads", "breakeven", "bestk", "sensitivity", "assumptions")


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    loads = tuple(LoadPoint(Loop.CLOSED, value) for value in (1.0, 8.0, 128.0))
    scenario = Scenario(
        target=load_checkpoint("llama-3.1-70b"),
        gpu=find_gpu("h100"),
        gpus=4,
        prompt_tokens=200,
        output_tokens=60,
        loads=loads,
        production=loads[-1],
        candidates=(
            Candidate(
                "draft_model",
                Speculation("draft_model", 3, draft="d"),
                Prior((0.6,), 1.0, "<script>alert(1)</script>"),
                load_checkpoint("llama-3.1-8b"),
            ),
            Candidate("ngram", Speculation("ngram", 3), PRIORS["ngram"]),
        ),
        slo=Slo(tpot_s=0.025),
    )
    return Forecast(
        scenario=scenario,
        assessment=assess(forecast_study(scenario)),
        batches=by_batch(scenario, (1, 16, 64, 256)),
        unknowns=sensitivity(scenario, 64),
        unknowns_at=64,
    )


def printed(forecast: Forecast, encoding: str = "utf-8", width: int = 100) -> str:
    class Terminal(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    out = Terminal()
    print_forecast(forecast, Console(file=out, width=width))
    return out.getvalue()


def test_the_terminal_says_that_it_is_predicted_and_in_which_units(forecast: Forecast) -> None:
    text = printed(forecast)
    assert text.startswith("PREDICTED ")
    assert "not measured" in text
    assert "TPOT and TTFT in ms; Good/s" in text
    assert text.count("c128") == 3
    without = replace(forecast, scenario=replace(forecast.scenario, slo=Slo()))
    assert "Good/s" not in printed(without)
    assert printed(forecast, encoding="ascii").isascii()


def test_equal_acceptance_emits_as_many_tokens_as_what_is_assumed(forecast: Forecast) -> None:
    """So that it may stand beside the break-even acceptance: a lookup's mean may not."""
    for candidate in forecast.scenario.candidates:
        held = candidate.acceptance.positions(3)
        assert tokens_per_step([equal_acceptance(candidate)] * 3) == pytest.approx(
            tokens_per_step(held)
        )
    ngram = forecast.scenario.candidates[1]
    assert equal_acceptance(ngram) < 0.35 < sum(ngram.acceptance.positions(3)) / 3
    # Above break-even is a gain, below it a loss: the drawn lines agree with the speedups.
    held_by = {c.name: equal_acceptance(c) for c in forecast.scenario.candidates}
    for row in forecast.batches:
        gains = row.break_even is not None and held_by[row.candidate] > row.break_even
        assert gains == (row.speedup > 1)


def test_a_narrow_terminal_shows_whole_names_and_fewer_columns(forecast: Forecast) -> None:
    assert printed(forecast, width=100).count("P99") == 2
    narrow = printed(forecast, width=72)
    assert "P99" not in narrow
    assert "…" not in narrow
    assert "draft_model" in narrow.split("Load", 1)[1]


def test_of_many_arms_the_best_is_the_headline(forecast: Forecast, tmp_path: Path) -> None:
    effects = forecast.assessment.effects
    [ngram] = [
        e
        for e in effects
        if (e.metric, e.arm, e.load, e.segment)
        == ("speedup", "ngram", forecast.scenario.production, None)
    ]
    more = [replace(ngram, arm=f"ngram, k={k}", ratio=1 + k / 10) for k in (1, 2)]
    assessment = replace(forecast.assessment, effects=(*effects, *more))
    write_forecast(replace(forecast, assessment=assessment), tmp_path / "page.html")
    assert "ngram, k=2 1.20x, the best of 4, at" in (tmp_path / "page.html").read_text()


def test_json_is_complete(forecast: Forecast) -> None:
    found = json.loads(json.dumps(forecast_to_dict(forecast), allow_nan=False))
    assert found["predicted"] is True
    assert (found["target"], found["gpus"]) == (forecast.scenario.target.name, 4)
    assert [c["name"] for c in found["candidates"]] == ["draft_model", "ngram"]
    assert {(e["arm"], e["load"]["value"]) for e in found["speedups"]} == {
        (arm, load) for arm in ("draft_model", "ngram") for load in (1.0, 8.0, 128.0)
    }
    assert len(found["serving"]) == 9
    assert {"tpot_s", "ttft_s", "goodput_per_s", "output_tokens_per_s"} <= set(found["serving"][0])
    assert len(found["crossovers"]) == 2
    assert {"break_even", "best_k", "best_speedup"} <= set(found["by_batch"][0])
    assert len(found["by_batch"]) == 8
    assert {"swing", "decides", "speedup_low"} <= set(found["sensitivity"][0])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(forecast: Forecast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "forecast.html"
    write_forecast(forecast, path)
    return path


def test_the_page_is_self_contained_and_escapes_what_it_shows(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.console() == []
    assert {url.split(":", 1)[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.scripts.length") == 0
    assert "<script>alert(1)</script>" in browser.run("return document.body.innerText")


def test_every_section_says_predicted(browser: Browser, page: Path) -> None:
    browser.open(page)
    found = browser.run(
        "return [...document.querySelectorAll('section')].map(s => [s.id, s.innerText])"
    )
    assert [name for name, _ in found] == list(SECTIONS)
    assert all("predicted" in text.lower() for _, text in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_figures_are_there_and_nothing_is_wider_than_the_window(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    shown = browser.run(
        """return [...document.querySelectorAll('figure')].map(f =>
             [...f.querySelectorAll(':scope > svg, :scope > * > svg')]
               .map(s => s.getBoundingClientRect()).filter(b => b.height > 100)
               .map(b => [b.width, b.right]))"""
    )
    assert [len(svgs) for svgs in shown] == [1, 1]
    assert all(w > 0.7 * min(width, 700) and right <= width for [(w, right)] in shown)
    names = browser.run("return [...document.querySelectorAll('.legend')].map(l => l.innerText)")
    assert all("draft_model" in name and "ngram" in name for name in names)
    dark = browser.run("return getComputedStyle(document.body).backgroundColor") != (
        "rgb(251, 251, 250)"
    )
    assert dark == (scheme == "dark")


def test_a_place_that_cannot_be_written_is_one_clear_error(forecast: Forecast) -> None:
    with pytest.raises(StoreError):
        write_forecast(forecast, Path("/proc/none/forecast.html"))
