"""Every format gives the same documents, streamed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftune.config.data_section import Source
from peftune.data.documents import Document
from peftune.data.sources import hub
from peftune.data.sources.read import ReadStats, files_of, holds_chat, identity, read_documents
from peftune.errors import UserError

TEXTS = ["One.", 'Two "quoted", with\na line.', "Drei äöü 🙂"]


def read(path: object, split_on: str = "auto", **columns: str) -> list[Document]:
    return list(read_documents(Source(path=str(path), **columns), split_on))


def texts(path: object, split_on: str = "auto", **columns: str) -> list[str]:
    return [document.text for document in read(path, split_on, **columns)]


def csv_of(rows: list[list[str]], separator: str) -> str:
    quoted = [separator.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    return "\r\n".join(quoted) + "\r\n"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "json-lines"])
def test_every_format_of_rows_gives_the_same_documents(kind, write, tmp_path):
    rows = [{"text": text} for text in TEXTS]
    if kind == "jsonl":
        path = write("a.jsonl", "\n".join(map(json.dumps, rows)))
    elif kind == "json-lines":
        path = write("a.json", "\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "json":
        path = write("a.json", json.dumps(rows, indent=2))
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), path, row_group_size=2)
    else:
        path = write(f"a.{kind}", csv_of([["text"], *([text] for text in TEXTS)], "," if kind == "csv" else "\t"))
    assert texts(path) == TEXTS


def test_a_place_names_the_line_or_row(write, tmp_path):
    assert [d.source.rsplit(":")[-1] for d in read(write("a.jsonl", '{"text":"a"}\n\n{"text":"b"}\n'))] == ["1", "3"]
    assert [d.source.rsplit(":")[-1] for d in read(write("a.csv", 'text\n"a\nb"\nc\n'))] == ["2", "4"]
    assert [d.source.rsplit(":")[-1] for d in read(write("a.txt", "\na\nb\n\n\nc\n"))] == ["2", "6"]
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert [d.source.rsplit(":")[-1] for d in read(tmp_path / "a.parquet")] == ["1", "2"]


def test_columns_are_found_by_their_names(write):
    pair = write("pair.jsonl", '{"id": 1, "prompt": "p", "completion": "c"}')
    assert read(pair) == [Document("c", prompt="p", source=f"{pair}:1")]
    plain = write("plain.jsonl", '{"text": "t", "prompt": "p", "completion": "c"}')
    assert read(plain) == [Document("t", source=f"{plain}:1")]
    chat = write("chat.jsonl", '{"messages": [{"role": "assistant", "content": "hi"}]}')
    assert read(chat)[0].turns == (("Assistant:", False), (" hi", True))


def test_columns_can_be_named(write):
    path = write("a.csv", "question,answer\nq,a\n")
    assert read(path, prompt="question", completion="answer")[0].content() == "q\x00a"
    assert texts(path, text="answer") == ["a"]
    talk = write("a.jsonl", '{"talk": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}')
    assert read(talk, messages="talk")[0].turns == (("User: u\n\nAssistant:", False), (" a", True))


def test_messages_in_parquet_are_read(tmp_path):
    messages = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "chat.parquet")
    assert read(tmp_path / "chat.parquet")[0].content() == "User: u\n\nAssistant: a"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_encodings_announced_by_a_byte_order_mark_are_read(encoding, name, write):
    content = {"a.txt": "grün 🙂", "a.jsonl": '{"text": "grün 🙂"}', "a.csv": "text\ngrün 🙂\n"}[name]
    if encoding.endswith("-bom"):
        data = ("\ufeff" + content).encode(encoding.removesuffix("-bom"))
    else:
        data = content.encode(encoding)
    assert texts(write(name, data)) == ["grün 🙂"]


def test_line_ends_become_line_feeds_in_every_format(write):
    assert texts(write("a.txt", "a\r\nb\rc\n")) == ["a\nb\nc"]
    assert texts(write("a.jsonl", '{"text": "a\\r\\nb\\rc"}\r\n')) == ["a\nb\nc"]
    assert texts(write("a.csv", 'text\r\n"a\r\nb\rc"\r\n')) == ["a\nb\nc"]


def test_nul_and_unusual_line_separators_stay_in_the_text(write):
    assert texts(write("a.txt", "a\0b\u2028c\x85d\x0ce")) == ["a\0b\u2028c\x85d\x0ce"]
    assert texts(write("a.jsonl", '{"text": "a\u2028b"}\n{"text": "c\\u0000"}')) == ["a\u2028b", "c\0"]


def test_blank_documents_are_skipped_and_counted(write):
    rows = '{"text": ""}\n{"text": "a"}\n{"text": " \\n\\t"}\n'
    stats = ReadStats()
    assert len(list(read_documents(Source(path=str(write("a.jsonl", rows))), "auto", stats))) == 1
    pair = write("b.jsonl", '{"prompt": "p", "completion": " "}\n{"prompt": "", "completion": "c"}\n')
    assert len(list(read_documents(Source(path=str(pair)), "auto", stats))) == 1
    assert stats.blank == 3


def test_a_directory_gives_all_its_files_in_order(write, tmp_path):
    for name, content in (("b.txt", "b"), ("a/c.jsonl", '{"text": "c"}'), ("a/.hidden.txt", "no"), ("z.py", "z = 1")):
        write(f"corpus/{name}", content)
    write("corpus/picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    assert texts(tmp_path / "corpus") == ["c", "b", "z = 1"]


def test_a_glob_gives_the_files_it_matches(write, tmp_path):
    for name, text in (("x/1.txt", "one"), ("x/y/2.txt", "two"), ("x/3.md", "three")):
        write(name, text)
    assert texts(tmp_path / "x" / "*.txt") == ["one"]
    assert texts(tmp_path / "x" / "**" / "*.txt") == ["one", "two"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write):
    assert texts(write("a[1].txt", "it")) == ["it"]


def test_builtin_corpora_are_sources():
    assert len(read("builtin:docs/heldout")) > 10
    with pytest.raises(UserError, match="builtin:DOMAIN/PART"):
        read("builtin:poems/train")
    with pytest.raises(UserError, match="PART one of base, train, heldout"):
        read("builtin:docs")


def test_a_large_json_list_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("peftune.data.sources.records._CHUNK", 7)
    long = [{"text": "x" * length + '"]},{'} for length in range(1, 60)]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(long, indent=1))
    assert texts(tmp_path / "a.json") == [row["text"] for row in long]


def test_reading_is_lazy(write):
    documents = read_documents(Source(path=str(write("a.jsonl", '{"text": "a"}\nbroken\n'))), "auto")
    assert next(documents).text == "a"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        next(documents)


def test_identity_follows_content_and_columns_not_the_path(write):
    a, b = write("a.txt", "same"), write("b.txt", "same")
    assert identity(Source(path=str(a))) == identity(Source(path=str(b)))
    assert identity(Source(path=str(a))) != identity(Source(path=str(write("c.txt", "other"))))
    rows = str(write("a.jsonl", '{"text": "a", "body": "b"}'))
    assert identity(Source(path=rows)) != identity(Source(path=rows, text="body"))
    assert identity(Source(path=rows, text="body")) != identity(Source(path=rows, messages="body"))


def test_names_without_a_file_are_hub_data_sets_only_if_they_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files_of(Source(path="someone/poems")) is None
    assert files_of(Source(path="poems")) is None
    for path in ("./poems", "poems.txt", "a/b/c", "/no/such", "data/poems.jsonl", "~no-such-user/x"):
        with pytest.raises(UserError, match="no such file"):
            files_of(Source(path=path))


def test_a_mistyped_path_names_the_nearest(write, tmp_path):
    write("poems.txt", "a")
    with pytest.raises(UserError, match=r"poms\.txt: no such file; did you mean .*poems\.txt\?"):
        read(tmp_path / "poms.txt")


def test_rows_of_a_data_set_are_streamed(write, tmp_path):
    """`stream` takes what `datasets.load_dataset` takes; a directory stands in for the hub."""
    write("set/train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    rows = list(hub.rows(Source(path=str(tmp_path / "set")), None, lambda names: names))
    assert [row for _, row in rows] == [{"text": "a"}, {"text": "b"}]
    assert rows[1][0].endswith("/train:2")
    with pytest.raises(UserError, match=r"^hub data set .* could not be loaded: Bad split: nosplit"):
        list(hub.rows(Source(path=str(tmp_path / "set"), split="nosplit"), None, lambda names: names))


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub.revision_of.cache_clear()
    with pytest.raises(UserError, match=r"^no file nobody/poems and no hub data set of that name could be loaded: .+"):
        read("nobody/poems")


def test_conversations_are_known_by_their_column_or_by_the_first_row(write):
    row = {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    named = write("named.jsonl", json.dumps(row) + "\n")
    found = write("found.jsonl", json.dumps({"messages": row["chat"]}) + "\n" + "not read")
    both = write("both.jsonl", json.dumps({"messages": row["chat"], "text": "c"}) + "\n")
    assert holds_chat(Source(path=str(named), messages="chat"), "auto")
    assert holds_chat(Source(path=str(found)), "auto")
    for other in (Source(path=str(both)), Source(path=str(write("a.txt", "User: a\n\nAssistant: b")))):
        assert not holds_chat(other, "auto")
    assert not holds_chat(Source(path="builtin:code/train"), "auto")
