from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from specwise.facts.bundled import bundled_draft, bundled_target
from specwise.facts.quantise import Scheme, quantised_checkpoint
from specwise.measurement.fleet import resolve_model
from specwise.measurement.provenance import describe_here, describe_model


def test_a_checkpoint_is_told_from_its_quantised_copies(tmp_path: Path) -> None:
    trained = describe_model(bundled_target())
    assert trained["weight_bits"] == 16
    seen = {trained["config_and_headers_sha256"]}
    for scheme, bits in ((Scheme.INT8, 8), (Scheme.INT4, 4)):
        copy = describe_model(quantised_checkpoint(tmp_path, bundled_target(), scheme))
        assert copy["weight_bits"] == bits
        assert copy["weights_bytes"] < trained["weights_bytes"]
        seen.add(copy["config_and_headers_sha256"])
    assert len(seen) == 3


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    assert describe_model(Path("meta-llama/none")) == {}
    folder = tmp_path / "odd"
    shutil.copytree(bundled_draft(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    assert "weight_bits" not in describe_model(folder)
    assert describe_model(folder)["weights_bytes"] > 0


def test_this_machine_is_described() -> None:
    here = describe_here()
    assert here["cores"] >= 1
    assert here["started_at"].endswith("+00:00")
    assert isinstance(here["gpus"], list)


def test_bundled_names_of_quantised_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECWISE_HOME", str(tmp_path))
    folder = Path(resolve_model("bundled:target-unpadded-int4"))
    assert folder.is_relative_to(tmp_path)
    assert describe_model(folder)["weight_bits"] == 4
    assert describe_model(Path(resolve_model("bundled:draft-int8")))["weight_bits"] == 8
