"""The adapters of a batch whose rows differ: A and B of row s lie in slot s of stacks, so one batched product does all.

Legend: R rows, T tokens of each, r rank. A place is (block, module), such as (3, "attn.c_attn").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from peftune.model.cached.cache import of_rows

Place = tuple[int, str]
Deltas = Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
"""A (R, in, r) and B (R, r, out), its scale in it, of every place that one of the rows adapts."""

_numbers = itertools.count(1)


_LEAST_RANK = 16  # below it, MKL's last bits change with the zeros that a wider neighbour adds


@dataclass(frozen=True, eq=False)
class LowRank:
    """An adapter of plain LoRA in memory: for each place A (in, r) and B (r, out), float32; B holds the scale.

    `number` is its own: another adapter, or the same one loaded again, has another. Small ranks are padded with zeros.
    """

    parts: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def rank(self) -> int:
        """The largest rank of any place."""
        return max(a.shape[1] for a, _ in self.parts.values())


def low_rank(parts: Mapping[Place, tuple[torch.Tensor, torch.Tensor]], scales: Mapping[Place, float]) -> LowRank:
    """An adapter out of PEFT's A (r, in) and B (out, r), and the scale of each place."""
    return LowRank({at: (_wide(a.T), _wide(scales[at] * b).T.contiguous()) for at, (a, b) in parts.items()})


def adapted(y: torch.Tensor, x: torch.Tensor, delta: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """y (R, T, out) + x (R, T, in)·A·B, in place."""
    if delta is None:
        return y
    a, b = delta
    return y.baddbmm_(torch.bmm(x, a), b)


class Stacks:
    """A and B of the adapters in the slots of a batch; slots without one, and ranks above its own, hold zeros.

    A slot is filled when a mixed batch first needs it, so batches of one adapter copy nothing. Memory: slots times
    the largest rank so far.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._rank = 0
        self._held = [0] * slots  # number of the adapter in each slot, 0 for none
        self._stacks: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last: tuple[object, Deltas] = (None, {})  # of the same rows, who ask again at every token

    def deltas(self, slots: Sequence[int], adapters: Sequence[LowRank | None]) -> Deltas:
        """What the rows in `slots` add; row i has `adapters[i]`, None for the base alone."""
        asked = [
            (slot, adapter.number if adapter is not None else 0) for slot, adapter in zip(slots, adapters, strict=True)
        ]
        if self._last[0] != asked:
            self._last = asked, self._deltas(slots, adapters)
        return self._last[1]

    def _deltas(self, slots: Sequence[int], adapters: Sequence[LowRank | None]) -> Deltas:
        first = adapters[0]
        if all(adapter is first for adapter in adapters):  # the short way: one A and B, seen once for each row
            parts = first.parts if first is not None else {}
            return {at: (_each(a, len(slots)), _each(b, len(slots))) for at, (a, b) in parts.items()}
        present = [adapter for adapter in adapters if adapter is not None]
        self._make_room(present)
        for slot, adapter in zip(slots, adapters, strict=True):
            self._fill(slot, adapter)
        places = {at for adapter in present for at in adapter.parts}
        return {at: (of_rows(self._stacks[at][0], slots), of_rows(self._stacks[at][1], slots)) for at in places}

    def _fill(self, slot: int, adapter: LowRank | None) -> None:
        number = adapter.number if adapter is not None else 0
        if self._held[slot] == number:
            return
        parts = adapter.parts if adapter is not None else {}
        for at, (stack_a, stack_b) in self._stacks.items():
            a, b = parts.get(at, (None, None))
            rank = 0 if a is None else a.shape[1]
            if a is not None and b is not None:
                stack_a[slot, :, :rank] = a
                stack_b[slot, :rank] = b
            if rank < self._rank:
                stack_a[slot, :, rank:] = 0
                stack_b[slot, rank:] = 0
        self._held[slot] = number

    def _make_room(self, adapters: Sequence[LowRank]) -> None:
        """Stacks for all places of these adapters, as wide as their ranks; what is in other slots stays."""
        rank = max(adapter.rank for adapter in adapters)
        if rank > self._rank:
            self._rank = rank
            self._stacks = {}
            self._held = [-1] * self._slots  # to be filled again
        for adapter in adapters:
            for at, (a, b) in adapter.parts.items():
                if at not in self._stacks:
                    shape_a, shape_b = (self._slots, a.shape[0], self._rank), (self._slots, self._rank, b.shape[1])
                    self._stacks[at] = a.new_zeros(shape_a), b.new_zeros(shape_b)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """(n, r) with zeros up to the least rank."""
    return F.pad(matrix.float(), (0, max(0, _LEAST_RANK - matrix.shape[1]))).contiguous()


def _each(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    return matrix.expand(rows, -1, -1)
