"""GPT-2 as it is served: the rows of a batch have their own texts, lengths, positions and adapters.

Packed weights, a cache of keys and values by slot, and no autograd. On a CPU a row's numbers do not depend, to the last
bit, on the rows beside it: what sums goes through `by_row`, or is computed row by row. Sums of two numbers, products
of two and roundings are exact in this sense already. On a GPU rows are computed together, layers hand on the dtype of
their products, and one token a row is a step of fixed shapes, which can be recorded; the stream is float32 on both.

Legend: R rows, T tokens of each, D width, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from peftune.model.decode.batch_invariance import by_row, holds
from peftune.model.decode.kv_cache import KVCache, consecutive, runs_of
from peftune.model.decode.lora_slots import LoraFactors, add_lora
from peftune.model.decode.lora_stack import Factors, ModulePath
from peftune.model.decode.packed_linear import PackedLinear
from peftune.model.train.layers import to_device


@dataclass(frozen=True)
class DecodeBlock:
    """Attention and a perceptron of two layers, each added to the stream."""

    number: int
    ln_1: Norm
    c_attn: PackedLinear
    attn_c_proj: PackedLinear
    ln_2: Norm
    c_fc: PackedLinear
    mlp_c_proj: PackedLinear

    def __call__(self, x: torch.Tensor, lora: LoraFactors, attend: Attend, activation: Activation) -> torch.Tensor:
        """The stream (R, T, D) after this block."""
        normed = self.ln_1(x)
        qkv = add_lora(self.c_attn(normed), normed, lora.get((self.number, "attn.c_attn")))
        attended = attend(self.number, qkv)
        x = x + add_lora(self.attn_c_proj(attended), attended, lora.get((self.number, "attn.c_proj")))
        normed = self.ln_2(x)
        hidden = activation(add_lora(self.c_fc(normed), normed, lora.get((self.number, "mlp.c_fc"))))
        return x + add_lora(self.mlp_c_proj(hidden), hidden, lora.get((self.number, "mlp.c_proj")))


Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of the block and its qkv (R, T, 3·D) to the attended values (R, T, D)."""

Norm = Callable[[torch.Tensor], torch.Tensor]
"""LayerNorm in float32, its weight and bias in it; on a GPU the result is rounded to the dtype of the products."""

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class DecodeGPT2:
    """`scales` holds, for each block, what a query is multiplied with before it meets the keys."""

    wte: torch.Tensor
    wpe: torch.Tensor
    blocks: tuple[DecodeBlock, ...]
    ln_f: Norm
    head: PackedLinear
    heads: int
    scales: tuple[float, ...]
    activation: Activation

    def prefill(
        self, ids: torch.Tensor, start: int, cache: KVCache | None, slots: Sequence[int], lora: LoraFactors
    ) -> torch.Tensor:
        """Hidden states (R, T, D) after `ln_f` of the tokens `ids` (R, T) at positions `start` to `start` + T.

        All positions before `start` are in the slots of the cache, which takes up the new ones. Without a cache
        `start` is 0. Padding may follow a row's tokens: its results mean nothing, and what it leaves in the cache is
        overwritten before it is read.
        """
        width, last, device = ids.shape[1], start + ids.shape[1], self.wte.device
        rows = to_device(torch.tensor(slots), device)
        mask = torch.ones(width, last, dtype=torch.bool, device=device).tril_(start) if start else None

        alone = [slice(row, row + 1) for row in range(len(rows))]  # where the kernel's last bits depend on the batch
        parts = alone if self.on_cpu else [slice(0, len(rows))]
        used = [consecutive(slots[part]) or rows for part in parts]

        def attend(block: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = self._split(qkv)
            if cache is not None:
                cache.keys[block][rows, :, start:last] = k.to(cache.keys[block].dtype)
                cache.values[block][rows, :, start:last] = v.to(cache.values[block].dtype)
            outputs = []
            for part, here in zip(parts, used, strict=True):
                keys, values = k[part], v[part]
                if mask is not None and cache is not None:
                    keys, values = cache.keys[block][here, :, :last], cache.values[block][here, :, :last]
                attended = F.scaled_dot_product_attention(
                    q[part].to(keys.dtype), keys, values, mask, is_causal=mask is None, scale=self.scales[block]
                )
                outputs.append(attended.transpose(1, 2).flatten(2))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        return self._forward(F.embedding(ids, self.wte) + self.wpe[start:last], lora, attend)

    def decode(
        self, ids: torch.Tensor, positions: Sequence[int], cache: KVCache, slots: Sequence[int], lora: LoraFactors
    ) -> torch.Tensor:
        """Hidden states (R, D) after `ln_f` of one token a row, `ids` (R,), each at its own position; for a CPU."""
        at, rows = torch.tensor([positions, slots])
        lengths = [cache.padded_length(position + 1) for position in positions]
        if all(self._equal_lengths(cache, length, max(lengths)) for length in set(lengths)):
            lengths = [max(lengths)] * len(lengths)  # one product for all
        columns = torch.arange(max(lengths))
        mask = torch.where(columns > at[:, None, None, None], -torch.inf, 0.0)
        runs = runs_of(slots, lengths)

        def attend(block: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = self._split(qkv)
            keys, values = cache.keys[block], cache.values[block]
            keys[rows, :, at] = k[:, :, 0].to(keys.dtype)
            values[rows, :, at] = v[:, :, 0].to(values.dtype)
            q = (q * self.scales[block]).to(keys.dtype)
            parts = []
            for run, used, length in runs:
                keys_here, values_here = keys[used, :, :length], values[used, :, :length]
                parts.append(by_row("attention", _attention, q[run], keys_here, values_here, mask[run, ..., :length]))
            return torch.cat(parts).reshape(len(q), 1, -1)

        return self._forward((F.embedding(ids, self.wte) + self.wpe[at])[:, None], lora, attend)[:, 0]

    def step(self, inputs: torch.Tensor, span: int, cache: KVCache, lora: Mapping[ModulePath, Factors]) -> torch.Tensor:
        """Hidden states (R, D) after `ln_f` of one token in each of the first R slots; all that counts is in tensors.

        `inputs` (3, R), int64: tokens, their positions, less than `span`, and the slot that takes up keys and values:
        the row's own, or the spare one where the result means nothing.
        """
        ids, at, targets = inputs
        rows = len(ids)
        later = torch.arange(span, device=ids.device) > at[:, None, None, None]
        mask = torch.zeros(later.shape, dtype=cache.keys[0].dtype, device=ids.device).masked_fill_(later, -torch.inf)

        def attend(block: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = self._split(qkv)
            keys, values = cache.keys[block], cache.values[block]
            keys[targets, :, at] = k[:, :, 0].to(keys.dtype)
            values[targets, :, at] = v[:, :, 0].to(values.dtype)
            attended = F.scaled_dot_product_attention(
                q.to(keys.dtype), keys[:rows, :, :span], values[:rows, :, :span], mask, scale=self.scales[block]
            )
            return attended.transpose(1, 2).flatten(2)

        return self._forward((F.embedding(ids, self.wte) + F.embedding(at, self.wpe))[:, None], lora, attend)[:, 0]

    @property
    def on_cpu(self) -> bool:
        """Where rows get the bits that they get alone."""
        return self.wte.device.type == "cpu"

    @property
    def vocabulary(self) -> int:
        """How many tokens it has logits for."""
        return len(self.wte)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, …, V) in float32 of hidden states (R, …, D); row i is one text."""
        return self.head(hidden).float()

    def _forward(self, x: torch.Tensor, lora: LoraFactors, attend: Attend) -> torch.Tensor:
        x = x.float()
        for block in self.blocks:
            x = block(x, lora, attend, self.activation)
        return self.ln_f(x)

    def _equal_lengths(self, cache: KVCache, own: int, length: int) -> bool:
        """Whether a row gets the same bits over `own` positions and over `length` of which the rest is masked."""
        keys = cache.keys[0]
        if own == length:
            return True

        def check() -> bool:
            random = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(1, *keys.shape[1:], generator=random) for _ in range(3))
            mask = torch.zeros(length)
            mask[own:] = -torch.inf
            short, long = (
                _attention(q[:, :, :1], k[:, :, :count], v[:, :, :count], mask[:count]) for count in (own, length)
            )
            return torch.equal(short, long)

        return holds(("length", keys.shape[1:], own, length), check)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as (R, H, T, W)."""
        rows, tokens, _ = qkv.shape
        q, k, v = qkv.view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


def _attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What one token a row, `q` (R, H, 1, W), attends to, float32: keys and values (R, H, L, W), mask (R, 1, 1, L)."""
    scores = torch.matmul(q, keys.mT).float().add_(mask)
    return torch.matmul(scores.softmax(-1).to(values.dtype), values).float()
