"""Queries, keys and values as parts of c_attn, which computes all three by one matrix: LoRAs of some of them alone.

A LoRA of rank r for each of n parts is one LoRA of rank n·r: A stacks theirs, and B is block-diagonal, zero in the rows
of the other parts and in the columns of the other LoRAs. That is what microsoft/LoRA's `MergedLinear` computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

PARTS = ("q", "k", "v")
"""In the order of c_attn's outputs."""
QUERY_VALUE = ("q", "v")
"""What the LoRA paper adapts (2106.09685, section 5.4)."""
Place = tuple[slice, slice]
"""Rows and columns of B (3·width, n·r)."""


def places_of(parts: Sequence[str], rank: int, width: int) -> list[Place]:
    """Where in B each part's own B (width, rank) lies."""
    rows = [PARTS.index(part) * width for part in parts]
    return [(slice(row, row + width), slice(n * rank, (n + 1) * rank)) for n, row in enumerate(rows)]


def untrained_mask(parts: Sequence[str], rank: int, width: int) -> torch.Tensor:
    """True where B (3·width, n·rank) is zero and stays so."""
    mask = torch.ones(len(PARTS) * width, len(parts) * rank, dtype=torch.bool, device="cpu")
    for place in places_of(parts, rank, width):
        mask[place] = False
    return mask


def stacked_alpha(alpha: float, parts: Sequence[str], rslora: bool) -> float:
    """The alpha of the one LoRA whose scale is that of the parts: alpha / rank, or alpha / sqrt(rank)."""
    return alpha * (math.sqrt(len(parts)) if rslora else len(parts))
