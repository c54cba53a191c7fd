"""On a GPU, cross entropy of rows of logits and, in their place, its gradient: by one Triton kernel.

Torch's operations read or write each logit ten times for it, mostly in fp32; the kernel reads it twice and writes it
once, in the dtype that it has. Both compute in fp32 and round the gradient once, to the dtype of the logits. In fp16
probabilities below 3e-8 become zero, in this as in torch's way: a row of GPT-2's has 0.0015 of them at most, beside
the 1 that its target takes.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from peftune.device import is_out_of_memory
from peftune.errors import first_line

Share = float | torch.Tensor
"""Of each target's probability, what is spread evenly over the vocabulary: one number, or (C, 1) float32."""


def by_kernel(logits: torch.Tensor, targets: torch.Tensor, share: Share, nats: torch.Tensor, wanted: bool) -> None:
    """Writes the nats, (C, 1) float32, of logits (C, V) and targets (C,), and over the logits their gradients.

    These are p - (1 - share) · onehot - share / V; where they are not `wanted`, the logits stay. `reason_against` must
    be empty.
    """
    from peftune.model.train.cross_entropy_kernel import launch

    shares = share if isinstance(share, torch.Tensor) else torch.full_like(nats, share) if share else None
    launch(logits, targets.contiguous(), shares, nats, wanted)


def description(device: torch.device, dtype: torch.dtype) -> str:
    """How a GPU computes it, for the line that begins a run."""
    reason = reason_against(device, dtype)
    return f"cross entropy by torch, without its Triton kernel: {reason}" if reason else "cross entropy by one kernel"


@functools.cache
def reason_against(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel is not taken; empty where its loss and gradient are those of torch, on a few random rows.

    The first call for a GPU compiles the kernel, which takes seconds where none is in Triton's cache, and waits for it.
    """
    try:
        off = max(_error(device, dtype, share, wanted) for share in (0.0, 0.1) for wanted in (True, False))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: a run needs none of them
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    return "" if off <= 1 else f"it is off by {off:.2g} times what rounding explains"


def _error(device: torch.device, dtype: torch.dtype, share: float, wanted: bool) -> float:
    """The largest difference from autograd in fp32, relative to what rounding explains.

    Of rows longer than a block, of an odd length, each beginning where fast kernels want it.
    """
    rows, columns, stride = 3, 5001, 5056
    numbers = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, stride, generator=numbers)).to(device, dtype)[:, :columns]
    targets = torch.tensor([0, columns - 1, 1234]).to(device)
    with torch.enable_grad():
        exact = logits.float().clone().requires_grad_()
        right = F.cross_entropy(exact, targets, reduction="none", label_smoothing=share)
        (gradient,) = torch.autograd.grad(right.sum(), exact)
    nats = torch.full((rows, 1), torch.nan, device=device)
    by_kernel(logits, targets, share, nats, wanted)
    pairs = (1e-4, nats[:, 0], right), (max(1e-4, 2 * torch.finfo(dtype).eps), logits, gradient if wanted else exact)
    off = [((found - right) / (rounding * right.abs() + 1e-6)).abs().max() for rounding, found, right in pairs]
    return float(torch.stack(off).detach().max().nan_to_num(nan=torch.inf))
