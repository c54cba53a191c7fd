"""What an adapter changes in a base: which modules, with which rank and scale, which tensors it replaces.

PEFT itself says so: the adapter's configuration is injected into the base's architecture on the meta device, without
any weights, and what PEFT expects is compared with what the file holds.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import Embedding, LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from peftune.errors import UserError
from peftune.model.weights import HEAD, WTE

Kind = Literal["conv1d", "linear", "embedding"]

_PREFIX = "base_model.model."
_LORA_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
)  # fmt: skip
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "eva_config", "use_dora", "qalora_group_size", "runtime_config", "lora_bias",
    "ensure_weight_tying",
}  # fmt: skip
_PART_OF_SAVED = re.compile(r"\.(modules_to_save|original_module)\.")
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # these leave the base as it is


@dataclass(frozen=True)
class LoraTarget:
    """One adapted module: how its weight is stored, and PEFT's rank, alpha and scale for it.

    `pissa`: PEFT takes the top `rank` singular directions out of the base's weight before it adds the update; not so
    where the adapter brings that weight along, for then it has been taken out already.
    """

    name: str
    kind: Kind
    rank: int
    alpha: float
    scale: float
    parts: dict[str, torch.Tensor]
    pissa: bool = False


@dataclass(frozen=True)
class AdapterLayout:
    """An adapter, sorted: adapted modules by name, tensors that replace those of the base, and settings for all."""

    targets: dict[str, LoraTarget]
    replaced: dict[str, torch.Tensor]
    vocabulary: int
    dora: bool = False
    rslora: bool = False
    lora_bias: bool = False

    def tensors(self) -> set[str]:
        """Names of all tensors that the adapter brings, as `module.part`."""
        return {f"{t.name}.{part}" for t in self.targets.values() for part in t.parts} | set(self.replaced)

    def modules(self) -> set[str]:
        """Names of all modules that the adapter changes."""
        return {module_of(name) for name in self.tensors()}


def module_of(name: str) -> str:
    """The module that a tensor belongs to, whether of the base or of an adapter."""
    part = next((part for part in _LORA_PARTS if name.endswith(f".{part}")), None)
    return name.rpartition(".")[0] if part is None else name.removesuffix(f".{part}")


def block_of(module: str) -> str:
    """The number of the block that a module lies in, or the module's own last name: `0`, `wte`, `lm_head`."""
    names = module.split(".")
    return names[2] if names[1:2] == ["h"] else names[-1]


def suffix_in_block(module: str) -> str:
    """The name of a module within its block, such as `attn.c_attn`; empty outside the blocks."""
    names = module.split(".", 3)
    return names[3] if names[1:2] == ["h"] else ""


def model_order(name: str) -> tuple[int, str]:
    """Sort key of modules and tensors in the order in which the model runs: embeddings, blocks, final norm, head."""
    words = name.split(".")
    if words[1:2] == ["h"]:
        return int(words[2]), name
    return (-1 if words[1:2] in (["wte"], ["wpe"]) else 1 << 30), name


def changes_base(config: dict[str, Any]) -> bool:
    """True where PEFT alters tensors of the base when it loads this adapter, so that no other can share it."""
    return config.get("init_lora_weights", True) not in _PLAIN_INITS or config.get("bias", "none") != "none"


def refuse_biased_head(layout: AdapterLayout, where: str) -> None:
    """UserError for an adapter that adds a bias to the head: no tensor of a GPT-2 can hold it."""
    head = layout.targets.get("lm_head")
    if head is not None and "lora_B.bias" in head.parts:
        raise UserError(f"adapter {where}: lora_bias on lm_head, but the head of a GPT-2 has no bias")


def layout_of(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: GPT2Config, where: str) -> AdapterLayout:
    """Sort an adapter's tensors by what they do to a base of this shape.

    Raises UserError for settings that are not understood, and for tensors that are missing, left over or of another
    shape than PEFT expects on this base. `where` names the adapter in messages.
    """
    _refuse_unknown_settings(config, where)
    stored = _without_copies({plain_name(name): tensor for name, tensor in tensors.items()}, where)
    parts, full = _sort(stored)
    vocabulary = _vocabulary(full, base)
    skeleton = _skeleton_of(config, base, vocabulary, where)
    _compare_shapes(stored, full, skeleton, base, where)
    pissa = config.get("init_lora_weights") == "pissa"
    targets = {
        name: LoraTarget(name, *skeleton.layers[name], parts[name], pissa and f"{name}.weight" not in full)
        for name in sorted(parts)
    }
    _refuse_pissa_outside_blocks(targets, base, where)
    return AdapterLayout(
        targets,
        _replaced(full, config, base, where),
        vocabulary,
        bool(config.get("use_dora")),
        bool(config.get("use_rslora")),
        bool(config.get("lora_bias")),
    )


def _refuse_unknown_settings(config: dict[str, Any], where: str) -> None:
    defaults = vars(LoraConfig())
    for key, value in config.items():
        if key not in _UNDERSTOOD and value and value != defaults.get(key):
            raise UserError(f"adapter {where}: uses {key}, which peftune does not understand; use PEFT itself")
    init = config.get("init_lora_weights", True)
    if init != "pissa" and init not in _PLAIN_INITS:
        raise UserError(
            f"adapter {where}: init_lora_weights {init!r} rewrote the base in a way that cannot be repeated exactly; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )


def plain_name(name: str) -> str:
    """A stored tensor's name without PEFT's prefix; DoRA's magnitude has been written with and without `.weight`."""
    plain = name.removeprefix(_PREFIX)
    return plain.removesuffix(".weight") if "lora_magnitude" in plain else plain


def _without_copies(stored: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """PEFT stores an embedding that was resized and trained in full three times: by its own name, and as two parts."""
    kept = {name: tensor for name, tensor in stored.items() if not _PART_OF_SAVED.search(name)}
    for name, tensor in stored.items():
        own = name.replace(".modules_to_save.", ".")
        if own != name and not (own in kept and torch.equal(kept[own], tensor)):
            raise UserError(f"adapter {where}: {name} is not what {own} holds; save the adapter again with PEFT")
    return kept


def _sort(stored: dict[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    full: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        part = next((part for part in _LORA_PARTS if name.endswith(f".{part}")), None)
        if part is None:
            full[name.replace(".base_layer.", ".")] = tensor
        else:
            parts.setdefault(module_of(name), {})[part] = tensor
    return parts, full


def _vocabulary(full: dict[str, torch.Tensor], base: GPT2Config) -> int:
    rows = {tensor.shape[0] for name, tensor in full.items() if name in (WTE, HEAD)}
    return rows.pop() if len(rows) == 1 else int(base.vocab_size)


@dataclass(frozen=True)
class _Skeleton:
    """What PEFT makes of a configuration: names and shapes that it expects in the file, the model's own, and for each
    adapted module its kind, rank, alpha and scale."""

    expected: dict[str, torch.Size]
    plain: dict[str, torch.Size]
    layers: dict[str, tuple[Kind, int, float, float]]


def _skeleton_of(config: dict[str, Any], base: GPT2Config, vocabulary: int, where: str) -> _Skeleton:
    """The base's architecture with this adapter in it."""
    known = {key: value for key, value in config.items() if key in _UNDERSTOOD and key != "runtime_config"}
    resized = {**base.to_dict(), "vocab_size": vocabulary}
    try:
        return _skeleton(*(json.dumps(values, sort_keys=True, default=str) for values in (known, resized)))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        lines = " ".join(str(error).split())
        raise UserError(
            f"adapter {where}: does not fit this base (GPT-2, {base.n_layer} blocks): {lines[:300]}"
        ) from None


@lru_cache(maxsize=32)  # building it takes fifty times as long as reading the adapter; a server loads many of a kind
def _skeleton(settings: str, architecture: str) -> _Skeleton:
    """Injected on the meta device, without any weights; both arguments are JSON."""
    lora = LoraConfig(**{**json.loads(settings), "init_lora_weights": False, "inference_mode": False})
    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = inject_adapter_in_model(lora, GPT2LMHeadModel(GPT2Config.from_dict(json.loads(architecture))))
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    return _Skeleton(
        {name: tensor.shape for name, tensor in expected.items()},
        {_plain(name): tensor.shape for name, tensor in model.state_dict().items()},
        {name: _facts(module) for name, module in model.named_modules() if isinstance(module, LoraLayer)},
    )


def _facts(layer: LoraLayer) -> tuple[Kind, int, float, float]:
    base = layer.get_base_layer()
    kind: Kind = "conv1d" if isinstance(base, Conv1D) else "embedding" if isinstance(layer, Embedding) else "linear"
    return kind, layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]


def _compare_shapes(
    stored: dict[str, torch.Tensor], full: dict[str, torch.Tensor], skeleton: _Skeleton, base: GPT2Config, where: str
) -> None:
    fits = f"the base has {base.n_layer} blocks of width {base.n_embd}; pass the base that it was trained on"
    for name, shape in skeleton.expected.items():
        if name not in stored:
            raise UserError(f"adapter {where}: {name} is named by its configuration, but is not there; {fits}")
        if stored[name].shape != shape:
            found, wanted = tuple(stored[name].shape), tuple(shape)
            raise UserError(f"adapter {where}: {name} has shape {found}, this base needs {wanted}; {fits}")
    for name in stored:
        if name not in skeleton.expected and name.replace(".base_layer.", ".") not in full:
            raise UserError(f"adapter {where}: {name} belongs to nothing that its configuration adapts; {fits}")
    for name, tensor in full.items():
        if skeleton.plain.get(name) != tensor.shape:
            has = tuple(skeleton.plain[name]) if name in skeleton.plain else "no such tensor"
            raise UserError(
                f"adapter {where}: brings {name} of shape {tuple(tensor.shape)}, this base has {has}; {fits}"
            )


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _refuse_pissa_outside_blocks(targets: dict[str, LoraTarget], base: GPT2Config, where: str) -> None:
    if any(target.pissa and target.kind == "embedding" for target in targets.values()):
        raise UserError(f"adapter {where}: PiSSA on an embedding is nothing that PEFT can load; use linear modules")
    if "lm_head" in targets and targets["lm_head"].pissa and base.tie_word_embeddings:
        raise UserError(
            f"adapter {where}: PiSSA on lm_head of a base with tied embeddings changed the input embedding as well, "
            "which no adapter holds; train it with another variant or without lm_head"
        )


def _replaced(
    full: dict[str, torch.Tensor], config: dict[str, Any], base: GPT2Config, where: str
) -> dict[str, torch.Tensor]:
    """With a tied base, an embedding that PEFT stored beside the adapter (not as a module to save) is wte and head."""
    saved = [str(name) for name in config.get("modules_to_save") or []]
    loose = [n for n in (WTE, HEAD) if n in full and not any(f".{n}".endswith(f".{s}.weight") for s in saved)]
    if not loose or not base.tie_word_embeddings or len(loose) < sum(n in full for n in (WTE, HEAD)):
        return full
    if len(loose) == 2 and not torch.equal(full[WTE], full[HEAD]):
        raise UserError(
            f"adapter {where}: brings two different embeddings, the base has one; name them in modules_to_save"
        )
    return {**full, WTE: full[loose[0]], HEAD: full[loose[0]]}
