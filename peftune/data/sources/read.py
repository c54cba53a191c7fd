"""From a source in the recipe to documents, as a stream: at most one document is in memory.

A source is a file, a directory (every file below it, sorted), a glob (sorted), `builtin:DOMAIN/PART`, or the name of a
hub data set. `.jsonl .ndjson .json .csv .tsv .parquet` hold rows; any other suffix is text.
Rows become documents by their columns: those that the source names, else `text`, else `prompt` + `completion`, else
`messages`, else `conversations`, whichever the first row has. Blank documents (and pairs with a blank completion) are
skipped and counted.
Line ends are LF everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Generator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from peftune.config.data_section import DataSection, Source
from peftune.data.documents import Document, ReadStats
from peftune.data.rows.row_documents import RowReader
from peftune.data.sources import builtin, hub, records
from peftune.data.sources.decode import NotDecodable
from peftune.data.sources.listing import has_rows, list_files
from peftune.data.sources.text_files import name_all, text_documents
from peftune.errors import UserError
from peftune.files import sha256_of

FileStates = list[tuple[str, int, int, int, int]]
"""Of the files of a source: each name, with what changes when somebody writes to it or puts another in its place."""


def read_documents(
    source: Source, split_on: str, stats: ReadStats | None = None, chat: str = "plain"
) -> Generator[Document, None, None]:
    """Documents of one source in a fixed order; `stats` learns what was skipped, and how text files were cut.

    `chat` is the template of conversations. Raises UserError naming file and row (or line, or byte) for whatever cannot
    be read.
    """
    stats = stats if stats is not None else ReadStats()
    reader = RowReader(source, stats, chat)
    stats.cuts.append([])
    if source.is_builtin():
        _refuse_columns(source, "a built-in corpus")
        yield from _builtin_documents(source.path)
        return
    files, split_on = files_of(source), settle_split([source], source.split_on or split_on)
    if files is None:
        rows = hub.rows(source, hub.revision_of(source.path), partial(reader.choose, source.path))
        yield from reader.documents(rows, count_on=0)
    for number, path in enumerate(files or (), start=1):
        try:
            if has_rows(path):
                choose = partial(reader.choose, str(path))
                rows = records.rows(path, choose, stats, source.codec(), source.delimiter, reader.unreadable)
                yield from reader.documents(rows)
            else:
                yield from text_documents(path, source, split_on, stats)
        except NotDecodable as error:
            raise name_all(error, (files or [])[number:], source) from None
    reader.check()


def places_of(sources: Sequence[Source], split_on: str, numbers: Collection[int]) -> dict[int, str]:
    """Where some documents stand (`poems.txt:17`), by their number in the order of reading; reads up to the last.

    Where the text has become shorter or cannot be read any more, their numbers stand for them.
    """
    documents = (document for source in sources for document in read_documents(source, split_on))
    places = {number: f"document {number:,}" for number in numbers}
    with suppress(UserError):
        for number, document in enumerate(islice(documents, max(numbers, default=-1) + 1)):
            if number in places:
                places[number] = document.source
    return places


def size_of(sources: Sequence[Source]) -> int | None:
    """Bytes of all files that will be read; None where a source is not a file."""
    found = [files_of(source) for source in sources]
    return None if None in found else sum(path.stat().st_size for files in found for path in files or ())


def identity(source: Source) -> list[Any]:
    """Values that are equal where, and only where, `read_documents` gives the same texts (the path is not part)."""
    named = (source.text, source.prompt, source.completion, source.messages)
    columns: list[Any] = [*named, source.codec(), source.split_on]
    rules = source.model_dump(mode="json", include={"where", "explode", "delimiter"}, exclude_none=True)
    if source.on_bad_row == "skip":
        rules["on_bad_row"] = "skip"
    columns += [rules] if rules else []
    if source.is_builtin():
        texts = "".join(f"{document.text}\0" for document in _builtin_documents(source.path))
        return ["builtin", hashlib.sha256(texts.encode()).hexdigest()]
    files = files_of(source)
    if files is None:
        return ["hub", hub.identity(source), *columns]
    try:
        return [*columns, *(f"{path.suffix.lower()}:{sha256_of(path)}" for path in files)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None


def state_of(source: Source) -> FileStates:
    """What changes when somebody writes to a file of a source, puts another in its place, or adds one."""
    try:
        stats = [(str(path), path.stat()) for path in files_of(source) or ()]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]


def files_of(source: Source) -> list[Path] | None:
    """The files that a source means, or None as `list_files`; UserError for settings that do not go with it."""
    found = list_files(source)
    if found is None:
        if source.encoding is not None and not source.is_builtin():
            raise UserError(f"{source.path}: encoding belongs to files, and this is a hub data set; leave it out")
        return None
    if source.split is not None or source.subset is not None:
        raise UserError(f"{source.path}: split and subset belong to hub data sets, and this is a file; leave them out")
    if not any(map(has_rows, found.files)):
        _refuse_columns(source, "a text file")
    if source.delimiter and not any(path.suffix.lower() in records.DELIMITED for path in found.files):
        raise UserError(f"{source.path}: delimiter belongs to csv and tsv files, and this is none; leave it out")
    return found.files


def missing_files(section: Any) -> list[str]:
    """Why sources cannot be read that a recipe's `data` names, whatever else is wrong with it, as far as they tell."""
    try:
        read = DataSection.model_validate({key: section[key] for key in ("train", "validation") if key in section})
    except (TypeError, ValueError):
        return []
    problems = []
    for source in [*read.train, *(source for each in read.validation_sources().values() for source in each)]:
        try:
            list_files(source)
        except UserError as error:
            problems.append(str(error))
    return problems


def _refuse_columns(source: Source, kind: str) -> None:
    where = next(iter(source.where or {}), None)
    named = source.text or source.prompt or source.messages or where or source.explode
    if named:
        raise UserError(f"{source.path}: {kind} has no column {named!r}; leave the column out, or use jsonl or csv")


def settle_split(sources: Sequence[Source], split_on: str) -> str:
    """`split_on`, and for `auto` whether it meets several text files: each of them is then one document.

    The files of all sources count, so that a glob and its files named one by one give the same documents.
    """
    if split_on != "auto":
        return split_on
    listed = (files_of(source) for source in sources if len(sources) == 1 or source.split_on is None)
    texts = sum(not has_rows(path) for files in listed for path in files or ())
    return "auto/several" if texts > 1 else "auto/one"


@lru_cache(maxsize=4)  # the source of the standard library takes seconds to cut
def _builtin_documents(path: str) -> list[Document]:
    domain, _, part = path.removeprefix("builtin:").partition("/")
    if domain not in builtin.DOMAINS or part not in get_args(builtin.Part):
        known = f"DOMAIN one of {', '.join(builtin.DOMAINS)} and PART one of {', '.join(get_args(builtin.Part))}"
        raise UserError(f"{path}: no such built-in corpus; expected builtin:DOMAIN/PART with {known}")
    return builtin.documents(domain, cast(builtin.Part, part))
