"""One linear layer of a block, frozen, with the adapter on it: x·W + b + s·(x·Aᵀ)·Bᵀ.

Legend: N tokens, I and O widths in and out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Adapter:
    """A (R, I) and B (O, R), trained in fp32 and multiplied in the dtype of the run; `scale` is alpha / rank or so."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float


@dataclass(frozen=True)
class Projection:
    """`weight()` is W (I, O) in the dtype of the run: the base's own tensor, or unpacked for every use."""

    weight: Callable[[], torch.Tensor]
    bias: torch.Tensor
    adapter: Adapter | None

    def __call__(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        """(N, I) to (N, O), differentiable in x, A and B; `training` switches the adapter's dropout."""
        adapter = self.adapter
        if adapter is None:
            return _Frozen.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        dropped = F.dropout(x, adapter.dropout) if training and adapter.dropout else None
        return _Adapted.apply(x, dropped, self.weight, self.bias, adapter.a, adapter.b, adapter.scale)  # type: ignore[no-any-return,no-untyped-call]


class _Frozen(torch.autograd.Function):
    """No gradient of W, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Callable[[], torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return torch.addmm(bias, x, weight())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream @ ctx.weight().T, None, None


class _Adapted(torch.autograd.Function):
    """The adapter's products are added in place to those of the frozen layer; it sees `dropped` where given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: Callable[[], torch.Tensor],
        bias: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        seen = x if dropped is None else dropped
        inner_NR = seen @ a.T
        ctx.save_for_backward(seen, inner_NR, a, b)
        ctx.weight, ctx.scale, ctx.dropped = weight, scale, dropped is not None
        return torch.addmm(bias, x, weight()).addmm_(inner_NR, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, inner_NR, a, b = ctx.saved_tensors
        d_inner_NR = (upstream @ b).mul_(ctx.scale)
        d_b = (inner_NR.T @ upstream).T.float().mul_(ctx.scale)  # far faster than the product of the transposes
        d_a = (d_inner_NR.T @ seen).float()
        d_x = upstream @ ctx.weight().T if ctx.needs_input_grad[0] else None
        d_seen = None
        if ctx.dropped and ctx.needs_input_grad[1]:
            d_seen = d_inner_NR @ a
        elif d_x is not None:
            d_x.addmm_(d_inner_NR, a)
        return d_x, d_seen, None, None, d_a, d_b, None
