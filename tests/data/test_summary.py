"""`peftune data`: the numbers, the findings, and a preview that can be read without colour."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from peftune.config.recipe import Source
from peftune.data.documents import Document
from peftune.data.lint import lint
from peftune.data.summary import describe, render, run, source_of
from peftune.errors import UserError

ROWS = [{"prompt": f"Name {i}", "completion": "It is good."} for i in range(8)] + [
    {"prompt": "Name 0", "completion": "It is good."},
    {"prompt": "Name", "completion": ""},
]


@pytest.fixture
def source(write) -> Source:
    return Source(path=str(write("rows.jsonl", "\n".join(map(json.dumps, ROWS)))))


def shown(report: dict, **options: object) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    render(report, console)
    return console.file.getvalue()


def test_numbers_add_up(source, tokenizer):
    report = describe([source], tokenizer, "t", 64)
    assert (report["documents"], report["blank"], report["duplicates"]) == (9, 1, 1)
    assert report["bytes"] == 9 * len(" It is good.")
    assert sum(bin["documents"] for bin in report["histogram"]) == 9
    assert report["lengths"]["min"] * 9 <= report["tokens"] <= report["lengths"]["max"] * 9
    assert 0 < report["fill"] <= 1
    assert json.loads(json.dumps(report)) == report


def test_the_preview_marks_what_is_scored_without_colour(source, tokenizer):
    text = shown(describe([source], tokenizer, "t", 64))
    assert "⟦ It is good.<|endoftext|>⟧" in text and "<|endoftext|>Name 0⟦" in text


def test_the_preview_uses_colour_where_there_is_some(source, tokenizer):
    text = shown(describe([source], tokenizer, "t", 64), force_terminal=True, color_system="standard")
    assert "\x1b[32m It is good." in text and "⟦" not in text


def test_control_characters_do_not_reach_the_terminal(write, tokenizer):
    path = write("a.txt", "a\x1b[31mred\x07 [bold]b[/bold]")
    text = shown(describe([Source(path=str(path))], tokenizer, "t", 64))
    assert "\x1b" not in text and "\x07" not in text and "␛[31mred␇ [bold]b[/bold]" in text


def test_a_continued_document_shows_its_repeated_token_as_context(write, tokenizer):
    path = write("a.txt", "xyz " * 60)
    report = describe([Source(path=str(path))], tokenizer, "t", 64)
    assert report["longer_than_block"] == 1 and report["blocks"] > 1
    assert not report["preview"]["spans"][0]["pieces"][0]["supervised"]


def test_run_prints_and_writes_json(source, tokenizer, tmp_path, capsys):
    run([source.path], tokenizer, "t", 64, json_path=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["documents"] == 9
    assert "documents" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be written"):
        run([source.path], tokenizer, "t", 64, json_path=tmp_path / "no" / "r.json")


def test_columns_from_the_command_line_are_checked():
    assert source_of("a.csv", {"prompt": "q", "completion": "a"}).prompt == "q"
    with pytest.raises(UserError, match=r"a\.csv: prompt and completion go together"):
        source_of("a.csv", {"prompt": "q"})


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (Document("c", prompt="p "), "prompt ends in white space"),
        (Document("c ", prompt="p"), "completion ends in white space"),
        (Document("c", prompt=""), "prompt is blank"),
        (Document("a<|endoftext|>b"), "<|endoftext|> inside a text"),
        (Document("a\ufffdb"), "replacement character"),
        (Document("cafÃ©"), "UTF-8 that was read as Latin-1"),
        (Document("a\x1bb"), "control characters"),
    ],
)
def test_lint_finds(document, what):
    [finding] = lint([Document("fine"), document, document])
    assert finding.what.startswith(what) and finding.documents == 2


def test_very_few_documents_are_remarked_on(source, tokenizer):
    assert describe([source], tokenizer, "t", 64)["findings"][-1]["what"] == "very few documents"


def test_lint_is_silent_about_good_text():
    assert lint([Document("Ã la carte “naïve”\n\tx"), Document("c", prompt="p")]) == []
