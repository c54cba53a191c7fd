"""Content hashes that take long, remembered by the identity of the files: path, size, times, inode.

They lie in `fingerprints.json` under `cache.cache_directory`.
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

from peftune.cache import cache_directory, check_private, open_private, private_directory
from peftune.files import parse_json, write_whole

_REMEMBERED = 512
_BYTES = 1 << 20


def remembered(kind: str, files: list[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for these very files; a cache that cannot be read or written changes nothing.

    Raises UserError where others may write to the cache.
    """
    identity = _identity(files)
    key = hashlib.sha256(json.dumps([kind, 2, identity]).encode()).hexdigest()
    path = check_private(cache_directory()) / "fingerprints.json"
    known = _load(path).get(key)
    if known is not None:
        return known
    value = compute()
    if _identity(files) == identity:  # nobody wrote to the files meanwhile
        with suppress(OSError):
            private_directory(path.parent)
            kept = dict(list(_load(path).items())[-_REMEMBERED:]) | {key: value}
            content = {"fingerprints": kept, "sha256": _hash(kept)}
            write_whole(path, json.dumps(content, indent=0).encode(), mode=0o600)
    return value


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements as they lie in memory, for hashing."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _identity(files: list[Path]) -> list[list[str | int]]:
    stats = [(os.path.realpath(file), file.stat()) for file in files if file.is_file()]
    # the last cannot be set by whoever puts the others back
    return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns] for path, stat in stats]


def _load(path: Path) -> dict[str, str]:
    """What is remembered; nothing where the file is missing or not what was written."""
    try:
        with open(open_private(path), "rb") as file:
            content = parse_json(file.read(_BYTES))
        kept = content["fingerprints"]
        return kept if content["sha256"] == _hash(kept) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _hash(kept: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()
