"""Portable checkpoints: adapter, optimizer moments, progress of the run. No base weights, nothing about ranks.

`checkpoints/step-N/` holds `adapter.safetensors` (trainable parameters by name), `moments.safetensors` (AdamW's two
moments by the same names) and `state.json`. The order of samples and every random draw are functions of the seed
and the step, so the number of steps done is all that a run needs to go on with them.

A checkpoint is written beside its name, flushed to the disk, and renamed: it is complete or absent. It is continued
only by the recipe, base and data that made it.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.files import flush_directory, flush_to_disk, json_text, staging_directory
from peftune.model.weights import save_tensors
from peftune.training.optimizer import Tensors

_NAME = re.compile(r"step-\d+")
_KEPT = 2  # of the newest
_ADAPTER, _MOMENTS, _STATE = "adapter.safetensors", "moments.safetensors", "state.json"


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

    def is_improved_by(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far; counts evaluations without gain for early stopping."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
            return True
        self.evaluations_without_gain += 1
        return False


@dataclass(frozen=True)
class Checkpoint:
    """A state with the adapter and AdamW's moments by parameter name, complete and on the CPU."""

    state: State
    values: Tensors
    moments: Tensors


def save(folder: Path, saved: Checkpoint) -> None:
    """Write `folder/step-N`, then remove all but the newest two and the best; UserError when the disk is full."""
    state = saved.state
    target = folder / f"step-{state.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging_directory(target) as staged:
            for file, tensors in ((_ADAPTER, saved.values), (_MOMENTS, saved.moments)):
                save_tensors(tensors, staged / file)
            (staged / _STATE).write_text(json_text(asdict(state)), encoding="utf-8")
            flush_to_disk(staged)
            if target.exists():
                shutil.rmtree(target)
            staged.rename(target)
        flush_directory(folder)
    except OSError as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if is_full else str(error)
        raise UserError(f"cannot save a checkpoint to {target}: {reason}; earlier checkpoints are intact") from error
    for path in listed(folder)[:-_KEPT]:
        if path.name != f"step-{state.best_step}":
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact; a damaged one (power loss) is passed over."""
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
    values = json.loads((path / _STATE).read_text(encoding="utf-8"))
    known = {field.name for field in fields(State)}
    state = State(**{key: value for key, value in values.items() if key in known})
    return Checkpoint(state, load_file(path / _ADAPTER), load_file(path / _MOMENTS))


HARMLESS = frozenset(
    {
        "run.out", "run.eval_every", "run.save_every", "run.resume", "run.track", "run.samples",
        "run.early_stopping", "run.checkpointing", "run.fast", "run.compile", "batch.micro_size",
    }
)  # fmt: skip
"""Keys that may change between a run and its resumption: none decides what is learnt (beyond rounding)."""


def identity_of(recipe: Recipe, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Flat mapping of every recipe value that decides what is learnt, and the fingerprints of base and data."""
    kept = {k: v for k, v in flatten(recipe.model_dump(mode="json")).items() if k not in HARMLESS}
    return kept | {f"fingerprint of {k}": v for k, v in fingerprints.items()}


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """UserError listing every difference between the run that is there and the one asked for."""
    saved, now = _DEFAULTS | saved, _DEFAULTS | now  # a key that the older release did not know had its default
    keys = sorted(saved.keys() | now.keys())
    changed = [f"{k} was {_short(saved.get(k))}, is {_short(now.get(k))}" for k in keys if saved.get(k) != now.get(k)]
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. "
            "Give run.out another name, or remove that directory"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
