"""Reading and writing vLLM commands: every form a user may have one in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from specwise.errors import CommandError, SpecwiseError
from specwise.vllm import command as c

WANTED = c.ServeCommand(
    model="org/target",
    flags=(c.Flag("--tensor-parallel-size", ("2",)), c.Flag("--enforce-eager")),
    speculation={"method": "ngram", "num_speculative_tokens": 3},
)
JSON = '{"method": "ngram", "num_speculative_tokens": 3}'


@pytest.mark.parametrize(
    "text",
    [
        f"vllm serve org/target -tp 2 --enforce-eager --speculative-config '{JSON}'",
        "/opt/bin/vllm serve org/target \\\n  --tensor_parallel_size=2 \\\n "
        f"--enforce-eager -sc '{JSON}'",
        "vllm serve org/target --tensor-parallel-size 2 --enforce-eager "
        "--speculative-config.method ngram --speculative_config.num_speculative_tokens 3",
        f"-tp 2 --enforce-eager --speculative-config='{JSON}' --model org/target",
        f"vllm serve org/target -tp 2 --enforce-eager -sc '{JSON}' 2>&1 | tee log",
    ],
)
def test_one_command_in_many_forms(text: str) -> None:
    read = c.read_command(text)
    assert (read.model, read.flags, read.speculation) == (
        WANTED.model,
        WANTED.flags,
        WANTED.speculation,
    )


def test_arguments_alone_are_written_without_a_launcher() -> None:
    """What goes into the command of a server that somebody else starts."""
    alone = c.ServeCommand(None, flags=WANTED.flags, speculation=WANTED.speculation, launcher=())
    assert c.read_command(c.to_shell(alone)).flags == WANTED.flags
    assert c.to_shell(alone).startswith("--tensor-parallel-size 2 \\\n")
    container = yaml.safe_load(c.to_container_args(alone))
    assert list(container) == ["args"]
    assert c.read_yaml(c.to_container_args(alone)).speculation == WANTED.speculation


def test_scripts() -> None:
    script = (
        "#!/bin/bash\nset -e  # it's safe\nexport A=1\ncd /models && "
        "exec vllm serve m \\\n  --port 1 \\\n  --seed 2; echo done\nsleep 5\n"
    )
    read = c.read_command(script)
    assert (read.model, read.stray) == ("m", ())
    assert read.flags == (c.Flag("--port", ("1",)), c.Flag("--seed", ("2",)))
    wrapped = c.read_command("vllm serve m\n  --port 1\n  --served-model-name a#b # why")
    assert wrapped.flags == (c.Flag("--port", ("1",)), c.Flag("--served-model-name", ("a#b",)))
    multi = c.read_command('vllm serve m --speculative-config \'{\n "method": "ngram"\n}\'')
    assert multi.speculation == {"method": "ngram"}


def test_environment_launcher_and_image_version() -> None:
    read = c.read_command(
        "CUDA_VISIBLE_DEVICES=0,1 python3 -m vllm.entrypoints.openai.api_server --model m"
    )
    assert read.environment == (("CUDA_VISIBLE_DEVICES", "0,1"),)
    assert read.launcher == ("python3", "-m", "vllm.entrypoints.openai.api_server")
    docker = c.read_command("docker run --gpus all vllm/vllm-openai:v0.6.3 --model m -tp 2")
    assert docker.version == c.Version(0, 6, 3)
    assert docker.model == "m"
    assert docker.get("--tensor-parallel-size") == "2"


def test_dotted_keys_replace_the_json() -> None:
    read = c.read_command(f"vllm serve m -sc '{JSON}' --speculative-config.method suffix")
    assert read.speculation == {"method": "suffix"}
    assert read.speculation_given_twice


def test_unreadable_json_is_kept_as_text() -> None:
    read = c.read_command("vllm serve m --speculative-config {method:ngram}")
    assert read.speculation is None
    assert read.unreadable_speculation == "{method:ngram}"


def test_a_flag_with_several_values_takes_them_all() -> None:
    read = c.read_command("vllm serve m --served-model-name a b --port 1")
    assert read.flags == (c.Flag("--served-model-name", ("a", "b")), c.Flag("--port", ("1",)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: org/target\ntensor-parallel-size: 2\nenforce-eager: true\n"
            f"speculative-config: '{JSON}'",
            None,
        ),
        (
            "model: org/target\ntensor_parallel_size: 2\nenforce-eager: true\n"
            "speculative-config: {method: ngram, num_speculative_tokens: 3}",
            None,
        ),
        (json.dumps(["org/target", "-tp", "2", "--enforce-eager", "-sc", JSON]), None),
        (
            yaml.safe_dump(
                {
                    "kind": "Deployment",
                    "spec": {
                        "template": {
                            "spec": {
                                "containers": [
                                    {"name": "sidecar", "args": ["--x"]},
                                    {
                                        "image": "vllm/vllm-openai:v0.8.5",
                                        "args": ["--model", "org/target", "-tp", "2",
                                                 "--enforce-eager", "-sc", JSON],
                                    },
                                ]
                            }
                        }
                    },
                }
            ),
            c.Version(0, 8, 5),
        ),
        (
            yaml.safe_dump(
                {"command": ["/bin/sh", "-c"],
                 "args": [f"vllm serve org/target -tp 2 --enforce-eager -sc '{JSON}'"]}
            ),
            None,
        ),
    ],
)  # fmt: skip
def test_yaml_forms(text: str, expected: c.Version | None) -> None:
    read = c.read_yaml(text)
    assert read.model == "org/target"
    assert read.flags == WANTED.flags
    assert read.speculation == WANTED.speculation
    assert read.version == expected


@pytest.mark.parametrize("text", ["", "a: [", "kind: Service", "- 1\n- {", "just text", "&a [*a]"])
def test_yaml_without_a_server(text: str) -> None:
    with pytest.raises(CommandError):
        c.read_yaml(text)


def test_written_forms_read_back_the_same() -> None:
    command = c.read_command(
        "A=1 vllm serve org/target -tp 2 --enforce-eager --no-enable-prefix-caching "
        f"--served-model-name a b -sc '{JSON}'"
    )
    noted = c.replace(command, notes={"--tensor-parallel-size": 'it\'s "why"'})
    assert c.read_command(c.to_shell(noted)) == command
    assert c.read_words(c.to_words(command)).flags == command.flags
    container = c.read_yaml(c.to_container_args(noted))
    assert (container.flags, container.speculation) == (command.flags, command.speculation)
    from_file = c.read_yaml(c.to_yaml(noted))
    assert from_file.model == command.model
    assert from_file.speculation == command.speculation
    assert {f.name for f in from_file.flags} >= {"--tensor-parallel-size", "--enforce-eager"}


def test_a_running_process_is_read() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()
            assert c.read_process(process.pid).model == "m"
        finally:
            process.stdin.close()
    with pytest.raises(CommandError, match="cannot be read"):
        c.read_process(process.pid)
    with pytest.raises(CommandError, match="No vLLM server"):
        c.read_process(os.getpid())


@pytest.mark.parametrize("text", ["vllm serve 'm", "ls -l", "vllm", "docker run nginx"])
def test_no_command(text: str) -> None:
    with pytest.raises(CommandError):
        c.read_command(text)


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.6", "0.6.0"), ("v0.8.5.post1", "0.8.5"), ("0.33.0+cu12", "0.33.0"), ("0.9.0rc1", "0.9.0")],
)
def test_versions(text: str, version: str) -> None:
    assert str(c.Version.parse(text)) == version
    assert c.Version.of(text) == c.Version.parse(text)


@pytest.mark.parametrize("described", ["dev", "", None, 32])
def test_what_is_no_version(described: object) -> None:
    assert c.Version.of(described) is None


def test_the_table_of_names() -> None:
    table = c.names()
    v0, mid, new = (c.Version.parse(v) for v in ("0.8.1", "0.8.2", "0.8.3"))
    old_flag, config = table.flags["--speculative-model"], table.flags["--speculative-config"]
    assert [old_flag.holds(v) for v in (v0, mid, new)] == [True, True, False]
    assert [config.holds(v) for v in (v0, mid, new)] == [False, True, True]
    assert set(table.aliases.values()) <= set(table.flags)
    assert table.switches <= set(table.flags)


@given(st.text(max_size=80), st.lists(st.text(max_size=12), max_size=8))
def test_anything_reads_or_is_refused_with_a_sentence(text: str, words: list[str]) -> None:
    for read in (
        lambda: c.read_command(text),
        lambda: c.read_command("vllm serve " + text),
        lambda: c.read_words(["vllm", "serve", *words]),
        lambda: c.read_yaml(text),
        lambda: c.Version.parse(text),
    ):
        with contextlib.suppress(SpecwiseError):
            read()


_WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
_PLAIN = _WORD.filter(lambda w: not w.startswith("-") and not c._ends_command(w))


@given(
    st.lists(st.tuples(st.sampled_from(["--port", "--seed", "--dtype", "--revision"]), _PLAIN)),
    st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), st.integers() | _WORD),
)
def test_shell_round_trip(flags: list[tuple[str, str]], speculation: dict[str, object]) -> None:
    command = c.ServeCommand(
        model="m", flags=tuple(c.Flag(n, (v,)) for n, v in flags), speculation=speculation
    )
    text = c.to_shell(command)
    values = "".join(v for _, v in flags)
    if not set(values) & set("\n\r\\#"):
        assert c.read_command(text) == command
    assert c.read_words(c.to_words(command)) == command


def test_files_of_the_table_are_shipped() -> None:
    assert Path(c.__file__).with_name("flags.toml").is_file()
