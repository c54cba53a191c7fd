"""The fast function of a model that PEFT adapted: for which models it exists, and how it is put together."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import GPT2Config

from peftune.model import quantized
from peftune.model.lora import Adapted
from peftune.model.train.attention import kernel_for
from peftune.model.train.elementwise import PLAIN, Norm, compiled
from peftune.model.train.forward import Block, TrainGPT2
from peftune.model.train.lora_linear import Adapter, Projection

NAME = "default"  # PEFT's, of a model's only adapter


def reason_against(adapted: Adapted) -> str | None:
    """Why a model has no fast function, or None."""
    core: Any = adapted.model.get_base_model()
    return _unlike_gpt2(core.config) or _unlike_lora(core, adapted)


def _unlike_gpt2(config: GPT2Config) -> str | None:
    usual: dict[str, Any] = {
        "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    found = {key: getattr(config, key) for key, value in usual.items() if getattr(config, key) != value}
    return f"the base has {', '.join(f'{key} {value}' for key, value in found.items())}" if found else None


def _unlike_lora(core: nn.Module, adapted: Adapted) -> str | None:
    layers = {name: module for name, module in core.named_modules() if isinstance(module, LoraLayer)}
    if any(".h." not in name for name in layers):
        return "the adapter reaches outside of the blocks"
    if any(layer.use_dora.get(NAME) for layer in layers.values()):
        return "DoRA normalises whole weights"
    own = {id(p) for layer in layers.values() for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    if any(id(parameter) not in own for parameter in adapted.trainable().values()):
        return "more is trained than A and B"
    return None


def fast(
    adapted: Adapted,
    dtype: torch.dtype,
    neftune: float,
    smoothing: float,
    recompute: bool,
    compile_pieces: bool = False,
) -> TrainGPT2:
    """The fast function over the tensors of a model, in `dtype`; `reason_against` is None for it.

    `compile_pieces`: compile what stands between products, where that can be had.
    """
    core: Any = adapted.model.get_base_model()
    body, config = core.transformer, core.config
    width = config.n_embd // config.n_head
    ln_f = _norm(body.ln_f, dtype)
    return TrainGPT2(
        module=adapted.model,
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        blocks=tuple(_block(layer, dtype) for layer in body.h),
        ln_f=ln_f,
        head=core.lm_head,
        heads=config.n_head,
        kernel=kernel_for(body.wte.weight.device, dtype, width),
        pieces=compiled(ln_f, config.n_inner or 4 * config.n_embd) if compile_pieces else PLAIN,
        neftune=neftune,
        smoothing=smoothing,
        recompute=recompute,
    )


def _block(layer: Any, dtype: torch.dtype) -> Block:
    return Block(
        ln_1=_norm(layer.ln_1, dtype),
        c_attn=_projection(layer.attn.c_attn, dtype),
        attn_c_proj=_projection(layer.attn.c_proj, dtype),
        ln_2=_norm(layer.ln_2, dtype),
        c_fc=_projection(layer.mlp.c_fc, dtype),
        mlp_c_proj=_projection(layer.mlp.c_proj, dtype),
    )


def _norm(layer: Any, dtype: torch.dtype) -> Norm:
    return Norm(layer.weight, layer.bias, layer.eps, dtype)


def _projection(layer: Any, dtype: torch.dtype) -> Projection:
    adapter = None
    if isinstance(layer, LoraLayer):
        adapter = _adapter(layer)
        layer = layer.base_layer
    weight = partial(_unpacked, layer, dtype) if quantized.is_quantized(layer) else partial(_plain, layer, dtype)
    return Projection(weight, layer.bias.to(dtype), adapter)


def _adapter(layer: Any) -> Adapter:
    dropout = getattr(layer.lora_dropout[NAME], "p", 0.0)  # PEFT puts an Identity where there is none
    return Adapter(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME], dropout)


def _plain(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The base's own tensor, which has the dtype of the run already."""
    return layer.weight.to(dtype)  # type: ignore[no-any-return]


def _unpacked(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Made anew for each product, so that one layer at a time is unpacked."""
    return quantized.unpacked(layer).to(dtype).T
