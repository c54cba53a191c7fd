"""Causal attention of each document with itself: one function, and the kernel that suits the device.

Legend: N tokens, H heads, W width of a head; in a rectangle S documents times heads, T places each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from peftune.model.train import varlen_attention
from peftune.model.train.ragged import Rectangles, rectangles_of

SLAB = 128  # queries at a time: their scores fit the cache, and keys after the last of them are left out

Attend = Callable[[torch.Tensor], torch.Tensor]
"""qkv (N, 3·H·W) to softmax(q·kᵀ / √W)·v within each document, (N, H·W); differentiable."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention; `plan(lengths, heads, device)` prepares it for the documents of one batch."""

    name: str
    plan: Callable[[np.ndarray, int, torch.device], Attend]


def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Kernel:
    """The fastest kernel that gives the right answer for heads of this `width` on this device."""
    if device.type == "cpu":
        return Kernel("batched products in slabs", _in_slabs)
    if varlen_attention.is_right(device, dtype, width):
        return Kernel("flash attention, documents end to end", varlen_attention.plan)
    return Kernel("SDPA on rectangles", _fused)


def _in_slabs(lengths: np.ndarray, heads: int, device: torch.device) -> Attend:
    rectangles = rectangles_of(lengths, heads, device)
    return lambda qkv: _Slabs.apply(qkv, rectangles, heads)  # type: ignore[no-untyped-call]


class _Slabs(torch.autograd.Function):
    """Plain batched products: on a CPU more than twice as fast as SDPA's fused kernel with its backward.

    Probabilities are kept for the backward: T²/2 numbers a document and head, in the dtype of the run.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, rectangles: Rectangles, heads: int) -> torch.Tensor:
        rows = qkv.view(-1, qkv.shape[1] // (3 * heads)).index_select(0, rectangles.to_places)
        scale = rows.shape[1] ** -0.5
        output = rows.new_empty(len(rows) // 3, rows.shape[1])
        kept = []
        for (q, k, v), out in zip(_qkv(rows, rectangles, heads), _outputs(output, rectangles, heads), strict=True):
            for slab, seen in _slabs(q.shape[1]):
                p = _probabilities(q[:, slab], k[:, seen], scale)
                out[:, slab] = p @ v[:, seen]
                kept.append(p)
        ctx.save_for_backward(rows, *kept)
        ctx.rectangles, ctx.heads = rectangles, heads
        return output.index_select(0, rectangles.to_outputs).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, *kept = ctx.saved_tensors
        rectangles, heads, scale = ctx.rectangles, ctx.heads, rows.shape[1] ** -0.5
        d_output = rows.new_zeros(len(rows) // 3, rows.shape[1])  # padding stays zero
        d_output.index_copy_(0, rectangles.to_outputs, upstream.reshape(-1, rows.shape[1]))
        d_rows = torch.zeros_like(rows)
        probabilities = iter(kept)
        for (q, k, v), (dq, dk, dv), d_out in zip(
            _qkv(rows, rectangles, heads),
            _qkv(d_rows, rectangles, heads),
            _outputs(d_output, rectangles, heads),
            strict=True,
        ):
            for slab, seen in _slabs(q.shape[1]):
                p, d = next(probabilities), d_out[:, slab]
                ds = torch._softmax_backward_data(d @ v[:, seen].mT, p, -1, p.dtype)
                dv[:, seen].baddbmm_(p.mT, d)
                dq[:, slab].baddbmm_(ds, k[:, seen], alpha=scale)
                dk[:, seen].baddbmm_(ds.mT, q[:, slab], alpha=scale)
        return d_rows.index_select(0, rectangles.to_tokens).view(len(upstream), -1), None, None


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Of the last queries q (S, t, W) over all keys k (S, T, W) so far: (S, t, T), rows sum to one."""
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
    latest = q.shape[1]
    future = torch.full((latest, latest), -torch.inf, dtype=q.dtype).triu_(1)
    scores[:, :, -latest:] += future
    return torch.softmax(scores, dim=-1)


def _slabs(length: int) -> Iterator[tuple[slice, slice]]:
    """Queries of each slab, and the keys that they see."""
    for first in range(0, length, SLAB):
        last = min(first + SLAB, length)
        yield slice(first, last), slice(0, last)


def _qkv(rows: torch.Tensor, rectangles: Rectangles, heads: int) -> Iterator[torch.Tensor]:
    """Views (3, S, T, W) of each rectangle's q, k and v."""
    for part in rectangles.parts:
        first, count = 3 * heads * part.first, 3 * heads * part.documents * part.length
        yield rows[first : first + count].view(3, -1, part.length, rows.shape[1])


def _outputs(output: torch.Tensor, rectangles: Rectangles, heads: int) -> Iterator[torch.Tensor]:
    """Views (S, T, W) of each rectangle's outputs."""
    for part in rectangles.parts:
        first, count = heads * part.first, heads * part.documents * part.length
        yield output[first : first + count].view(-1, part.length, output.shape[1])


def _fused(lengths: np.ndarray, heads: int, device: torch.device) -> Attend:
    """SDPA's causal kernels, rectangle by rectangle."""
    rectangles = rectangles_of(lengths, heads, device)

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        rows = qkv.view(-1, qkv.shape[1] // (3 * heads))
        rows = _Moved.apply(rows, rectangles.to_places, rectangles.to_tokens)  # type: ignore[no-untyped-call]
        outputs = []
        for q, k, v in _qkv(rows, rectangles, heads):
            q, k, v = (part.view(-1, heads, *part.shape[1:]) for part in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(0, 2))
        return torch.cat(outputs).index_select(0, rectangles.to_outputs).view(len(qkv), -1)

    return attend


class _Moved(torch.autograd.Function):
    """`index_select` whose backward is one too: `back` is the place of each row of `rows`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream.index_select(0, ctx.back), None, None
