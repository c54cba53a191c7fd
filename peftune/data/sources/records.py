"""Rows of structured files, streamed: jsonl, json, csv, tsv, parquet.

A row comes as (location, columns): location is `file:line` where the format has lines, else `file:row` counted from 1.
JSON may be one object a line, one list of objects, or objects over several lines, whatever the suffix.

A row that is none (a line that is not JSON, too few fields) goes to `bad`, which refuses it, or returns to skip it.
Where it cannot be told where the next row begins (within a list, after an unclosed quote), the file is refused.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from peftune.config.spelling import spelt
from peftune.data.documents import BadRow, ReadStats
from peftune.data.rows.row_columns import kind_of
from peftune.data.sources.decode import open_text
from peftune.errors import UserError
from peftune.files import repeated

Row = tuple[str, dict[str, Any]]
Bad = Callable[[BadRow], None]
Choose = Callable[[list[str]], list[str]]
Rows = Generator[Row, None, None]  # to be closed where reading stops early: a file is open
Opened = Callable[..., AbstractContextManager[io.TextIOWrapper]]
"""`open_text` of a file, to which `newline` may be given."""
DELIMITED = {".csv": ",", ".tsv": "\t"}
"""What separates the fields of tables, where nothing else was said."""
SUFFIXES = (".jsonl", ".ndjson", ".json", *DELIMITED, ".parquet")
_CHUNK = 1 << 20
_SLACK = 1 << 30  # bytes that unpacking may take in any case
_MOST_UNPACKED = 100  # times the packed size; text is packed to a twentieth at best
_MOST_TEXT = 1_000  # times the size of the file
_VISIBLE = re.compile(r"[^ \t\n\r]")
_DELIMITERS = ",;\t|"


def refuse(error: BadRow) -> NoReturn:
    """What becomes of a bad row if nothing else was said."""
    raise error


def rows(
    path: Path,
    choose: Choose,
    stats: ReadStats | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    bad: Bad = refuse,
) -> Rows:
    """Rows of one file by its suffix; `choose` says which of the columns found are read, where a file names them all.

    `encoding` is that of `open_text`; `delimiter` separates the fields of csv and tsv.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, choose, stats)
    opened = partial(open_text, path, stats=stats, encoding=encoding)
    if suffix in DELIMITED:
        return _csv(path, opened, delimiter or DELIMITED[suffix], choose, bad)
    whole_lines = _is_one_value_a_line(partial(open_text, path, encoding=encoding))
    return (_json_lines if whole_lines else _json_values)(path, opened, bad)


def _is_one_value_a_line(opened: Opened) -> bool:
    """Whether the first line can be JSON by itself: it begins no list, and no object that goes on in the next line."""
    with opened() as file:
        if _JsonStream(file.read).peek() == "[":
            return False
    with opened() as file:
        lines = iter(lambda: file.readline(_CHUNK), "")
        first = next((line.strip() for line in lines if line.strip()), "")
    return first[-1:] not in ("{", "[", ",")


def _json_lines(path: Path, opened: Opened, bad: Bad) -> Rows:
    with opened() as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                location = f"{path}:{number}"
                try:
                    yield location, _object(json.loads(line), location)
                except json.JSONDecodeError as error:
                    problem = f": {error.msg} at column {error.colno}; expected one object per line"
                    bad(BadRow(location, "not JSON", problem))
                except (RecursionError, ValueError) as error:
                    bad(BadRow(location, "not JSON that can be read", f": {error}"))
                except BadRow as error:
                    bad(error)


def _object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(location, 'expected an object such as {"text": …}', f", found {kind_of(value)}")
    return value


def _json_values(path: Path, opened: Opened, bad: Bad) -> Rows:
    """Elements of one list, or objects one after another, decoded one at a time as the file is read."""
    with opened() as file:
        text = _JsonStream(file.read)
        end = "]" if text.peek() == "[" else ""
        if end:
            text.expect("[", str(path))
        row = 0
        while text.peek() not in ("", end):
            row += 1
            location = f"{path}:{row}"
            value = text.value(location)
            try:
                found = _object(value, location)
            except BadRow as error:
                bad(error)
            else:
                yield location, found
            if end and text.peek() != end:
                text.expect(",", location)
        if end:
            text.expect(end, f"{path}:{row}")
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


def _csv(path: Path, opened: Opened, delimiter: str, choose: Choose, bad: Bad) -> Rows:
    if csv.field_size_limit() < sys.maxsize:
        csv.field_size_limit(sys.maxsize)  # the default refuses a text over 128 KiB
    with opened(newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        named: list[str] = []  # without those at the end that have no name
        begins = 1
        try:
            for values in reader:
                location = f"{path}:{begins}"
                begins = reader.line_num + 1
                if not any(map(str.strip, values)) and (not named or len(values) != len(names)):
                    continue
                if not named and values[0].startswith("sep=") and len(values) <= 2:
                    continue  # a line for Excel
                if not named:
                    names, named = values, _header(values, path, delimiter, choose)
                    continue
                while len(values) > len(names) == len(named) and not values[-1]:
                    values.pop()  # each row ends with the delimiter, but for the header
                if len(named) <= len(values) <= len(names):
                    yield location, {name: value for name, value in zip(named, values, strict=False) if name}
                else:
                    problem = f" ({', '.join(named)}); put texts that hold the separator or line ends in double quotes"
                    bad(BadRow(location, f"{len(values)} fields, but the header has {len(named)}", problem))
        except csv.Error as error:
            hint = "" if named else f"; if other characters separate its fields, say so, such as {spelt(delimiter=';')}"
            raise UserError(f"{path}:{begins}: not {path.suffix[1:].upper()}: {error}{hint}") from None
        if not named:
            raise UserError(f"{path}: empty; expected a header line with the names of the columns")


def _header(values: list[str], path: Path, delimiter: str, choose: Choose) -> list[str]:
    """The names of the columns; one without a name is not read."""
    names = [value.strip() for value in values]
    while not names[-1]:
        names.pop()
    other = next((one for one in _DELIMITERS if one != delimiter and one in names[0]), None)
    other = other if len(names) == 1 else None
    try:
        chosen = choose([name for name in names if name])
    except UserError:
        if other is None:
            raise
        chosen = []
    if not chosen and other is not None:
        raise UserError(
            f"{path}: the header is one column, {names[0][:80]!r}; if its fields are separated by {other!r}, say "
            f"{spelt(delimiter=other)} beside the path"
        )
    if (twice := repeated(name for name in names if name in chosen)) is not None:
        raise UserError(f"{path}:1: the header names column {twice!r} twice; rename one")
    return names


def _parquet(path: Path, choose: Choose, stats: ReadStats | None) -> Rows:
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
