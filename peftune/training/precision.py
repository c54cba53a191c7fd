"""Number formats: which one the hardware multiplies well, and what fp16 needs so that gradients fit into it."""

from __future__ import annotations

from typing import Literal

import torch

from peftune.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

FIRST_LOSS_SCALE = 16.0
"""fp16 only. Summed nats are differentiated, so a token's gradient is of order one and needs little help."""
_GROWTH_STEPS, _LARGEST_LOSS_SCALE = 200, 65536.0


def choose_precision(asked: Precision, on_gpu: bool) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` takes bf16 where the hardware multiplies it, else fp16 on a GPU, else fp32."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    if asked == "auto":
        return "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    if asked == "fp16" and not on_gpu:
        raise UserError(
            "run.precision: fp16 needs a GPU (a CPU computes it hundreds of times slower); use bf16, fp32 or auto"
        )
    if asked == "bf16" and on_gpu and not bf16:
        raise UserError("run.precision: this GPU has no bf16; use fp16, fp32 or auto")
    return asked


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512_BF16 or AMX on x86, BF16 on Arm); emulation would be slow."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities.startswith("AVX"):
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return bool(getattr(torch.cpu, "_is_arm_bf16_supported", bool)())


def next_loss_scale(scale: float, step: int) -> float:
    """fp16's scale after a step that went well: doubled now and then. One that overflows is halved and repeated."""
    return min(_LARGEST_LOSS_SCALE, 2 * scale) if (step + 1) % _GROWTH_STEPS == 0 else scale
