from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specwise.domain import LoadPoint, Loop, Purpose
from specwise.errors import SpecwiseError, StudyFileError
from specwise.measurement.design import bundled_study, parse_study, read_study_file

MINIMAL = """
name = "s"
[[arm]]
name = "base"
url = "http://127.0.0.1:1"
[[arm]]
name = "spec"
url = "http://127.0.0.1:2/v1/"
speculation = { method = "ngram", k = 3 }
[[segment]]
name = "a"
prompts = "a.jsonl"
[[segment]]
name = "b"
prompts = "b.jsonl"
[load]
concurrency = [4, 1]
requests = [40, 10]
production_workload = "a"
"""


def test_the_example_is_a_valid_study() -> None:
    design = parse_study(bundled_study("example"), name="example")
    assert [arm.name for arm in design.arms] == ["baseline", "draft"]
    assert design.production_workload == "mix"


def test_defaults_and_normalisation() -> None:
    design = parse_study(MINIMAL, name="minimal")
    assert design.arms[1].url == "http://127.0.0.1:2"
    assert [load.value for load in design.loads] == [1, 4]
    assert design.production_load == LoadPoint(Loop.CLOSED, 4)
    assert {t.load.value: t.requests for t in design.trials} == {1: 10, 4: 40}


def test_arms_alternate_so_that_drift_cancels() -> None:
    design = parse_study(MINIMAL, name="minimal")
    measured = [t for t in design.trials if t.purpose is Purpose.MEASURE]
    blocks = [
        [t.arm for t in block]
        for _, block in groupby(measured, key=lambda t: (t.repeat, t.workload, t.load))
    ]
    assert all(sorted(block) == ["base", "spec"] for block in blocks)
    assert Counter(block[0] for block in blocks) == {"base": 4, "spec": 4}
    first = {(t.workload, t.load, t.repeat): None for t in measured}
    for workload, load, _ in list(first):
        orders = [
            [t.arm for t in measured if (t.workload, t.load, t.repeat) == (workload, load, r)]
            for r in (0, 1)
        ]
        assert orders[0] == orders[1][::-1]


def test_the_noise_floor_repeats_the_baseline_once_per_load_away_from_its_twin() -> None:
    design = parse_study(MINIMAL, name="minimal")
    again = [t for t in design.trials if t.purpose is Purpose.NOISE_FLOOR]
    assert [t.arm for t in again] == ["base", "base"]
    assert {t.load.value for t in again} == {1, 4}
    for trial in again:
        block = [
            t
            for t in design.trials
            if (t.workload, t.load, t.repeat) == (trial.workload, trial.load, trial.repeat)
        ]
        assert {block[0].arm, block[-1].arm} == {"base"}


def test_servers_that_exclude_each_other_run_arm_by_arm() -> None:
    text = MINIMAL + "[serve]\ntogether = false\n"
    trials = parse_study(text, name="x").trials
    switches = [arm for arm, _ in groupby(t.arm for t in trials)]
    assert switches == ["base", "spec", "base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("concurrency = [4, 1]", "concurrency = []"), "either concurrency"),
        (("concurrency", "concurency"), "unknown key load.concurency"),
        (("k = 3", "k = 0"), "arm.1.speculation.k"),
        (('method = "ngram", ', ""), "arm.1.speculation.method is missing"),
        (('name = "spec"', 'name = "base"'), "two arms named 'base'"),
        (("speculation =", "# "), "it has 2 without and 0 with"),
        (("requests = [40, 10]", "requests = [40]"), "1 entries for 2 load points"),
        (("requests = [40, 10]", "production = 9"), "not among the load points"),
        (('name = "s"', "name = "), "not valid TOML"),
        (('production_workload = "a"', ""), "which workload is production's"),
        (('production_workload = "a"', 'production_workload = "c"'), "'c' is neither a segment"),
        (('name = "s"', 'name = "s"\nschema = 9'), "schema = 9"),
        (('prompts = "a.jsonl"', 'prompts = "a.jsonl"\ntemperature = 3'), "segment.0.temperature"),
        (('url = "http://127.0.0.1:1"', ""), "neither a url nor a model"),
        (('url = "http://127.0.0.1:1"', 'url = "ftp://x"'), "must start with http"),
        (
            ('url = "http://127.0.0.1:1"', 'model = "m"\narguments = ["--api-key=abc"]'),
            "has an API key among its arguments",
        ),
        (
            ('url = "http://127.0.0.1:1"', 'model = "m"\nenvironment = { HF_TOKEN = "abc" }'),
            "HF_TOKEN looks like a secret",
        ),
    ],
)
def test_a_wrong_study_file_names_the_key(change: tuple[str, str], message: str) -> None:
    text = MINIMAL.replace(*change, 1)
    assert text != MINIMAL
    with pytest.raises(StudyFileError, match=message) as caught:
        parse_study(text, name="wrong.toml")
    assert "abc" not in str(caught.value)


def test_a_missing_study_file(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match="does not exist"):
        read_study_file(tmp_path / "none.toml")


@settings(max_examples=60)
@given(st.text(max_size=200))
def test_no_text_makes_it_crash(text: str) -> None:
    with pytest.raises(SpecwiseError):
        parse_study(text, name="fuzz")
