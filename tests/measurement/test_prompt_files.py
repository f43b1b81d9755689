from __future__ import annotations

import csv
import json
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specwise.domain import Api
from specwise.errors import PromptError
from specwise.measurement import prompt_files
from specwise.measurement.prompt_files import MAX_PROMPTS, Prompt, read_prompts

PLACEHOLDER = (
    "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH\n\n{article}"
)
ARTICLES = [
    {"id": "a1", "article": "Long text, with a comma.", "highlights": "Text."},
    {"id": "a2", "article": 'Second "quoted"\ntext.', "highlights": "More."},
]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
    {"question_id": 201, "category": "translation", "turns": ["Translate."], "reference": ["x"]},
]
CONVERSATIONS = [
    {"id": "c1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt"}]},
    {"id": "c2", "conversations": [{"from": "gpt", "value": "no human"}]},
    {"id": "c3", "conversations": None},
]
BATCH = [
    {
        "custom_id": "request-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            ],
            "temperature": 0.6,
            "max_completion_tokens": 200,
            "response_format": {"type": "json_object"},
            "tools": [],
        },
    },
    {
        "custom_id": "request-2",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": ["One"], "max_tokens": 9, "top_p": 0.9},
    },
]
LOG = (
    "INFO 08-13 11:33:33 [logger.py:41] Received request chatcmpl-3: prompt: '<user>hi', params: "
    "SamplingParams(n=1, temperature=0.7, top_p=0.95, max_tokens=100), prompt_token_ids: None."
)


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(path: Path, named: str | None = None, template: str = "") -> list[str | None]:
    return [p.text for p in read_prompts(path, named, template=template).prompts]


# --- each format, recognised by its content ------------------------------------------------------


def test_articles_from_json_lines_csv_and_parquet_are_the_same(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "article", "highlights"])
        writer.writeheader()
        writer.writerows(ARTICLES)
    sources = [
        read_prompts(path)
        for path in (
            jsonl(tmp_path / "a.jsonl", ARTICLES),
            parquet(tmp_path / "a.parquet", list(ARTICLES)),
            tmp_path / "a.csv",
        )
    ]
    assert {s.format for s in sources} == {"articles"}
    assert sources[0].prompts == sources[1].prompts == sources[2].prompts
    first, second = sources[0].prompts
    assert first.prompt_id == "a1"
    assert first.text == "Summarize the following article.\n\nLong text, with a comma."
    assert second.text is not None
    assert second.text.endswith('Second "quoted"\ntext.')


def test_a_template_makes_prompts_of_any_columns(tmp_path: Path) -> None:
    rows = [{"question": "Why {x}?", "year": 1999}, {"question": " ", "year": 1}]
    path = jsonl(tmp_path / "q.jsonl", rows)
    source = read_prompts(path, template="In {year}: {question} Answer {as JSON}.")
    assert [p.text for p in source.prompts] == ["In 1999: Why {x}? Answer {as JSON}."]
    assert source.notes == ("1 rows with an empty column were left out.",)
    with pytest.raises(PromptError, match="line 1 has no text in body; it has question, year"):
        read_prompts(path, template="{body}")
    with pytest.raises(PromptError, match="names no column"):
        read_prompts(path, template="Summarize.")


def test_spec_bench_takes_the_first_turn_and_says_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "question.jsonl", QUESTIONS)
    source = read_prompts(path)
    assert source.format == "spec-bench"
    assert [(p.prompt_id, p.text) for p in source.prompts] == [
        ("81", "Compose."),
        ("201", "Translate."),
    ]
    assert source.notes[0].startswith("1 prompts have further turns, which are not sent")
    (only,) = read_prompts(path, categories=("translation",)).prompts
    assert only.prompt_id == "201"
    with pytest.raises(PromptError, match="has no category poetry") as caught:
        read_prompts(path, categories=("writing", "poetry"))
    assert "translation, writing" in caught.value.next_step


def test_speed_bench_from_the_hub_and_prepared(tmp_path: Path) -> None:
    hub = {"question_id": "x1", "category": "coding", "sub_category": "py", "src_id": "s"}
    path = parquet(tmp_path / "q.parquet", [{**hub, "turns": ["Write.", "Test."]}])
    assert read_prompts(path).format == "speed-bench"
    messages = [{"role": "user", "content": "Write."}, {"role": "user", "content": "Test."}]
    prepared = jsonl(tmp_path / "q.jsonl", [{**hub, "messages": messages}])
    assert read_prompts(prepared).format == "speed-bench"
    assert (
        read_prompts(prepared).prompts
        == read_prompts(path).prompts
        == (Prompt("x1", text="Write."),)
    )
    unfilled = jsonl(tmp_path / "raw.jsonl", [{**hub, "turns": [PLACEHOLDER]}])
    with pytest.raises(PromptError, match="holds a placeholder"):
        read_prompts(unfilled)


def test_sharegpt_as_a_list_and_as_lines(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(CONVERSATIONS, indent=1))
    as_list = read_prompts(tmp_path / "s.json")
    as_lines = read_prompts(jsonl(tmp_path / "s.jsonl", CONVERSATIONS))
    assert as_list == as_lines
    assert (as_list.format, as_list.prompts) == ("sharegpt", (Prompt("c1", text="hi"),))
    assert as_list.notes == ("2 conversations without a human turn were left out.",)


def test_openai_batch_chat_and_completion(tmp_path: Path) -> None:
    source = read_prompts(jsonl(tmp_path / "batch.jsonl", BATCH))
    chat, completion = source.prompts
    assert source.format == "openai-batch"
    assert chat.messages == (("system", "Be brief."), ("user", "Hello"))
    assert (chat.temperature, chat.max_tokens, chat.api) == (0.6, 200, Api.CHAT)
    assert (completion.text, completion.max_tokens, completion.api) == ("One", 9, Api.COMPLETIONS)
    assert (completion.top_p, completion.temperature) == (0.9, None)
    assert source.notes == ("Not sent, although the source asks for it: response_format (1 of 2).",)


def test_a_vllm_log_brings_its_sampling(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text("INFO starting\n" * 50 + LOG + "\n")
    source = read_prompts(path)
    (prompt,) = source.prompts
    assert source.format == "vllm-log"
    assert (prompt.prompt_id, prompt.text, prompt.api) == (
        "chatcmpl-3",
        "<user>hi",
        Api.COMPLETIONS,
    )
    assert (prompt.temperature, prompt.top_p, prompt.max_tokens) == (0.7, 0.95, 100)


def test_a_vllm_log_that_was_cut_or_holds_no_prompts(tmp_path: Path) -> None:
    cut = tmp_path / "cut.log"
    cut.write_text("\n".join(LOG.replace("hi", text) for text in ("abcd", "efgh", "i")) + "\n")
    (note,) = read_prompts(cut).notes
    assert note.startswith("2 prompts have 10 characters exactly")
    bare = tmp_path / "bare.log"
    bare.write_text(LOG.replace("prompt: '<user>hi', ", "") + "\n")
    with pytest.raises(PromptError, match=r"1 requests without their text: .*LEVEL=DEBUG"):
        read_prompts(bare)


def test_requests_of_a_log_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}
    bodies = [{"messages": [{"role": "user", "content": "hi"}]}, image, {"input": "embed me"}]
    path = tmp_path / "server.log"
    path.write_text("".join(f"DEBUG Request N/A JSON body: {json.dumps(b)}\n" for b in bodies))
    source = read_prompts(path)
    assert [p.messages for p in source.prompts] == [(("user", "hi"),)]
    assert source.notes == (
        "2 requests that are not text (images, tool calls, embeddings) were left out.",
    )


def test_plain_text_a_line_each_or_a_file_each(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\n two\u2028still two \r\nthree", encoding="utf-8")
    assert texts(lines) == ["one", " two\u2028still two ", "three"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("second\nof two lines\n")
    (folder / "a.txt").write_text("first")
    (folder / "empty.txt").write_text("\n")
    (folder / "ignored.md").write_text("no")
    source = read_prompts(folder)
    assert [(p.prompt_id, p.text) for p in source.prompts] == [
        ("a", "first"),
        ("b", "second\nof two lines"),
    ]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "a", "article": "b"}', "could be jsonl or articles"),
        ("x.txt", '{"prompt": "a"}', "could be jsonl or text"),
        ("x.txt", LOG, "could be vllm-log or text"),
        ("x.jsonl", '{"body": "a", "title": "b"}', "first record has the keys body, title"),
        ("x.dat", "hello", "starts with 'hello'"),
        ("x.dat", "", "is empty"),
        ("x.json", "[]", "is empty"),
        ("x.json", '[{"prompt": "a"}, {"prompt"', "element 2 is not JSON"),
        ("x.json", '[{"prompt": "a"}, 3]', "element 2 is not a JSON object"),
        ("x.json", '[{"prompt": "a"}, null]', "element 2 is not a JSON object"),
        ("x.csv", "id,article\n1\n", "line 2 has not as many fields"),
        ("x.jsonl", '{"custom_id": "1", "body": {}, "url": "/v1/embeddings"}', "/v1/embeddings"),
        ("x.jsonl", '{"custom_id": "1", "body": {"prompt": [1, 2]}}', "neither messages nor one"),
        ("x.jsonl", '{"turns": "Compose."}', "no list of turns"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_why_and_what_to_do(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert caught.value.next_step or "not JSON" in message or "fields" in message


def test_binary_and_foreign_encodings(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08rest")
    with pytest.raises(PromptError, match="is compressed"):
        read_prompts(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(PromptError, match="not UTF-8"):
        read_prompts(tmp_path / "x.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(PromptError, match="damaged Parquet"):
        read_prompts(tmp_path / "x.parquet")


def test_a_named_format_insists(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text('{"prompt": "a", "article": "b"}\n')
    assert texts(path, "text") == ['{"prompt": "a", "article": "b"}']
    assert texts(path, "jsonl") == ["a"]
    assert texts(path, "articles", template="{article}") == ["b"]
    with pytest.raises(PromptError, match="read as jsonl, which has no columns"):
        read_prompts(path, "jsonl", template="{article}")
    with pytest.raises(PromptError, match="has no categories"):
        read_prompts(path, "text", categories=("a",))


# --- size ----------------------------------------------------------------------------------------


def test_a_large_list_is_read_in_pieces_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_files, "MAX_PROMPTS", 50)
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        for i in range(4000):
            turn = {"from": "human", "value": f"{i} " + "x" * 4000}
            file.write(("," if i else "") + json.dumps({"id": i, "conversations": [turn]}))
        file.write("]")
    read_prompts(path)
    tracemalloc.start()
    source = read_prompts(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 16e6
    assert peak_bytes < 8e6
    assert source.notes == ("50 of 4,000 prompts are used, drawn evenly over the file.",)
    assert read_prompts(path) == source
    mean = sum(int(p.prompt_id) for p in source.prompts) / 50
    assert 1300 < mean < 2700  # 4 standard errors around the middle


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_any_text_survives_a_json_list_whatever_the_piece(contents: list[str]) -> None:
    rows = [{"prompt": text} for text in contents]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(prompt_files, "_PIECE_CHARS", 7)
        path = Path(folder, "p.json")
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        assert texts(path, "jsonl") == contents


def test_files_below_the_limit_keep_their_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(100)])
    assert texts(path) == [str(i) for i in range(100)]
    assert MAX_PROMPTS >= 10_000
