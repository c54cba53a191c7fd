"""One token of every text by steps of few fixed shapes: what a GPU is given.

Row i of a step is slot i of the cache, so keys, values, A and B are read where they lie. Rows beyond the texts that are
asked for, and slots between them, are computed too: they write to the spare slot, and nobody looks at their results.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from peftune.model.decode.captured_steps import CapturedSteps
from peftune.model.decode.forward import DecodeGPT2
from peftune.model.decode.kv_cache import KVCache
from peftune.model.decode.lora_slots import AdapterSlots
from peftune.model.decode.lora_stack import LoraWeights

_COARSE = 32  # rows; fewer are rounded up to a power of two, more to a multiple


def padded_rows(rows: int, slots: int) -> int:
    """Rows of the step that computes so many of all slots."""
    return min(slots, 1 << (rows - 1).bit_length() if rows <= _COARSE else -(-rows // _COARSE) * _COARSE)


class TokenStep:
    """Decoding by `DecodeGPT2.step`, recorded by `steps`; ids, positions and slots lie where they always lie."""

    def __init__(self, slots: int, cache: KVCache, adapters: AdapterSlots, steps: CapturedSteps) -> None:
        self._slots, self._cache, self._adapters, self._steps = slots, cache, adapters, steps
        self._inputs = torch.zeros(4 * slots, dtype=torch.int64, device=cache.device)

    def __call__(
        self,
        model: DecodeGPT2,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        adapters: Sequence[LoraWeights | None],
    ) -> torch.Tensor:
        """Hidden states (R, D) of rows in `slots` with one new token each, at their own positions."""
        rows, span = padded_rows(max(slots) + 1, self._slots), self._cache.span(max(positions) + 1)
        lora = self._adapters.stacked(slots, adapters, rows)
        host = torch.zeros(4, rows, dtype=torch.int64)
        host[2] = self._cache.spare
        host[:3, list(slots)] = torch.tensor([ids, positions, slots])
        host[3, : len(slots)] = torch.tensor(slots)
        given = self._inputs[: host.numel()].view(4, rows)
        given.copy_(host.pin_memory() if self._cache.device.type == "cuda" else host, non_blocking=True)
        key = weakref.ref(model), rows, span, lora.key  # a recording may not keep a model, nor be taken for another's
        hidden = self._steps.run(key, lambda: model.step(given[:3], span, self._cache, lora.factors()))
        return hidden.index_select(0, given[3, : len(slots)])
