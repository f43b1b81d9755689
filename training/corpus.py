"""The text behind the bundled pair: CPython's own source tarball and records made by a grammar.

Everything here is a pure function of the tarball and a seed. Four segments:

- ``json``  fill a record from facts (grammar, four kinds of record);
- ``copy``  echo a text, or echo it with one word replaced;
- ``code``  continue a module of the standard library;
- ``prose`` continue a page of the Python documentation.

Held-out text never reaches the training stream: files by a hash of their path, grammar records
by a hash of the prompt. Both rules can be checked from a shipped prompt alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEGMENTS = ("json", "copy", "code", "prose")
TARBALL_SHA256 = "2411c74bda5bbcfcddaf4531f66d1adc73f247f529aee981b029513aefdbf849"

CODE_ASK = "Continue this Python module:\n\n"
PROSE_ASK = "Continue this documentation:\n\n"
ECHO_ASK = "Repeat this text exactly:\n\n"

_DOC_FOLDERS = ("library", "howto", "tutorial", "reference", "c-api", "faq", "using", "extending")
_LIB_SKIPPED = ("test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo")
# Files that carry a licence of their own beside CPython's stay out, whatever that licence says.
_OWN_LICENCE = re.compile(
    r"permission (is hereby granted|to use|to copy)|redistribution and use|licensed (to|under)"
    r"|all rights reserved|gnu general",
    re.IGNORECASE,
)
# Doc/license.rst names these as incorporated software although the files do not all say so.
_INCORPORATED = re.compile(
    r"^(Lib/(asyncio/|xmlrpc/|http/cookies|asyncore|asynchat|trace\.py|uu\.py))|^Doc/license"
)


def is_held_out(name: str) -> bool:
    """Whether a file path or a grammar prompt belongs to the held-out sixteenth."""
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


@dataclass(frozen=True)
class Exchange:
    """One user message and the answer to it; ``source`` is a file path or ``grammar``."""

    segment: str
    user: str
    assistant: str
    source: str


def read_tarball(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The ``code`` and ``prose`` texts of CPython 3.11.2's source tarball, by path.

    Raises ValueError when the file is not exactly that tarball: another one gives another pair.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}; need Python-3.11.2.tgz, {TARBALL_SHA256}")
    code: dict[str, str] = {}
    prose: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if not member.isfile() or _INCORPORATED.match(name):
                continue
            parts = name.split("/")
            is_code = parts[0] == "Lib" and name.endswith(".py") and not {*parts} & {*_LIB_SKIPPED}
            is_prose = parts[0] == "Doc" and name.endswith(".rst") and parts[1] in _DOC_FOLDERS
            if not (is_code or is_prose):
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            text = stream.read().decode("utf-8", errors="ignore")
            if len(text) < 1500 or _OWN_LICENCE.search(text):
                continue
            (code if is_code else prose)[name] = text
    return dict(sorted(code.items())), dict(sorted(prose.items()))


# --- json: a record from stated facts -------------------------------------------------------


def _words(text: str) -> list[str]:
    """The values of a list written as one string, parted by bars where they hold spaces."""
    return text.split("|" if "|" in text else None)


_FIRST = _words(
    "Mara Jonas Priya Tomas Elena Kofi Ingrid Mateo Yuki Amara Felix Nadia Oscar Leila Hugo "
    "Sofia Ravi Clara Emil Zainab Peter Lucia Anton Farah Simon Greta Omar Helen "
    "Viktor Rosa Daniel Aiko"
)
_LAST = _words(
    "Lindqvist Okafor Brandt Moreau Tanaka Silva Novak Haddad Jensen Rossi Kumar Weber Castro "
    "Ivanov Mensah Larsen Dubois Keller Santos Fischer Ortega Nilsson Baker Costa Meyer Park "
    "Reyes Singh Vogel Walker Young Zimmer"
)
_CITY = _words(
    "Lisbon Hamburg Oslo Nairobi Kyoto Lima Toronto Prague Dublin Porto Accra Geneva Austin "
    "Turin Bergen Leeds Seville Chennai Quito Tartu"
)
_ITEM = _words(
    "desk lamp|office chair|water bottle|notebook|keyboard|monitor stand|paper tray|wall clock|"
    "coffee grinder|travel mug|bicycle pump|garden hose|camping stove|phone charger|tool box|"
    "reading light|shoe rack|picture frame|door handle|storage box"
)
_SERVICE = _words("billing search checkout login reports uploads webhooks inventory mail payments")
_SYMPTOM = _words(
    "requests time out|the queue keeps growing|users see an error page|latency has doubled|"
    "the disk is full|certificates have expired|memory use keeps rising|jobs are stuck|"
    "logins are refused|messages arrive twice|pages load without images|the backup failed"
)
_ROOM = _words("kitchen cellar workshop greenhouse archive lobby attic garage laboratory library")
_LANGUAGE = _words("English German French Spanish Italian Japanese Portuguese Norwegian")
_ROLE = _words(
    "data engineer|product manager|support agent|designer|accountant|site manager|analyst|"
    "researcher|team lead|technician"
)


def _date(rng: random.Random) -> str:
    return f"20{rng.randint(21, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _yes(rng: random.Random) -> tuple[str, bool]:
    value = rng.random() < 0.5
    return ("yes" if value else "no"), value


Fact = tuple[str, str, str, object]
"""Label in the prompt, wording there, key in the record, value there."""


def _same(label: str, value: str | int | float) -> Fact:
    return label, str(value), label.replace(" ", "_"), value


def _order(rng: random.Random) -> list[Fact]:
    express, is_express = _yes(rng)
    return [
        _same("customer", f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"),
        _same("city", rng.choice(_CITY)),
        _same("item", rng.choice(_ITEM)),
        _same("quantity", rng.randint(1, 12)),
        _same("unit price", rng.randint(10, 199) / 2),
        _same("currency", rng.choice(["EUR", "USD", "GBP", "JPY"])),
        ("express", express, "express_delivery", is_express),
        _same("order date", _date(rng)),
    ]


def _ticket(rng: random.Random) -> list[Fact]:
    page, is_paged = _yes(rng)
    return [
        _same("service", rng.choice(_SERVICE)),
        _same("severity", rng.choice(["low", "medium", "high", "critical"])),
        _same("symptom", rng.choice(_SYMPTOM)),
        _same("region", rng.choice(["eu-west", "eu-north", "us-east", "us-west", "ap-south"])),
        _same("reported by", f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"),
        _same("opened on", _date(rng)),
        ("page on call", page, "page_on_call", is_paged),
        _same("affected users", rng.randint(1, 99) * 10),
    ]


def _sensor(rng: random.Random) -> list[Fact]:
    ok, is_ok = _yes(rng)
    return [
        _same("room", rng.choice(_ROOM)),
        _same("building", rng.choice(_CITY)),
        _same("temperature", rng.randint(20, 70) / 2),
        _same("humidity", rng.randint(20, 90)),
        _same("battery", rng.randint(1, 20) * 5),
        _same("status", rng.choice(["normal", "warning", "alarm", "offline"])),
        ("calibrated", ok, "is_calibrated", is_ok),
        _same("measured on", _date(rng)),
    ]


def _contact(rng: random.Random) -> list[Fact]:
    first, last = rng.choice(_FIRST), rng.choice(_LAST)
    news, is_subscribed = _yes(rng)
    return [
        _same("first name", first),
        _same("last name", last),
        _same("role", rng.choice(_ROLE)),
        _same("city", rng.choice(_CITY)),
        _same("language", rng.choice(_LANGUAGE)),
        ("newsletter", news, "newsletter", is_subscribed),
        _same("member since", rng.randint(2001, 2026)),
    ]


_KINDS: dict[str, Callable[[random.Random], list[Fact]]] = {
    "order": _order,
    "ticket": _ticket,
    "sensor": _sensor,
    "contact": _contact,
}


def make_json(rng: random.Random, *, held_out: bool) -> Exchange:
    """One record to fill, of one of four kinds, from the wanted side of the split."""
    while True:
        kind = rng.choice(list(_KINDS))
        facts = _KINDS[kind](rng)
        # One fact in eight is left out of the prompt: the record then says null.
        missing = {index for index in range(len(facts)) if rng.random() < 0.08}
        lines = [
            f"{label}: {'unknown' if index in missing else wording}"
            for index, (label, wording, _, _) in enumerate(facts)
        ]
        user = f"Fill in the {kind} record as JSON.\n\n" + "\n".join(lines)
        if is_held_out(user) != held_out:
            continue
        record: dict[str, object] = {"kind": kind}
        for index, (_, _, key, value) in enumerate(facts):
            record[key] = None if index in missing else value
        return Exchange("json", user, json.dumps(record, indent=2), "grammar")


# --- copy: echo, or echo with one word replaced -------------------------------------------------

_WORD = re.compile(r"\b[A-Za-z_]{4,12}\b")


def make_copy(rng: random.Random, texts: dict[str, str], names: list[str]) -> Exchange:
    """Echo a passage of one of the named files, in a third of the cases with one word replaced."""
    name = rng.choice(names)
    lines = texts[name].splitlines()
    while True:
        start = rng.randrange(len(lines))
        passage = "\n".join(lines[start : start + rng.randint(4, 9)]).strip("\n")
        while len(passage) > 420:
            passage = passage.rpartition("\n")[0]
        if len(passage) >= 140 and passage.isascii():
            break
        name = rng.choice(names)
        lines = texts[name].splitlines()
    words = sorted({*_WORD.findall(passage)})
    if words and rng.random() < 1 / 3:
        old, new = rng.choice(words), rng.choice(_FIRST)
        user = f"Repeat this text, writing {new} instead of {old}:\n\n{passage}"
        return Exchange("copy", user, re.sub(rf"\b{old}\b", new, passage), name)
    return Exchange("copy", ECHO_ASK + passage, passage, name)


# --- code and prose: continue a held-out file ---------------------------------------------------


def continuation_prompts(
    rng: random.Random,
    segment: str,
    texts: dict[str, str],
    count_tokens: Callable[[str], int],
    wanted: int,
) -> Iterator[Exchange]:
    """Passages of 48 to 160 tokens from held-out files, each followed by 600 characters of truth.

    A passage starts at a definition (code) or after a blank line (prose) and ends with a line;
    passages of one file never overlap.
    """
    ask = CODE_ASK if segment == "code" else PROSE_ASK
    is_start = re.compile(r"^(def |class |    def |async def )" if segment == "code" else r"^\S")
    found: list[Exchange] = []
    for name, text in texts.items():
        if not is_held_out(name):
            continue
        lines = text.splitlines(keepends=True)
        index = 0
        while index < len(lines):
            fresh = segment == "code" or index == 0 or not lines[index - 1].strip()
            if not (fresh and is_start.match(lines[index])):
                index += 1
                continue
            wished = rng.randint(48, 112)
            end = index
            while end < len(lines) and count_tokens("".join(lines[index:end])) < wished:
                end += 1
            prefix, rest = "".join(lines[index:end]), "".join(lines[end:])[:600]
            tokens = count_tokens(prefix)
            if 48 <= tokens <= 160 and len(rest) == 600 and prefix.isascii():
                found.append(Exchange(segment, ask + prefix, rest, name))
            index = end + 8
    rng.shuffle(found)
    if len(found) < wanted:
        raise ValueError(f"only {len(found)} held-out {segment} passages, {wanted} wanted")
    yield from found[:wanted]
