from __future__ import annotations

import pytest

from specwise.errors import InputError
from specwise.measurement.design import parse_study
from specwise.prediction.costs import StepShape
from specwise.prediction.truth import ServerTruth, bundled_text, parse_truth

TRUTH = """
schema = 1
[costs]
target_pass_ms = 10
token_us = 50
context_token_ns = 100
draft_pass_ms = 2
draft_token_us = 10
overhead_ms = 1
[[segment]]
name = "json"
match = "as JSON"
[[segment]]
name = "rest"
[[server]]
name = "baseline"
[[server]]
name = "draft"
speculation = { method = "draft_model", k = 3, schedule = [[1, 4, 3], [5, 64, 1]] }
[server.acceptance]
json = 0.9
rest = { "0.0" = [0.6, 0.5, 0.4], "1.0" = 0.2 }
"""


def read(text: str = TRUTH) -> tuple[ServerTruth, ...]:
    return parse_truth(text, name="truth.toml")


def test_acceptance_by_segment_position_and_temperature() -> None:
    baseline, draft = read()
    assert baseline.acceptance_of("json", 0.0) == ()
    assert draft.acceptance_of("json", 0.7) == (0.9, 0.9, 0.9)
    assert draft.acceptance_of("rest", 0.0) == pytest.approx((0.6, 0.5, 0.4))
    assert draft.acceptance_of("rest", 0.5) == pytest.approx((0.4, 0.35, 0.3))
    assert draft.acceptance_of("rest", 1.8) == pytest.approx((0.2, 0.2, 0.2))


def test_prompts_are_told_apart_by_rule_or_by_name() -> None:
    draft = read()[1]
    assert draft.segment_of("Fill it in as JSON.", None).name == "json"
    assert draft.segment_of("Write a poem.", None).name == "rest"
    assert draft.segment_of("Write a poem.", "json").name == "json"
    assert draft.segment_of("Write a poem.", "no such segment").name == "rest"


def test_costs_add_up_to_the_step() -> None:
    baseline, draft = read()
    shape = StepShape(tokens=40, context_tokens=3000, requests=10, k=3)
    alone = 0.010 + 40 * 50e-6 + 3000 * 100e-9 + 0.001
    assert baseline.costs.step_s(shape) == pytest.approx(alone)
    # The first draft pass runs over all 40 tokens, two more over one a request.
    assert draft.costs.step_s(shape) == pytest.approx(alone + 3 * 0.002 + (40 + 20) * 10e-6)
    without = StepShape(tokens=40, context_tokens=3000, requests=10, k=0)
    assert draft.costs.step_s(without) == pytest.approx(alone + 0.002 + 40 * 10e-6)


def test_costs_of_a_checkpoint_on_a_gpu() -> None:
    text = TRUTH[TRUTH.index("[[segment]]") :].replace("k = 3,", 'k = 3, draft = "llama-3.2-1b",')
    table = '[roofline]\ntarget = "llama-3.1-70b"\ngpu = "h100"\ngpus = 4\n'
    baseline, draft = read(table + text)
    shape = StepShape(tokens=4, context_tokens=2000, requests=1, k=3)
    # 141 GB of weights over four GPUs of 3.35 TB/s, at best.
    assert 0.0105 < baseline.costs.step_s(shape) < 0.020
    assert draft.costs.step_s(shape) > baseline.costs.step_s(shape)
    with pytest.raises(InputError, match="both"):
        read(table + TRUTH.replace("schema = 1", ""))


def test_the_bundled_truth_and_study_fit_together() -> None:
    truths = {truth.name: truth for truth in read(bundled_text("truth"))}
    design = parse_study(bundled_text("rehearse"), name="rehearse.toml")
    assert [arm.url for arm in design.arms] == [
        f"http://127.0.0.1:{truths[arm.name].port}" for arm in design.arms
    ]
    draft = design.arms[1].speculation
    assert draft is not None
    assert (draft.method, draft.k) == (truths["draft"].config.method, truths["draft"].k)
    assert {s.name for s in design.segments} == {s.name for s in truths["draft"].segments}


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("target_pass_ms = 10", "target_pass_ms = -1", "costs.target_pass_ms"),
        ('match = "as JSON"', "", "exactly one segment"),
        ('match = "as JSON"', 'match = "("', "no regular expression"),
        ("json = 0.9\n", "", "for every segment"),
        ("json = 0.9", "json = [0.9, 0.8]", "2 positions for k = 3"),
        ('"0.0"', '"cold"', "'cold' is no temperature"),
        ("[[1, 4, 3]", "[[2, 4, 3]", "must start at batch size 1"),
        ('name = "baseline"', 'name = "draft"', "share a name"),
        ("schema = 1", "schema = 2", "reads 1"),
        ("schema = 1", "schem = 1", "schem: "),
        ("schema = 1", "schema = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_explained(before: str, after: str, complaint: str) -> None:
    assert before in TRUTH
    with pytest.raises(InputError, match=r"truth\.toml|schedule") as caught:
        read(TRUTH.replace(before, after))
    assert complaint in str(caught.value)
