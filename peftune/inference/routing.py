"""Which adapter a text belongs to: the one under which it is likeliest.

Source: choosing an expert by its likelihood of the prompt, as in Branch-Train-Merge (2208.03306), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftune.errors import UserError
from peftune.model.decode.batch import DecodeBatch, ModelVariant

if TYPE_CHECKING:
    from peftune.inference.bank import AdapterBank

THRESHOLD = 0.0
_TOGETHER = 8  # adapters in one forward
_PLACES = 256  # places whose logits are in memory at a time


@dataclass(frozen=True)
class Route:
    """`scores`: nats per token by which each adapter finds the prompt likelier than the base does.

    `name` is the adapter with the highest score, None (the base) where that is not above `threshold`.
    """

    name: str | None
    scores: dict[str, float]
    threshold: float


def route(
    bank: AdapterBank, ids: Sequence[int], names: Sequence[str] | None = None, threshold: float = THRESHOLD
) -> Route:
    """Where a prompt `ids` (context token first) belongs, among `names` (None: all adapters of the bank).

    Without a token after its context a prompt says nothing: all scores are 0. Raises UserError for an unknown name.
    """
    names = bank.names if names is None else names
    scores = dict.fromkeys(names, 0.0)
    if len(ids) > 1 and names:
        base, *others = nats_per_token(bank, ids, [None, *names])
        scores = {name: base - nats for name, nats in zip(names, others, strict=True)}
    best = max(scores, key=scores.__getitem__, default=None)
    return Route(best if best is not None and scores[best] > threshold else None, scores, threshold)


def nats_per_token(bank: AdapterBank, ids: Sequence[int], names: Sequence[str | None]) -> list[float]:
    """Mean negative log-likelihood of a text under each adapter (None: the base), its first token being context.

    All adapters read it in one mixed forward (8 at a time). Of a longer text the first n_positions tokens count.
    """
    if max(ids) >= bank.config.vocab_size:
        raise UserError(f"token id {max(ids)}: the model knows {bank.config.vocab_size} tokens")
    read = torch.tensor(ids[: bank.config.n_positions], device=bank.plan.device)
    found: list[float] = []
    for first in range(0, len(names), _TOGETHER):
        functions = [bank.function(name) for name in names[first : first + _TOGETHER]]
        batch = DecodeBatch(bank.plan, len(functions), remember=False)
        hidden = batch.prefill(functions, range(len(functions)), read[:-1].expand(len(functions), -1), 0)
        found += [
            _mean_nats(batch, function, states, read[1:]) for function, states in zip(functions, hidden, strict=True)
        ]
    return found


def _mean_nats(batch: DecodeBatch, function: ModelVariant, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    total = 0.0
    for first in range(0, len(targets), _PLACES):
        part, wanted = hidden[first : first + _PLACES], targets[first : first + _PLACES]
        logits = batch.logits([function] * len(part), part)
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total / len(targets)
