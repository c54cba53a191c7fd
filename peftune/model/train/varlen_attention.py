"""Flash attention over documents that lie end to end, where torch and the GPU have it: nothing is moved or padded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from peftune.device import is_out_of_memory
from peftune.errors import first_line
from peftune.model.train.layers import to_device

TOLERANCE = 0.05  # of values about 1 in 8 or 11 bits; a kernel that leaks or turns things round is off by about 1


def plan(lengths: np.ndarray, heads: int, device: torch.device) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """Attention for documents of these lengths: qkv (N, 3·H·W) and a scale of the scores to (N, H·W)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = to_device(torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)), device)
    longest = int(lengths.max())

    def attend(qkv: torch.Tensor, scale: float) -> torch.Tensor:
        q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
        causal = (-1, 0)  # no key to the right
        result = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=causal)
        return result.flatten(1)  # type: ignore[union-attr]

    return attend


def reason_against(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why this kernel is not taken; empty where it gives SDPA's outputs and gradients on three short documents."""
    if device.type != "cuda":
        return "it is for NVIDIA GPUs"
    if dtype == torch.float32:
        return "it has no fp32"
    lengths, heads = np.array([5, 1, 9]), 2
    numbers = torch.Generator().manual_seed(0)
    qkv = torch.randn(15, 3 * heads * width, generator=numbers).to(device, dtype).requires_grad_()
    upstream = torch.randn(15, heads * width, generator=numbers).to(device, dtype)
    try:
        found = plan(lengths, heads, device)(qkv, 1 / width)
        (d_found,) = torch.autograd.grad(found, qkv, upstream)
    except (ImportError, RuntimeError, TypeError) as error:  # an older torch or GPU
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    wanted = torch.cat([_by_sdpa(part, heads, 1 / width) for part in torch.split(qkv, lengths.tolist())])
    (d_wanted,) = torch.autograd.grad(wanted, qkv, upstream)
    off = [(a - b).abs().max().item() for a, b in ((found, wanted), (d_found, d_wanted))]
    return "" if all(each < TOLERANCE for each in off) else f"it is off by {off[0]:.2g}, its gradient by {off[1]:.2g}"


def _by_sdpa(qkv: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    q, k, v = qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).flatten(1)
