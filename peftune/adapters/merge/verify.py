"""How far a merged model's logits lie from those of base + adapter, computed block by block.

The reference is PEFT itself: for each block (and for embeddings and head) a module is built from the base's tensors,
PEFT injects the adapter into it, and hidden states pass through. No code is shared with the merge itself, and only one
block, or one slice of the embedding, is in memory. All of it is float32.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.merge.logit_diff import Difference, LogitDiffAccumulator, combined
from peftune.errors import CheckFailed
from peftune.model.weights import HEAD, WTE, Weights

WPE = "transformer.wpe.weight"
_POSITIONS = 128  # positions whose logits are in memory at a time
RowSlices = list[tuple[int, int]]


class BlockwiseModel(Protocol):
    """A GPT-2 that is computed block by block, so that it is never in memory as a whole."""

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Embedding vectors (n, width) of sorted row numbers (n,)."""

    def block(self, index: int) -> nn.Module:
        """One transformer block."""

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of `ln_f`."""

    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For each slice of the vocabulary, the function from hidden states (n, width) to logits (n, slice)."""


class BlockwiseCheckpoint:
    """A checkpoint without an adapter: the merged directory read back, or merged tensors before they are rounded."""

    def __init__(self, source: Weights | MergedTensors, config: GPT2Config, row_slices: RowSlices) -> None:
        self.source, self.config, self.row_slices = source, config, row_slices

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return _gather(self.source.chunks(name), rows)

    def block(self, index: int) -> nn.Module:
        return _block(self.config, index, lambda name: self.source.tensor(name).float())

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = (self.source.tensor(f"transformer.ln_f.{part}").float() for part in ("weight", "bias"))
        return weight, bias

    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        name = WTE if self.source.tied else HEAD
        if isinstance(self.source, Weights):
            slices = (self.source.rows(name, start, stop) for start, stop in self.row_slices)
        else:
            slices = self.source.chunks(name)  # type: ignore[assignment]
        for weight in slices:
            yield _linear(weight.float())


class BlockwisePeftModel:
    """Base + adapter through PEFT; `transform(name, tensor)` is applied to the base's tensors (here: quantisation)."""

    def __init__(
        self,
        weights: Weights,
        layout: AdapterLayout,
        config: GPT2Config,
        row_slices: RowSlices,
        transform: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    ) -> None:
        self.weights, self.layout, self.config = weights, layout, config
        self.row_slices, self.transform = row_slices, transform

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        target = self.layout.targets.get(name.removesuffix(".weight"))
        if target is None:
            return _gather(self._chunks(name), rows)
        if self.layout.dora:  # its norms run over the whole table
            table, numbers = torch.cat(list(self._chunks(name))), rows
        else:
            table, numbers = _gather(self._chunks(name), rows), torch.arange(len(rows))
            target = _with_parts(target, {"lora_embedding_A": target.parts["lora_embedding_A"][:, rows]})
        lookup = nn.ModuleDict({"table": nn.Embedding.from_pretrained(table)})  # type: ignore[no-untyped-call]
        return _with_peft(lookup, {"table": target}, self.layout).get_submodule("table")(numbers)  # type: ignore[no-any-return]

    def block(self, index: int) -> nn.Module:
        prefix = f"transformer.h.{index}."
        block = _block(self.config, index, self._tensor)
        own = {name.removeprefix(prefix): t for name, t in self.layout.targets.items() if name.startswith(prefix)}
        return _with_peft(block, own, self.layout) if own else block

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tensor("transformer.ln_f.weight"), self._tensor("transformer.ln_f.bias")

    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        target = self.layout.targets.get("lm_head")
        for start, stop in self.row_slices:
            weight = self._head_rows(start, stop)
            if target is None:
                yield _linear(weight)
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            parts = {name: part[start:stop] for name, part in target.parts.items() if name != "lora_A.weight"}
            module = nn.ModuleDict({"head": linear})
            yield _with_peft(module, {"head": _with_parts(target, parts)}, self.layout).get_submodule("head")

    def _tensor(self, name: str) -> torch.Tensor:
        replaced = self.layout.replaced.get(name)
        return (self.transform(name, self.weights.tensor(name)) if replaced is None else replaced.clone()).float()

    def _chunks(self, name: str) -> Iterator[torch.Tensor]:
        replaced = self.layout.replaced.get(name)
        chunks = self.weights.chunks(name) if replaced is None else iter([replaced])
        return (chunk.float() for chunk in chunks)

    def _head_rows(self, start: int, stop: int) -> torch.Tensor:
        replaced = self.layout.replaced.get(HEAD)
        if replaced is not None:
            return replaced[start:stop].float()
        return self.weights.rows(WTE if self.weights.tied else HEAD, start, stop).float()


@torch.no_grad()
def compare_logits(
    reference: BlockwiseModel,
    candidates: Mapping[str, BlockwiseModel],
    config: GPT2Config,
    sequences: Sequence[torch.Tensor],
    done: Callable[[], None],
) -> dict[str, Difference]:
    """Differences of each candidate's logits from the reference's at every position of every sequence of ids (n,).

    `done` is called after each block.
    """
    models = [reference, *candidates.values()]
    hidden = [_embed(model, sequences) for model in models]
    for index in range(config.n_layer):
        for number, model in enumerate(models):
            block = model.block(index).eval()
            output = block(hidden[number])
            hidden[number] = output if isinstance(output, torch.Tensor) else output[0]
            del block
        done()
    real = torch.stack([torch.arange(hidden[0].shape[1]) < len(ids) for ids in sequences])
    normed = [_final_norm(model, config, states[real]) for model, states in zip(models, hidden, strict=True)]
    positions = [slice(start, start + _POSITIONS) for start in range(0, len(normed[0]), _POSITIONS)]
    sums = {name: [LogitDiffAccumulator(len(normed[0][part])) for part in positions] for name in candidates}
    for heads in zip(*(model.head() for model in models), strict=True):
        for number, part in enumerate(positions):
            expected, *found = (head(states[part]).double() for head, states in zip(heads, normed, strict=True))
            for accumulators, logits in zip(sums.values(), found, strict=True):
                accumulators[number].add(expected, logits)
    return {name: combined([part.difference() for part in parts]) for name, parts in sums.items()}


def _embed(model: BlockwiseModel, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    """(sequences, longest, width); padding comes last, where causal attention does not see it."""
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    used, inverse = torch.unique(padded, return_inverse=True)
    return model.embedding(WTE, used)[inverse] + model.embedding(WPE, torch.arange(padded.shape[1]))


def _final_norm(model: BlockwiseModel, config: GPT2Config, states: torch.Tensor) -> torch.Tensor:
    weight, bias = model.final_norm()
    return nn.functional.layer_norm(states, (config.n_embd,), weight, bias, config.layer_norm_epsilon)


def _gather(chunks: Iterator[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The given rows (sorted) of a table that comes in consecutive chunks."""
    found, start = [], 0
    for chunk in chunks:
        inside = rows[(rows >= start) & (rows < start + len(chunk))]
        found.append(chunk[inside - start].float())
        start += len(chunk)
    return torch.cat(found)


def _linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: nn.functional.linear(states, weight)


def _block(config: GPT2Config, index: int, tensor: Callable[[str], torch.Tensor]) -> nn.Module:
    with torch.device("meta"):
        block = GPT2Block(config, layer_idx=index)  # type: ignore[no-untyped-call]
    prefix = f"transformer.h.{index}."
    block.load_state_dict({name: tensor(prefix + name) for name in block.state_dict()}, assign=True)
    return block.requires_grad_(False)


def _with_parts(target: LoraTarget, parts: dict[str, torch.Tensor]) -> LoraTarget:
    return dataclasses.replace(target, parts={**target.parts, **parts})


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        injected = inject_adapter_in_model(config, module)
        result: Any = set_peft_model_state_dict(injected, state)
    not_loaded = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    if not_loaded:
        raise CheckFailed(
            f"verification: PEFT did not take {not_loaded[0]}; please report this with the version of peft"
        )
    return injected.eval()
