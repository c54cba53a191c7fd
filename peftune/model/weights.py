"""Base weights on disk, one tensor at a time, under one set of names whatever the file layout.

Names are those of `GPT2LMHeadModel`: hub checkpoints without the `transformer.` prefix get it, mask buffers
(`attn.bias`, `attn.masked_bias`) are left out, and so are an `lm_head.weight` that is only a copy of the tied `wte` and
the heads of other tasks (`score.weight` of a classifier).
Every file is opened anew for each tensor: pages of a memory-mapped file count as resident while it stays open.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peftune.errors import CheckFailed, UserError, first_line
from peftune.files import apply_umask, read_object
from peftune.model.fingerprint import bytes_of, remembered
from peftune.model.pickles import load_pickle

if TYPE_CHECKING:
    from transformers import GPT2Config

WTE = "transformer.wte.weight"
HEAD = "lm_head.weight"
CHUNK_ELEMENTS = 8_000_000  # 32 MB of float32
_HASHED = 1_000_000  # elements at a time: three of 4 MB are held at once, the mapped one, its copy and the last

NOT_FINITE = "holds values that are not finite: the weights are broken; download or make them again"
"""Found when weights are read: attention on a CPU can turn a NaN into numbers, and nothing would look wrong."""
INDEX = "model.safetensors.index.json"
_LAYOUTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
FOREIGN = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index")
_BARE = re.compile(r"(wte|wpe|h|ln_f)\.")
_OF_ANOTHER_TASK = re.compile(r"(score|classifier|qa_outputs|multiple_choice_head|v_head)\.")
_BUFFER = re.compile(r"\.(cross)?attn(ention)?\.(masked_)?bias$")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint directory; `tied` says that the output head is `wte`."""

    directory: Path
    files: tuple[Path, ...]
    tied: bool
    _entries: dict[str, _Entry]
    left_out: tuple[str, ...] = ()
    """Names of stored tensors that belong to heads of other tasks, which a language model has no use for."""

    def names(self) -> list[str]:
        """Normalised tensor names, sorted."""
        return sorted(self._entries)

    def stored_name(self, name: str) -> str:
        """The tensor that holds the values of `name`: of a tied output head it is the embedding."""
        return WTE if name == HEAD and self.tied else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without reading it."""
        return self._entries[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of one tensor in its stored dtype; CheckFailed where it holds a value that is not finite."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else _read(self._entries[name], None)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of rows `start` to `stop` of one tensor."""
        return _read(self._entries[name], slice(start, stop))

    def chunks(self, name: str, elements: int = CHUNK_ELEMENTS) -> Iterator[torch.Tensor]:
        """The tensor in consecutive chunks of rows, each of about so many elements."""
        for start, stop in row_chunks(self.shape(name), elements):
            yield self.rows(name, start, stop)


def row_chunks(shape: tuple[int, ...], elements: int = CHUNK_ELEMENTS) -> list[tuple[int, int]]:
    """(start, stop) of consecutive chunks of rows, each of about so many elements."""
    if not shape or not shape[0]:
        return []
    width = max(1, torch.Size(shape).numel() // shape[0])
    step = max(1, elements // width)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file; OSError where the disk is full."""
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error  # how safetensors reports a full disk
    apply_umask(path)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is finite only if all its terms are, and reads them once; only where it is not, each value is looked at.
    """
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())


def open_weights(directory: Path, tied: bool = True) -> Weights:
    """List the weights of a GPT-2 checkpoint: safetensors or .bin, in one file or in shards.

    `tied` is what config.json says of embedding and head.

    Raises UserError where there are none, a shard is missing, a file is cut short, or an index names a tensor
    that its file does not hold.
    """
    files, index = _files(directory)
    entries: dict[str, _Entry] = {}
    stored: set[str] = set()
    left_out = []
    for file in files:
        for entry in _list(file):
            if entry.key in stored:
                raise UserError(f"base {directory}: tensor {entry.key} is stored twice; download the checkpoint again")
            stored.add(entry.key)
            if _OF_ANOTHER_TASK.match(entry.key):
                left_out.append(entry.key)
            elif not _BUFFER.search(entry.key):
                entries[f"transformer.{entry.key}" if _BARE.match(entry.key) else entry.key] = entry
    absent = sorted(set(index) - stored)
    if absent:
        raise UserError(f"base {directory}: the index names {len(absent)} tensors that no shard holds: {absent[0]}, …")
    if WTE not in entries:
        raise UserError(f"base {directory}: no tensor wte.weight in {files[0].name}; expected a GPT-2 checkpoint")
    if not tied and HEAD not in entries:
        raise UserError(f"base {directory}: config.json says tie_word_embeddings false, but lm_head.weight is missing")
    untied = Weights(directory, tuple(files), False, entries, tuple(sorted(left_out)))
    if tied and HEAD in entries and not _equal(untied, WTE, HEAD):
        return untied
    return replace(untied, tied=tied, _entries={k: v for k, v in entries.items() if not (tied and k == HEAD)})


def check_complete(weights: Weights, config: GPT2Config) -> None:
    """Every tensor of this architecture is there, in its shape; UserError where not."""
    from transformers import GPT2LMHeadModel
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            expected = GPT2LMHeadModel(config).state_dict()
    except Exception as error:  # whatever Transformers makes of values that no GPT-2 has
        raise UserError(
            f"base {weights.directory}: config.json describes no GPT-2 that Transformers can build: {first_line(error)}"
        ) from None
    known = set(weights.names()) | ({HEAD} if weights.tied else set())
    missing = [name for name in expected if name not in known]
    if missing:
        raise UserError(
            f"base {weights.directory}: {len(missing)} tensors are missing from the weights, such as {missing[0]}; "
            "download the checkpoint again"
        )
    if strange := [name for name in weights.names() if name not in expected]:
        raise UserError(
            f"base {weights.directory}: the weights hold {strange[0]}, which no GPT-2 has; what it does in the model "
            "that it belongs to would be left out without a word"
        )
    for name in weights.names():
        if weights.shape(name) != (wanted := tuple(expected[name].shape)):
            found = weights.shape(name)
            raise UserError(f"base {weights.directory}: {name} has shape {found}, config.json says {wanted}")


def fingerprint(weights: Weights, fresh: bool = False) -> str:
    """sha256 of each tensor's name, shape, dtype and bytes: equal whatever the files, shards and key prefixes.

    With `fresh` the bytes are read again, although the files seem to be those whose fingerprint is remembered.
    """

    def compute() -> str:
        digest = hashlib.sha256()
        for name in weights.names():
            digest.update(f"{name}|{list(weights.shape(name))}|{weights.dtype(name)}\n".encode())
            for chunk in weights.chunks(name, _HASHED):
                digest.update(bytes_of(chunk))
        return digest.hexdigest()

    return remembered("base", [*weights.files, weights.directory / "config.json"], compute, fresh)


def _equal(weights: Weights, first: str, second: str) -> bool:
    if weights.shape(first) != weights.shape(second) or weights.dtype(first) != weights.dtype(second):
        return False
    return all(torch.equal(a, b) for a, b in zip(weights.chunks(first), weights.chunks(second), strict=True))


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files in the order in which Transformers prefers them, and the index where they are sharded."""
    for layout in _LAYOUTS:
        path = directory / layout
        if not path.is_file():
            continue
        if not layout.endswith(".json"):
            return [path], {}
        index = read_object(path, f"base {directory}: {layout}").get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"base {directory}: {layout} holds no weight_map; download the checkpoint again")
        if strange := [name for name in index.values() if not _is_file_name(name)]:
            raise UserError(
                f"base {directory}: {layout} names {str(strange[0])[:80]!r}; expected names of files beside it"
            )
        files = [directory / name for name in sorted(set(index.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"base {directory}: {len(missing)} of {len(files)} shards are missing: {missing[0]}, …")
        return files, index
    if foreign := [name for name in FOREIGN if (directory / name).is_file()]:
        raise UserError(
            f"base {directory}: its weights are TensorFlow's or Flax's only ({foreign[0]}); expected one of "
            f"{', '.join(_LAYOUTS)}: Transformers before version 5 converts them (from_tf, from_flax, save_pretrained)"
        )
    raise UserError(f"base {directory}: no weights here; expected one of {', '.join(_LAYOUTS)}")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name.encode(errors="replace")) < 256 and Path(name).name == name


def _list(file: Path) -> list[_Entry]:
    if file.suffix == ".bin":
        state = load_pickle(file)
        return [_Entry(file, key, tuple(value.shape), value.dtype) for key, value in state.items()]
    with _opened(file) as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        if strange := {s.get_dtype() for s in slices.values()} - _DTYPES.keys():
            raise UserError(
                f"{file}: tensors of dtype {min(strange)} are not weights of a GPT-2; use a full-precision checkpoint"
            )
        return [_Entry(file, key, tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for key, s in slices.items()]


def _read(entry: _Entry, rows: slice | None) -> torch.Tensor:
    if entry.file.suffix == ".bin":
        stored = load_pickle(entry.file)[entry.key]
        part = (stored if rows is None else stored[rows]).clone(memory_format=torch.contiguous_format)
    else:
        with _opened(entry.file) as opened:
            part = opened.get_tensor(entry.key) if rows is None else opened.get_slice(entry.key)[rows]
            part = part.clone()  # detached from the mapping, which closes here
    if not all_finite(part):
        raise CheckFailed(f"{entry.file}: {entry.key} {NOT_FINITE}")
    return part


def _opened(file: Path) -> Any:
    try:
        if file.exists() and not os.access(file, os.R_OK):  # safetensors would say that it is not there
            raise UserError(f"{file}: cannot be read: {os.strerror(errno.EACCES)}")
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
