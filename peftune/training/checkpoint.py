"""Portable checkpoints: adapter, optimizer moments, progress of the run. No base weights, nothing about ranks.

`checkpoints/step-N/` holds `adapter.safetensors` (trainable parameters by name), `moments.safetensors` (AdamW's two
moments by the same names) and `state.json`. The order of samples and every random draw are functions of the seed
and the step, so the number of steps done is all that a run needs to go on with them.

A checkpoint is written beside its name, flushed to the disk, and renamed: it is complete or absent. `state.json` holds
the SHA-256 of the other files and of itself, so a checkpoint that changed afterwards is found. It is continued only by
the recipe, base and data that made it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from peftune.errors import UserError, explained, first_line
from peftune.files import (
    beside,
    flush_directory,
    flush_to_disk,
    hashes_of,
    json_text,
    parse_json,
    remove,
    remove_leftovers,
    sha256_of_values,
    staging_directory,
)  # fmt: skip
from peftune.model.weights import all_finite, save_tensors
from peftune.training.optimizer import MOMENTS, Parameters, Tensors

_NAME = re.compile(r"step-(0|[1-9]\d{0,17})")  # as they are written: step-013 must not hide step-13
_STAGED = re.compile(r"\.(step-\d{1,18})\..+")
_KEPT = 2  # of the newest
_ADAPTER, _MOMENTS, _STATE = "adapter.safetensors", "moments.safetensors", "state.json"
_HASHES = "sha256"  # key of state.json
_GONE = {"scaler"}  # what the first releases wrote besides
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # nothing that a person sets right brings it back

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Figures = dict[str, dict[str, int | float]]


@dataclass
class State:
    """Where a run stands after `step` optimizer steps."""

    step: Count = 0
    tokens: Count = 0
    """Scored tokens learnt from so far."""
    micro_size: Count = 0
    """Blocks per forward, once found; kept so that a resumed run rounds alike."""
    evaluated_step: Annotated[int, Field(ge=-1)] = -1
    """Step of the last evaluation, so that none is missed or repeated across a resumption."""
    best_step: Count | None = None
    best_loss: Finite | None = None
    evaluations_without_gain: Count = 0
    figures: dict[str, Figures] = field(default_factory=dict)
    """What was measured, by step and domain, of those that delivery may need: the first, the best and the last."""
    records_bytes: Count = 0
    """Length of metrics.jsonl at this point; what a killed run wrote after it is cut off on resuming."""
    records_sha256: str | None = None
    """Of metrics.jsonl up to that length."""
    records_from: Count = 0
    """Step with which metrics.jsonl begins: not 0 where the earlier part was lost."""
    earlier_updates: Count = 0
    """AdamW's steps before this run, whose moments it took over."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
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

    def keep_figures(self, measured: Figures) -> None:
        """Remember what was measured at this step, and forget what no delivery can ask for any more."""
        self.figures[str(self.step)] = measured
        wanted = {"0", str(self.best_step), str(self.step)}
        self.figures = {step: figures for step, figures in self.figures.items() if step in wanted}


_STATES = TypeAdapter(State)


@dataclass(frozen=True)
class Checkpoint:
    """A state with the adapter and AdamW's moments by parameter name, complete and on the CPU."""

    state: State
    values: Tensors
    moments: Tensors
    is_checked: bool = True
    """False for one of an older release, which holds no hashes."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer ones that were passed over, and what is wrong with each."""


class Damaged(UserError):
    """A checkpoint that is not what was saved; the files are there, but of no use."""


def save(folder: Path, saved: Checkpoint) -> None:
    """Write `folder/step-N`, then remove all but this, the newest other and the best.

    UserError where it cannot be written; what was there is then as before.
    """
    state = saved.state
    target = folder / f"step-{state.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging_directory(target) as staged:
            for file, tensors in ((_ADAPTER, saved.values), (_MOMENTS, saved.moments)):
                save_tensors(tensors, staged / file)
            content = asdict(state) | {_HASHES: hashes_of(staged, (_ADAPTER, _MOMENTS))}
            content[_HASHES][_STATE] = sha256_of_values(content)
            (staged / _STATE).write_text(json_text(content), encoding="utf-8")
            flush_to_disk(staged)
            before = beside(target)
            if target.exists():
                target.rename(before)
            staged.rename(target)
        flush_directory(folder)
        remove(before)
    except OSError as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = "the disk is full" if is_full else str(error)
        raise UserError(f"cannot save a checkpoint to {target}: {reason}; earlier checkpoints are intact") from error
    others = [path for path in listed(folder) if path != target]
    for path in others[: 1 - _KEPT]:
        if path.name != f"step-{state.best_step}":
            remove(path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    UserError where one cannot be read (permissions, too many open files), and where all are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(listed(folder)):
        try:
            return replace(read(path), damaged=tuple(damaged))
        except Damaged as error:
            damaged.append((path, str(error)))
    if damaged:
        raise UserError(
            f"{'; '.join(reason for _, reason in damaged)}. No checkpoint is whole: restore one from a copy, "
            f"or remove {folder} to start anew"
        )
    return None


def tidy(folder: Path, found: Checkpoint | None, say: Callable[[str], None]) -> None:
    """Before a run writes: name and rename what is damaged, which is kept, and remove what killed runs left."""
    for path, reason in found.damaged if found else ():
        say(f"{reason}; kept as {_set_aside(path).name}")
    if found and not found.is_checked:
        say(f"{folder}/step-{found.state.step}: an older release saved it without hashes, so it could not be checked")
    for name in {match[1] for path in _entries(folder) if (match := _STAGED.fullmatch(path.name))}:
        remove_leftovers(folder / name)


def listed(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; UserError where the directory cannot be listed."""
    found = {int(match[1]): path for path in _entries(folder) if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _entries(folder: Path) -> list[Path]:
    with explained(f"{folder}: cannot be read"), suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []


def read(path: Path) -> Checkpoint:
    """A checkpoint as it was saved; Damaged where it is not that any more, UserError where it cannot be read."""
    content = _parsed(path)
    hashes = content.pop(_HASHES, None)
    if hashes is not None:
        own = hashes.pop(_STATE, None) if isinstance(hashes, dict) else None
        if own != sha256_of_values(content | {_HASHES: hashes}) or not hashes.keys() == {_ADAPTER, _MOMENTS}:
            raise _changed(path, _STATE)
    elif unknown := sorted(content.keys() - {field.name for field in fields(State)} - _GONE):
        raise Damaged(f"{path}: {_STATE} holds {unknown[0][:40]!r}, which no checkpoint has")
    try:
        state = _STATES.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"{path}: {_STATE}: {where[:80]!r}: {first['msg']}") from None
    if path.name != f"step-{state.step}":
        raise Damaged(f"{path}: holds step {state.step}")
    values, moments = (_tensors(path, name, (hashes or {}).get(name)) for name in (_ADAPTER, _MOMENTS))
    counts = {float(value) for key, value in moments.items() if key.endswith(f"/{MOMENTS[0]}")}
    if counts - {state.step + state.earlier_updates}:
        raise Damaged(f"{path}: {_MOMENTS} is not of step {state.step}")
    return Checkpoint(state, values, moments, is_checked=hashes is not None)


def check_fits(saved: Checkpoint, parameters: Parameters, where: Path) -> None:
    """UserError where a checkpoint does not hold the trainable parameters of this run and their moments."""
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    scalar, about_moments = MOMENTS[0], dict[str, tuple[int, ...]]()
    if saved.moments or saved.state.step:
        about_moments = {f"{n}/{key}": () if key == scalar else s for n, s in wanted.items() for key in MOMENTS}
    for name, expected, found in ((_ADAPTER, wanted, saved.values), (_MOMENTS, about_moments, saved.moments)):
        for key in sorted(expected.keys() | found.keys()):
            shape = tuple(found[key].shape) if key in found else None
            if shape != expected.get(key):
                raise UserError(
                    f"{where}/step-{saved.state.step}: {name}: {key} has shape {shape or 'none'}, expected "
                    f"{expected.get(key) or 'none'}; move that directory away to go on from the checkpoint before"
                )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(_bytes(path, _STATE))
    except ValueError as error:
        raise Damaged(f"{path}: {_STATE}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path}: {_STATE} holds {type(content).__name__}, expected an object")
    return content


def _tensors(path: Path, name: str, digest: str | None) -> Tensors:
    content = _bytes(path, name)
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise _changed(path, name)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Damaged(f"{path}: {name}: {first_line(error)}") from None
    if broken := [key for key, tensor in tensors.items() if not all_finite(tensor)]:
        raise Damaged(f"{path}: {name}: {broken[0]} holds values that are not finite")
    return tensors


def _bytes(path: Path, name: str) -> bytes:
    file = path / name
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise OSError(errno.EISDIR, "it is not a file")
        return file.read_bytes()
    except OSError as error:
        text = f"{path}: {name} cannot be read: {error.strerror or error}"
        if error.errno in _LOST:
            raise Damaged(text) from None
        raise UserError(
            f"{text}; make it readable, or move that directory away to go on from the checkpoint before"
        ) from None


def _changed(path: Path, name: str) -> Damaged:
    return Damaged(f"{path}: {name} is not what was saved (its SHA-256 differs)")


def free_name(path: Path, suffix: str) -> Path:
    """`NAME.suffix`, or `NAME.suffix-2` and so on: the first that nothing has."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.name}.{suffix}{number}") for number in numbers)
    return next(name for name in names if not os.path.lexists(name))


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither continued nor counted nor removed."""
    with explained(f"{path}: is damaged and cannot be renamed"):
        return path.rename(free_name(path, "damaged"))
