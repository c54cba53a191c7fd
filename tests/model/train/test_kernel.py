"""Which attention kernel is taken on a GPU, and that one which is lost is told of, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peftune.model.train import attention, varlen_attention
from peftune.model.train.attention import kernel_for


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that says that it is a GPU; tensors stay on the CPU."""
    to, device = torch.Tensor.to, SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *given: to(tensor, *(g for g in given if g is not device)))
    return device


def _flash(wrong: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """In the place of `varlen_attention.plan`: the right answer, and what is made of it."""

    def plan(lengths: np.ndarray, heads: int, device: Any) -> Any:
        return lambda qkv, scale: wrong(attention._fused(lengths, heads, torch.device("cpu"))(qkv, scale))

    return plan


def _raises(error: Exception) -> Any:
    def plan(*_: object) -> Any:
        raise error

    return plan


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (_flash(lambda right: right), "flash attention, documents end to end"),
        (_flash(lambda right: right.flip(0)), r"SDPA on rectangles, without flash attention: it is off by \d"),
        (_flash(lambda right: right * torch.nan), "without flash attention: it is off by nan, its gradient by nan"),
        (_raises(TypeError("varlen_attn() got an unexpected keyword 'window_size'\nmore")), r": TypeError: .*_size'$"),
        (_raises(ImportError("cannot import name 'varlen_attn'")), ": ImportError: cannot import name"),
        (_raises(RuntimeError("FlashAttention only supports Ampere GPUs or newer.")), ": RuntimeError: FlashAttention"),
    ],
)
def test_a_lost_flash_kernel_is_named_with_its_reason(
    plan: Any, name: str, pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's name stands in the start line."""
    monkeypatch.setattr(varlen_attention, "plan", plan)
    assert re.search(name, kernel_for(pretended, torch.bfloat16, 64).name)
    assert "it has no fp32" in kernel_for(pretended, torch.float32, 64).name


def test_a_gpu_without_memory_for_the_trial_of_a_kernel_has_not_lost_it(
    pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_attention, "plan", _raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        kernel_for(pretended, torch.bfloat16, 64)
