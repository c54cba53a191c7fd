"""The directory that a run writes: whether it can be written, and that no other run writes there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from peftune.errors import UserError
from peftune.training.distributed.collectives import broadcast

_PATIENCE = 0.5  # seconds that a lock is waited for: `is_being_written` takes it for a moment


@contextmanager
def sole_writer(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """The first rank locks `out` for this run.

    Raises UserError, on all ranks, where it cannot be written, holds a full model or is locked by another run.
    """
    lock = FileLock(out / ".lock")
    broadcast(accelerator, lambda: _acquire(lock, out))
    try:
        yield
    finally:
        lock.release()


def is_being_written(out: Path) -> bool:
    """Whether a run of this machine holds the lock of `out`; one that begins in this moment waits for the answer."""
    if not os.path.isfile(out / ".lock"):  # False for a name that is too long
        return False
    try:
        with FileLock(out / ".lock", timeout=0):
            return False
    except (Timeout, OSError):  # one that may only be read is not tried
        return True


def check_writable(out: Path) -> None:
    """UserError where a run could not write its directory; nothing is made."""
    with _told_of(out):
        if (out / "config.json").is_file():  # an adapter there would be loaded with it, unasked
            raise UserError(f"run.out {out}: holds a full model; give the adapter a directory of its own")
        above = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
        for path in (above, out / "checkpoints"):  # now, not when there is something to write after hours
            if os.path.lexists(path) and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                raise OSError(errno.EACCES, f"{path.name} is not a directory that may be written to")


def _acquire(lock: FileLock, out: Path) -> None:
    check_writable(out)
    with _told_of(out):
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE, poll_interval=0.02)


@contextmanager
def _told_of(out: Path) -> Iterator[None]:
    """UserError for what goes wrong with the directory of a run."""
    try:
        yield
    except Timeout:
        raise UserError(f"run.out {out}: another run is writing there; wait for it, or choose another name") from None
    except (OSError, ValueError, RecursionError) as error:  # a NUL in the name, a thousand directories
        raise UserError(f"run.out {str(out)[:200]!r}: cannot be written: {getattr(error, 'strerror', error)}") from None
