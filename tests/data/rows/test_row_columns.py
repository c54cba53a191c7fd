"""Templates over several columns, and which rows are wanted: in one form for every file format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fuzzing import deadline, fuzz
from hypothesis import given
from hypothesis import strategies as st

from peftune.config.data_section import Source
from peftune.data.documents import Document, ReadStats
from peftune.data.rows.row_columns import text_of
from peftune.data.sources import hub
from peftune.data.sources.read import read_documents
from peftune.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "tables.md"
SOURCES = {
    Path(source["path"]).stem: {key: value for key, value in source.items() if key != "path"}
    for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for source in [yaml.safe_load(block)["data"]["train"]]
    for source in (source if isinstance(source, list) else [source])
    if isinstance(source, dict)
}
"""The sources that the documentation shows, by the name of their file."""
TICKETS = (
    "id,department,priority,open,answer\n1,billing,3,TRUE,one\n2,shipping,3.0,false,two\n3,billing,,no,three\n"
    "4,sales,1,yes,four\n"
)


@pytest.fixture
def read(write: Callable[..., Path]) -> Callable[..., list[Document]]:
    """Documents of a file with this content (values that are no text are written as jsonl)."""

    def read(content: Any, name: str = "a.jsonl", **keys: Any) -> list[Document]:
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        return list(read_documents(Source(path=str(write(name, text)), **keys), "auto"))

    return read


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def test_alpaca_leaves_out_an_empty_input(read):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Wave.", "input": " \n", "output": "o/"},
        {"instruction": "Nod.", "input": None, "output": ":"},
        {"instruction": "Bow.", "output": "."},
    ]
    found = read(rows, **SOURCES["alpaca"])
    head = "### Instruction:\n"
    assert found[0].prompt == head + "Add.\n\n### Input:\n1 2\n\n### Response:"
    assert found[1].prompt == head + "Greet.\n\n### Response:"
    assert [one.prompt.count("Input") for one in found[1:]] == [0] * 4 and texts(found) == ["3", "Hi", "o/", ":", "."]


def test_dolly_puts_its_context_first(read):
    rows = [{"instruction": "Who?", "context": "Bo is 3.", "response": "Bo"}]
    rows += [{"instruction": "Why?", "context": "", "response": "So"}]
    assert [(one.prompt, one.text) for one in read(rows, **SOURCES["dolly"])] == [
        ("Bo is 3.\n\nWho?", "Bo"),
        ("Why?", "So"),
    ]


def test_dart_reads_as_lora_published_it_with_a_row_for_each_reference(read):
    """microsoft/LoRA, examples/NLG/src/format_converting_dart.py, but for the case of its relations."""
    triples = [["Mars Hill", "joined", "1973"], ["Mars Hill", "city", "Mars Hill, NC"]]
    references = [{"source": "x", "text": "It joined in 1973."}, {"source": "y", "text": "Since 1973."}]
    rows = json.dumps([{"tripleset": triples, "subtree_was_extended": False, "annotations": references}], indent=2)
    found = read(rows, "dart.json", **SOURCES["dart"])
    assert {one.prompt for one in found} == {"Mars Hill : joined : 1973 | Mars Hill : city : Mars Hill, NC"}
    assert texts(found) == ["It joined in 1973.", "Since 1973."]
    assert [one.source.rpartition(":")[2] for one in found] == ["1 entry 1", "1 entry 2"]
    [first] = read(rows, "dart.json", prompt="{tripleset}", completion="{annotations.0.text}")
    assert first.text == "It joined in 1973."


def test_webnlg_reads_its_triples_from_objects(read):
    triples = [{"subject": "A", "property": "b", "object": "C"}, {"subject": "D", "property": "e", "object": 1}]
    row = {"category": "X", "modifiedtripleset": triples, "lexicalisations": [{"lex": "first"}, {"lex": "second"}]}
    [shown] = read([row], **SOURCES["webnlg"])
    assert (shown.prompt, shown.text) == ("X: A : b : C | D : e : 1", "first")
    lex = {"text": ["one", "two"]}
    found = read([{"triples": triples, "lex": lex}], prompt="{triples}", completion="{lex.text}", explode="lex.text")
    assert [(one.prompt, one.text) for one in found] == [("A : b : C | D : e : 1", t) for t in ("one", "two")]


def test_one_department_of_a_table_with_semicolons(read):
    table = "ticket;department;priority;answer\nt1;billing;2;one\nt2;billing;3;no\nt3;sales;1;no\n"
    assert [(one.prompt, one.text) for one in read(table, "tickets.csv", **SOURCES["tickets"])] == [("t1", "one")]


def test_every_format_takes_templates_filters_and_explode(write, tmp_path, monkeypatch):
    rows = [{"a": "x", "b": ["1", "2"], "c": 1}, {"a": "y", "b": ["3"], "c": 2}, {"a": "z", "b": [], "c": 2}]
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in "abc"}), tmp_path / "a.parquet")
    paths = [write("a.jsonl", "\n".join(map(json.dumps, rows))), write("a.json", json.dumps(rows))]
    keys = {"text": "{a}{b}", "explode": "b", "where": {"c": [1, 2]}}
    for path in (*paths, tmp_path / "a.parquet"):
        assert texts(list(read_documents(Source(path=str(path), **keys), "auto"))) == ["x1", "x2", "y3"]
    write("set/train.jsonl", "\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "revision_of", lambda name: None)
    monkeypatch.setattr("peftune.data.sources.read.files_of", lambda source: None)
    assert texts(list(read_documents(Source(path="set", **keys), "auto"))) == ["x1", "x2", "y3"]
    with pytest.raises(UserError, match=r"^set: no column 'd'; found a, b, c"):
        list(read_documents(Source(path="set", text="{a}{d}"), "auto"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{a}", "x"),
        ("{{{a}}} }}{{", "{x} }{"),
        ("{ a }[[ {e}]][[ ({n})]]", "x (3)"),
        ("[[{gone}]][[{a}{gone}]][[{o.gone}]].", "."),
        ("{o.k.deep}/{o.l.1}/{o.l}", "v/two/one | two"),
        ("{l}", "one | two : 2 | three :  | true"),
        ("{t} {f} {a.b}", "true 2.5 dotted"),
        ("[a] ]] {a}", "[a] ]] x"),
        ("{x y}: é", "blank: é"),
        ("it's", "a column"),
        ("{odd", "odd"),
    ],
)
def test_a_template_is_columns_in_braces(template, expected):
    row = {
        "a": "x", "e": "", "n": 3, "t": True, "f": 2.5, "a.b": "dotted", "x y": "blank", "it's": "a column",
        "{odd": "odd", "o": {"k": {"deep": "v"}, "l": ["one", "two"]},
        "l": ["one", ["two", 2], {"p": "three", "q": None}, True],
    }  # fmt: skip
    assert text_of(row, template, "here") == expected


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{b}", "here: no column 'b' in this row; found a, o, l, e"),
        ("{o}", r"here: \{o\} is an object; name a part of it, such as \{o.k\}"),
        ("{o.x}", r"here: nothing in \{o.x\}; what may be missing stands in \[\[…\]\]"),
        ("{l}", r"here: \{l\} is nested too deep"),
        ("{e}", r"here: nothing in \{e\}"),
        ("{a", r"template '\{a': \{ at character 1; expected columns as \{column\}"),
        ("{a}}", "at character 4"),
        ("{}", "at character 1"),
        ("{ }", "at character 1"),
        ("x[[{a}", r"\[\[ at character 2"),
        ("[[{a}[[{a}]]]]", r"\[\[ at character 6"),
        ("[[a]]{a}", r"\]\] at character 4"),
    ],
)
def test_a_template_that_cannot_be_filled_says_why(template, problem):
    with pytest.raises(UserError, match=f"^{problem}|^template .*{problem}"):
        text_of({"a": "x", "o": {"k": 1}, "l": [[["deep"]]], "e": None}, template, "here")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab0"), inner, max_size=2),
)


@fuzz(200)
@given(
    template=st.text(st.sampled_from("{}[]ab. 0:"), max_size=30),
    row=st.dictionaries(st.sampled_from(["a", "b", "a.b", "{a}"]), VALUES, max_size=3),
)
def test_any_template_is_filled_or_refused(template: str, row: dict[str, Any]) -> None:
    with deadline():
        try:
            assert isinstance(text_of(row, template, "here"), str)
        except UserError as error:
            assert len(str(error)) < 400


def test_a_column_of_exactly_that_name_comes_first(read):
    assert texts(read([{"{a}": "the column", "a": "other"}], text="{a}")) == ["the column"]
    assert texts(read("{a},b\nthe column,x\n", "a.csv", text="{a}")) == ["the column"]


def test_a_misspelt_column_of_a_template_is_named(read):
    rows = [{"title": "t", "body": "b"}, {"title": "u", "body": "c"}]
    with pytest.raises(UserError, match=r"a.jsonl:1: no column 'titel' in this row; found title, body"):
        read(rows, text="{titel}: {body}")
    with pytest.raises(UserError, match=r"a.jsonl: no row has the column 'titel' of the template"):
        read(rows, text="[[{titel}: ]]{body}")
    with pytest.raises(UserError, match=r"a.csv: no column 'titel'; found title, body"):
        read("title,body\nt,b\n", "a.csv", text="[[{titel}: ]]{body}")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"department": "billing"}, ["one", "three"]),
        ({"department": ["sales", "shipping"]}, ["two", "four"]),
        ({"department": "billing", "priority": 3}, ["one"]),
        ({"priority": 3}, ["one", "two"]),
        ({"priority": 3.0}, ["one", "two"]),
        ({"priority": "3"}, ["one"]),
        ({"priority": None}, ["three"]),
        ({"open": True}, ["one", "four"]),
        ({"open": [False]}, ["two", "three"]),
        ({"open": "TRUE"}, ["one"]),
        ({"id": [1, 4]}, ["one", "four"]),
    ],
)
def test_rows_are_filtered_by_their_columns(read, where, expected):
    assert texts(read(TICKETS, "a.csv", text="answer", where=where)) == expected


def test_json_values_are_compared_as_they_are_meant(read):
    rows = [{"text": "a", "n": 3, "t": True, "tags": ["x", "y"], "meta": {"lang": "de"}}, {"text": "b", "n": "3.0"}]
    rows += [{"text": "c", "n": 1, "t": 1, "tags": [], "meta": None}]
    for where, expected in (
        ({"n": 3}, ["a", "b"]), ({"n": "3"}, ["a"]), ({"t": True}, ["a"]), ({"tags": "y"}, ["a"]),
        ({"meta.lang": "de"}, ["a"]), ({"t": None}, ["b"]), ({"tags": None}, ["b", "c"]),
    ):  # fmt: skip
        assert texts(read(rows, where=where)) == expected, where


def test_what_a_filter_left_out_is_counted(write):
    stats = ReadStats()
    source = Source(path=str(write("a.csv", TICKETS)), text="answer", where={"department": "billing"})
    assert len(list(read_documents(source, "auto", stats))) == 2
    assert (stats.left_out.rows, stats.left_out.unwanted, stats.blank) == (4, 2, 0)


def test_a_filter_that_keeps_nothing_tells_the_values_that_there_are(read):
    with pytest.raises(UserError) as caught:
        read(TICKETS, "a.csv", text="answer", where={"department": "Billing", "priority": 3})
    assert str(caught.value).endswith(
        "a.csv: where: none of 4 rows has department as asked for; department is 'billing', 'shipping', 'sales'"
    )
    with pytest.raises(UserError, match=r"has all of it, though each by itself is there; department is .*; pri"):
        read(TICKETS, "a.csv", text="answer", where={"department": "sales", "priority": 3})
    many = [{"text": "a", "n": number, "long": "x" * 500} for number in range(50)]
    with pytest.raises(UserError, match=r"n is '0', '1', .*'9', …$"):
        read(many, where={"n": 77})
    with pytest.raises(UserError, match=rf"long is '{'x' * 40}'$"):
        read(many, where={"long": "y"})


def test_a_value_that_no_row_holds_is_remembered(write):
    stats, wanted = ReadStats(), ["billing", "shippin", "sales"]
    source = Source(
        path=str(write("a.csv", TICKETS)), text="answer", where={"department": wanted, "priority": [1, 3, 9]}
    )
    assert texts(list(read_documents(source, "auto", stats))) == ["one", "four"]
    assert stats.left_out.never == ["department 'shippin'", "priority 9"]


def test_a_filter_by_a_column_that_is_not_there_names_those_that_are(read, write):
    with pytest.raises(UserError, match=r"a.csv: no column 'dept'; found id, department, priority, open, answer$"):
        read(TICKETS, "a.csv", text="answer", where={"dept": "billing"})
    with pytest.raises(UserError, match=r"a.jsonl: where: no column 'dept'; found text, id$"):
        read([{"text": "a"}, {"text": "b", "id": 1}], where={"dept": "billing"})
    with pytest.raises(UserError, match=r"a.txt: a text file has no column 'dept'"):
        read("plain text", "a.txt", where={"dept": "billing"})
    with pytest.raises(UserError, match="a built-in corpus has no column 'dept'"):
        list(read_documents(Source(path="builtin:docs/heldout", where={"dept": "x"}), "auto"))


def test_a_filter_may_keep_nothing_of_one_file_of_several(write):
    write("d/1.csv", TICKETS)
    write("d/2.csv", "department,answer\nsales,five\n")
    source = Source(path=str(write("d/3.txt", "plain").parent), text="answer", where={"department": "billing"})
    assert texts(list(read_documents(source, "auto"))) == ["one", "three", "plain"]


def test_explode_needs_a_list(read):
    with pytest.raises(UserError, match=r"a.jsonl:1: column 'b' holds a string; expected a list to explode"):
        read([{"text": "a", "b": "x"}], explode="b")
