"""An adapter's files where nobody else can change them between the check and the reading."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peftune.errors import UserError, explained


@contextmanager
def private_copy(directory: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """A directory of the same name with copies of the files in `directory`, its folders empty; removed afterwards.

    A file may be a link to one below a root. What is opened is what was checked: no link that is put into the path
    meanwhile is followed. Raises UserError where a file lies outside the roots, is none, or cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="peftune-") as parent:
        copy = Path(parent) / directory.name
        copy.mkdir()
        with explained(f"adapter {directory}: cannot be read"):
            for entry in sorted(directory.iterdir()):
                real = Path(os.path.realpath(entry))
                if not is_inside(real, roots):
                    raise UserError(f"adapter {directory}: {entry.name} lies outside the directories to load from")
                if real.is_dir():
                    (copy / entry.name).mkdir()  # where a file should be, the reader says so
                else:
                    _copy(real, copy / entry.name)
        yield copy


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path without links lies below one of these."""
    return any(path.is_relative_to(root) for root in roots)


def _copy(path: Path, target: Path) -> None:
    with os.fdopen(_open_without_links(path), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe would never end
            raise UserError(f"adapter {path.parent}: {path.name} is not a file")
        with target.open("wb") as out:
            shutil.copyfileobj(file, out, 1 << 20)


def _open_without_links(path: Path) -> int:
    """A descriptor of a path that holds no links; OSError where one has come into it."""
    if os.open not in os.supports_dir_fd:  # Windows, where only administrators make links
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    search = os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_PATH", os.O_RDONLY)
    folder = os.open(path.anchor, search)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, search, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
