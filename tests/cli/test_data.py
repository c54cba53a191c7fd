"""`peftune data`: what is printed, a preview that can be read without colour, and the JSON file."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from peftune.cli import main
from peftune.cli.options import columns_of, source_of
from peftune.cli.output.data import render, run
from peftune.config.data_section import DataSection, Source
from peftune.data.sources.read import read_documents
from peftune.data.summary import summarize
from peftune.errors import UserError
from peftune.model.base import open_base

ROWS = [{"prompt": f"Name {i}", "completion": "It is good."} for i in range(8)] + [
    {"prompt": "Name 0", "completion": "It is good."},
    {"prompt": "Name", "completion": ""},
]


@pytest.fixture
def source(tmp_path) -> Source:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return Source(path=str(tmp_path / "rows.jsonl"))


@pytest.fixture
def tokenizer():
    return open_base("builtin:small").tokenizer


def shown(report: dict, **options: object) -> str:
    console = Console(file=io.StringIO(), width=100, markup=False, highlight=False, **options)
    render(report, console)
    return console.file.getvalue()


def test_the_preview_marks_what_is_scored_without_colour(source, tokenizer):
    text = shown(summarize(DataSection(train=[source]), tokenizer, "t", 64))
    assert "⟦ It is good.<|endoftext|>⟧" in text and "<|endoftext|>Name 0⟦" in text


def test_a_chat_shows_what_ends_a_turn_as_scored_and_says_so(tmp_path, tokenizer):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    text = shown(summarize(DataSection(train=[Source(path=str(tmp_path / "chats.jsonl"))]), tokenizer, "t", 64))
    assert "Assistant:⟦ assistant\n\nUser:⟧ user\n\nAssistant:⟦ assistant<|endoftext|>⟧" in text
    assert "what the assistant says is scored, and what ends its turn: a blank line and User:, or the end" in text


def test_the_preview_uses_colour_where_there_is_some(source, tokenizer):
    text = shown(
        summarize(DataSection(train=[source]), tokenizer, "t", 64), force_terminal=True, color_system="standard"
    )
    assert "\x1b[32m It is good." in text and "⟦" not in text


def test_control_characters_do_not_reach_the_terminal(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a\x1b[31mred\x07 [bold]b[/bold]")
    text = shown(summarize(DataSection(train=[Source(path=str(path))]), tokenizer, "t", 64))
    assert "\x1b" not in text and "\x07" not in text and "␛[31mred␇ [bold]b[/bold]" in text


def test_text_files_are_listed_by_name_and_rule(tmp_path, tokenizer):
    for number in range(25):
        (tmp_path / f"{number:02}\n.txt").write_text("one\n\ntwo")
    text = shown(summarize(DataSection(train=[Source(path=str(tmp_path / "*.txt"))]), tokenizer, "t", 64))
    assert "25 files, 25 documents, one for each file; data.split_on: blank-line would make 50" in text.replace(
        "\n", " "
    )
    assert "19 .txt  (file)" in text and "20 .txt" not in text and "and 5 more files" in text


def test_run_prints_and_writes_json(source, tmp_path, capsys):
    run(DataSection(train=[source]), open_base("builtin:small"), 64, json_path=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["documents"] == 9
    assert "documents" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be written"):
        run(DataSection(train=[source]), open_base("builtin:small"), 64, json_path=tmp_path / "no" / "r.json")


def test_columns_from_the_command_line_are_checked():
    assert source_of("a", {"encoding": "cp1252", "split_on": "file", "unknown_files": "skip"}).codec() == "cp1252"
    with pytest.raises(UserError, match="a: encoding: 'zip' is no encoding of text; expected one such as utf-8"):
        source_of("a", {"encoding": "zip"})
    with pytest.raises(UserError, match=r"a: .*'refuse' or 'skip'"):
        source_of("a", {"unknown_files": "yes"})
    assert source_of("a.csv", {"prompt": "q", "completion": "a"}).prompt == "q"
    with pytest.raises(UserError, match=r"a\.csv: prompt and completion go together"):
        source_of("a.csv", {"prompt": "q"})
    told = ["delimiter=;", "where.dept=billing", "where.dept=a=b", "where.open=true", "where.n=3", "text={a}={b}"]
    source = source_of("a.csv", columns_of([*told, "on_bad_row=skip"]))
    assert source.where == {"dept": ["billing", "a=b"], "open": [True], "n": [3]} and source.text == "{a}={b}"
    assert (source.delimiter, source.on_bad_row) == (";", "skip")
    for told, problem in (
        ("delimiter=;;", r"a\.csv: delimiter: expected one character"), ("on_bad_row=no", r"a\.csv: on_bad_row: "),
        ("where.x", r"expected where\.COLUMN=VALUE"), ("wher=x", r"expected one of .*where\.COLUMN before the ="),
    ):  # fmt: skip
        with pytest.raises(UserError, match=problem):
            source_of("a.csv", columns_of([told]))


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.jsonl", '{"q": "a"}', "--column text=COLUMN or --column prompt=COLUMN --column completion=COLUMN"),
        ("a.jsonl", '{"rows": [{"q": "a"}]}', "--column explode=rows --column 'text={rows.COLUMN}'"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "--column on_bad_row=skip"),
        ("a.csv", "text;id\na;1", "--column 'delimiter=;'"),
        ("a.txt", b"caf\xe9", "--column encoding=cp1252"),
        ("", "", "--column unknown_files=skip"),
    ],
)
def test_what_to_mend_is_named_as_the_verb_takes_it(tmp_path, capsys, name, content, advice):
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        (tmp_path / "a.docx").write_text("x")
    assert main.run(["data", str(tmp_path / name)]) == 2
    assert advice in capsys.readouterr().err
    with pytest.raises(UserError) as recipe:  # what the verb was told does not outlast it
        list(read_documents(Source(path=str(tmp_path / name)), "auto"))
    assert "--column" not in str(recipe.value) and advice.split("=")[0].split()[-1].strip("'") in str(recipe.value)


def test_rows_that_are_left_out_are_told_with_reason_and_place(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, [{"text": "a", "d": "x"}, {"text": None, "d": "x"}, {"text": "b", "d": "y"}]))
    )
    source = Source(path=str(path), where={"d": ["x", "z"]}, on_bad_row="skip")
    summary = summarize(DataSection(train=[source]), tokenizer, "t", 64)
    skipped = {"column 'text' holds null": {"rows": 1, "first": [f"{path}:2"]}}
    assert summary["left_out"] == {"rows": 3, "unwanted": 1, "skipped": skipped, "never": ["d 'z'"]}
    lines = " ".join(shown(summary).split())
    assert "where leaves out 1 of 3 rows bad rows, skipped 1 of 3 rows documents 1" in lines
    assert "! skipped rows, column 'text' holds null: 1 row, first" in lines
    assert "! where asks for what no row holds: d 'z'" in lines


def test_bad_rows_are_refused_after_all_else_was_shown_and_a_copy_was_made(tmp_path, capsys):
    rows = [*ROWS[:8], {"prompt": "Name"}, {"prompt": "Why? ", "completion": "Yes."}]
    (path := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"rows\.jsonl:9: no column 'completion'"):
        run(DataSection(train=[Source(path=str(path))]), open_base("builtin:small"), 64, fix=tmp_path / "clean")
    said = capsys.readouterr().out
    assert (
        "skipped rows, no column 'completion'" in said
        and f"prompt ends in white space: 1 document, first {path}:10" in said
    )
    assert f"{tmp_path}/clean: a cleaned copy is in {tmp_path}/clean/data" in said
    assert "white space at the end of prompts removed: 1, first" in said


def test_settings_that_a_recipe_refuses_together_are_refused_here_too(source, capsys):
    assert main.run(["data", source.path, "--chat", "eos-turns", "--special-tokens", "parse"]) == 2
    assert "chat eos-turns goes with special_tokens text" in capsys.readouterr().err
