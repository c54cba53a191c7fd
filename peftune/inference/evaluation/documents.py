"""The loss of a model document by document, and its intervals: alone, and against the base on the same documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from peftune.data.batches import Blocks
from peftune.inference.evaluation.bootstrap import Interval, Statistics, interval, resampled
from peftune.model.loss import LossModel, nats_and_likeliest
from peftune.model.train.layers import to_device


@torch.no_grad()
def nats_by_document(
    scorer: LossModel,
    blocks: Blocks,
    micro_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Summed nats and scored tokens of each document of `blocks`, (documents, 2) float64, in evaluation mode.

    `on_batch` hears how many blocks a batch had.
    """
    scorer.eval()
    documents, nats, first = list[np.ndarray](), list[torch.Tensor](), 0
    for batch in blocks.batches(range(len(blocks)), micro_size):
        moved, rows = batch.to(device), len(batch.ids)
        scored = (batch.targets >= 0).numpy()
        places = to_device(torch.from_numpy(np.flatnonzero(scored)), device)
        hidden = scorer.hidden(moved.ids, moved.positions, moved.segments).flatten(0, 1)[places]
        nats.append(nats_and_likeliest(hidden, scorer.causal().lm_head, moved.targets.flatten()[places])[0])
        within = np.zeros(batch.ids.shape, dtype=np.int64) if batch.segments is None else batch.segments.numpy()
        spans = (blocks.packing.first[first : first + rows, None] + within)[scored]
        documents.append(blocks.packing.example[spans])
        first += rows
        if on_batch is not None:
            on_batch(rows)
    of, summed = np.concatenate(documents), torch.cat(nats).cpu().numpy()  # one wait for the GPU
    return np.stack([np.bincount(of, weights, minlength=len(blocks.documents)) for weights in (summed, None)], axis=1)


def loss_intervals(models: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """95 % intervals over documents; `models` holds, for the base and each adapter, `nats_by_document` of each domain.

    For each model and domain the interval of `perplexity` and, but for the base, `against_base`: the difference of its
    loss (nats per token, below 0 is better), with the `interval` of that difference on the same documents. An interval
    is None where fewer than two documents have a scored token.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for domain, of_base in models["base"].items():
        scored = of_base[:, 1] > 0
        systems = [Statistics(by_domain[domain][scored], _ratio) for by_domain in models.values()]
        draws = resampled(systems)
        losses = [system.value() for system in systems]
        for name, loss, drawn in zip(models, losses, draws, strict=True):
            found[name][domain] = {"perplexity": _interval(np.exp(np.minimum(drawn, 700)), scored)}
            if name != "base":
                difference = {"loss": loss - losses[0], "interval": _interval(drawn - draws[0], scored)}
                found[name][domain]["against_base"] = difference
    return found


def _ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _interval(drawn: np.ndarray, scored: np.ndarray) -> Interval | None:
    return interval(drawn) if scored.sum() > 1 else None
