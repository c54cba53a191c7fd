"""Adapters of microsoft/LoRA's `loralib`, as PEFT's LoRA: what `lora_state_dict` saves of a GPT-2.

`MergedLinear` adapts parts of c_attn (queries, keys, values) by factors of their own: A (parts·r, in) stacks those of
the parts, B (parts·width, r) is the weight of a 1d convolution in groups, one for each part. One LoRA of rank parts·r
computes the same: A as it is, B block-diagonal, zero in the rows of other parts; alpha/r stays what it was
(https://github.com/microsoft/LoRA, loralib/layers.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peftune.adapters.low_rank import LowRankDelta
from peftune.errors import UserError
from peftune.model.pickles import checked_tensors, unpickle
from peftune.model.train.attention_parts import PARTS, QUERY_VALUE, places_of
from peftune.model.weights import all_finite

_NAME = re.compile(
    r"(?:module\.)?(?:transformer\.)?h\.(?P<block>\d{1,4})\."
    r"(?P<suffix>attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.lora_(?P<part>[AB])"
)
Factors = dict[str, torch.Tensor]


def read_loralib(file: Path) -> dict[str, Factors]:
    """A and B by the module's name in a GPT-2, float32; UserError for a file that holds anything else."""
    state: Any = unpickle(file)
    if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
        state = state["model_state_dict"]  # as microsoft/LoRA's examples write it
    modules: dict[str, Factors] = {}
    for name, tensor in checked_tensors(state, file).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{file}: holds {name[:80]!r}; expected nothing but A and B of a GPT-2's blocks, such as "
                "transformer.h.0.attn.c_attn.lora_A; save the adapter alone, without biases (lora_state_dict)"
            )
        module = modules.setdefault(f"transformer.h.{int(match['block'])}.{match['suffix']}", {})
        if match["part"] in module:
            raise UserError(f"{file}: {name} is there twice, under two prefixes; save the adapter again")
        if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point() or not all_finite(tensor):
            raise UserError(f"{file}: {name} is no matrix of finite numbers; expected A (rank, in) or B (out, rank)")
        module[match["part"]] = tensor.float().contiguous()
    if not modules:
        raise UserError(f"{file}: holds no tensors; expected an adapter of loralib")
    for name, factors in modules.items():
        if len(factors) != 2:
            raise UserError(f"{file}: {name} has no lora_{'B' if 'A' in factors else 'A'}; copy the complete file")
    return modules


def rank_of(modules: dict[str, Factors], file: Path) -> int:
    """loralib's r, which one alpha is divided by; UserError where modules differ in it."""
    ranks = {factors["B"].shape[1] for factors in modules.values()}
    if len(ranks) != 1:
        raise UserError(f"{file}: ranks {sorted(ranks)}; expected one, for loralib divides one alpha by it")
    return ranks.pop()


def delta_of_factors(name: str, factors: Factors, parts: Sequence[str] | None, file: Path) -> LowRankDelta:
    """One module's update at scale 1, as factors of one LoRA; `parts` of c_attn as `MergedLinear` was told, or None.

    None is queries and values for two parts (`enable_lora=[True, False, True]`), all for three. Raises UserError where
    the shapes are not those of loralib.
    """
    a, b = factors["A"], factors["B"]
    rank, width = b.shape[1], a.shape[1]
    found = f"{file}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}"
    if a.shape[0] == rank and not (name.endswith("c_attn") and b.shape[0] != 3 * width):
        return LowRankDelta(name, "conv1d", b.double(), a.double())
    groups, rest = divmod(a.shape[0], rank)
    if not name.endswith("c_attn") or rest or not 1 <= groups <= 3 or b.shape[0] != groups * width:
        raise UserError(f"{found}; expected (parts·r, width) and (parts·width, r), with 1, 2 or 3 parts for c_attn")
    chosen = parts if parts is not None else {2: QUERY_VALUE, 3: PARTS}.get(groups)
    if chosen is None or len(chosen) != groups:
        told = f"{', '.join(chosen)} given" if chosen else "the file does not say which"
        raise UserError(f"{found}: {groups} of queries, keys and values are adapted, {told}; name {groups} of q, k, v")
    left = torch.zeros(3 * width, groups * rank, dtype=torch.float64)
    for group, place in enumerate(places_of(chosen, rank, width)):
        left[place] = b[group * width : (group + 1) * width].double()
    return LowRankDelta(name, "conv1d", left, a.double())


def parts_of(text: str | None) -> tuple[str, ...] | None:
    """`q,v` as parts in the order of c_attn; UserError for anything else."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not names or len(set(names)) != len(names) or not set(names) <= set(PARTS):
        raise UserError(f"parts {text[:40]!r}: expected some of q, k, v with commas between, such as q,v")
    return tuple(part for part in PARTS if part in names)
