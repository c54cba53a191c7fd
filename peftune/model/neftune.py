"""NEFTune (Jain et al., 2310.05914): noise on token embeddings while training."""

from __future__ import annotations

import torch


def add_neftune_noise(embedded: torch.Tensor, lengths: torch.Tensor, strength: float) -> torch.Tensor:
    """Embeddings (…, D) with uniform noise in ±strength / sqrt(n·D), n the tokens of the document that each is in.

    `lengths` (…) holds n; it is that of the document, not of the row, so that packing does not matter.
    """
    bound = strength / torch.sqrt(lengths * float(embedded.shape[-1]))
    return embedded + torch.empty_like(embedded).uniform_(-1, 1) * bound[..., None].to(embedded.dtype)
