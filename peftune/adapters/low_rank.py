"""The update ΔW that an adapter makes to one matrix, as thin factors: sums, norms and best approximations in float64.

ΔW = left @ right, (out, in) for the linear layers and (tokens, width) for an embedding. Nothing here is as large as ΔW:
with left = Q1·R1 and rightᵀ = Q2·R2 everything that matters about it stands in the small core R1·R2ᵀ. That way the norm
of a difference is exact to rounding too, where Gram matrices would lose half of the digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from peftune.adapters.layout import PREFIX, Kind, LoraTarget

_SPANNED = 1e-6  # directions weaker than this part of the strongest one are rounding of the float32 they came from


@dataclass(frozen=True)
class LowRankDelta:
    """ΔW of one module: `left` (rows, k) and `right` (k, columns), both float64."""

    name: str
    kind: Kind
    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of `left`: an upper bound of the rank of ΔW."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of ΔW."""
        return self.left.shape[0], self.right.shape[1]

    def parts(self) -> dict[str, torch.Tensor]:
        """The factors as PEFT stores them at scale 1, float32."""
        if self.kind == "embedding":
            named = {"lora_embedding_A": self.left.T, "lora_embedding_B": self.right.T}
        else:
            named = {"lora_A.weight": self.right, "lora_B.weight": self.left}
        return {part: tensor.float().contiguous() for part, tensor in named.items()}

    def as_stored(self) -> LowRankDelta:
        """The same after rounding to float32."""
        return LowRankDelta(self.name, self.kind, self.left.float().double(), self.right.float().double())

    def missed(self, delta: torch.Tensor) -> float:
        """‖`delta` - ΔW‖ of a dense matrix in float64, once this is stored."""
        stored = self.as_stored()
        return float(torch.linalg.matrix_norm(torch.addmm(delta, stored.left, stored.right, alpha=-1)))


def stored_tensors(deltas: Iterable[LowRankDelta]) -> dict[str, torch.Tensor]:
    """The factors of all of these by the names of PEFT's file."""
    return {f"{PREFIX}{delta.name}.{part}": tensor for delta in deltas for part, tensor in delta.parts().items()}


def delta_of(target: LoraTarget, weight: float = 1.0) -> LowRankDelta:
    """`weight` times what the factors of an adapted module add to its matrix; scale and weight are folded into B."""
    parts, factor = target.parts, target.scale * weight
    if target.kind == "embedding":
        a, b = parts["lora_embedding_A"].double(), parts["lora_embedding_B"].double()
        return LowRankDelta(target.name, target.kind, a.T, factor * b.T)
    a, b = parts["lora_A.weight"].double(), parts["lora_B.weight"].double()
    return LowRankDelta(target.name, target.kind, factor * b, a)


def added(updates: Iterable[LowRankDelta]) -> LowRankDelta:
    """The sum of updates of one module, exact: factors side by side, so ranks add up."""
    terms = list(updates)
    left, right = torch.cat([u.left for u in terms], dim=1), torch.cat([u.right for u in terms], dim=0)
    return LowRankDelta(terms[0].name, terms[0].kind, left, right)


def distance(first: LowRankDelta, second: LowRankDelta) -> float:
    """Frobenius norm of the difference."""
    return norm(added([first, LowRankDelta(second.name, second.kind, -second.left, second.right)]))


def norm(update: LowRankDelta) -> float:
    """Frobenius norm ‖ΔW‖."""
    r1, r2 = (torch.linalg.qr(factor, mode="r").R for factor in (update.left, update.right.T))
    return float(torch.linalg.matrix_norm(r1 @ r2.T))


def inner(first: LowRankDelta, second: LowRankDelta) -> float:
    """⟨ΔW1, ΔW2⟩, the sum of products of their elements."""
    return float(((first.left.T @ second.left) * (first.right @ second.right.T)).sum())


@dataclass(frozen=True)
class Spectrum:
    """ΔW = left · diag(values) · right with orthonormal `left` (rows, k) and `right` (k, columns), strongest first."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def spanned(self) -> int:
        """How many directions are there at all; 0 for an update of nothing."""
        return int((self.values > _SPANNED * self.values[0]).sum()) if float(self.values[0]) > 0 else 0


def spectrum(update: LowRankDelta) -> Spectrum:
    """The singular value decomposition, by that of the core."""
    (q1, r1), (q2, r2) = torch.linalg.qr(update.left), torch.linalg.qr(update.right.T)
    left, values, right = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    return Spectrum(q1 @ left, values, right @ q2.T)


def best_of_rank(update: LowRankDelta, rank: int) -> LowRankDelta:
    """The nearest update of at most this rank (Eckart, Young and Mirsky), its strength shared evenly by both factors.

    It is shorter where ΔW has fewer directions than that, and of rank 1 where it has none.
    """
    found = spectrum(update)
    kept = max(1, min(rank, found.spanned()))
    root = found.values[:kept].sqrt()
    return LowRankDelta(update.name, update.kind, found.left[:, :kept] * root, root[:, None] * found.right[:kept])


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """How far the smaller of two spaces lies in the other, 0 to 1 (2106.09685, equation 4); orthonormal columns."""
    return float((first.T @ second).square().sum() / min(first.shape[1], second.shape[1]))
