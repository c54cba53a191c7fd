"""Blocks of a token store, and the rectangular batches a model can take, packed or padded.

Shapes: B rows, T columns (the longest row of the batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peftune.data.packing import Packing, Windows, cut_into_windows, pack
from peftune.data.store import TokenStore

NOT_SCORED = -100


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward.

    `ids`, `positions`: (B, T) int64, positions restart with each document. `targets`: (B, T) int64, the token that
    each place must predict, or -100. `segments`: (B, T) int64, number of the document within its row, -1 where
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

    def supervised(self) -> int:
        """Number of scored tokens."""
        return int((self.targets != NOT_SCORED).sum())


@dataclass(frozen=True)
class Blocks:
    """Chosen documents of a store, packed into blocks of `packing.block_size` tokens."""

    store: TokenStore
    documents: np.ndarray
    packing: Packing
    supervised: np.ndarray
    """Scored tokens of each span, (spans,) int64."""

    @staticmethod
    def of(store: TokenStore, documents: np.ndarray, block_size: int) -> Blocks:
        """Pack the given documents of a store; windows in which nothing is scored (long prompts) are left out."""
        windows = cut_into_windows(store.lengths[documents], block_size)
        supervised = _supervised_per_window(store, documents, windows)
        scored = supervised > 0
        packing, order = pack(windows.chosen(scored), block_size)
        return Blocks(store, documents, packing, supervised[scored][order])

    def __len__(self) -> int:
        return len(self.packing)

    def tokens(self) -> int:
        """Scored tokens over all blocks."""
        return int(self.supervised.sum())

    def tokens_of(self, blocks: Sequence[int] | np.ndarray) -> int:
        """Scored tokens of some blocks: what their summed loss is divided by."""
        return sum(int(self.supervised[s.start : s.stop].sum()) for s in map(self.packing.spans, blocks))

    def text_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return int(self.store.supervised_bytes[self.documents].sum())

    def batches(self, blocks: Sequence[int] | np.ndarray, micro_size: int, packed: bool = True) -> Iterator[Batch]:
        """The blocks as micro-batches of at most `micro_size * block_size` places.

        Packed: `micro_size` blocks, one a row. Padded: each span is a row, rows sorted by length.
        """
        spans = [self.packing.spans(int(block)) for block in blocks]
        if packed:
            for first in range(0, len(spans), micro_size):
                yield self._batch(spans[first : first + micro_size])
        else:
            budget = micro_size * self.packing.block_size
            for rows in _rows_by_length([s for row in spans for s in row], self.packing, budget):
                yield self._batch([range(span, span + 1) for span in rows])

    def _batch(self, rows: Sequence[range]) -> Batch:
        sizes = self.packing.stop - self.packing.start
        width = max(int(sizes[row.start : row.stop].sum()) for row in rows)
        shape = (len(rows), width)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, segments = np.full(shape, NOT_SCORED), np.full(shape, -1)
        for y, row in enumerate(rows):
            x = 0
            for number, span in enumerate(row):
                tokens, scored = self._tokens(span)
                place = slice(x, x + len(tokens))
                ids[y, place], positions[y, place], segments[y, place] = tokens, np.arange(len(tokens)), number
                targets[y, x : x + len(tokens) - 1] = np.where(scored[1:], tokens[1:], NOT_SCORED)
                x += len(tokens)
        end_to_end = bool((segments == 0).all())
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            torch.from_numpy(targets),
            None if end_to_end else torch.from_numpy(segments),
        )

    def _tokens(self, span: int) -> tuple[np.ndarray, np.ndarray]:
        document = int(self.documents[self.packing.example[span]])
        ids, scored = self.store.window(document, int(self.packing.start[span]), int(self.packing.stop[span]))
        return ids.astype(np.int64), scored


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _supervised_per_window(store: TokenStore, documents: np.ndarray, windows: Windows) -> np.ndarray:
    owner = documents[windows.example]
    counts = store.supervised_counts[owner].copy()
    for number in np.flatnonzero((windows.start > 0) | (windows.stop < store.lengths[owner])):
        _, scored = store.window(int(owner[number]), int(windows.start[number]), int(windows.stop[number]))
        counts[number] = int(scored[1:].sum())
    return np.asarray(counts, dtype=np.int64)


def _rows_by_length(spans: Sequence[int], packing: Packing, budget: int) -> Iterator[list[int]]:
    """Spans, longest first, in groups whose count times longest length stays within `budget` places."""
    sizes = packing.stop - packing.start
    group: list[int] = []
    for span in sorted(spans, key=lambda s: -int(sizes[s])):
        if group and (len(group) + 1) * int(sizes[group[0]]) > budget:
            yield group
            group = []
        group.append(span)
    if group:
        yield group
