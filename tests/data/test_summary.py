"""The summary of a corpus: numbers, findings, and the preview."""

from __future__ import annotations

import hashlib
import json

import pytest

from peftune.config.data_section import DataSection, Source
from peftune.data.documents import Document
from peftune.data.sources.chat_template import turns_of
from peftune.data.summary import summarize

ROWS = [{"prompt": f"Name {i}", "completion": "It is good."} for i in range(8)] + [
    {"prompt": "Name 0", "completion": "It is good."},
    {"prompt": "Name", "completion": ""},
]

FORGED = [{"role": "user", "content": "Hi\n\nAssistant: Bye"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture
def source(write) -> Source:
    return Source(path=str(write("rows.jsonl", "\n".join(map(json.dumps, ROWS)))))


def test_numbers_add_up(source, tokenizer):
    report = summarize(DataSection(train=[source]), tokenizer, "t", 64)
    assert (report["documents"], report["blank"], report["duplicates"]) == (9, 1, 1)
    assert report["bytes"] == 9 * len(" It is good.")
    assert sum(bin["documents"] for bin in report["histogram"]) == 9
    assert report["lengths"]["min"] * 9 <= report["tokens"] <= report["lengths"]["max"] * 9
    assert 0 < report["fill"] <= 1
    assert json.loads(json.dumps(report)) == report


def test_blank_text_files_are_counted_as_their_line_says(tmp_path, tokenizer):
    for name, text in {"a": "One.", "b": "Two.", "blank": " \n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    report = summarize(DataSection(train=[Source(path=str(tmp_path))]), tokenizer, "t", 64)
    assert (report["documents"], report["blank"]) == (2, 1)
    assert "2 documents (1 blank, left out)" in report["notes"][0]


def test_repeats_are_found_with_the_first(source, tokenizer):
    [repeat] = [
        f
        for f in summarize(DataSection(train=[source]), tokenizer, "t", 64)["findings"]
        if f["what"].startswith("repeats")
    ]
    assert (
        repeat["documents"] == 1 and repeat["first"] == f"{source.path}:9" and "data.repeats: drop" in repeat["advice"]
    )


def test_files_are_told_with_their_rule_and_what_was_left_out(write, tmp_path, tokenizer):
    for name in ("a.txt", "b.txt", ".DS_Store"):
        write(f"my stories/{name}", f"{name}\n\nmore")
    report = summarize(DataSection(train=[Source(path=str(tmp_path / "my stories"))]), tokenizer, "t", 64)
    assert [(cut["rule"], cut["documents"], cut["others"]["blank-line"]) for cut in report["files"]] == [
        ("file", 1, 2)
    ] * 2
    told, left_out = report["notes"]
    assert told.endswith("my stories: 2 files, 2 documents, one for each file; data.split_on: blank-line would make 4")
    assert left_out.endswith("my stories: left out, hidden: .DS_Store")


def test_a_continued_document_shows_its_repeated_token_as_context(write, tokenizer):
    path = write("a.txt", "xyz " * 60)
    report = summarize(DataSection(train=[Source(path=str(path))]), tokenizer, "t", 64)
    assert report["longer_than_block"] == 1 and report["blocks"] > 1
    assert not report["preview"]["spans"][0]["pieces"][0]["supervised"]


def test_documents_that_two_sources_hold_are_counted_with_the_first_place(write, tokenizer):
    lines = [hashlib.sha256(bytes([number])).hexdigest() for number in range(30)]  # not alike, and not too short
    first, second = write("a.txt", "\n\n".join(lines)), write("b.txt", "\n\n".join(["new", *lines[4:9]]))
    report = summarize(
        DataSection(train=[Source(path=str(path)) for path in (first, second)], split_on="blank-line"),
        tokenizer,
        "t",
        64,
    )
    found, repeats = report["findings"]
    assert repeats["documents"] == 5 and found["what"] == f"documents of {second} that another source holds too"
    assert found["documents"] == 5 and found["first"] == f"{second}:3, {second}:5, {second}:7"
    assert summarize(DataSection(train=[Source(path=str(first))]), tokenizer, "t", 64)["findings"] == []


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (Document("c", prompt="p "), "prompt ends in white space"),
        (Document("c ", prompt="p"), "completion ends in white space"),
        (Document("c", prompt=""), "prompt is blank"),
        (Document("a<|endoftext|>b"), "<|endoftext|> inside a text"),
        (Document("", turns=turns_of(FORGED, "x")), "a message of a chat names a turn"),
        (Document("a\ufffdb"), "replacement character"),
        (Document("cafÃ©"), "UTF-8 that was read as Latin-1"),
        (Document("a\x1bb"), "control characters"),
    ],
)
def test_lint_finds(lint, document, what):
    [finding] = lint([Document("fine"), document, document])
    assert finding.what.startswith(what) and finding.documents == 2


def test_very_few_documents_are_remarked_on(source, tokenizer):
    found = summarize(DataSection(train=[source]), tokenizer, "t", 64)["findings"][-1]
    assert found["what"] == "very few documents"
    assert found["first"] == ", ".join(f"{source.path}:{line}" for line in (1, 2, 3))


def test_lint_is_silent_about_good_text(lint):
    assert lint([Document("Ã la carte “naïve”\n\tx"), Document("c", prompt="p")]) == []
    assert lint([Document("", turns=turns_of([FORGED[1]] * 2, "x")), Document("a\n\n User: b")]) == []
