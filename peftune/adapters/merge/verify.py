"""How far a merged model's logits lie from those of base + adapter, computed block by block.

The reference is PEFT itself: for each block (and for embeddings and head) a module is built from the base's tensors,
PEFT injects the adapter into it, and hidden states pass through. Nothing is shared with the folding, and only one
block, or one piece of the embedding, is in memory. All of it is float32.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.merge.logit_diff import Difference, LogitDiffAccumulator, together
from peftune.errors import CheckFailed
from peftune.model.weights import HEAD, WTE, Weights

WPE = "transformer.wpe.weight"
_PLACES = 128  # places whose logits are in memory at a time
Pieces = list[tuple[int, int]]


class Stream(Protocol):
    """One way to compute the model, a piece at a time."""

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Embedding vectors (n, width) of sorted row numbers (n,)."""

    def block(self, index: int) -> nn.Module:
        """One transformer block."""

    def final_norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of `ln_f`."""

    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For each piece of the vocabulary, the function from hidden states (n, width) to logits (n, piece)."""


class Plain:
    """A checkpoint without an adapter: the merged directory read back, or the fold before it is rounded."""

    def __init__(self, source: Weights | MergedTensors, config: GPT2Config, pieces: Pieces) -> None:
        self.source, self.config, self.pieces = source, config, pieces

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
            parts = (self.source.rows(name, start, stop) for start, stop in self.pieces)
        else:
            parts = self.source.chunks(name)  # type: ignore[assignment]
        for weight in parts:
            yield _times(weight.float())


class WithAdapter:
    """Base + adapter through PEFT; `held(name, tensor)` is how the base in question holds a tensor of the weights."""

    def __init__(
        self,
        weights: Weights,
        layout: AdapterLayout,
        config: GPT2Config,
        pieces: Pieces,
        held: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
    ) -> None:
        self.weights, self.layout, self.config, self.pieces, self.held = weights, layout, config, pieces, held

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        target = self.layout.targets.get(name.removesuffix(".weight"))
        if target is None:
            return _gather(self._chunks(name), rows)
        if self.layout.dora:  # its norms run over the whole table
            table, numbers = torch.cat(list(self._chunks(name))), rows
        else:
            table, numbers = _gather(self._chunks(name), rows), torch.arange(len(rows))
            target = _cut(target, {"lora_embedding_A": target.parts["lora_embedding_A"][:, rows]})
        lookup = nn.ModuleDict({"table": _lookup(table)})
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
        for start, stop in self.pieces:
            weight = self._head_rows(start, stop)
            if target is None:
                yield _times(weight)
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            outward = {name: part[start:stop] for name, part in target.parts.items() if name != "lora_A.weight"}
            module = nn.ModuleDict({"head": linear})
            yield _with_peft(module, {"head": _cut(target, outward)}, self.layout).get_submodule("head")

    def _tensor(self, name: str) -> torch.Tensor:
        replaced = self.layout.replaced.get(name)
        return (self.held(name, self.weights.tensor(name)) if replaced is None else replaced.clone()).float()

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
def compare(
    reference: Stream,
    candidates: dict[str, Stream],
    config: GPT2Config,
    sequences: Sequence[torch.Tensor],
    done: Callable[[], None],
) -> dict[str, Difference]:
    """Differences of each candidate's logits from the reference's at every place of every sequence of ids (n,).

    `done` is called after each block.
    """
    streams = [reference, *candidates.values()]
    hidden = [_embed(stream, sequences) for stream in streams]
    for index in range(config.n_layer):
        for number, stream in enumerate(streams):
            block = stream.block(index).eval()
            hidden[number] = _output(block(hidden[number]))
            del block
        done()
    real = torch.stack([torch.arange(hidden[0].shape[1]) < len(ids) for ids in sequences])
    flat = [_normed(stream, config, states[real]) for stream, states in zip(streams, hidden, strict=True)]
    places = [slice(start, start + _PLACES) for start in range(0, len(flat[0]), _PLACES)]
    tallies = [[LogitDiffAccumulator(len(flat[0][place])) for place in places] for _ in candidates]
    for heads in zip(*(stream.head() for stream in streams), strict=True):
        for number, place in enumerate(places):
            logits = [head(states[place]) for head, states in zip(heads, flat, strict=True)]
            for tally, candidate in zip(tallies, logits[1:], strict=True):
                tally[number].add(logits[0].double(), candidate.double())
    return {name: together([t.difference() for t in tally]) for name, tally in zip(candidates, tallies, strict=True)}


def _embed(stream: Stream, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    """(sequences, longest, width); what fills shorter ones up stands behind them, where causal attention is blind."""
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    used, places = torch.unique(padded, return_inverse=True)
    return stream.embedding(WTE, used)[places] + stream.embedding(WPE, torch.arange(padded.shape[1]))


def _normed(stream: Stream, config: GPT2Config, states: torch.Tensor) -> torch.Tensor:
    weight, bias = stream.final_norm()
    return nn.functional.layer_norm(states, (config.n_embd,), weight, bias, config.layer_norm_epsilon)


def _output(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _gather(chunks: Iterator[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The given rows (sorted) of a table that comes in consecutive pieces."""
    found, start = [], 0
    for chunk in chunks:
        inside = rows[(rows >= start) & (rows < start + len(chunk))]
        found.append(chunk[inside - start].float())
        start += len(chunk)
    return torch.cat(found)


def _lookup(table: torch.Tensor) -> nn.Embedding:
    with torch.device("meta"):
        embedding = nn.Embedding(*table.shape)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    return embedding


def _times(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: nn.functional.linear(states, weight)


def _block(config: GPT2Config, index: int, tensor: Callable[[str], torch.Tensor]) -> nn.Module:
    with torch.device("meta"):
        block = GPT2Block(config, layer_idx=index)  # type: ignore[no-untyped-call]
    prefix = f"transformer.h.{index}."
    block.load_state_dict({name: tensor(prefix + name) for name in block.state_dict()}, assign=True)
    return block.requires_grad_(False)


def _cut(target: LoraTarget, parts: dict[str, torch.Tensor]) -> LoraTarget:
    return dataclasses.replace(target, parts={**target.parts, **parts})


def _with_peft(module: nn.Module, targets: dict[str, LoraTarget], layout: AdapterLayout) -> nn.Module:
    """Inject the adapter's part for this module through PEFT, whatever `fan_in_fan_out` the adapter claims."""
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
    lost = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
    if lost:
        raise CheckFailed(f"verification: PEFT did not take {lost[0]}; please report this with the version of peft")
    return injected.eval()
