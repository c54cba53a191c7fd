"""Write a merged model as a copy of its base's files: the kernel copies what stays, only changed tensors are computed.

Where the result has the base's names, dtype, shapes and files, this costs what copying the files costs, and no byte
that stays the same enters this process. `why_rewritten` says where that is not so; then `shards` writes all of it.
The base is opened for reading only, through links too, and the copy is a file of its own.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from peftune.adapters.fold import MergedTensors
from peftune.adapters.merge.shards import NAMES, stored, write_index

_PIECE = 32 << 20  # bytes that the kernel copies at a time; an interrupt is heard in between
_BUFFER = 1 << 18  # bytes at a time where the kernel copies nothing: what the second-level cache holds
# across file systems, special files, kernels before 5.3, containers that forbid the call
_NOT_IN_THE_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class _Header:
    """A safetensors file: format and dtypes that it states, and (start, stop) of each tensor's bytes in the file."""

    file: Path
    format: str | None
    dtypes: set[str]
    places: dict[str, tuple[int, int]]

    @property
    def begin(self) -> int:
        return min((start for start, _ in self.places.values()), default=0)

    @property
    def end(self) -> int:
        return max((stop for _, stop in self.places.values()), default=0)


def why_rewritten(folded: MergedTensors, dtype: torch.dtype, max_file_bytes: int | None) -> str | None:
    """The reason why copies of the base's files cannot hold the merged model; None where they can.

    `max_file_bytes` is the limit that a caller set for a file that holds more than one tensor.
    """
    weights, shapes = folded.weights, folded.shapes()
    if any(file.suffix != ".safetensors" for file in weights.files):
        return "the base is not stored as safetensors"
    if any(file.parent != weights.directory for file in weights.files):
        return "the base's index names files in other directories"
    headers = [_read_header(file) for file in weights.files]
    held = {name for header in headers for name in header.places}
    if held - shapes.keys():
        return f"the base's files hold {min(held - shapes.keys())}, the merged model does not"
    if shapes.keys() - held:
        return f"the merged model holds {min(shapes.keys() - held)}, the base's files do not"
    if any(header.format != "pt" for header in headers):
        return "the base's files do not say that their tensors are torch's"
    if any(header.dtypes != {NAMES[dtype]} for header in headers):
        return f"the base is not wholly stored as {str(dtype).removeprefix('torch.')}"
    grown = [name for name, shape in shapes.items() if weights.shape(name) != shape]
    if grown:
        return f"{grown[0]} has another shape than in the base"
    if max_file_bytes is not None and any(h.end - h.begin > max_file_bytes and len(h.places) > 1 for h in headers):
        return f"a file of the base is larger than {max_file_bytes} bytes"
    return None


def write_copy(directory: Path, folded: MergedTensors, dtype: torch.dtype, done: Callable[[str], None]) -> None:
    """Copy the base's files into `directory` in a thread, and write the changed tensors meanwhile.

    The files keep the base's headers, which `check_whole` has compared with what Transformers expects. `done(name)`
    is called after each tensor, from both threads. Raises OSError where the disk does not take it, CheckFailed for
    changed values that are not finite in `dtype`.
    """
    headers, changed = [_read_header(file) for file in folded.weights.files], folded.changed()
    copies = [directory / header.file.name for header in headers]
    if [copy.name for copy in copies] != ["model.safetensors"]:
        index = {name: header.file.name for header in headers for name in header.places}
        write_index(directory, folded.shapes(), dtype, index)
    for header, copy in zip(headers, copies, strict=True):
        _begin(header, copy)
    kernel = ThreadPoolExecutor(1, "copy")
    try:
        copied = [
            kernel.submit(_copy, header, copy, name, done)
            for header, copy in zip(headers, copies, strict=True)
            for name in header.places
            if name not in changed
        ]
        for header, copy in zip(headers, copies, strict=True):
            _overwrite(header, copy, folded, changed, dtype, done)
        for part in copied:
            part.result()
        for copy in copies:
            _sync(copy)
    finally:
        kernel.shutdown(cancel_futures=True)


def _read_header(file: Path) -> _Header:
    """What `open_weights` has found whole before."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries: dict[str, Any] = json.loads(opened.read(length))
    stated = entries.pop("__metadata__", None) or {}
    places = {name: tuple(8 + length + offset for offset in e["data_offsets"]) for name, e in entries.items()}
    return _Header(file, stated.get("format"), {entry["dtype"] for entry in entries.values()}, places)


def _begin(header: _Header, copy: Path) -> None:
    """The header, and the file's whole length, so that both threads may write anywhere in it."""
    with header.file.open("rb") as base, copy.open("xb") as opened:
        opened.write(base.read(header.begin))
        opened.truncate(header.end)


def _copy(header: _Header, copy: Path, name: str, done: Callable[[str], None]) -> None:
    start, stop = header.places[name]
    with header.file.open("rb", buffering=0) as base, copy.open("r+b", buffering=0) as opened:
        while start < stop:
            start += _copy_piece(base, opened, start, min(_PIECE, stop - start))
    done(name)


def _copy_piece(base: BinaryIO, copy: BinaryIO, start: int, length: int) -> int:
    """Copy some of `length` bytes at `start` of both files; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            moved = os.copy_file_range(base.fileno(), copy.fileno(), length, start, start)
            if moved:  # 0: a file system that takes the call and copies nothing
                return moved
        except OSError as error:
            if error.errno not in _NOT_IN_THE_KERNEL:
                raise
    base.seek(start)
    copy.seek(start)
    piece = base.read(min(_BUFFER, length))
    if not piece:
        raise OSError(errno.EIO, "the base became shorter while it was copied")
    return copy.write(piece)


def _overwrite(
    header: _Header,
    copy: Path,
    folded: MergedTensors,
    changed: set[str],
    dtype: torch.dtype,
    done: Callable[[str], None],
) -> None:
    with copy.open("r+b", buffering=0) as opened:
        for name in sorted(header.places.keys() & changed, key=lambda name: header.places[name]):
            start, stop = header.places[name]
            opened.seek(start)
            for chunk in folded.chunks(name):
                left = stored(chunk, dtype, name)
                while left:  # the system may take less than it is given
                    left = left[opened.write(left) :]
            assert opened.tell() == stop, f"{name}: written to {opened.tell()}, the header says {stop}"
            done(name)


def _sync(file: Path) -> None:
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
