"""What turns a step's gradient into an update. `ReplicatedStrategy`: every rank holds everything and updates alike.

The other strategy, which shares optimizer state and weights out among the ranks, is `zero.ShardedStrategy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from peftune.training import optimizer as optimizers
from peftune.training.gradient import Gradient

Tensors = dict[str, torch.Tensor]
Moments = dict[str, dict[str, torch.Tensor]]
"""AdamW's state of each parameter by name: `step` (), `exp_avg` and `exp_avg_sq` of the parameter's shape."""


class UpdateStrategy(Protocol):
    """One optimizer over the adapter, on one rank or many; every rank calls the same methods in the same order."""

    module: nn.Module
    """What a forward calls."""
    forward_is_collective: bool
    """Whether a forward needs the other ranks, so that all must run equally many."""

    def update(self, gradient: Gradient, divisor: float, rate: float) -> float:
        """Sum gradients over ranks, divide, clip, take one AdamW step; the gradient's norm before clipping."""

    def whole(self) -> tuple[Tensors, Moments]:
        """Adapter and moments by parameter name, complete on every rank, on the CPU."""

    def restore(self, values: Tensors, moments: Moments) -> None:
        """Take over an adapter and its moments, complete on every rank, as if this engine had made them."""

    def held_bytes(self, model: nn.Module) -> dict[str, int]:
        """Bytes on this rank: the model's `parameters` and the `optimizer_state` (moments, master copies)."""


class ReplicatedStrategy:
    """AdamW on one process, or the same AdamW on each: gradients are summed in one all-reduce a step."""

    forward_is_collective = False

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        ranks: int,
    ) -> None:
        self.module, self.parameters, self.optimizer = module, parameters, optimizer
        self.clip, self.ranks = clip or math.inf, ranks
        if ranks > 1:  # equal seeds make equal adapters on equal machines; be sure
            for parameter in parameters.values():
                torch.distributed.broadcast(parameter.data, src=0)

    def update(self, gradient: Gradient, divisor: float, rate: float) -> float:
        gradient.flat.mul_(1.0 / divisor)
        if self.ranks > 1:
            torch.distributed.all_reduce(gradient.flat)
        for parameter, view in zip(gradient.parameters, gradient.views, strict=True):
            parameter.grad = view
        norm = float(torch.nn.utils.clip_grad_norm_(gradient.parameters, self.clip))  # host sync here
        optimizers.set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self) -> tuple[Tensors, Moments]:
        values = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        state = self.optimizer.state
        moments = {
            name: {key: entry.detach().to("cpu", copy=True) for key, entry in state[p].items()}
            for name, p in self.parameters.items()
            if p in state
        }
        return values, moments

    def restore(self, values: Tensors, moments: Moments) -> None:
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])
            if name in moments:  # AdamW keeps its step count on the CPU unless it is fused
                self.optimizer.state[parameter] = {
                    key: entry.to(parameter.device) if key != "step" or fused else entry
                    for key, entry in moments[name].items()
                }

    def held_bytes(self, model: nn.Module) -> dict[str, int]:
        return {"parameters": sum(map(bytes_of, model.parameters())), "optimizer_state": state_bytes(self.optimizer)}


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that an optimizer remembers."""
    return sum(
        bytes_of(entry) for state in optimizer.state.values() for entry in state.values() if torch.is_tensor(entry)
    )
