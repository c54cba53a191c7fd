"""Rows of structured files, streamed: jsonl, json, csv, tsv, parquet.

A row comes as (location, columns): location is `file:line` where the format has lines, else `file:row` counted from 1.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peftune.data.documents import ReadStats
from peftune.data.sources.decode import open_text
from peftune.errors import UserError

Row = tuple[str, dict[str, Any]]
Rows = Generator[Row, None, None]  # to be closed where reading stops early: a file is open
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CHUNK = 1 << 20
_SLACK = 1 << 30  # bytes that unpacking may take in any case
_MOST_UNPACKED = 100  # times the packed size; text is packed to a twentieth at best
_MOST_TEXT = 1_000  # times the size of the file
_VISIBLE = re.compile(r"[^ \t\n\r]")
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
_KINDS |= {list: "a list", tuple: "a list"}


def rows(
    path: Path,
    choose: Callable[[list[str]], list[str]],
    stats: ReadStats | None = None,
    encoding: str | None = None,
) -> Rows:
    """Rows of one file by its suffix; `choose` says which of the columns found a wide format should read.

    `encoding` is that of `open_text`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, choose, stats)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "," if suffix == ".csv" else "\t", stats, encoding)
    if suffix == ".json":
        with open_text(path, encoding=encoding) as file:
            if _JsonStream(file.read).peek() == "[":
                return _json_list(path, stats, encoding)
    return _json_lines(path, stats, encoding)


def _json_lines(path: Path, stats: ReadStats | None, encoding: str | None) -> Rows:
    with open_text(path, stats=stats, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                location = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"{error.msg} at column {error.colno}; expected one object per line"
                    raise UserError(f"{location}: not JSON: {problem}") from None
                except (RecursionError, ValueError) as error:
                    raise UserError(f"{location}: not JSON that can be read: {error}") from None
                yield location, _object(value, location)


def _object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{location}: expected an object such as {{"text": …}}, found {kind_of(value)}')
    return value


def _json_list(path: Path, stats: ReadStats | None, encoding: str | None) -> Rows:
    """Elements of one list, decoded one at a time as the file is read."""
    with open_text(path, stats=stats, encoding=encoding) as file:
        text = _JsonStream(file.read)
        text.expect("[", str(path))
        row = 0
        while text.peek() not in "]":
            row += 1
            location = f"{path}:{row}"
            yield location, _object(text.value(location), location)
            if text.peek() != "]":
                text.expect(",", location)
        text.expect("]", f"{path}:{row}")
        if text.peek():
            raise UserError(f"{path}: text follows the end of the list; expected one list, or one object per line")


class _JsonStream:
    """A window over a stream of JSON that grows until the next value is complete."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self.read = read
        self.buffer = ""
        self.at = 0
        self.decoder = json.JSONDecoder()

    def _more(self) -> bool:
        chunk = self.read(max(_CHUNK, len(self.buffer) - self.at))
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end."""
        while not (found := _VISIBLE.search(self.buffer, self.at)):
            if not self._more():
                return ""
        self.at = found.start()
        return found[0]

    def expect(self, character: str, location: str) -> None:
        found = self.peek()
        if found != character:
            instead = repr(found) if found else "the end of the file"
            raise UserError(f"{location}: not JSON: expected {character!r} after it, found {instead}")
        self.at += 1

    def value(self, location: str) -> Any:
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.buffer, self.at)
                return value
            except json.JSONDecodeError as error:
                # More text mends what is cut short, and nothing else.
                cut_short = error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16
                if not cut_short or not self._more():
                    raise UserError(f"{location}: not JSON: {error.msg}") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{location}: not JSON that can be read: {error}") from None


def _csv(path: Path, delimiter: str, stats: ReadStats | None, encoding: str | None) -> Rows:
    if csv.field_size_limit() < sys.maxsize:
        csv.field_size_limit(sys.maxsize)  # the default refuses a text over 128 KiB
    with open_text(path, "", stats, encoding) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        begins = 1
        try:
            for values in reader:
                location = f"{path}:{begins}"
                begins = reader.line_num + 1
                if not values:
                    continue
                if names is None:
                    names = values
                    if repeated := sorted({name for name in names if names.count(name) > 1}):
                        raise UserError(f"{location}: the header names column {repeated[0]!r} twice; rename one")
                elif len(values) != len(names):
                    raise UserError(
                        f"{location}: {len(values)} fields, but the header has {len(names)} ({', '.join(names)}); "
                        "put texts that hold the separator or line ends in double quotes"
                    )
                else:
                    yield location, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{begins}: not {path.suffix[1:].upper()}: {error}") from None
        if names is None:
            raise UserError(f"{path}: empty; expected a header line with the names of the columns")


def _parquet(path: Path, choose: Callable[[list[str]], list[str]], stats: ReadStats | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = text = 0
    try:
        with open(path, "rb") as raw, pq.ParquetFile(raw) as file, stats.reading(raw) if stats else nullcontext():
            columns = choose(file.schema_arrow.names)
            most = _SLACK + _MOST_TEXT * path.stat().st_size
            for batch in file.iter_batches(batch_size=_rows_at_a_time(path, file.metadata), columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    text += sum(len(value) for value in row.values() if isinstance(value, str))
                    if text > most:
                        raise UserError(
                            f"{path}:{number}: so far {_MOST_TEXT:,} times as much text as the file has bytes"
                        )
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a parquet file that can be read (after row {number}): {reason}") from None


def _rows_at_a_time(path: Path, metadata: Any) -> int:
    """Rows to decode at once; UserError for a file that unpacks to far more than any text is packed to.

    A packed column can name one long text any number of times (a dictionary), so a row may be as long as its column.
    """
    largest, packed = 1, path.stat().st_size
    for number in range(metadata.num_row_groups):
        # not the sizes of its columns: pyarrow ends the process where their statistics are damaged
        unpacked = metadata.row_group(number).total_byte_size
        if unpacked > _SLACK // 16 + _MOST_UNPACKED * packed:
            raise UserError(
                f"{path}: row group {number} unpacks to {unpacked:,} bytes, and the file has {packed:,}; expected at "
                f"most {_MOST_UNPACKED} times as many"
            )
        largest = max(largest, unpacked)
    return min(1024, max(4, (_SLACK // 4) // largest))


def kind_of(value: Any) -> str:
    """What a value is, in the words of its file format."""
    return _KINDS.get(type(value), type(value).__name__)
