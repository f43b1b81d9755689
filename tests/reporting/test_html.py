"""The report as a real Chromium shows it: req I1 (verdict and conditions), F4, G1, G2, I5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.analysis.synthetic import demo_study
from tests.reporting import samples
from tests.reporting.browser import Browser, chromium

from specwise.decision.assessment import Assessment, assess
from specwise.errors import StoreError
from specwise.reporting.html import render_report, write_report

PAGES: dict[str, Callable[[], Assessment]] = {
    "off": samples.assessment,
    "crowded": samples.crowded,
    "assessed": lambda: assess(demo_study()),
    "nothing": lambda: samples.measure_more(samples.assessment()),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each page in a study folder that has its raw records."""
    written = {}
    for name, build in PAGES.items():
        folder = tmp_path_factory.mktemp(name)
        assessment = in_folder(build(), folder)
        written[name] = folder / "report.html"
        write_report(assessment, written[name])
    return written


def in_folder(assessment: Assessment, folder: Path) -> Assessment:
    for measured in assessment.study.trials:
        raw = folder / "trials" / measured.trial.trial_id / "requests.jsonl"
        raw.parent.mkdir(parents=True)
        raw.write_text("{}\n")
    return replace(assessment, study=replace(assessment.study, folder=str(folder)))


@pytest.mark.parametrize("name", PAGES)
def test_page_is_self_contained_and_silent(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    browser.open_details()
    assert browser.console() == []
    assert browser.requests()
    assert {url.split(":", 1)[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.scripts.length") == 0


def test_answer_stands_first(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["off"])
    top = browser.run("return document.querySelector('#verdict').innerText")
    assert "Leave it off" in top
    assert "Leave speculation off for mix at 16 clients" in top
    assert "16 concurrent clients" in top
    assert "0.76x" in top  # the segment that loses is not hidden by the aggregate
    assert browser.run("return document.querySelector('h1').getBoundingClientRect().bottom") < 450
    assert "14 failed" in browser.run("return document.querySelector('#warnings').innerText")
    assert browser.run(
        "return document.querySelector('#warnings').getBoundingClientRect().bottom < 900"
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_every_figure_is_drawn_once(browser: Browser, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["off"], width=width)
    browser.open_details()
    figures = browser.run(
        """return [...document.querySelectorAll('figure')].map(f =>
             [...f.querySelectorAll('svg.chart')].filter(s => s.getClientRects().length).map(s => ({
               width: s.getBoundingClientRect().width, height: s.getBoundingClientRect().height,
               marks: s.querySelectorAll('path, use').length,
               texts: [...s.querySelectorAll('text')].map(t => t.textContent),
               role: s.getAttribute('role'), label: s.getAttribute('aria-label'),
               title: s.querySelector('title').textContent,
               variant: s.getAttribute('class') })))"""
    )
    # speedup, aggregate, TTFT and TPOT of four workloads, acceptance by segment and by position
    assert len(figures) == 8
    for shown in figures:
        (chart,) = shown
        assert chart["variant"] == ("chart wide" if width == 1280 else "chart narrow")
        assert chart["width"] > 300
        assert chart["height"] > 150
        assert chart["marks"] > 20
        assert chart["role"] == "img"
        assert chart["label"].startswith(chart["title"])
        assert len(chart["texts"]) >= 7
    first = figures[0][0]
    assert {"json", "copy", "prose", "mix", "mix › json", "mix › prose"} <= set(first["texts"])
    assert "mix › prose, draft_model at c16: 0.76x [0.71, 0.82]" in first["label"]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 800, 400, 320])
def test_page_never_scrolls_sideways(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    browser.open_details()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    outside = browser.run(
        """return [...document.querySelectorAll('body *')]
             .filter(e => !e.closest('.scroll, pre, svg') && e.getClientRects().length)
             .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
             .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert outside == []


@pytest.mark.parametrize("name", ["off", "crowded", "assessed"])
@pytest.mark.parametrize("width", [1280, 840, 400])
def test_chart_text_is_whole_apart_and_large_enough(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width=width)
    browser.open_details()
    texts = browser.run(
        """const drawn = [...document.querySelectorAll('svg.chart')];
           return drawn.filter(s => s.getClientRects().length).flatMap((s, chart) => {
             const frame = s.getBoundingClientRect();
             const scale = frame.width / s.viewBox.baseVal.width;
             return [...s.querySelectorAll('text')].map(t => {
               const r = t.getBoundingClientRect();
               return { chart, text: t.textContent, left: r.left, right: r.right, top: r.top,
                        bottom: r.bottom, size: parseFloat(getComputedStyle(t).fontSize) * scale,
                        inside: r.left >= frame.left - 1 && r.right <= frame.right + 1 &&
                          r.top >= frame.top - 1 && r.bottom <= frame.bottom + 1 } }) })"""
    )
    assert len(texts) > 50
    assert [t["text"] for t in texts if not t["inside"]] == []
    assert min(t["size"] for t in texts) >= 9.5
    assert overlapping(texts) == []


def overlapping(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of texts in one chart whose boxes cover each other by more than a pixel or two."""
    found = []
    for place, one in enumerate(texts):
        for other in texts[place + 1 :]:
            if other["chart"] != one["chart"]:
                break
            across = min(one["right"], other["right"]) - max(one["left"], other["left"])
            down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if across > 1 and down > 3:
                found.append((one["text"], other["text"]))
    return found


CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data] };
const light = c => { const [r, g, b] = c.map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const behind = e => { for (; e; e = e.parentElement) {
  const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c }
  return [255, 255, 255, 255] };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const seen = [];
while (walker.nextNode()) { const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !e.getClientRects().length || e.closest('title')) continue;
  const style = getComputedStyle(e), svg = e.closest('svg');
  const fore = rgb(svg ? style.fill : style.color), back = behind(e);
  const [high, low] = [light(fore), light(back)].sort((x, y) => y - x);
  seen.push({ text: walker.currentNode.data.trim(), fore: fore.join(), back: back.join(),
              ratio: (high + 0.05) / (low + 0.05) }) }
return seen
"""


def test_conditions_of_the_verdict_stand_open_failing_first(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["assessed"])
    shown = browser.run(
        """return [...document.querySelectorAll('#conditions table.conditions')][0]
             .innerText.split('\\n').filter(line => /^[✗?✓] /.test(line)).map(line => line[0])"""
    )
    assert len(shown) > 15
    assert shown == sorted(shown, key="✗?✓".index)
    folded = browser.run(
        "return [...document.querySelectorAll('#conditions summary')].map(s => s.innerText)"
    )
    assert "draft_model › prose: 3 not met" in " ".join(folded)


def test_light_and_dark_are_both_readable(browser: Browser, pages: dict[str, Path]) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.open(pages["crowded"], scheme=scheme)
        browser.open_details()
        seen[scheme] = browser.run(CONTRASTS)
        assert len(seen[scheme]) > 400
        assert [t for t in seen[scheme] if t["ratio"] < 4.5] == []
    assert seen["light"][0]["back"] != seen["dark"][0]["back"]
    assert {t["fore"] for t in seen["light"]}.isdisjoint(t["fore"] for t in seen["dark"])


def test_curves_stand_out_in_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    """Graphics need a contrast of 3 to the page (WCAG 1.4.11), and an arm keeps its colour."""
    for scheme in ("light", "dark"):
        browser.open(pages["crowded"], scheme=scheme)
        arms = browser.run(
            """const probe = document.createElement('p'); document.body.append(probe);
               return [0, 1, 2, 3, 4].map(i => { probe.style.color = `var(--arm-${i})`;
                 return getComputedStyle(probe).color })"""
        )
        page = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert len(set(arms)) == 5
        assert min(contrast(colour, page) for colour in arms) >= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(c) / 255 for c in colour.removeprefix("rgb(").rstrip(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_raw_records_are_one_click_away(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["off"])
    links = browser.run(
        """return [...document.querySelectorAll('#records a')]
             .map(a => [a.getAttribute('href'), a.href])"""
    )
    assert len(links) == 75  # one a trial
    folder = pages["off"].parent
    for relative, absolute in links:
        assert (folder / relative).is_file()
        assert absolute == (folder / relative).as_uri()
    browser.driver.get(links[0][1])
    assert "{}" in browser.driver.page_source
    evidence = "document.querySelectorAll('#conditions a')"
    browser.open(pages["off"])
    assert browser.run(f"return [...{evidence}].map(a => a.getAttribute('href'))")


def test_links_follow_the_report_elsewhere_and_vanish_with_the_records(tmp_path: Path) -> None:
    assessment = in_folder(samples.measure_more(samples.assessment()), tmp_path / "study #1")
    (tmp_path / "out").mkdir()
    write_report(assessment, tmp_path / "out" / "page.html")
    page = (tmp_path / "out" / "page.html").read_text()
    assert 'href="../study%20%231/trials/0001-baseline-json-c1-r1/requests.jsonl"' in page
    without = samples.measure_more(samples.assessment())
    assert "requests.jsonl" not in render_report(without, tmp_path)


def test_a_prediction_says_so_everywhere(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["crowded"])
    unmarked = """return [...document.querySelectorAll('main h2, figcaption, svg.chart title')]
        .filter(e => !e.closest('#provenance, #warnings'))
        .map(e => e.textContent).filter(text => !/predicted/i.test(text))"""
    assert browser.run(unmarked) == []
    assert "(predicted)" in browser.run("return document.title")
    assert "no server was measured" in browser.run("return document.body.innerText")
    browser.open(pages["off"])
    assert "predicted" not in browser.run("return document.body.innerText").lower()


def test_text_is_escaped(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["crowded"])
    assert browser.run("return document.querySelector('h1').children.length") == 0
    assert '<b>5 & 6</b> "quoted"' in browser.run("return document.querySelector('h1').innerText")
    assert "<script>alert(1)</script>" in browser.run(
        "return document.querySelector('#warnings').innerText"
    )


def test_a_client_that_limited_the_run_and_estimates_are_flagged(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["crowded"])
    warned = browser.run("return document.querySelector('#warnings').innerText")
    assert "load generator limited this measurement" in warned
    assert "estimated from tokens per streamed chunk" in warned


def test_ids_are_unique_and_references_resolve(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["off"])
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert {"verdict", "segments", "next", "load", "conditions", "provenance"} <= set(ids)
    broken = browser.run(
        """return [...document.querySelectorAll('use, nav a')].map(e => e.getAttribute('href'))
             .filter(href => !document.getElementById(href.slice(1)))"""
    )
    assert broken == []
    clips = browser.run(
        """return [...document.querySelectorAll('[clip-path]')]
             .map(e => e.getAttribute('clip-path').slice(5, -1))
             .filter(id => !document.getElementById(id))"""
    )
    assert clips == []


def test_outputs_and_prompts_are_not_in_the_page(pages: dict[str, Path]) -> None:
    page = pages["crowded"].read_text()
    assert "THE MODEL SAID THIS" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_same_study_gives_the_same_page(tmp_path: Path) -> None:
    assessment = samples.assessment()
    assert render_report(assessment, tmp_path) == render_report(assessment, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        write_report(samples.measure_more(samples.assessment()), tmp_path / "no" / "report.html")
