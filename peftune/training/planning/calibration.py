"""How long a block takes on this machine: one and two layers of the real width are timed, the rest follows."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config

from peftune.config.recipe import LoraSection, Recipe
from peftune.model.load import move_to, with_dropout
from peftune.model.lora import skeleton
from peftune.model.loss import LossModel
from peftune.training.optimizer import Gradient
from peftune.training.planning.trace import forward_of

SECONDS = 10.0
_BLOCK = re.compile(r"^.*\bh\.\d+\.")  # what names a block before the module within it
_CPU_WORK = 2e11  # multiplications of a timed forward, at most: a few seconds of two cores


def seconds_per_block(
    config: GPT2Config, recipe: Recipe, dtype: torch.dtype, block: int, device: torch.device, seconds: float = SECONDS
) -> float:
    """Forward and backward of a full block, alone in its micro-batch; weights have the right shapes and no meaning.

    What a step adds to that (an update of the adapter, what ranks send) is not in it. Takes about `seconds`.
    """
    work = 12 * 2 * config.n_embd**2 + config.vocab_size * config.n_embd
    tokens = block if device.type != "cpu" else max(8, min(block, int(_CPU_WORK / work)))
    passes = [_one_pass(config, recipe, dtype, tokens, device, layers) for layers in (1, 2)]
    best = [float("inf")] * 2
    deadline = time.monotonic() + seconds
    for _ in range(100):
        for index, run in enumerate(passes):
            began = time.monotonic()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[index] = min(best[index], time.monotonic() - began)
        if time.monotonic() > deadline:
            break
    one, two = best
    return (one + (config.n_layer - 1) * max(0.0, two - one)) * block / tokens


def _in_every_block(lora: LoraSection) -> LoraSection:
    """The adapter with what it has in some blocks in all of them: the timed model has one or two."""

    def suffixes(names: list[str]) -> list[str]:
        return sorted({_BLOCK.sub("", name) for name in names})

    targets = lora.targets if isinstance(lora.targets, str) else suffixes(lora.targets)
    return lora.model_copy(
        update={"layers": None, "targets": targets, "modules_to_save": suffixes(lora.modules_to_save)}
    )


def _one_pass(
    config: GPT2Config, recipe: Recipe, dtype: torch.dtype, tokens: int, device: torch.device, layers: int
) -> Callable[[], None]:
    """A function that runs forward and backward of `tokens` tokens through so many layers."""
    config = copy.copy(with_dropout(config, recipe.run.base_dropout))
    config.n_layer = layers
    adapted = skeleton(config, _in_every_block(recipe.lora))
    adapted.model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*adapted.model.parameters(), *adapted.model.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    move_to(adapted.model, device, dtype)
    adapted.model.train()
    gradient = Gradient(list(p := adapted.trainable().values()), [q.shape for q in p], device)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    if (fast := forward_of(adapted, recipe, dtype)) is not None:
        return lambda: gradient.add(fast(ids, ids, ids, None))
    module, there = LossModel(adapted.model, recipe.optim.neftune, recipe.optim.label_smoothing), ids.to(device)

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            gradient.add(module(there, there, there, None))

    return run
