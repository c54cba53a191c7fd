"""The function that an adapter was trained as, where its base was quantised: unpacked weights and the adapter.

A merge goes into the full-precision base, which is near to that function and not equal to it. What is compared is made
block by block as everything in a merge: each weight is quantised and unpacked when its block is built.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import GPT2Config

from peftune.adapters.directory import Adapter
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.merge.verify import Pieces, WithAdapter
from peftune.model import quantized
from peftune.model.weights import Weights


def quantised_as(adapter: Adapter) -> quantized.Kind | None:
    """`int8` or `nf4` where peftune.json says that the base was quantised in training."""
    kind = _recipe(adapter).get("quantize")
    return "int8" if kind == "int8" else "nf4" if kind == "nf4" else None


def can_be_measured(adapter: Adapter) -> bool:
    """Whether there is such a function, and the library to compute it with."""
    return quantised_as(adapter) is not None and quantized.is_available()


def stream(
    adapter: Adapter, weights: Weights, layout: AdapterLayout, config: GPT2Config, pieces: Pieces
) -> WithAdapter:
    """Quantised base + adapter as it was trained, in float32."""
    kind = quantised_as(adapter)
    assert kind is not None, "only an adapter of a quantised base has a function apart from full base + adapter"

    def held(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return quantized.rounded(tensor, kind) if ".h." in name and tensor.ndim == 2 else tensor

    return WithAdapter(weights, _as_trained(adapter, layout), config, pieces, held)


def _as_trained(adapter: Adapter, layout: AdapterLayout) -> AdapterLayout:
    """LoftQ is delivered as [B, -B0]·[A; A0]; on the quantised base B·A was trained, which is the first half."""
    lora = _recipe(adapter).get("lora")
    if not isinstance(lora, dict) or lora.get("variant") != "loftq":
        return layout
    return dataclasses.replace(layout, targets={name: _first_half(target) for name, target in layout.targets.items()})


def _first_half(target: LoraTarget) -> LoraTarget:
    rank = target.rank // 2
    a, b = target.parts["lora_A.weight"][:rank], target.parts["lora_B.weight"][:, :rank]
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    return dataclasses.replace(target, rank=rank, alpha=target.alpha / 2, parts=parts)


def _recipe(adapter: Adapter) -> dict[str, object]:
    recipe = (adapter.provenance or {}).get("recipe")
    return recipe if isinstance(recipe, dict) else {}
