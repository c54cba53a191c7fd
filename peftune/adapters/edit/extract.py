"""A LoRA of a given rank from a full fine-tune and its base, and how much of the fine-tune it holds.

Per module D = W_tuned - W_base is read from both checkpoints, one tensor at a time, and approximated by its strongest
singular directions (`best_product`: eigenvectors of the smaller Gram matrix in float64). For 768 x 3,072 this took
0.2 s where the full singular value decomposition took 13 s (2 cores, torch 2.13).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from peftune.adapters.directory import check_free
from peftune.adapters.edit.computed_adapter import read_as, write_computed_adapter
from peftune.adapters.layout import Kind
from peftune.adapters.low_rank import LowRankDelta
from peftune.console import Console
from peftune.errors import UserError
from peftune.model.architecture import DECISIVE
from peftune.model.base import open_base
from peftune.model.lora import ALL, ATTENTION, best_product
from peftune.model.weights import WTE, Weights

_PRESETS = {"all": ALL, "attention": ATTENTION, "mlp": tuple(name for name in ALL if name.startswith("mlp."))}
_NEGLIGIBLE = 1e-12  # part of the largest singular value below which a direction is rounding of float64
_GROUPS = {
    "output head": re.compile(r"^lm_head\."), "embeddings": re.compile(r"\.wte\.|\.wpe\."),
    "norms": re.compile(r"\.ln_"), "biases": re.compile(r"\.bias$"), "other matrices": re.compile(""),
}  # fmt: skip
_SLICE = 1_000_000  # values in float64 at a time: 8 MB
Figures = dict[str, Any]


@dataclass(frozen=True)
class CheckpointDiff:
    """Two checkpoints of one architecture, read a tensor at a time."""

    base: Weights
    tuned: Weights

    def difference(self, name: str) -> tuple[torch.Tensor, float]:
        """(D in float64, ‖W_base‖) of one tensor, D = W_tuned - W_base."""
        before = self.base.tensor(name).double()
        return self.tuned.tensor(name).double() - before, float(torch.linalg.vector_norm(before))

    def squared_norms(self, name: str) -> tuple[float, float]:
        """(‖D‖², ‖W_base‖²) of one tensor, read in slices."""
        changed, size = 0.0, 0.0
        readers = (weights.chunks(weights.stored_name(name), _SLICE) for weights in (self.base, self.tuned))
        for before, after in zip(*readers, strict=True):
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


@dataclass(frozen=True)
class ExtractResult:
    """What was written: per module rank, ‖D‖, ‖D‖/‖W_base‖ and what the LoRA misses of D; the same over all modules.

    `unchanged` are target modules without any change. `not_held` is what else the fine-tune changed: by kind, the
    number of tensors and the relative change. `held` is the share of the whole change, in squared norm, that the LoRA
    holds. `notes` are remarks for the person.
    """

    out: Path
    base: str
    tuned: str
    rank: int
    modules: dict[str, Figures]
    relative_error: float
    unchanged: list[str]
    not_held: dict[str, Figures]
    held: float
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters extract` writes as JSON; its keys are a contract."""
        return {**vars(self), "out": str(self.out)}


def extract(base: str, tuned: str, rank: int, out: Path, targets: str = "all") -> ExtractResult:
    """Write `out`, the adapter of this rank that brings the base nearest to the fine-tune in the target modules.

    `targets` is all, attention, mlp, or names with commas between. Raises UserError for checkpoints of different
    architectures, and where no target was changed.
    """
    check_free(out, "the adapter")
    suffixes = _module_names(targets)
    if rank < 1:
        raise UserError(f"rank {rank}: expected 1 or more")
    before, after = open_base(base), open_base(tuned)
    check_same_architecture(before.config, after.config, base, tuned)
    diff = CheckpointDiff(before.weights, after.weights)
    identity = before.identity()
    names = [f"transformer.h.{block}.{suffix}" for block in range(before.config.n_layer) for suffix in suffixes]
    # the output head is one of the tensors where either checkpoint has its own
    others = sorted({*before.weights.names(), *after.weights.names()} - {f"{name}.weight" for name in names})
    updates, modules, rest = _changes(diff, names, others, rank)
    if not updates:
        changed = [name for name, (square, _) in rest.items() if square]
        if not changed:
            raise UserError(f"{tuned}: holds the same weights as {base}; there is no change to extract")
        raise UserError(
            f"{tuned}: differs from {base} in {len(changed)} tensors, such as {changed[0]}, but in none of the target "
            f"modules ({targets}); choose other targets"
        )
    wanted = sum(figures["norm"] ** 2 for figures in modules.values())
    missed = sum((figures["norm"] * figures["relative_error"]) ** 2 for figures in modules.values())
    held = (wanted - missed) / (wanted + sum(square for square, _ in rest.values()))
    result = ExtractResult(
        out, base, tuned, rank, modules, math.sqrt(missed / wanted), [name for name in names if name not in modules],
        by_group(rest), held, diff.notes(),
    )  # fmt: skip
    source = {key: getattr(result, key) for key in ("tuned", "rank", "relative_error", "held")}
    source = {"extracted": source | {"tuned_fingerprint": after.fingerprint}}
    source |= read_as(after.parses_special_tokens, after.chat)
    write_computed_adapter(out, identity, before.config, updates, source, _card(result))
    return result


def _changes(
    diff: CheckpointDiff, names: list[str], others: list[str], rank: int
) -> tuple[list[LowRankDelta], dict[str, Figures], dict[str, tuple[float, float]]]:
    """The updates of the modules that changed, and their figures; of all other tensors the squared norms."""
    updates, modules, rest = [], dict[str, Figures](), {}
    with Console().progress as progress:
        task = progress.add_task("extracting", total=len(names) + len(others), note="")
        for name in names:
            delta, size = diff.difference(f"{name}.weight")  # (in, out), as GPT-2 stores the matrices of its blocks
            if delta.any():
                update, modules[name] = _extract_module(name, delta.T, size, rank)
                updates.append(update)
            progress.advance(task)
        for name in others:
            rest[name] = diff.squared_norms(name)
            progress.advance(task)
    return updates, modules, rest


def _module_names(targets: str) -> tuple[str, ...]:
    if targets in _PRESETS:
        return _PRESETS[targets]
    names = tuple(dict.fromkeys(name.strip() for name in targets.split(",") if name.strip()))
    unknown = [name for name in names if name not in ALL]
    if unknown or not names:
        found = unknown[0] if unknown else targets
        raise UserError(f"targets {found!r}: expected all, attention, mlp, or some of {', '.join(ALL)}")
    return names


def _extract_module(name: str, delta: torch.Tensor, size: float, rank: int) -> tuple[LowRankDelta, Figures]:
    """The update of one module, and what it misses after rounding to float32; `size` is ‖W_base‖."""
    norm = float(torch.linalg.matrix_norm(delta))
    if not math.isfinite(norm):
        raise UserError(f"{name}.weight: base or fine-tune holds values that are not finite")
    update = strongest(name, "conv1d", delta, rank)
    relative = norm / size if size else None
    error = update.missed(delta) / norm
    return update, {"rank": update.rank, "norm": norm, "relative_change": relative, "relative_error": error}


def strongest(name: str, kind: Kind, delta: torch.Tensor, rank: int) -> LowRankDelta:
    """The best approximation of a dense matrix (rows, columns) of float64 by at most this rank."""
    if delta.shape[0] > delta.shape[1]:
        transposed = strongest(name, kind, delta.T, rank)
        return LowRankDelta(name, kind, transposed.right.T, transposed.left.T)
    a, b = best_product(delta, rank, scale=1.0)
    roots = torch.linalg.vector_norm(b, dim=0)  # each column of B has the square root of its singular value
    kept = roots.square() > _NEGLIGIBLE * roots.square().max()
    return LowRankDelta(name, kind, b[:, kept], a[kept])


def check_same_architecture(base: GPT2Config, tuned: GPT2Config, name: str, other: str) -> None:
    """UserError with the settings that differ between a base and its fine-tune, if any do."""
    pairs = {key: (getattr(base, key, None), getattr(tuned, key, None)) for key in DECISIVE}
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


def _card(result: ExtractResult) -> str:
    rest = f"It does not hold what changed elsewhere: {', '.join(result.not_held)}." if result.not_held else ""
    return f"""The change of {len(result.modules)} modules from `{result.base}` to the full fine-tune `{result.tuned}`,
by its strongest {result.rank} directions in each: {result.relative_error:.1%} of the change in these modules is missing
(relative error in Frobenius norm). {rest}"""
