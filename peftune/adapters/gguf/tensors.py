"""A GPT-2's tensors, and a LoRA's, as llama.cpp holds them: names, orientation, and what its graph leaves out.

A block's matrix is stored (in, out), in GGUF (out, in). A LoRA's A (rank, in) and B (out, rank) are PEFT's own, for
every kind of layer: nothing of an adapter is transposed. The graph multiplies queries with keys by 1/√head width and
nothing else, so another scale is folded into the rows that make the queries; it does not change what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GPT2Config

from peftune.adapters.layout import AdapterLayout
from peftune.errors import UserError
from peftune.model.architecture import TANH_GELU, attention_scales
from peftune.model.base import Base
from peftune.model.weights import HEAD

_MODULES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_OUTER = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its name there, its shape, and its float32 values, read when they are asked for."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]


def gguf_name(module: str) -> str:
    """llama.cpp's name of a module."""
    if module == "lm_head":
        return "output"
    block = _BLOCK.fullmatch(module)
    return f"blk.{block[1]}.{_MODULES[block[2]]}" if block else _OUTER[module.removeprefix("transformer.")]


def check_graph(config: GPT2Config) -> None:
    """UserError where llama.cpp's graph of a GPT-2 does not compute what this model does."""
    if config.activation_function not in TANH_GELU:
        raise UserError(
            f"activation_function {config.activation_function} cannot be written as GGUF: "
            "llama.cpp computes GPT-2 with gelu_new alone, and would answer with other words"
        )


def query_factor(config: GPT2Config, block: int) -> float:
    """What the queries of a block are multiplied with so that scores scaled by 1/√head width are the model's own."""
    return float(attention_scales(config)[block] * (config.n_embd // config.n_head) ** 0.5)


def base_tensors(base: Base) -> Iterator[GgufTensor]:
    """Every tensor of a checkpoint; of a tied head there is none, for llama.cpp takes the embedding."""
    for name in base.weights.names():
        if name == HEAD and base.weights.tied:
            continue
        module, _, kind = name.rpartition(".")
        shape = base.weights.shape(name)
        is_conv1d = len(shape) == 2 and _BLOCK.fullmatch(module) is not None
        shape = shape[::-1] if is_conv1d else shape
        yield GgufTensor(f"{gguf_name(module)}.{kind}", shape, partial(_values, base, name, is_conv1d))


def _values(base: Base, name: str, is_conv1d: bool) -> torch.Tensor:
    tensor = base.weights.tensor(name).float()
    return _with_query_factor(tensor.T if is_conv1d else tensor, name, base.config)


def _with_query_factor(tensor: torch.Tensor, name: str, config: GPT2Config) -> torch.Tensor:
    """The rows of c_attn that make queries, the first third, times the block's factor."""
    block = _BLOCK.fullmatch(name)
    if block is None or not block[2].startswith("attn.c_attn"):
        return tensor
    factor = query_factor(config, int(block[1]))
    if factor == 1.0:
        return tensor
    tensor = tensor.clone()
    tensor[: config.n_embd] = (tensor[: config.n_embd].double() * factor).float()
    return tensor


def lora_tensors(layout: AdapterLayout, base: Base, where: str) -> Iterator[GgufTensor]:
    """A and B of every adapted module, the scale of each folded into its B.

    Raises UserError, in which the adapter is called `where`, for what llama.cpp's adapters cannot say.
    """
    unsaid = {
        "DoRA": layout.dora,
        "an adapted head beside a tied embedding": "lm_head" in layout.targets and base.weights.tied,
        "biases": layout.lora_bias,
        "modules trained in full": bool(layout.replaced),
        "rows of single tokens": bool(layout.rows),
        "PiSSA's change of the base": any(target.pissa for target in layout.targets.values()),
        "an adapted embedding": any(target.kind == "embedding" for target in layout.targets.values()),
    }
    if found := [name for name, is_there in unsaid.items() if is_there]:
        raise UserError(
            f"adapter {where}: has {found[0]}, which GGUF cannot hold; merge it, and export the merged model"
        )
    for name, target in layout.targets.items():
        a = target.parts["lora_A.weight"].float()
        b = (target.parts["lora_B.weight"].double() * target.scale).float()
        b = _with_query_factor(b, name, base.config)
        for part, tensor in ((f"{gguf_name(name)}.weight.lora_a", a), (f"{gguf_name(name)}.weight.lora_b", b)):
            yield GgufTensor(part, tuple(tensor.shape), partial(torch.Tensor.float, tensor))
