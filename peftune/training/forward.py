"""Which of two equal functions computes a step: peftune's own GPT-2, or Transformers' with PEFT's layers in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftune.config.recipe import Recipe
from peftune.model.lora import Adapted
from peftune.model.train.forward import TrainGPT2, reason_against, train_forward

_WORTH = {"cpu": 2e14, "cuda": 2e16}  # FLOP in ten minutes or so


@dataclass(frozen=True)
class ForwardFn:
    """What scores a batch: `fast`, or the engine's module where that is None; `told` says which and why."""

    fast: TrainGPT2 | None
    told: str


def choose(
    adapted: Adapted, recipe: Recipe, dtype: torch.dtype, sharded: bool, tokens: int, say: Callable[[str], None]
) -> ForwardFn:
    """The fast function wherever it computes the same; `sharded` is a base whose weights lie on all ranks.

    `tokens` is what the whole run learns from, at most: whether compiling repays. `say` tells what takes long.
    """
    if not recipe.run.fast:
        reason: str | None = "run.fast is false"
    else:
        reason = "ZeRO-3 shares out the base" if sharded else reason_against(adapted)
    if reason is not None:
        return ForwardFn(None, f"steps by Transformers and PEFT ({reason})")
    optim, worth = recipe.optim, recipe.run.compile and _worth_compiling(adapted, tokens)
    if worth:
        say("compiling what stands between matrix products: half a minute the first time, seconds afterwards")
    chosen = train_forward(adapted, dtype, optim.neftune, optim.label_smoothing, recipe.run.checkpointing, worth)
    told = chosen.pieces.told if worth or not recipe.run.compile else "not compiled: the run is too short to repay it"
    return ForwardFn(chosen, f"fast steps ({', '.join(filter(None, (chosen.kernel.name, told)))})")


def _worth_compiling(adapted: Adapted, tokens: int) -> bool:
    """Whether a run takes many minutes: of its time compiling saves a few percent, and takes half a minute.

    Decided by the recipe and the data alone, so that a run that is resumed decides as it did before.
    """
    core: Any = adapted.model.get_base_model()
    elements = 12 * core.config.n_layer * core.config.n_embd**2 + core.lm_head.weight.numel()
    return bool(4.0 * elements * tokens > _WORTH.get(core.device.type, 0.0))
