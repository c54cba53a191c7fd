"""Exact evaluation: summed nats over scored tokens, per named domain; the matrix of adapters and domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from peftune.data.batches import Blocks
from peftune.model.scorer import Scorer, nats_to_perplexity


@dataclass(frozen=True)
class Score:
    """Loss of one model on one domain: `nats` summed over `tokens` scored tokens of `text_bytes` UTF-8 bytes."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def figures(self) -> dict[str, float]:
        """loss (nats per token), perplexity (its exponential), bits per byte of the scored text."""
        bits = self.nats / math.log(2) / max(1, self.text_bytes)
        return {"loss": self.loss, "perplexity": nats_to_perplexity(self.loss), "bits_per_byte": bits}


@torch.no_grad()
def summed_nats_over(
    scorer: torch.nn.Module,
    blocks: Blocks,
    chosen: Sequence[int],
    micro_size: int,
    device: torch.device,
    packed: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Summed nats of the chosen blocks in evaluation mode; `on_batch` hears how many blocks a batch had."""
    training = scorer.training
    scorer.eval()
    try:
        total = 0.0
        for batch in blocks.batches(chosen, micro_size, packed):
            moved = batch.to(device)
            total += float(scorer(moved.ids, moved.positions, moved.targets, moved.segments))
            if on_batch is not None:
                on_batch(len(batch.ids))
        return total
    finally:
        scorer.train(training)


def score(scorer: Scorer, blocks: Blocks, micro_size: int, device: torch.device, on_batch: Callable[[int], None] | None = None) -> Score:
    """Score all blocks on one process."""
    nats = summed_nats_over(scorer, blocks, range(len(blocks)), micro_size, device, on_batch=on_batch)
    return Score(nats, blocks.tokens(), blocks.text_bytes())
