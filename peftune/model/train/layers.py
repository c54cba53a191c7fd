"""The layers of a block: frozen linear layers with LoRA, x·W + b + s·(x·Aᵀ)·Bᵀ, LayerNorm and GELU.

A batch has parts, each with an adapter of its own; frozen products are made once, over all rows.

Legend: N tokens, D width, I and O widths in and out, R rank, P rows of all terms of A or B (see `terms_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftune.model import quantized

Weight = Callable[[], Tensor]
Activation = Callable[[Tensor], Tensor]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; to a GPU through pinned memory, so that the host need not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class LoraFactors:
    """A (R, I) and B (O, R), trained in fp32 and multiplied without rounding; `scale` is alpha / rank or so."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float
    terms: list[Tensor] = field(default_factory=list)
    """Of A and of Bᵀ, where they are known to hold for several forwards."""

    def split(self, dtype: torch.dtype) -> None:
        """Compute the `terms` for matrix products in `dtype`."""
        self.terms[:] = terms_of(self.a, dtype), terms_of(self.b.T, dtype)


def frozen_weight(layer: Any, packed: bool, dtype: torch.dtype) -> Tensor:
    """W (I, O): the base's own tensor, stored input by output, which has the dtype of the run already.

    Of a quantised (`packed`) layer it is unpacked for each product, so that one layer at a time is.
    """
    return quantized.unpacked(layer, dtype).T if packed else layer.weight.to(dtype)


@dataclass(frozen=True)
class AdapterRows:
    """Rows of a batch that one adapter sees; `generator` draws its dropout, None is torch's own."""

    rows: slice
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class LoraLinear:
    """`weight()` is W (I, O) in the dtype of the run: the base's own tensor, or unpacked for every use.

    Of each part of a batch there is one of `adapters`, or None.
    """

    weight: Weight
    bias: Tensor
    adapters: tuple[LoraFactors | None, ...]
    at_once: Callable[[LoraLinear, Tensor, Sequence[AdapterRows], bool], Tensor] | None = None
    """Computes the same with all adapters at once (`grouped_lora`), where that is faster than one after another."""

    def __call__(self, x: Tensor, parts: Sequence[AdapterRows], training: bool) -> Tensor:
        """(N, I) to (N, O), differentiable in x, A and B; `training` switches the adapters' dropout."""
        if self.at_once is not None and any(self.adapters):
            return self.at_once(self, x, parts, training)
        adapted = [(part, own) for part, own in zip(parts, self.adapters, strict=True) if own is not None]
        if not adapted:
            return _Frozen.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        given: list[Tensor | None] = []
        for part, own in adapted:
            draws = training and own.dropout
            given += [dropped(x[part.rows], own.dropout, part.generator) if draws else None, own.a, own.b]
        lora = [(part.rows, own) for part, own in adapted]
        return _Adapted.apply(x, self.weight, self.bias, lora, *given)  # type: ignore[no-any-return,no-untyped-call]


def dropped(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """`F.dropout`, whose draws on a CPU it repeats, with a generator of one's own."""
    kept = torch.empty_like(x).bernoulli_(1 - share, generator=generator)
    return x * kept.div_(1 - share)


def same_draws(
    generators: Sequence[torch.Generator],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward and of its repetition, in which the generators draw the same."""
    states = [generator.get_state() for generator in generators]

    @contextmanager
    def again() -> Iterator[None]:
        later = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        try:  # a repetition is left in the middle, once it has made what is needed
            yield
        finally:
            for generator, state in zip(generators, later, strict=True):
                generator.set_state(state)

    return nullcontext(), again()


class _Frozen(torch.autograd.Function):
    """No gradient of W, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.addmm(bias, x, weight())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream @ ctx.weight().T, None, None


class _Adapted(torch.autograd.Function):
    """The products of each adapter with its rows are added in place to those of the frozen layer with all rows.

    `given` are, of each adapter, what it sees of its rows where dropout has changed them (else None), A and B.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor, lora: list[tuple[slice, LoraFactors]],
        *given: Tensor | None,
    ) -> Tensor:  # fmt: skip
        output, kept = torch.addmm(bias, x, weight()), list[Tensor | None]()
        for (rows, factors), seen, a, b in zip(lora, given[::3], given[1::3], given[2::3], strict=True):
            a_PI, b_PO = factors.terms or (terms_of(a, x.dtype), terms_of(b.T, x.dtype))  # type: ignore[arg-type,union-attr]
            inner_NR = summed((_rows(x, rows) if seen is None else seen) @ a_PI.T, len(a))  # type: ignore[arg-type]
            _rows(output, rows).addmm_(repeated(inner_NR, len(b_PO)), b_PO, alpha=factors.scale)
            kept += [seen, inner_NR, a_PI, b_PO]
        ctx.save_for_backward(x if any(seen is None for seen in kept[::4]) else None, *kept)
        ctx.weight, ctx.lora = weight, lora
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        d_x = upstream @ ctx.weight().T if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for number, (rows, factors) in enumerate(ctx.lora):
            seen, inner_NR, a_PI, b_PO = kept[4 * number : 4 * number + 4]
            above = _rows(upstream, rows)
            d_inner_NR = summed(above @ b_PO.T, inner_NR.shape[1]).mul_(factors.scale)
            d_b = (inner_NR.T @ above).T.float().mul_(factors.scale)  # far faster than the product of the transposes
            d_a = (d_inner_NR.T @ (_rows(x, rows) if seen is None else seen)).float()
            d_seen = None
            if seen is None and d_x is not None:
                _rows(d_x, rows).addmm_(repeated(d_inner_NR, len(a_PI)), a_PI)
            elif seen is not None and ctx.needs_input_grad[4 + 3 * number]:
                d_seen = repeated(d_inner_NR, len(a_PI)) @ a_PI
            found += [d_seen, d_a, d_b]
        return d_x, None, None, None, *found


def _rows(matrix: Tensor, rows: slice) -> Tensor:
    """A view; of all rows the matrix itself, which takes no time."""
    return matrix if (rows.start, rows.stop) == (0, len(matrix)) else matrix[rows]


def terms_of(matrix: Tensor, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """An fp32 matrix (R, …) as summands in `dtype`, one below the other: (P, …), P = 2·R, or R where `dtype` is fp32.

    Rounding A and B is what a gradient in bf16 suffers from most (2.1 % of error, 1.5 % without it, on twelve random
    layers); the second summand holds what rounding took, and products with so few rows cost next to nothing.
    """
    if matrix.dtype == dtype:
        return matrix
    rounded = matrix.to(dtype)
    return torch.cat([rounded, (matrix - rounded).to(dtype)], dim=dim)


def summed(product_NP: Tensor, rank: int) -> Tensor:
    """The products with all terms of a matrix, added up: (N, R)."""
    return product_NP if product_NP.shape[1] == rank else product_NP.view(len(product_NP), -1, rank).sum(dim=1)


def repeated(inner_NR: Tensor, terms: int) -> Tensor:
    """(N, P), so that each of P rows of terms is multiplied."""
    times = terms // inner_NR.shape[1]
    return inner_NR if times == 1 else inner_NR.repeat(1, times)  # one repetition would be a copy


@dataclass(frozen=True)
class Norm:
    """Weight, bias (D,), float32, and epsilon of a LayerNorm, and the dtype of what comes out."""

    weight: Tensor
    bias: Tensor
    epsilon: float
    dtype: torch.dtype


def normed(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, to: torch.dtype) -> Tensor:
    """LayerNorm of the fp32 stream (N, D)."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon).to(to)


def added(
    x: Tensor, more: Tensor, weight: Tensor, bias: Tensor, epsilon: float, to: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stream with what a layer adds to it, and its LayerNorm."""
    x = x + more
    return x, normed(x, weight, bias, epsilon, to)


@dataclass(frozen=True)
class Elementwise:
    """The two functions above and the model's activation, or the same compiled; `description` says which."""

    activated: Activation
    _normed: Callable[..., Tensor] = normed
    _added: Callable[..., tuple[Tensor, Tensor]] = added
    description: str = ""

    def normed(self, x: Tensor, norm: Norm) -> Tensor:
        """LayerNorm of the stream."""
        return self._normed(x, norm.weight, norm.bias, norm.epsilon, norm.dtype)

    def added(self, x: Tensor, more: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """x + more, and the LayerNorm of that."""
        return self._added(x, more, norm.weight, norm.bias, norm.epsilon, norm.dtype)
