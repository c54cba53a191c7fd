"""Portable checkpoints: adapter, optimizer moments, place in the run. No base weights, nothing about ranks.

`checkpoints/step-N/` holds `adapter.safetensors` (trainable parameters by name), `moments.safetensors` (AdamW's two
moments by the same names) and `state.json`. The order of samples and every random draw are functions of the seed
and the step, so the number of steps done is all that a run needs to go on with them.

A checkpoint is written beside its place, flushed to the disk, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peftune.errors import UserError
from peftune.training.distributed.replicated import Moments, Tensors

_NAME = re.compile(r"step-(\d+)")


@dataclass
class State:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0
    """Scored tokens learnt from so far."""
    micro_size: int = 0
    """Blocks per forward, once found; kept so that a resumed run rounds alike."""
    evaluated_step: int = -1
    """Step of the last evaluation, so that none is missed or repeated across a resumption."""
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    records_bytes: int = 0
    """Length of metrics.jsonl at this point; what a killed run wrote after it is cut off on resuming."""
    seconds: float = 0.0
    loss_scale: float = 1.0
    """What losses are multiplied by before they are differentiated; other than 1 in fp16 only."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Recipe and fingerprints that the run was started with."""


@dataclass(frozen=True)
class Checkpoint:
    """A state with the adapter and AdamW's moments by parameter name, all whole and on the CPU."""

    state: State
    values: Tensors
    moments: Moments


def save(folder: Path, saved: Checkpoint) -> Path:
    """Write `folder/step-N`, then remove checkpoints that are no longer wanted; UserError when the disk is full."""
    state = saved.state
    place = folder / f"step-{state.step}"
    beside = folder / f".step-{state.step}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        beside.mkdir()
        save_file({name: value.contiguous() for name, value in saved.values.items()}, beside / "adapter.safetensors")
        save_file(_flat(saved.moments), beside / "moments.safetensors")
        (beside / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        for path in (*beside.iterdir(), beside):
            _flush(path)
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = "the disk is full" if _is_disk_full(error) else str(error)
        raise UserError(f"cannot save a checkpoint to {place}: {reason}; earlier checkpoints are intact") from error
    prune(folder, keep=2, best=state.best_step)
    return place


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read whole; a damaged one (power loss) is passed over."""
    for path in reversed(listed(folder)):
        try:
            return read(path)
        except (OSError, ValueError, TypeError, SafetensorError):
            continue
    return None


def listed(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read(path: Path) -> Checkpoint:
    """A checkpoint as it was saved; OSError, ValueError, TypeError or SafetensorError where it is damaged."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(State)}
    state = State(**{key: value for key, value in values.items() if key in known})
    moments: Moments = {}
    for name, tensor in load_file(path / "moments.safetensors").items():
        parameter, _, key = name.rpartition("/")
        moments.setdefault(parameter, {})[key] = tensor
    return Checkpoint(state, load_file(path / "adapter.safetensors"), moments)


def _flat(moments: Moments) -> Tensors:
    return {f"{name}/{key}": value.contiguous() for name, entries in moments.items() for key, value in entries.items()}


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    for path in listed(folder)[:-keep]:
        if path.name != f"step-{best}":
            shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_disk_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
