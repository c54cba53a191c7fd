"""Best-fit packing of examples into blocks: which tokens of which example lie in which block.

An example of n tokens scores its tokens 1 … n-1. It is cut into windows of at most `block_size` tokens; a
window that continues an example repeats one token as context, so each supervised token is scored exactly once.
Windows then fill blocks, longest first, each into the fullest block that still has room (best-fit decreasing).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Spans in block order: span i holds tokens [start[i], stop[i]) of `example[i]`.

    Block b owns the spans [first[b], first[b + 1]); all arrays are int64, `first` has one more entry than blocks.
    """

    block_size: int
    first: np.ndarray
    example: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def spans(self, block: int) -> range:
        """Indices of the spans of one block."""
        return range(int(self.first[block]), int(self.first[block + 1]))

    def fill(self) -> float:
        """Share of all block positions that hold a token, in 0 … 1."""
        return float((self.stop - self.start).sum() / max(1, len(self) * self.block_size))


@dataclass(frozen=True)
class Windows:
    """Window i holds tokens [start[i], stop[i]) of `example[i]`; all arrays are int64."""

    example: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def chosen(self, which: np.ndarray) -> Windows:
        """Some of the windows, by mask or by number."""
        return Windows(self.example[which], self.start[which], self.stop[which])


def cut_into_windows(lengths: np.ndarray, block_size: int) -> Windows:
    """Windows of every example, in order; `lengths` (n,) in tokens, each at least 2."""
    lengths = np.asarray(lengths, dtype=np.int64)
    stride = block_size - 1
    counts = np.maximum(1, -(-(lengths - 1) // stride))
    example = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = nth * stride
    return Windows(example, start, np.minimum(start + block_size, lengths[example]))


def pack(windows: Windows, block_size: int) -> tuple[Packing, np.ndarray]:
    """The packing, and the window that each of its spans is; O(n log block_size), deterministic.

    Dynamic best-fit decreasing (Johnson 1973): blocks with the same free space wait on one stack, and a binary
    tree over free space finds the tightest stack that still fits.
    """
    sizes = windows.stop - windows.start
    longest_first = np.argsort(-sizes, kind="stable")
    block_of = np.empty(len(sizes), dtype=np.int64)
    open_blocks = _FreeSpace(block_size)
    blocks = 0
    for window, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        taken = open_blocks.take(size)
        if taken is None:
            taken = blocks, block_size
            blocks += 1
        block, free = taken
        block_of[window] = block
        open_blocks.put(block, free - size)
    order = np.argsort(block_of, kind="stable")
    first = np.searchsorted(block_of[order], np.arange(blocks + 1))
    spans = windows.chosen(order)
    return Packing(block_size, first, spans.example, spans.start, spans.stop), order


class _FreeSpace:
    """Blocks by free space; `take` finds the least space that fits in O(log block_size)."""

    def __init__(self, block_size: int) -> None:
        self.leaves = 1 << block_size.bit_length()
        self.count = [0] * (2 * self.leaves)
        self.stacks: list[list[int]] = [[] for _ in range(block_size + 1)]

    def put(self, block: int, free: int) -> None:
        if free < 2:  # a window has at least two tokens: this block is full
            return
        self.stacks[free].append(block)
        self._add(free, 1)

    def take(self, size: int) -> tuple[int, int] | None:
        free = self._at_least(size)
        if free is None:
            return None
        self._add(free, -1)
        return self.stacks[free].pop(), free

    def _add(self, free: int, amount: int) -> None:
        node = self.leaves + free
        while node:
            self.count[node] += amount
            node >>= 1

    def _at_least(self, size: int) -> int | None:
        node = self.leaves + size
        if not self.count[node]:
            while node > 1 and (node & 1 or not self.count[node + 1]):  # climb until a right sibling has blocks
                node >>= 1
            if node <= 1:
                return None
            node += 1
            while node < self.leaves:
                node *= 2
                if not self.count[node]:
                    node += 1
        return node - self.leaves
