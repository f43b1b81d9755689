from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.reporting import samples
from tests.reporting.browser import chromium

from specwise.analysis.server_figures import GpuFigures
from specwise.decision.assessment import Assessment
from specwise.reporting.html import render_report, write_report
from specwise.reporting.server_section import server_section

GIB = 2**30


def gpu(index: int, busy: float | None = 0.9, used: int | None = 70 * GIB) -> GpuFigures:
    return GpuFigures(index, "NVIDIA H100 80GB HBM3", 80 * GIB, used, busy, 30)


def with_gpus(gpus: dict[str, tuple[GpuFigures, ...]], notes: dict[str, str]) -> Assessment:
    """The sample assessment with GPU figures and notes by arm."""
    assessment = samples.assessment()
    return replace(
        assessment,
        summaries=tuple(
            replace(s, gpus=gpus.get(s.arm, ()), gpu_note=notes.get(s.arm, ""))
            if s.segment is None
            else s
            for s in assessment.summaries
        ),
    )


def rows(assessment: Assessment) -> dict[str, tuple[str, ...]]:
    section = server_section(assessment)
    assert section is not None
    assert section.production is not None
    assert section.production.arms[0] == "baseline"
    return dict(section.production.rows)


def test_the_baseline_stands_beside_the_candidates_and_absent_is_a_dash() -> None:
    found = rows(samples.assessment())
    assert set(found["KV cache use, peak"]) == {"31 %"}
    assert set(found["KV cache use, mean"]) == {"–"}
    assert set(found["Preemptions"]) == {"0"}
    assert set(found["Prefix-cache hits"]) == {"–"}
    assert not any("GPU" in label for label in found)


def test_each_gpu_has_its_memory_and_utilisation() -> None:
    arms = {"baseline": (gpu(0, 0.5, 72 * GIB),), "draft_model": (gpu(0, None, None),)}
    found = rows(with_gpus(arms, {"ngram": "the server is not on this machine"}))
    memory = found["GPU 0 memory, peak of 80.0 GiB (NVIDIA H100 80GB HBM3)"]
    assert memory[:2] == ("72.0", "–")
    assert found["GPU 0 utilisation, mean"][:2] == ("50 %", "–")


def test_gpus_on_which_nothing_ran_are_named_once_and_not_shown() -> None:
    assessment = with_gpus(
        {arm: (gpu(0), gpu(1, 0.0), gpu(2, 0.0)) for arm in ("baseline", "draft_model", "ngram")},
        {},
    )
    section = server_section(assessment)
    assert section is not None
    assert section.gpu_notes == ("Idle throughout, and not shown: GPU 1, 2.",)
    assert [label for label in rows(assessment) if "utilisation" in label] == [
        "GPU 0 utilisation, mean"
    ]


def test_the_reason_for_no_gpu_figures_is_said_by_arm_where_it_differs() -> None:
    everywhere = "no NVIDIA driver on this machine (NVML Shared Library Not Found)"
    arms = [a.name for a in samples.assessment().study.design.arms]
    section = server_section(with_gpus({}, dict.fromkeys(arms, everywhere)))
    assert section is not None
    assert section.gpu_notes == (f"GPU figures not measured: {everywhere}.",)
    section = server_section(with_gpus({"baseline": (gpu(0),)}, dict.fromkeys(arms[1:], "far")))
    assert section is not None
    assert section.gpu_notes == (f"GPU figures not measured for {', '.join(arms[1:])}: far.",)


def test_servers_that_said_nothing_have_no_section() -> None:
    assessment = samples.assessment()
    silent = replace(
        assessment,
        summaries=tuple(
            replace(s, kv_use_max=None, running_mean=None, waiting_max=None, preemptions=None)
            for s in assessment.summaries
        ),
    )
    assert server_section(silent) is None
    assert 'id="server"' not in render_report(silent, Path())


def test_the_section_fits_the_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    figures = {a.name: (gpu(0), gpu(1, 0.31)) for a in samples.assessment().study.design.arms}
    write_report(with_gpus(figures, {}), page)
    with chromium(tmp_path / "profile") as browser:
        for width in (400, 1280):
            browser.open(page, width=width)
            browser.open_details()
            text = browser.run("return document.querySelector('#server').innerText")
            assert "GPU 1 utilisation" in text
            assert "31 %" in text
            root = "document.documentElement"
            overflow = browser.run(f"return {root}.scrollWidth - {root}.clientWidth")
            assert overflow <= 0, width
            assert browser.console() == []
