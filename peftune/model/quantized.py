"""Bases in 8 or 4 bits: the only module that uses bitsandbytes, which quantises and unpacks; peftune multiplies.

The linear layers of the blocks are stored quantised and nothing else is. What is computed is x·Ŵᵀ + b with the unpacked
Ŵ, rounded to the dtype of the run, in training and evaluation and on every device alike. The library's own products
are other functions of the same weights: its int8 one rounds activations as well (on GPUs always, on CPUs in evaluation
mode alone) and picks outlier columns over a whole batch, so that a loss would depend on what else is in the batch; its
4-bit one repacks weights in evaluation mode on some CPUs, and training cannot go on after that.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from peftune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["int8", "nf4"]
MISSING = "bitsandbytes is not installed; pip install 'peftune[quant]'"


LIBRARIES = ("bitsandbytes",)
"""Distributions that compute with a quantised base."""


def is_available() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def require(kind: Kind | None) -> None:
    """UserError where a quantised base is asked for and bitsandbytes is not installed."""
    if kind is not None and not is_available():
        raise UserError(f"quantize: {kind} needs bitsandbytes; pip install 'peftune[quant]'")


def versions(kind: Kind | None) -> dict[str, str]:
    """Version of the library that packed the base, by its name; nothing where it was not packed."""
    return {} if kind is None else {"bitsandbytes": version("bitsandbytes")}


def quiet() -> None:
    """Keep one line off the screen that bitsandbytes logs when anything imports it, as PEFT does where it is installed.

    It misses an optional package with a product in 4 bits for CPUs; peftune does not use that product.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def loading_options(kind: Kind, device: str | torch.device) -> dict[str, Any]:
    """What Transformers' `from_pretrained` needs to quantise the linear layers of the blocks, one tensor at a time."""
    from transformers import BitsAndBytesConfig

    quiet()
    int8, nf4 = {"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    bits: dict[str, Any] = int8 if kind == "int8" else nf4
    settings = BitsAndBytesConfig(**bits, llm_int8_skip_modules=["lm_head"])  # type: ignore[no-untyped-call]
    return {"quantization_config": settings, "device_map": {"": device}}


def multiply_unpacked(model: nn.Module) -> None:
    """Let every quantised layer of a model compute x·Ŵᵀ + b instead of what bitsandbytes makes of it."""
    for module in model.modules():
        if is_quantized(module):
            module.forward = partial(_forward, module)


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    from peftune.model.frozen_linear import frozen_linear

    return frozen_linear(x, lambda dtype: unpacked(module, dtype), module.bias)  # type: ignore[arg-type]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module itself (not one inside it) stores its weight in 8 or 4 bits."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return type(weight).__name__ in ("Int8Params", "Params4bit")


def unpacked(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Ŵ (out, in) of a quantised layer, float32 or rounded once to `dtype`."""
    return _unpack(module.weight, dtype)


def _unpack(weight: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """In one kernel that writes `dtype`: unpacked to float32 first, several times as much memory would be moved."""
    import torch

    dtype = dtype or torch.float32
    if type(weight).__name__ == "Int8Params":
        scales = (weight.SCB / 127)[:, None]
        return torch.mul(weight.data, scales, out=torch.empty_like(weight.data, dtype=dtype))
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    state.dtype = dtype
    return functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]


def rounded(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Ŵ (in, out), float32, of a block's weight as checkpoints hold it: what a loaded quantised base computes with."""
    from bitsandbytes.nn import Int8Params, Params4bit

    out_in, nf4 = weight.float().T.contiguous(), {"quant_type": "nf4", "compress_statistics": False}
    make = Int8Params if kind == "int8" else partial(Params4bit, **nf4)
    packed = make(out_in, requires_grad=False)
    return _unpack(packed.to(weight.device)).T


def constants(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What a quantised parameter needs beside its bits: scales, and the table of 4-bit values."""
    state = getattr(parameter, "quant_state", None)
    found = getattr(parameter, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None)
    return [tensor for tensor in found if tensor is not None]


def elements(parameter: torch.Tensor) -> int:
    """Number of weights that a parameter stands for, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel() if state is not None else parameter.numel())
