"""Write a checkpoint's weights as safetensors, chunk by chunk: never more than one chunk in memory.

Names, shapes and dtype are known before the first value, so a file begins with its complete header (safetensors format:
8 bytes little-endian length, JSON, then the bytes of each tensor in order).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from peftune.errors import CheckFailed
from peftune.model.weights import all_finite

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Chunks = Callable[[str], Iterator[torch.Tensor]]


def write_weights(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    chunks: Chunks,
    max_bytes: int,
    done: Callable[[str], None],
) -> None:
    """Write all tensors of `shapes` in shards of at most `max_bytes`; in one file, without an index, where they fit.

    `chunks(name)` yields a tensor in consecutive chunks of rows; `done(name)` is called after each tensor. Raises
    OSError where the disk does not take it, CheckFailed for a value that is finite in float32 but not in `dtype`.
    """
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        _write_file(directory / file, {name: shapes[name] for name in names}, dtype, chunks, done)
    if plan.is_sharded:
        metadata = {**plan.metadata, "total_parameters": sum(math.prod(shape) for shape in shapes.values())}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def stored(chunk: torch.Tensor, dtype: torch.dtype, name: str) -> memoryview:
    """The bytes of merged values in `dtype`; CheckFailed where one is not finite in it."""
    values = chunk.to(dtype).contiguous()
    if not all_finite(values):
        raise CheckFailed(f"{name}: merged values do not fit {dtype}; use bfloat16 or float32")
    flat: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, chunks: Chunks, done: Callable[[str], None]
) -> None:
    with path.open("wb") as file:
        header = _header(shapes, dtype)
        file.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            written = 0
            for chunk in chunks(name):
                written += file.write(stored(chunk, dtype, name))
            assert written == math.prod(shape) * dtype.itemsize, f"{name}: {written} bytes, the header says {shape}"
            done(name)
        file.flush()
        os.fsync(file.fileno())


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
