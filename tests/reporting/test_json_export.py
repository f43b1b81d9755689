"""The assessment as JSON: everything, stable keys, no NaN, no secret, no text of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.reporting import samples

from specwise.domain import Deployment
from specwise.errors import StoreError
from specwise.reporting.json_export import assessment_to_dict, without_secrets, write_json


def test_top_level_keys_are_a_promise() -> None:
    found = assessment_to_dict(samples.assessment())
    assert list(found) == [
        "schema_version", "predicted", "provenance", "design", "verdict", "conditions", "effects",
        "noise_floors", "signatures", "crossovers", "summaries", "acceptance",
        "experiment", "warnings", "trials",
    ]  # fmt: skip
    assert found["schema_version"] == 1
    assert found["verdict"]["decision"] == "off"
    assert found["verdict"]["segments"][1]["decision"] == "off"
    assert found["conditions"][0]["threshold"] == "at least 0.5"
    assert found["effects"][0]["load"] == {
        "loop": "closed", "value": 1.0, "arrivals": "", "burstiness": 1.0, "trace": "",
        "label": "c1",
    }  # fmt: skip
    assert found["effects"][0]["direction"] == "better"
    assert len(found["trials"]) == 75
    assert found["trials"][0]["recorded"] == 48
    assert found["design"]["production_workload"] == "mix"


@pytest.mark.parametrize("kind", ["conditions", "effects", "crossovers", "summaries", "trials"])
def test_objects_of_a_kind_have_the_same_keys(kind: str) -> None:
    for build in (samples.assessment, samples.crowded):
        objects = assessment_to_dict(build())[kind]
        assert len(objects) > 1
        assert len({tuple(each) for each in objects}) == 1


def numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    else:
        yield value


def test_it_is_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    assessment = samples.crowded()
    write_json(assessment, tmp_path / "assessment.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "assessment.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert found == assessment_to_dict(assessment)
    assert found["effects"][0]["ratio"] is None
    assert all(isinstance(v, str | int | float | bool | None) for v in numbers(found))
    assert found["predicted"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["assessment.json"]


def test_no_output_text_and_no_secret() -> None:
    assessment = samples.crowded()
    secret = "sk-very-secret"
    deployment = Deployment(
        "/models/target",
        arguments=("--api-key", secret, f"--hf-token={secret}", "--max-model-len", "2048"),
        environment={"HF_TOKEN": secret},
    )
    arms = (
        replace(assessment.study.design.arms[0], deployment=deployment),
        replace(
            assessment.study.design.arms[1],
            deployment=None,
            url=f"https://user:{secret}@host:8000/v1",
        ),
        *assessment.study.design.arms[2:],
    )
    study = replace(
        assessment.study,
        design=replace(assessment.study.design, arms=arms),
        provenance={"command": f"vllm serve m --api-key {secret} --port 8000"},
    )
    found = assessment_to_dict(replace(assessment, study=study))
    text = json.dumps(found)
    assert secret not in text
    assert "THE MODEL SAID THIS" not in text
    assert found["provenance"]["command"] == "vllm serve m --api-key *** --port 8000"
    assert found["design"]["arms"][0]["deployment"]["environment"] == ["HF_TOKEN"]
    assert found["design"]["arms"][0]["deployment"]["arguments"][-2:] == ["--max-model-len", "2048"]
    assert found["design"]["arms"][1]["url"] == "https://host:8000/v1"


def test_what_is_no_secret_stays() -> None:
    kept = {"note": "mail a@b.c about it", "url": "http://127.0.0.1:8000", "k": [1, None, "--k"]}
    assert without_secrets(kept) == kept


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written: No such file or directory"):
        write_json(samples.measure_more(samples.assessment()), tmp_path / "no" / "a.json")
