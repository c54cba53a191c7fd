"""A frozen linear layer whose weight is made anew for every product, so that only its packed form stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

Make = Callable[[torch.dtype], torch.Tensor]


def frozen_linear(x: torch.Tensor, make: Make, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias for `x` (…, in), differentiable in `x`; `make(dtype)` is W (out, in), made once for each direction.

    The product is in autocast's dtype where that is on, else in that of `x`. Neither `x` nor W is kept for the
    backward: a frozen layer needs no gradient of its weight.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if bias is None else bias.to(dtype)
    return _FrozenLinear.apply(x.to(dtype), make, bias)  # type: ignore[no-any-return,no-untyped-call]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, make: Make, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.make = make
        return F.linear(x, make(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream @ ctx.make(upstream.dtype), None, None
