"""What an adapter changes in a base: which modules, with which rank and scale, which tensors it replaces.

PEFT itself says so: the adapter's configuration is injected into the base's architecture on the meta device, without
any weights, and what PEFT expects is compared with what the file holds.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import Embedding, LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from peftune.adapters.module_names import with_full_names
from peftune.adapters.peft_config import UNDERSTOOD
from peftune.adapters.token_rows import ROWS_PART, Places, TokenRows, places_in, token_rows, vocabulary_with
from peftune.errors import UserError
from peftune.model.weights import HEAD, WTE

Kind = Literal["conv1d", "linear", "embedding"]

PREFIX = "base_model.model."
_LORA_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
)
_PART_OF_SAVED = re.compile(r"\.(modules_to_save|original_module)\.")
_WRAPPER = re.compile(r"\b(token_adapter\.base_layer|base_layer|original_module|modules_to_save)\.")
_NOT_PASSED = ("runtime_config", "eva_config", "auto_mapping", "peft_version")
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
    """An adapter, sorted: adapted modules by name, tensors that replace those of the base, and settings for all.

    `rows` are single rows that replace those of a tensor, by its name.
    """

    targets: dict[str, LoraTarget]
    replaced: dict[str, torch.Tensor]
    vocabulary: int
    dora: bool = False
    rslora: bool = False
    lora_bias: bool = False
    rows: dict[str, TokenRows] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """PEFT's settings, with full names in place of patterns."""

    def tensors(self) -> set[str]:
        """Names of all tensors that the adapter brings, as `module.part`."""
        parts = {f"{t.name}.{part}" for t in self.targets.values() for part in t.parts}
        return parts | set(self.replaced) | {rows.tensor for rows in self.rows.values()}

    def modules(self) -> set[str]:
        """Names of all modules that the adapter changes."""
        return {module_of(name) for name in self.tensors()}


def module_of(name: str) -> str:
    """The module that a tensor belongs to, whether of the base or of an adapter."""
    match = _LORA_PART.fullmatch(name)
    return match["module"] if match else name.rpartition(".")[0]


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
    try:
        return _layout(config, {plain_name(name): tensor for name, tensor in tensors.items()}, base)
    except UserError as error:
        raise UserError(f"adapter {where}: {error}") from None


def _layout(config: dict[str, Any], stored: dict[str, torch.Tensor], base: GPT2Config) -> AdapterLayout:
    _refuse_unknown_settings(config)
    stored = _without_copies(stored)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    full: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        match = _LORA_PART.fullmatch(name)
        if match and match["part"] != ROWS_PART:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif not match:
            full[base_name(name)] = tensor
    heights = {tensor.shape[0] for name, tensor in full.items() if name in (WTE, HEAD)}
    vocabulary = heights.pop() if len(heights) == 1 else int(base.vocab_size)
    skeleton = _skeleton_of(config, base, vocabulary)
    _compare_shapes(stored, skeleton, base)
    pissa = config.get("init_lora_weights") == "pissa"
    targets = {
        name: LoraTarget(name, *skeleton.layers[name], parts[name], pissa and f"{name}.weight" not in full)
        for name in sorted(parts)
    }
    _refuse_pissa_outside_blocks(targets, base)
    rows = token_rows(skeleton.places, stored)
    vocabulary = vocabulary_with(rows, vocabulary, base.n_positions)
    dora, rslora, bias = (bool(config.get(flag)) for flag in ("use_dora", "use_rslora", "lora_bias"))
    replaced = _replaced(full, config, base)
    return AdapterLayout(targets, replaced, vocabulary, dora, rslora, bias, rows, skeleton.settings)


def _refuse_unknown_settings(config: dict[str, Any]) -> None:
    defaults = vars(LoraConfig())
    for key, value in config.items():
        if key not in UNDERSTOOD and value and value != defaults.get(key):
            raise UserError(f"uses {key}, which peftune does not understand; use PEFT itself")
    init = config.get("init_lora_weights", True)
    if init != "pissa" and init not in _PLAIN_INITS:
        raise UserError(
            f"init_lora_weights {init!r} rewrote the base in a way that cannot be repeated exactly; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )


def plain_name(name: str) -> str:
    """A stored tensor's name without PEFT's prefix; DoRA's magnitude has been written with and without `.weight`."""
    plain = name.removeprefix(PREFIX)
    return plain.removesuffix(".weight") if "lora_magnitude" in plain else plain


def base_name(name: str) -> str:
    """The name that a stored tensor of a module of the base has there: without what PEFT wraps the module in."""
    return _WRAPPER.sub("", plain_name(name))


def _without_copies(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT stores an embedding that was resized and trained in full three times: by its own name, and as two parts."""
    kept = {name: tensor for name, tensor in stored.items() if not _PART_OF_SAVED.search(name)}
    for name, tensor in stored.items():
        own = name.replace(".modules_to_save.", ".")
        if own != name and not (own in kept and torch.equal(kept[own], tensor)):
            raise UserError(f"{name} is not what {own} holds; save the adapter again with PEFT")
    return kept


@dataclass(frozen=True)
class _Skeleton:
    """What PEFT makes of a configuration: names and shapes that it expects in the file, the model's own, and for each
    adapted module its kind, rank, alpha and scale; the settings with full names in place of patterns; single rows."""

    expected: dict[str, torch.Size]
    plain: dict[str, torch.Size]
    layers: dict[str, tuple[Kind, int, float, float]]
    settings: dict[str, Any]
    places: Places


def _skeleton_of(config: dict[str, Any], base: GPT2Config, vocabulary: int) -> _Skeleton:
    """The base's architecture with this adapter in it."""
    known = {key: value for key, value in config.items() if key in UNDERSTOOD and key not in _NOT_PASSED}
    resized = {**base.to_dict(), "vocab_size": vocabulary}
    try:
        return _skeleton(*(json.dumps(values, sort_keys=True, default=str) for values in (known, resized)))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise UserError(f"does not fit this base (GPT-2, {base.n_layer} blocks): {cause}") from None


@lru_cache(maxsize=32)  # building it takes fifty times as long as reading the adapter; a server loads many of a kind
def _skeleton(settings: str, architecture: str) -> _Skeleton:
    """Injected on the meta device, without any weights; both arguments are JSON."""
    with torch.device("meta"), no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = GPT2LMHeadModel(GPT2Config.from_dict(json.loads(architecture)))
        resolved = with_full_names(json.loads(settings), [name for name, _ in base.named_modules() if name])
        lora = LoraConfig(**{**resolved, "init_lora_weights": False, "inference_mode": False})
        model = inject_adapter_in_model(lora, base)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    places = places_in(model)
    plain = {base_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    copies = {f"{name}.{ROWS_PART}": expected[f"{source}.{ROWS_PART}"].shape for name, (source, _) in places.items()}
    return _Skeleton(
        {name: tensor.shape for name, tensor in expected.items()},
        plain | copies,
        {name: _facts(module) for name, module in model.named_modules() if isinstance(module, LoraLayer)},
        resolved,
        places,
    )


def _facts(layer: LoraLayer) -> tuple[Kind, int, float, float]:
    base = layer.get_base_layer()
    kind: Kind = "conv1d" if isinstance(base, Conv1D) else "embedding" if isinstance(layer, Embedding) else "linear"
    return kind, layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]


def _compare_shapes(stored: dict[str, torch.Tensor], skeleton: _Skeleton, base: GPT2Config) -> None:
    """UserError unless the file holds what PEFT expects, and beside it nothing but tensors of the model."""
    for name in [*skeleton.expected, *stored]:
        found = stored.get(name)
        wanted = skeleton.expected.get(name, skeleton.plain.get(base_name(name)))
        if found is None:
            problem = "is named by its configuration, but is not there"
        elif wanted is None:
            problem = "belongs to nothing that its configuration adapts"
        elif found.shape != wanted:
            problem = f"has shape {tuple(found.shape)}, this base needs {tuple(wanted)}"
        else:
            continue
        fits = f"the base has {base.n_layer} blocks of width {base.n_embd}; pass the base that it was trained on"
        raise UserError(f"{name} {problem}; {fits}")


def _refuse_pissa_outside_blocks(targets: dict[str, LoraTarget], base: GPT2Config) -> None:
    pissa = {name: target.kind for name, target in targets.items() if target.pissa}
    if "embedding" in pissa.values():
        raise UserError("PiSSA on an embedding is nothing that PEFT can load; use linear modules")
    if "lm_head" in pissa and base.tie_word_embeddings:
        raise UserError(
            "PiSSA on lm_head of a base with tied embeddings changed the input embedding as well, which no adapter "
            "holds; train it with another variant or without lm_head"
        )


def _replaced(full: dict[str, torch.Tensor], config: dict[str, Any], base: GPT2Config) -> dict[str, torch.Tensor]:
    """With a tied base, an embedding that PEFT stored beside the adapter (not as a module to save) is wte and head."""
    saved = [f".{name}.weight" for name in config.get("modules_to_save") or []]
    embeddings = [name for name in (WTE, HEAD) if name in full]
    if not base.tie_word_embeddings or any(f".{name}".endswith(suffix) for name in embeddings for suffix in saved):
        return full
    if len(embeddings) == 2 and not torch.equal(full[WTE], full[HEAD]):
        raise UserError("brings two different embeddings, the base has one; name them in modules_to_save")
    return full | dict.fromkeys((WTE, HEAD), full[embeddings[0]]) if embeddings else full
