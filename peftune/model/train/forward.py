"""GPT-2 with LoRA on the real tokens of a batch, without padding: the fast forward of training, and how it is built.

The tensors are those of the model that Transformers loaded and PEFT adapted; norms alone are copied, to fp32. Frozen
weights and matrix products have the dtype of the run; the stream between blocks, and the adapters, are fp32. Autograd
keeps nothing below the lowest adapter, because nothing there asks for a gradient.

Legend: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftune.model.architecture import activation, attention_scales
from peftune.model.lora import Adapted
from peftune.model.loss import add_neftune_noise, summed_nats
from peftune.model.train.attention import Attend, Kernel, kernel_for, tokens_of
from peftune.model.train.compiled import compiled
from peftune.model.train.layers import Elementwise, LoraFactors, LoraLinear, Norm, frozen_weight, to_device

NAME = "default"  # PEFT's, of a model's only adapter


@dataclass(frozen=True)
class Block:
    """Attention and a perceptron of two layers, each added to the stream."""

    ln_1: Norm
    c_attn: LoraLinear
    attn_c_proj: LoraLinear
    ln_2: Norm
    c_fc: LoraLinear
    mlp_c_proj: LoraLinear
    scale: float
    """Of the products of queries and keys."""
    upcast: bool
    """Attend in fp32 whatever the dtype of the run (`reorder_and_upcast_attn`)."""

    def __call__(self, x: torch.Tensor, attend: Attend, training: bool, elementwise: Elementwise) -> torch.Tensor:
        """The stream (N, D) after this block."""
        qkv = self.c_attn(elementwise.normed(x, self.ln_1), training)
        attended = attend(qkv.float() if self.upcast else qkv, self.scale).to(qkv.dtype)
        x, normed = elementwise.added(x, self.attn_c_proj(attended, training), self.ln_2)
        hidden = elementwise.activated(self.c_fc(normed, training))
        return x + self.mlp_c_proj(hidden, training)


@dataclass(frozen=True)
class TrainGPT2:
    """Computes what `loss.LossModel` computes, to rounding, in the mode of `module` (training or evaluation)."""

    module: nn.Module
    wte: torch.Tensor
    wpe: torch.Tensor
    blocks: tuple[Block, ...]
    ln_f: Norm
    head: nn.Module
    heads: int
    kernel: Kernel
    elementwise: Elementwise
    neftune: float
    smoothing: float
    recompute: bool
    """Keep the stream before each block alone, and run the block again in the backward."""

    @property
    def _adapters(self) -> Iterator[LoraFactors]:
        layers = (layer for b in self.blocks for layer in (b.c_attn, b.attn_c_proj, b.c_fc, b.mlp_c_proj))
        return (layer.adapter for layer in layers if layer.adapter is not None)

    @contextmanager
    def between_updates(self) -> Iterator[None]:
        """Inside, A and B do not change, and are split into terms of the run's dtype once, not in each forward."""
        try:
            with torch.no_grad():
                for adapter in self._adapters:
                    adapter.split(self.ln_f.dtype)
            yield
        finally:
            for adapter in self._adapters:
                adapter.terms.clear()

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss in nats (float64 scalar) over the positions with a target ≥ 0; arguments (B, T) on the CPU."""
        training, device = self.module.training, self.wte.device
        tokens = tokens_of(ids.shape, segments)
        kept = torch.from_numpy(tokens.indices)
        ids, positions, targets = (tensor.flatten()[kept] for tensor in (ids, positions, targets))
        (scored,) = torch.nonzero(targets >= 0, as_tuple=True)  # here, where it stops no GPU
        ids, positions, scored, targets = (to_device(t, device) for t in (ids, positions, scored, targets[scored]))
        attend = self.kernel.plan(tokens.lengths, self.heads, device)
        x = self.wte[ids].float()
        if training and self.neftune:
            x = add_neftune_noise(
                x, to_device(torch.from_numpy(tokens.lengths.repeat(tokens.lengths)), device), self.neftune
            )
        x = x + self.wpe[positions].float()
        draws = any(adapter.dropout for adapter in self._adapters)
        for block in self.blocks:
            if self.recompute and training:
                x = checkpoint(
                    block, x, attend, training, self.elementwise, use_reentrant=False, preserve_rng_state=draws
                )
            else:
                x = block(x, attend, training, self.elementwise)
        return summed_nats(
            self.elementwise.normed(x[scored], self.ln_f), self.head, targets, self.smoothing if training else 0.0
        )


def reason_against(adapted: Adapted) -> str | None:
    """Why a model cannot be trained by `TrainGPT2`, or None."""
    core: Any = adapted.model.get_base_model()
    dropouts = {key: getattr(core.config, key) for key in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if any(dropouts.values()):
        return f"the base has {', '.join(f'{key} {value}' for key, value in dropouts.items() if value)}"
    layers = {name: module for name, module in core.named_modules() if isinstance(module, LoraLayer)}
    if any(".h." not in name for name in layers):
        return "the adapter reaches outside of the blocks"
    if any(layer.use_dora.get(NAME) for layer in layers.values()):
        return "DoRA normalises full weights"
    factors = (".lora_A.default.weight", ".lora_B.default.weight")
    if not all(name.endswith(factors) for name in adapted.trainable()):
        return "more is trained than A and B"
    return None


def train_forward(
    adapted: Adapted, dtype: torch.dtype, neftune: float, smoothing: float, recompute: bool, compiles: bool = False
) -> TrainGPT2:
    """The training forward over the tensors of an adapted model, in `dtype`; `reason_against` must be None for it.

    `compiles` compiles the operations between matrix products, where a compiler is there.
    """
    core: Any = adapted.model.get_base_model()
    body, config = core.transformer, core.config
    ln_f, packed = _norm(body.ln_f, dtype), bool(getattr(core, "is_quantized", False))
    elementwise, upcast = Elementwise(activation(config.activation_function)), config.reorder_and_upcast_attn
    attention_dtype = torch.float32 if upcast else dtype
    return TrainGPT2(
        module=adapted.model,
        wte=body.wte.weight,
        wpe=body.wpe.weight,
        blocks=tuple(
            _block(layer, dtype, packed, scale, upcast)
            for layer, scale in zip(body.h, attention_scales(config), strict=True)
        ),
        ln_f=ln_f,
        head=core.lm_head,
        heads=config.n_head,
        kernel=kernel_for(body.wte.weight.device, attention_dtype, config.n_embd // config.n_head),
        elementwise=compiled(elementwise, ln_f, config.n_inner or 4 * config.n_embd) if compiles else elementwise,
        neftune=neftune,
        smoothing=smoothing,
        recompute=recompute,
    )


def _block(layer: Any, dtype: torch.dtype, packed: bool, scale: float, upcast: bool) -> Block:
    return Block(
        ln_1=_norm(layer.ln_1, dtype),
        c_attn=_linear(layer.attn.c_attn, dtype, packed),
        attn_c_proj=_linear(layer.attn.c_proj, dtype, packed),
        ln_2=_norm(layer.ln_2, dtype),
        c_fc=_linear(layer.mlp.c_fc, dtype, packed),
        mlp_c_proj=_linear(layer.mlp.c_proj, dtype, packed),
        scale=scale,
        upcast=upcast,
    )


def _norm(layer: Any, dtype: torch.dtype) -> Norm:
    return Norm(layer.weight.float(), layer.bias.float(), layer.eps, dtype)


def _linear(layer: Any, dtype: torch.dtype, packed: bool) -> LoraLinear:
    factors, adapted = None, isinstance(layer, LoraLayer)
    if adapted:
        dropout = getattr(layer.lora_dropout[NAME], "p", 0.0)  # PEFT puts an Identity where there is none
        factors = LoraFactors(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME], dropout)
        layer = layer.base_layer
    return LoraLinear(partial(frozen_weight, layer, packed, dtype), layer.bias.to(dtype), factors)
