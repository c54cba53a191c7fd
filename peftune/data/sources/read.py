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

from peftune.config.data_section import Source
from peftune.data.documents import Document, ReadStats
from peftune.data.sources import builtin, chat_template, hub, plain_text, records
from peftune.errors import UserError
from peftune.files import sha256_of

_KINDS = (["text"], ["prompt", "completion"], ["messages"])
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")


def read_documents(
    source: Source, split_on: str, stats: ReadStats | None = None, chat: str = "plain"
) -> Generator[Document, None, None]:
    """Documents of one source in a fixed order; `stats.blank` grows by what was skipped.

    `chat` is the template of conversations. Raises UserError naming file and row (or line, or byte) for whatever cannot
    be read.
    """
    stats = stats if stats is not None else ReadStats()
    if source.path.startswith("builtin:"):
        yield from _builtin_documents(source.path)
        return
    files = files_of(source)
    if files is None:
        rows = hub.rows(source, hub.revision_of(source.path), partial(_columns, source, source.path))
        yield from _documents_of_rows(source, rows, stats, chat)
    for path in files or ():
        name = str(path)  # once: a corpus may have millions of documents
        if _has_rows(path):
            rows = records.rows(path, partial(_columns, source, name), stats)
            yield from _documents_of_rows(source, rows, stats, chat)
        else:
            for line, text in plain_text.split_text(path, split_on, stats):
                yield Document(text, source=f"{name}:{line}")


def holds_chat(source: Source, split_on: str) -> bool:
    """Whether a source's documents are conversations: its first row tells, which is all that is read."""
    if source.messages is not None:
        return True
    if source.text is not None or source.prompt is not None or source.path.startswith("builtin:"):
        return False
    files = files_of(source)
    if files is not None and not _has_rows(files[0]):
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
        texts = "".join(f"{document.text}\0" for document in _builtin_documents(source.path))
        return ["builtin", hashlib.sha256(texts.encode()).hexdigest()]
    files = files_of(source)
    if files is None:
        return ["hub", hub.identity(source), *columns]
    try:
        return [*columns, *(f"{path.suffix.lower()}:{sha256_of(path)}" for path in files)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None


def state_of(source: Source) -> list[tuple[str, int, int, int, int]]:
    """What changes when somebody writes to a file of a source, puts another in its place, or adds one."""
    files = None if source.path.startswith("builtin:") else files_of(source)
    try:
        stats = [(str(path), path.stat()) for path in files or ()]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]


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
        if _HUB_NAME.match(source.path) and path.suffix.lower() not in (*records.SUFFIXES, *_TEXT_SUFFIXES):
            return None
        raise UserError(f"{source.path}: no such file{_nearest(path)}")
    if not found:
        missing = (
            "file to read there; expected text, jsonl, json, csv, tsv or parquet" if path.is_dir() else "file matches"
        )
        raise UserError(f"{source.path}: no {missing}")
    if source.split is not None or source.subset is not None:
        raise UserError(f"{source.path}: split and subset belong to hub data sets, and this is a file; leave them out")
    named = source.text or source.prompt or source.messages
    if named and not any(map(_has_rows, found)):
        advice = "leave the column out, or use jsonl or csv"
        raise UserError(f"{source.path}: a text file has no column {named!r}; {advice}")
    return found


def _has_rows(path: Path) -> bool:
    return path.suffix.lower() in records.SUFFIXES


def _existing_files(path: Path) -> list[Path] | None:
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file())
        shown = [p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        _check_links(path, shown)
        return [p for p in shown if _has_rows(p) or plain_text.looks_like_text(p)]
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; expected a file or a directory")
        if path.suffix.lower() in _PACKED:
            raise UserError(f"{path}: a packed file; unpack it first")
        return [path]
    if glob.has_magic(str(path)):
        named = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        _check_links(next(parent for parent in path.parents if not glob.has_magic(str(parent))), named)
        return named
    return None


def _check_links(directory: Path, files: list[Path]) -> None:
    """Refuse links that lead out of a directory: whoever made it would choose which files of this machine are learnt.

    In a snapshot of the hub's cache all files are links to `blobs` two levels up.
    """
    inside = directory.resolve()
    allowed = [inside, inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else [inside]
    for file in files:
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise UserError(
                f"{file}: leads out of {directory}, to {target}; copy the file there, or name it as a source"
            )


def _nearest(path: Path) -> str:
    """`; did you mean X?` with the most similar name beside the missing file."""
    if not path.parent.is_dir():
        return f" (and no directory {path.parent})"
    near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "; give a file, directory, glob or hub data set"


@lru_cache(maxsize=4)  # the source of the standard library takes seconds to cut
def _builtin_documents(path: str) -> list[Document]:
    domain, _, part = path.removeprefix("builtin:").partition("/")
    if domain not in builtin.DOMAINS or part not in get_args(builtin.Part):
        known = f"DOMAIN one of {', '.join(builtin.DOMAINS)} and PART one of {', '.join(get_args(builtin.Part))}"
        raise UserError(f"{path}: no such built-in corpus; expected builtin:DOMAIN/PART with {known}")
    return builtin.documents(domain, cast(builtin.Part, part))


def _documents_of_rows(source: Source, rows: records.Rows, stats: ReadStats, chat: str) -> Iterator[Document]:
    columns: list[str] | None = None
    with closing(rows):  # a row may be refused while its file is open
        for location, row in rows:
            if columns is None:
                columns = _columns(source, location, list(row))
            document = _document(row, columns, source, location, chat)
            scored = (text for text, scored in document.turns or ((document.text, True),) if scored)
            if any(map(str.strip, scored)):
                yield document
            else:
                stats.blank += 1


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


def _document(row: dict[str, Any], columns: list[str], source: Source, location: str, chat: str) -> Document:
    missing = [column for column in columns if column not in row]
    if missing:
        raise UserError(f"{location}: no column {missing[0]!r} in this row; found {', '.join(row) or 'none'}")
    if columns == [source.messages] or (columns == ["messages"] and source.text is None):
        turns, ends = chat_template.turns_of(row[columns[0]], location, chat), chat == chat_template.EOS_TURNS
        text = _text("".join(text for text, _ in turns), columns[0], location)
        return Document(text, turns=turns, source=location, ends_turns=ends)
    values = [_text(row[column], column, location) for column in columns]
    return Document(values[-1], prompt=values[0] if len(values) == 2 else None, source=location)


def _text(value: Any, column: str, location: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{location}: column {column!r} holds {records.kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location}: column {column!r} holds half a character (surrogate) at {error.start}") from None
    return plain_text.unix_line_ends(value)
