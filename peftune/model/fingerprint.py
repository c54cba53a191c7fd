"""Content hashes that take long, remembered by the identity of the files: path, size, modification time, inode.

They lie in `fingerprints.json` under `files.cache_directory`.
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


def remembered(kind: str, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for these very files; a cache that cannot be read or written changes nothing."""
    identity = _identity(files)
    key = hashlib.sha256(json.dumps([kind, 1, identity]).encode()).hexdigest()
    path = cache_directory() / "fingerprints.json"
    known = _load(path).get(key)
    if known is not None:
        return known
    value = compute()
    if _identity(files) == identity:  # nobody wrote to the files meanwhile
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = dict(list(_load(path).items())[-_REMEMBERED:]) | {key: value}
            write_whole(path, json.dumps(kept, indent=0).encode())
    return value


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements as they lie in memory, for hashing."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _identity(files: list[Path]) -> list[list[str | int]]:
    stats = [(os.path.realpath(file), file.stat()) for file in files if file.is_file()]
    return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ino] for path, stat in stats]


def _load(path: Path) -> dict[str, str]:
    try:
        return {key: value for key, value in read_object(path).items() if isinstance(value, str)}
    except UserError:
        return {}
