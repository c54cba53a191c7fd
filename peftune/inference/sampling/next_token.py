"""From the logits of one step to its tokens. Shapes: B rows, V vocabulary entries; every function is pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftune.model.train.layers import to_device

_COLDEST = 1e-6  # a smaller temperature overflows float32 and chooses nothing else
_TRIES = (64, 2048)  # the nucleus is sought among so many tokens first; sorting all 50,257 takes 5 ms a row


def scale_by_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Logits divided by `temperature` > 0 (less than 1e-6 counts as 1e-6)."""
    return logits_BV / max(temperature, _COLDEST)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Only the `k` largest logits of each row, the rest -inf; ties with the k-th stay; 0 keeps all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    kth = logits_BV.topk(k).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Only the fewest tokens whose probabilities reach `p` in (0, 1], the rest -inf; at least one stays.

    Source: nucleus sampling (https://arxiv.org/abs/1904.09751), section 3.1.
    """
    if p >= 1:
        return logits_BV
    probability_BV = logits_BV.softmax(-1, dtype=torch.float64)
    if logits_BV.device.type != "cpu":  # where sorting is quick, and asking whether few are enough is not
        return logits_BV.masked_fill(~_nucleus(probability_BV, p, logits_BV.shape[-1])[0], -torch.inf)
    keep_BV = torch.zeros_like(probability_BV, dtype=torch.bool)
    missing_B = torch.ones(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
    for among in (*_TRIES, logits_BV.shape[-1]):
        keep_BV[missing_B], found = _nucleus(probability_BV[missing_B], p, among)
        missing_B[missing_B.clone()] = ~found
        if not bool(missing_B.any()):
            break
    return logits_BV.masked_fill(~keep_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """Only tokens at least `min_p` in [0, 1] times as likely as the likeliest of their row, the rest -inf; 0 keeps all.

    Source: https://arxiv.org/abs/2407.01082, section 3.
    """
    if min_p == 0:
        return logits_BV
    probability_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probability_BV < min_p * probability_BV.amax(-1, keepdim=True), -torch.inf)


def _nucleus(probability_BV: Tensor, p: float, among: int) -> tuple[Tensor, Tensor]:
    """Which tokens hold `p` of a row, sought in its `among` likeliest; and whether these were enough (B,)."""
    probability, order = probability_BV.topk(min(among, probability_BV.shape[-1]))
    better = probability.cumsum(-1) - probability
    keep_BV = torch.zeros_like(probability_BV, dtype=torch.bool).scatter(-1, order, better < p)
    return keep_BV, (better[:, -1] >= p) | (among >= probability_BV.shape[-1])


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """One token id a row (B,): the inverse of the cumulative distribution at `uniforms_B` in [0, 1), float64.

    One random number a row and step, so that the stream of a seed is the same on every device.
    """
    cumulative = logits_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms_B[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def next_tokens(
    logits_BV: Tensor,
    generators: Sequence[torch.Generator],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The next token id of every row (B,); `temperature` 0 is greedy and uses no random number.

    Row i draws from `generators[i]` (on the CPU) alone, so its text does not depend on its neighbours. Temperature,
    min-p, top-k and top-p apply in this order, as in vLLM (Transformers has min-p last).
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = keep_min_p(scale_by_temperature(logits_BV, temperature), min_p)
    logits_BV = keep_top_p(keep_top_k(logits_BV, top_k), top_p)
    uniforms = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in generators])
    return draw(logits_BV, to_device(uniforms, logits_BV.device))
