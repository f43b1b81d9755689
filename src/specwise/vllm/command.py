"""A vLLM serving command as a value: read from shell, YAML, Kubernetes or /proc; written back."""

from __future__ import annotations

import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from specwise.errors import CommandError

SPECULATIVE_CONFIG = "--speculative-config"
_API_SERVER = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A vLLM release; suffixes such as ``.post1`` or ``+cu12`` do not count."""

    major: int
    minor: int
    patch: int = 0

    @classmethod
    def parse(cls, text: str) -> Version:
        """``0.32.0``, ``v0.8.5.post1`` or ``0.33``; CommandError for anything else."""
        match = re.fullmatch(
            r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[a-z.+-].*)?", text.strip(), re.ASCII
        )
        if match is None:
            raise CommandError(
                f"{text!r} is not a vLLM version.", "Give it like 0.32.0 (`vllm --version`)."
            )
        return cls(int(match[1]), int(match[2]), int(match[3] or 0))

    @classmethod
    def of(cls, described: object) -> Version | None:
        """The version that a server or an environment named; None if that is none, as "dev"."""
        try:
            return cls.parse(described) if isinstance(described, str) else None
        except CommandError:
            return None

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


@dataclass(frozen=True, slots=True)
class Span:
    """Versions that know a name: from ``since`` on, gone in ``until`` (None: no limit known)."""

    since: Version | None
    until: Version | None

    def holds(self, version: Version) -> bool:
        """Whether ``version`` knows the name."""
        return not self.before(version) and (self.until is None or version < self.until)

    def before(self, version: Version) -> bool:
        """Whether ``version`` is older than the name."""
        return self.since is not None and version < self.since


@dataclass(frozen=True, slots=True)
class Names:
    """vLLM's names by version (``flags.toml``)."""

    oldest: Version
    newest: Version
    flags: Mapping[str, Span]
    spec_fields: Mapping[str, Span]
    quantization: Mapping[str, Span]
    aliases: Mapping[str, str]
    switches: frozenset[str]
    many: frozenset[str]


@functools.cache
def names() -> Names:
    """The table of names, read once."""
    data = tomllib.loads(resources.files("specwise.vllm").joinpath("flags.toml").read_text())

    def spans(table: Mapping[str, str]) -> dict[str, Span]:
        return {name: _span(text) for name, text in table.items()}

    return Names(
        oldest=Version.parse(data["oldest"]),
        newest=Version.parse(data["newest"]),
        flags=spans(data["flags"]),
        spec_fields=spans(data["spec_fields"]),
        quantization=spans(data["quantization"]),
        aliases=data["aliases"],
        switches=frozenset(data["switches"]["names"]),
        many=frozenset(data["many"]["names"]),
    )


def _span(text: str) -> Span:
    """``"A..B"`` of the table as a Span."""
    since, until = text.split("..")
    return Span(Version.parse(since) if since else None, Version.parse(until) if until else None)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag by its long name; a switch has no values."""

    name: str
    values: tuple[str, ...] = ()

    @property
    def value(self) -> str | None:
        """The first value, None for a switch."""
        return self.values[0] if self.values else None


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """What starts a vLLM server.

    An empty ``launcher`` with no ``model`` is a command's arguments alone.
    ``flags`` stand in the order given, without the speculative configuration; that is in
    ``speculation`` as the parsed object, or in ``unreadable_speculation`` as the text that could
    not be parsed; ``speculation_given_twice`` says that JSON and dotted keys were both there.
    ``stray`` are words that belong to no flag. ``version`` is what an image tag says.
    """

    model: str | None
    flags: tuple[Flag, ...] = ()
    speculation: Mapping[str, Any] | None = None
    unreadable_speculation: str | None = None
    speculation_given_twice: bool = False
    stray: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    launcher: tuple[str, ...] = ("vllm", "serve")
    version: Version | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> str | None:
        """The value that counts (argparse: the last one given), None if absent or a switch."""
        return next((f.value for f in reversed(self.flags) if f.name == name), None)

    def has(self, name: str) -> bool:
        """Whether the flag is given at all."""
        return any(f.name == name for f in self.flags)

    def without(self, *gone: str) -> ServeCommand:
        """The same command without those flags."""
        return replace(self, flags=tuple(f for f in self.flags if f.name not in gone))

    def with_flag(self, name: str, *values: str) -> ServeCommand:
        """The same command with the flag set, in its old place if it had one."""
        new = Flag(name, values)
        if not self.has(name):
            return replace(self, flags=(*self.flags, new))
        kept: list[Flag] = []
        for flag in self.flags:
            if flag.name != name:
                kept.append(flag)
            elif new not in kept:
                kept.append(new)
        return replace(self, flags=tuple(kept))


# ---------------------------------------------------------------------------------- reading


def read_command(text: str) -> ServeCommand:
    """A shell command or script, with environment prefix, line continuations, docker wrapper.

    Of a script the first command that starts vLLM counts; a line that begins with a flag goes on
    with the one before. Raises CommandError if quotes do not match or nothing starts vLLM.
    """
    joined = re.sub(r"\\\r?\n|\r?\n(?=[ \t]*-)", " ", text)
    problem: CommandError | None = None
    for words in _commands(joined):
        try:
            return read_words(words)
        except CommandError as error:
            problem = problem or error
    raise problem or CommandError("The command is empty.", "Give `vllm serve MODEL ...`.")


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each line, where a line ends outside quotes; comments are left out."""
    held = ""
    for line in re.split(r"\r?\n", text):
        if not held and line.lstrip().startswith("#"):
            continue
        held = f"{held}\n{line}" if held else line
        try:
            words = _split(held)
        except ValueError:
            continue  # a quote is open: the next line belongs to it
        held = ""
        if words:
            yield words
    if held:
        uncommented = re.sub(r"\s#.*", "", held)
        try:
            words = _split(uncommented)
        except ValueError as error:
            raise CommandError(
                f"The command cannot be split into words: {error}.",
                "Check the quotes; the JSON of --speculative-config goes in single quotes.",
            ) from error
        yield words


def _split(line: str) -> list[str]:
    """Words as a shell sees them, operators by themselves, up to a comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words = list(lexer)
    end = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:end]


def read_words(words: Sequence[str]) -> ServeCommand:
    """The same from an argument list, as in a container spec or /proc/PID/cmdline."""
    words = list(words)
    start, launcher, version = _find_launcher(words)
    environment = tuple(
        (name, value)
        for name, sep, value in (w.partition("=") for w in words[:start])
        if sep and re.fullmatch(r"[A-Za-z_]\w*", name)
    )
    end = next((i for i in range(start, len(words)) if _ends_command(words[i])), len(words))
    command = _read_arguments(words[start:end])
    return replace(command, environment=environment, launcher=launcher, version=version)


def _ends_command(word: str) -> bool:
    """Whether the shell would end the command here."""
    return re.match(r"[;&|]+$|\d?>", word) is not None


def _find_launcher(words: list[str]) -> tuple[int, tuple[str, ...], Version | None]:
    """Index of the first argument, the words that launch, and the version an image tag names."""
    for i, word in enumerate(words):
        if word.rsplit("/", 1)[-1] == "vllm" and words[i + 1 : i + 2] == ["serve"]:
            return i + 2, ("vllm", "serve"), None
        if word == _API_SERVER and i and words[i - 1] == "-m":
            python = words[i - 2] if i > 1 else "python"
            return i + 1, (python, "-m", _API_SERVER), None
        if word.endswith("vllm/entrypoints/openai/api_server.py"):
            return i + 1, ("python", "-m", _API_SERVER), None
        if i and "vllm" in word and words[0].rsplit("/", 1)[-1] in {"docker", "podman", "nerdctl"}:
            tag = re.fullmatch(r"[\w./-]*vllm[\w./-]*(?::v?(\d+\.\d+\.\d+)?\S*)?", word)
            if tag and not word.startswith("-"):
                version = Version.parse(tag[1]) if tag[1] else None
                rest = words[i + 1 :]
                if "serve" in rest[:2]:
                    return i + 2 + rest.index("serve"), ("vllm", "serve"), version
                return i + 1, ("vllm", "serve"), version
    if words and words[0].startswith("-"):
        return 0, ("vllm", "serve"), None
    raise CommandError(
        "No vLLM server is started here.",
        "Expected `vllm serve MODEL ...`, `python -m vllm.entrypoints.openai.api_server ...`, "
        "a docker run of a vLLM image, or its arguments alone.",
    )


def _read_arguments(words: Sequence[str]) -> ServeCommand:
    """Flags, the model and the speculative configuration from the words after the launcher."""
    table = names()
    flags: list[Flag] = []
    stray: list[str] = []
    model: str | None = None
    dotted: dict[str, Any] = {}
    json_text: str | None = None
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not _looks_like_flag(word):
            if model is None and not flags:
                model = word
            else:
                stray.append(word)
            continue
        raw, has_value, value = word.partition("=")
        name, _, key = raw.partition(".")
        name = table.aliases.get(_dashes(name), _dashes(name))
        values: tuple[str, ...] = (value,) if has_value else ()
        if not has_value and name not in table.switches and not name.startswith("--no-"):
            last = len(words) if name in table.many else i + 1
            while i < min(last, len(words)) and not _looks_like_flag(words[i]):
                values += (words[i],)
                i += 1
        if key and name == SPECULATIVE_CONFIG:
            _put(dotted, key.removesuffix("+"), " ".join(values), append=key.endswith("+"))
        elif key:
            flags.append(Flag(f"{name}.{key}", values))
        elif name == SPECULATIVE_CONFIG:
            json_text = values[0] if values else ""
        elif name == "--model" and values:
            model = values[0]
        else:
            flags.append(Flag(name, values))
    command = ServeCommand(model=model, flags=tuple(flags), stray=tuple(stray))
    return _with_speculation(command, json_text, dotted)


def _with_speculation(
    command: ServeCommand, json_text: str | None, dotted: Mapping[str, Any]
) -> ServeCommand:
    """Add the speculative configuration; dotted keys come after the JSON, as vLLM appends them.

    vLLM 0.9 and later turn dotted keys into a second JSON argument, which replaces the first.
    """
    if dotted:
        twice = json_text is not None
        return replace(command, speculation=dict(dotted), speculation_given_twice=twice)
    if json_text is None:
        return command
    config = parse_speculation(json_text)
    if config is None:
        return replace(command, unreadable_speculation=json_text)
    return replace(command, speculation=config)


def parse_speculation(text: str) -> dict[str, Any] | None:
    """The object in the text of ``--speculative-config``; None if it is no JSON object."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return {str(name).replace("-", "_"): value for name, value in config.items()}


def _put(into: dict[str, Any], dotted_key: str, text: str, *, append: bool) -> None:
    """Set ``a.b`` in nested dicts from the text of a dotted argument."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = dotted_key.split(".")
    for parent in parents:
        child = into.setdefault(parent.replace("-", "_"), {})
        if not isinstance(child, dict):
            return
        into = child
    last = last.replace("-", "_")
    if append:
        value = (
            [*into.get(last, []), *text.split(",")]
            if isinstance(into.get(last, []), list)
            else value
        )
    into[last] = value


def _looks_like_flag(word: str) -> bool:
    """Whether argparse would take the word for a flag rather than a value."""
    return re.match(r"--?[A-Za-z]", word) is not None


def _dashes(name: str) -> str:
    """vLLM takes underscores for dashes in long flags."""
    return name.replace("_", "-") if name.startswith("--") else name


def read_yaml(text: str) -> ServeCommand:
    """A ``vllm serve --config`` file, a list of container arguments, or a Kubernetes manifest.

    Raises CommandError if it is not YAML or holds no vLLM server.
    """
    import yaml  # noqa: PLC0415 (only this entry needs it)

    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CommandError(f"This is not YAML: {error}", "Check the indentation.") from error
    for document in documents:
        if isinstance(document, list):
            return _read_container(document)
        if isinstance(document, dict):
            container = _find_container(document, depth=0)
            if container is not None:
                return container
            if "kind" not in document and "services" not in document:
                return _read_config_file(document)
    raise CommandError(
        "No vLLM server was found in this YAML.",
        "Expected a `vllm serve --config` file, a list of arguments, or a manifest whose container "
        "runs vLLM.",
    )


def _find_container(node: Any, depth: int) -> ServeCommand | None:
    """The first mapping under ``node`` with an args or command list that starts vLLM."""
    if depth > 20:
        return None
    if isinstance(node, dict):
        words = [*_words(node.get("command")), *_words(node.get("args"))]
        image = str(node.get("image", ""))
        if words and ("vllm" in image or any("vllm" in w for w in words) or depth == 0):
            command = _read_container(words)
            tag = re.search(r":v?(\d+\.\d+\.\d+)", image)
            return replace(command, version=Version.parse(tag[1])) if tag else command
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            found = _find_container(child, depth + 1)
            if found is not None:
                return found
    return None


def _words(node: Any) -> list[str]:
    """A container's command or args as words; a single string is split as a shell would."""
    if isinstance(node, list):
        return [_scalar(item) for item in node]
    if isinstance(node, str):
        try:
            return shlex.split(node)
        except ValueError:
            return []
    return []


def _read_container(words: Iterable[Any]) -> ServeCommand:
    """Container arguments: ``sh -c`` scripts are read as shell, a bare list as arguments."""
    flat = [_scalar(word) for word in words]
    if len(flat) > 1 and flat[-2] == "-c":
        return read_command(flat[-1])
    try:
        return read_words(flat)
    except CommandError:
        return read_words(["vllm", "serve", *flat])


def _read_config_file(config: Mapping[Any, Any]) -> ServeCommand:
    """The file of ``vllm serve --config``: keys are long flags without the dashes."""
    words: list[str] = []
    model = None
    for key, value in config.items():
        name = str(key).replace("_", "-")
        if name in {"model", "model-tag"} and value is not None:
            model = str(value)
        elif value is True:
            words.append(f"--{name}")
        elif value is False or value is None:
            continue
        elif isinstance(value, list):
            words += [f"--{name}", *map(_scalar, value)]
        else:
            words.append(f"--{name}={_scalar(value)}")
    return replace(_read_arguments(words), model=model)


def _scalar(value: Any) -> str:
    """A YAML value as the word vLLM would see."""
    if not isinstance(value, dict | list):
        return str(value)
    try:
        return json.dumps(value, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise CommandError(f"A YAML value is no JSON: {error}.", "Write it out plainly.") from error


def read_process(pid: int) -> ServeCommand:
    """The arguments of a running process; CommandError if it cannot be read or is no vLLM."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise CommandError(
            f"Process {pid} cannot be read: {error.strerror}.",
            "Check the id (`pgrep -f vllm`) and that it is yours.",
        ) from error
    return read_words([word.decode(errors="replace") for word in raw.split(b"\0") if word])


# ---------------------------------------------------------------------------------- writing


def to_words(command: ServeCommand) -> list[str]:
    """The argument list, launcher included, environment not."""
    return [*command.launcher, *_arguments(command)]


def _arguments(command: ServeCommand) -> list[str]:
    words: list[str] = []
    for group in _argument_groups(command):
        words += group
    return words


def _argument_groups(command: ServeCommand) -> list[list[str]]:
    """One list of words for the model and for each flag."""
    groups: list[list[str]] = []
    if command.model is not None:
        serve = command.launcher[-1] == "serve"
        groups.append([command.model] if serve else ["--model", command.model])
    for flag in command.flags:
        unclear = len(flag.values) == 1 and _looks_like_flag(flag.values[0])
        groups.append([f"{flag.name}={flag.value}"] if unclear else [flag.name, *flag.values])
    if command.speculation is not None:
        groups.append([SPECULATIVE_CONFIG, json.dumps(command.speculation)])
    elif command.unreadable_speculation is not None:
        groups.append([SPECULATIVE_CONFIG, command.unreadable_speculation])
    return groups


def to_shell(command: ServeCommand) -> str:
    """A shell command, one flag a line, its notes as comments above it."""
    lines = [f"# {name}: {note}" for name, note in command.notes.items()]
    prefix = [f"{name}={shlex.quote(value)}" for name, value in command.environment]
    groups = _argument_groups(command)
    head = list(command.launcher)
    if groups and (command.model is not None or not head):
        head += groups.pop(0)
    body = [shlex.join(head), *(shlex.join(group) for group in groups)]
    return "\n".join([*lines, " ".join([*prefix, " \\\n  ".join(body)])])


def to_yaml(command: ServeCommand) -> str:
    """A file for ``vllm serve --config FILE``, notes as comments."""
    lines = ["# vllm serve --config this-file.yaml"]
    if command.model is not None:
        lines.append(f"model: {json.dumps(command.model)}")
    for flag in command.flags:
        lines += _yaml_note(command, flag.name)
        if flag.name.startswith("--no-"):
            lines.append(f"{flag.name.removeprefix('--no-')}: false")
        elif not flag.values:
            lines.append(f"{flag.name.lstrip('-')}: true")
        elif len(flag.values) > 1:
            lines.append(f"{flag.name.lstrip('-')}: {json.dumps(list(flag.values))}")
        else:
            lines.append(f"{flag.name.lstrip('-')}: {_yaml_scalar(flag.values[0])}")
    if command.speculation is not None:
        lines += _yaml_note(command, SPECULATIVE_CONFIG)
        text = json.dumps(command.speculation).replace("'", "''")
        lines.append(f"speculative-config: '{text}'")
    return "\n".join(lines)


def to_container_args(command: ServeCommand) -> str:
    """``command`` and ``args`` of a Kubernetes container, notes as comments."""
    lines = ["command: " + json.dumps(list(command.launcher))] if command.launcher else []
    if command.environment:
        lines.append("env:")
        lines += [
            f"  - {{name: {name}, value: {json.dumps(value)}}}"
            for name, value in command.environment
        ]
    lines.append("args:")
    for group in _argument_groups(command):
        lines += [f"  {note}" for note in _yaml_note(command, group[0])]
        lines += [f"  - {_quoted(word)}" for word in group]
    return "\n".join(lines)


def _yaml_note(command: ServeCommand, name: str) -> list[str]:
    return [f"# {command.notes[name]}"] if name in command.notes else []


def _yaml_scalar(value: str) -> str:
    """The value as a plain number if it is one, quoted otherwise."""
    return value if re.fullmatch(r"-?\d+(\.\d+)?", value) else json.dumps(value)


def _quoted(word: str) -> str:
    """A YAML string; JSON goes in single quotes to stay readable."""
    return "'" + word.replace("'", "''") + "'" if word.startswith("{") else json.dumps(word)
