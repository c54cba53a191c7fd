"""From a step's gradient to an update: one flat buffer, AdamW with its schedule, on one process or on replicas (DDP).

The other strategy, which shards optimizer state and weights over the ranks, is `distributed.zero.ShardedStrategy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from peftune.config.recipe import OptimSection

Parameters = dict[str, nn.Parameter]
Tensors = dict[str, torch.Tensor]
_GROWTH_STEPS, _LARGEST_LOSS_SCALE = 200, 65536.0
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, kept by name as `lora_A…/exp_avg`: a scalar, and two of the parameter's shape."""


class Gradient:
    """One flat fp32 buffer of all trainable parameters, (a,), with a view in each parameter's shape.

    Micro-batches are added by `autograd.grad`, which leaves `.grad` and every hook of DeepSpeed alone. So
    nothing is communicated before a step is complete, ranks may have unequally many micro-batches or none, and an
    attempt that ran out of memory can start again on its own.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        shapes: list[torch.Size],
        device: torch.device,
        masks: Sequence[torch.Tensor | None] = (),
    ) -> None:
        """`shapes` are those of the full parameters, of which a rank may have a shard.

        `masks` are true where an element is not trained: its gradient is zero, so neither AdamW (decay and moments of
        zero are zero) nor the clipping sees it.
        """
        self.parameters = parameters
        self._shapes, self._masks = shapes, [None if mask is None else mask.to(device) for mask in masks]
        elements = sum(shape.numel() for shape in shapes)
        self.trained = elements - sum(int(mask.sum()) for mask in self._masks if mask is not None)
        """Number of elements that are trained."""
        self.use(torch.zeros(elements, dtype=torch.float32, device=device))

    def use(self, flat: torch.Tensor) -> None:
        """Take these zeros (a,) as the buffer, a part of a larger one."""
        self.flat = flat
        parts = torch.split(flat, [shape.numel() for shape in self._shapes])
        self.views = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        self._masked = [(view, m) for view, m in zip(self.views, self._masks, strict=False) if m is not None]

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of a scalar loss; a parameter that it does not reach gets zero."""
        Gradient.add_to_all([self], loss)

    @staticmethod
    def add_to_all(gradients: Sequence[Gradient], loss: torch.Tensor) -> None:
        """`add` for a loss that is the sum of several adapters'."""
        parameters = [p for gradient in gradients for p in gradient.parameters]
        views = [view for gradient in gradients for view in gradient.views]
        values = torch.autograd.grad(loss, parameters, allow_unused=True)
        reached = [(view, found) for view, found in zip(views, values, strict=True) if found is not None]
        if reached:
            torch._foreach_add_(*map(list, zip(*reached, strict=True)))
        for gradient in gradients:
            for view, mask in gradient._masked:
                view.masked_fill_(mask, 0.0)

    def largest(self) -> torch.Tensor:
        """Largest magnitude of an element, a scalar; inf or nan where the gradient is broken."""
        return self.flat.abs().max()


def build_adamw(parameters: Parameters, optim: OptimSection, fused: bool) -> torch.optim.AdamW:
    """One group for A and everything else, one for B (LoRA+), each split by whether weight decay applies.

    A group carries `ratio`, its rate relative to the schedule. Vectors (DoRA magnitudes, biases, norms) do not decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = optim.lr_b_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((ratio, decay), []).append(parameter)
    listed = [{"params": p, "ratio": ratio, "weight_decay": decay} for (ratio, decay), p in groups.items()]
    return torch.optim.AdamW(listed, lr=optim.lr, betas=optim.betas, fused=fused)


def lr_at(step: int, total: int, optim: OptimSection) -> float:
    """Learning rate of step `step` (from 0) of `total`: a linear rise, then the schedule, zero after the last step."""
    warm = warmup_steps(total, optim.warmup)
    if step < warm:
        return optim.lr * (step + 1) / (warm + 1)
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - warm) / max(1, total - warm)
    return optim.lr * ((1 - progress) if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(total: int, warmup: float) -> int:
    """Number of steps with a rising rate: a share of `total` below 1, a number of steps from 1 up."""
    return min(total - 1, round(warmup * total) if warmup < 1 else int(warmup))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write the schedule's rate into every group; a wrapped scheduler would advance once a rank."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


class UpdateStrategy(Protocol):
    """One optimizer over the adapter, on one rank or many; every rank calls the same methods in the same order."""

    module: nn.Module
    """Called by the reference forward."""
    forward_is_collective: bool
    """Whether a forward needs the other ranks, so that all must run equally many (ZeRO-3)."""

    def update(self, gradient: Gradient, divisor: float, rate: float, summed: bool = False) -> torch.Tensor:
        """Divide and sum gradients over ranks unless they are `summed`, clip, take one AdamW step.

        The gradient's norm before clipping, a scalar that the host need not wait for.
        """

    def state_dict(self) -> tuple[Tensors, Tensors]:
        """Adapter and moments by parameter name, complete on every rank, on the CPU."""

    def load_state_dict(self, values: Tensors, moments: Tensors) -> None:
        """Take over an adapter and its moments, complete on every rank, as if this strategy had made them."""

    def memory_bytes(self, model: nn.Module) -> dict[str, int]:
        """Bytes on this rank: the model's `parameters` and the `optimizer_state` (moments, master copies)."""


class ReplicatedStrategy:
    """AdamW on one process, or the same AdamW on each: gradients are summed in one all-reduce a step."""

    forward_is_collective = False

    def __init__(
        self, module: nn.Module, parameters: Parameters, optimizer: torch.optim.AdamW, clip: float | None, ranks: int
    ) -> None:
        self.module, self.parameters, self.optimizer = module, parameters, optimizer
        self.clip, self.ranks = clip or math.inf, ranks
        if ranks > 1:  # equal seeds make equal adapters on equal machines; be sure
            for parameter in parameters.values():
                torch.distributed.broadcast(parameter.data, src=0)

    def update(self, gradient: Gradient, divisor: float, rate: float, summed: bool = False) -> torch.Tensor:
        if not summed:
            gradient.flat.mul_(1.0 / divisor)
            if self.ranks > 1:
                torch.distributed.all_reduce(gradient.flat)
        for parameter, view in zip(gradient.parameters, gradient.views, strict=True):
            parameter.grad = view
        norm = torch.nn.utils.clip_grad_norm_(gradient.parameters, self.clip)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> tuple[Tensors, Tensors]:
        values, moments = {}, {}
        for name, p in self.parameters.items():
            values[name] = p.detach().to("cpu", copy=True)
            for key, entry in self.optimizer.state.get(p, {}).items():
                moments[f"{name}/{key}"] = entry.detach().to("cpu", copy=True)
        return values, moments

    def load_state_dict(self, values: Tensors, moments: Tensors) -> None:
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])
            for key in MOMENTS if moments else ():  # AdamW keeps its step count on the CPU unless it is fused
                entry = moments[f"{name}/{key}"]
                self.optimizer.state[parameter][key] = entry.to(parameter.device) if key != "step" or fused else entry

    def memory_bytes(self, model: nn.Module) -> dict[str, int]:
        return {"parameters": sum(p.nbytes for p in model.parameters()), "optimizer_state": state_bytes(self.optimizer)}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that an optimizer remembers."""
    entries = [entry for state in optimizer.state.values() for entry in state.values()]
    return sum(entry.nbytes for entry in entries if torch.is_tensor(entry))


def first_loss_scale(dtype: torch.dtype) -> float:
    """fp16 only: summed nats are differentiated, so a token's gradient is of order one and needs little help."""
    return 16.0 if dtype == torch.float16 else 1.0


def next_loss_scale(scale: float, step: int) -> float:
    """fp16's scale after a step that went well: doubled now and then. One that overflows is halved and repeated."""
    return min(_LARGEST_LOSS_SCALE, 2 * scale) if (step + 1) % _GROWTH_STEPS == 0 else scale
