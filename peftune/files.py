"""Files: JSON read and written, directories that appear whole or not at all, content hashes.

What is written goes beside its name first and is renamed when it is complete, so a reader never sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from peftune.errors import CheckFailed, UserError, explained

_CHUNK = 1 << 20  # bytes hashed at a time
_JSON_BYTES = 256 << 20  # of a file; the largest tokenizers take 30 MB
_JSON_DEPTH = 64  # nested lists and objects; what walks a value later recurses
_CHANGED = "is not the file that was written (its SHA-256 differs): it was changed or damaged; copy or make it again"
_DIGITS = 40  # of a whole number; what shows one takes it for a float
_HALF = re.compile("[\ud800-\udfff]")  # of a character, as in a file's name: not to be written but as \\udcff
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_UMASK = os.umask(0o077)  # asked once, while there is one thread: asking sets it
os.umask(_UMASK)
_staged: set[Path] = set()  # names that `beside` gave


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_values(values: Any) -> str:
    """sha256 of plain values as JSON, the same however a file spells them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hashes_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 by file name, to be kept beside the files and given to `read_bytes` when they are read."""
    return {name: sha256_of(directory / name) for name in sorted(names)}


def apply_umask(path: Path) -> None:
    """Give a file the permissions of any new file; libraries that write through a temporary file leave 0600."""
    path.chmod(0o666 & ~_UMASK)


def beside(path: Path) -> Path:
    """A name next to `path` that nothing has: where it is written before it gets its own."""
    name = path.with_name(f"{_prefix(path)}{_HOST}-{os.getpid()}.{uuid.uuid4().hex[:8]}")
    _staged.add(name)
    return name


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left beside `target`; what still runs keeps its own."""
    remove_all_leftovers(target.parent, _prefix(target))


def remove_all_leftovers(directory: Path, prefix: str | None = None) -> None:
    """Remove what killed processes of this machine left in a directory, beside any name."""
    found = list(directory.iterdir()) if directory.is_dir() else []
    now = {path.name for path in list(_staged)}  # a container's first process has the number of the one before it
    for path in found:
        here, pid = writer_of(path.name) or (False, 0)
        works = path.name in now if pid == os.getpid() else psutil.pid_exists(pid)
        if here and not works and prefix in (None, f"{path.name.rsplit('.', 2)[0]}."):
            remove(path)


def writer_of(name: str) -> tuple[bool, int] | None:
    """Of a name that `beside` made: whether a process of this machine did, and its number."""
    match = re.fullmatch(r"\..+\.([0-9a-f]{8})-(\d+)\.[0-9a-f]{8}", name)
    return (match[1] == _HOST, int(match[2])) if match else None


def _prefix(path: Path) -> str:
    """How names beside `path` begin; short enough for every file system, whatever the name."""
    name = path.name if len(path.name.encode()) <= 160 else hashlib.sha256(path.name.encode()).hexdigest()[:32]
    return f".{name}."


def remove_staged() -> None:
    """Remove what this process is writing beside its names; it ends at once afterwards, from any thread."""
    list(map(remove, list(_staged)))  # a copy: the main thread may go on meanwhile


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it, as far as that can be done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A new directory next to `target`, to be filled and renamed; removed at the end unless it was."""
    remove_leftovers(target)
    directory = beside(target)
    try:
        directory.mkdir(parents=True)
        yield directory
    finally:
        remove(directory)


def publish(staging: Path, target: Path) -> None:
    """Flush a complete directory to the disk and give it its name; a crash leaves all of it or nothing."""
    flush_to_disk(staging)
    staging.rename(target)
    flush_directory(target.parent)


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk; Windows has no such call."""
    if os.name != "nt":
        _flush(path, os.O_RDONLY)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory with everything in it, is on the disk; OSError where it cannot be."""
    if path.is_dir():
        for each in path.iterdir():
            flush_to_disk(each)
        flush_directory(path)
    else:
        _flush(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what is open for writing


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file beside its name, flush it and rename it; OSError where it cannot be, and nothing is left.

    `mode` are its permissions (default: those of any new file).
    """
    remove_leftovers(path)
    staged = beside(path)
    try:
        staged.write_bytes(content)
        if mode is not None:
            staged.chmod(mode)
        flush_to_disk(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work is done."""
    try:
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        writable = False
    if not writable:
        raise UserError(f"{str(path)[:200]}: cannot be written; expected a file in a directory that exists")


def json_text(value: Any) -> str:
    """A value as strict JSON for people to read; ValueError where it holds a number that is not finite."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (json.dumps(value, indent=2, allow_nan=False) if _HALF.search(text) else text) + "\n"


def json_document(value: Any, name: str) -> str:
    """`json_text`; CheckFailed, in which the place for it is called `name`, where a number is not finite."""
    try:
        return json_text(value)
    except ValueError:
        raise CheckFailed(f"{name}: not written: a result is not a finite number") from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON; CheckFailed where it holds a number that is not finite."""
    write_text(path, json_document(value, str(path)))


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; into a pipe (`/dev/stdout`) as it is. UserError where it cannot be written."""
    with explained(f"{path}: cannot be written"):
        if path.exists() and not path.is_file():
            path.write_bytes(text.encode())
        else:
            write_whole(path, text.encode())


def read_object_if_present(path: Path, name: str | None = None) -> dict[str, Any] | None:
    """`read_object`, or None where there is no such file."""
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # a name that is too long: reading it says so
        pass
    return read_object(path, name)


def read_bytes(path: Path, name: str, sha256: str | None = None, at_most: int | None = None) -> bytes:
    """What is in a file, read once; a pipe or a device is not waited for.

    UserError, in which the file is called `name`, where it cannot be read, is too long or has another hash.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(path, "rb", opener=lambda file, _: os.open(file, flags)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is not a file")
            if at_most is not None and found.st_size > at_most:
                raise ValueError(f"it has {found.st_size:,} bytes; expected at most {at_most:,}")
            content = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise UserError(f"{name}: cannot be read: its {found.st_size:,} bytes do not fit into memory") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{name} {_CHANGED}")
    return content


def read_object(path: Path, name: str | None = None, sha256: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; UserError, in which the file is called `name`, where there is none (`read_bytes`)."""
    content = read_bytes(path, name or str(path), sha256, _JSON_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(f"{name or path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name or path}: holds {type(value).__name__}, expected an object")
    return value


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text in UTF-8: finite numbers, no name twice, nested at most 64 deep; else ValueError."""
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    hooks: Any = {"parse_constant": _refuse_constant, "parse_float": _finite, "parse_int": _whole}
    try:
        value = json.loads(text, object_pairs_hook=_unique_names, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_JSON_DEPTH + 1):
        inner = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {_JSON_DEPTH} deep")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text):,} digits; expected at most {_DIGITS}")
    return int(text)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"the name {name[:40]!r} stands twice in one object")
    return dict(pairs)


def repeated(names: Iterable[str]) -> str | None:
    """One of these names that stands there more than once, or None; in one pass, since a file may have millions."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
