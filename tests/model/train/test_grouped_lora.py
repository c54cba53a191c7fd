"""Products with the adapters of a whole batch equal those with one adapter after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from peftune.model.train.grouped_lora import (
    Batched,
    Grouped,
    ManyAdapters,
    Products,
    batched,
    grouped,
    reason_against_grouped,
)
from peftune.model.train.layers import AdapterRows, LoraFactors, LoraLinear

CPU = torch.device("cpu")
KINDS = [batched] + [grouped] * hasattr(F, "grouped_mm")
Make = Callable[[Sequence[int], torch.device], Products]


def adapters(ranks: Sequence[int | None], scales: Sequence[float], dropout: float) -> tuple[LoraFactors | None, ...]:
    made: list[LoraFactors | None] = []
    for rank, scale in zip(ranks, scales, strict=True):
        a, b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((rank or 1, 24), (16, rank or 1)))
        made.append(LoraFactors(a, b, scale, dropout) if rank else None)
    return tuple(made)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("dtype", "ranks", "scales", "sizes", "dropout", "tolerance"),
    [
        (torch.float32, [4, 4, 4], [2.0, 2.0, 2.0], [5, 5, 5], 0.0, 1e-6),
        (torch.float32, [1, 9, None, 8], [0.5, 2.0, 1.0, 3.0], [1, 7, 3, 30], 0.0, 1e-6),
        (torch.float32, [4, 6], [1.0, 2.0], [9, 3], 0.3, 1e-6),
        (torch.bfloat16, [2, 5, 8], [1.0, 4.0, 0.25], [12, 1, 9], 0.0, 6e-3),
    ],
)
def test_all_at_once_equals_one_after_another(
    make: Make, dtype: torch.dtype, ranks: list[int | None], scales: list[float], sizes: list[int], dropout: float,
    tolerance: float,
) -> None:  # fmt: skip
    """fp32: sums in another order. bf16: half a unit of the last place more, for the product is rounded by itself."""
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16, dtype=dtype), torch.randn(16, dtype=dtype)
    x, upstream = torch.randn(sum(sizes), 24).to(dtype), torch.randn(sum(sizes), 16).to(dtype)
    of_all = adapters(ranks, scales, dropout)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    results = []
    for at_once in (None, ManyAdapters(make(sizes, CPU))):
        layer = LoraLinear(partial(lambda w: w, weight), bias, of_all, at_once)
        parts = [
            AdapterRows(slice(end - size, end), torch.Generator().manual_seed(number))
            for number, (end, size) in enumerate(zip(ends, sizes, strict=True))
        ]
        leaf = x.clone().requires_grad_()
        output = layer(leaf, parts, True)
        wanted = [leaf, *(m for own in of_all if own is not None for m in (own.a, own.b))]
        results.append([output.detach(), *torch.autograd.grad(output, wanted, upstream)])
    for one_by_one, together in zip(*results, strict=True):
        assert together.dtype == one_by_one.dtype and together.shape == one_by_one.shape
        difference = (together - one_by_one).double().norm() / one_by_one.double().norm()
        assert float(difference) <= tolerance


def _shifted(self: Grouped, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return Batched.by_rows(batched([36, 2, 90], left.device), left, right)


def _unknown(self: Grouped, *_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("grouped gemm is not supported\nmore")


@pytest.mark.parametrize(
    ("planted", "reason"),
    [(None, ""), (_shifted, "grouped ones are off by"), (_unknown, "grouped ones fail: grouped gemm is not supported")],
)
def test_a_grouped_product_is_tried_before_it_is_taken(
    planted: Callable[..., torch.Tensor] | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the capability of a GPU that has the kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    if planted is not None:
        monkeypatch.setattr(Grouped, "by_rows", planted)
    found = reason_against_grouped.__wrapped__(CPU, torch.bfloat16)
    assert found.startswith(reason) and bool(found) == bool(reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert reason_against_grouped.__wrapped__(CPU, torch.bfloat16) == "no kernel for grouped ones"
