from __future__ import annotations

from pathlib import Path

from tests.cli.test_main import run

from specwise.measurement.design import parse_study
from specwise.prediction.truth import parse_truth


def test_example_and_study_can_be_used_as_they_are() -> None:
    truth, study = run("twin", "--example"), run("twin", "--study")
    assert truth.returncode == study.returncode == 0
    names = [server.name for server in parse_truth(truth.stdout, name="example")]
    assert names == [arm.name for arm in parse_study(study.stdout, name="study").arms]


def test_without_a_usable_file_it_says_what_to_do(tmp_path: Path) -> None:
    missing, none = run("twin", "no-such.toml", folder=tmp_path), run("twin")
    assert missing.returncode == none.returncode == 2
    assert "--example" in missing.stderr
    assert "--example" in none.stderr


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    text = run("twin", "--example").stdout.replace("8301", "8300")
    (tmp_path / "same.toml").write_text(text)
    done = run("twin", "same.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "share a name or a port" in done.stderr
