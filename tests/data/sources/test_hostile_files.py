"""Files that somebody else made to hurt: any damage is an error of ours, soon; nothing outside is read."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import damaged_bytes, damaged_json, deadline, fuzz, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st

from peftune.config.data_section import Source
from peftune.data.sources import records
from peftune.data.sources.read import files_of, read_documents
from peftune.data.sources.text_files import left_out_lines
from peftune.errors import UserError

ROWS = [{"text": "the cat", "n": 1, "m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "sät", "n": 1.5, "m": []}]  # fmt: skip


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


LINES = "\n".join(map(json.dumps, ROWS)).encode()
FILES = {
    "a.jsonl": damaged_json(ROWS[0]).map(lambda line: LINES + b"\n" + line) | damaged_bytes(LINES),
    "a.json": damaged_json(ROWS),
    "a.csv": damaged_bytes('text,n\n"the ""cat""\nsat",1\nsät,2\n'.encode()),
    "a.tsv": damaged_bytes(b"text\tn\nthe cat\t1\n"),
    "a.txt": damaged_bytes("the cat\n\n\nsät<|endoftext|>on\n\nthe mat\r\n".encode()),
    "a.parquet": damaged_bytes(parquet(pa.table({"text": ["the cat", "sät"], "n": [1, 2]}))),
}


COLUMNS: list[dict[str, Any]] = [
    {}, {"text": "n"}, {"messages": "m"}, {"text": "{text}[[ {n}]]{m.0.role}", "where": {"n": 1}},
    {"text": "{m.content}", "explode": "m"},
    *({"encoding": name} for name in ("utf-16", "utf-32", "gb18030", "shift_jis", "cp1252", "utf-8-sig")),
]  # fmt: skip


@fuzz(250)
@given(
    data=st.data(),
    name=st.sampled_from(sorted(FILES)),
    column=st.sampled_from(COLUMNS),
    bad=st.sampled_from([None, "skip"]),
)
def test_any_file_is_read_or_refused(
    data: st.DataObject, name: str, column: dict[str, Any], bad: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(FILES[name]))
    with deadline():
        read_or_refuse(lambda: list(read_documents(Source(path=str(path), on_bad_row=bad, **column), "auto")))


def test_links_out_of_a_directory_are_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    secret = write("home/secret.txt", "secret")
    inside = write("data/a.txt", "a")
    (tmp_path / "data" / "b.txt").symlink_to(inside)
    assert files_of(Source(path=str(tmp_path / "data"))) == [inside, tmp_path / "data" / "b.txt"]
    (tmp_path / "data" / "c.txt").symlink_to(secret)
    (tmp_path / "data" / "home").symlink_to(tmp_path / "home")
    for pattern in ("data", "data/*.txt", "data/**/*.txt", "data/*/secret.txt"):
        with pytest.raises(UserError, match=r"(t|c)\.txt: leads out of .*data, to .*secret\.txt; copy the file there"):
            files_of(Source(path=str(tmp_path / pattern)))
    assert files_of(Source(path=str(tmp_path / "data" / "[ab].txt"))) == [inside, tmp_path / "data" / "b.txt"]
    assert files_of(Source(path=str(tmp_path / "data" / "c.txt"))), "named, so meant"


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    blob = write("datasets--a--b/blobs/0123", '{"text": "a"}')
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(blob)
    assert [d.text for d in read_documents(Source(path=str(snapshot)), "auto")] == ["a"]


def test_what_is_no_file_is_left_alone(tmp_path: Path, write: Callable[..., Path]) -> None:
    file = write("data/a.txt", "a")
    os.mkfifo(tmp_path / "data" / "b.txt")
    (tmp_path / "data" / "c.txt").symlink_to("/dev/zero")
    for path in (tmp_path / "data", tmp_path / "data" / "*.txt"):
        with deadline():
            assert files_of(Source(path=str(path))) == [file]
    for path in (tmp_path / "data" / "b.txt", Path("/dev/zero"), Path("/dev/stdin")):
        with pytest.raises(UserError, match="not a regular file"), deadline():
            files_of(Source(path=str(path)))


def test_links_that_go_round_in_circles_end(tmp_path: Path, write: Callable[..., Path]) -> None:
    file = write("data/a.txt", "a")
    for name in ("b", "c", "d"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    for pattern in ("", "**", "**/*.txt", "**/**/**/**/*.txt"):
        with deadline():
            assert files_of(Source(path=str(tmp_path / "data" / pattern))) == [file]
    [line] = left_out_lines([Source(path=str(tmp_path / "data"))])
    assert "b (a link to a directory), c (a link" in line


def test_a_directory_of_any_depth_is_read_or_refused(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("a", dir_fd=here)
        inner = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        with deadline():
            read_or_refuse(lambda: files_of(Source(path=str(tmp_path / "a"))))
    finally:
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # Python's own, which pytest would call, recurses


def test_a_packed_file_is_one_line(write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: neither text nor data; unpack \.gz"):
        files_of(Source(path=str(write("a.jsonl.gz", b"\x1f\x8b"))))


def repeated(text: str, rows: int, path: Path) -> Source:
    """A small file in which all rows name one text of its dictionary."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 50_000
    return Source(path=str(path))


def test_a_parquet_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_SLACK", 16 << 20)
    source = repeated("a" * (2 << 20), 1000, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row group 0 unpacks to 2,097,.* bytes, .*; expected at most 100 times"):
        list(read_documents(source, "auto"))


def test_a_text_that_is_repeated_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_SLACK", 16 << 20)
    source = repeated("a" * 500_000, 100_000, tmp_path / "a.parquet")
    assert records._rows_at_a_time(tmp_path / "a.parquet", pq.ParquetFile(tmp_path / "a.parquet").metadata) == 8
    with pytest.raises(UserError, match=r"so far 1,000 times as much text as the file has bytes"), deadline():
        for _ in read_documents(source, "auto"):
            pass


def test_each_byte_of_a_parquet_may_be_another(tmp_path: Path) -> None:
    """What pyarrow meets outside of its own error handling ends the process."""
    content = parquet(pa.table({"text": ["the cat", "sät"], "n": [1, 2]}))
    for at in range(len(content)):
        (tmp_path / "a.parquet").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with deadline():
            read_or_refuse(lambda: list(read_documents(Source(path=str(tmp_path / "a.parquet")), "auto")))
