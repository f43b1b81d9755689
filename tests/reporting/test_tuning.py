"""A tuning in the terminal, as JSON and as a page in a real Chromium."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from benchmarks.tune_truths import Played, Search, TrueCosts, Truth
from rich.console import Console
from tests.reporting.browser import Browser, chromium

from specwise.decision.deployment import Tuned, assess_tuning
from specwise.decision.standing import not_run
from specwise.decision.verdict import Decision
from specwise.decision.ways import to_confirm
from specwise.errors import StoreError
from specwise.measurement.design import parse_study
from specwise.reporting.tuning_console import print_tuning
from specwise.reporting.tuning_page import render_tuning, write_tuning
from specwise.reporting.tuning_view import holds, tuning_to_dict

SECTIONS = (
    "verdict", "gain", "cells", "arms", "search", "eliminated", "ways", "time", "prediction",
)  # fmt: skip
LOADS = ("c1", "c8", "c32")
SCRIPT = "<script>alert(1)</script>"
STUDY = """
name = "tuned"
[slo]
bound = "throughput"
[serve]
model = "simulated"
[[arm]]
name = "baseline"
[[arm]]
name = "draft"
speculation = { method = "draft_model", k = 3, draft = "simulated-draft" }
[[arm]]
name = "ngram"
speculation = { method = "ngram", k = 3 }
[[segment]]
name = "json"
prompts = "simulated"
[[segment]]
name = "prose"
prompts = "simulated"
temperature = 0.8
[[workload]]
name = "mix"
shares = { json = 0.5, prose = 0.5 }
[load]
concurrency = [1, 8, 32]
requests = [16, 32, 64]
[tune]
k = [1, 2, 4]
draft_sampling = ["greedy"]
"""


def truth() -> Truth:
    """A draft that pays alone and no longer pays in a large batch, on a quiet machine."""
    rng = np.random.default_rng(1)
    plain = TrueCosts(
        memory_s=0.02, token_s=0.02 / 30, sharpness=2.0, context_s=0.0, overhead_s_each=0.0005
    )
    draft = replace(plain, speculates=True, draft_pass_s=0.0004, draft_token_s=0.0002 / 30)
    lookup = replace(plain, speculates=True, lookup=True, draft_pass_s=0.0005)
    sizes = tuple(
        (int(prompt), int(output))
        for prompt, output in zip(
            rng.lognormal(4.5, 0.4, 200).clip(8, 800),
            rng.lognormal(4.0, 0.3, 200).clip(8, 150),
            strict=True,
        )
    )
    return Truth(
        costs={"": plain, "draft_model": draft, "ngram": lookup},
        acceptance={
            "draft_model": {"json": (0.9,) * 4, "prose": (0.6,) * 4},
            "ngram": {"json": (0.7,) * 4, "prose": (0.4,) * 4},
        },
        hits={"json": 0.5, "prose": 0.1},
        sizes={"json": sizes, "prose": sizes},
        noise=0.004,
    )


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    """A whole tuning, as the command makes it: search, confirmation, answer."""
    search = Search(
        Played(truth(), np.random.default_rng(7)),
        parse_study(STUDY, name="tuned", experiment="tune"),
    )
    chosen = search.run()
    done = {t.trial.trial_id for t in search.trials}
    skipped = not_run(search.design, chosen.standing, chosen.reason, done)
    study = replace(search.study, skipped=skipped)
    found = assess_tuning(study, search.picks, [], tolerance=0.02, budget_s=None)
    way = to_confirm(found.ways, 0.02)[0]
    confirming = search.confirm(way, repeats=2, all_workloads=True)
    return assess_tuning(study, search.picks, [confirming], tolerance=0.02, budget_s=None)


@pytest.fixture(scope="module")
def undecided(tuned: Tuned) -> Tuned:
    """The same search, cut off by its budget before anything was confirmed."""
    return replace(
        assess_tuning(tuned.search, tuned.picks, [], tolerance=0.001, budget_s=120.0),
        stopped="budget",
    )


def printed(tuned: Tuned, report: Path | None = None, *, encoding: str = "utf-8") -> str:
    class Terminal(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    out = Terminal()
    print_tuning(tuned, Console(file=out, width=100), report)
    return out.getvalue()


def test_the_terminal_answers_first_and_ends_with_commands(tuned: Tuned) -> None:
    text = printed(tuned, Path("my tunings/one/report.html"))
    lines = text.strip().splitlines()
    assert lines[0].startswith("▲ TURN IT ON, WITH A SCHEDULE")
    for first, last, k in tuned.recommendation.schedule:
        assert f"{first}–{last}" in text
        assert f" {k} " in text
    deployed = tuned.confirmations[0]
    for cell in deployed.cells:
        if cell.workload == "mix":
            (line,) = [row for row in lines if row.split()[:1] == [cell.load.label]]
            assert "1.00" in line
            assert f"{cell.to_baseline.ratio:.2f}x" in line
            assert line.rstrip().endswith({"better": "yes", "worse": "no"}[holds(cell)])
    assert f"at most {tuned.standing.regret_bound * 100:.1f} % of goodput" in text
    assert "of the whole sweep" in text
    assert "specwise flags --from 'my tunings/one' --rollout" in lines[-2]
    assert "my tunings/one/report.html" in lines[-1]
    assert len(lines) < 30
    assert printed(tuned, encoding="ascii").isascii()


def test_without_a_confirmation_the_terminal_shows_beliefs_and_which_are_predicted(
    undecided: Tuned,
) -> None:
    assert undecided.recommendation.decision is Decision.MEASURE_MORE
    text = printed(undecided, Path("one/report.html"))
    assert "nothing is confirmed" in text
    assert "the budget is spent" in text
    assert "specwise tune --resume one --budget MINUTES" in text
    assert "specwise flags" not in text
    ours = [c for c in undecided.standing.cells if c.workload == "mix"]
    unseen = [c for c in ours if c.best != "baseline" and c.arms[0].trials == 0]
    assert 0 < len(unseen) < len(ours)
    assert text.count("predicted, not run") == len(unseen)


def refused_before(tuned: Tuned) -> Tuned:
    """The same after a first schedule of the same family that did not hold, nor its static arm."""
    halves = tuple(
        replace(c, number=1, schedule=((1, 1024, 4),) if c.schedule else (), outcome="refused",
                cells=tuple(
                    replace(x, to_baseline=replace(x.to_baseline, ratio=0.5, low=0.4, high=0.6))
                    for x in c.cells
                ))
        for c in tuned.confirmations
    )  # fmt: skip
    return replace(
        tuned,
        confirming=tuned.confirming * 2,
        confirmations=(*halves, *(replace(c, number=2) for c in tuned.confirmations)),
        recommendation=replace(tuned.recommendation, confirmed_by=2),
    )


def test_of_two_confirmations_the_one_that_holds_is_shown(tuned: Tuned) -> None:
    """Both have an arm "scheduled", of the same family, and the same static arm."""
    text = printed(refused_before(tuned))
    assert "0.50x" not in text
    ours = [c for c in tuned.confirmations[0].cells if c.workload == "mix"]
    assert all(f"{c.to_baseline.ratio:.2f}x" in text for c in ours)


def test_each_confirmation_links_to_its_own_evidence(tuned: Tuned, tmp_path: Path) -> None:
    twice = refused_before(tuned)
    folders = [tmp_path / "confirm", tmp_path / "confirm-2"]
    for folder in folders:
        folder.mkdir()
        (folder / "report.html").touch()
    confirming = [replace(s, folder=str(f)) for s, f in zip(twice.confirming, folders, strict=True)]
    page = render_tuning(replace(twice, confirming=tuple(confirming)), tmp_path / "report.html")
    links = [part.split('"')[0] for part in page.split('href="confirm')[1:]]
    assert links == ["/report.html"] * 2 + ["-2/report.html"] * 2


def test_where_nothing_held_the_one_that_is_open_is_shown(tuned: Tuned) -> None:
    twice = refused_before(tuned)
    open_ = replace(
        twice,
        confirmations=tuple(
            replace(c, outcome="undecided" if c.number == 2 else "refused")
            for c in twice.confirmations
        ),
        recommendation=replace(
            twice.recommendation, decision=Decision.MEASURE_MORE, arm=None, confirmed_by=None
        ),
    )
    assert "0.50x" not in printed(open_)


def test_the_belief_shown_beside_a_schedule_is_of_its_own_lengths(tuned: Tuned) -> None:
    """One that was composed anew may have other lengths than the search's."""
    longest = tuple(
        replace(c, schedule=((1, 1024, 4),) if c.schedule else ()) for c in tuned.confirmations
    )
    other = replace(tuned, confirmations=longest)
    page = render_tuning(other, Path("report.html"))
    shown = [part.split("<")[0] for part in page.split('<span class="sub">draft-')[1:]]
    assert shown[: len(LOADS)] == ["k4"] * len(LOADS)


def test_an_arm_keeps_off_by_its_whole_interval(tuned: Tuned) -> None:
    cell = tuned.confirmations[0].cells[0]
    for judged, ratio, low_at_98, high in (
        ("better", 0.975, 0.9701, 1.2),
        ("better", 0.98, 0.9501, 1.2),
        ("undecided", 0.975, 0.96, 1.2),
        ("undecided", 1.05, 0.94, 1.2),
        ("worse", 0.93, 0.9, 0.969),
        ("worse", 0.95, 0.91, 0.99),
    ):
        effect = replace(
            cell.to_baseline, ratio=ratio, high=high, dof=1e6, noise_dof=0.0,
            se_log=math.log(ratio / low_at_98) / 2.3263,
        )  # fmt: skip
        assert holds(replace(cell, to_baseline=effect)) == judged


def test_json_is_complete_and_says_what_is_predicted_only(tuned: Tuned) -> None:
    found = json.loads(json.dumps(tuning_to_dict(tuned), allow_nan=False))
    assert found["recommendation"]["decision"] == "on-with-schedule"
    assert found["predicted"] is False
    arms = len(tuned.search.design.arms)
    assert len(found["arms"]) == arms
    assert len(found["cells"]) == 9
    for cell in found["cells"]:
        assert len(cell["arms"]) == arms
        for arm in cell["arms"]:
            ran = any(
                (t.trial.arm, t.trial.workload, t.trial.load.label)
                == (arm["arm"], cell["workload"], cell["load"]["label"])
                for t in tuned.search.trials
            )
            assert arm["predicted_only"] == (not ran and arm["arm"] != "baseline")
    assert [p["trial_id"] for p in found["picks"]] == [p.trial_id for p in tuned.picks]
    ends = [p["at_s"] + p["seconds"] + p["start_s"] for p in found["picks"]]
    assert [p["at_s"] for p in found["picks"][1:]] == pytest.approx(ends[:-1])
    assert found["time"]["search_s"] == pytest.approx(ends[-1])
    assert found["time"]["sweep_s"] == tuned.sweep_s
    assert [c["outcome"] for c in found["confirmations"]] == [
        c.outcome for c in tuned.confirmations
    ]
    assert "confirmed" in {c.outcome for c in tuned.confirmations}
    assert {c["holds"] for c in found["confirmations"][0]["cells"]} <= {"yes", "no", "not shown"}
    assert {"family", "static", "schedule", "idle_price", "gain"} <= set(found["ways"][0])
    assert "records" not in json.dumps(found)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page in a tuning's folder as the command leaves it, hostile words in every text."""
    folder = tmp_path_factory.mktemp("page") / "a tuning"
    for name in ("search", "confirm"):
        (folder / name).mkdir(parents=True)
    (folder / "confirm" / "report.html").write_text("<!doctype html><title>there</title>")
    answer = tuned.recommendation
    hostile = replace(
        tuned,
        search=replace(tuned.search, folder=str(folder / "search")),
        confirming=tuple(replace(s, folder=str(folder / "confirm")) for s in tuned.confirming),
        picks=tuple(replace(p, reason=f"{SCRIPT} {p.reason}") for p in tuned.picks),
        ways=tuple(replace(w, note=SCRIPT) for w in tuned.ways),
        standing=replace(
            tuned.standing,
            eliminated=tuple(replace(e, reason=SCRIPT) for e in tuned.standing.eliminated),
        ),
        recommendation=replace(answer, reasons=(SCRIPT, *answer.reasons), routing=SCRIPT),
    )
    write_tuning(hostile, folder / "report.html")
    return folder / "report.html"


def test_the_page_is_self_contained_and_escapes_what_it_shows(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.console() == []
    assert {url.split(":", 1)[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.scripts.length") == 0
    browser.open_details()
    text = browser.run("return document.body.innerText")
    assert text.count(SCRIPT) > 10
    assert browser.run("return [...document.querySelectorAll('section')].map(s => s.id)") == list(
        SECTIONS
    )


def test_evidence_is_linked_beside_the_page(browser: Browser, page: Path) -> None:
    browser.open(page)
    hrefs = browser.run("return [...document.querySelectorAll('main a')].map(a => a.href)")
    files = {url for url in hrefs if "#" not in url}
    assert files == {
        (page.parent / "confirm" / "report.html").as_uri(),
        (page.parent / "search").as_uri() + "/",
    }


def test_the_schedule_and_every_load_stand_on_the_page(
    browser: Browser, page: Path, tuned: Tuned
) -> None:
    browser.open(page)
    cells = "return [...document.querySelectorAll('#schedule td')].map(c => c.innerText)"
    assert browser.run(cells) == [str(k) for *_, k in tuned.recommendation.schedule]
    rows = browser.run(
        "return [...document.querySelector('#gain table').tBodies[0].rows].map(r => r.innerText)"
    )
    ours = [c for c in tuned.confirmations[0].cells if c.workload == "mix"]
    assert len(rows) == len(ours) == len(LOADS)
    for row, cell in zip(rows, sorted(ours, key=lambda c: c.load), strict=True):
        assert row.startswith(cell.load.label)
        assert f"{cell.to_baseline.ratio:.2f}x" in row
        assert "yes" in row


def test_what_no_trial_ran_is_marked_as_predicted(
    browser: Browser, page: Path, tuned: Tuned
) -> None:
    browser.open(page)
    ours = [c for c in tuned.standing.cells if c.workload == "mix"]
    unseen = [a for c in ours for a in c.arms if a.trials == 0 and a.arm != "baseline"]
    pale = browser.run(
        "return [...document.querySelectorAll('#arms > .scroll .pale')].map(c => c.innerText)"
    )
    assert len(pale) == len(unseen) > 0
    assert all("pred." in words for words in pale)
    shown = browser.run(
        "return [...document.querySelector('#cells table').tBodies[0].rows].map(r => r.innerText)"
    )
    assert sum("predicted" in row for row in shown) == sum(
        next(a for a in c.arms if a.arm == c.best).trials == 0 and c.best != "baseline"
        for c in tuned.standing.cells
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_figures_are_there_and_nothing_is_wider_than_the_window(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    browser.open_details()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    shown = browser.run(
        """return [...document.querySelectorAll('figure')].map(f =>
             [...f.querySelectorAll(':scope > svg')]
               .map(s => s.getBoundingClientRect()).filter(b => b.height > 100)
               .map(b => [b.width, b.right]))"""
    )
    assert [len(svgs) for svgs in shown] == [1, 1]
    assert all(w > 0.7 * min(width, 700) and right <= width for [(w, right)] in shown)
    dark = browser.run("return getComputedStyle(document.body).backgroundColor") != (
        "rgb(251, 251, 250)"
    )
    assert dark == (scheme == "dark")


def test_a_tuning_that_confirmed_nothing_says_so(
    undecided: Tuned, browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_tuning(undecided, path)
    browser.open(path)
    assert browser.console() == []
    text = browser.run("return document.querySelector('#gain').innerText")
    assert "Nothing was confirmed" in text
    assert "of a budget of 2.0 min" in browser.run("return document.body.innerText")
    assert not browser.run("return document.querySelector('#schedule')")


def test_a_trial_whose_server_failed_says_so(
    undecided: Tuned, browser: Browser, tmp_path: Path
) -> None:
    last = undecided.picks[-1].trial_id
    search = replace(undecided.search, skipped={last: "the server did not start"})
    broken = replace(
        undecided,
        search=search,
        picks=tuple(replace(p, regret_bound=None) for p in undecided.picks),
    )
    path = tmp_path / "report.html"
    write_tuning(broken, path)
    browser.open(path)
    browser.open_details()
    text = browser.run("return document.querySelector('#search').innerText")
    assert text.count("gave nothing: the server did not start") == 1
    assert tuning_to_dict(broken)["picks"][-1]["failed"] == "the server did not start"


def test_a_simulated_tuning_says_so_in_every_section(
    tuned: Tuned, browser: Browser, tmp_path: Path
) -> None:
    simulated = replace(tuned, search=replace(tuned.search, predicted=True))
    assert "PREDICTED, not measured" in printed(simulated)
    path = tmp_path / "report.html"
    write_tuning(simulated, path)
    browser.open(path)
    texts = browser.run("return [...document.querySelectorAll('section')].map(s => s.innerText)")
    assert all("predicted" in text.lower() for text in texts)


def test_a_place_that_cannot_be_written_is_one_clear_error(tuned: Tuned) -> None:
    with pytest.raises(StoreError):
        write_tuning(tuned, Path("/proc/none/report.html"))
