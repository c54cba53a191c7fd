"""What stands between the matrix products of a block: as torch has it, or each piece compiled into one kernel.

Compiled pieces (`run.compile`) read and write their tensors once where torch's operators do so three or four times.
Each is compiled for any number of tokens, so that batches of all shapes share a few graphs: above, at and below the
lowest adapter, and for evaluation. They are held against torch's before any step. Torch keeps what its compiler wrote
for the next run (TORCHINDUCTOR_CACHE_DIR).

Legend: N tokens, D width.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

_TOKENS = 64  # of the trial; a graph for any number of them comes out
_CASES = (((1, 1, 1), True), ((0, 1, 1), True), ((0, 0, 0), True), ((0, 0, 0), False))
"""Which of stream, layer and hidden values ask for a gradient, above, at and below the lowest adapter; autograd on."""
_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of values and gradients


@dataclass(frozen=True)
class Norm:
    """Weight, bias (D,) and epsilon of a LayerNorm, and the dtype of what comes out."""

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float
    dtype: torch.dtype


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, to: torch.dtype) -> torch.Tensor:
    """LayerNorm of the fp32 stream (N, D)."""
    return F.layer_norm(x, weight.shape, weight.float(), bias.float(), epsilon).to(to)


def added(
    x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float, to: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream with what a layer adds to it, and its LayerNorm."""
    x = x + more
    return x, normed(x, weight, bias, epsilon, to)


def activated(hidden: torch.Tensor) -> torch.Tensor:
    """GELU, by its approximation with tanh."""
    return F.gelu(hidden, approximate="tanh")


@dataclass(frozen=True)
class Pieces:
    """The three functions above, or their equals; `told` says which."""

    _normed: Callable[..., torch.Tensor] = normed
    _added: Callable[..., tuple[torch.Tensor, torch.Tensor]] = added
    activated: Callable[[torch.Tensor], torch.Tensor] = activated
    told: str = ""

    def normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """LayerNorm of the stream."""
        return self._normed(x, norm.weight, norm.bias, norm.epsilon, norm.dtype)

    def added(self, x: torch.Tensor, more: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """x + more, and the LayerNorm of that."""
        return self._added(x, more, norm.weight, norm.bias, norm.epsilon, norm.dtype)


PLAIN = Pieces()


def compiled(norm: Norm, inner: int) -> Pieces:
    """Compiled pieces for streams like those that `norm` takes, or torch's where they cannot be had; `told` says why.

    `inner` is the width of what GELU sees.
    """
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler about torch
            pieces = Pieces(torch.compile(normed), torch.compile(added), torch.compile(activated))
            worst = max(_difference(pieces, norm, inner, asking, keeps) for asking, keeps in _CASES)
    except Exception as error:  # no compiler, or one that fails: a run needs none
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Pieces(told=f"not compiled: {first[:200]}")
    if not worst <= _ERROR[norm.dtype]:
        return Pieces(told=f"not compiled: what the compiler made is off by {worst:.1e}")
    return replace(pieces, told=f"pieces between products compiled in {time.perf_counter() - began:.1f} s")


def _difference(pieces: Pieces, norm: Norm, inner: int, asking: tuple[int, ...], keeps: bool) -> float:
    """The largest relative difference from torch's pieces, of values and gradients, as a block calls them."""
    random = torch.Generator().manual_seed(0)
    widths = len(norm.weight), len(norm.weight), inner
    given = [torch.randn(_TOKENS, width, generator=random).to(norm.weight.device) for width in widths]
    found: list[list[torch.Tensor]] = []
    for these in (pieces, PLAIN):
        x, more, hidden = (tensor.clone() for tensor in given)
        more, hidden = more.to(norm.dtype), hidden.to(norm.dtype)
        for tensor, asks in zip((x, more, hidden), asking, strict=True):
            tensor.requires_grad_(bool(asks))
            _any_number(tensor)
        with nullcontext() if keeps else torch.no_grad():
            values = [these.normed(x, norm), *these.added(x, more, norm), these.activated(hidden)]
        leaves = [tensor for tensor in (x, more, hidden) if tensor.requires_grad]
        if leaves:
            kept = [value for value in values if value.requires_grad]
            values += torch.autograd.grad(kept, leaves, [value.detach().sin() for value in kept])
        found.append([value.detach().double() for value in values])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))


def _any_number(tensor: torch.Tensor) -> None:
    """Compile for any number of tokens."""
    dynamo: Any = torch._dynamo
    dynamo.mark_dynamic(tensor, 0)
