"""The elementwise operations between the matrix products of a block, each compiled into one kernel (`run.compile`).

A compiled operation reads and writes its tensors once where torch's operators do so three or four times. Each is
compiled for any number of tokens, so that batches of all shapes share a few graphs: above, at and below the lowest
adapter, and for evaluation. All are compared with the eager ones before the first step. Torch keeps what its compiler
wrote for the next run (TORCHINDUCTOR_CACHE_DIR, by default in peftune's cache) and runs what it finds there. What was
written for other instructions than those in use computes garbage or ends the process, and torch does not tell them
apart: each set of instructions has a directory of its own.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from peftune.cache import cache_directory, private_directory
from peftune.model.train.layers import Elementwise, Norm, added, normed

_TOKENS = 64  # of the trial; a graph for any number of them comes out
_CASES = (((1, 1, 1), True), ((0, 1, 1), True), ((0, 0, 0), True), ((0, 0, 0), False))
"""Which of stream, layer and hidden values ask for a gradient, above, at and below the lowest adapter; autograd on."""
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of values and gradients


def compiled(eager: Elementwise, norm: Norm, inner: int) -> Elementwise:
    """`eager` compiled for streams like those that `norm` takes, or as it is; `description` says why.

    `inner` is the width of what the activation function sees.
    """
    began = time.perf_counter()
    try:
        os.environ[_CACHE_DIR] = str(_kernels())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's compiler about torch
            operations = Elementwise(torch.compile(eager.activated), torch.compile(normed), torch.compile(added))
            worst = max(_difference((operations, eager), norm, inner, asking, keeps) for asking, keeps in _CASES)
    except Exception as error:  # no compiler, or one that fails: a run needs none
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return replace(eager, description=f"not compiled: {first[:200]}")
    if not worst <= _ERROR[norm.dtype]:
        return replace(eager, description=f"not compiled: what the compiler made is off by {worst:.1e}")
    return replace(operations, description=f"elementwise operations compiled in {time.perf_counter() - began:.1f} s")


def _kernels() -> Path:
    """Where torch keeps kernels for the instructions in use here, which ATEN_CPU_CAPABILITY may restrict."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 has no such list
    facts = torch.backends.cpu.get_cpu_capability(), sorted(name for name, has in known.items() if has is True)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    given = os.environ.get(_CACHE_DIR)
    # torch's own default, which it writes there itself, is a name in /tmp that any user can take first
    if given in (None, "", os.path.abspath(default_cache_dir())):
        return private_directory(cache_directory(), "torchinductor", name)
    return Path(given) if Path(given).name == name else Path(given) / name


def _difference(
    both: tuple[Elementwise, Elementwise], norm: Norm, inner: int, asking: tuple[int, ...], keeps: bool
) -> float:
    """The largest relative difference between compiled and eager, of values and gradients, as a block calls them."""
    random, dynamo = torch.Generator().manual_seed(0), cast(Any, torch._dynamo)
    widths = len(norm.weight), len(norm.weight), inner
    given = [torch.randn(_TOKENS, width, generator=random).to(norm.weight.device) for width in widths]
    found: list[list[torch.Tensor]] = []
    for these in both:
        x, more, hidden = (tensor.clone() for tensor in given)
        more, hidden = more.to(norm.dtype), hidden.to(norm.dtype)
        for tensor, asks in zip((x, more, hidden), asking, strict=True):
            tensor.requires_grad_(bool(asks))
            dynamo.mark_dynamic(tensor, 0)  # compile for any number of tokens
        with nullcontext() if keeps else torch.no_grad():
            values = [these.normed(x, norm), *these.added(x, more, norm), these.activated(hidden)]
        leaves = [tensor for tensor in (x, more, hidden) if tensor.requires_grad]
        if leaves:
            kept = [value for value in values if value.requires_grad]
            values += torch.autograd.grad(kept, leaves, [value.detach().sin() for value in kept])
        found.append([value.detach().double() for value in values])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
