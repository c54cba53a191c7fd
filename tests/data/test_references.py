"""Test sets and texts as files: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftune.config.data_section import Source
from peftune.data.references import Item, read_hypotheses, read_items, read_references, write_hypotheses
from peftune.errors import UserError

ROWS = [("a, b", "one"), ("c", "two"), ("a, b", 'three "x"'), ("c", " "), ("d", "four\nlines")]
ITEMS = [Item("a, b", ("one", 'three "x"')), Item("c", ("two",)), Item("d", ("four\nlines",))]


def written(path: Path) -> Path:
    """The rows, as the suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"mr": [mr for mr, _ in ROWS], "ref": [ref for _, ref in ROWS]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr, ref in ROWS))
    else:
        gap = "," if path.suffix == ".csv" else "\t"
        fields = [("mr", "ref"), *ROWS]
        path.write_text("".join(gap.join('"' + f.replace('"', '""') + '"' for f in row) + "\n" for row in fields))
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_with_the_same_prompt_are_one_item_wherever_they_stand(tmp_path: Path, suffix: str) -> None:
    source = Source(path=str(written(tmp_path / f"t.{suffix}")), prompt="mr", completion="ref")
    assert read_items(source) == read_references(source) == ITEMS


def test_of_a_conversation_the_last_turn_is_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    said = [("user", "Hello."), ("assistant", "Hi."), ("user", "Bye."), ("assistant", "Farewell."), ("user", "?")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    assert read_items(Source(path=str(path))) == [
        Item("User: Hello.\n\nAssistant: Hi.\n\nUser: Bye.\n\nAssistant:", (" Farewell.",), is_chat=True)
    ]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    texts = [" spaces  around\n", "two\n\n lines\u2028and\x0bmore", ""]
    for name in ("h.jsonl", "h.txt"):
        write_hypotheses(tmp_path / name, ITEMS, texts)
    assert (tmp_path / "h.txt").read_text(encoding="utf-8") == "spaces  around\ntwo lines and more\n\n"
    assert read_hypotheses(tmp_path / "h.txt") == (["spaces  around", "two lines and more", ""], None)
    assert read_hypotheses(tmp_path / "h.jsonl") == ([text.strip() for text in texts], ITEMS)
    assert read_references(Source(path=str(tmp_path / "h.jsonl"))) == ITEMS


def test_references_of_the_e2e_challenge_are_lines_with_blank_lines_between_items(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("one \r\ntwo\r\n \r\n\r\nthree\r\n")
    assert read_references(Source(path=str(path))) == [Item(None, ("one", "two")), Item(None, ("three",))]
    path.write_text("one\ntwo\n")
    assert read_references(Source(path=str(path))) == [Item(None, ("one",)), Item(None, ("two",))]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", '{"text": "a"}\n', r"t.jsonl:1: a text without a prompt; a test set has prompts and completions"),
        ("t.txt", "", "item 1 has no reference"),
        ("t.jsonl", '{"prompt": "a", "completion": " "}\n', "no item found \\(1 without a completion\\)"),
        (
            "t.jsonl",
            '{"prompt": "a", "references": [1]}\n',
            "t.jsonl:1: references is a list; expected a list of texts",
        ),
        ("t.jsonl", '{"prompt": "a", "references": []}\n', "item 1 has no reference"),
        ("nowhere.jsonl", None, "nowhere.jsonl: no such file"),
    ],
)
def test_references_that_cannot_be_used_are_refused(
    tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        read_references(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"hypothesis": "a"}\n{"hypothesis": 3}\n', "h.jsonl:2: hypothesis is a number; expected"),
        ('{"text": "a"}\n', 'h.jsonl:1: no hypothesis; expected {"hypothesis": "text"} in every row'),
        ('{"hypothesis": "a", "references": 5}\n', "h.jsonl:1: references is a number; expected a list of texts"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "h.jsonl").write_text(content)
    with pytest.raises(UserError, match=reason):
        read_hypotheses(tmp_path / "h.jsonl")
