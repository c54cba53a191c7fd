"""What other trainers leave (Transformers, TRL, AutoTrain): an adapter, and `checkpoint-N` beside or instead of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from peftune.errors import UserError
from peftune.files import read_object_if_present

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ENTRIES = 1_000  # of a directory that is no adapter; more are not looked at
_SHOWN = 5


def adapters_inside(directory: Path, marker: str) -> list[Path]:
    """Directories in `directory` with a file `marker`: others by name, then checkpoints by their number."""
    with os.scandir(directory) as entries:
        names = [entry.name for _, entry in zip(range(_ENTRIES), entries, strict=False) if entry.name[:1] != "."]
    return sorted((directory / name for name in names if (directory / name / marker).is_file()), key=_order)


def which_to_use(adapters: list[Path]) -> str:
    """What a directory without an adapter of its own holds, and which one to take: the last checkpoint of a run.

    `adapters` as `adapters_inside` sorts them, not empty. Where the trainer recorded its best checkpoint, that is said.
    """
    shown = ", ".join(str(path) for path in adapters[-_SHOWN:])
    found = f"{len(adapters)} adapters inside ({'…, ' if len(adapters) > _SHOWN else ''}{shown})"
    if len(adapters) == 1:
        return f"the adapter is {adapters[0]}; pass that"
    if any(checkpoint_number(path) is None for path in adapters):
        return f"{found}; pass one of them"
    best = _best_of(adapters[-1])
    recorded = f"; the best by its trainer_state.json is {best}" if best and best != adapters[-1].name else ""
    return f"{found}; pass {adapters[-1]}, the last of the run{recorded}"


def remarks(adapters: Iterable[Path]) -> list[str]:
    """A line for each run whose checkpoints are among these adapters: which of them to use."""
    listed = list(adapters)
    runs: dict[Path, list[Path]] = {}
    for path in listed:
        if checkpoint_number(path) is not None:
            runs.setdefault(path.parent, []).append(path)
    lines = []
    for run, checkpoints in runs.items():
        checkpoints.sort(key=_order)
        if run in listed:
            lines.append(f"{run} is the result of a run; its checkpoint-N directories are states on the way to it")
        elif len(checkpoints) > 1:
            lines.append(f"{run} holds {which_to_use(checkpoints)}")
    return lines


def checkpoint_number(path: Path) -> int | None:
    """N of `checkpoint-N`; None for any other name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match and len(match[1]) < 19 else None


def _order(path: Path) -> tuple[int, str]:
    number = checkpoint_number(path)
    return (-1 if number is None else number), path.name


def _best_of(checkpoint: Path) -> str:
    """The name of the best checkpoint as the Trainer recorded it; empty where it did not, or cannot be read."""
    try:
        state = read_object_if_present(checkpoint / "trainer_state.json") or {}
    except UserError:
        return ""
    best = state.get("best_model_checkpoint")
    return Path(best).name if isinstance(best, str) else ""
