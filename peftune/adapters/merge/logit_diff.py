"""Differences of logits over a vocabulary that comes in slices, so that no complete softmax is ever in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True)
class Difference:
    """Of logits: largest absolute difference, mean KL(reference ‖ candidate) in nats, share of equal argmax."""

    max_abs: float
    mean_kl: float
    argmax_agreement: float
    largest_logit: float
    positions: int


class LogitDiffAccumulator:
    """Running sums over slices of the vocabulary, (n,) each, float64 (an online softmax)."""

    def __init__(self, positions: int) -> None:
        self.largest = torch.full((2, positions), -torch.inf, dtype=torch.float64)
        self.argmax = torch.zeros((2, positions), dtype=torch.int64)
        self.total = torch.zeros((2, positions), dtype=torch.float64)
        self.weighted = torch.zeros(positions, dtype=torch.float64)
        self.max_abs = self.largest_logit = 0.0
        self.seen = 0

    def add(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add one slice of the logits, (n, slice)."""
        for number, logits in enumerate((reference, candidate)):
            top, index = logits.max(dim=1)
            larger = top > self.largest[number]
            self.argmax[number] = torch.where(larger, index + self.seen, self.argmax[number])
            new = torch.maximum(top, self.largest[number])
            shrink = torch.exp(self.largest[number] - new)
            terms = torch.exp(logits - new[:, None])
            self.total[number] = self.total[number] * shrink + terms.sum(dim=1)
            if number == 0:
                self.weighted = self.weighted * shrink + (terms * (reference - candidate)).sum(dim=1)
            self.largest[number] = new
        self.seen += reference.shape[1]
        self.max_abs = _largest(self.max_abs, (reference - candidate).abs().max().item())
        self.largest_logit = _largest(self.largest_logit, reference.abs().max().item())

    def difference(self) -> Difference:
        """KL = E_p[p - q] - log Z_p + log Z_q, per position."""
        log_z = self.total.log() + self.largest
        kl = self.weighted / self.total[0] - log_z[0] + log_z[1]
        agreement = (self.argmax[0] == self.argmax[1]).double().mean().item()
        return Difference(self.max_abs, max(kl.mean().item(), 0.0), agreement, self.largest_logit, len(kl))


def _largest(known: float, new: float) -> float:
    return new if new != new or new > known else known  # a NaN is kept


def combined(parts: list[Difference]) -> Difference:
    """The difference over all positions, from those over parts of them."""
    positions = sum(part.positions for part in parts)
    return Difference(
        max_abs=reduce(_largest, (part.max_abs for part in parts)),
        mean_kl=sum(part.mean_kl * part.positions for part in parts) / positions,
        argmax_agreement=sum(part.argmax_agreement * part.positions for part in parts) / positions,
        largest_logit=reduce(_largest, (part.largest_logit for part in parts)),
        positions=positions,
    )
