"""Segments and temperature buckets: from a header, from rules, bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specwise.errors import InputError
from specwise.monitoring.tap_requests import (
    RequestFacts,
    Segments,
    request_facts,
    temperature_bucket,
)

PATH = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("temperature", "bucket"),
    [
        (None, "default"),
        (0, "0"),
        (0.01, "0-0.5"),
        (0.5, "0-0.5"),
        (0.51, "0.5-0.7"),
        (0.7, "0.5-0.7"),
        (1.0, "0.7-1"),
        (1.01, "1+"),
        (2.0, "1+"),
    ],
)
def test_a_bucket_holds_its_upper_bound(temperature: float | None, bucket: str) -> None:
    assert temperature_bucket(temperature) == bucket


def test_facts_hold_no_text() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "secret words"}],
        "temperature": 0.4,
        "max_completion_tokens": 50,
        "max_tokens": 99,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "secret"}},
        "user": "secret person",
    }
    facts = request_facts(PATH, json.dumps(body).encode())
    assert facts == RequestFacts(PATH, True, "m", True, 0.4, 50, "json_schema")
    assert "secret" not in repr(facts)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b'{"temperature": 1e999}']
)
def test_a_body_that_is_no_json_object_is_unread_and_not_a_crash(body: bytes) -> None:
    facts = request_facts(PATH, body)
    assert not facts.read
    assert facts.bucket == "unread"


def test_wrong_types_are_left_for_the_server_to_refuse() -> None:
    facts = request_facts(PATH, b'{"temperature": "hot", "max_tokens": [], "stream": 1}')
    assert (facts.temperature, facts.max_tokens, facts.stream) == (None, None, False)


def test_the_header_goes_before_the_rules_and_the_first_rule_wins(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[[rule]]\nsegment = "json"\nresponse_format = "json_schema"\n'
        '[[rule]]\nsegment = "short"\ntemperature = [0, 0.5]\nmax_tokens = [1, 100]\n'
        f'[[rule]]\nsegment = "chat"\npath = "{PATH}"\nmodel = "m"\n'
    )
    segments = Segments(header="X-Segment", rules=rules)
    short = RequestFacts(PATH, True, "m", True, 0.2, 100)
    assert segments.name(short, b" mine ") == "mine"
    assert segments.name(short, None) == "short"
    assert (
        segments.name(RequestFacts(PATH, True, "m", response_format="json_schema"), b"") == "json"
    )
    assert segments.name(RequestFacts(PATH, True, "m", temperature=0.9), None) == "chat"
    assert segments.name(RequestFacts(PATH, True, "other"), None) == "default"


def test_names_are_bounded_in_number_and_form() -> None:
    segments = Segments(header="x-segment")
    facts = RequestFacts(PATH)
    names = {segments.name(facts, f"user-{i}".encode()) for i in range(1000)}
    assert len(names) == 51
    assert "other" in names
    fresh = Segments(header="x-segment")
    assert fresh.name(facts, b"a\x00b\xff" + b"c" * 200) == "ab\ufffd" + "c" * 61


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[rule]]\nsegment = 'a'\ntop_p = 1\n", "top_p"),
        ("[[rule]]\nmodel = 'a'\n", "segment"),
        ("rule = ", "TOML"),
        ("", "rule"),
    ],
)
def test_a_wrong_rules_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(text)
    with pytest.raises(InputError, match=says):
        Segments(rules=rules)
