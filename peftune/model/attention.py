"""Who may look at whom: causal, and never across documents."""

from __future__ import annotations

import torch


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Attention mask (B, 1, T, T), True where row i may look at column j: j ≤ i and both of one document.

    `segments` (B, T) numbers the documents of a row. Places without a document (-1) see each other, so that no
    row of the mask is empty and softmax stays finite; they are never scored. Restarted positions alone do not
    separate documents in GPT-2, only a mask does.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal
