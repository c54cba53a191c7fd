"""Plain LoRA in memory: an adapter's A and B, and a stack that holds those of one adapter in each row.

Legend: r rank. A module path is (block, module), such as (3, "attn.c_attn").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

ModulePath = tuple[int, str]
Factors = tuple[torch.Tensor, torch.Tensor]

RANKS = 8  # ranks are padded to multiples: most kernels then give a rank and a higher one the same bits
_ALIGNED = 32  # elements; every A and B begins where fast kernels want it

_ids = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter of plain LoRA in memory: for each module A (r, in) and B (r, out); B holds the scale.

    Zeros pad ranks to multiples of 8. `id` is its own: another adapter, or the same one loaded again, has another.
    """

    factors: Mapping[ModulePath, Factors]
    id: int = field(default_factory=lambda: next(_ids))


def lora_weights(
    factors: Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor, float]], dtype: torch.dtype = torch.float32
) -> LoraWeights:
    """An adapter in `dtype`, out of PEFT's A (r, in), B (out, r) and scale of each module."""

    def padded(matrix: torch.Tensor) -> torch.Tensor:  # contiguous, because the layout decides the last bits
        rows = -(-len(matrix) // RANKS) * RANKS
        whole = matrix.new_zeros(rows, matrix.shape[1], dtype=dtype)
        whole[: len(matrix)] = matrix
        return whole

    return LoraWeights({path: (padded(a), padded(scale * b.T)) for path, (a, b, scale) in factors.items()})


class LoraStack:
    """For each module A (rows, r, in) and B (rows, r, out), row i those of one adapter; zeros where it has none.

    They stay where they are in memory until an adapter comes with another module or a higher rank; then `version`
    rises, and every row is to be loaded again. Memory: rows times what the largest adapter would need so far.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._shapes: dict[ModulePath, tuple[tuple[int, int], tuple[int, int]]] = {}
        self._flat = torch.empty(rows, 0)
        self._loaded = [0] * rows  # id of the adapter in each row, 0 for none
        self.version = 0
        self.parts: dict[ModulePath, Factors] = {}

    def load(self, rows: Sequence[int], adapters: Sequence[LoraWeights | None]) -> None:
        """Put each adapter into its row, where it is not there already."""
        ids = [adapter.id if adapter is not None else 0 for adapter in adapters]
        if all(self._loaded[row] == wanted for row, wanted in zip(rows, ids, strict=True)):
            return
        self._make_room([adapter for adapter in adapters if adapter is not None])
        for row, wanted, adapter in zip(rows, ids, adapters, strict=True):
            if self._loaded[row] == wanted:
                continue
            self._flat[row] = 0
            if adapter is not None:
                pairs = [
                    (part[row, : len(factor)], factor)
                    for path, factors in adapter.factors.items()
                    for part, factor in zip(self.parts[path], factors, strict=True)
                ]
                torch._foreach_copy_([part for part, _ in pairs], [factor for _, factor in pairs])
            self._loaded[row] = wanted

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._flat.device

    def of(self, rows: torch.Tensor | slice) -> dict[ModulePath, Factors]:
        """A (R, in, r) and B (R, r, out) of these rows of each module: views of the stack, or of a copy."""
        return self._views(self._flat[rows])

    def _make_room(self, adapters: Sequence[LoraWeights]) -> None:
        found = dict(self._shapes)
        for path, factors in itertools.chain.from_iterable(adapter.factors.items() for adapter in adapters):
            rank = max(len(factors[0]), found.get(path, ((0, 0),))[0][0])
            a, b = ((rank, factor.shape[1]) for factor in factors)
            found[path], some = (a, b), factors[0]
        if found == self._shapes:
            return
        self._shapes, self._loaded, self.version = found, [0] * self._rows, self.version + 1
        width = sum(_room(shape) for shapes in found.values() for shape in shapes)
        self._flat, self.parts = some.new_empty(0), {}  # the old one goes first, since memory may be short
        self._flat = some.new_zeros(self._rows, width)
        self.parts = {path: (a.mT, b) for path, (a, b) in self._views(self._flat).items()}

    def _views(self, flat: torch.Tensor) -> dict[ModulePath, Factors]:
        """The A (R, in, r) and B (R, r, out) that lie in rows of the stack."""
        views, start = dict[ModulePath, Factors](), 0
        for path, shapes in self._shapes.items():
            pair = []
            for rank, width in shapes:
                pair.append(flat[:, start : start + rank * width].view(-1, rank, width))
                start += _room((rank, width))
            views[path] = pair[0].mT, pair[1]
        return views


def _room(shape: tuple[int, int]) -> int:
    """Elements that a matrix takes, and those before the next one begins."""
    return -(-shape[0] * shape[1] // _ALIGNED) * _ALIGNED
