"""The generated rules in a real Prometheus that scrapes real vLLM servers."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.monitoring.prometheus import binary
from tests.monitoring.test_alerts import EXPECTED

from specwise.facts.bundled import bundled_prompts
from specwise.monitoring.alerts import alert_rules
from specwise.vllm.server import Server


def _hurried(rules: str) -> str:
    """The same rules without the waiting: what fires is not changed, only when."""
    groups = yaml.safe_load(rules)
    for group in groups["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "0s"
    return yaml.safe_dump(groups)


@contextmanager
def _prometheus(folder: Path, *servers: Server) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    targets = [server.url.removeprefix("http://") for server in servers]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def _alerts(url: str) -> dict[str, set[str]]:
    """Firing alerts, each with the instances it fires for."""
    try:
        answer = httpx.get(f"{url}/api/v1/alerts", trust_env=False).json()
    except (httpx.TransportError, ValueError):
        return {}  # still starting
    found: dict[str, set[str]] = {}
    for alert in answer["data"]["alerts"]:
        if alert["state"] == "firing":
            labels = alert["labels"]
            found.setdefault(labels["alertname"], set()).add(labels.get("instance", ""))
    return found


def _query(url: str, expression: str) -> list[Any]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}, trust_env=False)
    result: list[Any] = answer.json()["data"]["result"]
    return result


def test_alerts_fire_for_the_server_that_earned_them(
    baseline_server: Server, drafting_server: Server, tmp_path: Path
) -> None:
    """The study expected 76 % acceptance; prose at T=1 accepts far less, and one server drafts
    nothing at all."""
    rules = alert_rules(EXPECTED, selector='job="vllm"')
    (tmp_path / "rules.yml").write_text(_hurried(rules))
    plain, drafting = (
        server.url.removeprefix("http://") for server in (baseline_server, drafting_server)
    )
    lines = bundled_prompts("prose").read_text().splitlines()
    with (
        _prometheus(tmp_path, baseline_server, drafting_server) as url,
        httpx.Client(trust_env=False, timeout=60) as client,
    ):
        deadline = time.monotonic() + 60
        wanted = {"SpeculationAcceptanceLow", "SpeculationAcceptanceDrift", "SpeculationNotRunning"}
        number = 0
        while not wanted <= _alerts(url).keys():
            assert time.monotonic() < deadline, (tmp_path / "prometheus.log").read_text()[-2000:]
            for server in (baseline_server, drafting_server):
                body = {
                    "model": server.model,
                    "messages": json.loads(lines[number])["messages"],
                    "temperature": 1.0,
                    "max_tokens": 60,
                }
                client.post(f"{server.url}/v1/chat/completions", json=body).raise_for_status()
            number += 1
        found = _alerts(url)
        assert found["SpeculationAcceptanceLow"] == {drafting}
        assert found["SpeculationNotRunning"] == {plain}
        assert "SpeculationServersGone" not in found
        for figure in ("acceptance_length:rate5m", "tpot_s:mean5m", "ttft_s:mean5m", "kv_use:max"):
            assert _query(url, f"specwise:{figure}"), f"{figure} finds nothing in a real vLLM"
