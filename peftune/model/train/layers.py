"""The layers of a block: frozen linear layers with LoRA, x·W + b + s·(x·Aᵀ)·Bᵀ, LayerNorm and GELU.

Legend: N tokens, D width, I and O widths in and out, R rank, P rows of all terms of A or B (see `_terms`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftune.model import quantized

Weight = Callable[[], Tensor]
Activation = Callable[[Tensor], Tensor]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; to a GPU through pinned memory, so that the host need not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class LoraFactors:
    """A (R, I) and B (O, R), trained in fp32 and multiplied without rounding; `scale` is alpha / rank or so."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float
    terms: list[Tensor] = field(default_factory=list)
    """Of A and of Bᵀ, where they are known to hold for several forwards."""

    def split(self, dtype: torch.dtype) -> None:
        """Compute the `terms` for matrix products in `dtype`."""
        self.terms[:] = _terms(self.a, dtype), _terms(self.b.T, dtype)


def frozen_weight(layer: Any, packed: bool, dtype: torch.dtype) -> Tensor:
    """W (I, O): the base's own tensor, stored input by output, which has the dtype of the run already.

    Of a quantised (`packed`) layer it is unpacked for each product, so that one layer at a time is.
    """
    return quantized.unpacked(layer, dtype).T if packed else layer.weight.to(dtype)


@dataclass(frozen=True)
class LoraLinear:
    """`weight()` is W (I, O) in the dtype of the run: the base's own tensor, or unpacked for every use."""

    weight: Weight
    bias: Tensor
    adapter: LoraFactors | None

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """(N, I) to (N, O), differentiable in x, A and B; `training` switches the adapter's dropout."""
        adapter = self.adapter
        if adapter is None:
            return _Frozen.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        dropped = F.dropout(x, adapter.dropout) if training and adapter.dropout else None
        return _Adapted.apply(x, dropped, self.weight, self.bias, adapter, adapter.a, adapter.b)  # type: ignore[no-any-return,no-untyped-call]


class _Frozen(torch.autograd.Function):
    """No gradient of W, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.addmm(bias, x, weight())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ ctx.weight().T, None, None


class _Adapted(torch.autograd.Function):
    """The adapter's products are added in place to those of the frozen layer; it sees `dropped` where given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Weight, bias: Tensor, factors: LoraFactors,
        a: Tensor, b: Tensor,
    ) -> Tensor:  # fmt: skip
        seen = x if dropped is None else dropped
        a_PI, b_PO = factors.terms or (_terms(a, x.dtype), _terms(b.T, x.dtype))
        inner_NR = _summed(seen @ a_PI.T, len(a))
        ctx.save_for_backward(seen, inner_NR, a_PI, b_PO)
        ctx.weight, ctx.scale, ctx.dropped = weight, factors.scale, dropped is not None
        return torch.addmm(bias, x, weight()).addmm_(_repeated(inner_NR, b_PO), b_PO, alpha=factors.scale)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        seen, inner_NR, a_PI, b_PO = ctx.saved_tensors
        d_inner_NR = _summed(upstream @ b_PO.T, inner_NR.shape[1]).mul_(ctx.scale)
        d_b = (inner_NR.T @ upstream).T.float().mul_(ctx.scale)  # far faster than the product of the transposes
        d_a = (d_inner_NR.T @ seen).float()
        d_x = upstream @ ctx.weight().T if ctx.needs_input_grad[0] else None
        d_seen = None
        if ctx.dropped and ctx.needs_input_grad[1]:
            d_seen = _repeated(d_inner_NR, a_PI) @ a_PI
        elif d_x is not None:
            d_x.addmm_(_repeated(d_inner_NR, a_PI), a_PI)
        return d_x, d_seen, None, None, None, d_a, d_b


def _terms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp32 matrix (R, …) as summands in `dtype`, one below the other: (P, …), P = 2·R, or R where `dtype` is fp32.

    Rounding A and B is what a gradient in bf16 suffers from most (2.1 % of error, 1.5 % without it, on twelve random
    layers); the second summand holds what rounding took, and products with so few rows cost next to nothing.
    """
    if matrix.dtype == dtype:
        return matrix
    rounded = matrix.to(dtype)
    return torch.cat([rounded, (matrix - rounded).to(dtype)])


def _summed(product_NP: Tensor, rank: int) -> Tensor:
    """The products with all terms of a matrix, added up: (N, R)."""
    return product_NP.view(len(product_NP), -1, rank).sum(dim=1)


def _repeated(inner_NR: Tensor, terms: Tensor) -> Tensor:
    """(N, P), so that each term of a matrix is multiplied."""
    return inner_NR.repeat(1, len(terms) // inner_NR.shape[1])


@dataclass(frozen=True)
class Norm:
    """Weight, bias (D,), float32, and epsilon of a LayerNorm, and the dtype of what comes out."""

    weight: Tensor
    bias: Tensor
    epsilon: float
    dtype: torch.dtype


def normed(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, to: torch.dtype) -> Tensor:
    """LayerNorm of the fp32 stream (N, D)."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon).to(to)


def added(
    x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float, to: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream with what a layer adds to it, and its LayerNorm."""
    x = x + more
    return x, normed(x, weight, bias, epsilon, to)


@dataclass(frozen=True)
class Elementwise:
    """The two functions above and the model's activation, or the same compiled; `description` says which."""

    activated: Activation
    _normed: Callable[..., Tensor] = normed
    _added: Callable[..., tuple[Tensor, Tensor]] = added
    description: str = ""

    def normed(self, x: Tensor, norm: Norm) -> Tensor:
        """LayerNorm of the stream."""
        return self._normed(x, norm.weight, norm.bias, norm.epsilon, norm.dtype)

    def added(self, x: Tensor, more: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """x + more, and the LayerNorm of that."""
        return self._added(x, more, norm.weight, norm.bias, norm.epsilon, norm.dtype)
