"""Keys and values of the texts that are being generated: a slot each, bounded, allocated once.

Pages of memory are taken only where something was written: a slot costs what its longest text so far needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GPT2Config

_STRIDE = 64  # keys are read in multiples of so many, so that a row's sums do not depend on its neighbours' lengths


def consecutive(slots: Sequence[int]) -> slice | None:
    """The slots as a slice, which gives a view, where each follows the one before it."""
    first = slots[0]
    return slice(first, first + len(slots)) if list(slots) == list(range(first, first + len(slots))) else None


def runs_of(slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[slice, slice, int]]:
    """Rows in slots that follow each other and of one length: which rows, which slots, and the length."""
    first = [
        row
        for row in range(len(slots))
        if row == 0 or slots[row] != slots[row - 1] + 1 or lengths[row] != lengths[row - 1]
    ]
    return [
        (slice(start, end), slice(slots[start], slots[start] + end - start), lengths[start])
        for start, end in zip(first, [*first[1:], len(slots)], strict=True)
    ]


class KVCache:
    """For each block keys and values (slots + 1, H, positions, W) of H heads of width W.

    Positions that nothing has written hold zeros: what is masked must still be finite. The last slot, `spare`, takes
    what nobody reads. On a GPU all heads of a position lie together, as they are written and as kernels want them.
    """

    def __init__(
        self, config: GPT2Config, slots: int, dtype: torch.dtype, device: torch.device, positions: int | None = None
    ) -> None:
        self.positions, self.spare, self.device = positions or config.n_positions, slots, device
        heads, width = config.n_head, config.n_embd // config.n_head

        def empty() -> torch.Tensor:
            if device.type == "cpu":
                return torch.zeros(slots + 1, heads, self.positions, width, dtype=dtype)
            return torch.zeros(slots + 1, self.positions, heads, width, dtype=dtype, device=device).transpose(1, 2)

        self.keys, self.values = ([empty() for _ in range(config.n_layer)] for _ in range(2))

    def move(self, source: int, target: int, length: int) -> None:
        """Move the first `length` positions of one slot into another, which was freed before."""
        torch._foreach_copy_(self._of(target, length), self._of(source, length))
        self.free(source, length)

    def free(self, slot: int, length: int) -> None:
        """Write zeros over the first `length` positions: masked or not, a NaN of one text would reach the next."""
        torch._foreach_zero_(self._of(slot, length))

    def _of(self, slot: int, length: int) -> list[torch.Tensor]:
        return [tensor[slot, :, :length] for tensor in (*self.keys, *self.values)]

    def padded_length(self, length: int) -> int:
        """How many positions attention reads where the longest text has `length`."""
        return min(self.positions, -(-length // _STRIDE) * _STRIDE)

    def span(self, length: int) -> int:
        """The same in few sizes, each of which needs a recording of its own: 64, 128, 256 and multiples of that."""
        size = next((size for size in (64, 128) if length <= size), -(-length // 256) * 256)
        return min(self.positions, size)
