"""Causal attention of each document with itself, by the kernel that suits the device.

Nothing else in a GPT-2 looks at more than one token, so the fast path works on the N real tokens of a batch, end to
end, without padding; attention alone gathers documents of similar length into rectangles.

Legend: N tokens, H heads, W width of a head; in a rectangle S documents times heads, T slots each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from peftune.model.train import varlen_attention
from peftune.model.train.layers import to_device

FULL = 0.85  # a rectangle takes documents down to this share of its longest: at most 28 % of T² is padding
QUERY_BLOCK = 128  # queries at a time: their scores fit the cache, and keys after the last of them are left out

Attend = Callable[[torch.Tensor, float], torch.Tensor]
"""qkv (N, 3·H·W) and a scale to softmax(scale · q·kᵀ)·v within each document, (N, H·W); differentiable in qkv."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention; `plan(lengths, heads, device)` prepares it for the documents of one batch."""

    name: str
    plan: Callable[[np.ndarray, int, torch.device], Attend]


def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Kernel:
    """The fastest kernel that gives the right answer for heads of this `width` on this device."""
    if device.type == "cpu":
        return CPU_KERNEL
    if reason := varlen_attention.reason_against(device, dtype, width):
        return Kernel(f"SDPA on rectangles, without flash attention: {reason}", _fused)
    return Kernel("flash attention, documents end to end", varlen_attention.plan)


def attend_in_parts(kernel: Kernel, parts: Sequence[np.ndarray], heads: int, device: torch.device) -> Attend:
    """Attention within documents of these lengths, in the order of the parts; on a CPU of each part by itself.

    There documents of like length share products, whose rounding depends on the company that they keep.
    """
    if device.type != "cpu" or len(parts) == 1:
        return kernel.plan(np.concatenate(parts), heads, device)
    each, sizes = [kernel.plan(lengths, heads, device) for lengths in parts], [int(part.sum()) for part in parts]

    def attend(qkv: torch.Tensor, scale: float) -> torch.Tensor:
        rows = torch.split(qkv, sizes)
        return torch.cat([of_part(part, scale) for of_part, part in zip(each, rows, strict=True)])

    return attend


def _by_query_blocks(lengths: np.ndarray, heads: int, device: torch.device) -> Attend:
    rectangles = rectangles_of(lengths, heads, device)
    return lambda qkv, scale: _QueryBlocks.apply(qkv, rectangles, heads, scale)  # type: ignore[no-untyped-call]


CPU_KERNEL = Kernel("batched products by query blocks", _by_query_blocks)


class _QueryBlocks(torch.autograd.Function):
    """Plain batched products: on a CPU more than twice as fast as SDPA's fused kernel with its backward.

    Probabilities are kept for the backward: T²/2 numbers a document and head, in the dtype of the run.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, rectangles: Rectangles, heads: int, scale: float) -> torch.Tensor:
        rows = qkv.view(-1, qkv.shape[1] // (3 * heads)).index_select(0, rectangles.to_slots)
        output = rows.new_empty(len(rows) // 3, rows.shape[1])
        kept = []
        for (q, k, v), out in zip(_qkv(rows, rectangles, heads), _views(output, rectangles, heads), strict=True):
            for queries, seen in _query_blocks(q.shape[1]):
                p = _probabilities(q[:, queries], k[:, seen], scale)
                out[:, queries] = p @ v[:, seen]
                kept.append(p)
        ctx.save_for_backward(rows, *kept)
        ctx.rectangles, ctx.heads, ctx.scale = rectangles, heads, scale
        return output.index_select(0, rectangles.to_outputs).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        rows, *kept = ctx.saved_tensors
        rectangles, heads, scale = ctx.rectangles, ctx.heads, ctx.scale
        d_output = rows.new_zeros(len(rows) // 3, rows.shape[1])  # padding stays zero
        d_output.index_copy_(0, rectangles.to_outputs, upstream.reshape(-1, rows.shape[1]))
        d_rows = torch.zeros_like(rows)
        probabilities = iter(kept)
        views = _qkv(rows, rectangles, heads), _qkv(d_rows, rectangles, heads), _views(d_output, rectangles, heads)
        for (q, k, v), (dq, dk, dv), d_out in zip(*views, strict=True):
            for queries, seen in _query_blocks(q.shape[1]):
                p, d = next(probabilities), d_out[:, queries]
                ds = torch._softmax_backward_data(d @ v[:, seen].mT, p, -1, p.dtype)
                dv[:, seen].baddbmm_(p.mT, d)
                dq[:, queries].baddbmm_(ds, k[:, seen], alpha=scale)
                dk[:, seen].baddbmm_(ds.mT, q[:, queries], alpha=scale)
        return d_rows.index_select(0, rectangles.to_tokens).view(len(upstream), -1), None, None, None


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Of the last queries q (S, t, W) over all keys k (S, T, W) so far: (S, t, T), rows sum to one."""
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
    latest = q.shape[1]
    future = torch.full((latest, latest), -torch.inf, dtype=q.dtype).triu_(1)
    scores[:, :, -latest:] += future
    return torch.softmax(scores, dim=-1)


def _query_blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that they see."""
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        yield slice(first, last), slice(0, last)


def _qkv(rows: torch.Tensor, rectangles: Rectangles, heads: int) -> Iterator[torch.Tensor]:
    """Views (3, S, T, W) of each rectangle's q, k and v."""
    return (part.view(3, -1, *part.shape[1:]) for part in _views(rows, rectangles, 3 * heads))


def _views(rows: torch.Tensor, rectangles: Rectangles, per_slot: int) -> Iterator[torch.Tensor]:
    """Views (…, T, W) of each rectangle's rows, of which every slot has `per_slot`."""
    for part in rectangles.parts:
        first, count = per_slot * part.first, per_slot * part.documents * part.length
        yield rows[first : first + count].view(-1, part.length, rows.shape[1])


def _fused(lengths: np.ndarray, heads: int, device: torch.device) -> Attend:
    """SDPA's causal kernels, rectangle by rectangle."""
    rectangles = rectangles_of(lengths, heads, device)

    def attend(qkv: torch.Tensor, scale: float) -> torch.Tensor:
        rows = qkv.view(-1, qkv.shape[1] // (3 * heads))
        rows = _Moved.apply(rows, rectangles.to_slots, rectangles.to_tokens)  # type: ignore[no-untyped-call]
        outputs = []
        for q, k, v in _qkv(rows, rectangles, heads):
            q, k, v = (part.view(-1, heads, *part.shape[1:]) for part in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).flatten(0, 2))
        return torch.cat(outputs).index_select(0, rectangles.to_outputs).view(len(qkv), -1)

    return attend


class _Moved(torch.autograd.Function):
    """`index_select` whose backward is one too: `back` is where each row of `rows` went."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream.index_select(0, ctx.back), None, None


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""ids, positions, targets and segments of a micro-batch, as `TrainGPT2` takes them."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch end to end, on the CPU: three times (N,) int64, and the lengths of documents."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: np.ndarray

    @staticmethod
    def of(batch: Rows) -> Tokens:
        """Without the padding of rows."""
        ids, positions, targets, segments = batch
        indices, lengths = _real(ids.shape, segments)
        ids, positions, targets = (tensor.flatten()[indices] for tensor in (ids, positions, targets))
        return Tokens(ids, positions, targets, lengths)

    def equal(self, other: Tokens) -> bool:
        """Whether a base computes the same of both."""
        return np.array_equal(self.lengths, other.lengths) and torch.equal(self.ids, other.ids)


def _real(shape: torch.Size, segments: torch.Tensor | None) -> tuple[torch.Tensor, np.ndarray]:
    """Where in the flattened rows of a batch (B, T) tokens are, (N,) int64, and the lengths of its documents."""
    rows, width = shape
    if segments is None:
        return torch.arange(rows * width), np.full(rows, width)
    numbers = segments.numpy()
    indices = np.flatnonzero(numbers.ravel() >= 0)
    document = (numbers + np.arange(rows)[:, None] * (numbers.max() + 1)).ravel()[indices]
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    return torch.from_numpy(indices), np.diff(starts, append=len(indices))


@dataclass(frozen=True)
class Rectangle:
    """Slots [first, first + documents · length) of a batch's rectangles: a document a row, padded at its end."""

    first: int
    documents: int
    length: int


@dataclass(frozen=True)
class Rectangles:
    """Documents of about equal length side by side, so that a batched product can take them.

    H heads; P slots in all rectangles, N of them hold a token. q, k and v lie rectangle after rectangle as
    (3, documents, H, length), outputs as (documents, H, length). All tensors int64: `to_slots` (3·P·H,) is the row
    (token, part, head) of each slot, 0 for padding; `to_tokens` (N·3·H,) its inverse; `to_outputs` (N·H,) the slot of
    each output row (token, head).
    """

    parts: tuple[Rectangle, ...]
    to_slots: torch.Tensor
    to_tokens: torch.Tensor
    to_outputs: torch.Tensor


def rectangles_of(lengths: np.ndarray, heads: int, device: torch.device) -> Rectangles:
    """Rectangles for documents of these `lengths` (documents,), that lie end to end."""
    parts, token = _grouped(lengths)
    to_slots, to_tokens = _rows(parts, token, 3, heads)
    _, to_outputs = _rows(parts, token, 1, heads)
    return Rectangles(parts, *(to_device(torch.from_numpy(rows), device) for rows in (to_slots, to_tokens, to_outputs)))


def _grouped(lengths: np.ndarray) -> tuple[tuple[Rectangle, ...], np.ndarray]:
    """Rectangles, and the token in each of their slots, (P,), -1 for padding."""
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    falling = lengths[longest_first]
    parts, tokens, first, done = [], [], 0, 0
    while done < len(falling):
        length = int(falling[done])
        end = int(np.searchsorted(-falling, -FULL * length, side="right"))
        chosen = longest_first[done:end, None]
        column = np.arange(length)
        tokens.append(np.where(column < lengths[chosen], starts[chosen] + column, -1).ravel())
        parts.append(Rectangle(first, end - done, length))
        first, done = first + (end - done) * length, end
    return tuple(parts), np.concatenate(tokens)


def _rows(parts: tuple[Rectangle, ...], token: np.ndarray, kinds: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (token, kind, head) of each slot (kind, document, head, column), 0 for padding; and the inverse."""
    rows = []
    for part in parts:
        tokens = token[part.first : part.first + part.documents * part.length].reshape(1, part.documents, 1, -1)
        kind, head = np.arange(kinds).reshape(-1, 1, 1, 1), np.arange(heads).reshape(1, 1, -1, 1)
        rows.append(np.where(tokens < 0, -1, (tokens * kinds + kind) * heads + head).ravel())
    row = np.concatenate(rows)
    filled = np.flatnonzero(row >= 0)
    inverse = np.empty(len(filled), dtype=np.int64)
    inverse[row[filled]] = filled
    return np.maximum(row, 0), inverse
