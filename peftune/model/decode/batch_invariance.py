"""Whether a row of a batch gets the bits that it gets alone: tried once for each layout, and never assumed.

Libraries choose kernels, and how threads share the work, by shape. So one text's last bits may change with the number
of rows beside it, and a near tie then falls another way. But which sums a kernel makes, and in which order, follows
from shapes, memory layout and the number of threads, not from the numbers in them. So a layout can be tried: where
every row of a batch of equal rows has the bits of that row alone, the batch is taken, else the rows are computed one
by one. Each then has the shape and the place that it has alone, whatever the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Function = Callable[..., torch.Tensor]
_ALIGNMENT = 64  # bytes; torch allocates at such addresses
_found: dict[Hashable, bool] = {}


def by_row(name: str, function: Function, *rows: torch.Tensor, draws: int = 1) -> torch.Tensor:
    """`function(*rows)`, row i of it (dimension 0 of every tensor) with the bits of `function` of the rows i alone.

    `name` stands for the function: what it computes must follow from the name and the layouts of its arguments. For a
    CPU: on a GPU nothing is tried, and batches are computed as they are.
    """
    count = len(rows[0])
    if count > 1 and rows_as_alone(name, function, *rows, draws=draws):
        return function(*rows)
    results = [function(*(row_of(tensor, row) for tensor in rows)) for row in range(count)]
    return results[0] if count == 1 else torch.cat(results)


def row_of(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """One row (1, …), at an address such as it has alone: MKL's sums may depend on that."""
    one = tensor[row : row + 1]
    return one if _is_aligned(one) else one.clone()


def rows_as_alone(name: str, function: Function, *rows: torch.Tensor, draws: int = 1) -> bool:
    """Whether each row of `function(*rows)` has the bits that it has alone; the numbers in `rows` are not read.

    `draws` random rows are tried: one where each number is a long sum, more where few elements differ rarely.
    """
    if not all(map(_is_aligned, rows)):  # as nothing is that is tried
        return False
    layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in rows)

    def try_all() -> bool:
        random = torch.Generator().manual_seed(0)
        for _ in range(draws):
            equal = [_equal_rows(tensor, random) for tensor in rows]
            alone = function(*(tensor[:1] for tensor in equal))
            if not all(torch.equal(row, alone[0]) for row in function(*equal)):
                return False
        return True

    return holds((name, layouts), try_all)


def holds(key: Hashable, check: Callable[[], bool]) -> bool:
    """What `check` says, asked once for each `key` and number of threads."""
    key = key, torch.get_num_threads()
    if key not in _found:
        _found[key] = check()
    return _found[key]


def _equal_rows(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers, the same in every row, laid out in memory as `like` is."""
    row = torch.randn(like.shape[1:], generator=random).to(like.dtype)
    if like.stride(0) == 0:
        return torch.empty_strided(like.shape[1:], like.stride()[1:], dtype=like.dtype).copy_(row).expand(like.shape)
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(row.expand(like.shape))


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0
