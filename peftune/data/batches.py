"""Blocks of a token store, which of them make up which optimizer step, and the batches a model can take.

A step is a set of blocks, a pure function of seed and step, the same on every rank. How its blocks are laid out in
memory (rows packed or padded, micro-batches, ranks) changes nothing in what is learnt, so that is decided later.

Shapes: B rows, T columns (the longest row of the batch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from peftune.data.packing import Packing, Windows, cut_into_windows, one_each, pack
from peftune.data.tokens.store import TokenStore

NOT_SCORED = -100
_WINDOWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward.

    `ids`, `positions`: (B, T) int64, positions restart with each document. `targets`: (B, T) int64, the token that
    each position must predict, or -100. `segments`: (B, T) int64, number of the document within its row, -1 where
    there is none; attention never crosses segments. None where every row is one document from end to end, so that
    attention need only be causal and may take its fastest kernels.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; to a GPU through pinned memory, so that the copy does not stop the host."""
        ids, positions, targets = (_moved(tensor, device) for tensor in (self.ids, self.positions, self.targets))
        return Batch(ids, positions, targets, None if self.segments is None else _moved(self.segments, device))


@dataclass(frozen=True)
class Blocks:
    """Chosen documents of a store, packed into blocks of `packing.block_size` tokens."""

    store: TokenStore
    documents: np.ndarray
    packing: Packing
    supervised: np.ndarray
    """Scored tokens of each span, (spans,) int64."""

    @staticmethod
    def of(store: TokenStore, documents: np.ndarray, block_size: int, alone: bool = False) -> Blocks:
        """Pack the given documents of a store, or with `alone` make each window a block.

        Windows in which nothing is scored (long prompts) are left out.
        """
        windows = cut_into_windows(store.lengths[documents], block_size)
        supervised = _supervised_per_window(store, documents, windows)
        scored = supervised > 0
        if alone:
            return Blocks(store, documents, one_each(windows.chosen(scored), block_size), supervised[scored])
        packing, order = pack(windows.chosen(scored), block_size)
        return Blocks(store, documents, packing, supervised[scored][order])

    def __len__(self) -> int:
        return len(self.packing)

    def tokens(self) -> int:
        """Scored tokens over all blocks."""
        return int(self.supervised.sum())

    def tokens_of(self, blocks: Sequence[int] | np.ndarray) -> int:
        """Scored tokens of some blocks: what their summed loss is divided by."""
        return int(self._supervised_per_block[np.asarray(blocks, dtype=np.int64)].sum())

    @cached_property
    def _supervised_per_block(self) -> np.ndarray:
        return np.add.reduceat(self.supervised, self.packing.first[:-1])

    def text_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return int(self.store.supervised_bytes[self.documents].sum())

    def batches(self, blocks: Sequence[int] | np.ndarray, micro_size: int, packed: bool = True) -> Iterator[Batch]:
        """The blocks as micro-batches of at most `micro_size * block_size` positions.

        Packed: `micro_size` blocks, one a row. Padded: each span is a row, rows sorted by length.
        """
        spans = [self.packing.spans(int(block)) for block in blocks]
        if packed:
            for first in range(0, len(spans), micro_size):
                yield self.batch(spans[first : first + micro_size])
        else:
            budget = micro_size * self.packing.block_size
            for rows in _rows_by_length([s for row in spans for s in row], self.packing, budget):
                yield self.batch([range(span, span + 1) for span in rows])

    def batch(self, rows: Sequence[range]) -> Batch:
        """One batch, each row of it these spans of the packing."""
        counts = np.array([len(row) for row in rows])
        spans = np.concatenate([np.arange(row.start, row.stop) for row in rows])
        packing = self.packing
        start, stop = packing.start[spans], packing.stop[spans]
        tokens, scored = self.store.windows(self.documents[packing.example[spans]], start, stop)
        sizes = stop - start
        begins = np.cumsum(sizes) - sizes  # of each span among `tokens`
        begins_row = np.cumsum(counts) - counts  # of each row among `spans`
        of_rows = np.add.reduceat(sizes, begins_row)
        shape = (len(rows), int(of_rows.max()))
        index = np.arange(len(tokens)) + np.repeat(np.arange(len(rows)) * shape[1] - begins[begins_row], of_rows)

        def padded(values: np.ndarray, fill: int) -> np.ndarray:
            full = np.full(shape, fill, dtype=np.int64)
            full.reshape(-1)[index] = values
            return full

        # The target of a position is the next token, except at a span's end.
        following = np.append(np.where(scored, tokens, NOT_SCORED)[1:], NOT_SCORED)
        following[begins + sizes - 1] = NOT_SCORED
        positions = np.arange(len(tokens)) - np.repeat(begins, sizes)
        numbers = np.repeat(np.arange(len(spans)) - np.repeat(begins_row, counts), sizes)
        segments = padded(numbers, -1)
        return Batch(
            torch.from_numpy(padded(tokens, 0)),
            torch.from_numpy(padded(positions, 0)),
            torch.from_numpy(padded(following, NOT_SCORED)),
            torch.from_numpy(segments) if segments.any() else None,  # all 0: every row is one document
        )


def steps_per_epoch(blocks: int, global_size: int) -> int:
    """Optimizer steps that one pass takes; the last may hold fewer blocks than `global_size`."""
    return math.ceil(blocks / global_size)


def total_steps(blocks: int, global_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of the run; `steps` wins over `epochs` where it is given."""
    return steps if steps is not None else max(1, round(epochs * steps_per_epoch(blocks, global_size)))


def blocks_of_step(step: int, blocks: int, global_size: int, seed: int) -> np.ndarray:
    """Block numbers of one step (counted from 0), in order; every epoch is a fresh permutation."""
    epoch, within = divmod(step, steps_per_epoch(blocks, global_size))
    return _permutation(blocks, seed, epoch)[within * global_size : (within + 1) * global_size]


@lru_cache(maxsize=2)
def _permutation(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def share_of(blocks: np.ndarray, micro_size: int, rank: int, ranks: int) -> np.ndarray:
    """A rank's blocks of a step: every `ranks`-th group of `micro_size`, so that micro-batches are those of one rank.

    Groups are smaller where there would not be one for each rank.
    """
    size = max(1, min(micro_size, -(-len(blocks) // ranks)))
    group = np.arange(len(blocks)) // size
    chosen: np.ndarray = blocks[group % ranks == rank]
    return chosen


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _supervised_per_window(store: TokenStore, documents: np.ndarray, windows: Windows) -> np.ndarray:
    owner = documents[windows.example]
    counts = np.asarray(store.supervised_counts[owner], dtype=np.int64)
    plain = counts == store.lengths[owner] - 1  # all is scored: nothing to look up
    counts[plain] = (windows.stop - windows.start - 1)[plain]
    parts = np.flatnonzero(~plain & ((windows.start > 0) | (windows.stop < store.lengths[owner])))
    for some in np.array_split(parts, len(parts) // _WINDOWS_AT_ONCE + 1):
        if len(some):
            start, stop = windows.start[some] + 1, windows.stop[some]  # the first token is context
            _, scored = store.windows(owner[some], start, stop)
            counts[some] = np.add.reduceat(scored, np.cumsum(stop - start) - (stop - start), dtype=np.int64)
    return counts


def _rows_by_length(spans: Sequence[int], packing: Packing, budget: int) -> Iterator[list[int]]:
    """Spans, longest first, in groups whose count times longest length stays within `budget` positions."""
    sizes = packing.stop - packing.start
    group: list[int] = []
    for span in sorted(spans, key=lambda s: -int(sizes[s])):
        if group and (len(group) + 1) * int(sizes[group[0]]) > budget:
            yield group
            group = []
        group.append(span)
    if group:
        yield group
