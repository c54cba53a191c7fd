"""Adapters on a GPT-2 through PEFT: targets, initial values, and the tensors that a plain PEFT adapter stores.

PEFT owns the variants and the format. Two things are decided here: `fan_in_fan_out` follows the architecture
(blocks are `Conv1D`, stored in x out, quantised or not), and PiSSA and LoftQ are delivered as a plain LoRA of twice the
rank on the untouched base.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peftune.config.recipe import LoraSection
from peftune.errors import UserError
from peftune.model.quantized import is_quantized, unpacked
from peftune.model.train.attention_parts import QUERY_VALUE, stacked_alpha, untrained_mask

ATTENTION = ("attn.c_attn", "attn.c_proj")
ALL = (*ATTENTION, "mlp.c_fc", "mlp.c_proj")
STARTS = ("pissa", "loftq")
"""Variants whose first values are computed from the base, and kept to the end."""
_ADAPTABLE = (Conv1D, nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class Adapted:
    """A base with a trainable adapter; `initial` holds the first A and B of PiSSA and LoftQ by name, else nothing."""

    model: PeftModel
    initial: dict[str, torch.Tensor]
    untrained: torch.Tensor | None = None
    """True where every B of c_attn is zero and stays so: its queries and values alone are adapted."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def masks(self) -> list[torch.Tensor | None]:
        """For each trainable parameter where its gradient is none, on the CPU, or None."""
        return [self.untrained if ".lora_B." in name else None for name in self.trainable()]


def inject(
    model: GPT2LMHeadModel,
    lora: LoraSection,
    seed: int,
    original: Callable[[str], torch.Tensor] | None = None,
    rows: Sequence[int] = (),
    settings: LoraConfig | None = None,
) -> Adapted:
    """Put a fresh adapter on the base; initial values follow from `seed` alone, LoftQ's from the base alone.

    `original` reads a tensor of the base as it was before it was quantised; LoftQ needs it. Of the
    embedding (and the head) `rows` are trained. `settings` are PEFT's, where `lora` cannot say them. Raises UserError
    for targets, layers or extra modules that the base does not have.
    """
    config = settings or peft_config(model, lora)
    if rows:
        embeddings = ("wte",) if model.config.tie_word_embeddings else ("wte", "lm_head")
        config.trainable_token_indices = {name: list(rows) for name in embeddings}
    torch.manual_seed(seed)
    with quiet_peft():
        adapted = get_peft_model(model, config)
    initial = {}
    if lora.variant == "loftq":
        assert original is not None, "LoftQ compares with the base before it was quantised"
        correct_quantisation(adapted.get_base_model(), original)
    if lora.variant in STARTS:
        initial = {n: p.detach().clone() for n, p in adapted.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    parts, width = QUERY_VALUE, model.config.n_embd
    return Adapted(adapted, initial, untrained_mask(parts, lora.rank, width) if lora.targets == "query-value" else None)


def skeleton(
    config: GPT2Config, lora: LoraSection, rows: Sequence[int] = (), settings: LoraConfig | None = None
) -> Adapted:
    """A base with its adapter, without weights; arguments and UserError as of `inject`.

    PiSSA and LoftQ have the shapes of a plain LoRA; what they compute from weights is left out.
    """
    if lora.variant in STARTS:
        lora = lora.model_copy(update={"variant": "lora"})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = GPT2LMHeadModel(copy.deepcopy(config))  # new rows change it
        if rows and rows[-1] >= config.vocab_size:
            model.resize_token_embeddings(rows[-1] + 1, mean_resizing=False)
        return inject(model, lora, 0, rows=rows, settings=settings)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without PEFT's warnings about what peftune decides itself, and those about its own use of Transformers."""
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


_EXPECTED_WARNINGS = (
    "fan_in_fan_out is set to",  # Conv1D and Linear targets side by side: PEFT itself takes the right one for each
    ".*tie_word_embeddings",
    ".*`?ensure_weight_tying",
    "Adapter '.*': .* have invalid shape: .*lora_B.bias",  # a bias has one dimension; shapes are compared by peftune
    "The configuration file contains a `runtime_config`",
    "Found missing adapter keys",  # checked afterwards, as an error
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 asks Transformers 5.23 by the old name
)


def peft_config(model: GPT2LMHeadModel, lora: LoraSection) -> LoraConfig:
    """The PEFT configuration of a recipe's adapter, checked against the modules of this base."""
    targets = _targets(lora)
    problems = _problems(model, lora, targets)
    if problems:
        raise UserError("; ".join(problems))
    rank, alpha, rslora = lora.rank, lora.alpha, lora.variant == "rslora"
    if lora.targets == "query-value":
        rank, alpha = len(QUERY_VALUE) * rank, stacked_alpha(alpha, QUERY_VALUE, rslora)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=True,
        use_rslora=rslora,
        use_dora=lora.variant == "dora",
        init_lora_weights="pissa" if lora.variant == "pissa" else True,
        modules_to_save=lora.modules_to_save or None,
        layers_to_transform=sorted(set(lora.layers)) if lora.layers else None,
        layers_pattern="h" if lora.layers else None,
    )


def _targets(lora: LoraSection) -> list[str]:
    sets = {"all": ALL, "attention": ATTENTION, "query-value": ATTENTION[:1]}
    return list(sets[lora.targets] if isinstance(lora.targets, str) else lora.targets)


def adapted_modules(model: GPT2LMHeadModel, lora: LoraSection) -> set[str]:
    """Full names of the modules that a recipe's adapter adapts."""
    inside = tuple(f"transformer.h.{layer}." for layer in lora.layers or ())
    named = (path for target in _targets(lora) for path, _ in model.named_modules() if _named(path, target))
    return {path for path in named if not inside or path.startswith(inside)}


def _problems(model: GPT2LMHeadModel, lora: LoraSection, targets: list[str]) -> list[str]:
    modules = dict(model.named_modules())
    if parts := [name for name in targets if name.lower() in _PARTS]:
        part = f"the base has no linear or embedding module {parts[0]!r}, which is a part of c_attn"
        return [f"lora.targets: {part}; query-value adapts queries and values"]
    problems = [
        f"lora.targets: the base has no linear or embedding module {name!r}; known: {', '.join(ALL)}, lm_head, wte, wpe"
        for name in targets
        if not any(_named(path, name) and isinstance(module, _ADAPTABLE) for path, module in modules.items())
    ]
    problems += [
        f"lora.modules_to_save: the base has no module {name!r} to train whole; such as wte, wpe, ln_f, lm_head"
        for name in lora.modules_to_save
        if not any(_named(path, name) and _can_be_saved(module) for path, module in modules.items())
    ]
    beyond = [layer for layer in lora.layers or [] if layer >= model.config.n_layer]
    if beyond:
        problems.append(f"lora.layers: the base has blocks 0 to {model.config.n_layer - 1}, found {beyond[0]}")
    outside = [t for t in targets if lora.layers and not any(_named(p, t) and ".h." in p for p in modules)]
    problems += [f"lora.layers: {name} lies outside the blocks, leave it out or drop lora.layers" for name in outside]
    both = [t for t in targets for m in lora.modules_to_save if any(_named(p, t) and _named(p, m) for p in modules)]
    problems += [f"lora: {name} is both in targets and in modules_to_save" for name in both]
    return problems or _rank_problems(modules, lora, targets)


def _rank_problems(modules: dict[str, nn.Module], lora: LoraSection, targets: list[str]) -> list[str]:
    """A rank that no matrix of the targets has; and what PiSSA and LoftQ cannot decompose."""
    adaptable = {path: module for path, module in modules.items() if isinstance(module, _ADAPTABLE)}
    adapted = {path: m for path, m in adaptable.items() if any(_named(path, target) for target in targets)}
    shapes = {path: _shape(module) for path, module in adapted.items()}
    if lora.variant in STARTS:
        if any(path == "lm_head" or isinstance(module, nn.Embedding) for path, module in adapted.items()):
            return [f"lora: {_INSIDE_BLOCKS[lora.variant]}"]
        small = [(path, min(shape)) for path, shape in shapes.items() if lora.rank > min(shape)][:1]
        return [f"lora.rank: {lora.variant} takes {lora.rank} directions, {path} has {size}" for path, size in small]
    limit = min if lora.targets == "query-value" else max  # each part is as wide as the model
    largest = limit((size for shape in shapes.values() for size in shape), default=lora.rank)
    if lora.rank > largest:
        return [f"lora.rank: {lora.rank} is more than any adapted matrix has rows or columns, at most {largest}"]
    return []


_PARTS = {"q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "qv", "q,v"}  # elsewhere their names
_INSIDE_BLOCKS = {
    "pissa": "pissa moves a part of the base into the adapter, which lm_head, wte and wpe cannot bear",
    "loftq": "loftq corrects quantised weights, and lm_head, wte and wpe are not quantised; leave them out",
}


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight, also where that is packed (quantised) or sharded (ZeRO-3, which notes its `ds_shape`)."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(getattr(module.weight, "ds_shape", module.weight.shape))  # type: ignore[arg-type]


def _can_be_saved(module: nn.Module) -> bool:
    """A layer with weights of its own; PEFT does not find its way back into a saved block or attention module."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _named(path: str, name: str) -> bool:
    return bool(name) and (path == name or path.endswith("." + name))


def stored_adapter(
    adapted: Adapted, values: dict[str, torch.Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `adapter_config.json` and `adapter_model.safetensors` hold: plain PEFT, for the untouched base.

    `values` are the trained parameters by name, where the model has only a shard of them or others. PiSSA moved a part
    of the base into its first A0, B0, so its update is B·A - B0·A0 = [B, -B0]·[A; A0]: rank and alpha double. So does
    LoftQ, whose A0, B0 stand for what quantising took from the base.
    """
    named = {n: p.detach() for n, p in adapted.model.named_parameters()} if values is None else values
    with quiet_peft():
        tensors = get_peft_model_state_dict(adapted.model, state_dict=dict(named), save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    config = config_to_json(adapted.model.peft_config["default"])
    # Every linear layer of a block is a `Conv1D` in the full-precision base, whatever a quantised one is made of.
    blocks = any(".h." in name and isinstance(module, LoraLayer) for name, module in adapted.model.named_modules())
    config |= {"inference_mode": True, "fan_in_fan_out": blocks}
    for name, value in adapted.initial.items():
        stored, first, is_a = name.replace(".default.", "."), value.cpu(), ".lora_A." in name
        tensors[stored] = torch.cat([tensors[stored], first if is_a else -first], dim=0 if is_a else 1)
    if adapted.initial:
        config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    return config, tensors


def config_to_json(config: PeftConfig) -> dict[str, Any]:
    """PEFT's settings as `adapter_config.json` holds them: sets as sorted lists, enums by their value."""
    settings = config.to_dict().items()
    return {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in settings}


def is_dead(adapted: Adapted, values: dict[str, torch.Tensor]) -> bool:
    """True where every B (of an embedding every A) is what a fresh adapter has: zero, or its initial value.

    `values` are the trained parameters by name, on the CPU.
    """
    b = {name: value for name, value in values.items() if ".lora_B." in name or ".lora_embedding_A" in name}
    fresh = {name: torch.zeros_like(value) for name, value in b.items()} | adapted.initial
    return bool(b) and all(torch.equal(value, fresh[name].cpu()) for name, value in b.items())


@torch.no_grad()
def correct_quantisation(model: nn.Module, original: Callable[[str], torch.Tensor]) -> None:
    """LoftQ (Li et al., 2310.08659): A and B of every adapted layer become the best correction of quantisation.

    `original(name)` is W (in, out) before quantising. With the quantised weight Ŵ given, the product s·B·A of rank r
    that is nearest to W - Ŵ in the Frobenius norm is its truncated singular value decomposition (Eckart-Young). The
    paper alternates that step with quantising W - s·B·A anew; here Ŵ stays the same for every adapter (one
    alternation), so that bases can be shared and only the base and the rank decide the correction.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base: Any = layer.get_base_layer()
        assert is_quantized(base), f"{name} is not quantised; the recipe should have been refused"
        quantised = unpacked(base)
        error = original(f"{name}.weight").T.to(quantised.device, torch.float64) - quantised.double()
        a, b = best_product(error, layer.r["default"], layer.scaling["default"])
        for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
            factors.get_submodule("default").get_parameter("weight").copy_(value)


def best_product(error: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank), float64, such that scale·B·A is the nearest matrix of that rank to `error`.

    From the eigenvectors of the smaller Gram matrix in float64, in two fifths of the time that all singular vectors
    take; the squaring costs nothing that float32 factors could hold. Both factors get the square root of each value.
    """
    if error.shape[0] > error.shape[1]:
        b, a = best_product(error.T, rank, scale)
        return a.T, b.T
    _, vectors = torch.linalg.eigh(error @ error.T)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ error
    values = torch.linalg.vector_norm(right, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    share = (values / scale).sqrt()
    return right * (share / values)[:, None], left * share
