"""The model that an adapter was trained as, where its base was quantised: dequantised weights and the adapter.

A merge goes into the full-precision base, whose function is close to that and not equal. The comparison is computed
block by block, as everything in a merge: each weight is quantised and dequantised when its block is built.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import GPT2Config

from peftune.adapters.directory import Adapter
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.merge.verify import BlockwisePeftModel, RowSlices
from peftune.model import quantized
from peftune.model.weights import Weights


def base_quantization(adapter: Adapter) -> quantized.Kind | None:
    """`int8` or `nf4` where peftune.json says that the base was quantised in training."""
    kinds: dict[object, quantized.Kind] = {"int8": "int8", "nf4": "nf4"}
    return kinds.get(_recipe(adapter).get("quantize"))


def is_measurable(adapter: Adapter) -> bool:
    """Whether the base was quantised, and the library to compute it with is installed."""
    return base_quantization(adapter) is not None and quantized.is_available()


def quantized_peft_model(
    adapter: Adapter, weights: Weights, layout: AdapterLayout, config: GPT2Config, row_slices: RowSlices
) -> BlockwisePeftModel:
    """Quantised base + adapter as it was trained, in float32."""
    kind = base_quantization(adapter)
    assert kind is not None, "the adapter's base was not quantised"

    def quantize(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return quantized.rounded(tensor, kind) if ".h." in name and tensor.ndim == 2 else tensor

    return BlockwisePeftModel(weights, _as_trained(adapter, layout), config, row_slices, quantize)


def _as_trained(adapter: Adapter, layout: AdapterLayout) -> AdapterLayout:
    """LoftQ adapters are saved as [B, -B0]·[A; A0]; on the quantised base B·A was trained, which is the first half."""
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
