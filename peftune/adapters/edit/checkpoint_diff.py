"""What a full fine-tune changed in its base, tensor by tensor: never more than one tensor of each in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GPT2Config

from peftune.errors import UserError
from peftune.model.architecture import Architecture
from peftune.model.weights import HEAD, WTE, Weights

_OTHER_FUNCTION = set(Architecture.model_fields) - {"tie_word_embeddings", "reorder_and_upcast_attn"}
_KINDS = {
    "output head": re.compile(r"^lm_head\."), "embeddings": re.compile(r"\.wte\.|\.wpe\."),
    "norms": re.compile(r"\.ln_"), "biases": re.compile(r"\.bias$"), "other matrices": re.compile(""),
}  # fmt: skip
_PIECE = 1_000_000  # values in float64 at a time: 8 MB
Facts = dict[str, float | None]


@dataclass(frozen=True)
class CheckpointDiff:
    """Two checkpoints of one architecture, read a tensor at a time."""

    base: Weights
    tuned: Weights

    def names(self) -> list[str]:
        """Tensors to compare; the output head is one where either checkpoint has its own."""
        return sorted(set(self.base.names()) | set(self.tuned.names()))

    def difference(self, name: str) -> tuple[torch.Tensor, float]:
        """(D in float64, ‖W_base‖) of a whole tensor."""
        before = self.base.tensor(name).double()
        return self.tuned.tensor(name).double() - before, float(torch.linalg.vector_norm(before))

    def change(self, name: str) -> tuple[float, float]:
        """(‖D‖², ‖W_base‖²) of a tensor, read in pieces."""
        moved, size = 0.0, 0.0
        for chunks in zip(_chunks(self.base, name), _chunks(self.tuned, name), strict=True):
            pieces = (torch.split(chunk.reshape(-1), _PIECE) for chunk in chunks)
            for before, after in zip(*pieces, strict=True):
                moved += float((after.double() - before.double()).square().sum())
                size += float(before.double().square().sum())
        return moved, size

    def notes(self) -> list[str]:
        """What rounding alone may have changed."""
        kind = self.tuned.dtype(WTE)
        if kind == self.base.dtype(WTE) or torch.finfo(kind).eps <= torch.finfo(self.base.dtype(WTE)).eps:
            return []
        return [
            f"{self.tuned.directory} is stored as {str(kind).removeprefix('torch.')}, more coarsely than its base: "
            f"rounding alone moves a weight by up to {torch.finfo(kind).eps / 2:.1e} of itself, and counts as change"
        ]


def _chunks(weights: Weights, name: str) -> Iterator[torch.Tensor]:
    return weights.chunks(WTE if name == HEAD and weights.tied else name)


def check_alike(base: GPT2Config, tuned: GPT2Config, name: str, other: str) -> None:
    """UserError naming what tells a base and its fine-tune apart, were it not the weights."""
    pairs = {key: (getattr(base, key, None), getattr(tuned, key, None)) for key in sorted(_OTHER_FUNCTION)}
    if pairs["n_inner"] != (None, None):
        pairs["n_inner"] = (base.n_inner or 4 * base.n_embd, tuned.n_inner or 4 * tuned.n_embd)
    unlike = [f"{key} {one} and {two}" for key, (one, two) in pairs.items() if one != two]
    if unlike:
        raise UserError(f"{name} and {other} are not a base and its fine-tune: {'; '.join(unlike)}")


def by_kind(rest: dict[str, tuple[float, float]]) -> dict[str, Facts]:
    """Number of changed tensors, ‖D‖ and ‖D‖/‖W_base‖ (None where that is 0) for each kind of tensor that changed."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, sizes in rest.items():
        groups.setdefault(next(kind for kind, pattern in _KINDS.items() if pattern.search(name)), []).append(sizes)
    found: dict[str, Facts] = {}
    for kind, members in groups.items():
        moved, before = sum(m for m, _ in members), sum(b for _, b in members)
        if moved:
            changed = sum(m > 0 for m, _ in members)
            relative = math.sqrt(moved / before) if before else None
            found[kind] = {"tensors": changed, "norm": math.sqrt(moved), "relative_change": relative}
    return found
