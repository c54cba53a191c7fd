"""Memory of a rank in bytes, as formulas: for every way of running, before any weight is loaded.

Notation: a is the number of trained elements, n the number of ranks. What a rank keeps between two steps:

| way        | base        | adapter  | gradient | optimizer state | engine                 |
|------------|-------------|----------|----------|-----------------|------------------------|
| one, ddp   | all of it   | 4a       | 4a       | 8a              |                        |
| zero1/2    | all of it   | 4a       | 4a       | 12a/n           |                        |
| zero3      | 1/n + small | 4a + 4a/n| 4a       | 12a/n           | 4a/n + 4 bytes·bucket  |

The gradient is one flat fp32 buffer on every rank under every engine (`optimizer.Gradient`). AdamW keeps two fp32
moments; ZeRO also keeps a master copy of what it shards. ZeRO-3 keeps parameters of few elements in full on every rank,
in addition to the shards: most of an adapter is such. The formulas are compared with measurements by
tests/training/test_memory_model.py on one process and by benchmarks/ranks.py on two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import GPT2Config

from peftune.config.recipe import BLOCK_LINEARS, LoraSection
from peftune.model.load import DTYPES, only_blocks_are_trained
from peftune.model.lora import STARTS, skeleton
from peftune.model.quantized import Kind

Way = Literal["one", "ddp", "zero1", "zero2", "zero3"]
Format = Literal["fp32", "bf16", "fp16"]
_NF4_BLOCK = 64  # weights that share a scale
_NF4_TABLE = 16  # fp32 values that four bits choose from, with each matrix


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed file decides about memory, in elements; the values of `ds_configs/`."""

    reduce_bucket: int = 25_000_000
    """`reduce_bucket_size`: the fp32 buffer from which gradients are sent."""
    persistence: int = 500_000
    """`stage3_param_persistence_threshold`: parameters up to this size stay complete on every rank."""
    live: int = 200_000_000
    """`stage3_max_live_parameters`: weights up to which ZeRO-3 gathers ahead, and keeps what is needed again soon."""


SHIPPED = ZeroSettings()


@dataclass(frozen=True)
class Shapes:
    """Elements of every parameter of a base with its adapter."""

    matrices: tuple[tuple[int, int], ...]
    """(in, out) of each frozen linear weight of the blocks: what `quantize` packs."""
    others: tuple[int, ...]
    """Elements of each other frozen parameter: embeddings, norms, biases."""
    trained: tuple[int, ...]
    """Elements of each trained parameter, fp32 always."""
    exact: bool
    """Whether more than blocks is trained, which keeps the full base in fp32."""
    starts: bool
    """Whether the adapter's first values are kept to the end (PiSSA, LoftQ)."""

    @property
    def adapter(self) -> int:
        """Trained elements, a."""
        return sum(self.trained)

    def frozen(self) -> list[int]:
        """Elements of every frozen parameter."""
        return [rows * columns for rows, columns in self.matrices] + list(self.others)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. All but the last two are allocated from the first step to the last."""

    base: int
    """Frozen weights, scales of quantised ones included; under ZeRO-3 this rank's shard, and what stays complete."""
    adapter: int
    """fp32 values of the adapter."""
    gradient: int
    """The flat buffer of a step's gradient, complete on every rank."""
    optimizer_state: int
    """AdamW's moments, and ZeRO's master copies."""
    engine: int
    """What DeepSpeed's engine keeps besides: ZeRO-3's shard of the gradient and its bucket."""
    gathered: int
    """At most at one time, beside the activations: weights gathered by ZeRO-3, or the matrix that is unpacked."""
    update: int
    """Only while the adapter is updated, when activations are gone: ZeRO's copy of the gradient, and buckets.

    By DeepSpeed's source; not measured, for on a CPU a buffer that is not written to takes nothing."""

    @property
    def held(self) -> int:
        """Bytes between two steps."""
        return self.base + self.adapter + self.gradient + self.optimizer_state + self.engine

    def working(self, activations: int) -> int:
        """Bytes beside `held` in the worst moment of a step whose forward keeps so much."""
        return max(activations + self.gathered, self.update)


def shapes_of(config: GPT2Config, lora: LoraSection) -> Shapes:
    """Elements of what would be loaded, from a skeleton without weights; UserError for an adapter that cannot be."""
    adapted = skeleton(config, lora)
    frozen = {name: p.shape for name, p in adapted.model.named_parameters() if not p.requires_grad}
    matrices = {
        name: (shape[0], shape[1])
        for name, shape in frozen.items()
        if ".h." in name and len(shape) == 2 and set(name.split(".")) & set(BLOCK_LINEARS)
    }
    return Shapes(
        matrices=tuple(matrices.values()),
        others=tuple(shape.numel() for name, shape in frozen.items() if name not in matrices),
        trained=tuple(p.numel() for p in adapted.trainable().values()),
        exact=not only_blocks_are_trained(adapted),
        starts=lora.variant in STARTS,
    )


def bytes_per_rank(
    shapes: Shapes, way: Way, ranks: int, precision: Format, quantize: Kind | None = None, zero: ZeroSettings = SHIPPED
) -> RankMemory:
    """What each of `ranks` ranks needs in this way of running; `precision` is that of the run."""
    assert (way == "one") <= (ranks == 1), "one process is one rank"
    assert way != "zero3" or quantize is None, "ZeRO-3 refuses quantised bases"
    itemsize = 4 if shapes.exact else DTYPES[precision].itemsize
    a, shard, replicated = shapes.adapter, -(-shapes.adapter // ranks), way in ("one", "ddp")
    if way == "zero3":
        shard, sharded = sum(-(-size // ranks) for size in shapes.trained), shared_out(shapes, zero)
        return RankMemory(
            base=itemsize * _shards_and_small(shapes.frozen(), ranks, zero.persistence),
            adapter=4 * _shards_and_small(shapes.trained, ranks, zero.persistence),
            gradient=4 * a,
            optimizer_state=12 * shard,
            engine=4 * shard + 4 * zero.reduce_bucket,
            gathered=itemsize * min(sum(sharded), zero.live + max(sharded, default=0)),
            update=4 * a,
        )
    largest = max(rows * columns for rows, columns in shapes.matrices)
    return RankMemory(
        base=base_bytes(shapes, itemsize, quantize),
        adapter=4 * a * (2 if shapes.starts else 1),
        gradient=4 * a,
        optimizer_state=8 * a if replicated else 12 * shard,
        engine=0,
        # The largest matrix in fp32 and, where it is another format, in that of the run.
        gathered=0 if quantize is None else largest * (4 if itemsize == 4 else 4 + itemsize),
        update=0 if replicated else 4 * a + 2 * 4 * zero.reduce_bucket,
    )


def base_bytes(shapes: Shapes, itemsize: int, quantize: Kind | None) -> int:
    """All of the base: `int8` is a byte a weight and an fp32 scale for each output, `nf4` half a byte and one in 64."""
    sizes = [rows * columns for rows, columns in shapes.matrices]
    matrices = itemsize * sum(sizes)
    if quantize == "int8":
        matrices = sum(sizes) + 4 * sum(columns for _, columns in shapes.matrices)
    elif quantize == "nf4":
        matrices = sum(-(-size // 2) + 4 * -(-size // _NF4_BLOCK) + 4 * _NF4_TABLE for size in sizes)
    return itemsize * sum(shapes.others) + matrices


def shared_out(shapes: Shapes, zero: ZeroSettings) -> list[int]:
    """Elements of each frozen parameter that ZeRO-3 shards, so that a rank gathers it when it is needed."""
    return [size for size in shapes.frozen() if size > zero.persistence]


def _shards_and_small(sizes: Sequence[int], ranks: int, persistence: int) -> int:
    """Elements on a rank: its shard of each parameter, and small parameters in full beside their shard."""
    return sum(-(-size // ranks) + (size if size <= persistence else 0) for size in sizes)
