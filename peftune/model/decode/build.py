"""A `DecodeGPT2` out of named tensors, one at a time; where an adapter changes a few, the others are shared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from peftune.model.architecture import activation, attention_scales
from peftune.model.decode.batch_invariance import by_row
from peftune.model.decode.forward import Activation, DecodeBlock, DecodeGPT2, Norm
from peftune.model.decode.kv_cache import KVCache
from peftune.model.decode.packed_linear import PackedLinear
from peftune.model.weights import HEAD, WTE

if TYPE_CHECKING:
    from transformers import GPT2Config

WPE = "transformer.wpe.weight"
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_ACTIVATION_DRAWS = 16  # the ends of a vectorised loop use other code, whose bits differ for one number in some tens


@dataclass(frozen=True)
class ModelSpec:
    """What does not change with the weights: the architecture, the dtype of the products, and the device."""

    config: GPT2Config
    dtype: torch.dtype
    device: torch.device

    @property
    def activations(self) -> torch.dtype:
        """What layers, keys, values and LoRA's A and B hold: float32 on a CPU, where narrower ones are slower to read.

        Frozen products are made in `dtype` all the same.
        """
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def kv_cache(self, slots: int, positions: int | None = None) -> KVCache:
        """A cache for so many texts of so many `positions` (None: as many as the model has)."""
        return KVCache(self.config, slots, self.activations, self.device, positions)


def build(
    spec: ModelSpec,
    tensor: Callable[[str], torch.Tensor],
    tied: bool,
    shared: DecodeGPT2 | None = None,
    changed: Collection[str] = (),
) -> DecodeGPT2:
    """The model whose tensor NAME is `tensor(NAME)`; with `shared`, all but the `changed` ones are that model's."""

    def unchanged(prefix: str) -> DecodeGPT2 | None:
        """The model to share with, where no tensor under this name is another."""
        return None if any(name.startswith(prefix) for name in changed) else shared

    def stored(name: str) -> torch.Tensor:
        return tensor(name).to(spec.device, spec.dtype)

    config, prefixes = spec.config, [f"transformer.h.{number}." for number in range(spec.config.n_layer)]
    wte = kept.wte if (kept := unchanged(WTE)) else stored(WTE)
    return DecodeGPT2(
        wte=wte,
        wpe=kept.wpe if (kept := unchanged(WPE)) else stored(WPE),
        blocks=tuple(
            kept.blocks[number] if (kept := unchanged(prefix)) else _block(spec, tensor, number, prefix)
            for number, prefix in enumerate(prefixes)
        ),
        ln_f=_norm(spec, tensor, "transformer.ln_f"),
        head=kept.head
        if (kept := unchanged(WTE if tied else HEAD))
        else PackedLinear(wte if tied else stored(HEAD), None),
        heads=config.n_head,
        scales=tuple(attention_scales(config)),
        activation=_activation(spec),
    )


def _block(spec: ModelSpec, tensor: Callable[[str], torch.Tensor], number: int, prefix: str) -> DecodeBlock:
    def linear(module: str) -> PackedLinear:
        weight, bias = (tensor(f"{prefix}{module}.{part}") for part in ("weight", "bias"))
        return PackedLinear(weight.to(spec.device, spec.dtype).T.contiguous(), bias.to(spec.device))  # stored (in, out)

    c_attn, attn_c_proj, c_fc, mlp_c_proj = map(linear, MODULES)
    ln_1, ln_2 = (_norm(spec, tensor, f"{prefix}{name}") for name in ("ln_1", "ln_2"))
    return DecodeBlock(number, ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj)


def _norm(spec: ModelSpec, tensor: Callable[[str], torch.Tensor], name: str) -> Norm:
    weight, bias = (tensor(f"{name}.{part}").to(spec.device, torch.float32) for part in ("weight", "bias"))
    eps = spec.config.layer_norm_epsilon
    norm = partial(F.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=eps)
    if spec.device.type == "cpu":
        return partial(by_row, "norm", norm)
    return lambda x: norm(x).to(spec.activations)


def _activation(spec: ModelSpec) -> Activation:
    name = spec.config.activation_function
    function: Activation = activation(name)
    on_cpu = spec.device.type == "cpu"
    return partial(by_row, f"activation {name}", function, draws=_ACTIVATION_DRAWS) if on_cpu else function
