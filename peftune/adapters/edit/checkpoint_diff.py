"""What a full fine-tune changed in its base, tensor by tensor: never more than one tensor of each in memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from transformers import GPT2Config

from peftune.errors import UserError
from peftune.model.architecture import Architecture
from peftune.model.weights import WTE, Weights

_ARCHITECTURE = sorted(set(Architecture.model_fields) - {"tie_word_embeddings", "reorder_and_upcast_attn"})
_GROUPS = {
    "output head": re.compile(r"^lm_head\."), "embeddings": re.compile(r"\.wte\.|\.wpe\."),
    "norms": re.compile(r"\.ln_"), "biases": re.compile(r"\.bias$"), "other matrices": re.compile(""),
}  # fmt: skip
_SLICE = 1_000_000  # values in float64 at a time: 8 MB
Figures = dict[str, float | None]


@dataclass(frozen=True)
class CheckpointDiff:
    """Two checkpoints of one architecture, read a tensor at a time."""

    base: Weights
    tuned: Weights

    def names(self) -> list[str]:
        """Tensors to compare; the output head is one where either checkpoint has its own."""
        return sorted(set(self.base.names()) | set(self.tuned.names()))

    def difference(self, name: str) -> tuple[torch.Tensor, float]:
        """(D in float64, ‖W_base‖) of one tensor, D = W_tuned - W_base."""
        before = self.base.tensor(name).double()
        return self.tuned.tensor(name).double() - before, float(torch.linalg.vector_norm(before))

    def squared_norms(self, name: str) -> tuple[float, float]:
        """(‖D‖², ‖W_base‖²) of one tensor, read in slices."""
        changed, size = 0.0, 0.0
        readers = (weights.chunks(weights.stored_name(name)) for weights in (self.base, self.tuned))
        for chunks in zip(*readers, strict=True):
            for before, after in zip(*(torch.split(chunk.reshape(-1), _SLICE) for chunk in chunks), strict=True):
                changed += float((after.double() - before.double()).square().sum())
                size += float(before.double().square().sum())
        return changed, size

    def notes(self) -> list[str]:
        """What rounding alone may have changed."""
        dtype = self.tuned.dtype(WTE)
        if torch.finfo(dtype).eps <= torch.finfo(self.base.dtype(WTE)).eps:
            return []
        return [
            f"{self.tuned.directory} is stored as {str(dtype).removeprefix('torch.')}, more coarsely than its base: "
            f"rounding alone moves a weight by up to {torch.finfo(dtype).eps / 2:.1e} of itself, and counts as change"
        ]


def check_same_architecture(base: GPT2Config, tuned: GPT2Config, name: str, other: str) -> None:
    """UserError with the settings that differ between a base and its fine-tune, if any do."""
    pairs = {key: (getattr(base, key, None), getattr(tuned, key, None)) for key in _ARCHITECTURE}
    if pairs["n_inner"] != (None, None):
        pairs["n_inner"] = (base.n_inner or 4 * base.n_embd, tuned.n_inner or 4 * tuned.n_embd)
    differing = [f"{key} {one} and {two}" for key, (one, two) in pairs.items() if one != two]
    if differing:
        raise UserError(f"{name} and {other} are not a base and its fine-tune: {'; '.join(differing)}")


def by_group(squared_norms: dict[str, tuple[float, float]]) -> dict[str, Figures]:
    """Number of changed tensors, ‖D‖ and ‖D‖/‖W_base‖ (None where that is 0) for each kind of tensor that changed."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, squares in squared_norms.items():
        group = next(group for group, pattern in _GROUPS.items() if pattern.search(name))
        groups.setdefault(group, []).append(squares)
    figures: dict[str, Figures] = {}
    for group, members in groups.items():
        changed, size = (sum(squares) for squares in zip(*members, strict=True))
        if changed:
            relative = math.sqrt(changed / size) if size else None
            tensors = sum(square > 0 for square, _ in members)
            figures[group] = {"tensors": tensors, "norm": math.sqrt(changed), "relative_change": relative}
    return figures
