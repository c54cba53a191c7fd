"""`--fix`: what is safe is mended in a copy, all of it is counted, and nothing else changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from peftune.config.data_section import DataSection, Source
from peftune.data.lint.clean import write_clean
from peftune.data.sources.read import read_documents
from peftune.errors import UserError

BROKEN = "café €5 é".encode().decode("cp1252")


def texts(path: Path, **options: Any) -> list[str]:
    return [one.content() for one in read_documents(Source(path=str(path), **options), "auto")]


def test_rows_are_mended_and_every_change_is_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Why? ", "completion": BROKEN, "id": 1},
        {"prompt": "Why?", "completion": "a\x07b\r\nc", "id": 2, "tags": [BROKEN], "half": "\ud800"},
        {"prompt": "Why?", "completion": "café €5 é", "id": 3},
        {"prompt": "How?", "completion": " ", "id": 4},
        {"prompt": "Where?", "id": 5},
        {"prompt": "Who?", "completion": "AKIAIOSFODNN7ABCDEFG", "id": 6},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{no json\n")
    before = path.read_bytes()
    found = write_clean(DataSection(train=[Source(path=str(path))]), tmp_path / "out")
    assert path.read_bytes() == before
    mended = [json.loads(line) for line in (tmp_path / "out/data/rows.jsonl").read_text().splitlines()]
    assert mended == [
        {"prompt": "Why?", "completion": "café €5 é", "id": 1},
        {"prompt": "Why?", "completion": "ab\nc", "id": 2, "tags": ["café €5 é"], "half": "\ud800"},
        rows[4],
        rows[5],
    ]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {kind: (one["rows"], one["first"][0].rpartition(":")[2]) for kind, one in report["changes"].items()} == {
        "mojibake turned back": (2, "1"),
        "white space at the end of prompts removed": (1, "1"),
        "line ends made LF": (1, "2"),
        "control characters removed": (1, "2"),
        "repeats of another document, left out": (1, "3"),
        "blank rows, left out": (1, "4"),
        "rows that cannot be read, left out": (1, "7"),
    }
    assert [one["what"][:34] for one in report["remaining"]] == ["what looks like a credential (a ke"]
    text = (tmp_path / "out/report.txt").read_text()
    assert text.startswith("4 of 6 documents kept, in 1 files\n") and text.splitlines() == list(found.lines())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\r\n\r\ntwo \x07\n\none\n\n\xc3\x83\xc2\xa9t\xc3\x83\xc2\xa9\n", "one\n\ntwo \n\nété\n"),
        (b"a\n\nb<|endoftext|>\n<|endoftext|>c", "a\n\nb\n<|endoftext|>\nc\n"),
        ("Ã la carte É”\n\nfine".encode(), "Ã la carte É”\n\nfine\n"),
    ],
)
def test_text_files_stay_text_files_that_are_cut_the_same_way(content: bytes, expected: str, tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(content)
    write_clean(DataSection(train=[Source(path=str(path))]), tmp_path / "out")
    copy = tmp_path / "out/data/a.txt"
    assert copy.read_text() == expected
    assert [text.strip() for text in texts(copy)] == [
        text.strip() for text in dict.fromkeys(t.replace("\x07", "").replace("Ã©", "é") for t in texts(path))
    ]


def test_a_directory_keeps_its_names_and_tables_stay_tables(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    (corpus / "a.csv").write_text('text,n\n"x ""y"", z",1\n"x ""y"", z",2\n')
    (corpus / "b/a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    write_clean(DataSection(train=[str(corpus), str(corpus / "a.csv")]), tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path / "out/data")) for path in (tmp_path / "out/data").rglob("*.*"))
    assert names == ["a.csv", "b/a.jsonl"]  # of the second source nothing was left
    with (tmp_path / "out/data/a.csv").open() as file:
        assert list(csv.reader(file)) == [["text", "n"], ['x "y", z', "1"]]
    assert texts(tmp_path / "out/data/b") == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("a.txt", "a.txt", "a.txt: exists; give a directory that does not"),
        (".", "new", "new: lies within .* and would be read with it"),
        ("builtin:docs/train", "new", "only files can be cleaned"),
        ("blank.jsonl", "new", "not written, for no document would be left"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    source: str, out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}')
    path = source if ":" in source else str(tmp_path / source)
    with pytest.raises(UserError, match=message):
        write_clean(DataSection(train=[Source(path=path)]), tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "blank.jsonl"]
