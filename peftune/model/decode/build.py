"""A `DecodeGPT2` out of named tensors, one at a time; where an adapter changes a few, the others are shared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from peftune.model.decode.forward import Activation, Block, DecodeGPT2, Norm
from peftune.model.decode.kv_cache import Cache
from peftune.model.decode.packed_linear import Linear
from peftune.model.weights import HEAD, WTE

if TYPE_CHECKING:
    from transformers import GPT2Config

WPE = "transformer.wpe.weight"
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # three spellings of one function


@dataclass(frozen=True)
class Plan:
    """What does not change with the weights: the architecture, the dtype of the products, where they run."""

    config: GPT2Config
    dtype: torch.dtype
    device: torch.device

    def cache(self, slots: int) -> Cache:
        """Room for so many texts; float32 on a CPU, where narrower keys are slower to read."""
        c = self.config
        dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        return Cache(c.n_layer, slots, c.n_head, c.n_positions, c.n_embd // c.n_head, dtype, self.device)


def build(
    plan: Plan,
    tensor: Callable[[str], torch.Tensor],
    tied: bool,
    shared: DecodeGPT2 | None = None,
    changed: Collection[str] = (),
) -> DecodeGPT2:
    """The model whose tensor NAME is `tensor(NAME)`; with `shared`, all but the `changed` ones are that model's."""

    def new(*names: str) -> bool:
        return shared is None or any(name in changed for name in names)

    def stored(name: str) -> torch.Tensor:
        return tensor(name).to(plan.device, plan.dtype)

    wte = stored(WTE) if new(WTE) else shared.wte  # type: ignore[union-attr]
    head_name = WTE if tied else HEAD
    head = Linear(wte if tied else stored(HEAD), None) if new(head_name) else shared.head  # type: ignore[union-attr]
    blocks = []
    for number in range(plan.config.n_layer):
        names = _names(number)
        old = shared.blocks[number] if shared is not None else None
        blocks.append(_block(plan, tensor, number) if old is None or new(*names) else old)
    return DecodeGPT2(
        wte=wte,
        wpe=stored(WPE) if new(WPE) else shared.wpe,  # type: ignore[union-attr]
        blocks=tuple(blocks),
        ln_f=_norm(plan, tensor, "transformer.ln_f"),
        head=head,
        heads=plan.config.n_head,
        scales=_scales(plan.config),
        activation=_activation(plan.config.activation_function),
    )


def _names(number: int) -> list[str]:
    modules = ("ln_1", "ln_2", *MODULES)
    return [f"transformer.h.{number}.{module}.{part}" for module in modules for part in ("weight", "bias")]


def _block(plan: Plan, tensor: Callable[[str], torch.Tensor], number: int) -> Block:
    where = f"transformer.h.{number}"

    def linear(module: str) -> Linear:
        weight, bias = (tensor(f"{where}.{module}.{part}") for part in ("weight", "bias"))
        return Linear(weight.to(plan.device, plan.dtype).T.contiguous(), bias.to(plan.device))  # stored as (in, out)

    c_attn, attn_c_proj, c_fc, mlp_c_proj = (linear(module) for module in MODULES)
    ln_1, ln_2 = (_norm(plan, tensor, f"{where}.{name}") for name in ("ln_1", "ln_2"))
    return Block(number, ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj)


def _norm(plan: Plan, tensor: Callable[[str], torch.Tensor], name: str) -> Norm:
    weight, bias = (tensor(f"{name}.{part}").to(plan.device, torch.float32) for part in ("weight", "bias"))
    return Norm(weight, bias, plan.config.layer_norm_epsilon)


def _scales(config: GPT2Config) -> tuple[float, ...]:
    width = config.n_embd // config.n_head
    whole = width**-0.5 if config.scale_attn_weights else 1.0
    by_block = config.scale_attn_by_inverse_layer_idx
    return tuple(whole / (number + 1) if by_block else whole for number in range(config.n_layer))


def _activation(name: str) -> Activation:
    if name in _TANH_GELU:
        return partial(F.gelu, approximate="tanh")
    from transformers.activations import ACT2FN

    return ACT2FN[name]  # type: ignore[no-any-return]
