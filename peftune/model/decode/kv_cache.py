"""Keys and values of the texts that are being generated: a slot each, bounded, allocated once.

Pages of memory are taken only where something was written: a slot costs what its longest text so far needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peftune.model.train.layers import to_device

if TYPE_CHECKING:
    from transformers import GPT2Config

_STRIDE = 64  # keys are read in multiples of so many, so that a row's sums do not depend on its neighbours' lengths


def select_slots(tensor: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """The slots of a tensor (slots, …): a view where they are consecutive, else a copy."""
    first = slots[0]
    if list(slots) == list(range(first, first + len(slots))):
        return tensor[first : first + len(slots)]
    return tensor.index_select(0, to_device(torch.tensor(slots), tensor.device))


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
    """For each block keys and values (slots, H, positions, W) of H heads of width W.

    Positions that nothing has written hold zeros: what is masked must still be finite.
    """

    def __init__(
        self, config: GPT2Config, slots: int, dtype: torch.dtype, device: torch.device, positions: int | None = None
    ) -> None:
        self.positions = positions or config.n_positions
        shape = (slots, config.n_head, self.positions, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def move(self, source: int, target: int, length: int) -> None:
        """Move the first `length` positions of one slot into another, which was freed before."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        self.free(source, length)

    def free(self, slot: int, length: int) -> None:
        """Write zeros over the first `length` positions: masked or not, a NaN of one text would reach the next."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, :length] = 0

    def padded_length(self, length: int) -> int:
        """How many positions attention reads where the longest text has `length`."""
        return min(self.positions, -(-length // _STRIDE) * _STRIDE)
