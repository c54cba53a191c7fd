"""Many adapters in a few products: a GPU waits longer for a launch than it takes to multiply by one small matrix.

A and B of all adapters of a layer are stacked, and each row of the batch is multiplied by the matrix of its adapter:
by torch's grouped product where the GPU has a kernel for it, else by a batched product over parts of equal length.

Legend as in `layers`; G parts of a batch, each with its adapter, M rows of the longest part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from peftune.device import is_out_of_memory
from peftune.errors import first_line
from peftune.model.train.layers import AdapterRows, LoraLinear, dropped, repeated, summed, terms_of, to_device

_TOLERANCE = 0.02  # of the largest value: bf16 rounds by 0.004, a kernel that mixes parts up is off by about 1
_ALIGNED = 16  # bytes that a row of a matrix must be a multiple of


class Products(Protocol):
    """Products of rows with the matrix of their part; rows lie part after part."""

    def by_matrix(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """(N, I) with (G, I, O), (N, O)."""

    def by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums over the rows of each part: (N, R) with (N, I), (G, R, I)."""


@dataclass(frozen=True)
class Grouped:
    """`ends` (G,) int32 are where parts end; ranks are multiples of 8."""

    ends: Tensor

    def by_matrix(self, rows: Tensor, matrices: Tensor) -> Tensor:
        return F.grouped_mm(rows, matrices, offs=self.ends)

    def by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=self.ends)


@dataclass(frozen=True)
class Batched:
    """`slots` (N,) int64 are the places of rows in parts that are padded to M rows each."""

    slots: Tensor
    parts: int
    longest: int

    def by_matrix(self, rows: Tensor, matrices: Tensor) -> Tensor:
        return torch.bmm(self._padded(rows), matrices).flatten(0, 1).index_select(0, self.slots)

    def by_rows(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(self._padded(left).mT, self._padded(right))

    def _padded(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(self.parts * self.longest, rows.shape[1]).index_copy_(0, self.slots, rows)
        return padded.view(self.parts, self.longest, -1)


def products_for(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Products | None:
    """The products of parts with so many rows, or None on a CPU, where slice after slice is as fast."""
    if device.type == "cpu":
        return None
    return batched(sizes, device) if reason_against_grouped(device, dtype) else grouped(sizes, device)


def description(device: torch.device, dtype: torch.dtype) -> str:
    """How a GPU multiplies by the adapters of a batch, for the line that begins a run; empty on a CPU."""
    if device.type == "cpu":
        return ""
    reason = reason_against_grouped(device, dtype)
    return f"adapters by batched products ({reason})" if reason else "adapters by grouped products"


@cache
def reason_against_grouped(device: torch.device, dtype: torch.dtype) -> str:
    """Why torch's grouped product is not taken; empty where it gives what batched products do, on a few random rows.

    The first call for a GPU waits for it.
    """
    if dtype is not torch.bfloat16:
        return "grouped ones are for bf16"
    if not hasattr(F, "grouped_mm") or torch.cuda.get_device_capability(device) < (9, 0):
        return "no kernel for grouped ones"
    sizes, numbers = [37, 1, 90], torch.Generator().manual_seed(0)
    rows, left, matrices = (
        torch.randn(shape, generator=numbers).to(device, dtype) for shape in ((128, 64), (128, 16), (3, 64, 48))
    )

    def products(by: Products) -> tuple[Tensor, Tensor]:
        return by.by_matrix(rows, matrices), by.by_rows(left, rows)

    try:
        pairs = zip(products(grouped(sizes, device)), products(batched(sizes, device)), strict=True)
        off = max(float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in pairs)
    except RuntimeError as error:  # a build or a GPU for which the kernel is not what its version says
        if is_out_of_memory(error):
            raise
        return f"grouped ones fail: {first_line(error)}"
    return "" if off < _TOLERANCE else f"grouped ones are off by {off:.2g}"


def grouped(sizes: Sequence[int], device: torch.device) -> Grouped:
    """By torch's grouped product."""
    return Grouped(to_device(torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32), device))


def batched(sizes: Sequence[int], device: torch.device) -> Batched:
    """By batched products."""
    longest = max(sizes)
    slots = torch.cat([torch.arange(size) + part * longest for part, size in enumerate(sizes)])
    return Batched(to_device(slots, device), len(sizes), longest)


@dataclass(frozen=True)
class ManyAdapters:
    """Computes a layer whose parts have adapters of their own, with all of them at once."""

    products: Products

    def __call__(self, layer: LoraLinear, x: Tensor, parts: Sequence[AdapterRows], training: bool) -> Tensor:
        """As `LoraLinear`, in products of the batch."""
        seen: Tensor | None = None
        draws = [training and own is not None and own.dropout for own in layer.adapters]
        if any(draws):
            of_parts = zip(parts, layer.adapters, draws, strict=True)
            seen = torch.cat(
                [dropped(x[p.rows], own.dropout, p.generator) if own and d else x[p.rows] for p, own, d in of_parts]
            )
        matrices = [m for own in layer.adapters if own is not None for m in (own.a, own.b)]
        return _Many.apply(x, seen, layer, self.products, *matrices)  # type: ignore[no-any-return,no-untyped-call]


class _Many(torch.autograd.Function):
    """x·W + b + (seen·Aᵀ)·(s·B)ᵀ, A and B those of each row's part; a part without an adapter has zeros."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seen: Tensor | None, layer: LoraLinear, products: Products, *matrices: Tensor
    ) -> Tensor:
        rank = _padded_rank([len(a) for a in matrices[::2]])
        a_GRI, b_GRO = (_stacked(layer, found, rank) for found in (matrices[::2], [b.T for b in matrices[1::2]]))
        scale = _scale(layer, x.device)
        a_GPI, b_GPO = terms_of(a_GRI, x.dtype, 1), terms_of(b_GRO * scale, x.dtype, 1)
        told = x if seen is None else seen
        inner_NR = summed(products.by_matrix(told, a_GPI.mT), rank)
        output = torch.addmm(layer.bias, x, layer.weight())
        output += products.by_matrix(repeated(inner_NR, b_GPO.shape[1]), b_GPO)
        ctx.save_for_backward(told, inner_NR, a_GPI, b_GPO)
        ctx.layer, ctx.products, ctx.dropped, ctx.scale = layer, products, seen is not None, scale
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        told, inner_NR, a_GPI, b_GPO = ctx.saved_tensors
        products, layer, rank = ctx.products, ctx.layer, inner_NR.shape[1]
        upstream = upstream.contiguous()
        d_inner_NR = summed(products.by_matrix(upstream, b_GPO.mT), rank)
        d_b_GRO = products.by_rows(inner_NR, upstream).float() * ctx.scale
        d_a_GRI = products.by_rows(d_inner_NR, told).float()
        d_x = upstream @ layer.weight().T if ctx.needs_input_grad[0] else None
        d_seen = None
        if ctx.needs_input_grad[1] or (d_x is not None and not ctx.dropped):
            d_seen = products.by_matrix(repeated(d_inner_NR, a_GPI.shape[1]), a_GPI)
        if d_x is not None and d_seen is not None and not ctx.dropped:
            d_x, d_seen = d_x.add_(d_seen), None
        found: list[Tensor] = []
        for part, own in enumerate(layer.adapters):
            if own is not None:
                found += [d_a_GRI[part, : len(own.a)], d_b_GRO[part, : len(own.a)].T]
        return d_x, d_seen, None, None, *found


def _stacked(layer: LoraLinear, matrices: Sequence[Tensor], rank: int) -> Tensor:
    """(G, R, …) float32, each filled up with rows of zeros."""
    left, rows = iter(matrices), []
    for own in layer.adapters:
        matrix = next(left) if own is not None else matrices[0].new_zeros(0, matrices[0].shape[1])
        rows.append(F.pad(matrix, (0, 0, 0, rank - len(matrix))) if len(matrix) < rank else matrix)
    return torch.stack(rows)


def _scale(layer: LoraLinear, device: torch.device) -> float | Tensor:
    """That of all adapters, or (G, 1, 1) where they differ."""
    scales = [own.scale if own is not None else 0.0 for own in layer.adapters]
    if len({*scales}) == 1:
        return scales[0]
    return to_device(torch.tensor(scales, dtype=torch.float32), device)[:, None, None]


def _padded_rank(ranks: Sequence[int]) -> int:
    """The largest, filled up so that rows are aligned in 16 bits too."""
    step = _ALIGNED // 2
    return -(-max(ranks) // step) * step
