"""How many blocks a forward starts with when the recipe says `auto`."""

from __future__ import annotations

import os

import torch
from transformers import GPT2Config

CPU_TOKENS = 8192  # more a forward gains nothing on a CPU
LIVE_TENSORS = 44  # widths per token and block that autograd keeps, measured on GPT-2 with LoRA on all linear layers


def first_micro_size(config: GPT2Config, block: int, per_rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Blocks per forward to begin with: all of a rank's share on a GPU (halved on demand), on a CPU what fits.

    A CPU does not report that memory runs out, it is killed; so activations are kept under two fifths of what is free.
    """
    if device.type != "cpu":
        return per_rank
    a_block = block * config.n_layer * config.n_embd * LIVE_TENSORS * dtype.itemsize
    return max(1, min(per_rank, CPU_TOKENS // block, int(0.4 * _free_bytes()) // a_block))


def _free_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 8 << 30  # the system does not say
