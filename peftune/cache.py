"""The cache: what can be made again, believed only where nobody but its user, or root, can have written it.

| name                | holds                                                                        |
|---------------------|------------------------------------------------------------------------------|
| `tokens/KEY/`       | tokenised documents (`data.tokens.store`)                                     |
| `fingerprints.json` | content hashes of bases and tokenizers (`model.fingerprint`)                  |
| `torchinductor/`    | kernels that torch compiled (`model.train.compiled`)                          |

Windows knows no owner and mode in this sense: a cache there is as private as the directory that it lies in.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from peftune.errors import UserError

_ADVICE = "and a cache is believed: set PEFTUNE_CACHE to a directory of your own"


def cache_directory() -> Path:
    """Where everything that can be made again is kept: $PEFTUNE_CACHE, else ~/.cache/peftune."""
    try:
        return Path(os.environ.get("PEFTUNE_CACHE") or Path.home() / ".cache" / "peftune")
    except RuntimeError:  # a container's user without a home: a place where nothing can be made
        return Path(os.devnull) / "peftune"


def check_private(root: Path, *below: str) -> Path:
    """`root` joined with `below`; UserError where any of these directories is not private, or is a link in `root`."""
    path = root
    for name in ("", *below):
        path = path / name if name else path
        try:
            found = path.lstat() if name else path.stat()  # the cache itself may lie elsewhere
        except OSError:  # not there, or not to be read: whoever needs it says so
            return root.joinpath(*below)
        _check(path, found)
    return path


def private_directory(root: Path, *below: str) -> Path:
    """`check_private`, and the directories are made where they are missing; OSError where they cannot be."""
    check_private(root, *below)
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root
    for name in ("", *below):
        path = path / name if name else path
        path.mkdir(mode=0o700, exist_ok=True)
    return check_private(root, *below)


def can_write(root: Path, *below: str) -> bool:
    """Whether `private_directory` is there, or could be made, for us to write to; UserError as there."""
    try:
        return os.access(private_directory(root, *below), os.W_OK | os.X_OK)
    except OSError:
        return False


def open_private(path: Path) -> int:
    """A handle to read a file of the cache by; UserError where it is not private, OSError where it cannot be opened."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink():
        _check(path, path.lstat())
    handle = os.open(path, flags)
    try:
        found = os.fstat(handle)
        _check(path, found)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path}: not a regular file")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check(path: Path, found: os.stat_result) -> None:
    if os.name == "nt":
        return
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        raise UserError(f"{path}: is a link in the cache, where peftune makes none; remove it")
    if found.st_uid not in (os.getuid(), 0):
        raise UserError(f"{path}: belongs to user {found.st_uid}, not to you (user {os.getuid()}), {_ADVICE}")
    if mode & 0o022:
        safe = "if you trust who could write there, chmod -R go-w"
        raise UserError(f"{path}: others may write to it (mode {mode:o}), {_ADVICE}, or, {safe} {path}")
