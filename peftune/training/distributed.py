"""Ranks, devices and number formats: the one door to Accelerate (and, from there, to sharding engines)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from peftune.errors import UserError
from peftune.model.base import DTYPES

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def start(precision: Precision, trackers: list[str], folder: str) -> tuple[Accelerator, torch.dtype]:
    """An accelerator for this process and the number format of the frozen weights and matrix products.

    Raises UserError where the hardware lacks the precision asked for, or a tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    _refuse_missing_trackers(trackers)
    on_gpu = torch.cuda.is_available()
    chosen = choose_precision(precision, on_gpu)
    AcceleratorState._reset_state()  # an earlier run of this process may have used another precision
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="no" if chosen == "fp32" else chosen,
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    return accelerator, DTYPES[chosen]


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


def _refuse_missing_trackers(trackers: list[str]) -> None:
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    missing = [name for name in trackers if name not in available]
    if missing:
        raise UserError(f"run.track: {', '.join(missing)} not installed; pip install 'peftune[track]', or leave it out")


def summed_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    here = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(here, reduction="sum").tolist()  # type: ignore[no-any-return]


def is_out_of_memory(error: BaseException) -> bool:
    """True for an allocation that failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def peak_memory(accelerator: Accelerator) -> int:
    """Most bytes held so far by this process: allocated on its GPU, else resident in main memory."""
    if accelerator.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(accelerator.device))
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
