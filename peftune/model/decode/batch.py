"""A batch whose rows compute different functions of one architecture: base, base + low rank, or weights of their own.

Rows of the same weights go through one forward, whatever their adapters; each row owns a slot of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftune.model.decode.build import Plan
from peftune.model.decode.forward import DecodeGPT2
from peftune.model.decode.lora_slots import AdapterSlots, LoraWeights


@dataclass(frozen=True)
class ModelVariant:
    """What a row computes: a model, and what is added to it."""

    model: DecodeGPT2
    low_rank: LoraWeights | None = None


class DecodeBatch:
    """Slots for rows: keys, values and adapters of each. `remember` False: no cache, for texts that are only read."""

    def __init__(self, plan: Plan, slots: int, remember: bool = True) -> None:
        self._cache = plan.cache(slots) if remember else None
        self._stacks = AdapterSlots(slots)

    @torch.inference_mode()
    def prefill(
        self, functions: Sequence[ModelVariant], slots: Sequence[int], ids: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Hidden states (R, T, D) of rows that read `ids` (R, T) from position `start` on; see `DecodeGPT2.prefill`."""

        def part(model: DecodeGPT2, rows: list[int]) -> torch.Tensor:
            of, at = [functions[row].low_rank for row in rows], [slots[row] for row in rows]
            return model.prefill(_chosen(ids, rows), start, self._cache, at, self._stacks.deltas(at, of))

        return _by_model(functions, part)

    @torch.inference_mode()
    def decode(
        self, functions: Sequence[ModelVariant], slots: Sequence[int], ids: torch.Tensor, positions: Sequence[int]
    ) -> torch.Tensor:
        """Hidden states (R, D) of rows that read one token each, `ids` (R,), at their own `positions`."""
        cache = self._cache
        assert cache is not None, "what is written must be remembered"

        def part(model: DecodeGPT2, rows: list[int]) -> torch.Tensor:
            of, at = [functions[row].low_rank for row in rows], [slots[row] for row in rows]
            where = [positions[row] for row in rows]
            return model.decode(_chosen(ids, rows), where, cache, at, self._stacks.deltas(at, of, one_token=True))

        return _by_model(functions, part)

    @torch.inference_mode()
    def logits(self, functions: Sequence[ModelVariant], hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V), float32, of hidden states (N, D); row i is of `functions[i]`."""
        return _by_model(functions, lambda model, rows: model.logits(_chosen(hidden, rows)))

    def forget(self, slot: int, length: int) -> None:
        """A slot is free: nothing of its `length` positions stays."""
        if self._cache is not None:
            self._cache.forget(slot, length)

    def move(self, source: int, target: int, length: int) -> None:
        """What a slot remembers, `length` positions of it, goes to a free one."""
        if self._cache is not None:
            self._cache.move(source, target, length)


def _by_model(functions: Sequence[ModelVariant], part: Callable[[DecodeGPT2, list[int]], torch.Tensor]) -> torch.Tensor:
    """`part` of the rows of each model, put together in the order of the rows."""
    groups: dict[int, list[int]] = {}
    for row, function in enumerate(functions):
        groups.setdefault(id(function.model), []).append(row)
    results = [(rows, part(functions[rows[0]].model, rows)) for rows in groups.values()]
    if len(results) == 1:
        return results[0][1]
    whole = results[0][1].new_empty(len(functions), *results[0][1].shape[1:])
    for rows, result in results:
        whole[rows] = result
    return whole


def _chosen(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]
