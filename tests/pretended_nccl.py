"""NCCL, pretended on CPUs: ranks that believe to have a GPU each talk through gloo, and are held to what NCCL takes.

NCCL sends what lies on the rank's own GPU, laid out without gaps, and nothing else. What this cannot see: time, ranks
that deadlock because they enqueue in different orders on several streams, and NCCL's own errors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pretended_cuda import PretendedCUDA
from torch.utils._pytree import tree_leaves

_OF_TENSORS = (
    "all_reduce", "broadcast", "reduce", "all_gather", "gather", "scatter", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all_single", "send", "recv",
)  # fmt: skip
_OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


def pretend_nccl(patch: pytest.MonkeyPatch, cuda: PretendedCUDA) -> Counter[str]:
    """Let `torch.distributed` have NCCL while `patch` lasts; the counter says how often each collective was called."""
    called: Counter[str] = Counter()
    begin = torch.distributed.init_process_group
    barrier = torch.distributed.barrier

    def init_process_group(backend: str | None = None, **named: Any) -> None:
        if backend != "nccl":
            cuda.refuse(f"ranks on GPUs begin with backend {backend}")
        begin("gloo", **{key: value for key, value in named.items() if key != "device_id"})

    def of_tensors(name: str) -> Any:
        function = getattr(torch.distributed, name)

        def call(*given: Any, **named: Any) -> Any:
            called[name] += 1
            for tensor in (t for t in tree_leaves((given, named)) if isinstance(t, torch.Tensor)):
                if not cuda.holds(tensor):
                    cuda.refuse(f"{name} of a tensor on the CPU, {tuple(tensor.shape)}")
                if not tensor.is_contiguous():
                    cuda.refuse(f"{name} of a tensor with gaps, {tuple(tensor.shape)}")
            with cuda.one_kernel(name):
                return function(*given, **named)

        return call

    def of_objects(name: str) -> Any:
        function = getattr(torch.distributed, name)

        def call(*given: Any, **named: Any) -> Any:
            called[name] += 1
            cuda.wait(name)
            before, cuda.paused = cuda.paused, True
            try:
                return function(*given, **named | ({"device": None} if "device" in named else {}))
            finally:
                cuda.paused = before

        return call

    def wait_for_all(*_: Any, **__: Any) -> None:
        called["barrier"] += 1
        barrier()

    patch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    patch.setattr(torch.distributed, "init_process_group", init_process_group)
    patch.setattr(torch.distributed, "barrier", wait_for_all)
    for name in _OF_TENSORS:
        patch.setattr(torch.distributed, name, of_tensors(name))
    for name in _OF_OBJECTS:
        patch.setattr(torch.distributed, name, of_objects(name))
    return called
