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
from peftune.adapters.merge.verify import BlockwiseModel, RowSlices
from peftune.adapters.provenance import recorded
from peftune.model import quantized
from peftune.model.weights import Weights


def base_quantization(adapter: Adapter) -> quantized.Kind | None:
    """`int8` or `nf4` where peftune.json says that the base was quantised in training."""
    kind: quantized.Kind = recorded(adapter.provenance, "recipe", "quantize")
    return kind if kind in ("int8", "nf4") else None


def quantized_model(
    adapter: Adapter, weights: Weights, layout: AdapterLayout, config: GPT2Config, row_slices: RowSlices
) -> BlockwiseModel:
    """Quantised base + adapter as it was trained, in float32."""
    kind = base_quantization(adapter)
    assert kind is not None, "the adapter's base was not quantised"

    def quantize(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return quantized.rounded(tensor, kind) if ".h." in name and tensor.ndim == 2 else tensor

    # LoftQ adapters are saved as [B, -B0]·[A; A0]; on the quantised base B·A was trained, which is the first half
    if recorded(adapter.provenance, "recipe", "lora", "variant") == "loftq":
        targets = {name: _first_half(target) for name, target in layout.targets.items()}
        layout = dataclasses.replace(layout, targets=targets)
    return BlockwiseModel(weights, config, row_slices, layout, quantize)


def _first_half(target: LoraTarget) -> LoraTarget:
    rank = target.rank // 2
    a, b = target.parts["lora_A.weight"][:rank], target.parts["lora_B.weight"][:, :rank]
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    return dataclasses.replace(target, rank=rank, alpha=target.alpha / 2, parts=parts)
