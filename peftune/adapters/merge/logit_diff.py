"""Differences of logits over a vocabulary that comes in slices, so that no complete softmax is ever in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

POSITIONS = 128  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Difference:
    """Of logits: largest absolute difference, mean KL(reference ‖ candidate) in nats, share of equal argmax."""

    max_abs_logit_difference: float
    mean_kl: float
    argmax_agreement: float
    largest_logit: float
    positions: int


class LogitDiffAccumulator:
    """Running sums over slices of the vocabulary, (n,) for reference and candidate, float64 (an online softmax)."""

    def __init__(self, positions: int) -> None:
        self.largest = torch.full((2, positions), -torch.inf, dtype=torch.float64)
        self.argmax = torch.zeros((2, positions), dtype=torch.int64)
        self.total = torch.zeros((2, positions), dtype=torch.float64)
        self.weighted = torch.zeros(positions, dtype=torch.float64)
        self.extremes = torch.zeros(2, dtype=torch.float64)  # of |difference| and |reference|; a NaN is kept

    def add(self, part: slice, first_token: int, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Add logits (positions in `part`, slice) of the tokens from `first_token` on."""
        for row, logits in enumerate((reference, candidate)):
            (top, index), largest = logits.max(dim=1), self.largest[row, part]
            self.argmax[row, part] = torch.where(top > largest, index + first_token, self.argmax[row, part])
            new = torch.maximum(top, largest)
            shrink = torch.exp(largest - new)
            terms = torch.exp(logits - new[:, None])
            self.total[row, part] = self.total[row, part] * shrink + terms.sum(dim=1)
            if row == 0:
                self.weighted[part] = self.weighted[part] * shrink + (terms * (reference - candidate)).sum(dim=1)
            self.largest[row, part] = new
        now = torch.stack([(reference - candidate).abs().max(), reference.abs().max()])
        self.extremes = torch.maximum(self.extremes, now)

    def difference(self) -> Difference:
        """KL = E_p[p - q] - log Z_p + log Z_q, per position; rounding below 0 is cut off."""
        log_z = self.total.log() + self.largest
        kl = self.weighted / self.total[0] - log_z[0] + log_z[1]
        mean_kl = sum(max(part.mean().item(), 0.0) * len(part) for part in torch.split(kl, POSITIONS)) / len(kl)
        agreement = (self.argmax[0] == self.argmax[1]).double().mean().item()
        max_abs, largest_logit = self.extremes.tolist()
        return Difference(max_abs, mean_kl, agreement, largest_logit, len(kl))
