"""A frozen matrix, laid out once for the few rows that decoding multiplies it with.

On CPUs the matrix is packed for oneDNN. With 8 rows of GPT-2's matrices that is 2 to 5 times as fast as MKL on the
plain matrix, in fp32 as in bf16 (`python -m benchmarks.decode speed` prints both). Its kernels mostly give a row the
same bits whatever the number of rows; `by_row` makes sure of it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from peftune.model.decode.batch_invariance import by_row

_ROWS = 8  # packed for about so many; the layout is the same for all


class PackedLinear:
    """x (R, …, in) to x·W + b (R, …, out); products in the dtype of `weight`, sums in float32.

    On a CPU the result is float32, and row i has the same bits in any company; on a GPU it has the dtype of `weight`.
    `weight` is (out, in), as in `torch.nn.Linear`; `bias` (out,) or None.
    Neither is changed.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._dtype = weight.dtype
        self._bias = bias.to(weight.dtype) if bias is not None else None
        self._on_cpu = weight.device.type == "cpu"
        self._packed = self._on_cpu and _can_pack(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS) if self._packed else weight
        self._name = f"linear of {len(weight)} {weight.dtype} {bias is not None} {self._packed}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_cpu:
            return F.linear(x.to(self._dtype), self._weight, self._bias)
        return by_row(self._name, self._multiply, x)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)
        product = _product if self._packed else F.linear
        if len(rows) > 1:
            y = product(rows, self._weight, self._bias)
        else:  # one alone takes another kernel, whose last bits differ
            y = product(rows.expand(2, -1), self._weight, self._bias)[:1]
        return y.view(*x.shape[:-1], -1).float()


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs matrices of `dtype` and multiplies with them rightly: what Inductor does."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    rows, weight = torch.arange(16.0).view(2, 8).to(dtype), torch.arange(32.0).view(4, 8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        return torch.equal(_product(rows, packed, None), F.linear(rows, weight))
    except (AttributeError, RuntimeError):  # not in this build, or not for this processor
        return False
