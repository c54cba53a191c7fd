"""A GPT-2 computed block by block, alone or with an adapter that PEFT itself puts on it.

For each block (and for embeddings and head) a module is built from stored tensors and PEFT injects the adapter into it.
No code is shared with the merge, and only one block, or one slice of the embedding, is in memory.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.token_rows import TokenRows
from peftune.errors import CheckFailed
from peftune.model import quantized
from peftune.model.weights import HEAD, WTE, Weights

_NO_ADAPTER = AdapterLayout({}, {}, 0)
_HALF_ULP = 2.0**-24  # of float32, relative: the most that storing a value changes it


@dataclass(frozen=True)
class BlockwiseModel:
    """A GPT-2 that is computed block by block: `source`, and on it an adapter through PEFT if `layout` is given.

    `source` is a base, a merged checkpoint read back, or merged tensors before they are rounded. With `quantization`
    the matrices of its blocks are quantised and dequantised as a block is built. `precision` is what it computes in.
    """

    source: Weights | MergedTensors
    config: GPT2Config
    row_slices: list[tuple[int, int]]
    layout: AdapterLayout = _NO_ADAPTER
    quantization: quantized.Kind | None = None
    precision: torch.dtype = torch.float32
    nudged: bool = False
    """Every weight is moved by as much as storing it as float32 can move it, up or down by chance."""

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Embedding vectors (n, width) of sorted row numbers (n,)."""
        replaced, target = self.layout.replaced.get(name), self.layout.targets.get(name.removesuffix(".weight"))
        chunks = self.source.chunks(name) if replaced is None else iter([replaced])
        if target is None:
            found: nn.Module = nn.Embedding.from_pretrained(_gather(chunks, rows))  # type: ignore[no-untyped-call]
            if (own := self.layout.rows.get(name)) is not None:
                found = _with_rows(found, own, {token: number for number, token in enumerate(rows.tolist())})
            return self._prepared(found)(torch.arange(len(rows)))  # type: ignore[no-any-return]
        if self.layout.dora:  # its norms run over the complete table
            table, numbers = torch.cat([chunk.float() for chunk in chunks]), rows
        else:
            table, numbers = _gather(chunks, rows), torch.arange(len(rows))
            a = target.parts["lora_embedding_A"][:, rows]
            target = dataclasses.replace(target, parts=target.parts | {"lora_embedding_A": a})
        lookup = nn.ModuleDict({"table": nn.Embedding.from_pretrained(table)})  # type: ignore[no-untyped-call]
        adapted = _with_peft(lookup, {"table": target}, self.layout)
        return self._prepared(adapted.get_submodule("table"))(numbers)  # type: ignore[no-any-return]

    def block(self, index: int) -> nn.Module:
        """One transformer block."""
        prefix = f"transformer.h.{index}."
        with torch.device("meta"):
            block = GPT2Block(self.config, layer_idx=index)  # type: ignore[no-untyped-call]
        block.load_state_dict({name: self._tensor(prefix + name) for name in block.state_dict()}, assign=True)
        block.requires_grad_(False).eval()
        own = {name.removeprefix(prefix): t for name, t in self.layout.targets.items() if name.startswith(prefix)}
        return self._prepared(_with_peft(block, own, self.layout) if own else block)

    def final_norm(self) -> nn.Module:
        """`ln_f`."""
        norm = nn.LayerNorm(self.config.n_embd, self.config.layer_norm_epsilon, device="meta")
        norm.load_state_dict({k: self._tensor(f"transformer.ln_f.{k}") for k in norm.state_dict()}, assign=True)
        return self._prepared(norm)

    def head(self) -> Iterator[nn.Module]:
        """For each slice of the vocabulary, the function from hidden states (n, width) to logits (n, slice)."""
        target, own = self.layout.targets.get("lm_head"), self.layout.rows.get(HEAD)
        for (start, stop), weight in zip(self.row_slices, self._head_slices(), strict=True):
            head: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            head.weight = nn.Parameter(weight.float(), requires_grad=False)
            if own is not None:
                head = _with_rows(head, own, {token: token - start for token in range(start, stop)})
            elif target is not None:
                parts = {n: part if n == "lora_A.weight" else part[start:stop] for n, part in target.parts.items()}
                sliced = {"head": dataclasses.replace(target, parts=parts)}
                head = _with_peft(nn.ModuleDict({"head": head}), sliced, self.layout).get_submodule("head")
            yield self._prepared(head)

    def _prepared(self, module: nn.Module) -> nn.Module:
        """The module as this model computes with it; PEFT has built it in float32, as PiSSA needs it."""
        module = module.requires_grad_(False).to(self.precision)
        if self.nudged:
            generator = torch.Generator().manual_seed(0)
            for weight in module.parameters():
                signs = torch.randint(0, 2, weight.shape, generator=generator).to(self.precision).mul_(2).sub_(1)
                weight.data.mul_(signs.mul_(_HALF_ULP).add_(1))
        return module

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self.layout.replaced:
            return self.layout.replaced[name].clone().float()
        tensor = self.source.tensor(name)
        if self.quantization and ".h." in name and tensor.ndim == 2:
            tensor = quantized.rounded(tensor, self.quantization)
        return tensor.float()

    def _head_slices(self) -> Iterator[torch.Tensor]:
        name, replaced = WTE if self.source.tied else HEAD, self.layout.replaced.get(HEAD)
        if isinstance(self.source, MergedTensors):
            yield from self.source.chunks(name)
            return
        rows = self.source.rows if replaced is None else lambda _, start, stop: replaced[start:stop]
        height = len(replaced) if replaced is not None else self.source.shape(name)[0]
        for start, stop in self.row_slices:
            part = rows(name, min(start, height), min(stop, height))
            yield nn.functional.pad(part, (0, 0, 0, stop - start - len(part)))  # tokens that are new to the base


def _gather(chunks: Iterator[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The given rows (sorted) of a table that comes in consecutive chunks; zeros for rows that it does not have."""
    found, start = [], 0
    for chunk in chunks:
        inside = rows[(rows >= start) & (rows < start + len(chunk))]
        found.append(chunk[inside - start].float())
        start += len(chunk)
    known = torch.cat(found)
    return nn.functional.pad(known, (0, 0, 0, len(rows) - len(known)))


def _with_rows(layer: nn.Module, rows: TokenRows, numbers: dict[int, int]) -> nn.Module:
    """An embedding or a head with the adapter's rows through PEFT; `numbers` says which row of it a token has."""
    kept = [(numbers[token], place) for place, token in enumerate(rows.indices.tolist()) if token in numbers]
    if not kept:
        return layer
    inside, places = map(list, zip(*kept, strict=True))
    config = TrainableTokensConfig(target_modules=["layer"], token_indices=inside, inference_mode=True)
    state = {"layer.trainable_tokens_delta": rows.values[places].float()}
    return _loaded(config, nn.ModuleDict({"layer": layer}), state).get_submodule("layer")


def _with_peft(module: nn.Module, targets: dict[str, LoraTarget], layout: AdapterLayout) -> nn.Module:
    """Inject the adapter's part for this module through PEFT; `fan_in_fan_out` follows from the module's kind."""
    config = LoraConfig(
        target_modules=list(targets),
        rank_pattern={re.escape(name): target.rank for name, target in targets.items()},
        alpha_pattern={re.escape(name): target.alpha for name, target in targets.items()},
        use_rslora=layout.rslora,
        use_dora=layout.dora,
        lora_bias=layout.lora_bias,
        init_lora_weights="pissa" if any(target.pissa for target in targets.values()) else False,
        fan_in_fan_out=any(target.kind == "conv1d" for target in targets.values()),
        inference_mode=True,
    )
    state = {f"{name}.{part}": value.float() for name, t in targets.items() for part, value in t.parts.items()}
    return _loaded(config, module, state)


def _loaded(config: PeftConfig, module: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """The module with an adapter of this configuration and these values in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        injected = inject_adapter_in_model(config, module)
        result: Any = set_peft_model_state_dict(injected, state)
    missing = [key for key in result.missing_keys if "lora_" in key or "tokens_delta" in key]
    if strange := [*result.unexpected_keys, *missing]:
        raise CheckFailed(f"verification: PEFT did not take {strange[0]}; please report this with the version of peft")
    return injected.eval()
