"""Which adapter a text belongs to: the one under which it is likeliest, if it surely is likelier than under the base.

Source: choosing an expert by its likelihood of the prompt, as in Branch-Train-Merge (2208.03306), section 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftune.errors import UserError
from peftune.inference.pace import Pace, chunk_tokens
from peftune.inference.request import ModelProvider
from peftune.model.decode.batch import DecodeBatch
from peftune.model.train.layers import to_device

THRESHOLD = 0.0
JUDGED_TOKENS = 64  # the last of a prompt; docs/bank.md has the accuracy with more and with fewer
_ERRORS = 2.0  # standard errors that a gain must exceed
_USUAL_VARIANCE, _WEIGHT = 4.0, 4.0  # of a token's gain, and how many tokens that assumption counts for
_ROWS = 8  # adapters in one forward


@dataclass(frozen=True)
class Route:
    """`scores`: nats per token by which each adapter finds the prompt likelier than the base does.

    `name` is the adapter with the highest score, None (the base) where its `margin` is not above `threshold`. The
    margin is its mean gain less two standard errors of that mean, over the tokens after the first: that one tells how
    documents begin, not what this one is about. None where there is no such token. `tokens` were judged.
    """

    name: str | None
    scores: dict[str, float]
    margin: float | None
    threshold: float | None
    tokens: int


class Routing:
    """A prompt that is being routed, some forwards at a time; how they are cut changes nothing in the result.

    (To the bit where a row's numbers do not depend on the batch, else to rounding.) Arguments as of `route`.
    """

    def __init__(
        self,
        models: ModelProvider,
        ids: Sequence[int],
        names: Sequence[str] | None = None,
        threshold: float | None = THRESHOLD,
    ) -> None:
        self._spec, config = models.spec, models.spec.config
        if not ids or min(ids) < 0 or max(ids) >= config.vocab_size:
            raise UserError(f"token ids must lie in 0 to {config.vocab_size - 1}, at least one of them")
        self._names, self._threshold = tuple(models.names if names is None else names), threshold
        self._variants = [models.variant(name) for name in (None, *self._names)]
        judged = [ids[0], *ids[1:][-min(JUDGED_TOKENS, config.n_positions) :]]
        self._ids = to_device(torch.tensor(judged), self._spec.device)
        self._nats: list[list[float]] = [[] for _ in self._variants]  # of each token, by variant
        self._group: range = range(0)  # the variants in `_batch`
        self._batch: DecodeBatch | None = None

    @property
    def is_done(self) -> bool:
        """Whether all numbers are there."""
        return not self._names or len(self._nats[-1]) == len(self._ids) - 1

    @property
    def width(self) -> int:
        """Tokens of one row in the next forward: the least that `advance` computes."""
        return min(chunk_tokens(self._spec.device), len(self._ids) - 1 - self._start)

    @property
    def _start(self) -> int:
        """How many tokens of the present group are done, 0 where a new group begins."""
        done = len(self._nats[self._group[-1]]) if self._group else 0
        return done if done < len(self._ids) - 1 else 0

    def advance(self, tokens: int) -> int:
        """One forward of at most so many tokens, or one row; returns how many it were."""
        start, width = self._start, self.width
        if start == 0:
            rows = max(1, min(_ROWS, tokens // width, len(self._variants) - self._group.stop))
            self._group = range(self._group.stop, self._group.stop + rows)
            needs_cache = len(self._ids) - 1 > width
            cache = self._spec.kv_cache(rows, len(self._ids)) if needs_cache else None
            self._batch = DecodeBatch(rows, cache)
        assert self._batch is not None, "a group has begun"
        variants = [self._variants[number] for number in self._group]
        ids, targets = (self._ids[start + shift : start + width + shift] for shift in (0, 1))
        hidden = self._batch.prefill(variants, range(len(variants)), ids.expand(len(variants), -1), start)
        found = [
            torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            for variant, states in zip(variants, hidden, strict=True)
            for logits in self._batch.logits([variant], states[None])
        ]
        for number, nats in zip(self._group, torch.stack(found).tolist(), strict=True):  # host sync here
            self._nats[number] += nats
        if self.is_done:
            self._batch = None
        return len(variants) * width

    def result(self) -> Route:
        """The choice, once all is done; an adapter whose numbers are not finite is left out."""
        assert self.is_done, "every adapter was compared"
        base, *others = self._nats
        gains = {
            name: [b - a for a, b in zip(own, base, strict=True)] for name, own in zip(self._names, others, strict=True)
        }
        scores = {
            name: math.fsum(gain) / max(1, len(gain)) for name, gain in gains.items() if all(map(math.isfinite, gain))
        }
        best = max(scores, key=scores.__getitem__, default=None)
        margin = _margin(gains[best][1:]) if best is not None else None
        sure = self._threshold is None or (margin is not None and margin > self._threshold)
        return Route(best if sure else None, scores, margin, self._threshold, len(base))


def route(
    models: ModelProvider, ids: Sequence[int], names: Sequence[str] | None = None, threshold: float | None = THRESHOLD
) -> Route:
    """Where a prompt `ids` (context token first) belongs, among `names` (None: all adapters).

    Of a longer prompt the last `JUDGED_TOKENS` count, after the context token. `threshold` None: the best adapter
    answers, sure or not. Raises UserError for an unknown name, and for ids that the model does not know.
    """
    routing = Routing(models, ids, names, threshold)
    while not routing.is_done:
        routing.advance(_ROWS * JUDGED_TOKENS)
    return routing.result()


def advance(routing: Routing, pace: Pace, tokens: int) -> int:
    """`routing.advance(tokens)`, whose time the pace is told."""
    start = time.perf_counter()
    computed = routing.advance(tokens)
    pace.took(computed, time.perf_counter() - start)
    return computed


def _margin(gains: Sequence[float]) -> float | None:
    """The mean less two standard errors; a few tokens tell little of their variance, so the usual one is mixed in."""
    count = len(gains)
    if not count:
        return None
    mean = math.fsum(gains) / count
    squares = math.fsum((gain - mean) ** 2 for gain in gains)
    variance = (squares + _WEIGHT * _USUAL_VARIANCE) / (count - 1 + _WEIGHT)
    return mean - _ERRORS * math.sqrt(variance / count)
