"""llama.cpp's place in tests: a GGUF file read with the format's own reader, and computed as its graph of a GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors of a file, by the format's own reader."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = values.reshape([int(size) for size in reversed(tensor.shape)])
    return fields, tensors


def logits_of(
    ids: torch.Tensor, fields: dict[str, Any], tensors: dict[str, np.ndarray], lora: dict[str, np.ndarray]
) -> torch.Tensor:
    """Logits (tokens, vocabulary) by llama.cpp's graph, in float64: matrices (out, in), scores times 1/√head width."""

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(tensors[name].astype(np.float64))

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ get(f"{name}.weight").T + get(f"{name}.bias")
        if f"{name}.weight.lora_a" in lora:
            a, b = (torch.from_numpy(lora[f"{name}.weight.lora_{part}"].astype(np.float64)) for part in "ab")
            y = y + (x @ a.T) @ b.T
        return y

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), fields["gpt2.attention.layer_norm_epsilon"]
        )

    heads, blocks = fields["gpt2.attention.head_count"], fields["gpt2.block_count"]
    x = get("token_embd.weight")[ids] + get("position_embd.weight")[: len(ids)]
    for block in range(blocks):
        qkv = linear(norm(x, f"blk.{block}.attn_norm"), f"blk.{block}.attn_qkv")
        q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + linear(attended, f"blk.{block}.attn_output")
        hidden = F.gelu(linear(norm(x, f"blk.{block}.ffn_norm"), f"blk.{block}.ffn_up"), approximate="tanh")
        x = x + linear(hidden, f"blk.{block}.ffn_down")
    return norm(x, "output_norm") @ get("output.weight" if "output.weight" in tensors else "token_embd.weight").T
