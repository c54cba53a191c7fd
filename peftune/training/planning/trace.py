"""Bytes that a forward and its backward keep at most, from shapes alone: the step itself, on tensors without storage.

PyTorch's meta device computes shapes and nothing else, so the code that trains is also the code that is measured here;
no formula has to be kept in step with it. Only attention is replaced on a GPU, by a function that keeps what fused
kernels keep.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, GPT2Config

from peftune.config.recipe import Recipe
from peftune.data.batches import NOT_SCORED
from peftune.model.load import NAME_OF, only_blocks_are_trained, recompute_activations, with_dropout
from peftune.model.lora import Adapted, skeleton
from peftune.model.loss import chunk_rows, summed_nats
from peftune.model.train.attention import CPU_KERNEL, Kernel
from peftune.model.train.forward import TrainGPT2, reason_against, train_forward
from peftune.training.inputs import RunInputs
from peftune.training.optimizer import Gradient
from peftune.training.planning.memory_model import Way, bytes_per_rank, shapes_of

Device = Literal["cpu", "cuda"]
CPU_TOKENS, GPU_TOKENS = 8192, 65_536  # more a forward gains nothing
GPU_SHARE = 0.94  # of a GPU's memory that tensors may take: not measured here
LIVE_TENSORS = 44  # widths per token and block that autograd keeps, measured on GPT-2 with LoRA on all linear layers
_KEPT = "shapes_of_a_fused_kernel"
_IN_A_BLOCK = re.compile(r"\bh\.\d")  # a module of one block by its name
_SHALLOW, _DEEPER = 3, 5  # layers that are traced for a base of any number


def first_micro_size(inputs: RunInputs, dtype: torch.dtype, way: Way, ranks: int, device: str) -> int:
    """Blocks per forward to begin with, at most a rank's share: as many as are foreseen to fit what memory is free.

    Neither device can be asked by trying. Where a GPU's driver lends it main memory (Windows, WSL), nothing is ever
    full and all becomes slow. A CPU does not report that memory runs out, the process is killed; so activations are
    kept under two fifths of what is available, page cache included.
    """
    per_rank = -(-min(inputs.recipe.batch.global_size, len(inputs.corpus.train)) // ranks)
    return min(per_rank, most_blocks(inputs, dtype, way, ranks, device))


def most_blocks(inputs: RunInputs, dtype: torch.dtype, way: Way, ranks: int, device: str) -> int:
    """Blocks of a forward that are foreseen to fit and gain something, at least one."""
    recipe, config, block = inputs.recipe, inputs.base.config, inputs.corpus.train.packing.block_size
    if device == "cpu":
        available = psutil.virtual_memory().available
        a_block = block * config.n_layer * config.n_embd * LIVE_TENSORS * dtype.itemsize
        return max(1, min(CPU_TOKENS // block, int(0.4 * available) // a_block))
    precision: Any = NAME_OF[dtype]
    memory = bytes_per_rank(shapes_of(config, recipe.lora), way, ranks, precision, recipe.quantize)
    first, each = activations(config, recipe, dtype, block, "cuda", way == "zero3")
    room = free_on_gpu() - memory.held - memory.gathered
    return max(1, min(GPU_TOKENS // block, 1 + (room - first) // max(1, each)))


def free_on_gpu() -> int:
    """Bytes that are free on this process's GPU now and that tensors may take."""
    return int(GPU_SHARE * torch.cuda.mem_get_info()[0])


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of the storages that operations make, while they live; `known` tensors are not counted."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def activations(
    config: GPT2Config, recipe: Recipe, dtype: torch.dtype, block: int, device: Device, sharded: bool
) -> tuple[int, int]:
    """Bytes of the first block of a micro-batch, and of each further one; arguments as of `activation_peak`.

    Every layer keeps the same and so does every block, so a few of each are traced; all layers where the adapter is on
    some of them only.
    """

    few = -(-chunk_rows(torch.device(device)) // block)  # from here on each block adds the same; below, at most that

    def peaks(layers: int) -> tuple[int, int]:
        shallow = copy.copy(config)
        shallow.n_layer = layers
        some, more = (activation_peak(shallow, recipe, dtype, block, few + n, device, sharded) for n in (0, 1))
        return some - (few - 1) * (more - some), more - some

    modules = [*recipe.lora.modules_to_save, *([] if isinstance(recipe.lora.targets, str) else recipe.lora.targets)]
    uneven = recipe.lora.layers is not None or any(map(_IN_A_BLOCK.search, modules))
    if uneven or config.n_layer <= _DEEPER:
        return peaks(config.n_layer)
    steps = (config.n_layer - _SHALLOW) / (_DEEPER - _SHALLOW)
    (first, each), (deeper, deeper_each) = peaks(_SHALLOW), peaks(_DEEPER)
    return round(first + steps * (deeper - first)), round(each + steps * (deeper_each - each))


def activation_peak(
    config: GPT2Config, recipe: Recipe, dtype: torch.dtype, block: int, blocks: int, device: Device, sharded: bool
) -> int:
    """Bytes at the worst moment of forward and backward, of `blocks` full blocks in one micro-batch.

    Not counted: weights, the adapter, its gradient and optimizer (`memory_model`). `sharded` is ZeRO-3, whose steps are
    those of Transformers and PEFT.
    """
    config = with_dropout(config, recipe.run.base_dropout)
    adapted = skeleton(config, recipe.lora)
    if only_blocks_are_trained(adapted):
        for parameter in adapted.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    parameters = list(adapted.trainable().values())
    gradient = Gradient(parameters, [p.shape for p in parameters], torch.device("meta"))
    adapted.model.train()
    ids = torch.zeros(blocks, block, dtype=torch.int64)
    scored = ids.numel()
    core: Any = adapted.model.get_base_model()
    if device == "cpu" and not core.lm_head.weight.requires_grad:
        scored = min(scored, chunk_rows(torch.device("cpu")))  # the meta device takes a GPU's chunk of logits
    known = [*adapted.model.parameters(), *adapted.model.buffers(), gradient.flat, ids]
    if (fast := forward_of(adapted, recipe, dtype, sharded)) is not None:
        forward = dataclasses.replace(fast, kernel=CPU_KERNEL if device == "cpu" else _FUSED)
        targets = ids.clone()
        targets.view(-1)[scored:] = NOT_SCORED
        with LiveBytes([*known, targets]) as live:
            gradient.add(forward(ids, ids, targets, None))
        return int(live.peak)
    AttentionInterface.register(_KEPT, _attention_of_transformers)
    core.config._attn_implementation = _KEPT
    where = ids.to("meta")
    with LiveBytes([*known, where]) as live:
        hidden = core.transformer(where, position_ids=where, use_cache=False).last_hidden_state.flatten(0, 1)
        gradient.add(summed_nats(hidden[:scored], core.lm_head, where.view(-1)[:scored], recipe.optim.label_smoothing))
    return int(live.peak)


def forward_of(adapted: Adapted, recipe: Recipe, dtype: torch.dtype, sharded: bool = False) -> TrainGPT2 | None:
    """The fast forward that a run would take, or None: then the adapted model is made as that run would have it."""
    optim, recompute = recipe.optim, recipe.run.checkpointing
    if recipe.run.fast and not sharded and reason_against(adapted) is None:
        return train_forward(adapted, dtype, optim.neftune, optim.label_smoothing, recompute)
    if recompute:
        recompute_activations(adapted)
    return None


class _Fused(torch.autograd.Function):
    """What a fused attention keeps for its backward: its inputs, its output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        output = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        ctx.save_for_backward(qkv, output, qkv.new_empty(len(qkv), heads, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


_FUSED = Kernel("fused attention", lambda lengths, heads, device: lambda qkv, scale: _Fused.apply(qkv, heads))  # type: ignore[no-untyped-call]


def _attention_of_transformers(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """(B, H, T, W) three times to (B, T, H, W)."""
    rows, heads, length, width = query.shape
    qkv = torch.cat([part.transpose(1, 2).reshape(rows * length, heads * width) for part in (query, key, value)], dim=1)
    output = _Fused.apply(qkv, heads)  # type: ignore[no-untyped-call]
    return output.view(rows, length, heads, width), None
