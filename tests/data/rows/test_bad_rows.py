"""Rows that cannot be learnt from: refused with how many there are, or skipped and counted with their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.config.data_section import Source
from peftune.data.documents import ReadStats
from peftune.data.rows import row_documents
from peftune.data.sources.read import read_documents
from peftune.data.tokens.store import prepare
from peftune.errors import UserError

PAIRS = [
    '{"prompt": "p", "completion": "one"}',
    '{"prompt": "p"}',
    '{"prompt": "p", "completion": 42}',
    '{"prompt": "p", "completion": null}',
    '{"prompt": "p", "completion": ["x"]}',
    '{"prompt": "p", "comple',
    '["x"]',
    '{"prompt": "p", "completion": " "}',
    '{"prompt": "p", "completion": null}',
    '{"prompt": "\\ud800", "completion": "x"}',
    '{"prompt": "p", "completion": true}',
]
CHATS = [
    [{"role": "user", "content": "u"}, {"role": "assistant", "content": "one"}],
    [{"role": "bot", "content": "u"}, {"role": "assistant", "content": "x"}],
    [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "u"}],
    "hello",
    None,
    [{"role": "user", "content": "u"}, {"role": "assistant", "content": "two"}],
]


@pytest.fixture
def source(write: Callable[..., Path]) -> Callable[..., Source]:
    def source(content: list[str] | str, name: str = "a.jsonl", **keys: Any) -> Source:
        return Source(path=str(write(name, content if isinstance(content, str) else "\n".join(content))), **keys)

    return source


def skipping(source: Source) -> tuple[list[str], dict[str, tuple[int, list[str]]]]:
    """The texts of a source whose bad rows are skipped, and what was skipped, by the line alone."""
    stats = ReadStats()
    texts = [one.text for one in read_documents(source.model_copy(update={"on_bad_row": "skip"}), "auto", stats)]
    skipped = stats.left_out.skipped.items()
    lines = {why: [place.rpartition(f"{source.path}:")[2] for place in group.first] for why, group in skipped}
    return texts, {why: (group.rows, lines[why]) for why, group in skipped}


def refusal(source: Source) -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(source, "auto"))
    message = str(caught.value).replace(source.path, "a")
    assert "\n" not in message and len(message) < 600
    return message


def test_skipped_rows_are_counted_by_reason_with_the_first_places(source):
    texts, skipped = skipping(source(PAIRS))
    assert texts == ["one", "42", "true"]
    assert skipped == {
        "no column 'completion' in this row": (1, ["2"]),
        "column 'completion' holds null": (2, ["4", "9"]),
        "column 'completion' holds a list": (1, ["5"]),
        "not JSON": (1, ["6"]),
        'expected an object such as {"text": …}': (1, ["7"]),
        "column 'prompt' holds half a character (surrogate)": (1, ["10"]),
    }


def test_a_refusal_says_how_many_rows_are_bad_and_what_to_do(source):
    assert refusal(source(PAIRS)) == (
        "a:2: no column 'completion' in this row; found prompt. 7 of 11 rows cannot be used (column 'completion' holds "
        "null: 2; no column 'completion' in this row: 1; column 'completion' holds a list: 1): mend them, or leave "
        "them out with on_bad_row: skip"
    )
    assert "1 of 3 rows cannot be used: mend" in refusal(source(PAIRS[:3]))


def test_a_first_row_may_be_bad(source):
    texts, skipped = skipping(source([PAIRS[1], PAIRS[5], PAIRS[0]]))
    assert texts == ["one"] and [count for count, _ in skipped.values()] == [1, 1]


def test_chats_that_cannot_be_read_are_skipped(source, tokenizer, tmp_path):
    chats = source([json.dumps({"messages": chat}) for chat in CHATS[1:] + CHATS[:1]])
    texts, skipped = skipping(chats)
    assert texts == ["User: u\n\nAssistant: two", "User: u\n\nAssistant: one"]
    assert skipped == {
        "role 'bot'": (1, ["1: message 1"]),
        "content is null": (1, ["2: message 1"]),
        "no message of the assistant": (1, ["3"]),
        "messages are a text that is not JSON": (1, ["4"]),
        "expected a list of messages, found null": (1, ["5"]),
    }
    skip = chats.model_copy(update={"on_bad_row": "skip"})
    assert prepare([skip], tokenizer, "t", " ", "auto", tmp_path / "cache").report.chats == [2]


def test_rows_of_another_length_are_skipped_and_an_open_quote_is_not(source):
    table = "text,id\none,1\ntwo\nthree,3,3\nfour,4\n"
    assert skipping(source(table, "a.csv")) == (
        ["one", "four"],
        {f"{count} fields, but the header has 2": (1, [line]) for count, line in ((1, "3"), (3, "4"))},
    )
    assert "2 of 4 rows cannot be used" in refusal(source(table, "a.csv"))
    for broken in ('text\none\n"two\nthree\n', 'text\none\n"two" x\nthree\n'):
        with pytest.raises(UserError, match=r"a.csv:3: not CSV"):
            skipping(source(broken, "a.csv"))


def test_a_broken_list_is_refused_and_its_bad_entries_are_skipped(source):
    entries = '[{"text": "one"}, 5, {"text": null}, {"text": "two"}'
    texts, skipped = skipping(source(entries + "]", "a.json"))
    assert texts == ["one", "two"] and sum(count for count, _ in skipped.values()) == 2
    with pytest.raises(UserError, match=r"a.json:4: not JSON"):
        skipping(source(entries, "a.json"))


def test_a_file_of_bad_rows_alone_is_refused_either_way(source, write):
    bad = source([PAIRS[3]] * 3)
    for on_bad_row in ("skip", "refuse"):
        message = refusal(bad.model_copy(update={"on_bad_row": on_bad_row}))
        assert message == "a:1: column 'completion' holds null; expected a string (none of the 3 rows can be used)"
    write("d/1.jsonl", PAIRS[0])
    folder = write("d/2.jsonl", '{"question": "x"}\n{"question": "y"}').parent
    with pytest.raises(UserError, match=r"2.jsonl:1: no column 'text'; found question; .*none of the 2 rows"):
        skipping(Source(path=str(folder)))


def test_rows_that_are_not_wanted_are_not_judged(source):
    rows = ['{"text": null, "d": "x"}', '{"text": "one", "d": "y"}']
    assert skipping(source(rows, where={"d": "y"})) == (["one"], {})
    assert [one.text for one in read_documents(source(rows, where={"d": "y"}), "auto")] == ["one"]


def test_counting_on_ends(source, monkeypatch):
    monkeypatch.setattr(row_documents.RowReader.documents, "__defaults__", (3,))
    rows = ['{"text": "one"}', '{"text": null}', *['{"text": "x"}', "broken"] * 50]
    assert "2 of the first 5 rows cannot be used" in refusal(source(rows))
    assert "4 of the first 5 rows cannot be used" in refusal(source(rows[:2] + ["broken"] * 50))


def test_many_reasons_are_kept_together(source):
    rows = [json.dumps({"messages": [{"role": f"r{number}", "content": "x"}]}) for number in range(30)]
    _, skipped = skipping(source([*rows, json.dumps({"messages": CHATS[0]})]))
    assert len(skipped) == 13 and skipped["other reasons"][0] == 18


def test_what_was_skipped_is_remembered_with_the_tokens_and_refused_all_the_same(source, tokenizer, tmp_path):
    skip = source(PAIRS, on_bad_row="skip")
    stores = [prepare([skip], tokenizer, "t", " ", "auto", tmp_path) for _ in range(2)]
    assert stores[0].left_out == stores[1].left_out and stores[1].left_out.rows == 11 and len(stores[1]) == 3
    assert stores[1].left_out.skipped["column 'completion' holds null"].rows == 2
    with pytest.raises(UserError, match="7 of 11 rows cannot be used"):
        prepare([skip.model_copy(update={"on_bad_row": "refuse"})], tokenizer, "t", " ", "auto", tmp_path)
