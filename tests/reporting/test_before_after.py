"""A change as the terminal, the JSON and a real Chromium show it: req D2."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.analysis.test_before_after import ARMS, study
from tests.decision.test_change import quantised, with_drop, with_speed
from tests.reporting.browser import Browser, chromium

from specwise.analysis.before_after import BeforeAfter, compare_studies
from specwise.decision.change import judge
from specwise.domain import Arm, Deployment, Speculation
from specwise.errors import StoreError
from specwise.reporting.before_after import (
    change_to_dict,
    print_change,
    write_change,
)


@pytest.fixture(scope="module")
def fell() -> BeforeAfter:
    """A 4-bit target whose acceptance fell, its arm renamed and given a token by the way."""
    deployment = Deployment(
        "big <script>alert(1)</script>",
        arguments=("--api-key", "sk-secret"),
        environment={"A": "1"},
    )
    arm = Arm("draft_model", Speculation("draft_model", 4, draft="draft"), deployment=deployment)
    change = compare_studies(
        study("a", seed=1, requests=20), study("b", seed=2, requests=20, arms=(ARMS[0], arm))
    )
    return with_drop(quantised(change, target=(16, 4), draft=16), -0.09, 0.01)


def printed(change: BeforeAfter, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    print_change(change, judge(change), Console(file=file, width=width), Path("b/compare.html"))
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_terminal_answers_first_in_80_columns(fell: BeforeAfter) -> None:
    lines = printed(fell).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert "ACCEPTANCE FELL" in lines[1]
    assert "fell by more than 5 points on json" in lines[2]
    text = "\n".join(lines)
    assert "Go from INT4 to INT8" in text
    assert "-9.0 [-10.0, -8.0]" in text
    assert "▼ yes" in text
    assert "Times, after / before: mix, 16 concurrent clients" in text
    assert "free of drift" in text
    assert "not alternated" in text
    assert lines[-1].endswith("b/compare.html")
    assert "sk-secret" not in text


def test_a_terminal_without_unicode_gets_ascii(fell: BeforeAfter) -> None:
    assert printed(fell, encoding="ascii").isascii()


def test_json_has_everything_and_no_secret(fell: BeforeAfter) -> None:
    found = json.loads(json.dumps(change_to_dict(fell, judge(fell)), allow_nan=False))
    assert (found["outcome"], found["exit_code"]) == ("fell", 1)
    first = found["acceptance"][0]
    assert first["estimate"]["difference"] == pytest.approx(-0.09)
    assert (first["segment"], first["verdict"], first["k"]) == ("json", "fell", 4)
    assert found["advice"][0].startswith("Go from INT4")
    assert {e["metric"] for e in found["effects"]} >= {"speedup", "ttft_p50", "goodput_per_s"}
    assert found["speedups"][0]["direction"] in ("better", "worse", "undecided")
    assert "sk-secret" not in json.dumps(found)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(fell: BeforeAfter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "compare.html"
    write_change(fell, judge(fell), path)
    return path


def test_the_page_is_self_contained_and_escapes_what_it_shows(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.open_details()
    assert browser.console() == []
    assert {url.split(":", 1)[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.scripts.length") == 0
    text = browser.run("return document.body.innerText")
    assert "<script>alert(1)</script>" in text
    assert "sk-secret" not in page.read_text()


def test_the_page_answers_first(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert "Acceptance fell" in browser.run("return document.querySelector('#verdict').innerText")
    assert browser.run("return document.querySelector('h1').getBoundingClientRect().bottom") < 400
    assert "Go from INT4 to INT8" in browser.run("return document.querySelector('#next').innerText")
    rows = browser.run(
        "return [...document.querySelectorAll('#acceptance tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) == 3
    assert "-9.0 [-10.0, -8.0]" in rows[0]
    assert "yes" in rows[0]
    assert "no" in rows[1]


def test_the_strip_puts_the_interval_beside_the_rule(browser: Browser, page: Path) -> None:
    """The drawn interval of json lies left of the dashed line at -5 points, prose's right of it."""
    browser.open(page)
    drawn = browser.run(
        """return [...document.querySelectorAll('svg.strip')].map(s =>
             [...s.querySelectorAll('line')].map(l => {
               const b = l.getBoundingClientRect(); return [b.left, b.right, b.height] }))"""
    )
    rule, zero, interval, middle = drawn[0]
    assert interval[1] < rule[0] < zero[0]
    assert interval[0] < middle[0] < interval[1]
    assert drawn[1][2][0] > rule[0]
    assert rule[2] >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    browser.open_details()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    dark = browser.run("return getComputedStyle(document.body).backgroundColor") != (
        "rgb(251, 251, 250)"
    )
    assert dark == (scheme == "dark")


def test_a_predicted_side_says_so_everywhere(fell: BeforeAfter, tmp_path: Path) -> None:
    predicted = replace(fell, before=replace(fell.before, predicted=True))
    assert "PREDICTED" in printed(predicted)
    assert change_to_dict(predicted, judge(predicted))["predicted"]
    write_change(predicted, judge(predicted), tmp_path / "page.html")
    assert "<b>Predicted.</b>" in (tmp_path / "page.html").read_text()


def test_slower_and_open_outcomes_can_be_shown(fell: BeforeAfter, tmp_path: Path) -> None:
    calm = with_drop(fell, 0, 0.01)
    slower = with_speed(calm, 0.7, 0.02, known=True)
    assert "1.43x the time per output token" in printed(slower)
    assert "CANNOT TELL YET" in printed(with_drop(fell, -0.05, 0.03))
    assert "NO HARM" in printed(calm)
    without_times = replace(slower, effects=(), speedups=(), differences=())
    assert "Times" not in printed(without_times)
    write_change(without_times, judge(without_times), tmp_path / "page.html")
    assert "Nothing that the manifests know" in (tmp_path / "page.html").read_text()


def test_a_place_that_cannot_be_written_is_one_clear_error(fell: BeforeAfter) -> None:
    with pytest.raises(StoreError):
        write_change(fell, judge(fell), Path("/proc/none/compare.html"))
