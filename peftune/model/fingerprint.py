"""Content hashes that take long, remembered by the identity of the files: path, size, inode, both times.

They lie in `fingerprints.json` under `files.cache_directory`, each with a checksum of its own. The time of the last
change of the inode is a part of the identity: programs can set the modification time back, but not that one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peftune.errors import UserError
from peftune.files import cache_directory, read_object, write_whole

_REMEMBERED = 512


def remembered(kind: str, files: list[Path], compute: Callable[[], str], fresh: bool = False) -> str:
    """`compute()`, or what it gave for these very files; a cache that cannot be read or written changes nothing.

    With `fresh` it is computed in any case: a disk can lose a bit without any time of a file changing.
    """
    identity = _identity(files)
    key = hashlib.sha256(json.dumps([kind, 2, identity]).encode()).hexdigest()
    path = cache_directory() / "fingerprints.json"
    known, _, check = _load(path).get(key, "").partition(":")
    if known and check == _checksum(key, known) and not fresh:
        return known
    value = compute()
    if _identity(files) == identity:  # nobody wrote to the files meanwhile
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = dict(list(_load(path).items())[-_REMEMBERED:]) | {key: f"{value}:{_checksum(key, value)}"}
            write_whole(path, json.dumps(kept, indent=0).encode())
    return value


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements as they lie in memory, for hashing."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _identity(files: list[Path]) -> list[list[str | int]]:
    stats = [(os.path.realpath(file), file.stat()) for file in files if file.is_file()]
    return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for path, stat in stats]


def _checksum(key: str, value: str) -> str:
    return hashlib.sha256(f"{key} {value}".encode()).hexdigest()[:16]


def _load(path: Path) -> dict[str, str]:
    try:
        return {key: value for key, value in read_object(path).items() if isinstance(value, str)}
    except UserError:
        return {}
