"""Files: JSON read and written, directories that appear whole or not at all, content hashes, where the cache is.

What is written goes beside its name first and is renamed when it is complete, so a reader never sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftune.errors import UserError

_CHUNK = 1 << 20  # bytes hashed at a time
_staged: set[Path] = set()  # names that `beside` gave


def cache_directory() -> Path:
    """Where everything that can be made again is kept: $PEFTUNE_CACHE, else ~/.cache/peftune."""
    return Path(os.environ.get("PEFTUNE_CACHE") or Path.home() / ".cache" / "peftune")


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def beside(path: Path) -> Path:
    """A name next to `path` that nothing has: where it is written before it gets its own."""
    name = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    _staged.add(name)
    return name


def remove_staged() -> None:
    """Remove what this process is writing beside its names; it ends at once afterwards, from any thread."""
    for path in _staged:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A new directory next to `target`, to be filled and renamed; removed at the end unless it was."""
    directory = beside(target)
    try:
        directory.mkdir(parents=True)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory with every file in it, is on the disk; OSError where it cannot be."""
    for each in (*path.iterdir(), path) if path.is_dir() else (path,):
        if os.name == "nt" and each.is_dir():  # Windows flushes files alone, and those opened for writing
            continue
        handle = os.open(each, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its name, then rename it; OSError where that cannot be done, and nothing is left."""
    staged = beside(path)
    try:
        staged.write_bytes(content)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a JSON file that cannot be written, before the work is done."""
    try:
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        writable = False
    if not writable:
        raise UserError(f"{str(path)[:200]}: cannot be written; expected a JSON file in a directory that exists")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; into a pipe (`/dev/stdout`) as it is."""
    text = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(text)
        else:
            write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def read_object_if_present(path: Path, name: str | None = None) -> dict[str, Any] | None:
    """`read_object`, or None where there is no such file."""
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # a name that is too long: reading it says so
        pass
    return read_object(path, name)


def read_object(path: Path, name: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; UserError, in which the file is called `name`, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name or path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name or path}: holds {type(value).__name__}, expected an object")
    return value
