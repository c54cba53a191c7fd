"""The adapter directory: read it, refuse what is broken, write it atomically.

`adapter_config.json` and `adapter_model.safetensors` are plain PEFT; `peftune.json` says where the adapter
came from, and the SHA-256 of each file. Files may be links, as they are in the hub's cache. Readers change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from peftune.adapters import peft_config
from peftune.adapters.provenance import (
    PROVENANCE,
    read_provenance,
    recorded,
    recorded_base,
    recorded_hashes,
    sealed,
    with_place_of_base,
)
from peftune.adapters.training_output import adapters_inside, which_to_use
from peftune.errors import CheckFailed, UserError, explained, first_line
from peftune.files import flush_directory, hashes_of, publish, read_bytes, read_object, staging_directory
from peftune.model.fingerprint import bytes_of
from peftune.model.pickles import load_pickle
from peftune.model.weights import all_finite, save_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
COMMIT = ".commit"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: PEFT's configuration, its tensors by PEFT's names, and what peftune.json says."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    provenance: dict[str, Any] | None

    @property
    def base(self) -> str | None:
        """The name of the base that it records, or None."""
        return recorded_base(self.config, self.provenance)

    def origin(self) -> dict[str, Any]:
        """What is recorded of it where something is made from it; its directory by its last name only."""
        base = recorded(self.provenance, "base_fingerprint")
        found = {"adapter": self.directory.resolve().name, "adapter_fingerprint": self.fingerprint, "base": self.base}
        return found | ({"base_fingerprint": base} if isinstance(base, str) else {})

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings that change what it computes, and of its tensors."""
        kept = {key: value for key, value in self.config.items() if key not in peft_config.WITHOUT_EFFECT}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}|{list(tensor.shape)}|{tensor.dtype}\n".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter directory, of peftune's or of plain PEFT's making (`.bin` too).

    Raises UserError where a file is missing, broken or cut short, where it is not a LoRA, and where a tensor is
    empty or holds values that are not finite. Where peftune.json records the SHA-256 of the files, they must have it.
    """
    config, provenance = read_settings(directory)
    tensors = read_tensors(directory, recorded_hashes(provenance).get(TENSORS))
    if not tensors:
        raise UserError(f"adapter {directory}: holds no tensors; train it again")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            problem = f"has shape {tuple(tensor.shape)}: it was saved without gathering ZeRO-3 parts"
        elif not tensor.is_floating_point():
            problem = f"holds {tensor.dtype}; expected floating-point numbers"
        elif not all_finite(tensor.float()):  # in what it is computed in
            problem = "holds values that are not finite; the training went wrong"
        else:
            continue
        raise UserError(f"adapter {directory}: {name} {problem}")
    return Adapter(directory, config, tensors, provenance)


def check_free(out: Path, what: str) -> None:
    """Refuse a directory that is there already, or whose name cannot be; `what` is to be written there."""
    with explained(f"{str(out)[:200]}: cannot write {what}"):  # a name that is too long
        if out.exists() or out.is_symlink():
            raise UserError(f"{out}: exists already and is not overwritten; choose another directory or remove it")


@contextmanager
def new_directory(out: Path, what: str) -> Iterator[Path]:
    """A directory to be filled, which is called `out` at the end; it is not there where anything went wrong.

    UserError where it cannot be written, or somebody has taken the name meanwhile; `what` is written there.
    """
    with explained(f"{out}: cannot write {what}"), staging_directory(out) as staging:
        yield staging
        check_free(out, what)
        publish(staging, out)


def write_adapter(
    out: Path, config: dict[str, Any], tensors: Tensors, provenance: dict[str, Any], files: Mapping[str, bytes | str]
) -> None:
    """Write an adapter directory atomically: to a staging directory, read back and compared, then renamed.

    peftune.json gets the SHA-256 of every file, and both where the base lies (`with_place_of_base`). An adapter that is
    there already is replaced; other files (metrics, checkpoints) stay. A crash before the commit leaves the old state,
    a crash after it is finished by the next write; in between there is no `adapter_config.json`, so nobody loads a
    mixture. Raises UserError where the disk is full or
    not writable, CheckFailed where what was read back differs.
    """
    config, provenance = with_place_of_base(config, provenance, out)
    existed = out.exists()
    if existed and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a directory for the adapter")
    target = out / COMMIT if existed else out
    with explained(f"{out}: cannot write the adapter"):
        _finish_commit(out)
        with staging_directory(target) as staging:
            _write_files(staging, tensors, {**files, CONFIG: json.dumps(config, indent=2, sort_keys=True)}, provenance)
            read = read_adapter(staging)
            same = read.config == json.loads(json.dumps(config)) and read.tensors.keys() == tensors.keys()
            if not same or not all(_identical(stored, tensors[name]) for name, stored in read.tensors.items()):
                raise CheckFailed(f"{out}: the adapter read back differs from what was written; check the disk")
            publish(staging, target)
        _finish_commit(out)


def _write_files(
    directory: Path, tensors: Tensors, files: Mapping[str, bytes | str], provenance: dict[str, Any]
) -> None:
    save_tensors(tensors, directory / TENSORS)
    for name, content in files.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    hashes = hashes_of(directory, [TENSORS, *files])
    (directory / PROVENANCE).write_bytes(json.dumps(sealed(provenance, hashes), indent=2).encode())


def _identical(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    return stored.dtype == tensor.dtype and torch.equal(stored, tensor.detach().cpu())


def _finish_commit(out: Path) -> None:
    """Move the files of a complete write into `out`; `adapter_config.json` is removed first and comes last.

    Only for who writes to `out`. Can be repeated. Raises UserError for what no write of peftune leaves, such as links.
    """
    commit = out / COMMIT
    if not _is_interrupted(commit):
        return
    last = commit / CONFIG
    if last.exists():  # else only its removal is left to do
        (out / CONFIG).unlink(missing_ok=True)
        flush_directory(out)
        for path in [p for p in sorted(commit.iterdir()) if p != last]:
            path.replace(out / path.name)
        flush_directory(out)
        last.replace(out / CONFIG)
        flush_directory(out)
    commit.rmdir()
    flush_directory(out)


def _is_interrupted(commit: Path) -> bool:
    """Whether a complete write was interrupted there; UserError for what no write of peftune leaves, such as links."""
    if not os.path.lexists(commit):
        return False
    if not commit.is_symlink() and commit.is_dir():
        found = list(commit.iterdir())
        if all(p.is_file() and not p.is_symlink() for p in found) and (not found or commit / CONFIG in found):
            return True
    raise UserError(f"{commit}: is not what an interrupted write of peftune leaves; move it away")


def refuse_other_files(out: Path, names: Iterable[str]) -> None:
    """UserError where `out` holds a file of these names, or an adapter, that peftune did not write."""
    if _is_interrupted(out / COMMIT) or os.path.lexists(out / PROVENANCE):
        return
    for name in (CONFIG, TENSORS, *names):
        if os.path.lexists(out / name):
            raise UserError(
                f"{out}: holds {name}, which no run of peftune wrote there and which this one would replace; give "
                "another directory, or move that file away"
            )


def read_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The adapter's configuration, checked, and what peftune.json says (None for one of plain PEFT).

    Raises UserError where the first is missing, or not that of a LoRA, and where one of them is broken.
    """
    config, provenance = read_any_settings(directory)
    if config.get("peft_type") != "LORA":
        found = str(config.get("peft_type"))[:80]
        raise UserError(
            f"adapter {directory}: peft_type is {found}, peftune works with LORA only; "
            "peftune adapters import converts some other kinds"
        )
    peft_config.check(config, f"adapter {directory}: {CONFIG}")
    return config, provenance


def read_any_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`read_settings` for an adapter of any PEFT method, its configuration not checked."""
    check_directory(directory, f"adapter {directory}", f"; expected a directory with {CONFIG}")
    path = directory / CONFIG
    if not path.is_file():
        hints = {
            COMMIT: "its last write was interrupted; start the same training again, which completes it",
            "config.json": "it is a complete model; pass it as the base",
            "checkpoints": "its training has not finished",
            "state.json": "it is a checkpoint; take the directory of its run, where a finished adapter lies",
        }
        hint = next((f"; {hint}" for name, hint in hints.items() if os.path.lexists(directory / name)), "")
        if not hint and (inside := adapters_inside(directory, CONFIG)):
            hint = f"; {which_to_use(inside)}"
        raise UserError(f"adapter {directory}: no {CONFIG} in this directory{hint}")
    provenance = read_provenance(directory)
    expected = recorded_hashes(provenance).get(CONFIG)
    return read_object(path, f"adapter {directory}: {CONFIG}", expected), provenance


def check_directory(directory: Path, name: str, hint: str = "") -> None:
    """UserError, in which the directory is called `name`, where it cannot be listed."""
    try:
        os.scandir(directory).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{name[:200]}: {getattr(error, 'strerror', None) or error}{hint}") from None


def read_tensors(directory: Path, sha256: str | None = None) -> Tensors:
    """The tensors of an adapter directory as they are stored; UserError where there are none, or they are cut short."""
    path, pickled = directory / TENSORS, directory / PICKLED
    if not os.path.lexists(path):
        if pickled.is_file():
            return load_pickle(pickled)
        raise UserError(f"adapter {directory}: no {TENSORS} in this directory; copy the complete adapter")
    content = read_bytes(path, f"adapter {directory}: {TENSORS}", sha256)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        cause = first_line(error)
        raise UserError(f"adapter {directory}: {TENSORS} is not a complete safetensors file: {cause}") from None
