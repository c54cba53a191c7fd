"""Summed cross entropy in nats through the language-model head, without ever holding all logits.

Legend: N scored places, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def summed_nats(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over N of -log p(target): float64 scalar, differentiable in `hidden` (N, D) and in a trainable head.

    With `smoothing` each target's probability is 1 - smoothing, and smoothing is spread evenly over the vocabulary
    (Szegedy et al., 1512.00567). A plain frozen `nn.Linear` head takes the short way: its gradient with respect to
    `hidden` is computed in the forward, chunk by chunk, so that logits are made once (4VD instead of 6VD operations a
    place) and dropped at once.
    """
    if _is_frozen_linear(head):
        total: torch.Tensor = _FrozenHead.apply(hidden, head.weight, targets, smoothing)  # type: ignore[no-untyped-call]
        return total
    chunk = chunk_rows(hidden.device)
    parts = [
        F.cross_entropy(head(rows).float(), wanted, reduction="sum", label_smoothing=smoothing).double()
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(parts).sum() if parts else hidden.sum().double() * 0.0


def chunk_rows(device: torch.device) -> int:
    """Rows of logits at a time: 128 x 50,257 in fp32 are 26 MB, about a CPU's cache; a GPU wants larger products."""
    return 128 if device.type == "cpu" else 1024


def _is_frozen_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float
    ) -> torch.Tensor:
        weight = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=_gradient_dtype(hidden.dtype)) if wanted else None
        chunk = max(1, min(chunk_rows(hidden.device), len(hidden)))
        logits_CV = hidden.new_empty(chunk, len(weight))  # made once: fresh memory costs more than the softmax
        probability_CV = logits_CV if logits_CV.dtype == torch.float32 else logits_CV.float()
        for first in range(0, len(hidden), chunk):
            rows, chosen = hidden[first : first + chunk], targets[first : first + chunk, None]
            logits, p = logits_CV[: len(rows)], probability_CV[: len(rows)]
            torch.mm(rows, weight.T, out=logits)
            top, picked = logits.amax(dim=1, keepdim=True).float(), logits.gather(1, chosen).float()
            mean = logits.mean(dim=1, keepdim=True, dtype=torch.float32) if smoothing else picked
            torch.softmax(logits, dim=1, dtype=torch.float32, out=p)
            log_z = top - p.amax(dim=1, keepdim=True).log()  # the largest probability is exp(top - log z)
            total += (log_z - (1 - smoothing) * picked - smoothing * mean).sum(dtype=torch.float64)
            if gradient is not None:
                p.scatter_add_(1, chosen, torch.full_like(top, smoothing - 1))
                p.sub_(smoothing / len(weight)) if smoothing else None
                gradient[first : first + chunk] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(torch.float32)).to(ctx.dtype), None, None, None


def _gradient_dtype(hidden: torch.dtype) -> torch.dtype:
    """fp16 cannot hold a gradient that is scaled only later."""
    return torch.float32 if hidden == torch.float16 else hidden
