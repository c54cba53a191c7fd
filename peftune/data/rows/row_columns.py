"""What a row says: a column, a part of one (`a.b`), or a text made of several by a template.

A template is a text with columns in braces: `{name}`, `{meta.language}` (inside of an object), `{answers.0}` (the first
of a list). A list is joined with ` | `, a list or an object in it with ` : `, so that triples read as
`subject : property : object | …`. What stands in `[[…]]` is left out where a column in it is missing or empty. `{{` and
`}}` are braces. Nothing else means anything, and nothing is evaluated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import Any

from peftune.data.documents import BadRow
from peftune.errors import UserError

_MARK = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}]")
_INDEX_DIGITS = 9
_ENTRIES, _PARTS = " | ", " : "
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
_KINDS |= {list: "a list", tuple: "a list"}


@dataclass(frozen=True)
class _Column:
    name: str


_Part = str | _Column
_Template = tuple[tuple[bool, tuple[_Part, ...]], ...]  # (whether it may be left out, its parts)


def kind_of(value: Any) -> str:
    """What a value is, in the words of its file format."""
    return _KINDS.get(type(value), type(value).__name__)


def reach(row: Mapping[str, Any], name: str) -> Any:
    """The column of this name, else what the dots lead to inside of objects and lists; None where there is nothing."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) <= _INDEX_DIGITS and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def top_column(name: str, found: Iterable[str]) -> str:
    """The column in which `reach` finds a name."""
    return name if name in found else name.partition(".")[0]


def is_template(name: str, found: Iterable[str]) -> bool:
    """Whether a text of the recipe is a template, where these columns were found: a column of that name comes first."""
    return "{" in name and name not in found


def columns_in(template: str) -> list[str]:
    """The names in the braces of a template; UserError where it is none."""
    return [part.name for _, parts in _parse(template) for part in parts if isinstance(part, _Column)]


def text_of(row: Mapping[str, Any], name: str, location: str) -> str:
    """The text of a column, or of a template; BadRow where the row has none."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if name in row or "{" not in name:
        return _column_text(row, name, location)
    rendered = []
    for optional, parts in _parse(name):
        texts = [part if isinstance(part, str) else _joined(row, part.name, location, optional) for part in parts]
        if not optional or all(text for text, part in zip(texts, parts, strict=True) if isinstance(part, _Column)):
            rendered += texts
    return "".join(rendered)


def _column_text(row: Mapping[str, Any], name: str, location: str) -> str:
    if name not in row:
        raise missing_column(row, name, location)
    text = scalar_text(row[name])
    if text is None:
        raise BadRow(location, f"column {name!r} holds {kind_of(row[name])}", "; expected a string")
    return text


def missing_column(row: Mapping[str, Any], name: str, location: str) -> BadRow:
    """What is wrong with a row that lacks a column."""
    return BadRow(location, f"no column {name!r} in this row", f"; found {', '.join(row) or 'none'}")


def scalar_text(value: Any) -> str | None:
    """A string as it is, a number or a boolean as JSON writes it; None for what is empty or has parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None  # how a table without a value is often exported
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value) if isinstance(value, Decimal | date) else None


def _joined(row: Mapping[str, Any], name: str, location: str, optional: bool) -> str:
    value = reach(row, name)
    text = scalar_text(value)
    if text is None and isinstance(value, list | tuple):
        text = _ENTRIES.join(_entry(one, name, location) for one in value)
    if text is None and isinstance(value, dict):
        raise BadRow(location, f"{{{name}}} is an object", f"; name a part of it, such as {{{name}.{_first(value)}}}")
    if text is None and not optional and top_column(name, row) not in row:
        raise missing_column(row, top_column(name, row), location)
    if text is None and not optional:
        raise BadRow(location, f"nothing in {{{name}}}", "; what may be missing stands in [[…]]")
    return "" if text is None or (optional and not text.strip()) else text


def _entry(value: Any, name: str, location: str) -> str:
    parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    texts = ["" if part is None else scalar_text(part) for part in parts]
    if None in texts:
        raise BadRow(location, f"{{{name}}} is nested too deep", "; expected texts, or lists of texts, in a list")
    return _PARTS.join(text or "" for text in texts)


def _first(value: Mapping[str, Any]) -> str:
    return next(iter(value), "PART")[:40]


@lru_cache(maxsize=64)
def _parse(template: str) -> _Template:
    pieces: list[tuple[bool, tuple[_Part, ...]]] = []
    parts: list[_Part] = []
    optional, at = False, 0
    for mark in _MARK.finditer(template):
        parts.append(template[at : mark.start()])
        at, found = mark.end(), mark[0]
        if found in ("{{", "}}"):
            parts.append(found[0])
        elif mark[1] and mark[1].strip():
            parts.append(_Column(mark[1].strip()))
        elif found == "[[" and not optional:
            pieces, parts, optional = [*pieces, (False, tuple(parts))], [], True
        elif found == "]]" and optional and any(isinstance(part, _Column) for part in parts):
            pieces, parts, optional = [*pieces, (True, tuple(parts))], [], False
        elif found != "]]" or optional:
            raise _refusal(template, mark.start(), found)
        else:
            parts.append(found)
    if optional:
        raise _refusal(template, template.rindex("[["), "[[")
    return (*pieces, (False, (*parts, template[at:])))


def _refusal(template: str, at: int, found: str) -> UserError:
    return UserError(
        f"template {template[:60]!r}: {found} at character {at + 1}; expected columns as {{column}}, what may be "
        "missing as [[… {column} …]], and braces that are none of it as {{ and }}"
    )
