"""Whether the files of a merge hold the model that was trained: its weights, and its logits on real text.

The reference is PEFT itself, see `blockwise`. Each stored tensor is compared with what PEFT's own merge makes of it, so
that an error in one module shows however little the text depends on it; half precision must be those values rounded, to
the bit. Logits are compared in float32 first, and in
float64 where float32 differs by more than a well-conditioned model would: there rounding is told from error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftune.adapters.directory import Adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import LoraTarget, base_name
from peftune.adapters.merge.blockwise import BlockwiseModel
from peftune.adapters.merge.report import POSITIONS, Difference, LogitDiffAccumulator, allowed, judged
from peftune.adapters.provenance import recorded
from peftune.errors import CheckFailed
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.weights import HEAD, WTE, row_chunks

WPE = "transformer.wpe.weight"
_WEIGHT_ERROR = 32 * 2.0**-24  # of a tensor's norm: float32 sums of two libraries differ by less, errors by more


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
    candidate = "exact" if "exact" in models else "stored"
    found = compare_logits(models, pairs, sequences, done, candidate, getattr(torch, dtype))
    stored = found["reference", "stored"]
    exact = found["reference", candidate]
    rounding = 0.0
    if not exact.max_abs_logit_difference <= allowed(exact):
        double = {name: dataclasses.replace(models[name], precision=torch.float64) for name in ("reference", candidate)}
        double["nudged"] = dataclasses.replace(double[candidate], nudged=True)
        again = compare_logits(double, [("reference", candidate), (candidate, "nudged")], sequences, lambda: None)
        exact, rounding = again["reference", candidate], again[candidate, "nudged"].max_abs_logit_difference
        stored = exact if candidate == "stored" else stored
    return judged(dtype, stored, exact, found.get(("exact", "stored")), found.get(("trained", "stored")), rounding)


def _first_half(target: LoraTarget) -> LoraTarget:
    rank = target.rank // 2
    a, b = target.parts["lora_A.weight"][:rank], target.parts["lora_B.weight"][:, :rank]
    parts = {"lora_A.weight": a, "lora_B.weight": b}
    return dataclasses.replace(target, rank=rank, alpha=target.alpha / 2, parts=parts)


@torch.no_grad()
def compare_logits(
    models: Mapping[str, BlockwiseModel],
    pairs: Sequence[tuple[str, str]],
    sequences: Sequence[torch.Tensor],
    done: Callable[[], None],
    weights_of: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[tuple[str, str], Difference]:
    """For each pair of names (reference, candidate) how the logits differ at every position of the sequences of ids.

    All models have one shape. `done` is called after each block. Where `weights_of` names a model, its tensors are
    compared with what PEFT merges into `reference`, and those of `stored` with the same values rounded to `dtype`;
    CheckFailed names the first that differs.
    """

    def check(modules: dict[str, nn.Module], prefix: str) -> None:
        if weights_of is None:
            return
        _check_weights(modules["reference"], modules[weights_of], prefix)
        if weights_of != "stored":
            found = modules["stored"].state_dict()
            for name, exact in modules[weights_of].state_dict().items():
                _check_rounded(found[name], exact, dtype, prefix + name)

    if weights_of is not None:
        for table in (WPE,) if models[weights_of].source.tied else (WPE, WTE):
            _check_rows(models["reference"], models[weights_of], models["stored"], table, dtype)
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)  # at the end, which causal attention hides
    used, inverse = torch.unique(padded, return_inverse=True)
    positions = torch.arange(padded.shape[1])
    hidden = {name: m.embedding(WTE, used)[inverse] + m.embedding(WPE, positions) for name, m in models.items()}
    for index in range(next(iter(models.values())).config.n_layer):
        blocks = {name: model.block(index) for name, model in models.items()}
        for name, block in blocks.items():
            output = block(hidden[name])
            hidden[name] = output if isinstance(output, torch.Tensor) else output[0]
        check(blocks, f"transformer.h.{index}.")
        done()
    real = torch.stack([positions < len(ids) for ids in sequences])
    norms = {name: model.final_norm() for name, model in models.items()}
    check(norms, "transformer.ln_f.")
    normed = {name: norm(hidden[name][real]) for name, norm in norms.items()}
    count, first_token = int(real.sum()), 0
    sums = {pair: LogitDiffAccumulator(count) for pair in pairs}
    for slices in zip(*(model.head() for model in models.values()), strict=True):
        heads = dict(zip(models, slices, strict=True))
        for part in (slice(start, start + POSITIONS) for start in range(0, count, POSITIONS)):
            logits = {name: head(normed[name][part]).double() for name, head in heads.items()}
            for (reference, candidate), accumulator in sums.items():
                accumulator.add(part, first_token, logits[reference], logits[candidate])
        check(heads, "lm_head.")
        first_token += logits[reference].shape[1]
    return {pair: accumulator.difference() for pair, accumulator in sums.items()}


def _check_weights(reference: nn.Module, candidate: nn.Module, prefix: str) -> None:
    """CheckFailed unless `candidate` holds what PEFT's own merge makes of `reference`, which is merged hereby."""
    before = {base_name(name): _norm(tensor) for name, tensor in reference.state_dict().items()}
    for layer in reference.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    merged = {base_name(name): tensor for name, tensor in reference.state_dict().items()}
    for name, found in candidate.state_dict().items():
        _check_close(found, merged[name], before[name], prefix + name)


def _check_rows(
    reference: BlockwiseModel, candidate: BlockwiseModel, stored: BlockwiseModel, table: str, dtype: torch.dtype
) -> None:
    """CheckFailed unless all rows of an embedding are those of base + adapter, whether the text uses them or not."""
    config = candidate.config
    for start, stop in row_chunks((config.n_positions if table == WPE else config.vocab_size, config.n_embd)):
        rows = torch.arange(start, stop)
        wanted = reference.embedding(table, rows)
        found = candidate.embedding(table, rows)
        _check_close(found, wanted, _norm(wanted), table)
        if stored is not candidate:
            _check_rounded(stored.embedding(table, rows), found, dtype, table)


def _check_rounded(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """The same code computed both, so that each bit is the same."""
    if wrong := int((found != exact.to(dtype).float()).sum()):
        raise CheckFailed(
            f"merge: {name} differs from base + adapter rounded to {str(dtype).partition('.')[2]} in {wrong:,} of "
            f"{found.numel():,} values; nothing was written"
        )


def _check_close(found: torch.Tensor, wanted: torch.Tensor, before: float, name: str) -> None:
    """Sums of float32 round by the size of what is added, so the limit grows with the norm before and after."""
    size = before + _norm(wanted)
    error = _norm(found - wanted)
    if not error <= _WEIGHT_ERROR * size:
        raise CheckFailed(
            f"merge: {name} differs from base + adapter by {error / size:.2g} of its norm (allowed "
            f"{_WEIGHT_ERROR:.2g}); nothing was written"
        )


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
