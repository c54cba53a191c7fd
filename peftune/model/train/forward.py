"""GPT-2 with LoRA on the real tokens of a batch, without padding: the fast forward of training, and how it is built.

Several adapters on one base can share a forward: their tokens lie one adapter after the other, frozen products are made
once for all, and of each adapter with its own rows. So no gradient of one depends on another.

The tensors are those of the model that Transformers loaded and PEFT adapted; norms alone are copied, to fp32. Frozen
weights and matrix products have the dtype of the run; the stream between blocks, and the adapters, are fp32. Autograd
keeps nothing below the lowest adapter, because nothing there asks for a gradient.

Legend: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftune.model.architecture import activation, attention_scales
from peftune.model.lora import Adapted
from peftune.model.loss import add_neftune_noise, nats_of_parts
from peftune.model.train.attention import Attend, Kernel, Rows, Tokens, attend_in_parts, kernel_for
from peftune.model.train.compiled import compiled
from peftune.model.train.grouped_lora import ManyAdapters, products_for
from peftune.model.train.layers import (
    AdapterRows,
    Elementwise,
    LoraFactors,
    LoraLinear,
    Norm,
    frozen_weight,
    same_draws,
    to_device,
)

NAME = "default"  # PEFT's, of a model's only adapter
LAYERS = ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")  # the linear layers of a block, from the lowest up


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

    def __call__(
        self, x: torch.Tensor, attend: Attend, parts: Sequence[AdapterRows], training: bool, elementwise: Elementwise
    ) -> torch.Tensor:
        """The stream (N, D) after this block; of each part of the rows there is an adapter in each layer."""
        qkv = self.c_attn(elementwise.normed(x, self.ln_1), parts, training)
        attended = attend(qkv.float() if self.upcast else qkv, self.scale).to(qkv.dtype)
        x, normed = elementwise.added(x, self.attn_c_proj(attended, parts, training), self.ln_2)
        hidden = elementwise.activated(self.c_fc(normed, parts, training))
        return x + self.mlp_c_proj(hidden, parts, training)

    def layers(self) -> tuple[LoraLinear, ...]:
        """Those of `LAYERS`."""
        return tuple(getattr(self, name) for name in LAYERS)

    def is_frozen(self) -> bool:
        """Whether no layer has an adapter."""
        return not any(any(layer.adapters) for layer in self.layers())

    @staticmethod
    def joined(blocks: Sequence[Block], at_once: ManyAdapters | None) -> Block:
        """One of several blocks over the same frozen weights, with the adapters of each."""
        if len(blocks) == 1:
            return blocks[0]
        layers = [
            replace(same[0], adapters=tuple(own for layer in same for own in layer.adapters), at_once=at_once)
            for same in zip(*(block.layers() for block in blocks), strict=True)
        ]
        named: dict[str, Any] = dict(zip(LAYERS, layers, strict=True))
        return replace(blocks[0], **named)


@dataclass(frozen=True)
class Piece:
    """What one adapter learns in a joint forward: a micro-batch, and what draws its dropout and noise (None: torch)."""

    forward: TrainGPT2
    batch: Rows
    generator: torch.Generator | None = None


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

    def adapters(self) -> Iterator[LoraFactors]:
        """A and B of each adapted layer, from the lowest up."""
        layers = (layer for block in self.blocks for layer in block.layers())
        return (adapter for layer in layers for adapter in layer.adapters if adapter is not None)

    def draws(self) -> bool:
        """Whether training draws random numbers."""
        return bool(self.neftune) or any(adapter.dropout for adapter in self.adapters())

    @contextmanager
    def between_updates(self) -> Iterator[None]:
        """Inside, A and B do not change, and are split into terms of the run's dtype once, not in each forward."""
        try:
            with torch.no_grad():
                for adapter in self.adapters():
                    adapter.split(self.ln_f.dtype)
            yield
        finally:
            for adapter in self.adapters():
                adapter.terms.clear()

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss in nats (float64 scalar) over the positions with a target ≥ 0; arguments (B, T) on the CPU."""
        return nats_of_pieces([Piece(self, (ids, positions, targets, segments))]).squeeze(0)

    def embedded(self, tokens: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the embedding and of the positions, (N, D) each, float32."""
        ids, positions = (
            to_device(torch.cat([getattr(t, name) for t in tokens]), self.wte.device) for name in ("ids", "positions")
        )
        return self.wte[ids].float(), self.wpe[positions].float()

    def attending(self, tokens: Sequence[Tokens]) -> Attend:
        """Attention within the documents of each adapter's tokens."""
        return attend_in_parts(self.kernel, [t.lengths for t in tokens], self.heads, self.wte.device)

    def below(self, tokens: Sequence[Tokens], depth: int) -> list[torch.Tensor]:
        """The stream after the first `depth` blocks, none of which has an adapter: (N, D) of each."""
        x, more = self.embedded(tokens)
        x, attend, all_rows = x + more, self.attending(tokens), [AdapterRows(slice(0, len(x)))]
        for block in self.blocks[:depth]:
            x = block(x, attend, all_rows, False, self.elementwise)
        return list(torch.split(x, [len(t.ids) for t in tokens]))


def nats_of_pieces(pieces: Sequence[Piece]) -> torch.Tensor:
    """Summed loss of each piece in nats, (pieces,) float64, differentiable in their adapters.

    The forwards are over one base and in one mode. To rounding each loss is what that forward computes alone. Where no
    adapter is in the lowest blocks, these are computed once of equal tokens.
    """
    first, tokens = pieces[0].forward, [Tokens.of(piece.batch) for piece in pieces]
    sizes, training, elementwise = [len(t.ids) for t in tokens], first.module.training, first.elementwise
    strengths = [piece.forward.neftune if training else 0.0 for piece in pieces]
    products = products_for(sizes, first.ln_f.dtype, first.wte.device) if len(pieces) > 1 else None
    at_once = None if products is None else ManyAdapters(products)
    blocks = [Block.joined(of_all, at_once) for of_all in zip(*(piece.forward.blocks for piece in pieces), strict=True)]
    depth = sum(1 for _ in takewhile(Block.is_frozen, blocks))
    kinds = [next(i for i, other in enumerate(tokens) if other.equal(mine)) for mine in tokens] if depth else []
    different = sorted({*kinds})
    if depth and not any(strengths) and len(different) < len(pieces):
        found = first.below([tokens[i] for i in different], depth)
        x = torch.cat([found[different.index(i)] for i in kinds])
    else:
        depth = 0
        x, more = first.embedded(tokens)
        x = _with_noise(x, pieces, tokens, strengths) + more if any(strengths) else x + more
    attend, ends = first.attending(tokens), np.cumsum(sizes).tolist()
    parts = [AdapterRows(slice(end - n, end), p.generator) for p, n, end in zip(pieces, sizes, ends, strict=True)]
    for block in blocks[depth:]:
        if first.recompute and training:
            x = checkpoint(
                block, x, attend, parts, training, elementwise, use_reentrant=False,
                preserve_rng_state=any(p.forward.draws() and p.generator is None for p in pieces),
                context_fn=partial(same_draws, [p.generator for p in pieces if p.generator is not None]),
            )  # fmt: skip
        else:
            x = block(x, attend, parts, training, elementwise)
    targets = torch.cat([t.targets for t in tokens])
    (scored,) = torch.nonzero(targets >= 0, as_tuple=True)  # here, where it stops no GPU
    counts = [int((t.targets >= 0).sum()) for t in tokens]
    scored, targets = (to_device(t, x.device) for t in (scored, targets[scored]))
    smoothing = [piece.forward.smoothing if training else 0.0 for piece in pieces]
    return nats_of_parts(elementwise.normed(x[scored], first.ln_f), first.head, targets, counts, smoothing)


def _with_noise(
    x: torch.Tensor, pieces: Sequence[Piece], tokens: Sequence[Tokens], strengths: Sequence[float]
) -> torch.Tensor:
    """NEFTune's noise on the rows of those pieces that ask for it."""
    noisy = []
    for rows, piece, of, strength in zip(
        torch.split(x, [len(t.ids) for t in tokens]), pieces, tokens, strengths, strict=True
    ):
        lengths = to_device(torch.from_numpy(of.lengths.repeat(of.lengths)), x.device)
        noisy.append(add_neftune_noise(rows, lengths, strength, piece.generator) if strength else rows)
    return torch.cat(noisy)


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
    return LoraLinear(partial(frozen_weight, layer, packed, dtype), layer.bias.to(dtype), (factors,))
