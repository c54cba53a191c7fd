"""From a source in the recipe to documents, as a stream: at most one document is in memory.

A source is a file, a directory (every data or text file below it, sorted), a glob (sorted), `builtin:DOMAIN/PART`, or
the name of a hub data set. `.jsonl .ndjson .json .csv .tsv .parquet` hold rows; any other suffix is text.
Rows become documents by their columns: those that the source names, else `text`, else `prompt` + `completion`, else
`messages`, whichever the first row has. Blank documents (and pairs with a blank completion) are skipped and counted.
Line ends are LF everywhere.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast, get_args

from peftune.config.recipe import Source
from peftune.data.documents import Document, ReadStats
from peftune.data.sources import builtin, chat_template, hub, plain_text, records
from peftune.errors import UserError
from peftune.files import sha256_of

_KINDS = (["text"], ["prompt", "completion"], ["messages"])
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")


def read_documents(source: Source, split_on: str, stats: ReadStats | None = None) -> Generator[Document, None, None]:
    """Documents of one source in a fixed order; `stats.blank` grows by what was skipped.

    Raises UserError naming file and row (or line, or byte) for whatever cannot be read.
    """
    stats = stats if stats is not None else ReadStats()
    if source.path.startswith("builtin:"):
        yield from _builtin_documents(source.path)
        return
    files = files_of(source)
    if files is None:
        found = hub.rows(source, partial(_columns, source, source.path))
        yield from _documents_of_rows(source, found, stats)
        return
    for path in files:
        if path.suffix.lower() in records.SUFFIXES:
            found = records.rows(path, partial(_columns, source, str(path)), stats)
            yield from _documents_of_rows(source, found, stats)
        else:
            name = str(path)  # once: a corpus may have millions of documents
            for line, text in plain_text.split_text(path, split_on, stats):
                yield Document(text, source=f"{name}:{line}")


def holds_chat(source: Source, split_on: str) -> bool:
    """Whether a source's documents are conversations: its first row tells, which is all that is read."""
    if source.messages is not None:
        return True
    if source.text is not None or source.prompt is not None or source.path.startswith("builtin:"):
        return False
    files = files_of(source)
    if files is not None and files[0].suffix.lower() not in records.SUFFIXES:
        return False
    with closing(read_documents(source, split_on)) as documents:
        first = next(documents, None)
    return first is not None and first.turns is not None


def size_of(sources: Sequence[Source]) -> int | None:
    """Bytes of all files that will be read; None where a source is not a file."""
    found = [None if source.path.startswith("builtin:") else files_of(source) for source in sources]
    return None if None in found else sum(path.stat().st_size for files in found for path in files or ())


def identity(source: Source) -> list[str | None]:
    """Values that are equal where, and only where, `read_documents` gives the same texts (the path is not part)."""
    columns = [source.text, source.prompt, source.completion, source.messages]
    if source.path.startswith("builtin:"):
        digest = hashlib.sha256()
        for document in _builtin_documents(source.path):
            digest.update(document.text.encode("utf-8") + b"\0")
        return ["builtin", digest.hexdigest()]
    files = files_of(source)
    if files is None:
        return ["hub", hub.identity(source), *columns]
    return [*columns, *(f"{path.suffix.lower()}:{_hash_of_file(path)}" for path in files)]


def files_of(source: Source) -> list[Path] | None:
    """The files that a source means, or None where it names a hub data set; UserError for a path without files."""
    if not source.path or "\0" in source.path:
        raise UserError(f"{source.path!r}: expected a path, a glob, builtin:DOMAIN/PART or a hub data set")
    try:
        path = Path(source.path).expanduser()
        found = _existing_files(path)
    except OSError as error:
        raise UserError(f"{source.path[:200]}: cannot be read: {error.strerror or error}") from None
    except RuntimeError:  # ~name without such a user
        raise UserError(f"{source.path}: no such file (and no such user)") from None
    if found is None:
        if is_hub_name(source.path):
            return None
        raise UserError(f"{source.path}: no such file{_nearest(path)}")
    if not found:
        if not path.is_dir():
            raise UserError(f"{source.path}: no file matches")
        raise UserError(f"{source.path}: no file to read there; expected text, jsonl, json, csv, tsv or parquet")
    _check_options(source, found)
    return found


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file can be a hub data set: `name` or `owner/name` without the suffix of a file."""
    suffix = Path(name).suffix.lower()
    return bool(_HUB_NAME.match(name)) and suffix not in (*records.SUFFIXES, *_TEXT_SUFFIXES)


def _existing_files(path: Path) -> list[Path] | None:
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return [p for p in below if p.suffix.lower() in records.SUFFIXES or plain_text.looks_like_text(p)]
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; expected a file or a directory")
        return [path]
    if glob.has_magic(str(path)):
        return [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    return None


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _nearest(path: Path) -> str:
    """`; did you mean X?` with the most similar name beside the missing file."""
    if not path.parent.is_dir():
        return f" (and no directory {path.parent})"
    near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; give a file, directory, glob or hub data set"


def _check_options(source: Source, files: Sequence[Path]) -> None:
    if source.split is not None or source.subset is not None:
        raise UserError(f"{source.path}: split and subset belong to hub data sets, and this is a file; leave them out")
    named = source.text or source.prompt or source.messages
    if named and not any(path.suffix.lower() in records.SUFFIXES for path in files):
        raise UserError(
            f"{source.path}: a text file has no column {named!r}; leave the column out, or use jsonl or csv"
        )


def _hash_of_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=4)  # the source of the standard library takes seconds to cut
def _builtin_documents(path: str) -> list[Document]:
    domain, _, part = path.removeprefix("builtin:").partition("/")
    parts = get_args(builtin.Part)
    if domain not in builtin.DOMAINS or part not in parts:
        raise UserError(
            f"{path}: no such built-in corpus; expected builtin:DOMAIN/PART with DOMAIN one of "
            f"{', '.join(builtin.DOMAINS)} and PART one of {', '.join(parts)}"
        )
    return builtin.documents(domain, cast(builtin.Part, part))


def _documents_of_rows(source: Source, rows: records.Rows, stats: ReadStats) -> Iterator[Document]:
    columns: list[str] | None = None
    with closing(rows):  # a row may be refused while its file is open
        for location, row in rows:
            if columns is None:
                columns = _columns(source, location, list(row))
            document = _document(row, columns, source, location)
            if _is_blank(document):
                stats.blank += 1
            else:
                yield document


def _columns(source: Source, location: str, found: Sequence[str]) -> list[str]:
    """The columns to read: one for text or messages, two for prompt and completion."""
    named = [name for name in (source.text, source.prompt, source.completion, source.messages) if name is not None]
    for columns in [named] if named else _KINDS:
        if all(column in found for column in columns):
            return columns
    missing = " and ".join(repr(name) for name in named if name not in found) or "'text'"
    raise UserError(
        f"{location}: no column {missing}; found {', '.join(found) or 'none'}; name yours as "
        "{path: …, text: COLUMN} or {path: …, prompt: COLUMN, completion: COLUMN}"
    )


def _document(row: dict[str, Any], columns: list[str], source: Source, location: str) -> Document:
    missing = [column for column in columns if column not in row]
    if missing:
        raise UserError(f"{location}: no column {missing[0]!r} in this row; found {', '.join(row) or 'none'}")
    if columns == [source.messages] or (columns == ["messages"] and source.text is None):
        turns = chat_template.turns_of(row[columns[0]], location)
        return Document(_text("".join(text for text, _ in turns), columns[0], location), turns=turns, source=location)
    values = [_text(row[column], column, location) for column in columns]
    return Document(values[-1], prompt=values[0] if len(values) == 2 else None, source=location)


def _is_blank(document: Document) -> bool:
    if document.turns is not None:
        return not any(scored and text.strip() for text, scored in document.turns)
    return not document.text.strip()


def _text(value: Any, column: str, location: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{location}: column {column!r} holds {records.kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: column {column!r} holds half a character (surrogate) at {error.start}") from None
    return plain_text.unix_line_ends(value)
