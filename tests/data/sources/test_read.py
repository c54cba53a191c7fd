"""Every format gives the same documents, streamed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftune.config.data_section import Source
from peftune.data.documents import Document
from peftune.data.sources import hub
from peftune.data.sources.read import ReadStats, files_of, identity, read_documents, settle_split
from peftune.data.sources.text_files import by_rule, cut_lines, left_out_lines
from peftune.data.tokens.store import prepare
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
    assert texts(tmp_path / "corpus") == ["c", "b", "z = 1"]


def test_a_glob_gives_the_files_it_matches(write, tmp_path):
    for name, text in (("x/1.txt", "one"), ("x/y/2.txt", "two"), ("x/3.md", "three")):
        write(name, text)
    assert texts(tmp_path / "x" / "*.txt") == ["one"]
    assert texts(tmp_path / "x" / "**" / "*.txt") == ["one", "two"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(write, tmp_path):
    assert texts(write("a[1].txt", "it")) == ["it"]
    write("drafts [old]/b.txt", "other")
    assert texts(tmp_path / "drafts [old]" / "*.txt") == texts(tmp_path / "drafts [old]" / "**") == ["other"]


ENCODED = {
    "cp1252": "“It is… a naïve café”",
    "Windows-1251": "Мороз и солнце",
    "latin-1": "grün",
    "gb18030": "床前明月光",
    "shift_jis": "吾輩は猫",
    "utf-16": "grün 東京",
    "UTF-16-BE": "grün",
    "utf-32": "grün",
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_an_encoding_that_is_named_is_read(encoding, name, write):
    text = ENCODED[encoding]
    whole = {"a.txt": text, "a.jsonl": f'{{"text": "{text}"}}', "a.json": f'[{{"text": "{text}"}}]'}
    content = whole.get(name, f"text\n{text}\n")
    data = content.encode({"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding))  # without a mark
    assert texts(write(name, data), encoding=encoding) == [text]
    assert texts(write(name, content.encode("utf-8-sig")), encoding=encoding) == [text], "a mark wins"


def test_an_encoding_makes_another_identity_and_is_not_for_the_hub(write):
    path = str(write("a.txt", b"caf\xe9"))
    found = {tuple(identity(Source(path=path, encoding=name))) for name in ("cp1252", "cp437", "windows-1252")}
    assert len(found) == 2
    with pytest.raises(UserError, match="someone/poems: encoding belongs to files"):
        files_of(Source(path="someone/poems", encoding="cp1252"))


STORY = "One.\n\nTwo.\n\n\nThree.\n"


@pytest.mark.parametrize("named", ["directory", "glob", "files"])
def test_each_of_several_text_files_is_one_document(named, write, tmp_path):
    for name in ("a.txt", "b.md", "d.txt"):
        write(f"stories/{name}", STORY)
    write("stories/c.txt", "x<|endoftext|>y")
    write("stories/rows.jsonl", '{"text": "row"}')
    folder = tmp_path / "stories"
    paths = {"directory": [folder], "glob": [folder / "*"], "files": sorted(folder.iterdir())}[named]
    sources = [Source(path=str(path)) for path in paths]
    split_on, stats = settle_split(sources, "auto"), ReadStats()
    found = [document.text for source in sources for document in read_documents(source, split_on, stats)]
    assert found == [STORY.strip()] * 2 + ["x", "y", STORY.strip(), "row"]
    counted = [by_rule(cuts) for cuts in stats.cuts]
    told = " ".join(cut_lines(sources, counted))
    if named == "files":  # told as one
        assert "4 sources: " in told
    assert (
        "3 files, 3 documents, one for each file; data.split_on: wide-gap would make 6, blank-line would make 9" in told
    )
    assert "2 documents, cut at <|endoftext|>" in told


def test_a_single_text_file_is_cut_at_gaps_and_that_is_told(write):
    source = Source(path=str(write("a.txt", "One.\n\nTwo.\n\nThree.\n")))
    stats = ReadStats()
    assert len(list(read_documents(source, "auto", stats))) == 3
    [line] = cut_lines([source], [by_rule(stats.cuts[0])], chosen=True)
    assert line == f"{source.path}: 3 documents, cut at blank lines; data.split_on: file would make 1"


@pytest.mark.parametrize(("text", "split_on"), [("One.\n", "auto"), (STORY, "blank-line"), ("a<|endoftext|>b", "auto")])
def test_a_cut_without_alternative_is_not_told_unasked(text, split_on, write):
    source, stats = Source(path=str(write("a.txt", text))), ReadStats()
    assert list(read_documents(source, split_on, stats))
    assert cut_lines([source], [by_rule(stats.cuts[0])], chosen=True) == []
    assert len(cut_lines([source], [by_rule(stats.cuts[0])])) == 1


def test_a_source_may_be_cut_in_its_own_way(write):
    path = str(write("a.txt", "One.\n\nTwo.\n"))
    whole, cut = Source(path=path, split_on="file"), Source(path=path)
    assert settle_split([whole, cut], "auto") == "auto/one", "only the second is cut as auto says"
    assert [len(list(read_documents(source, "auto/one"))) for source in (whole, cut)] == [1, 2]
    assert identity(whole) != identity(cut)


def test_blank_files_are_counted_and_told(write, tmp_path):
    for name, text in (("a.txt", "a"), ("b.txt", "b"), ("c.txt", ""), ("d.txt", " \n\n\t\r\n")):
        write(f"x/{name}", text)
    source, stats = Source(path=str(tmp_path / "x")), ReadStats()
    assert len(list(read_documents(source, "auto", stats))) == 2
    [line] = cut_lines([source], [by_rule(stats.cuts[0])], chosen=True)
    assert line == f"{source.path}: 4 files, 2 documents (2 blank, left out), one for each file"


FOREIGN = {
    "draft.docx": b"PK\x03\x04",
    "notes.rtf": b"{\\rtf1 }",  # plain ASCII, and still no text
    "photo.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "old.txt.gz": b"\x1f\x8b\x08",
    "LICENSE": b"MIT",
    "README": b"read me",
}
HIDDEN = (".DS_Store", "~$draft.docx", "a.txt~", "Thumbs.db", "desktop.ini", ".git/config", "__MACOSX/a.txt")


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*"])
def test_foreign_files_are_named_all_at_once_or_left_out(pattern, write, tmp_path):
    for name, content in FOREIGN.items():
        write(f"x/{name}", content)
    for name in HIDDEN:
        write(f"x/{name}", "text that nobody wrote")
    for name in ("a.txt", "b.py", "c"):  # text by its name or by its content
        write(f"x/{name}", name)
    path = str(tmp_path / "x" / pattern)
    with pytest.raises(UserError) as caught:
        files_of(Source(path=path))
    message = str(caught.value)
    assert "6 of 9 files are neither text nor data: " in message and all(name in message for name in FOREIGN)
    assert "unpack .gz; save .docx, .rtf as plain text (.txt, UTF-8); move them away" in message
    assert "unknown_files: skip" in message and not any(name in message for name in HIDDEN)
    source = Source(path=path, unknown_files="skip")
    assert [found.name for found in files_of(source)] == ["a.txt", "b.py", "c"]
    [line] = left_out_lines([source])
    assert all(name in line for name in ["~$draft.docx", "a.txt~", "Thumbs.db", *FOREIGN])


def test_many_foreign_files_are_counted(write, tmp_path):
    for number in range(30):
        write(f"x/{number:02}.jpg", b"\0")
    with pytest.raises(UserError, match=r"30 of 30 files .*: 00\.jpg, .*09\.jpg and 20 more; move them away"):
        files_of(Source(path=str(tmp_path / "x")))
    with pytest.raises(UserError, match=r"no file to read there; .* \(left out: 00\.jpg, .* and 20 more\)"):
        files_of(Source(path=str(tmp_path / "x"), unknown_files="skip"))


def test_all_files_in_another_encoding_are_named_at_once(write, tmp_path):
    for name, content in (
        ("a.txt", b"caf\xe9"),
        ("b.txt", b"fine"),
        ("c.csv", b"text\nna\xefve"),
        ("d.md", b"\x93a\x94"),
    ):
        write(f"x/{name}", content)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / "x")
    message = str(caught.value)
    assert "3 files cannot be decoded: " in message and "try encoding: cp1252" in message and "b.txt" not in message
    assert all(place in message for place in ("a.txt: not UTF-8 at byte 3", "c.csv: not UTF-8 at byte 7", "d.md: not"))
    assert texts(tmp_path / "x", encoding="cp1252") == ["café", "fine", "naïve", "“a”"]
    write("x/e.txt", "Bare.".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"each a source with its encoding; .*a\.txt cp1252.*e\.txt utf-16-le"):
        texts(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["a b.txt", 'it\'s "mine".txt', "two\nlines.txt", "🙂.txt", "-n.txt", "[x].txt", "*.txt"]
)
def test_any_name_of_a_file_is_read_and_told_in_one_line(name, write):
    path = write(f"x/{name}", "One.\n\nTwo.")
    stats, source = ReadStats(), Source(path=str(path))
    assert len(list(read_documents(source, "auto", stats))) == 2
    [line] = cut_lines([source], [by_rule(stats.cuts[0])])
    assert "\n" not in line and "2 documents" in line


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
    with pytest.raises(
        UserError,
        match=r"^no file nobody/poems and no hub data set .* could be loaded: .+; where the hub cannot",
    ):
        read("nobody/poems")


def test_conversations_are_known_by_their_column(write, tokenizer, tmp_path):
    row = {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    named = write("named.jsonl", json.dumps(row) + "\n")
    found = write("found.jsonl", f"{json.dumps({'messages': row['chat']})}\n" * 2)
    both = write("both.jsonl", json.dumps({"messages": row["chat"], "text": "c"}) + "\n")
    text = write("a.txt", "User: a\n\nAssistant: b")
    sources = [Source(path=str(named), messages="chat"), *(Source(path=str(path)) for path in (found, both, text))]
    for _ in range(2):  # read, and from the cache
        report = prepare(sources, tokenizer, "t", " ", "file", tmp_path / "cache").report
        assert (report.documents, report.chats) == ([1, 2, 1, 1], [1, 2, 0, 0])
