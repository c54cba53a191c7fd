"""The directory that a run writes: that it can be written, that no other run does so, and none of another recipe did.

What makes another run another one are the recipe's decisive values, and fingerprints of what it reads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from peftune.adapters.provenance import recorded_dict
from peftune.config.recipe import Recipe
from peftune.console import name_some
from peftune.data.sources.read import state_of
from peftune.errors import UserError
from peftune.training.distributed.agreement import flatten, where_they_differ
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


HARMLESS = frozenset(
    {
        "run.out", "run.init", "run.eval_every", "run.save_every", "run.resume", "run.track", "run.samples",
        "run.early_stopping", "run.checkpointing", "run.fast", "run.compile", "batch.micro_size",
        "run.device", "run.deterministic",
        "data.lint",
        "data.split_on", "data.unknown_files",  # the fingerprints tell whether other documents come of them
    }
)  # fmt: skip
"""Keys that may change between a run and its resumption: none decides what is learnt (beyond rounding)."""


def identity_of(recipe: Recipe, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Flat mapping of every recipe value that decides what is learnt, and the fingerprints of base and data."""
    kept = {k: v for k, v in flatten(recipe.model_dump(mode="json")).items() if k not in HARMLESS}
    return kept | {f"fingerprint of {k}": v for k, v in fingerprints.items()}


FILES = "files"
"""Key of an identity that is not compared: sizes by path, by which a message can say which file was changed."""
_MOST_FILES = 1000  # that are recorded


def sizes_of_files(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Bytes of the files behind each fingerprint of data, by path; of data of many files, or of a hub, nothing."""
    validation = {f"validation/{name}": sources for name, sources in recipe.data.validation_sources().items()}
    found = {}
    for name, sources in {"train": recipe.data.train, **validation}.items():
        sizes = {path: size for source in recipe.data.read_as(sources) for path, _, size, *_ in state_of(source)}
        if 0 < len(sizes) <= _MOST_FILES:
            found[name] = sizes
    return found


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """UserError listing every difference between the run that is there and the one asked for."""
    # What an older release did not record had its default, or cannot be compared.
    unrecorded = _DEFAULTS | {key: now[key] for key in now if key == "fingerprint of config"}
    saved = {key: value for key, value in saved.items() if key not in HARMLESS}
    files = [recorded_dict(values, FILES) for values in (saved, now)]
    before, after = (
        dict(leaf for key, value in sorted(values.items()) if key != FILES for leaf in _leaves(key, value))
        for values in (unrecorded | saved, _DEFAULTS | now)
    )
    changed = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            was, is_now = where_they_differ(*(str(values.get(key, "not there")) for values in (before, after)))
            name = key.removeprefix("fingerprint of data ")
            told = _changed_files(*(recorded_dict(each, name) for each in files)) if name != key else ""
            changed.append(f"{key} was {was}, is {is_now}{told}")
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. To train this one, give run.out another "
            "name; to go on with that one, undo the change"
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is below a key, each value with the way to it (`data.train[1].path`), without what is null."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(f"{key}[{number}]", inner)
    elif value is not None:
        yield key, value


def _changed_files(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Which files came, went and have another size since, as far as that is known."""
    if not before or not after:
        return ""
    kinds = {
        "added": after.keys() - before.keys(), "removed": before.keys() - after.keys(),
        "changed": {path for path in before.keys() & after.keys() if before[path] != after[path]},
    }  # fmt: skip
    told = [f"{kind}: {name_some(sorted(paths), 3)}" for kind, paths in kinds.items() if paths]
    return f" ({', '.join(told) or 'the same files with the same sizes, with other text'})"


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
