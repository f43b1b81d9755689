from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tests.analysis.synthetic import demo_study
from tests.cli.study_folders import write_study

from specwise.cli.main import specwise
from specwise.errors import InputError


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study", demo_study())


def test_alerts_prints_rules_with_the_studys_thresholds(study: Path) -> None:
    done = CliRunner().invoke(
        specwise, ["alerts", str(study), "--arm", "ngram", "--selector", 'job="a"', "--tap"]
    )
    assert done.exit_code == 0, done.output
    groups = yaml.safe_load(done.output)["groups"]
    assert [g["name"] for g in groups][:2] == ["specwise-recording", "specwise"]
    assert 'job="a"' in groups[0]["rules"][0]["expr"]
    as_json = CliRunner().invoke(specwise, ["alerts", str(study), "--arm", "ngram", "--json"])
    assert json.loads(as_json.output)["groups"][0] != groups[0]  # no selector there


def test_dashboard_prints_a_model_to_import(study: Path) -> None:
    done = CliRunner().invoke(specwise, ["dashboard", str(study), "--arm", "draft_model"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["title"] == "Speculation: synthetic"


def test_an_arm_that_is_none_is_one_clear_error(study: Path) -> None:
    done = CliRunner().invoke(specwise, ["alerts", str(study), "--arm", "other"])
    assert isinstance(done.exception, InputError)
