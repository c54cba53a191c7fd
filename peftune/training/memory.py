"""How much memory this process takes, and whether an error means that there was no more."""

from __future__ import annotations

import resource
import sys

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far by this process: allocated on its GPU, else resident in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
