"""The adapters of a batch whose rows differ: A and B of row s lie in slot s of stacks, so one batched product does all.

Legend: R rows, T tokens of each, r rank. A place is (block, module), such as (3, "attn.c_attn").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peftune.model.decode.kv_cache import of_rows

ModulePath = tuple[int, str]
LoraFactors = Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor]]
"""A (R, in, r) and B (R, r, out), its scale in it, of every place that one of the rows adapts."""

# A row's last bits must not change with the zeros that a neighbour of a higher rank adds. So ranks are seen padded:
_SEVERAL = 16  # for several tokens, because MKL multiplies by narrower matrices in another order,
_SMALL = 400  # and for one so that torch takes MKL at all: below so many products it has a loop of its own

_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter of plain LoRA in memory: for each place A (r, in) and B (r, out), float32; B holds the scale.

    `rank` is the largest of any place; zeros pad it to at least 16. `number` is its own: another adapter, or the same
    one loaded again, has another.
    """

    parts: Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    number: int = field(default_factory=lambda: next(_numbers))


def low_rank(
    parts: Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor]], scales: Mapping[ModulePath, float]
) -> LoraWeights:
    """An adapter out of PEFT's A (r, in) and B (out, r), and the scale of each place."""
    padded = {}
    for at, (a, b) in parts.items():
        rank = max(_SEVERAL, _one_token(len(a), min(a.shape[1], len(b))))
        padded[at] = _padded(a, rank), _padded(scales[at] * b.T, rank)
    return LoraWeights(padded, max(len(a) for a, _ in parts.values()))


def adapted(y: torch.Tensor, x: torch.Tensor, delta: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """y (R, T, out) + x (R, T, in)·A·B, in place."""
    if delta is None:
        return y
    a, b = delta
    return y.baddbmm_(torch.bmm(x, a), b)


class AdapterSlots:
    """A and B of the adapters in the slots of a batch; slots without one, and ranks above its own, hold zeros.

    A slot is filled when a mixed batch first needs it, so batches of one adapter copy nothing. Memory: slots times
    the largest rank so far.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._rank = 0
        self._held = [0] * slots  # number of the adapter in each slot, 0 for none
        self._stacks: dict[ModulePath, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last: tuple[object, LoraFactors] = (None, {})  # of the same rows, who ask again at every token

    def deltas(
        self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], one_token: bool = False
    ) -> LoraFactors:
        """What the rows in `slots` add to `one_token` of theirs, or to several.

        Row i has `adapters[i]`, None for the base alone.
        """
        numbers = [adapter.number if adapter is not None else 0 for adapter in adapters]
        asked = one_token, list(slots), numbers
        if self._last[0] != asked:
            found = self._deltas(slots, adapters)
            rank = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
            self._last = asked, {at: _seen(a, b, rank if one_token else None) for at, (a, b) in found.items()}
        return self._last[1]

    def _deltas(self, slots: Sequence[int], adapters: Sequence[LoraWeights | None]) -> LoraFactors:
        """A (R, r, in) and B (R, r, out) of the rows, as wide as they lie in memory."""
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

    def _fill(self, slot: int, adapter: LoraWeights | None) -> None:
        number = adapter.number if adapter is not None else 0
        if self._held[slot] == number:
            return
        parts = adapter.parts if adapter is not None else {}
        for at, stacks in self._stacks.items():
            for stack, part in zip(stacks, parts.get(at, (None, None)), strict=True):
                rank = 0 if part is None else len(part)
                if part is not None:
                    stack[slot, :rank] = part
                if rank < self._rank:
                    stack[slot, rank:] = 0
        self._held[slot] = number

    def _make_room(self, adapters: Sequence[LoraWeights]) -> None:
        """AdapterSlots for all places of these adapters, as wide as their ranks; what is in other slots stays."""
        rank = max(len(a) for adapter in adapters for a, _ in adapter.parts.values())
        if rank > self._rank:
            self._rank = rank
            self._stacks = {}
            self._held = [-1] * self._slots  # to be filled again
        for adapter in adapters:
            for at, (a, b) in adapter.parts.items():
                if at not in self._stacks:
                    shape_a, shape_b = ((self._slots, self._rank, part.shape[1]) for part in (a, b))
                    self._stacks[at] = a.new_zeros(shape_a), b.new_zeros(shape_b)


def _seen(a: torch.Tensor, b: torch.Tensor, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in, r) and B (R, r, out) as one token needs them, whose highest rank is `rank`; None: several tokens."""
    if rank is None:
        return a.mT, b
    rank = _one_token(rank, min(a.shape[2], b.shape[2]))
    return a[:, :rank].mT, b[:, :rank]


def _one_token(rank: int, width: int) -> int:
    """What `rank` is padded to for one token; the narrower side of A and B has this width."""
    enough = max(rank, -(-_SMALL // width))
    return -(-enough // 8) * 8  # MKL's kernels take 8 columns at once


def _padded(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """(r, n) in float32 with zeros up to `rank`."""
    padded = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.float32)
    padded[: len(matrix)] = matrix
    return padded


def _each(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    return matrix.expand(rows, -1, -1)
