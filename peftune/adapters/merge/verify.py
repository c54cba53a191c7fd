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
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from peftune.adapters.directory import Adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.merge.report import POSITIONS, Difference, LogitDiffAccumulator, judged
from peftune.adapters.provenance import recorded
from peftune.adapters.token_rows import TokenRows
from peftune.errors import CheckFailed
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.weights import HEAD, WTE, Weights

WPE = "transformer.wpe.weight"
_NO_ADAPTER = AdapterLayout({}, {}, 0)


def base_quantization(adapter: Adapter) -> quantized.Kind | None:
    """`int8` or `nf4` where peftune.json says that the base was quantised in training."""
    kind: quantized.Kind = recorded(adapter.provenance, "recipe", "quantize")
    return kind if kind in ("int8", "nf4") else None


def verify_merge(
    written: Base,
    adapter: Adapter,
    merged: MergedTensors,
    dtype: str,
    sequences: Sequence[torch.Tensor],
    done: Callable[[], None],
) -> dict[str, Any]:
    """What logits of the files read back differ by, by the names of the report; CheckFailed where it is too much.

    `done` is called after each block. Of an adapter on a quantised base, the function that was trained is compared
    too: it is close to that of the full-precision base, and not equal.
    """
    weights, layout, config = merged.weights, merged.layout, written.config
    config._attn_implementation = "sdpa"
    slices = merged.row_slices(WTE if merged.tied else HEAD)
    models = {
        "reference": BlockwiseModel(weights, config, slices, layout),
        "stored": BlockwiseModel(written.weights, config, slices),
    }
    pairs = [("reference", "stored")]
    if dtype != "float32":
        models["exact"] = BlockwiseModel(MergedTensors(weights, layout), config, slices)
        pairs += [("reference", "exact"), ("exact", "stored")]
    kind = base_quantization(adapter)
    if kind is not None and quantized.is_available():
        # LoftQ adapters are saved as [B, -B0]·[A; A0]; on the quantised base B·A was trained, which is the first half
        if recorded(adapter.provenance, "recipe", "lora", "variant") == "loftq":
            halves = {name: _first_half(target) for name, target in layout.targets.items()}
            layout = dataclasses.replace(layout, targets=halves)
        models["trained"] = BlockwiseModel(weights, config, slices, layout, kind)
        pairs.append(("trained", "stored"))
    found = compare_logits(models, pairs, sequences, done)
    stored = found["reference", "stored"]
    exact = found.get(("reference", "exact"), stored)
    return judged(dtype, stored, exact, found.get(("exact", "stored")), found.get(("trained", "stored")))


def _first_half(target: LoraTarget) -> LoraTarget:
    rank = target.rank // 2
    a, b = target.parts["lora_A.weight"][:rank], target.parts["lora_B.weight"][:, :rank]
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    return dataclasses.replace(target, rank=rank, alpha=target.alpha / 2, parts=parts)


@dataclass(frozen=True)
class BlockwiseModel:
    """A GPT-2 that is computed block by block: `source`, and on it an adapter through PEFT if `layout` is given.

    `source` is a base, a merged checkpoint read back, or merged tensors before they are rounded. With `quantization`
    the matrices of its blocks are quantised and dequantised as a block is built.
    """

    source: Weights | MergedTensors
    config: GPT2Config
    row_slices: list[tuple[int, int]]
    layout: AdapterLayout = _NO_ADAPTER
    quantization: quantized.Kind | None = None

    def embedding(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Embedding vectors (n, width) of sorted row numbers (n,)."""
        replaced, target = self.layout.replaced.get(name), self.layout.targets.get(name.removesuffix(".weight"))
        chunks = self.source.chunks(name) if replaced is None else iter([replaced])
        if (own := self.layout.rows.get(name)) is not None:
            found = nn.Embedding.from_pretrained(_gather(chunks, rows))  # type: ignore[no-untyped-call]
            places = {token: number for number, token in enumerate(rows.tolist())}
            return _with_rows(found, own, places)(torch.arange(len(rows)))  # type: ignore[no-any-return]
        if target is None:
            return _gather(chunks, rows)
        if self.layout.dora:  # its norms run over the complete table
            table, numbers = torch.cat([chunk.float() for chunk in chunks]), rows
        else:
            table, numbers = _gather(chunks, rows), torch.arange(len(rows))
            a = target.parts["lora_embedding_A"][:, rows]
            target = dataclasses.replace(target, parts=target.parts | {"lora_embedding_A": a})
        lookup = nn.ModuleDict({"table": nn.Embedding.from_pretrained(table)})  # type: ignore[no-untyped-call]
        return _with_peft(lookup, {"table": target}, self.layout).get_submodule("table")(numbers)  # type: ignore[no-any-return]

    def block(self, index: int) -> nn.Module:
        """One transformer block."""
        prefix = f"transformer.h.{index}."
        with torch.device("meta"):
            block = GPT2Block(self.config, layer_idx=index)  # type: ignore[no-untyped-call]
        block.load_state_dict({name: self._tensor(prefix + name) for name in block.state_dict()}, assign=True)
        block.requires_grad_(False).eval()
        own = {name.removeprefix(prefix): t for name, t in self.layout.targets.items() if name.startswith(prefix)}
        return _with_peft(block, own, self.layout) if own else block

    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, width) after `ln_f`."""
        weight, bias = self._tensor("transformer.ln_f.weight"), self._tensor("transformer.ln_f.bias")
        return nn.functional.layer_norm(states, (self.config.n_embd,), weight, bias, self.config.layer_norm_epsilon)

    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For each slice of the vocabulary, the function from hidden states (n, width) to logits (n, slice)."""
        target = self.layout.targets.get("lm_head")
        for (start, stop), weight in zip(self.row_slices, self._head_slices(), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.float(), requires_grad=False)
            own = self.layout.rows.get(HEAD)
            if own is not None:
                yield _with_rows(linear, own, {token: token - start for token in range(start, stop)})
                continue
            if target is None:
                yield linear
                continue
            parts = {name: part if name == "lora_A.weight" else part[start:stop] for name, part in target.parts.items()}
            sliced = {"head": dataclasses.replace(target, parts=parts)}
            yield _with_peft(nn.ModuleDict({"head": linear}), sliced, self.layout).get_submodule("head")

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


@torch.no_grad()
def compare_logits(
    models: Mapping[str, BlockwiseModel],
    pairs: Sequence[tuple[str, str]],
    sequences: Sequence[torch.Tensor],
    done: Callable[[], None],
) -> dict[tuple[str, str], Difference]:
    """For each pair of names (reference, candidate) how the logits differ at every position of the sequences of ids.

    All models have one shape. `done` is called after each block.
    """
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)  # at the end, which causal attention hides
    used, inverse = torch.unique(padded, return_inverse=True)
    positions = torch.arange(padded.shape[1])
    hidden = {name: m.embedding(WTE, used)[inverse] + m.embedding(WPE, positions) for name, m in models.items()}
    for index in range(next(iter(models.values())).config.n_layer):
        for name, model in models.items():
            output = model.block(index)(hidden[name])
            hidden[name] = output if isinstance(output, torch.Tensor) else output[0]
        done()
    real = torch.stack([positions < len(ids) for ids in sequences])
    normed = {name: model.final_norm(hidden[name][real]) for name, model in models.items()}
    count, first_token = int(real.sum()), 0
    sums = {pair: LogitDiffAccumulator(count) for pair in pairs}
    for slices in zip(*(model.head() for model in models.values()), strict=True):
        heads = dict(zip(models, slices, strict=True))
        for part in (slice(start, start + POSITIONS) for start in range(0, count, POSITIONS)):
            logits = {name: head(normed[name][part]).double() for name, head in heads.items()}
            for (reference, candidate), accumulator in sums.items():
                accumulator.add(part, first_token, logits[reference], logits[candidate])
        first_token += logits[reference].shape[1]
    return {pair: accumulator.difference() for pair, accumulator in sums.items()}


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
    not_loaded = [
        *result.unexpected_keys,
        *(key for key in result.missing_keys if "lora_" in key or "tokens_delta" in key),
    ]
    if not_loaded:
        raise CheckFailed(
            f"verification: PEFT did not take {not_loaded[0]}; please report this with the version of peft"
        )
    return injected.eval()
