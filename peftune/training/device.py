"""What the device can do: which number formats it multiplies well, and how much memory it has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import psutil
import torch
from transformers import GPT2Config

from peftune.errors import UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]

FIRST_LOSS_SCALE = 16.0
"""fp16 only. Summed nats are differentiated, so a token's gradient is of order one and needs little help."""
_GROWTH_STEPS, _LARGEST_LOSS_SCALE = 200, 65536.0
CPU_TOKENS = 8192  # more a forward gains nothing on a CPU
LIVE_TENSORS = 44  # widths per token and block that autograd keeps, measured on GPT-2 with LoRA on all linear layers


def choose_precision(asked: Precision, on_gpu: bool) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` takes bf16 where the hardware multiplies it, else fp16 on a GPU, else fp32."""
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    if asked == "auto":
        return "bf16" if bf16 else "fp16" if on_gpu else "fp32"
    if asked == "fp16" and not on_gpu:
        raise UserError(
            "run.precision: fp16 needs a GPU (a CPU takes hundreds of times longer); use bf16, fp32 or auto"
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


def first_micro_size(config: GPT2Config, block: int, per_rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Blocks per forward to begin with: all of a rank's share on a GPU (halved on demand), on a CPU what fits.

    A CPU does not report that memory runs out, the process is killed; so activations are kept under two fifths of
    what is available, page cache included.
    """
    if device.type != "cpu":
        return per_rank
    available = psutil.virtual_memory().available
    a_block = block * config.n_layer * config.n_embd * LIVE_TENSORS * dtype.itemsize
    return max(1, min(per_rank, CPU_TOKENS // block, int(0.4 * available) // a_block))


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on a GPU or a CPU, in the words of CUDA, XPU, MPS, Linux and Windows."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


@contextmanager
def report_out_of_memory() -> Iterator[None]:
    """UserError, one line, for an allocation that fails where nothing can be made smaller: the base does not fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory before the first step or between steps; use a smaller base, data.block_size or lora.rank, "
            "or a machine with more memory; what was saved is intact"
        ) from None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far by this process: allocated on its GPU, else resident in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
