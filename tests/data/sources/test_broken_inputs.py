"""Whatever is wrong with a source is one line that says where it is and what was expected."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peftune.config.data_section import Source
from peftune.data.tokens.store import prepare
from peftune.errors import UserError

BROKEN_FILES: list[tuple[str, str | bytes, dict[str, str], str]] = [
    # name, content, columns, what the message must say
    ("a.jsonl", '{"text": "a"}\n{"text": ', {}, "a.jsonl:2: not JSON: .* at column"),
    ("a.jsonl", '{"text": "a"}\n["a"]', {}, "a.jsonl:2: expected an object .* found a list"),
    ("a.jsonl", '"a"', {}, "a.jsonl:1: expected an object .* found a string"),
    ("a.jsonl", "[" * 200_000, {}, "a.jsonl:1: not JSON that can be read"),
    ("a.jsonl", '{"text": ' + "9" * 5000 + "}", {}, "a.jsonl:1: not JSON that can be read"),
    ("a.jsonl", '{"text": null}', {}, "a.jsonl:1: column 'text' holds null; expected a string"),
    ("a.jsonl", '{"text": NaN}', {}, "a.jsonl:1: column 'text' holds a number; expected a string"),
    ("a.jsonl", '{"text": ["a"]}', {}, "a.jsonl:1: column 'text' holds a list"),
    ("a.jsonl", '{"text": {}}', {}, "a.jsonl:1: column 'text' holds an object"),
    ("a.jsonl", '{"text": "\\ud800"}', {}, "a.jsonl:1: column 'text' holds half a character"),
    ("a.jsonl", '{"body": "a", "id": 1}', {}, "a.jsonl:1: no column 'text'; found body, id; name yours as"),
    ("a.jsonl", "{}", {}, "a.jsonl:1: no column 'text'; found none"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', {}, "a.jsonl:2: no column 'text' in this row; found txt"),
    ("a.jsonl", '{"text": "a"}', {"text": "body"}, "a.jsonl:1: no column 'body'; found text"),
    ("a.jsonl", '{"q": "a"}', {"prompt": "q", "completion": "r"}, "a.jsonl:1: no column 'r'; found q"),
    ("a.jsonl", '{"prompt": null, "completion": "c"}', {}, "a.jsonl:1: column 'prompt' holds null"),
    ("a.jsonl", '{"messages": "hi"}', {}, "a.jsonl:1: messages are a text that is not JSON"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "u"}]}', {}, "a.jsonl:1: no message of the assistant"),
    ("a.jsonl", '{"messages": [{"role": "bot", "content": "u"}]}', {}, "a.jsonl:1: message 1: role 'bot'; expected"),
    ("a.jsonl", '{"messages": [{"role": ["x"], "content": "u"}]}', {}, r"a.jsonl:1: message 1: role \['x'\]; expected"),
    ("a.jsonl", b'{"text": "\xff"}', {}, "a.jsonl: not UTF-8 at byte 10;"),
    ("a.jsonl", "", {}, "a.jsonl: no document found"),
    ("a.jsonl", '{"text": " "}', {}, r"a.jsonl: no document found \(1 blank\)"),
    ("a.json", '[{"text": "a"}, {"text": "b"', {}, "a.json:2: not JSON"),
    ("a.json", '[{"text": "a"} {"text": "b"}]', {}, "a.json:1: not JSON: expected ',' after it, found '{'"),
    ("a.json", '[{"text": "a"}', {}, "a.json:1: not JSON: expected ',' after it, found the end of the file"),
    ("a.json", '[{"text": "a"}] x', {}, "a.json: text follows the end of the list"),
    ("a.json", '["a", "b"]', {}, "a.json:1: expected an object .* found a string"),
    ("a.json", "[" * 200_000, {}, "a.json:1: not JSON that can be read"),
    ("a.json", '{\n "text": "a"\n} {"text"', {}, "a.json:2: not JSON: Expecting ':'"),
    ("a.json", '{"data": [{"text": "a"}]}', {}, "a.json:1: no column 'text'; found data"),
    ("a.json", "[]", {}, "a.json: no document found"),
    ("a.csv", "", {}, "a.csv: empty; expected a header line"),
    ("a.csv", "text\n", {}, "a.csv: no document found"),
    ("a.csv", "text,id\na\n", {}, r"a.csv:2: 1 fields, but the header has 2 \(text, id\)"),
    ("a.csv", "text\na, b\n", {}, "a.csv:2: 2 fields, but the header has 1 .* in double quotes"),
    ("a.csv", 'text\n"a\nb\n', {}, "a.csv:2: not CSV: unexpected end of data"),
    ("a.csv", 'text\n"a"b\n', {}, "a.csv:2: not CSV: "),
    ("a.csv", "text,text\na,b\n", {}, "a.csv:1: the header names column 'text' twice"),
    (
        "a.csv",
        "text;id\na;1\n",
        {},
        "a.csv: the header is one column, 'text;id'; if .* separated by ';', say delimiter",
    ),
    ("a.csv", b"text\nna\xefve\n", {}, "a.csv: not UTF-8 at byte 7;"),
    ("a.tsv", "text\tid\na\n", {}, "a.tsv:2: 1 fields"),
    ("a.parquet", "not parquet", {}, "a.parquet: not a parquet file that can be read"),
    ("a.parquet", "", {}, "a.parquet: not a parquet file that can be read"),
    ("a.txt", "", {}, "a.txt: no document found"),
    ("a.txt", " \n\n\t\n", {}, "a.txt: no document found"),
    ("a.txt", b"caf\xe9", {}, r"a.txt: not UTF-8 at byte 3; .* try encoding: cp1252 \(0xe9 is é in cp1252\)$"),
    ("a.csv", b"text\n\x93Hi\x94\n", {}, r"byte 5; .* try encoding: cp1252 \(0x93 is “ in cp1252\)$"),
    ("a.jsonl", '{"text": "Пушкин и друзья"}'.encode("cp1251"), {}, "byte 10; .* try encoding: cp1251 .0xcf is П in"),
    ("a.txt", "床前明月光疑是地上霜".encode("gbk"), {}, "not UTF-8 at byte 0; .* try encoding: gb18030$"),
    ("a.txt", "吾輩は猫である。名前は".encode("shift_jis"), {}, "not UTF-8 at byte 0; .* try encoding: shift_jis$"),
    ("a.txt", b"ab\x81 b\x81", {}, "not UTF-8 at byte 2; save the file as UTF-8$"),  # looks like nothing
    ("a.txt", "ab€".encode(), {"encoding": "gb2312"}, "not GB2312 at byte 2; the bytes are UTF-8: leave encoding out"),
    ("a.txt", b"a\x81b", {"encoding": "cp1252"}, "a.txt: not CP1252 at byte 1; save the file as UTF-8$"),
    ("a.txt", "Mat und Katze".encode("utf-16-le"), {}, "a.txt: looks like UTF-16-LE without .*encoding: utf-16-le$"),
    ("a.txt", "мороз и солнце".encode("utf-16-be"), {}, "a.txt: looks like UTF-16-BE without .*encoding: utf-16-be$"),
    ("a.txt", "a cat".encode("utf-16-le"), {"encoding": "cp1252"}, "a.txt: looks like UTF-16-LE without"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-32-be"), {}, "a.jsonl: looks like UTF-32-BE without .*: utf-32-be$"),
    ("a.csv", "text\n東京".encode("utf-16-le"), {}, "a.csv: looks like UTF-16-LE without .*encoding: utf-16-le$"),
    ("a.txt", b"\xff\xfea", {}, "a.txt: not UTF-16-LE at byte 2;"),
    ("a.txt", "a", {"text": "body"}, "a.txt: a text file has no column 'body'"),
    ("a.txt", "a", {"split": "train"}, "a.txt: split and subset belong to hub data sets"),
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", {}, r"a.pdf: neither text nor data; save .pdf as plain text \(.txt"),
    ("a.DOCX", b"PK\x03\x04", {}, "a.DOCX: neither text nor data; save .docx as plain text"),
    ("a.xlsx", b"PK\x03\x04", {}, "a.xlsx: neither text nor data; save .xlsx as csv"),
]


def problem_of(source: Source, tokenizer: object, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        prepare([source], tokenizer, "t", " ", "auto", cache)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("name", "content", "columns", "expected"), BROKEN_FILES)
def test_a_broken_file_is_one_line(name, content, columns, expected, write, tokenizer, tmp_path):
    message = problem_of(Source(path=str(write(name, content)), **columns), tokenizer, tmp_path / "cache")
    assert re.search(expected, message), message


def test_a_broken_parquet_is_one_line(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    assert "no column 'text'; found body" in problem_of(Source(path=str(path)), tokenizer, tmp_path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert "a.parquet:2: column 'text' holds null" in problem_of(Source(path=str(path)), tokenizer, tmp_path)
    pq.write_table(pa.table({"text": [[1], [2]]}), path)
    assert "a.parquet:1: column 'text' holds a list" in problem_of(Source(path=str(path)), tokenizer, tmp_path)
    damaged = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": damaged}), path)
    assert "a.parquet: not a parquet file that can be read (after row 0)" in problem_of(
        Source(path=str(path)), tokenizer, tmp_path
    )
    pq.write_table(pa.table({"text": ["abc" * 1000] * 100}), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes()[:-200])
    assert "not a parquet file that can be read" in problem_of(Source(path=str(path)), tokenizer, tmp_path)


def test_paths_that_lead_nowhere_are_one_line(write, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no file to read there" in problem_of(Source(path=str(tmp_path / "empty")), tokenizer, tmp_path)
    assert "no file matches" in problem_of(Source(path=str(tmp_path / "*.nothing")), tokenizer, tmp_path)
    assert "no directory" in problem_of(Source(path=str(tmp_path / "no" / "a.txt")), tokenizer, tmp_path)
    assert "no such built-in corpus" in problem_of(Source(path="builtin:code"), tokenizer, tmp_path)
    assert "expected a path" in problem_of(Source(path="a\0b"), tokenizer, tmp_path)
    assert "cannot be read" in problem_of(Source(path=str(tmp_path / ("x" * 5000))), tokenizer, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in problem_of(Source(path=str(tmp_path / "pipe")), tokenizer, tmp_path)


def test_a_tokenizer_without_an_end_is_refused(write, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert "no end-of-text token" in problem_of(Source(path=str(write("a.txt", "a"))), bare, tmp_path)
