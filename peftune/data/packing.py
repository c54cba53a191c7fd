"""Best-fit packing of examples into blocks: which tokens of which example lie in which block.

An example of n tokens scores its tokens 1 … n-1. It is cut into windows of at most `block_size` tokens; a
window that continues an example repeats one token as context, so each supervised token is scored exactly once.
Windows then fill blocks, longest first, each into the fullest block that still has room (best-fit decreasing).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

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
    start = np.arange(len(example))  # the number of each window within its example, times the stride
    start -= np.repeat(np.cumsum(counts) - counts, counts)
    start *= stride
    return Windows(example, start, np.minimum(start + block_size, lengths[example]))


def one_each(windows: Windows, block_size: int) -> Packing:
    """A block for each window, in their order."""
    return Packing(block_size, np.arange(len(windows.start) + 1), windows.example, windows.start, windows.stop)


def pack(windows: Windows, block_size: int) -> tuple[Packing, np.ndarray]:
    """The packing, and the window that each of its spans is; deterministic.

    Dynamic best-fit decreasing (Johnson 1973), all windows of one size at a time: blocks with the same free space
    wait on one stack, and the tightest stack that fits is emptied first. A sort, and at most one short array
    operation per size and free space: 10 million windows take seconds.
    """
    sizes = windows.stop - windows.start
    longest_first = np.argsort((block_size - sizes).astype(_narrowest(block_size)), kind="stable")
    counts = np.bincount(sizes, minlength=block_size + 1)
    block_of = np.empty(len(sizes), dtype=np.int64)
    free_space = _FreeSpace(block_size)
    at = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        until = at + int(counts[size])
        block_of[longest_first[at:until]] = free_space.assign(size, until - at)
        at = until
    order = np.argsort(block_of.astype(_narrowest(free_space.blocks)), kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(block_of, minlength=free_space.blocks))])
    spans = windows.chosen(order)
    return Packing(block_size, first, spans.example, spans.start, spans.stop), order


def _narrowest(highest: int) -> type[np.unsignedinteger[Any]]:
    """An integer type that holds `highest`; numbers of 16 bits sort ten times as fast."""
    return np.uint16 if highest < 1 << 16 else np.uint32 if highest < 1 << 32 else np.uint64


class _FreeSpace:
    """Blocks by free space, in stacks; a stack is a list of arrays, last in and first out."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.stacks: list[list[np.ndarray]] = [[] for _ in range(block_size)]
        self.in_use: list[int] = []  # free spaces whose stack is not empty, rising
        self.blocks = 0

    def assign(self, size: int, windows: int) -> np.ndarray:
        """The block of each of so many windows of one size; sizes must fall from call to call."""
        assigned: list[np.ndarray] = []
        while windows:
            near = bisect_left(self.in_use, size)
            free = self.in_use[near] if near < len(self.in_use) else self.block_size
            each = free // size  # a block that takes one is now the tightest, and takes the next while it can
            wanted = -(-windows // each)
            blocks = self._take(free, wanted)
            here = min(windows, len(blocks) * each)
            assigned.append(np.repeat(blocks, each)[:here])
            last = here - (len(blocks) - 1) * each
            self._put(blocks[:-1], free - each * size)
            self._put(blocks[-1:], free - last * size)
            windows -= here
        return np.concatenate(assigned)

    def _take(self, free: int, wanted: int) -> np.ndarray:
        """Up to `wanted` blocks of the top of a stack, in order; new ones where all of the block is free."""
        if free == self.block_size:
            self.blocks += wanted
            return np.arange(self.blocks - wanted, self.blocks)
        stack = self.stacks[free]
        top = stack.pop()
        if len(top) > wanted:
            stack.append(top[:-wanted])
        elif not stack:
            self.in_use.remove(free)
        return top[::-1][:wanted]

    def _put(self, blocks: np.ndarray, free: int) -> None:
        if free < 2 or not len(blocks):  # a window has at least two tokens: such a block is full
            return
        if not self.stacks[free]:
            insort(self.in_use, free)
        self.stacks[free].append(blocks)
