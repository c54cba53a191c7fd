"""The machine that figures are from, and what it can do at best: matrix products and memory bandwidth, measured."""

from __future__ import annotations

import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.harness.workers import Channel, Contestant

if TYPE_CHECKING:
    from benchmarks.harness.options import Setup
    from benchmarks.harness.shapes import Shape

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
_PACKAGES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes",
    "litgpt", "peftune",
)  # fmt: skip
LITGPT = (
    "not applicable: litgpt 0.5 has rotary positions only (no learned position embedding in litgpt/model.py, no GPT-2 "
    "among its configurations), so it can neither load a GPT-2 nor compute one's function"
)


def describe() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, GPU, system and versions; nothing that names the machine or its user."""
    import torch

    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }
    return found


def versions() -> dict[str, str]:
    """Installed versions of what is measured and what it stands on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an absent peer is reported where it would have run
    return found


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def products(shape: Shape, rows: int) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the products of a step on this shape: the four linear layers of a block, and a large square.

    The square is what a library does best, so that the peak is the machine's and not that of this model.
    """
    d = shape.width
    return [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d), (2048, 2048, 2048)]


def gemm_peak(sizes: list[tuple[int, int, int]], dtype: str, device: str, repeats: int = 5) -> dict[str, float]:
    """GFLOP/s of each product (median of `repeats`), and `peak`, the best of them."""
    import torch

    rates = {}
    for rows, inner, columns in sizes:
        x = torch.randn(rows, inner, device=device, dtype=getattr(torch, dtype))
        w = torch.randn(inner, columns, device=device, dtype=getattr(torch, dtype))
        seconds = [_timed(lambda x=x, w=w: x @ w, device) for _ in range(repeats + 2)][2:]
        rates[f"{rows}x{inner}x{columns}"] = 2e-9 * rows * inner * columns / statistics.median(seconds)
    return {**rates, "peak": max(rates.values())}


def bandwidth(device: str, megabytes: int = 256, repeats: int = 5) -> float:
    """GB/s of copying a tensor far larger than the caches: bytes read plus bytes written (median)."""
    import torch

    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(lambda: target.copy_(source), device) for _ in range(repeats + 2)][2:]
    return 2e-9 * source.numel() / statistics.median(seconds)


def _timed(work: Any, device: str) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def calibration(setup: Setup) -> Contestant:
    """GEMM peak and bandwidth, measured in the same rounds as what they are compared with."""
    job = {"sizes": products(setup.arguments.shape, 2048), "device": setup.arguments.device}
    return Contestant("calibration", "benchmarks.harness.machine", job, "GFLOP/s")


def worker(job: dict[str, Any], channel: Channel) -> None:
    """A contestant that calibrates: one round measures the GEMM peak in bf16 and fp32 and the bandwidth."""
    sizes = [tuple(size) for size in job["sizes"]]
    channel.ready(settings={"sizes": job["sizes"], "device": job["device"]})
    for _ in channel.rounds():
        bf16 = gemm_peak(sizes, "bfloat16", job["device"])
        fp32 = gemm_peak(sizes, "float32", job["device"])
        channel.answer(value=bf16["peak"], bf16=bf16, fp32=fp32, bandwidth=bandwidth(job["device"]))
