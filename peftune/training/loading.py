"""The model that a run trains: the base in the number format of its frozen weights, a fresh adapter on it."""

from __future__ import annotations

from typing import Any

import torch

from peftune.config.recipe import Recipe
from peftune.model import lora
from peftune.model.base import Base
from peftune.model.load import load_model, move_to


def load_adapted(recipe: Recipe, base: Base, dtype: torch.dtype, device: torch.device) -> lora.Adapted:
    """The base with a fresh adapter: adapter in fp32, frozen weights in `dtype` where only blocks are adapted.

    DoRA and PiSSA derive initial values from the base's weights, so they see them in fp32 first. Trained
    embeddings, norms or heads keep the whole base in fp32 (matrix products still use `dtype`). What `quantize` packs
    stays packed; LoftQ reads the weights of the base once more, one after the other, to see what packing lost.
    """
    if device.type == "cpu":
        device = torch.device("cpu")  # a rank's is cpu:0, on which int8 weights would be kept twice
    model = load_model(
        base,
        dtype=_loading_dtype(recipe, dtype),
        device="cpu" if recipe.quantize is None else device,
        dropout=recipe.run.base_dropout,
        quantize=recipe.quantize,
    )
    adapted = lora.inject(model, recipe.lora, recipe.run.seed, base.weights.tensor)
    move_to(adapted.model, device, dtype if only_blocks_are_trained(adapted) else torch.float32)
    if recipe.run.checkpointing:
        recompute_activations(adapted)
    return adapted


def recompute_activations(adapted: lora.Adapted) -> None:
    """Non-reentrant, so that gradients reach the adapter although nothing before it is trained."""
    core: Any = adapted.model.base_model.model  # Transformers 5 renamed the switch
    enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _loading_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    exact = recipe.lora.variant in ("dora", "pissa") or recipe.lora.modules_to_save
    return torch.float32 if exact or recipe.lora.targets not in ("all", "attention") else dtype


def only_blocks_are_trained(adapted: lora.Adapted) -> bool:
    return all(".h." in name and ".ln_" not in name for name in adapted.trainable())
