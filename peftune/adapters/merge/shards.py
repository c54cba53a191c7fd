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
    shards = plan_shards(shapes, dtype.itemsize, max_bytes)
    index = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, {n: shapes[n] for n in names}, dtype, chunks, done)
        index.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values())
        content = {"metadata": {"total_size": total * dtype.itemsize, "total_parameters": total}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def stored(chunk: torch.Tensor, dtype: torch.dtype, name: str) -> memoryview:
    """The bytes of merged values in `dtype`; CheckFailed where one is not finite in it."""
    values = chunk.to(dtype).contiguous()
    if not all_finite(values):
        raise CheckFailed(f"{name}: merged values do not fit {dtype}; use bfloat16 or float32")
    flat: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def plan_shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, max_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut into shards of at most `max_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    size_so_far = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if shards[-1] and size_so_far + size > max_bytes:
            shards.append([])
            size_so_far = 0
        shards[-1].append(name)
        size_so_far += size
    return shards


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
