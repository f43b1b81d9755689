from __future__ import annotations

from itertools import groupby

import pytest

from specwise.domain import LoadPoint, Loop, Purpose, StudyDesign
from specwise.errors import StudyFileError
from specwise.measurement.design import bundled_study, parse_study
from specwise.measurement.experiments import (
    EXPERIMENTS,
    load_ladder,
    mixed_workload,
    temperature_sweep,
    with_draft_sampling,
)

STUDY = """
name = "s"
{top}
[serve]
model = "m"
[[arm]]
name = "base"
[[arm]]
name = "draft"
speculation = {{ method = "draft_model", k = 3, draft = "d" }}
[[arm]]
name = "lookup"
speculation = {{ method = "ngram", k = 3 }}
[[segment]]
name = "json"
prompts = "a.jsonl"
[[segment]]
name = "prose"
prompts = "b.jsonl"
temperature = 0.8
[[workload]]
name = "mix"
shares = {{ json = 3, prose = 1 }}
[load]
{load}
"""
CLOSED = "concurrency = [4, 16]\nrequests = [12, 40]"


def design(load: str = CLOSED, top: str = "", **changes: str) -> StudyDesign:
    text = STUDY.format(top=top, load=load)
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return parse_study(text, name="study")


def measured(d: StudyDesign) -> set[tuple[str, str, float]]:
    return {(t.arm, t.workload, t.load.value) for t in d.trials if t.purpose is Purpose.MEASURE}


def test_a_sweep_keeps_production_and_varies_only_the_temperature() -> None:
    sweep = temperature_sweep(design(), (0.0, 0.8, 1.0))
    assert sweep.experiment == "temperature"
    assert [(s.name, s.temperature, s.same_prompts_as) for s in sweep.segments] == [
        ("json", 0.0, ""),
        ("json-t0.8", 0.8, "json"),
        ("json-t1", 1.0, "json"),
        ("prose", 0.8, ""),
        ("prose-t0", 0.0, "prose"),
        ("prose-t1", 1.0, "prose"),
    ]
    assert {load.value for load in sweep.loads} == {16}
    names = [*(s.name for s in sweep.segments), "mix"]
    assert measured(sweep) == {(a.name, w, 16) for a in sweep.arms for w in names}
    assert {t.requests for t in sweep.trials} == {40}
    assert {t.repeat for t in sweep.trials} == {0, 1}
    assert sweep.production_workload == "mix"


def test_a_sweep_refuses_a_name_that_the_study_has() -> None:
    with pytest.raises(StudyFileError, match=r"prose-t0"):
        temperature_sweep(
            design(change=('name = "json"', 'name = "prose-t0"'), mix=("json = 3", "prose-t0 = 3"))
        )


@pytest.mark.parametrize(
    ("version", "added"),
    [
        ("0.32.0", ["draft-probabilistic"]),
        ("0.21.0", ["draft-gumbel"]),
        ("0.20.1", []),
        ("dev", []),
        (None, []),
    ],
)
def test_other_draft_sampling_methods_where_the_version_has_them(
    version: str | None, added: list[str]
) -> None:
    sweep = with_draft_sampling(design(), lambda _: version)
    assert [a.name for a in sweep.arms] == ["base", "draft", "lookup", *added]
    for arm in sweep.arms[3:]:
        assert arm.speculation is not None
        assert arm.speculation.options["draft_sample_method"] == arm.name.split("-")[1]
        assert arm.deployment == sweep.arm("draft").deployment
        assert any(t.arm == arm.name for t in sweep.trials)


def test_a_sampling_method_that_the_study_has_already_is_not_added_twice() -> None:
    probabilistic = (
        'draft = "d" }',
        'draft = "d", options = { draft_sample_method = "probabilistic" } }',
    )
    sweep = with_draft_sampling(design(change=probabilistic), lambda _: "0.32.0")
    assert [a.name for a in sweep.arms] == ["base", "draft", "lookup", "draft-greedy"]
    assert with_draft_sampling(sweep, lambda _: "0.32.0").arms == sweep.arms


def test_arms_with_a_url_are_left_alone() -> None:
    urls = parse_study(bundled_study("example"), name="example")
    assert with_draft_sampling(urls, lambda _: "0.32.0").arms == urls.arms


def test_a_ladder_reaches_below_and_past_production() -> None:
    ladder = load_ladder(design())
    assert [load.value for load in ladder.loads] == [4, 16, 32, 64]
    assert {t.load.value: t.requests for t in ladder.trials} == {4: 12, 16: 40, 32: 64, 64: 128}
    assert {t.workload for t in ladder.trials} == {"mix"}
    assert ladder.production_load == LoadPoint(Loop.CLOSED, 16)
    climbed = [load.value for load, _ in groupby(t.load for t in ladder.trials)]
    assert climbed == [4, 16, 32, 64], "all repeats of a load before the next"
    assert {t.repeat for t in ladder.trials} == {0, 1}


def test_a_ladder_from_one_load_and_one_that_is_long_enough() -> None:
    one = load_ladder(design("concurrency = [6]\nrequests = 8"))
    assert [load.value for load in one.loads] == [1, 2, 3, 6, 12, 24]
    own = load_ladder(design("concurrency = [1, 2, 4]\nproduction = 2"))
    assert [load.value for load in own.loads] == [1, 2, 4]


def test_an_open_loop_ladder_keeps_the_arrivals_and_the_length_of_a_trial() -> None:
    load = 'rate_per_s = [2]\nrequests = 40\narrivals = "gamma"\nburstiness = 0.5'
    ladder = load_ladder(design(load))
    assert [load.value for load in ladder.loads] == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert {(load.arrivals, load.burstiness) for load in ladder.loads} == {("gamma", 0.5)}
    assert {t.load.value: t.requests for t in ladder.trials} == {
        0.125: 4, 0.25: 5, 0.5: 10, 1: 20, 2: 40, 4: 80, 8: 160,
    }  # fmt: skip


def test_servers_one_at_a_time_climb_load_by_load_too() -> None:
    ladder = load_ladder(design(change=("[serve]", "[serve]\ntogether = false")))
    climbed = [load.value for load, _ in groupby(t.load for t in ladder.trials)]
    assert climbed == [4, 16, 32, 64]


def test_a_mixed_experiment_is_the_mix_and_each_segment_alone_at_one_load() -> None:
    mixed = mixed_workload(design())
    assert measured(mixed) == {
        (a.name, w, 16) for a in mixed.arms for w in ("mix", "json", "prose")
    }
    assert mixed.production_workload == "mix"
    assert {t.workload for t in mixed.trials if t.purpose is Purpose.NOISE_FLOOR} == {"mix"}


def test_a_mixed_experiment_makes_a_mix_of_the_coolest_and_the_hottest() -> None:
    text = STUDY.format(top="", load=CLOSED + '\nproduction_workload = "json"')
    text = text.replace('[[workload]]\nname = "mix"\nshares = { json = 3, prose = 1 }', "")
    mixed = mixed_workload(parse_study(text, name="study"))
    assert mixed.production_workload == "mixed"
    assert dict(mixed.workload("mixed").shares) == {"json": 0.5, "prose": 0.5}
    one = text.replace('[[segment]]\nname = "prose"\nprompts = "b.jsonl"\ntemperature = 0.8', "")
    with pytest.raises(StudyFileError, match="needs two segments"):
        mixed_workload(parse_study(one, name="study"))


def test_the_study_file_and_the_command_line_name_the_experiment() -> None:
    assert design().experiment == ""
    swept = design(top='experiment = "temperature"\ntemperatures = [0.5]')
    assert [s.name for s in swept.segments] == ["json", "json-t0.5", "prose", "prose-t0.5"]
    text = STUDY.format(top='experiment = "mixed"', load=CLOSED)
    assert parse_study(text, name="s", experiment="ladder").experiment == "ladder"
    with pytest.raises(StudyFileError, match="the experiment is none"):
        design(top="temperatures = [0.5]")
    with pytest.raises(StudyFileError, match="experiment"):
        design(top='experiment = "other"')


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_has_a_ready_study(name: str) -> None:
    assert parse_study(bundled_study(name), name=name).experiment == name
