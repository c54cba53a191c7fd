"""What torch finds here, as JSON on stdout; a program of its own, for a driver may crash it or never answer.

`python -m peftune.cli.checks.torch_facts` lists CPU and GPUs; with a number it runs a kernel on that GPU.
"""

from __future__ import annotations

import json
import sys

import torch

from peftune.device import choose_precision, cpu_multiplies_bf16, nvidia_driver, why_no_gpu, why_no_kernel


def _facts() -> dict[str, object]:
    gpus = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        gpus.append({"name": found.name, "capability": f"{found.major}.{found.minor}", "bytes": found.total_memory})
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bf16": cpu_multiplies_bf16(),
        "threads": torch.get_num_threads(),
        "driver": nvidia_driver(),
        "no_gpu": why_no_gpu(),
        "gpus": gpus,
    }


def _kernel(number: int) -> dict[str, object]:
    """Whether a product of matrices on a GPU is what the CPU says, in the precision that training would take."""
    torch.cuda.set_device(number)
    if reason := why_no_kernel(torch.device("cuda", number)):
        sys.exit(f"peftune: {reason}")
    precision = choose_precision("auto", on_gpu=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    error = ((x.to("cuda", dtype) @ x.to("cuda", dtype)).float().cpu() - x @ x).norm() / (x @ x).norm()
    return {"precision": precision, "relative_error": float(error)}


if __name__ == "__main__":
    print(json.dumps(_kernel(int(sys.argv[1])) if len(sys.argv) > 1 else _facts()))
