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
from peftune.adapters.edit import computed_adapter
from peftune.adapters.layout import AdapterLayout
from peftune.adapters.low_rank import LowRankDelta, added, best_of_rank, delta_of, distance, norm
from peftune.adapters.provenance import tensors_fingerprint
from peftune.errors import UserError
from peftune.model.base import open_base
from peftune.model.weights import HEAD, WTE, Weights

_ROUNDING = 1e-6  # relative; float32 factors of a float64 product come to about 5e-8


@dataclass(frozen=True)
class Combined:
    """What was written: per module the rank, ‖ΔW‖ of the exact sum, and the relative error of what is stored."""

    out: Path
    base: str
    weights: dict[str, float]
    rank: int | None
    modules: dict[str, dict[str, float]]
    relative_error: float

    def as_json(self) -> dict[str, Any]:
        """The contract of `peftune adapters combine --json`."""
        return {
            "out": str(self.out), "base": self.base, "rank": self.rank, "relative_error": self.relative_error,
            "adapters": [{"adapter": name, "weight": weight} for name, weight in self.weights.items()],
            "modules": self.modules,
        }  # fmt: skip


def combine(
    directories: Sequence[Path], weights: Sequence[float], out: Path, rank: int | None = None, base: str | None = None
) -> Combined:
    """Write `out`, an adapter whose update is the sum of `weights` times those of `directories`.

    `rank` cuts each module to its best approximation of at most that rank. `base` says which base they share where
    the adapters do not tell themselves. Raises UserError for adapters of several bases, and for what is no sum of
    low-rank updates (DoRA, modules trained whole, biases).
    """
    check_free(out, "the adapter")
    _check_weights(directories, weights)
    adapters = [read_adapter(directory) for directory in directories]
    for adapter in adapters:
        _refuse_settings(adapter)
    described = shared_base(adapters, base)
    found = None if base is None else open_base(base)
    shape = infer_config(adapters) if found is None else found.config
    layouts = [read_layout(adapter, shape) for adapter in adapters]
    for adapter, layout in zip(adapters, layouts, strict=True):
        _refuse_tensors(adapter, layout, None if found is None else found.weights)
    exact, strength = _sums(layouts, weights)
    kept = exact if rank is None else [best_of_rank(update, rank) for update in exact]
    names = _named(directories, weights)
    result = _measured(Combined(out, described["base"], names, rank, {}, 0.0), exact, kept, strength)
    computed_adapter.write_computed_adapter(out, described, shape, kept, _how(adapters, weights, result), _card(result))
    return result


def _check_weights(directories: Sequence[Path], weights: Sequence[float]) -> None:
    if not directories:
        raise UserError("combine: no adapter given; expected one or more directories")
    if len(weights) != len(directories):
        raise UserError(f"--weights: {len(weights)} given for {len(directories)} adapters; expected one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights {', '.join(map(str, weights))}: expected finite numbers")
    if not any(weights):
        raise UserError("--weights: all are 0, so nothing would be left")


def _refuse_settings(adapter: Adapter) -> None:
    config, where = adapter.config, f"adapter {adapter.directory}"
    if config.get("use_dora"):
        raise UserError(
            f"{where}: is a DoRA, which scales the base's own columns, so its update is no product of thin factors; "
            "merge it, then take a LoRA out of the result with peftune adapters extract"
        )
    if config.get("init_lora_weights") == "pissa":
        raise UserError(
            f"{where}: is PiSSA as PEFT stores it, which first takes a part out of the base; convert it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it"
        )
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        raise UserError(f"{where}: trained biases too, which no sum of low-rank updates holds; merge it instead")
    if config.get("modules_to_save"):
        whole = ", ".join(config["modules_to_save"])
        raise UserError(f"{where}: trained {whole} whole, which no low-rank update holds; merge it instead")


def _refuse_tensors(adapter: Adapter, layout: AdapterLayout, base: Weights | None) -> None:
    """PEFT likes to store the embedding beside an adapter of it; a copy of the base's changes nothing."""
    for name, tensor in layout.replaced.items():
        if base is None:
            raise UserError(
                f"adapter {adapter.directory}: brings {name} whole; pass --base, to see that it is only a copy"
            )
        held = base.tensor(WTE if name == HEAD and base.tied else name)
        if not torch.equal(held, tensor.to(held.dtype)):
            raise UserError(
                f"adapter {adapter.directory}: brings {name} whole, and it is not the base's own; merge it instead"
            )


def _sums(layouts: Sequence[AdapterLayout], weights: Sequence[float]) -> tuple[list[LowRankDelta], float]:
    """The sums by module, and how strong all that went into them is together."""
    terms: dict[str, list[LowRankDelta]] = {}
    for layout, weight in zip(layouts, weights, strict=True):
        for name, target in layout.targets.items():
            if weight:
                terms.setdefault(name, []).append(delta_of(target, weight))
    sums = [added(terms[name]) for name in sorted(terms, key=_order)]
    strength = math.hypot(*(norm(update) for updates in terms.values() for update in updates))
    if math.hypot(*map(norm, sums)) <= 1e-7 * strength:
        raise UserError("combine: the updates cancel each other, so nothing would be left; choose other weights")
    return sums, strength


def _order(name: str) -> tuple[int, str]:
    words = name.split(".")
    return (int(words[2]) if words[1:2] == ["h"] else -1, name)


def _named(directories: Sequence[Path], weights: Sequence[float]) -> dict[str, float]:
    """Weights by the adapters' paths; one that is given twice counts with both."""
    named: dict[str, float] = {}
    for directory, weight in zip(directories, weights, strict=True):
        named[str(directory)] = named.get(str(directory), 0.0) + weight
    return named


def _measured(result: Combined, exact: list[LowRankDelta], kept: list[LowRankDelta], strength: float) -> Combined:
    """With errors of what is stored, after rounding to float32."""
    modules: dict[str, dict[str, float]] = {}
    errors, norms = [], []
    for whole, cut in zip(exact, kept, strict=True):
        size, lost = norm(whole), distance(whole, cut.as_stored())
        errors.append(lost)
        norms.append(size)
        modules[whole.name] = {"rank": cut.rank, "norm": size, "relative_error": lost / size if size else 0.0}
    lost = math.hypot(*errors)
    whole_norm = math.hypot(*norms)
    fits = math.isfinite(lost) and whole_norm < torch.finfo(torch.float32).max
    if not fits or (result.rank is None and lost > _ROUNDING * strength):
        raise UserError(f"combine: a sum of norm {whole_norm:.1e} does not fit float32; choose other weights")
    relative = lost / whole_norm
    return Combined(result.out, result.base, result.weights, result.rank, modules, relative)


def _how(adapters: Sequence[Adapter], weights: Sequence[float], result: Combined) -> dict[str, Any]:
    parts = [
        {
            "adapter": str(adapter.directory), "weight": weight,
            "fingerprint": tensors_fingerprint(adapter.config, adapter.tensors),
        }
        for adapter, weight in zip(adapters, weights, strict=True)
    ]  # fmt: skip
    return {"combined": {"adapters": parts, "rank": result.rank, "relative_error": result.relative_error}}


def _card(result: Combined) -> str:
    rows = "\n".join(f"| `{name}` | {weight:g} |" for name, weight in result.weights.items())
    ranks = sorted({int(module["rank"]) for module in result.modules.values()})
    told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    exact = "exact to rounding" if result.rank is None else f"the nearest of rank {result.rank}"
    return f"""The weighted sum of the updates of adapters for `{result.base}`, {exact}: {len(result.modules)} modules,
{told}, {result.relative_error:.1e} of the sum's norm away from it. It was not trained and not evaluated.

| adapter | weight |
|---|---|
{rows}"""
