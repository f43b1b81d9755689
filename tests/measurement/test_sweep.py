from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from specwise.domain import Deployment, Purpose, Speculation, StudyDesign, TuneSettings
from specwise.errors import StudyFileError
from specwise.measurement.design import bundled_study, parse_study
from specwise.measurement.sweep import families, family_of, follows_schedules

STUDY = """
name = "s"
[serve]
model = "m"
{serve}
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
shares = {{ json = 1, prose = 1 }}
[load]
concurrency = [1, 8]
requests = [4, 16]
[tune]
{tune}
"""


def sweep(
    tune: str = "k = [1, 2, 4]",
    version: str | None = "0.20.0",
    serve: str = "",
    change: tuple[str, str] = ("", ""),
) -> StudyDesign:
    text = STUDY.format(tune=tune, serve=serve)
    assert change[0] in text
    text = text.replace(*change) if change[0] else text
    return parse_study(text, name="s", experiment="tune", version_of=lambda _: version)


def arms(design: StudyDesign) -> list[str]:
    return [arm.name for arm in design.arms]


def test_every_way_to_speculate_becomes_an_arm_for_each_draft_length() -> None:
    design = sweep("k = [4, 1, 2, 2]")
    assert design.experiment == "tune"
    assert arms(design) == [
        "base", "draft-k1", "draft-k2", "draft-k4", "lookup-k1", "lookup-k2", "lookup-k4",
    ]  # fmt: skip
    assert design.arm("draft-k4").speculation == Speculation("draft_model", 4, "d")
    assert design.arm("lookup-k1").deployment == design.arm("base").deployment


def test_the_defaults_are_one_to_eight_both_samplings_and_an_idle_arm_each() -> None:
    design = sweep("", "0.32.0")
    one_to_eight = [f"k{k}" for k in range(1, 9)]
    assert families(design) == {
        family: tuple(f"{family}-{k}" for k in [*one_to_eight, "idle"])
        for family in ("draft", "draft-probabilistic", "lookup")
    }
    assert all(family_of(arm) == f for f, names in families(design).items() for arm in names)
    idle = design.arm("draft-probabilistic-idle").speculation
    assert idle is not None
    assert (idle.k, idle.schedule) == (8, ((1, 1024, 0),))
    assert idle.options == {"draft_sample_method": "probabilistic"}
    assert design.tune == TuneSettings(tolerance=0.02, budget_s=None)


def test_every_arm_runs_in_every_cell_and_the_baseline_once_more_at_each_load() -> None:
    design = sweep("k = [2]\nrepeats = 3\ntolerance = 0.05\nbudget_minutes = 1.5")
    cells = Counter((t.arm, t.workload, t.load.value, t.purpose) for t in design.trials)
    expected = {
        (arm, workload, load, Purpose.MEASURE): 3
        for arm in ("base", "draft-k2", "lookup-k2")
        for workload in ("json", "prose", "mix")
        for load in (1.0, 8.0)
    }
    again = {("base", "mix", load, Purpose.NOISE_FLOOR): 1 for load in (1.0, 8.0)}
    assert cells == expected | again
    assert {t.load.value: t.requests for t in design.trials} == {1: 4, 8: 16}
    assert design.tune == TuneSettings(tolerance=0.05, budget_s=90.0)
    served = [arm for arm, _ in groupby(t.arm for t in design.trials)]
    assert len(served) <= 3 * 3, "the whole sweep starts each server once a repeat"


@pytest.mark.parametrize(
    ("tune", "version", "expected"),
    [
        ("", "0.20.0", ["draft", "lookup"]),
        ("", "dev", ["draft", "lookup"]),
        ("", None, ["draft", "lookup"]),
        ("", "0.21.0", ["draft", "draft-gumbel", "lookup"]),
        ("", "0.32.0", ["draft", "draft-probabilistic", "lookup"]),
        ('draft_sampling = ["greedy"]', "0.32.0", ["draft", "lookup"]),
        ('draft_sampling = ["greedy"]', "0.20.0", ["draft", "lookup"]),
        ('draft_sampling = ["probabilistic"]', "0.32.0", ["draft-probabilistic", "lookup"]),
    ],
)
def test_ways_to_sample_drafts(tune: str, version: str | None, expected: list[str]) -> None:
    assert list(families(sweep(f"k = [2]\n{tune}", version))) == expected


@pytest.mark.parametrize("version", ["0.20.0", None])
def test_a_way_to_sample_drafts_that_is_not_to_be_had(version: str | None) -> None:
    with pytest.raises(StudyFileError, match=r"'draft' on vLLM .* can only be greedy"):
        sweep('draft_sampling = ["probabilistic"]', version)


def test_arms_of_the_file_that_differ_in_draft_length_only_are_one_family() -> None:
    design = sweep(change=('method = "ngram", k = 3', 'method = "draft_model", k = 5, draft = "d"'))
    assert list(families(design)) == ["draft"]
    assert arms(design) == ["base", "draft-k1", "draft-k2", "draft-k4"]
    other = sweep(change=('method = "ngram", k = 3', 'method = "draft_model", k = 3, draft = "e"'))
    assert list(families(other)) == ["draft", "lookup"]


@pytest.mark.parametrize(
    ("method", "arguments", "version", "follows"),
    [
        ("draft_model", (), "0.24.0", True),
        ("ngram", (), "0.32.0", True),
        ("ngram", (), None, True),
        ("ngram", (), "dev", True),
        ("ngram", (), "0.23.9", False),
        ("suffix", (), "0.32.0", False),
        ("ngram", ("--data-parallel-size", "2"), "0.32.0", False),
        ("ngram", ("--data-parallel-size=2",), "0.32.0", False),
        ("ngram", ("--data_parallel_size=2",), "0.32.0", False),
        ("ngram", ("-dp", "4"), "0.32.0", False),
        ("ngram", ("--data-parallel-size", "1", "--seed", "2"), "0.32.0", True),
    ],
)
def test_an_idle_arm_only_where_vllm_follows_a_schedule(
    method: str, arguments: tuple[str, ...], version: str | None, follows: bool
) -> None:
    deployment = Deployment("m", arguments=arguments)
    assert follows_schedules(Speculation(method, 3), deployment, version) is follows


def test_idle_arms_can_be_left_out() -> None:
    serve = 'arguments = ["--data-parallel-size", "2"]'
    for design in (sweep("idle = false", "0.32.0"), sweep("", "0.32.0", serve)):
        assert not [arm for arm in design.arms if arm.speculation and arm.speculation.schedule]
        assert all(names[-1].endswith("-k8") for names in families(design).values())


def test_each_engine_is_asked_for_its_version_once() -> None:
    asked: list[str] = []

    def version_of(deployment: Deployment) -> str:
        asked.append(deployment.engine)
        return "0.32.0"

    text = STUDY.format(tune="", serve="")
    parse_study(text, name="s", experiment="tune", version_of=version_of)
    assert asked == ["embedded"]


def test_servers_by_url_cannot_be_tuned() -> None:
    text = bundled_study("example")
    with pytest.raises(StudyFileError, match="'baseline' has a url; a tuning restarts"):
        parse_study(text, name="example", experiment="tune")


@pytest.mark.parametrize(
    ("tune", "change", "message"),
    [
        ("", ("k = 3, draft", "k = 3, schedule = [[1, 9, 3]], draft"), "'draft' has a schedule"),
        ("k = [2]", ('name = "base"', 'name = "draft-k2"'), "two arms 'draft-k2'"),
        ("k = []", ("", ""), r"tune\.k"),
        ("k = [0]", ("", ""), r"tune\.k\.0"),
        ('draft_sampling = ["warm"]', ("", ""), r"tune\.draft_sampling\.0"),
        ("tolerance = 0", ("", ""), r"tune\.tolerance"),
        ("budget_minutes = -1", ("", ""), r"tune\.budget_minutes"),
        ("budget = 1", ("", ""), r"unknown key tune\.budget"),
        ("", ('name = "s"', 'name = "s"\ntemperatures = [1]'), "the experiment is tune"),
    ],
)
def test_what_cannot_be_swept_is_named(tune: str, change: tuple[str, str], message: str) -> None:
    with pytest.raises(StudyFileError, match=message):
        sweep(tune, change=change)


def test_the_table_changes_nothing_of_a_study_that_is_not_a_tuning() -> None:
    design = parse_study(STUDY.format(tune="k = [2]", serve=""), name="s")
    assert arms(design) == ["base", "draft", "lookup"]
    assert design.tune is None
