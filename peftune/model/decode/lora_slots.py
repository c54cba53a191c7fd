"""LoRA for a batch whose rows have different adapters.

For several tokens of each row, a row is multiplied with its own A and B. For one token A and B of slot s are row s of
two stacked tensors, so that one batched product computes all rows; where a row would not get the bits that its own A
and B give it (`batch_invariance`), it is multiplied with those. Legend: R rows, T tokens of each, r rank. A module path
is (block, module), such as (3, "attn.c_attn").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from peftune.model.decode.batch_invariance import holds, row_of, rows_as_alone
from peftune.model.decode.kv_cache import consecutive
from peftune.model.decode.lora_stack import Factors, LoraStack, LoraWeights, ModulePath
from peftune.model.train.layers import to_device

OwnFactors = Sequence[Factors | None]
"""A (in, r) and B (r, out) of each row, None where it does not adapt the module."""
LoraFactors = Mapping[ModulePath, Factors | OwnFactors]
"""For every module that a row adapts: A (R, in, r) and B (R, r, out), or each row's own. B has the scale in it."""


def add_lora(y: torch.Tensor, x: torch.Tensor, factors: Factors | OwnFactors | None) -> torch.Tensor:
    """y (R, T, out) + x (R, T, in)·A·B; y may be written to."""
    if factors is None:
        return y
    if isinstance(factors, tuple):
        if y.device.type != "cpu":
            return y.baddbmm_(torch.bmm(x, factors[0]), factors[1])  # another result would be a copy of y first
        return _batched(y, x, *factors)
    for row, own in enumerate(factors):
        if own is not None:
            y[row] = _batched(row_of(y, row), row_of(x, row), own[0][None], own[1][None])[0]
    return y


def _batched(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(y, torch.bmm(x, a), b)


@dataclass(frozen=True)
class StackedFactors:
    """A (R, in, r) and B (R, r, out) of every module, made when asked for: some hundred views.

    `key` is equal where all tensors lie where they lay before: what was recorded with them holds.
    """

    key: Hashable
    factors: Callable[[], dict[ModulePath, Factors]]


class AdapterSlots:
    """A and B of the adapters in the slots of a batch; slots without one, and ranks above its own, hold zeros.

    A slot is filled when a mixed batch first needs it; for batches of one adapter it is one row that all see.
    """

    def __init__(self, slots: int) -> None:
        self._mixed, self._single = LoraStack(slots), LoraStack(1)
        self._last: tuple[object, LoraFactors] = (None, {})  # of the same rows, which ask again at every token

    def factors(
        self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], one_token: bool = False
    ) -> LoraFactors:
        """A and B for the rows in `slots`, with the bits of each alone, for `one_token` each or for several.

        Row i has `adapters[i]`, None for the base alone.
        """
        key = one_token, list(slots), [adapter.id if adapter is not None else 0 for adapter in adapters]
        if self._last[0] != key:
            paths = {path: None for adapter in adapters if adapter is not None for path in adapter.factors}
            own = {path: [_own(adapter, path) for adapter in adapters] for path in paths}
            self._last = key, self._stacked_where_equal(slots, adapters, own) if one_token else own
        return self._last[1]

    def stacked(self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], rows: int = 0) -> StackedFactors:
        """A and B in one stack for the rows in `slots`, or for the first `rows` slots of all; for kernels of a GPU."""
        if all(adapter is adapters[0] for adapter in adapters):
            if adapters[0] is None:
                return StackedFactors("none", dict)
            self._single.load([0], adapters[:1])
            return StackedFactors(("one", self._single.version), partial(self._expanded, rows or len(slots)))
        self._mixed.load(slots, adapters)
        which = slice(0, rows) if rows else consecutive(slots)
        index = to_device(torch.tensor(slots), self._mixed.device) if which is None else which
        return StackedFactors(("mixed", self._mixed.version), partial(self._mixed.of, index))

    def _expanded(self, rows: int) -> dict[ModulePath, Factors]:
        """The one adapter's A and B, seen by so many rows."""
        views = self._single.of(slice(0, 1))
        return {path: (a.expand(rows, -1, -1), b.expand(rows, -1, -1)) for path, (a, b) in views.items()}

    def _stacked_where_equal(
        self, slots: Sequence[int], adapters: Sequence[LoraWeights | None], own: Mapping[ModulePath, OwnFactors]
    ) -> LoraFactors:
        """Stacks in the place of the rows' `own` factors, where each row gets the same bits from them."""
        alike = all(adapter is adapters[0] for adapter in adapters)
        stacks = {} if alike else self.stacked(slots, adapters).factors()
        found: dict[ModulePath, Factors | OwnFactors] = {}
        for path, each in own.items():
            present = [factors for factors in each if factors is not None]
            ranks = {len(b) for _, b in present}
            if alike:  # the short way: views of one A and B
                a, b = (factor.expand(len(slots), -1, -1) for factor in present[0])
            else:
                whole_a, whole_b = stacks[path]
                a, b = whole_a[..., : max(ranks)], whole_b[:, : max(ranks)]
            found[path] = (a, b) if _equal(a, b, ranks) else each
        return found


def _own(adapter: LoraWeights | None, path: ModulePath) -> Factors | None:
    """A (in, r) and B (r, out) of an adapter, None where it does not adapt this module."""
    if adapter is None or path not in adapter.factors:
        return None
    a, b = adapter.factors[path]
    return a.mT, b


def _equal(a: torch.Tensor, b: torch.Tensor, ranks: Collection[int]) -> bool:
    """Whether A (R, in, r) and B (R, r, out) give rows of one token, of such ranks, the bits of their own A and B."""
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
