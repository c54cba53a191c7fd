"""The gradient of one step on one rank: summed over micro-batches before anything travels."""

from __future__ import annotations

import torch
from torch import nn


class Gradient:
    """One flat fp32 buffer of all trainable parameters, (a,), with a view in each parameter's shape.

    Micro-batches are added by `autograd.grad`, which leaves `.grad` and every hook of a sharding engine alone. So
    no engine communicates before a step is complete, ranks may have unequally many micro-batches or none, and an
    attempt that ran out of memory can start again on its own.
    """

    def __init__(self, parameters: list[nn.Parameter], shapes: list[torch.Size], device: torch.device) -> None:
        """`shapes` are those of the whole parameters, which a rank may have given away."""
        self.parameters = parameters
        sizes = [shape.numel() for shape in shapes]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.views = [part.view(shape) for part, shape in zip(torch.split(self.flat, sizes), shapes, strict=True)]

    def clear(self) -> None:
        """Forget every micro-batch."""
        self.flat.zero_()

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar loss; a parameter that it does not reach gets zero."""
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for view, part in zip(self.views, parts, strict=True):
            if part is not None:
                view.add_(part)

    def largest(self) -> float:
        """Largest magnitude of an element; inf or nan where the gradient is broken."""
        return float(self.flat.abs().max())  # host sync here
