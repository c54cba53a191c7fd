"""LoftQ (Li et al., 2310.08659): an adapter that starts as the best correction of what quantising took from the base.

With the quantised weight Ŵ given, the product s·B·A of rank r that is nearest to W - Ŵ in the Frobenius norm is its
truncated singular value decomposition (Eckart-Young). The paper alternates that step with quantising W - s·B·A anew;
here Ŵ stays what it is for every adapter (one alternation), so that bases can be shared and nothing but the base and
the rank decides the correction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peftune.model.quantized import is_quantized, unpacked


@torch.no_grad()
def correct_quantisation(model: nn.Module, original: Callable[[str], torch.Tensor]) -> None:
    """Set A and B of every adapted layer to the best correction; `original(name)` is W (in, out) before quantising."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base: Any = layer.get_base_layer()
        assert is_quantized(base), f"{name} is not quantised; the recipe should have been refused"
        quantised = unpacked(base)
        error = original(f"{name}.weight").T.to(quantised.device, torch.float64) - quantised.double()
        a, b = best_product(error, layer.r["default"], layer.scaling["default"])
        for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
            factors.get_submodule("default").get_parameter("weight").copy_(value)


def best_product(error: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank), float64, such that scale·B·A is the nearest matrix of that rank to `error`.

    From the eigenvectors of the smaller Gram matrix in float64, in two fifths of the time that all singular vectors
    take; the squaring costs nothing that float32 factors could hold. Both factors get the square root of each value.
    """
    if error.shape[0] > error.shape[1]:
        b, a = best_product(error.T, rank, scale)
        return a.T, b.T
    _, vectors = torch.linalg.eigh(error @ error.T)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ error
    values = torch.linalg.vector_norm(right, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    share = (values / scale).sqrt()
    return right * (share / values)[:, None], left * share
