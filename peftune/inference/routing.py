"""Which adapter a text belongs to: the one under which it is likeliest.

Source: choosing an expert by its likelihood of the prompt, as in Branch-Train-Merge (2208.03306), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftune.errors import UserError
from peftune.inference.request import ModelProvider
from peftune.model.decode.batch import DecodeBatch

THRESHOLD = 0.0
_ADAPTERS = 8  # in one forward
_TOKENS = 256  # whose logits are in memory at a time


@dataclass(frozen=True)
class Route:
    """`scores`: nats per token by which each adapter finds the prompt likelier than the base does.

    `name` is the adapter with the highest score, None (the base) where that is not above `threshold`.
    """

    name: str | None
    scores: dict[str, float]
    threshold: float


def route(
    models: ModelProvider, ids: Sequence[int], names: Sequence[str] | None = None, threshold: float = THRESHOLD
) -> Route:
    """Where a prompt `ids` (context token first) belongs, among `names` (None: all adapters).

    Without a token after its context a prompt says nothing: all scores are 0. Raises UserError for an unknown name.
    """
    names = models.names if names is None else names
    scores = dict.fromkeys(names, 0.0)
    if len(ids) > 1 and names:
        base, *others = nats_per_token(models, ids, [None, *names])
        scores = {name: base - nats for name, nats in zip(names, others, strict=True)}
    best = max(scores, key=scores.__getitem__, default=None)
    return Route(best if best is not None and scores[best] > threshold else None, scores, threshold)


def nats_per_token(models: ModelProvider, ids: Sequence[int], names: Sequence[str | None]) -> list[float]:
    """Mean negative log-likelihood of a text under each adapter (None: the base), its first token being context.

    Eight adapters share one mixed forward. Of a longer text the first n_positions tokens count.
    """
    config = models.spec.config
    if max(ids) >= config.vocab_size:
        raise UserError(f"token id {max(ids)}: the model knows {config.vocab_size} tokens")
    tokens = torch.tensor(ids[: config.n_positions], device=models.spec.device)
    found: list[float] = []
    for first in range(0, len(names), _ADAPTERS):
        variants = [models.variant(name) for name in names[first : first + _ADAPTERS]]
        batch = DecodeBatch(len(variants))
        hidden = batch.prefill(variants, range(len(variants)), tokens[:-1].expand(len(variants), -1), 0)
        for variant, states in zip(variants, hidden, strict=True):
            total = 0.0
            for part, targets in zip(torch.split(states, _TOKENS), torch.split(tokens[1:], _TOKENS), strict=True):
                logits = batch.logits([variant], part[None])[0]
                total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            found.append(total / len(states))
    return found
