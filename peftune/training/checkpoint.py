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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftune.errors import UserError

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
    scaler: dict[str, Any] | None = None
    """State of the fp16 loss scaler."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Recipe and fingerprints that the run was started with."""


Moments = dict[str, dict[str, torch.Tensor]]


def save(folder: Path, state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Path:
    """Write `folder/step-N`, then remove checkpoints that are no longer wanted; UserError when the disk is full."""
    place = folder / f"step-{state.step}"
    beside = folder / f".step-{state.step}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        beside.mkdir()
        save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, beside / "adapter.safetensors")
        save_file(_flat(moments_of(parameters, optimizer)), beside / "moments.safetensors")
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


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that can be read whole; a damaged one (power loss) is passed over."""
    for path in reversed(listed(folder)):
        try:
            read_state(path)
            load_file(path / "adapter.safetensors")
            load_file(path / "moments.safetensors")
        except (OSError, ValueError, TypeError, SafetensorError):
            continue
        return path
    return None


def listed(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_state(path: Path) -> State:
    """The state that a checkpoint was saved with."""
    return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def restore(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> State:
    """Load parameters and moments in place; the parameters must be those that were saved."""
    values = load_file(path / "adapter.safetensors")
    assert values.keys() == parameters.keys(), "the recipe's fingerprint should have refused this checkpoint"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    moments = load_file(path / "moments.safetensors")
    for name, parameter in parameters.items():
        entries = {
            key: moments[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in moments
        }
        if entries:
            optimizer.state[parameter] = _placed(entries, parameter, optimizer)
    return read_state(path)


def moments_of(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Moments:
    """AdamW's state of each parameter by name: `step` (), `exp_avg` and `exp_avg_sq` of the parameter's shape."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def _flat(moments: Moments) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous() for name, m in moments.items() for key, value in m.items()
    }


def _placed(
    entries: dict[str, torch.Tensor], parameter: nn.Parameter, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Moments beside their parameter; AdamW keeps its step count on the CPU unless it is fused."""
    fused = bool(optimizer.param_groups[0].get("fused"))
    return {key: value.to(parameter.device) if key != "step" or fused else value for key, value in entries.items()}


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
