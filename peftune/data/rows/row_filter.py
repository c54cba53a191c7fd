"""Which rows a source reads: `where`, columns and the values that they must hold.

Numbers and booleans are compared by what they mean, wherever they stand: 3, 3.0 and the text "3" of a csv file are
equal, and so are true and the texts "true", "TRUE" and "yes". Texts are equal letter by letter. Of a list one entry is
enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftune.data.rows.row_columns import reach, scalar_text, top_column
from peftune.errors import UserError

_NUMBER = re.compile(r"\s*[-+]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][-+]?\d{1,3})?\s*", re.ASCII)
_SPOKEN = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SHOWN, _LENGTH = 10, 40  # values of a column, and characters of each
_COLUMNS = 100

_Meaning = tuple[str, Any]


class RowFilter:
    """Says of each row of a source whether it is read, and remembers what it saw."""

    def __init__(self, where: Mapping[str, Any]) -> None:
        self.rows = self.kept = 0
        self._wanted = {
            name: {_as_written(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
            for name, wanted in where.items()
        }
        self._never = {name: set(wanted) for name, wanted in self._wanted.items()}
        self._columns: dict[str, None] = {}
        self._found: dict[str, dict[str, None]] = {name: {} for name in self._wanted}
        self._matched = dict.fromkeys(self._wanted, 0)  # rows
        self._missing = set(self._wanted)

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether every column holds one of the values that it must."""
        self.rows += 1
        if self._missing:
            self._missing -= {name for name in self._missing if top_column(name, row) in row}
            self._columns.update(dict.fromkeys(list(row)[:_COLUMNS]))
        holds = [self._holds(name, row) for name in self._wanted]
        self.kept += all(holds)
        return all(holds)

    def check(self, path: str) -> list[str]:
        """What was asked for and is in no row; UserError where nothing was kept of a source that has rows."""
        if self._missing and self.rows:
            raise UserError(f"{path}: where: no column {min(self._missing)!r}; found {', '.join(self._columns)}")
        if self.rows and not self.kept:
            absent = [name for name, count in self._matched.items() if not count]
            values = "; ".join(
                f"{name} is {', '.join(map(repr, list(found)[:_SHOWN]))}{', …' if len(found) > _SHOWN else ''}"
                for name, found in self._found.items()
                if name in absent or not absent
            )
            asked = f"{' and '.join(absent)} as asked for" if absent else "all of it, though each by itself is there"
            raise UserError(f"{path}: where: none of {self.rows:,} rows has {asked}; {values}")
        never = [f"{name} {value!r}"[:_LENGTH] for name, values in self._never.items() for _, value in values]
        return sorted(never)[:_SHOWN] if self.rows else []

    def _holds(self, name: str, row: Mapping[str, Any]) -> bool:
        value = reach(row, name)
        entries = value if isinstance(value, list | tuple) and value else [value]
        found = self._found[name]
        for entry in entries:
            if len(found) <= _SHOWN:
                text = scalar_text(entry)
                found["" if text is None else text[:_LENGTH]] = None
        held = {meaning for entry in entries for meaning in _meanings(entry)} & self._wanted[name]
        self._never[name] -= held
        self._matched[name] += bool(held)
        return bool(held)


def _as_written(value: Any) -> _Meaning:
    """What a value of the recipe means; a text there is that text."""
    return ("text", value) if isinstance(value, str) and value else next(iter(_meanings(value)))


def _meanings(value: Any) -> list[_Meaning]:
    """All that a value of a row may be meant as, its own kind first."""
    text = scalar_text(value)
    if not text:
        return [("empty", None)]
    meanings: list[_Meaning] = [("text", text)]
    if isinstance(value, bool):
        meanings.insert(0, ("boolean", value))
    elif isinstance(value, int | float):
        meanings.insert(0, ("number", value))
    elif _NUMBER.fullmatch(text):
        meanings.append(("number", int(text) if text.strip().lstrip("+-").isdecimal() else float(text)))
    elif (spoken := _SPOKEN.get(text.strip().casefold())) is not None:
        meanings.append(("boolean", spoken))
    return meanings
