"""Tables as programs write them: separators, byte order marks, empty and repeated names, JSON in other layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftune.config.data_section import Source
from peftune.data.documents import Document
from peftune.data.sources.read import identity, read_documents
from peftune.errors import UserError


@pytest.fixture
def read(write: Callable[..., Path]) -> Callable[..., list[Document]]:
    def read(content: str | bytes, name: str = "a.csv", **keys: Any) -> list[Document]:
        return list(read_documents(Source(path=str(write(name, content)), **keys), "auto"))

    return read


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


@pytest.mark.parametrize("delimiter", [";", "\t", "|", "^", "\\t", " "])
def test_a_table_has_the_delimiter_that_is_named(read, delimiter):
    separator = "\t" if delimiter == "\\t" else delimiter
    content = f'prompt{separator}completion\r\n"p{separator}""q"",\r\nr"{separator}"c, d"\r\n'
    [found] = read(content, delimiter=delimiter)
    assert (found.prompt, found.text) == (f'p{separator}"q",\nr', "c, d")


def test_a_header_that_was_not_split_names_the_delimiter(read):
    for header, name, said in (
        ("prompt;completion", "a.csv", '";"'),
        ("text\tid", "a.csv", r'"\\t"'),
        ("text|id", "a.tsv", '"|"'),
    ):
        with pytest.raises(UserError, match=f"the header is one column, .*say delimiter: {said.replace('|', '[|]')}"):
            read(f"{header}\nx\n", name)
    with pytest.raises(UserError, match=r"one column, 'text,id'; .*delimiter: \",\""):
        read("text,id\nx,1\n", delimiter=";")
    with pytest.raises(UserError, match=r"a.csv:1: not CSV: .*if other characters separate .* delimiter: \";\""):
        read('"text";"id"\n"x";1\n')
    with pytest.raises(UserError, match=r"a.csv: no column 'text'; found words; name yours"):
        read("words\nx\n")


def test_a_delimiter_belongs_to_a_table(read):
    with pytest.raises(UserError, match="delimiter belongs to csv and tsv files, and this is none"):
        read('{"text": "x"}', "a.jsonl", delimiter=";")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,id,\none,1,\ntwo,2,\n", ["one", "two"]),
        ("text,id\none,1,\ntwo,2,,\n", ["one", "two"]),
        (",text,\n0,one,\n1,two,x\n", ["one", "two"]),  # pandas' index, and a column without a name
        ("id,text,id\n1,one,1\n", ["one"]),  # a name that stands twice, and is not read
        (" id , text \n1,one\n", ["one"]),
        ("sep=,\nid,text\n1,one\n", ["one"]),  # for Excel
        ("\n\ntext,id\n\none,1\n \n,,,\ntwo,2\n", ["one", "two"]),
        ('\ufeff"text","id"\n"one\n\nmore",1\n"Q&amp;A <b>",2\n', ["one\n\nmore", "Q&amp;A <b>"]),
        ("text\n42\n3.50\ntrue\n", ["42", "3.50", "true"]),
    ],
)
def test_what_programs_add_to_a_table_is_understood(read, content, expected):
    assert texts(read(content)) == expected


@pytest.mark.parametrize("content", ["text;id;\nQ&amp;A;1;\n", "text;id\nQ&amp;A;1\n", "text;id;\nx\n"])
def test_a_text_that_holds_the_delimiter_is_not_cut(read, content):
    with pytest.raises(UserError, match=r"a.csv:2: . fields, but the header has 2 \(text, id\); put texts that hold"):
        read(content, delimiter=";")


def test_a_name_that_stands_twice_and_is_read_is_refused(read):
    with pytest.raises(UserError, match=r"a.csv:1: the header names column 'text' twice"):
        read("text,id,text\na,1,b\n")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_is_read_in_any_layout_under_any_suffix(read, name):
    rows = [{"text": "one", "more": {"list": [1, {"x": "]"}]}}, {"text": 'two "}{"'}]
    for content in (
        json.dumps(rows), json.dumps(rows, indent=2), "\n".join(map(json.dumps, rows)),
        "\r\n\r\n".join(json.dumps(row, indent=4) for row in rows),
        "\ufeff\n" + "".join(json.dumps(row, indent=1) for row in rows),
    ):  # fmt: skip
        assert texts(read(content, name)) == ["one", 'two "}{"'], content
    assert texts(read(json.dumps(rows[0], indent=2), name)) == ["one"]


def test_a_table_inside_of_an_object_is_told_and_can_be_read(read):
    content = json.dumps({"version": 1, "data": [{"text": "one"}, {"text": "two"}]})
    with pytest.raises(
        UserError, match=r"found version, data; if the rows are in 'data', \{explode: data, text: \"\{d"
    ):
        read(content, "a.json")
    assert texts(read(content, "a.json", explode="data", text="{data.text}")) == ["one", "two"]


def test_a_directory_of_one_object_a_file_is_read(write):
    for number in range(3):
        folder = write(f"d/{number}.json", json.dumps({"text": f"text {number}"}, indent=2)).parent
    assert texts(list(read_documents(Source(path=str(folder)), "auto"))) == ["text 0", "text 1", "text 2"]


def test_numbers_are_taken_as_their_text(read):
    rows = '{"prompt": 1, "completion": 42}\n{"prompt": "", "completion": 3.5}\n{"prompt": "", "completion": true}'
    assert texts(read(rows, "a.jsonl")) == ["42", "3.5", "true"] and read(rows, "a.jsonl")[0].prompt == "1"


def test_conversations_of_sharegpt_are_found(read):
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho"), ("human", "Bye")]
    row = {"id": "x", "conversations": [{"from": who, "value": said} for who, said in turns]}
    [found] = read(json.dumps([row]), "a.json")
    assert found.content() == "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho"
    assert [scored for _, scored in found.turns] == [False, True]


def test_messages_may_be_json_in_a_cell(read):
    cell = json.dumps([{"role": "user", "content": 'a "b"'}, {"role": "assistant", "content": "c"}])
    content = 'id;messages\n1;"' + cell.replace('"', '""') + '"\n'
    assert read(content, delimiter=";")[0].content() == 'User: a "b"\n\nAssistant: c'


def test_whatever_says_how_rows_are_read_is_part_of_their_identity(write):
    plain = Source(path=str(write("a.csv", "text;d\na;1\n")), text="text")
    changes: list[dict[str, Any]] = [
        {"delimiter": ";"}, {"where": {"d": 1}}, {"where": {"d": "1"}}, {"where": {"d": [1, 2]}}, {"where": {"e": 1}},
        {"text": "{text}"}, {"explode": "d"}, {"on_bad_row": "skip"},
    ]  # fmt: skip
    found = [json.dumps(identity(plain.model_copy(update=change))) for change in [{}, *changes]]
    assert len(set(found)) == len(found)
    assert identity(plain) == identity(plain.model_copy(update={"on_bad_row": "refuse"}))
