"""From the rows of a source to documents: which rows, which of their columns, and what becomes of bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from peftune.config.data_section import Source
from peftune.config.spelling import spelt
from peftune.data.documents import BadRow, Document, ReadStats
from peftune.data.rows.row_columns import columns_in, is_template, kind_of, missing_column, reach, text_of, top_column
from peftune.data.rows.row_filter import RowFilter
from peftune.data.sources import chat_template, plain_text, records
from peftune.errors import UserError

_KINDS = (["text"], ["prompt", "completion"], ["messages"], ["conversations"])
_COUNTED_ON = 100_000  # rows after the first bad one, to say how many there are
_REASONS_TOLD = 3


class _BadRows:
    """Those of one file: skipped, or refused once `count_on` more rows were read to say how many there are."""

    def __init__(self, skips: bool, count_on: int) -> None:
        self.skips, self.count_on = skips, count_on
        self.reasons, self.first_row, self.first = Counter[str](), 0, ""

    def add(self, error: BadRow, row: int) -> None:
        """Count the row of this number."""
        if not self.reasons:
            self.first_row, self.first = row, str(error)
        self.reasons[error.reason] += 1

    def refuses(self) -> bool:
        """Whether the file is refused, so that nothing more of it is used."""
        return bool(self.reasons) and not self.skips

    def counted_enough(self, rows: int) -> bool:
        """Whether no more rows need be read to refuse the file."""
        return self.refuses() and rows >= self.first_row + self.count_on

    def check(self, rows: int) -> None:
        """UserError with the first bad row and how many there are, where all of them or any may not be bad."""
        bad = self.reasons.total()
        if not bad or (self.skips and bad < rows):
            return
        if bad == rows:
            raise UserError(self.first if bad == 1 else f"{self.first} (none of the {bad:,} rows can be used)")
        so_far = f"the first {rows:,}" if self.counted_enough(rows) else f"{rows:,}"
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in self.reasons.most_common(_REASONS_TOLD))
        counted = f"{bad:,} of {so_far} rows cannot be used{f' ({reasons})' if len(self.reasons) > 1 else ''}"
        raise UserError(f"{self.first}. {counted}: mend them, or leave them out with {spelt(on_bad_row='skip')}")


class RowReader:
    """Makes documents of the rows of one source, which may be several files; `check` comes after the last.

    Blank documents (and pairs with a blank completion) are left out and counted in `stats`, as are the rows that
    `where` does not want and, where the source says so, bad rows.
    """

    def __init__(self, source: Source, stats: ReadStats, chat: str = "plain") -> None:
        self.source, self.stats, self.chat = source, stats, chat
        named = (source.text, source.prompt, source.completion, source.messages)
        self.named = [name for name in named if name is not None]
        self.filter = RowFilter(source.where) if source.where else None
        self._unseen: set[str] | None = None  # columns of templates that no row has had yet
        self._begin(_COUNTED_ON)

    def _begin(self, count_on: int) -> None:
        self.columns: list[str] | None = None
        self.rows, self.bad = 0, _BadRows(self.source.on_bad_row == "skip", count_on)

    def documents(self, rows: records.Rows, count_on: int = _COUNTED_ON) -> Iterator[Document]:
        """Documents of a file or hub data set.

        A bad row is refused after at most `count_on` more rows, which are read to say how many of them are bad too.
        """
        self._begin(count_on)
        with closing(rows):  # a row may be refused while its file is open
            try:
                for location, row in self._wanted(rows):
                    document = self._document(row, location)
                    if self.bad.counted_enough(self.rows):
                        break
                    if document is not None and not self.bad.refuses():
                        yield document
            except UserError:
                if not self.bad.refuses():
                    raise  # of the whole file; a bad row before it comes first
        self.stats.left_out.rows += self.rows
        self.bad.check(self.rows)

    def bad_row(self, error: BadRow) -> None:
        """Skip a row, or remember it until its file is refused."""
        if self.bad.skips:
            self.stats.left_out.skip(error)
        self.bad.add(error, self.rows)
        if self.bad.counted_enough(self.rows):
            raise error

    def unreadable(self, error: BadRow) -> None:
        """Count what is no row at all, and skip it, or remember it until its file is refused."""
        self.rows += 1
        self.bad_row(error)

    def choose(self, name: str, found: Sequence[str]) -> list[str]:
        """The columns to read of a file that names all it has; UserError where one is missing."""
        made = [*found, *([self.source.explode] if self.source.explode else [])]
        named = self._columns(name, made)
        named = [part for one in named for part in (columns_in(one) if is_template(one, made) else [one])]
        needed = [top_column(one, found) for one in (*named, *(self.source.where or {}), *made[len(found) :])]
        for column in needed:
            if column not in found:
                raise UserError(f"{name}: no column {column!r}; found {', '.join(found) or 'none'}")
        return list(dict.fromkeys(needed))

    def check(self) -> None:
        """UserError where no row of the source had what the recipe names."""
        if self.filter is not None:
            self.stats.left_out.never += self.filter.check(self.source.path)
        if self._unseen:
            raise UserError(f"{self.source.path}: no row has the column {min(self._unseen)!r} of the template")

    def _wanted(self, rows: records.Rows) -> Iterator[records.Row]:
        """The rows that `where` wants, with one for each entry of what is to be exploded."""
        for place, one in rows if self.source.explode is None else self._exploded(rows, self.source.explode):
            self.rows += 1
            if self.filter is None or self.filter.keeps(one):
                yield place, one
            else:
                self.stats.left_out.unwanted += 1

    def _exploded(self, rows: records.Rows, name: str) -> Iterator[records.Row]:
        for location, row in rows:
            entries = reach(row, name)
            if isinstance(entries, list | tuple):
                for number, entry in enumerate(entries, start=1):
                    yield f"{location} entry {number}", {**row, name: entry}
            else:
                problem = f"column {name!r} holds {kind_of(entries)}"
                self.unreadable(BadRow(location, problem, "; expected a list to explode"))

    def _columns(self, location: str, found: Sequence[str], table: str | None = None) -> list[str]:
        """The columns (or templates) to read: one for text or messages, two for prompt and completion.

        `table` is a column of rows, of which the error says how they are read.
        """
        missing = [name for name in self.named if name not in found and not is_template(name, found)]
        if self.named and not missing:
            return self.named
        for columns in [] if self.named else _KINDS:
            if all(column in found for column in columns):
                return columns
        names = " and ".join(map(repr, missing)) or "'text'"
        pair = spelt(path="…", prompt="COLUMN", completion="COLUMN")
        advice = f"name yours as {spelt(path='…', text='COLUMN')} or {pair}"
        if table is not None:
            advice = f"if the rows are in {table!r}, {spelt(explode=table, text=f'{{{table}.COLUMN}}')} reads them"
        raise BadRow(location, f"no column {names}", f"; found {', '.join(found) or 'none'}; {advice}")

    def _document(self, row: dict[str, Any], location: str) -> Document | None:
        """The document of a row; None where it is blank, or bad and not refused yet."""
        try:
            if self.columns is None:
                self.columns = self._columns(location, list(row), _table_in(row))
            if self._unseen is None or self._unseen:
                self._look_for_columns(row)
            document = self._read(row, self.columns, location)
        except BadRow as error:
            self.bad_row(error)
            return None
        scored = (text for text, scored in document.turns or ((document.text, True),) if scored)
        if any(map(str.strip, scored)):
            return document
        self.stats.blank += 1
        self.stats.faults["blank"].add(location)
        return None

    def _look_for_columns(self, row: dict[str, Any]) -> None:
        """Cross off what this row has of the columns that templates name."""
        if self._unseen is None:
            templates = [name for name in self.named if is_template(name, row)]
            self._unseen = {column for template in templates for column in columns_in(template)}
        self._unseen = {name for name in self._unseen if top_column(name, row) not in row}

    def _read(self, row: dict[str, Any], columns: list[str], location: str) -> Document:
        if columns == [self.source.messages] or (columns in (["messages"], ["conversations"]) and not self.named):
            if columns[0] not in row:
                raise missing_column(row, columns[0], location)
            turns = chat_template.turns_of(row[columns[0]], location, self.chat)
            text = _whole("".join(text for text, _ in turns), columns[0], location)
            return Document(text, turns=turns, source=location, ends_turns=self.chat == chat_template.EOS_TURNS)
        values = [_whole(text_of(row, column, location), column, location) for column in columns]
        return Document(values[-1], prompt=values[0] if len(values) == 2 else None, source=location)


def _table_in(row: dict[str, Any]) -> str | None:
    """The column of a row that is itself a list of rows."""
    lists = (name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict))
    return next(lists, None)


def _whole(text: str, column: str, location: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(location, f"column {column!r} holds half a character (surrogate)", f" at {error.start}") from None
    return plain_text.unix_line_ends(text)
