"""Which of two equal functions computes a step: peftune's own GPT-2, or Transformers' with PEFT's layers in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftune.config import Recipe
from peftune.model.fast.adapted import fast, reason_against
from peftune.model.fast.gpt2 import FastGPT2
from peftune.model.lora import Adapted


@dataclass(frozen=True)
class Function:
    """What scores a batch: `fast`, or the engine's module where that is None; `told` says which and why."""

    fast: FastGPT2 | None
    told: str


def choose(adapted: Adapted, recipe: Recipe, dtype: torch.dtype, sharded: bool) -> Function:
    """The fast function wherever it computes the same; `sharded` is a base whose weights lie on all ranks."""
    if not recipe.run.fast:
        reason: str | None = "run.fast is false"
    else:
        reason = "ZeRO-3 shares out the base" if sharded else reason_against(adapted)
    if reason is not None:
        return Function(None, f"steps by Transformers and PEFT ({reason})")
    optim = recipe.optim
    chosen = fast(adapted, dtype, optim.neftune, optim.label_smoothing, recipe.run.checkpointing)
    return Function(chosen, f"fast steps ({chosen.kernel.name})")
