"""LoRA for a batch whose rows have different adapters.

For several tokens of each row, a row is multiplied with its own A and B. For one token A and B of slot s are row s of
two stacked tensors, so that one batched product computes all rows; where a row would not get the bits that its own A
and B give it (`batch_invariance`), it is multiplied with those. Legend: R rows, T tokens of each, r rank. A module path
is (block, module), such as (3, "attn.c_attn").
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional as F

from peftune.model.decode.batch_invariance import holds, row_of, rows_as_alone
from peftune.model.decode.kv_cache import select_slots

ModulePath = tuple[int, str]
Factors = tuple[torch.Tensor, torch.Tensor]
OwnFactors = Sequence[Factors | None]
"""A (in, r) and B (r, out) of each row, None where it does not adapt the module."""
LoraFactors = Mapping[ModulePath, Factors | OwnFactors]
"""For every module that a row adapts: A (R, in, r) and B (R, r, out), or each row's own. B has the scale in it."""

_RANKS = 8  # ranks are padded to multiples: most kernels then give a rank and a higher one the same bits

_ids = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """An adapter of plain LoRA in memory: for each module A (r, in) and B (r, out), float32; B holds the scale.

    Zeros pad ranks to multiples of 8. `id` is its own: another adapter, or the same one loaded again, has another.
    """

    factors: Mapping[ModulePath, Factors]
    id: int = field(default_factory=lambda: next(_ids))


def lora_weights(factors: Mapping[ModulePath, tuple[torch.Tensor, torch.Tensor, float]]) -> LoraWeights:
    """An adapter out of PEFT's A (r, in), B (out, r) and scale of each module."""
    return LoraWeights({path: (_padded(a), _padded(scale * b.T)) for path, (a, b, scale) in factors.items()})


def add_lora(y: torch.Tensor, x: torch.Tensor, factors: Factors | OwnFactors | None) -> torch.Tensor:
    """y (R, T, out) + x (R, T, in)·A·B; y may be written to."""
    if factors is None:
        return y
    if isinstance(factors, tuple):
        return _batched(y, x, *factors)
    for row, own in enumerate(factors):
        if own is not None:
            y[row] = _batched(row_of(y, row), row_of(x, row), own[0][None], own[1][None])[0]
    return y


def _batched(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(y, torch.bmm(x, a), b)


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
            paths = {path: None for adapter in adapters if adapter is not None for path in adapter.factors}
            own = {path: [_own(adapter, path) for adapter in adapters] for path in paths}
            self._last = key, self._stacked_where_equal(slots, adapters, own) if one_token else own
        return self._last[1]

    def _stacked_where_equal(
        self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], own: Mapping[ModulePath, OwnFactors]
    ) -> LoraFactors:
        """Stacks in the place of the rows' `own` factors, where each row gets the same bits from them."""
        alike = all(adapter is adapters[0] for adapter in adapters)
        if not alike:
            self._allocate([adapter for adapter in adapters if adapter is not None])
            for slot, adapter in zip(slots, adapters, strict=True):
                self._load(slot, adapter)
        found: dict[ModulePath, Factors | OwnFactors] = {}
        for path, each in own.items():
            present = [factors for factors in each if factors is not None]
            ranks = {len(b) for _, b in present}
            if alike:  # the short way: views of one A and B
                a, b = (factor.expand(len(slots), -1, -1) for factor in present[0])
            else:
                a, b = (select_slots(stacked, slots)[:, : max(ranks)] for stacked in self._stacked[path])
                a = a.mT
            found[path] = (a, b) if _equal(a, b, ranks) else each
        return found

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


def _own(adapter: LoraWeights | None, path: ModulePath) -> Factors | None:
    """A (in, r) and B (r, out) of an adapter, None where it does not adapt this module."""
    if adapter is None or path not in adapter.factors:
        return None
    a, b = adapter.factors[path]
    return a.mT, b


def _equal(a: torch.Tensor, b: torch.Tensor, ranks: Collection[int]) -> bool:
    """Whether A (R, in, r) and B (R, r, out) give rows of one token, of such ranks, the bits of their own A and B."""
    if a.device.type != "cpu":
        return True
    (rows, width_in, rank), width_out = a.shape, b.shape[2]
    x, y = torch.empty(rows, 1, width_in), torch.empty(rows, 1, width_out)
    return rows_as_alone("lora", _batched, y, x, a, b) and all(
        own == rank
        or holds(("rank", own, rank, width_in, width_out), partial(_equal_ranks, own, rank, width_in, width_out))
        for own in ranks
    )


def _equal_ranks(own: int, rank: int, width_in: int, width_out: int) -> bool:
    """Whether one row gets the same bits from A and B of the rank `own` and from the same with zeros up to `rank`."""
    random = torch.Generator().manual_seed(0)
    x, y, a, b = (
        torch.randn(1, rows, width, generator=random)
        for rows, width in ((1, width_in), (1, width_out), (own, width_in), (own, width_out))
    )
    wide_a, wide_b = (F.pad(factor, (0, 0, 0, rank - own)) for factor in (a, b))
    return torch.equal(_batched(y, x, a.mT, b), _batched(y, x, wide_a.mT, wide_b))


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    """(r, n) in float32 with zeros up to a multiple of 8; contiguous, because the layout decides the last bits."""
    padded = matrix.new_zeros(-(-len(matrix) // _RANKS) * _RANKS, matrix.shape[1], dtype=torch.float32)
    padded[: len(matrix)] = matrix
    return padded
