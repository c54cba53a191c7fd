"""One adapter from several: the weighted sum of their updates, exact at full rank or the nearest one of a lower rank.

Exact means that factors are put side by side: Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁B₁, w₂s₂B₂, …]·[A₁; A₂; …]. Weight and scale
(alpha/r, or alpha/√r for rsLoRA) go into B in float64, which is rounded to float32 once; the result's own scale is 1.
Ranks add up module by module, so ranks, alphas and targets may differ; a module that an adapter lacks adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftune.adapters.base_of import infer_config, read_layout, shared_base
from peftune.adapters.directory import Adapter, check_free, read_adapter
from peftune.adapters.edit.computed_adapter import read_as, write_computed_adapter
from peftune.adapters.layout import AdapterLayout, model_order
from peftune.adapters.low_rank import LowRankDelta, added, best_of_rank, delta_of, distance, norm
from peftune.adapters.provenance import chat_of, parses_special_tokens
from peftune.errors import UserError
from peftune.model.base import open_base
from peftune.model.weights import Weights

_ROUNDING = 1e-6  # relative; float32 factors of a float64 product come to about 5e-8


@dataclass(frozen=True)
class CombineResult:
    """What was written: per module the rank, ‖ΔW‖ of the exact sum, and the relative error of what is stored.

    `weights` are by the adapters' paths; `rank` is the one that was asked for, None for the exact sum.
    """

    out: Path
    base: str
    weights: dict[str, float]
    rank: int | None
    modules: dict[str, dict[str, float]]
    relative_error: float

    @property
    def accuracy(self) -> str:
        """How near the stored update is to the sum, in words."""
        return "exact to rounding" if self.rank is None else f"the nearest of rank {self.rank}"

    @property
    def rank_range(self) -> str:
        """`rank 8`, or `ranks 4 to 16` where they differ by module."""
        ranks = sorted({int(module["rank"]) for module in self.modules.values()})
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters combine` writes as JSON; its keys are a contract."""
        values = {key: value for key, value in vars(self).items() if key != "weights"}
        adapters = [{"adapter": name, "weight": weight} for name, weight in self.weights.items()]
        return values | {"out": str(self.out), "adapters": adapters}


def combine(
    directories: Sequence[Path], weights: Sequence[float], out: Path, rank: int | None = None, base: str | None = None
) -> CombineResult:
    """Write `out`, an adapter whose update is the sum of `weights` times those of `directories`.

    `rank` cuts each module to its best approximation of at most that rank. `base` names the base that they share where
    the adapters do not name it themselves. Raises UserError for adapters of several bases, and for what is no sum of
    low-rank updates (DoRA, modules trained in full, biases).
    """
    check_free(out, "the adapter")
    _check_weights(directories, weights)
    adapters = [read_adapter(directory) for directory in directories]
    for adapter in adapters:
        _check_settings(adapter)
    given = None if base is None else open_base(base)
    identity = shared_base(adapters, given)
    config = infer_config(adapters) if given is None else given.config
    layouts = [read_layout(adapter, config) for adapter in adapters]
    for adapter, layout in zip(adapters, layouts, strict=True):
        _check_replaced(adapter, layout, None if given is None else given.weights)
    exact, strength = _sums(layouts, weights)
    stored = exact if rank is None else [best_of_rank(update, rank) for update in exact]
    norms = [norm(update) for update in exact]  # errors are of what is stored, rounded to float32
    errors = [distance(update, kept.as_stored()) for update, kept in zip(exact, stored, strict=True)]
    error, size = math.hypot(*errors), math.hypot(*norms)
    fits = math.isfinite(error) and size < torch.finfo(torch.float32).max
    if not fits or (rank is None and error > _ROUNDING * strength):
        raise UserError(f"combine: a sum of norm {size:.1e} does not fit float32; choose other weights")
    modules = {
        kept.name: {"rank": kept.rank, "norm": one, "relative_error": missed / one if one else 0.0}
        for kept, one, missed in zip(stored, norms, errors, strict=True)
    }
    by_path: dict[str, float] = {}
    for directory, weight in zip(directories, weights, strict=True):  # one that is given twice counts twice
        by_path[str(directory)] = by_path.get(str(directory), 0.0) + weight
    result = CombineResult(out, identity["base"], by_path, rank, modules, error / size)
    write_computed_adapter(out, identity, config, stored, _source(adapters, weights, result), _card(result))
    return result


def _source(adapters: Sequence[Adapter], weights: Sequence[float], result: CombineResult) -> dict[str, Any]:
    """What peftune.json says of where it comes from, and how its texts are read."""
    sources = [
        {"adapter": str(adapter.directory), "weight": weight, "fingerprint": adapter.fingerprint}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    said = {"adapters": sources, "rank": result.rank, "relative_error": result.relative_error}
    parses = any(parses_special_tokens(adapter.provenance) for adapter in adapters)  # the others saw none
    chats = {chat_of(adapter.provenance) for adapter in adapters}
    return {"combined": said} | read_as(parses, chats.pop() if len(chats) == 1 else None)


def _check_weights(directories: Sequence[Path], weights: Sequence[float]) -> None:
    if not directories:
        raise UserError("combine: no adapter given; expected one or more directories")
    if len(weights) != len(directories):
        raise UserError(f"weights: {len(weights)} given for {len(directories)} adapters; expected one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights {', '.join(map(str, weights))}: expected finite numbers")
    if not any(weights):
        raise UserError("weights: all are 0, so nothing would be left")


def _check_settings(adapter: Adapter) -> None:
    """UserError for an adapter that is more than a sum of low-rank updates."""
    config = adapter.config
    saved = ", ".join(config.get("modules_to_save") or [])
    reasons = {
        "is a DoRA, which scales the base's own columns, so its update is not of low rank; merge it, then extract a "
        "LoRA from the result with peftune adapters extract": config.get("use_dora"),
        "is PiSSA as PEFT stores it, which first takes a part out of the base; convert it with PEFT's "
        "path_initial_model_for_weight_conversion, or merge it": config.get("init_lora_weights") == "pissa",
        "trained biases too, which no sum of low-rank updates holds; merge it instead": config.get("lora_bias")
        or config.get("bias", "none") != "none",
        "trained rows of single tokens, which no low-rank update holds; merge it instead": config.get(
            "trainable_token_indices"
        ),
        f"trained {saved} in full, which no low-rank update holds; merge it instead": saved,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"adapter {adapter.directory}: {reason}")


def _check_replaced(adapter: Adapter, layout: AdapterLayout, base: Weights | None) -> None:
    """UserError for a tensor stored in full, unless it is the base's: PEFT copies the embedding beside its adapter."""
    for name, tensor in layout.replaced.items():
        found = f"adapter {adapter.directory}: holds {name} in full"
        if base is None:
            raise UserError(f"{found}; pass the base, to check that it is only a copy")
        original = base.tensor(base.stored_name(name))
        if not torch.equal(original, tensor.to(original.dtype)):
            raise UserError(f"{found}, and it is not the base's own; merge it instead")


def _sums(layouts: Sequence[AdapterLayout], weights: Sequence[float]) -> tuple[list[LowRankDelta], float]:
    """The sums by module, and the norm of all their terms together."""
    terms: dict[str, list[LowRankDelta]] = {}
    for layout, weight in zip(layouts, weights, strict=True):
        for name, target in layout.targets.items():
            if weight:
                terms.setdefault(name, []).append(delta_of(target, weight))
    sums = [added(terms[name]) for name in sorted(terms, key=model_order)]
    strength = math.hypot(*(norm(update) for updates in terms.values() for update in updates))
    if math.hypot(*map(norm, sums)) <= 1e-7 * strength:
        raise UserError("combine: the updates cancel each other, so nothing would be left; choose other weights")
    return sums, strength


def _card(result: CombineResult) -> str:
    rows = "\n".join(f"| `{name}` | {weight:g} |" for name, weight in result.weights.items())
    count = len(result.modules)
    return f"""The weighted sum of the updates of adapters for `{result.base}`, {result.accuracy}: {count} modules,
{result.rank_range}, {result.relative_error:.1e} of the sum's norm away from it. It was not trained and not evaluated.

| adapter | weight |
|---|---|
{rows}"""
