"""What an engineer reads in ten seconds, in wide and narrow terminals, pipes and plain ASCII."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.reporting import samples

from specwise.decision.assessment import Assessment
from specwise.reporting.console import print_assessment

REPORT = Path("/studies/a folder with a long name/mixed-assistant-20260301-100000/report.html")


def printed(
    assessment: Assessment, *, width: int = 80, encoding: str = "utf-8", colour: bool = False
) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_assessment(
        assessment, Console(file=stream, width=width, force_terminal=colour), report=REPORT
    )
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_verdict_first_then_why_then_segments_then_table_then_next() -> None:
    text = printed(samples.assessment())
    assert text.split("\n")[1] == "▼ LEAVE IT OFF   mix, 16 concurrent clients"
    places = [
        text.index(part)
        for part in (
            "Leave speculation off for mix at 16 clients",
            "no gain that this study can see",
            "▼ mix › prose  Leave it off",
            "! Of 3,744 requests 14 failed",
            "Speedup over the baseline",
            "Schedule",
            "Next     Serve json alone",
            str(REPORT),
        )
    ]
    assert places == sorted(places)


def test_each_effect_has_its_interval_and_its_mark() -> None:
    text = printed(samples.assessment(), width=120)
    row = next(line for line in text.split("\n") if line.startswith("  mix › prose  draft_model"))
    assert row.split()[3:] == [
        "draft_model", "15", "%",
        "▲", "1.14x", "[1.06,", "1.22]",
        "▼", "0.93x", "[0.87,", "1.00]",
        "▼", "0.76x", "[0.71,", "0.82]",
    ]  # fmt: skip
    assert "▲ better  ▼ worse  ○ undecided" in text


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_no_line_but_the_path_is_wider_than_the_terminal(width: int) -> None:
    for build in (samples.assessment, samples.crowded):
        lines = printed(build(), width=width).rstrip("\n").split("\n")
        assert max(cell_len(line) for line in lines[:-1]) <= width
        assert lines[-1].endswith(str(REPORT))  # whole, so that it can be copied


def test_production_and_the_smallest_load_survive_eighty_columns() -> None:
    header = next(line for line in printed(samples.assessment()).split("\n") if "Acc." in line)
    assert header.split() == ["Requests", "Arm", "Acc.", "c1", "c16", "*"]
    assert "the rest is" in printed(samples.assessment())


def test_a_pipe_has_no_colour_codes_and_a_terminal_has() -> None:
    assert "\x1b" not in printed(samples.assessment())
    assert "\x1b[" in printed(samples.assessment(), colour=True)


def test_ascii_is_enough() -> None:
    text = printed(samples.assessment(), encoding="ascii")
    assert "- LEAVE IT OFF" in text
    assert "+ 1.31x [1.22, 1.40]" in text
    assert "+ better  - worse  ~ undecided" in text
    assert "?" not in text


def test_a_prediction_and_a_limited_client_are_said_loudly() -> None:
    text = printed(samples.crowded(), width=100)
    assert "PREDICTED, not measured" in text.split("\n")[1]
    assert "! The load generator limited this measurement" in text
    assert "estimate from tokens per chunk" in text
    assert "predicted" not in printed(samples.assessment()).lower()


def test_a_value_that_could_not_be_computed_is_a_dash_not_nan() -> None:
    assert "nan" not in printed(samples.crowded(), width=160).lower()


def test_nothing_measured_still_says_what_to_do() -> None:
    text = printed(samples.measure_more(samples.assessment()))
    assert text.split("\n")[1].startswith("○ MEASURE MORE")
    assert "Next     Serve json alone" in text
    assert "Speedup" not in text


def test_names_are_never_read_as_markup() -> None:
    assert "<b>5 & 6</b>" in printed(samples.crowded(), width=200)
    assert "[0.71, 0.82]" in printed(samples.assessment())
