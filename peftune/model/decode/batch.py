"""A batch whose rows compute different functions of one architecture: base, base + LoRA, or weights of their own.

Rows of the same weights go through one forward, whatever their adapters; each row owns a slot of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftune.model.decode.captured_steps import CapturedSteps, recorder
from peftune.model.decode.forward import DecodeGPT2
from peftune.model.decode.kv_cache import KVCache
from peftune.model.decode.lora_slots import AdapterSlots
from peftune.model.decode.lora_stack import LoraWeights
from peftune.model.decode.token_step import TokenStep
from peftune.model.train.layers import to_device


@dataclass(frozen=True)
class ModelVariant:
    """What a row computes: a model, and the LoRA that is added to it."""

    model: DecodeGPT2
    lora: LoraWeights | None = None


class DecodeBatch:
    """Slots for rows: the adapter of each, its keys and values in `cache`; without one only prefill from position 0.

    On a GPU one token of every row is a step of fixed shapes, recorded by `steps` (None: as the device wants it).
    """

    def __init__(self, slots: int, cache: KVCache | None = None, steps: CapturedSteps | None = None) -> None:
        self._cache, self._adapters = cache, AdapterSlots(slots)
        self._step: TokenStep | None = None
        if cache is not None and (steps is not None or cache.device.type != "cpu"):
            recorded = CapturedSteps(recorder(cache.device)) if steps is None else steps
            self._step = TokenStep(slots, cache, self._adapters, recorded)

    @torch.inference_mode()
    def prefill(
        self, variants: Sequence[ModelVariant], slots: Sequence[int], ids: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Hidden states (R, T, D) of rows with tokens `ids` (R, T) from position `start` on: `DecodeGPT2.prefill`."""

        def part(model: DecodeGPT2, rows: list[int]) -> torch.Tensor:
            used, adapters = [slots[row] for row in rows], [variants[row].lora for row in rows]
            if model.on_cpu and self._step is None:
                lora = self._adapters.factors(used, adapters)
            else:
                lora = self._adapters.stacked(used, adapters).factors()
            return model.prefill(rows_of(ids, rows), start, self._cache, used, lora)

        return _by_model(variants, part)

    @torch.inference_mode()
    def decode(
        self, variants: Sequence[ModelVariant], slots: Sequence[int], ids: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """Hidden states (R, D) of rows with one new token each, at their own positions."""
        cache = self._cache
        assert cache is not None, "decoding needs the cache"

        def part(model: DecodeGPT2, rows: list[int]) -> torch.Tensor:
            used, adapters = [slots[row] for row in rows], [variants[row].lora for row in rows]
            ids_here, at = [ids[row] for row in rows], [positions[row] for row in rows]
            if self._step is not None:
                return self._step(model, ids_here, at, used, adapters)
            lora = self._adapters.factors(used, adapters, one_token=True)
            return model.decode(torch.tensor(ids_here), at, cache, used, lora)

        return _by_model(variants, part)

    @torch.inference_mode()
    def logits(self, variants: Sequence[ModelVariant], hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, …, V), float32, of hidden states (R, …, D); row i is of `variants[i]`."""
        return _by_model(variants, lambda model, rows: model.logits(rows_of(hidden, rows)))


def _by_model(variants: Sequence[ModelVariant], part: Callable[[DecodeGPT2, list[int]], torch.Tensor]) -> torch.Tensor:
    """`part` of the rows of each model, put together in the order of the rows."""
    groups: dict[int, list[int]] = {}
    for row, variant in enumerate(variants):
        groups.setdefault(id(variant.model), []).append(row)
    results = [(rows, part(variants[rows[0]].model, rows)) for rows in groups.values()]
    if len(results) == 1:
        return results[0][1]
    combined = results[0][1].new_empty(len(variants), *results[0][1].shape[1:])
    for rows, result in results:
        combined[to_device(torch.tensor(rows), combined.device)] = result
    return combined


def rows_of(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These rows, in rising order; all of them as they are."""
    return tensor if len(rows) == len(tensor) else tensor[to_device(torch.tensor(rows), tensor.device)]
