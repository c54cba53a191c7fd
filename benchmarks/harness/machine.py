"""The machine that figures are from, and what it can do at best: matrix products and memory bandwidth, measured."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import psutil
import torch
from torch.utils.benchmark import Timer

from benchmarks.harness.shapes import Shape
from benchmarks.harness.workers import Channel

_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "neon", "bf16", "sve")
_PACKAGES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes",
    "litgpt", "peftune",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """CPU, cores, instruction sets, memory, GPU, system and versions; nothing that names the machine or its user."""
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": cpu.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": len(psutil.Process().cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count(),
        "instructions": [flag for flag in _FLAGS if cpu.get(flag)],
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of what is measured and what it stands on."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def products(shape: Shape, rows: int) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the products of a step on this shape: the four linear layers of a block, and a large square.

    The square is what a library does best, so that the peak is the machine's and not that of this model.
    """
    d = shape.width
    return [(rows, d, 3 * d), (rows, d, d), (rows, d, 4 * d), (rows, 4 * d, d), (2048, 2048, 2048)]


def gemm_peak(sizes: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of each product (median), and `peak`, the best of them."""
    rates = {}
    for rows, inner, columns in sizes:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        w = torch.randn(inner, columns, device=device, dtype=dtype)
        rates[f"{rows}x{inner}x{columns}"] = 2e-9 * rows * inner * columns / seconds_of("x @ w", x=x, w=w)
    return {**rates, "peak": max(rates.values())}


def bandwidth(device: str) -> float:
    """GB/s of copying a tensor far larger than the caches: bytes read plus bytes written (median)."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    return 2e-9 * source.numel() / seconds_of("target.copy_(source)", source=source, target=torch.empty_like(source))


def seconds_of(work: str, **names: torch.Tensor) -> float:
    """Median time, warm, CUDA's own included, on as many threads as this process has."""
    timer = Timer(work, globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.2).median)


def worker(job: dict[str, Any], channel: Channel) -> None:
    """A contestant that calibrates: one round measures the GEMM peak in bf16 and fp32 and the bandwidth."""
    sizes = [tuple(size) for size in job["sizes"]]
    for _ in channel.rounds(sizes=job["sizes"], device=job["device"]):
        bf16 = gemm_peak(sizes, torch.bfloat16, job["device"])
        fp32 = gemm_peak(sizes, torch.float32, job["device"])
        channel.send(value=bf16["peak"], bf16=bf16, fp32=fp32, bandwidth=bandwidth(job["device"]))
