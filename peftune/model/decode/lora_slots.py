"""LoRA for a batch whose rows have different adapters: A and B of slot s are row s of two stacked tensors.

So one batched product computes all rows. Legend: R rows, T tokens of each, r rank. A module path is (block, module),
such as (3, "attn.c_attn").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peftune.model.decode.kv_cache import select_slots

ModulePath = tuple[int, str]
Factors = tuple[torch.Tensor, torch.Tensor]
LoraFactors = Mapping[ModulePath, Factors]
"""A (R, in, r) and B (R, r, out), its scale in it, of every module that one of the rows adapts."""

# A row's last bits must not change with the zeros that a neighbour of a higher rank adds. So ranks are padded:
_MANY_TOKENS_RANK = 16  # for several tokens, because MKL multiplies by narrower matrices in another order,
_MKL_PRODUCTS = 400  # and for one so that torch takes MKL at all: below so many products it has a loop of its own

_ids = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter of plain LoRA in memory: for each module A (r, in) and B (r, out), float32; B holds the scale.

    `rank` is the largest of any module; zeros pad it to at least 16. `id` is its own: another adapter, or the same one
    loaded again, has another.
    """

    factors: Mapping[ModulePath, Factors]
    rank: int
    id: int = field(default_factory=lambda: next(_ids))


def lora_weights(factors: Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor, float]]) -> LoraWeights:
    """An adapter out of PEFT's A (r, in), B (out, r) and scale of each module."""
    padded = {}
    for path, (a, b, scale) in factors.items():
        rank = max(_MANY_TOKENS_RANK, _one_token_rank(len(a), min(a.shape[1], len(b))))
        padded[path] = _padded(a, rank), _padded(scale * b.T, rank)
    return LoraWeights(padded, max(len(a) for a, _, _ in factors.values()))


def add_lora(y: torch.Tensor, x: torch.Tensor, factors: Factors | None) -> torch.Tensor:
    """y (R, T, out) + x (R, T, in)·A·B, in place."""
    return y if factors is None else y.baddbmm_(torch.bmm(x, factors[0]), factors[1])


class AdapterSlots:
    """A and B of the adapters in the slots of a batch; slots without one, and ranks above its own, hold zeros.

    A slot is filled when a mixed batch first needs it, so batches of one adapter copy nothing. Memory: slots times
    the largest rank so far.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._rank = 0
        self._loaded = [0] * slots  # id of the adapter in each slot, 0 for none
        self._stacked: dict[ModulePath, Factors] = {}
        self._last: tuple[object, LoraFactors] = (None, {})  # of the same rows, which ask again at every token

    def factors(
        self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], one_token: bool = False
    ) -> LoraFactors:
        """A and B for the rows in `slots`, for `one_token` each or for several.

        Row i has `adapters[i]`, None for the base alone.
        """
        key = one_token, list(slots), [adapter.id if adapter is not None else 0 for adapter in adapters]
        if self._last[0] != key:
            rank = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
            found = self._stored_factors(slots, adapters)
            self._last = key, {path: _as_used(a, b, rank if one_token else None) for path, (a, b) in found.items()}
        return self._last[1]

    def _stored_factors(self, slots: Sequence[int], adapters: Sequence[LoraWeights | None]) -> LoraFactors:
        """A (R, r, in) and B (R, r, out) of the rows, as wide as they are in memory."""
        first = adapters[0]
        if all(adapter is first for adapter in adapters):  # the short way: views of one A and B
            rows, factors = len(slots), first.factors if first is not None else {}
            return {path: (a.expand(rows, -1, -1), b.expand(rows, -1, -1)) for path, (a, b) in factors.items()}
        present = [adapter for adapter in adapters if adapter is not None]
        self._allocate(present)
        for slot, adapter in zip(slots, adapters, strict=True):
            self._load(slot, adapter)
        paths = {path for adapter in present for path in adapter.factors}
        return {path: tuple(select_slots(stacked, slots) for stacked in self._stacked[path]) for path in paths}  # type: ignore[misc]

    def _load(self, slot: int, adapter: LoraWeights | None) -> None:
        wanted, factors = (adapter.id, adapter.factors) if adapter is not None else (0, {})
        if self._loaded[slot] == wanted:
            return
        for path, stacked in self._stacked.items():
            for target, source in zip(stacked, factors.get(path, (None, None)), strict=True):
                target[slot] = 0
                if source is not None:
                    target[slot, : len(source)] = source
        self._loaded[slot] = wanted

    def _allocate(self, adapters: Sequence[LoraWeights]) -> None:
        """Tensors for all modules of these adapters, as wide as their ranks; what is in other slots stays."""
        rank = max(len(a) for adapter in adapters for a, _ in adapter.factors.values())
        if rank > self._rank:
            self._rank = rank
            self._stacked = {}
            self._loaded = [-1] * self._slots  # to be filled again
        for adapter in adapters:
            for path, (a, b) in adapter.factors.items():
                if path not in self._stacked:
                    shape_a, shape_b = ((self._slots, self._rank, factor.shape[1]) for factor in (a, b))
                    self._stacked[path] = a.new_zeros(shape_a), b.new_zeros(shape_b)


def _as_used(a: torch.Tensor, b: torch.Tensor, rank: int | None) -> Factors:
    """A (R, in, r) and B (R, r, out) as one token needs them, whose highest rank is `rank`; None: several tokens."""
    if rank is None:
        return a.mT, b
    rank = _one_token_rank(rank, min(a.shape[2], b.shape[2]))
    return a[:, :rank].mT, b[:, :rank]


def _one_token_rank(rank: int, width: int) -> int:
    """What `rank` is padded to for one token; the narrower side of A and B has this width."""
    enough = max(rank, -(-_MKL_PRODUCTS // width))
    return -(-enough // 8) * 8  # MKL's kernels take 8 columns at once


def _padded(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """(r, n) in float32 with zeros up to `rank`; contiguous, because the layout decides the last bits of a product."""
    padded = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.float32)
    padded[: len(matrix)] = matrix
    return padded
