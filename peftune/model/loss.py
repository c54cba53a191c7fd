"""Summed cross entropy in nats through the language-model head, without ever holding all logits.

Legend: N scored places, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 256  # rows; 256 x 50,257 logits in fp32 are 51 MB, and a CPU's matrix product is fastest about there


def summed_nats(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N of -log p(target): float64 scalar, differentiable in `hidden` (N, D) and in a trainable head.

    A plain frozen `nn.Linear` head takes the short way: its gradient with respect to `hidden` is computed in the
    forward, chunk by chunk, so that logits are made once (4VD instead of 6VD operations a place) and dropped at once.
    """
    if _is_frozen_linear(head):
        total: torch.Tensor = _FrozenHead.apply(hidden, head.weight, targets)  # type: ignore[no-untyped-call]
        return total
    parts = [
        F.cross_entropy(head(rows).float(), wanted, reduction="sum").double()
        for rows, wanted in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    ]
    return torch.stack(parts).sum() if parts else hidden.sum().double() * 0.0


def _is_frozen_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=_gradient_dtype(hidden.dtype)) if wanted else None
        for first in range(0, len(hidden), CHUNK):
            rows, chosen = hidden[first : first + CHUNK], targets[first : first + CHUNK, None]
            logits_CV = (rows @ weight.T).float()
            log_z = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (log_z - logits_CV.gather(1, chosen)).sum(dtype=torch.float64)
            if gradient is not None:
                probability_CV = logits_CV.sub_(log_z).exp_()
                probability_CV.scatter_add_(1, chosen, torch.full_like(log_z, -1.0))
                gradient[first : first + CHUNK] = probability_CV.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(torch.float32)).to(ctx.dtype), None, None


def _gradient_dtype(hidden: torch.dtype) -> torch.dtype:
    """fp16 cannot hold a gradient that is scaled only later."""
    return torch.float32 if hidden == torch.float16 else hidden
