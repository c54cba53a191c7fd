"""The Triton kernel of `cross_entropy`, in a module that only a run on a GPU imports: Triton is not everywhere.

A program computes one row in two passes: maximum and sum of exponentials, kept up to date block by block (Milakov and
Gimelshein, 1805.02867), then the gradient. No two programs write to one place, so equal input gives equal bits.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # 16 numbers a thread: with fewer than it reads at once, several would have the same ones


@triton.jit
def _row(
    logits: tl.tensor, targets: tl.tensor, shares: tl.tensor, nats: tl.tensor, stride: tl.tensor, columns: tl.tensor,
    smoothed: tl.constexpr, wanted: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # times the stride it can exceed 32 bits
    target, here = tl.load(targets + row), tl.arange(0, block)
    logits += row * stride
    picked = tl.load(logits + target).to(tl.float32)
    whole = columns // block * block  # without a mask: one that may end at any column has a GPU read one by one
    left = here < columns - whole
    last = tl.load(logits + whole + here, mask=left, other=float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(last, 0), -3.4028234663852886e38)  # not -inf, whose difference from itself is no number
    total, each = tl.sum(tl.exp(last - top), 0), 1.0 / columns
    mean = tl.sum(tl.where(left, last * each, 0.0), 0)
    for first in range(0, whole, block):
        x = tl.load(logits + first + here).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
        if smoothed:
            mean += tl.sum(x * each, 0)
    share = 0.0
    loss = tl.log(total) + (top - picked)
    if smoothed:
        share = tl.load(shares + row)
        evenly = tl.log(total) + (top - mean)
        loss = tl.where(share == 0.0, loss, (1 - share) * loss + share * evenly)  # 0 times infinity is no number
    tl.store(nats + row, loss)
    if wanted:
        scale = 1.0 / total
        for first in range(0, whole, block):
            x = tl.load(logits + first + here).to(tl.float32)
            taken = tl.where(first + here == target, 1 - share, 0.0) + share * each
            tl.store(logits + first + here, tl.exp(x - top) * scale - taken)
        taken = tl.where(whole + here == target, 1 - share, 0.0) + share * each
        tl.store(logits + whole + here, tl.exp(last - top) * scale - taken, mask=left)


def launch(
    logits: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor | None, nats: torch.Tensor, wanted: bool,
    block: int = BLOCK, warps: int = WARPS,
) -> None:  # fmt: skip
    """`cross_entropy.by_kernel`, in blocks of so many columns, a power of two; `shares` (C,) are those of each row."""
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():  # Triton takes the current one
        _row[len(logits),](
            logits, targets, shares, nats, logits.stride(0), logits.shape[1],
            smoothed=shares is not None, wanted=wanted, block=block, num_warps=warps,
        )  # fmt: skip
