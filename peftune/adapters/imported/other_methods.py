"""PEFT adapters of other methods than LoRA, as the LoRA that comes nearest to each module's update.

PEFT's `convert_to_lora` factorises the updates of the methods that it supports on a GPT-2. AdaLoRA it does not take,
though that is a LoRA already: ΔW = B·diag(E)·A·alpha/(r + 1e-5) (`peft.tuners.adalora`, peft 0.21).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GPT2LMHeadModel

from peftune.adapters.directory import read_tensors
from peftune.adapters.low_rank import LowRankDelta, best_of_rank
from peftune.adapters.module_names import with_full_names
from peftune.errors import UserError, first_line
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import quiet_peft
from peftune.model.weights import all_finite

METHODS = ("ADALORA", "GRALORA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""What PEFT can put on a GPT-2's layers and what is then a sum of the weight and an update."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_LARGEST = 65_536  # of a whole number in the configuration: nothing of a GPT-2's size needs more
_ANY_NUMBER = ("projection_prng_key", "random_seed", "proj_seed", "seed", "total_step", "tinit", "tfinal")


def converted(
    directory: Path, config: dict[str, Any], base: Base, rank: int | None
) -> Iterator[tuple[LowRankDelta, float, float]]:
    """(update, ‖ΔW‖, ‖ΔW - update‖) of each module that the adapter changes, rounded as it will be stored.

    `rank` cuts each; None keeps every direction that is there. Raises UserError for a method that cannot be converted,
    and for an adapter that does not fit the base.
    """
    method = str(config.get("peft_type"))[:40]
    if method not in METHODS:
        raise UserError(
            f"adapter {directory}: peft_type {method} cannot be converted; expected LORA or one of "
            f"{', '.join(METHODS)}; merge it with PEFT itself and extract an adapter from the result"
        )
    if method != "ADALORA" and not hasattr(peft, "convert_to_lora"):
        raise UserError(
            f"adapter {directory}: peft_type {method} needs convert_to_lora, which PEFT {peft.__version__} does not "
            "have; install a newer peft"
        )
    model = _loaded(directory, config, base)
    layers: dict[str, Any] = {
        n: module for n, module in model.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, layer in layers.items():
        kind = "linear" if isinstance(layer.get_base_layer(), torch.nn.Linear) else "conv1d"
        with torch.no_grad():
            delta = layer.get_delta_weight("default").double()
        delta = delta if kind == "linear" else delta.T
        if not all_finite(delta):
            raise UserError(f"adapter {directory}: the update of {name} is not finite; the training went wrong")
        left, right = _adalora(layer) if method == "ADALORA" else _by_peft(layer, min(delta.shape), directory, name)
        exact = LowRankDelta(name, kind, left.double(), right.double())  # type: ignore[arg-type]
        update = best_of_rank(exact, rank or exact.rank)
        yield update, float(torch.linalg.matrix_norm(delta)), update.missed(delta)


def _by_peft(layer: Any, rank: int, directory: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        _, factors = peft.convert_to_lora(torch.nn.ModuleDict({"layer": layer}), rank=rank)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"adapter {directory}: PEFT cannot convert {name}: {first_line(error)}") from None
    return factors["layer.lora_B.weight"], factors["layer.lora_A.weight"]


def _adalora(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, e, b = (getattr(layer, f"lora_{part}")["default"].detach().double() for part in "AEB")
    scale = layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
    return b * (e.T * scale), a


def _loaded(directory: Path, config: dict[str, Any], base: Base) -> Any:
    """The base with the adapter on it, all of whose tensors have arrived."""
    where, tensors = f"adapter {directory}", read_tensors(directory)
    for name, tensor in tensors.items():  # VB-LoRA stores indices too
        if tensor.is_floating_point() and not (tensor.numel() and all_finite(tensor)):
            raise UserError(f"{where}: {name} is empty or not finite; the training went wrong")
    try:
        settings = _settings(config, base)
        with quiet_peft():
            model: Any = peft.get_peft_model(load_model(base), settings)
            result: Any = peft.set_peft_model_state_dict(model, tensors)
            held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: does not fit this base, or is damaged: {first_line(error)}") from None
    missing = sorted(held.keys() - tensors.keys())
    strange = sorted({*result.unexpected_keys, *(tensors.keys() - held.keys())})
    if missing or strange:
        problem = f"{missing[0]} is not there" if missing else f"{strange[0]} belongs to nothing that it adapts"
        raise UserError(f"{where}: {problem}; pass the base that it was trained on, or copy the adapter again")
    for name, tensor in tensors.items():
        if not torch.equal(held[name].detach().to(tensor.dtype), tensor):
            raise UserError(f"{where}: {name} did not arrive in the model as it is in the file")
    return model.eval()


def _settings(config: dict[str, Any], base: Base) -> Any:
    """PEFT's configuration of these values, without patterns; ValueError for what would not be one of a GPT-2."""
    for key, value in config.items():
        if key not in _ANY_NUMBER and isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{key} is {value:,}; expected at most {_LARGEST:,}")
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise ValueError("it trained biases or whole modules too, which no LoRA of its layers holds")
    with torch.device("meta"):
        modules = [name for name, _ in GPT2LMHeadModel(base.config).named_modules() if name]
    chosen = with_full_names({key: config.get(key) for key in _PATTERNS}, modules)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    known = {field.name for field in dataclasses.fields(kind) if field.init} - {"peft_type", "auto_mapping"}
    values = {key: value for key, value in {**config, **chosen}.items() if key in known}
    return kind(**{**values, "inference_mode": True})
