"""A CUDA graph in software: operations are recorded with their tensors, and repeated on the same tensors.

As with a graph of CUDA, what Python computed while recording stays as it was, only what lies in the tensors counts,
each replay writes into the same memory, and nothing may read the numbers while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive",
    "unique_dim", "repeat_interleave", "histc",
    "item", "is_nonzero", "allclose",
}  # fmt: skip
"""Operations whose result the host waits for; those of the last line are seen in inference mode only."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What happens while it is entered, to be repeated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{func.overloadpacket.__name__}: operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """Each operation once more, its result where it was."""
        for func, args, kwargs, made in self._calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """As `captured_steps.CUDARecorder` does it."""
    function()
    with Recording() as recording:
        output = function()
    return recording.replay, output
