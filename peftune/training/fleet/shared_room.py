"""Forwards that several adapters share: as many micro-batches as there is room for, of each adapter its own.

Products with frozen weights are made once over all tokens; an adapter sees its own tokens alone, has its own draws, and
its gradient is a part of one buffer, which ranks add up at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from peftune.data.batches import Batch
from peftune.model.train.forward import Piece, nats_of_pieces
from peftune.training.distributed.signals import StopNow, StopRequest
from peftune.training.optimizer import Gradient
from peftune.training.step import ForwardFn, Taking


@dataclass
class SharedRoom:
    """`step.Room` of adapters over one base in one process."""

    blocks: int
    gradient: torch.Tensor
    adapters: int
    """Of one forward, at most."""

    @staticmethod
    def of(gradients: Sequence[Gradient], blocks: int, adapters: int) -> SharedRoom:
        """Gradients move into one buffer."""
        sizes = [gradient.flat.numel() for gradient in gradients]
        whole = torch.zeros(sum(sizes), dtype=torch.float32, device=gradients[0].flat.device)
        for gradient, part in zip(gradients, torch.split(whole, sizes), strict=True):
            gradient.use(part)
        return SharedRoom(blocks, whole, adapters)

    def accumulate(self, taking: Sequence[Taking], accelerator: Accelerator, stop: StopRequest) -> list[list[float]]:
        """Add up the gradients of this rank's micro-batches; of each adapter its nats and largest element."""
        gradients, forwards = [t.learner.gradient for t in taking], [t.forward for t in taking]
        device = forwards[0].device
        generators = [torch.Generator(device).manual_seed(t.seed(accelerator.process_index)) for t in taking]
        for gradient in gradients:
            gradient.flat.zero_()
        nats = [torch.zeros((), dtype=torch.float64, device=device) for _ in taking]
        positions = self.blocks * taking[0].learner.inputs.corpus.train.packing.block_size
        batches = [t.batches(accelerator) for t in taking]
        with suppress(StopNow), stop.at_once(), ExitStack() as terms:
            for forward in forwards if device.type == "cpu" else ():  # a GPU splits those of all at once
                terms.enter_context(forward.between_updates())
            for group in side_by_side(batches, positions, self.adapters):
                if stop.name is not None:
                    break
                losses = _nats([(forwards[i], batch, generators[i]) for i, batch in group]).unbind()
                scaled = [loss * taking[i].state.loss_scale for (i, _), loss in zip(group, losses, strict=True)]
                Gradient.add_to_all([gradients[i] for i, _ in group], torch.stack(scaled).sum())
                for (i, _), loss in zip(group, losses, strict=True):
                    nats[i] += loss.detach()
        largest = [gradient.largest().double() for gradient in gradients]
        found: list[list[float]] = torch.stack([torch.stack(nats), torch.stack(largest)], dim=1).tolist()
        return found  # host sync in the line above


def _nats(given: Sequence[tuple[ForwardFn, Batch, torch.Generator]]) -> torch.Tensor:
    """Summed nats of each adapter's batch in one forward, with what draws its dropout: (given,) float64."""
    pieces = []
    for forward, batch, generator in given:
        assert forward.fast is not None, "adapters share forwards of the fast kind alone"
        pieces.append(Piece(forward.fast, (batch.ids, batch.positions, batch.targets, batch.segments), generator))
    return nats_of_pieces(pieces)


def side_by_side(queues: Sequence[Iterator[Batch]], positions: int, most: int) -> Iterator[list[tuple[int, Batch]]]:
    """At most so many batches of all queues, and positions, or one batch, at a time; each with its queue's number.

    A queue has one batch in a group, so that its gradients are summed and its draws are made as if it were alone.
    """
    group: dict[int, Batch] = {}
    size, left = 0, dict(enumerate(queues))
    while left:
        for number, queue in [*left.items()]:
            batch = next(queue, None)
            if batch is None:
                del left[number]
                continue
            if group and (size + batch.ids.numel() > positions or len(group) == most or number in group):
                yield [*group.items()]
                group, size = {}, 0
            group[number] = batch
            size += batch.ids.numel()
    if group:
        yield [*group.items()]
