"""Which ways of running a recipe fit a machine, and which is the fastest of them: from shapes alone.

Ways are tried from the fastest to the smallest. Within one, the micro-batch is as large as memory allows: what a step
keeps grows by the same bytes with every block, so two traces give all sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import GPT2Config

from peftune.config.recipe import Recipe
from peftune.device import choose_device, choose_precision
from peftune.errors import UserError
from peftune.model.architecture import FAMILY
from peftune.model.base import open_base
from peftune.model.load import DTYPES, NAME_OF
from peftune.model.quantized import Kind
from peftune.training.continued import continued_from
from peftune.training.distributed.collectives import broadcast
from peftune.training.distributed.start import way_of, zero_stage
from peftune.training.distributed.zero import refuse_for_zero3
from peftune.training.inputs import RunInputs, block_size_of
from peftune.training.planning.memory_model import (
    SHIPPED,
    Format,
    RankMemory,
    Shapes,
    Way,
    bytes_per_rank,
    shapes_of,
    shared_out,
)
from peftune.training.planning.trace import CPU_TOKENS, GPU_SHARE, GPU_TOKENS, Device, activations, free_on_gpu
from peftune.training.step import ForwardFn

_CONTEXT = 500_000_000  # bytes that CUDA takes for itself: not measured here
_CPU_SHARE = 0.9  # of what is available
_LIBRARIES, _KEPT_FREE = 120_000_000, 0.15
"""On a CPU: what libraries and their kernels take after some dozen steps, and the share of activations that the C
library keeps when they are freed. Measured by `python -m benchmarks.train plan`."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: `count` ranks on one machine, each with `memory` bytes of its own."""

    device: Device
    """cpu or cuda."""
    memory: int
    """Bytes."""
    count: int
    here: bool
    """Whether it is this machine, so that a step can be timed."""

    @property
    def usable(self) -> int:
        """Bytes of a rank that tensors, and on a CPU the program, may take."""
        if self.device == "cuda":
            return int(GPU_SHARE * self.memory) - _CONTEXT
        return int(_CPU_SHARE * self.memory)


def this_machine(count: int | None = None, device: str = "auto") -> Machine:
    """Its GPUs, where it has any, or `count` ranks (one) that share its processors and what memory is free."""
    if choose_device(device).type == "cuda":
        gpus = torch.cuda.device_count()
        smallest = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
        return Machine("cuda", smallest, min(count or gpus, gpus), True)
    return Machine("cpu", psutil.virtual_memory().available // (count or 1), count or 1, True)


@dataclass(frozen=True)
class Layout:
    """How ranks share the work, what the base is held in, and what is given up for memory."""

    way: Way
    quantize: Kind | None
    checkpointing: bool
    offload: bool


@dataclass(frozen=True)
class Option:
    """A layout with its micro-batch (blocks a forward) and bytes: of one rank, in the worst moment of a step."""

    layout: Layout
    """`way` (one, ddp, zero2, zero3), `quantize`, `checkpointing`, `offload`."""
    refused: str
    """Why the recipe cannot run this way; then all figures are 0."""
    micro_size: int = 0
    """Blocks in a forward of one rank."""
    held: int = 0
    """Bytes between two steps, the program of a CPU rank included."""
    activations: int = 0
    """Bytes that a forward keeps for its backward."""
    peak: int = 0
    """Bytes in the worst moment."""
    fits: bool = False
    """Whether the peak is within what may be used."""
    wire: int = 0
    """Bytes that a rank sends in an optimizer step."""

    def overrides(self, recipe: Recipe) -> list[str]:
        """KEY=VALUE that make the recipe run this way."""
        wanted: dict[str, Any] = {
            "quantize": (recipe.quantize, self.layout.quantize),
            "run.checkpointing": (recipe.run.checkpointing, self.layout.checkpointing),
            "batch.micro_size": (recipe.batch.micro_size, self.micro_size),
        }
        return [f"{key}={str(now).lower()}" for key, (was, now) in wanted.items() if was != now]


@dataclass(frozen=True)
class Plan:
    """All options for a recipe on a machine, and which of them to take; bytes and seconds."""

    machine: Machine
    precision: Format
    block_size: int
    """Tokens."""
    program: int
    """Bytes that Python and its libraries take in main memory; 0 for a GPU, where they are not."""
    trained: int
    """Elements; an adapter file has four bytes for each, a checkpoint twelve."""
    options: list[Option]
    """From the fastest to the smallest."""
    recommended: Option | None
    """The first that fits; None where nothing does."""

    def json(self) -> dict[str, Any]:
        """For a file of figures."""
        return asdict(self)


def what_is_planned(recipe: Recipe) -> tuple[Recipe, GPT2Config]:
    """The recipe with what an adapter decides that it goes on from, and the configuration of its base.

    A known checkpoint's is not read: its shape is published. UserError for a base that cannot be read.
    """
    shape = FAMILY.get(recipe.base.removeprefix("openai-community/"))
    if shape is not None and recipe.run.init is None and not Path(recipe.base).is_dir():
        layers, width, heads = shape
        return recipe, GPT2Config(n_layer=layers, n_embd=width, n_head=heads)
    base = open_base(recipe.base)
    return continued_from(recipe, base)[0] if recipe.run.init is not None else recipe, base.config


def plan(recipe: Recipe, config: GPT2Config | None = None, machine: Machine | None = None) -> Plan:
    """What each way of running a recipe would take, the fastest first, from shapes alone: no weight is read.

    `config` None is that of the recipe's base, known for gpt2 to gpt2-xl; `machine` None is this one. Sizes are bytes
    of one rank. On a CPU they begin with what this process holds already. UserError for what cannot run anywhere.
    """
    if config is None:
        recipe, config = what_is_planned(recipe)
    machine = machine or this_machine()
    block, precision = block_size_of(recipe, config), precision_of(recipe, machine)
    program = psutil.Process().memory_info().rss if machine.device == "cpu" else 0
    shapes = shapes_of(config, recipe.lora)

    @cache
    def traced(recompute: bool, sharded: bool) -> tuple[int, int]:
        """Bytes of activations of the first block of a micro-batch, and of each further one."""
        run = recipe.run.model_copy(update={"checkpointing": recompute})
        changed = recipe.model_copy(update={"run": run})
        return grown_by(config, changed, DTYPES[precision], block, machine.device, sharded)

    def option(layout: Layout) -> Option:
        if reason := _refusal(recipe, layout):
            return Option(layout, reason)
        memory = bytes_per_rank(shapes, layout.way, machine.count, precision, layout.quantize)
        base = 0 if layout.offload and layout.way == "zero3" else memory.base
        held = memory.held - memory.base + base - (memory.optimizer_state if layout.offload else 0) + program
        first, more = traced(layout.checkpointing, layout.way == "zero3")
        room = machine.usable - held - memory.gathered
        share, asked_size = -(-recipe.batch.global_size // machine.count), recipe.batch.micro_size
        if asked_size == "auto":
            most = min(share, (CPU_TOKENS if machine.device == "cpu" else GPU_TOKENS) // block)
            size = max(1, min(most, 1 + (room - first) // max(1, more)))
        else:
            size = asked_size
        kept = first + (size - 1) * more
        peak = max(held + memory.working(kept), program + loading(shapes, memory, machine.device))
        wire = _wire(shapes, layout.way, machine.count, precision, -(-share // size))
        return Option(layout, "", size, held, kept, peak, peak <= machine.usable, wire)

    options = [option(layout) for layout in _layouts(recipe, machine)]
    fastest = next((option for option in options if option.fits), None)
    return Plan(machine, precision, block, program, shapes.adapter, options, fastest)


def grown_by(
    config: GPT2Config, recipe: Recipe, dtype: torch.dtype, block: int, device: Device, sharded: bool
) -> tuple[int, int]:
    """Bytes that the process grows by for activations of the first block of a micro-batch and of each further one."""
    first, each = activations(config, recipe, dtype, block, device, sharded)
    if device == "cuda":  # its allocator's own figures are those of tensors
        return first, each
    holes = 0
    if recipe.run.checkpointing:  # between what is kept of two layers, one for the widest tensor of what is not
        holes = config.n_layer * (config.n_inner or 4 * config.n_embd) * block * dtype.itemsize
    return int(first * (1 + _KEPT_FREE)) + _LIBRARIES + holes, int(each * (1 + _KEPT_FREE)) + holes


def usable_memory(accelerator: Accelerator) -> int:
    """Bytes that are free now and that this rank may take."""
    if accelerator.device.type == "cuda":
        return free_on_gpu()
    return this_machine(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "cpu").usable


def loading(shapes: Shapes, memory: RankMemory, device: Device) -> int:
    """Bytes while the base is loaded into main memory: its file in fp32, which is mapped, beside its tensors."""
    return 4 * sum(shapes.frozen()) + memory.base if device == "cpu" else 0


def precision_of(recipe: Recipe, machine: Machine) -> Format:
    """What the recipe will be computed in; on a GPU that is not here `auto` is bf16."""
    if machine.here:
        return choose_precision(recipe.run.precision, machine.device == "cuda")  # type: ignore[return-value]
    return "bf16" if recipe.run.precision == "auto" else recipe.run.precision


def _layouts(recipe: Recipe, machine: Machine) -> Iterator[Layout]:
    """From the fastest to the smallest: full weights, recomputed, packed; in each all ways that ranks can share."""
    ways: tuple[Way, ...] = ("one",) if machine.count == 1 else ("ddp", "zero2", "zero3")
    kinds: tuple[Kind | None, ...] = (recipe.quantize,) if recipe.quantize else (None, "int8", "nf4")
    for kind in kinds:
        for recompute in (False, True):
            if recipe.run.checkpointing and not recompute:
                continue
            for way in ways:
                yield Layout(way, kind, recompute, False)
                if machine.device == "cuda" and way in ("zero2", "zero3"):
                    yield Layout(way, kind, recompute, True)


def _refusal(recipe: Recipe, layout: Layout) -> str:
    """Why training would refuse this combination, or nothing."""
    changed = recipe.model_dump() | {"quantize": layout.quantize}
    try:
        checked = Recipe.model_validate(changed)
        if layout.way == "zero3":
            refuse_for_zero3(checked)
    except ValidationError as error:
        return "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
    except UserError as error:
        return str(error)
    return ""


def _wire(shapes: Shapes, way: Way, ranks: int, precision: Format, micro_batches: int) -> int:
    """Bytes that a rank sends in a step: a ring's share of what is reduced and gathered (docs/many-ranks.md)."""
    a, others = shapes.adapter, (ranks - 1) / ranks
    if way in ("one", "ddp"):
        return int(8 * a * others)
    gathered = 0
    if way == "zero3":
        itemsize = 4 if shapes.exact else DTYPES[precision].itemsize
        gathered = micro_batches * itemsize * sum(shared_out(shapes, SHIPPED))
    return int((12 * a + gathered) * others)


def tensors_at_most(inputs: RunInputs, forward: ForwardFn, accelerator: Accelerator) -> int:
    """`grown_at_most` of a run's own micro-batches; a collective, which the first rank computes."""
    ranks, train = accelerator.num_processes, inputs.corpus.train
    size = min(forward.micro_size, len(train), -(-inputs.recipe.batch.global_size // ranks))
    return broadcast(accelerator, lambda: grown_at_most(inputs, forward.dtype, size, accelerator))


def grown_at_most(inputs: RunInputs, dtype: torch.dtype, blocks: int, accelerator: Accelerator, others: int = 0) -> int:
    """Bytes by which a rank grows, at most, from before the base is loaded: with so many `blocks` in a forward.

    `others` are bytes that stay besides, such as those of adapters that learn beside this one.
    """
    kind: Any = accelerator.device.type
    precision: Any = NAME_OF[dtype]
    recipe, config, block = inputs.recipe, inputs.base.config, inputs.corpus.train.packing.block_size
    shapes = shapes_of(config, recipe.lora)
    memory = bytes_per_rank(shapes, way_of(accelerator), accelerator.num_processes, precision, recipe.quantize)
    first, each = grown_by(config, recipe, dtype, block, kind, zero_stage(accelerator) == 3)
    step = memory.held + memory.working(first + (blocks - 1) * each)
    return others + max(step, loading(shapes, memory, kind))
