"""AdamW over the adapter, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftune.config.recipe import OptimSection


def build(parameters: dict[str, nn.Parameter], optim: OptimSection, fused: bool) -> torch.optim.AdamW:
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
    """Rate of step `step` (from 0) of `total`: a linear rise, then the schedule down to zero after the last step."""
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
