"""GPT-2 with adapters, as its paper has it, on the bare tokens of a batch: the function that training computes fast.

The tensors are those of the model that Transformers loaded and PEFT adapted; nothing is copied. Frozen weights and
matrix products have the dtype of the run; the stream between blocks, and the adapters, are fp32. Autograd keeps
nothing below the lowest adapter, because nothing there asks for a gradient.

Legend: N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftune.model.loss import summed_nats
from peftune.model.neftune import add_neftune_noise
from peftune.model.train.attention import Attend, Kernel
from peftune.model.train.elementwise import Norm, Pieces
from peftune.model.train.lora_linear import Projection
from peftune.model.train.ragged import tokens_of


@dataclass(frozen=True)
class Block:
    """Attention and a perceptron of two layers, each added to the stream."""

    ln_1: Norm
    c_attn: Projection
    attn_c_proj: Projection
    ln_2: Norm
    c_fc: Projection
    mlp_c_proj: Projection

    def __call__(self, x: torch.Tensor, attend: Attend, training: bool, pieces: Pieces) -> torch.Tensor:
        """The stream (N, D) after this block."""
        attended = attend(self.c_attn(pieces.normed(x, self.ln_1), training))
        x, normed = pieces.added(x, self.attn_c_proj(attended, training), self.ln_2)
        hidden = pieces.activated(self.c_fc(normed, training))
        return x + self.mlp_c_proj(hidden, training)


@dataclass(frozen=True)
class TrainGPT2:
    """Computes what `scorer.LossModel` computes, to rounding, in the mode of `module` (training or evaluation)."""

    module: nn.Module
    wte: torch.Tensor
    wpe: torch.Tensor
    blocks: tuple[Block, ...]
    ln_f: Norm
    head: nn.Module
    heads: int
    kernel: Kernel
    pieces: Pieces
    neftune: float
    smoothing: float
    recompute: bool
    """Keep the stream before each block alone, and run the block again in the backward."""

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss in nats (float64 scalar) over the places with a target ≥ 0; arguments (B, T) on the CPU."""
        training, device = self.module.training, self.wte.device
        tokens = tokens_of(ids.shape, segments)
        places = torch.from_numpy(tokens.places)
        ids, positions, targets = (tensor.flatten()[places] for tensor in (ids, positions, targets))
        (scored,) = torch.nonzero(targets >= 0, as_tuple=True)  # here, where it stops no GPU
        ids, positions, scored, targets = (_moved(t, device) for t in (ids, positions, scored, targets[scored]))
        attend = self.kernel.plan(tokens.lengths, self.heads, device)
        x = self.wte[ids].float()
        if training and self.neftune:
            x = add_neftune_noise(x, torch.from_numpy(tokens.lengths.repeat(tokens.lengths)).to(device), self.neftune)
        x = x + self.wpe[positions].float()
        for block in self.blocks:
            if self.recompute and training:
                x = checkpoint(block, x, attend, training, self.pieces, use_reentrant=False)
            else:
                x = block(x, attend, training, self.pieces)
        return summed_nats(
            self.pieces.normed(x[scored], self.ln_f), self.head, targets, self.smoothing if training else 0.0
        )


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; to a GPU through pinned memory, so that the copy does not stop the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
