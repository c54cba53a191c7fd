"""The files that a path, a directory or a glob means, and what lies among them that is not read."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from peftune.config.data_section import Source
from peftune.config.spelling import spelt
from peftune.console import name_some
from peftune.data.sources import records
from peftune.data.sources.decode import looks_like_text
from peftune.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
_DOCUMENTS = (".docx", ".doc", ".odt", ".rtf", ".pdf", ".epub", ".pages", ".wpd", ".gdoc")
_WHAT_TO_DO = {  # with files that hold text in a form that is not read
    (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack {}",
    _DOCUMENTS: "save {} as plain text (.txt, UTF-8)",
    (".xlsx", ".xls", ".ods", ".numbers", ".gsheet"): "save {} as csv (UTF-8)",
}
_ABOUT = {"license", "licence", "copying", "notice", "readme", "authors", "contributing", "changelog", "makefile"}
_OF_THE_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class Listing:
    """Files to read, in order; by their names those left out: `hidden` ones always, `unknown` ones where asked to."""

    files: list[Path] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def list_files(source: Source) -> Listing | None:
    """What a source means, or None for a built-in corpus or a hub data set; UserError for a path without files."""
    if source.is_builtin():
        return None
    if not source.path or "\0" in source.path:
        raise UserError(f"{source.path!r}: expected a path, a glob, builtin:DOMAIN/PART or a hub data set")
    try:
        path = Path(source.path).expanduser()
        found = _existing_files(path)
        if found is not None and not path.is_file():
            _leave_out_unknown(found, source)
    except OSError as error:
        where = str(error.filename or source.path)[:200]
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None
    except RuntimeError:  # ~name without such a user
        raise UserError(f"{source.path}: no such file (and no such user)") from None
    if found is None:
        if _HUB_NAME.match(source.path) and path.suffix.lower() not in (*records.SUFFIXES, *_TEXT_SUFFIXES):
            return None
        raise UserError(f"{source.path}: no such file{_nearest(path)}")
    if not found.files:
        missing = (
            "file to read there; expected text, jsonl, json, csv, tsv or parquet" if path.is_dir() else "file matches"
        )
        left_out = [*found.hidden, *found.unknown]
        raise UserError(f"{source.path}: no {missing}{f' (left out: {name_some(left_out)})' if left_out else ''}")
    return found


def has_rows(path: Path) -> bool:
    """Whether a file holds rows with columns, by its name; any other is text."""
    return path.suffix.lower() in records.SUFFIXES


def _existing_files(path: Path) -> Listing | None:
    if path.is_dir():
        found = Listing()
        found.files = sorted(_walk(path, found.hidden))
        found.hidden.sort()
        _check_links(path, found.files)
        return found
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: not a regular file; expected a file or a directory")
        if todo := _advice([path]):
            raise UserError(f"{path}: neither text nor data; {todo[0]}")
        return Listing([path])
    if glob.has_magic(str(path)):
        root = next(parent for parent in path.parents if parent.exists())  # its own brackets are no pattern
        found = Listing()
        for file in sorted(_matching(root, path.relative_to(root).parts, found.hidden)):
            if _is_litter(file.name):
                found.hidden.append(file.name)
            elif file.is_file():
                found.files.append(file)
        _check_links(root, found.files)
        return found
    return None


def _walk(directory: Path, hidden: list[str]) -> Iterator[Path]:
    """Files below a directory that are not hidden; a link to a directory is not followed, and counts as hidden."""
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path, is_folder = Path(entry.path), entry.is_dir()
                if entry.name[0] == "." or _is_litter(entry.name) or (is_folder and entry.is_symlink()):
                    name = path.relative_to(directory).as_posix()
                    hidden.append(f"{name} (a link to a directory)" if is_folder and entry.is_symlink() else name)
                elif is_folder:
                    waiting.append(path)
                elif entry.is_file():
                    yield path


def _matching(root: Path, pattern: tuple[str, ...], hidden: list[str]) -> Iterator[Path]:
    """Paths below `root` that match; `**` is any number of directories, links to directories not among them.

    `glob.glob` follows such links, in circles too.
    """
    if "**" not in pattern:
        yield from map(Path, glob.glob(str(Path(glob.escape(str(root)), *pattern))))
        return
    for path in _walk(root, hidden):
        if _matches(path.relative_to(root).parts, pattern):
            yield path


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    reached = {0}  # how much of the pattern the parts of the path so far can have filled
    for part in (*parts, None):
        for at, piece in enumerate(pattern):
            if piece == "**" and at in reached:
                reached.add(at + 1)
        if part is not None:
            reached = {
                at if pattern[at] == "**" else at + 1
                for at in reached - {len(pattern)}
                if pattern[at] == "**" or fnmatchcase(part, pattern[at])
            }
    return len(pattern) in reached


def _is_litter(name: str) -> bool:
    """What systems and editors leave in a directory without showing it."""
    return name.startswith("~$") or name.endswith("~") or name.lower() in _OF_THE_SYSTEM


def _advice(paths: Sequence[Path]) -> list[str]:
    """What to do with files whose kind is not read, by their names."""
    found = sorted({path.suffix.lower() for path in paths})
    kinds = ((todo, [suffix for suffix in found if suffix in suffixes]) for suffixes, todo in _WHAT_TO_DO.items())
    return [todo.format(", ".join(of_kind)) for todo, of_kind in kinds if of_kind]


def _leave_out_unknown(found: Listing, source: Source) -> None:
    """Take out of a listing what is neither text nor data; UserError that names all, unless they are to be skipped."""
    known = (*records.SUFFIXES, *_TEXT_SUFFIXES)
    unknown = [
        path
        for path in found.files
        if path.suffix.lower() not in known
        and (_advice([path]) or path.name.lower() in _ABOUT or not looks_like_text(path))
    ]
    if unknown and source.unknown_files != "skip":
        names = name_some([path.name for path in unknown])
        todo = [*_advice(unknown), f"move them away, or leave them out with {spelt(unknown_files='skip')}"]
        raise UserError(
            f"{source.path}: {len(unknown):,} of {len(found.files):,} files are neither text nor data: {names}; "
            f"{'; '.join(todo)}"
        )
    left_out = set(unknown)
    found.files = [path for path in found.files if path not in left_out]
    found.unknown = [path.name for path in unknown]


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
