"""Two adapters side by side: angle and distance of their updates, and what differs in how they were made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftune.adapters.base_of import base_mismatch, read_layout
from peftune.adapters.directory import Adapter, read_adapter
from peftune.adapters.inspect.describe import place_of, variant
from peftune.adapters.inspect.scan import targets
from peftune.adapters.layout import AdapterLayout
from peftune.adapters.low_rank import LowRankDelta, Spectrum, delta_of, distance, inner, norm, overlap, spectrum
from peftune.errors import UserError

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Per module of both: norms, cosine, distance ‖ΔWa - ΔWb‖/‖ΔWa‖, and how far the spaces that they read from
    (`overlap_in`) and write to (`overlap_out`) lie in each other, 0 to 1; None where an update is zero.

    `overall` counts modules that only one has as zero in the other. `apart` says why the bases may differ, and is empty
    where they are the same; `differences` are settings and data, first and second.
    """

    first: Path
    second: Path
    apart: str
    overall: Figures
    modules: dict[str, Figures]
    only_first: list[str]
    only_second: list[str]
    differences: dict[str, tuple[Any, Any]]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The contract of `peftune adapters compare --json`."""
        return {**vars(self), "first": str(self.first), "second": str(self.second), "same_base": not self.apart}


def compare(first: Path, second: Path) -> Comparison:
    """Compare two adapters, whatever their ranks, scales and targets; UserError only for one that cannot be read."""
    a, b = read_adapter(first), read_adapter(second)
    layouts = read_layout(a), read_layout(b)
    ones, others = ({name: delta_of(target) for name, target in layout.targets.items()} for layout in layouts)
    shared = [n for n in sorted(ones, key=place_of) if n in others and ones[n].shape == others[n].shape]
    unlike = [name for name in ones if name in others and name not in shared]
    if unlike and not shared:
        shapes = f"{ones[unlike[0]].shape} and {others[unlike[0]].shape}"
        raise UserError(f"{first} and {second}: no module has the same shape in both, {unlike[0]} has {shapes}")
    return Comparison(
        first, second, base_mismatch(a, b), _overall(ones, others, shared),
        {name: _figures(ones[name], others[name]) for name in shared},
        sorted(ones.keys() - others.keys(), key=place_of), sorted(others.keys() - ones.keys(), key=place_of),
        _differences((a, b), layouts), _notes((a, b), layouts, unlike),
    )  # fmt: skip


def _figures(a: LowRankDelta, b: LowRankDelta) -> Figures:
    sizes, spaces = (norm(a), norm(b)), (spectrum(a), spectrum(b))
    return {
        "norm_first": sizes[0],
        "norm_second": sizes[1],
        "cosine": _cosine(inner(a, b), *sizes),
        "distance": distance(a, b) / sizes[0] if sizes[0] else None,
        "overlap_in": _overlap(spaces, "right" if a.kind != "embedding" else "left"),
        "overlap_out": _overlap(spaces, "left" if a.kind != "embedding" else "right"),
    }


def _cosine(product: float, first: float, second: float) -> float | None:
    return max(-1.0, min(1.0, product / (first * second))) if first and second else None


def _overlap(spaces: tuple[Spectrum, Spectrum], side: str) -> float | None:
    counts = [space.spanned() for space in spaces]
    if not all(counts):
        return None
    bases = [
        space.left[:, :count] if side == "left" else space.right[:count].T
        for space, count in zip(spaces, counts, strict=True)
    ]
    return overlap(*bases)


def _overall(ones: dict[str, LowRankDelta], others: dict[str, LowRankDelta], shared: list[str]) -> Figures:
    sizes = [math.hypot(*map(norm, updates.values())) for updates in (ones, others)]
    product = math.fsum(inner(ones[name], others[name]) for name in shared)
    gaps = [distance(ones[name], others[name]) for name in shared]
    gaps += [norm(update) for name, update in [*ones.items(), *others.items()] if name not in shared]
    return {
        "norm_first": sizes[0],
        "norm_second": sizes[1],
        "cosine": _cosine(product, *sizes),
        "distance": math.hypot(*gaps) / sizes[0] if sizes[0] else None,
    }


def _differences(
    pair: tuple[Adapter, Adapter], layouts: tuple[AdapterLayout, AdapterLayout]
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, and where both were trained by a recipe what differs in these."""
    recipes = [_recipe(adapter) for adapter in pair]
    ones, others = (_settings(adapter, layout) for adapter, layout in zip(pair, layouts, strict=True))
    if all(recipes):
        ones, others = ones | recipes[0], others | recipes[1]
    keys = [*ones, *(key for key in others if key not in ones)]
    return {key: (ones.get(key), others.get(key)) for key in keys if ones.get(key) != others.get(key)}


def _settings(adapter: Adapter, layout: AdapterLayout) -> dict[str, Any]:
    recorded = adapter.provenance or {}
    return {
        "base": adapter.base,
        "variant": variant(adapter),
        "targets": targets(adapter),
        "ranks": sorted({target.rank for target in layout.targets.values()}),
        "scales": sorted({target.scale for target in layout.targets.values()}),
        **{key: recorded.get(key) for key in ("step", "tokens", "precision")},
    }


def _recipe(adapter: Adapter) -> dict[str, Any]:
    """Every value of the recipe that decides what is learnt, flat; `lora.` stands in the adapter's own settings."""
    identity = (adapter.provenance or {}).get("identity")
    if not isinstance(identity, dict):
        return {}
    return {key: value for key, value in identity.items() if not key.startswith("lora.")}


def _notes(
    adapters: tuple[Adapter, Adapter], layouts: tuple[AdapterLayout, AdapterLayout], unlike: list[str]
) -> list[str]:
    notes = [f"{name} has another shape in each and is left out" for name in unlike]
    recipes = [bool(_recipe(adapter)) for adapter in adapters]
    for adapter, layout, has_recipe in zip(adapters, layouts, recipes, strict=True):
        if not has_recipe and any(recipes):
            notes.append(f"{adapter.directory}: no recipe is recorded, so training is not compared")
        if layout.dora or any(target.pissa for target in layout.targets.values()):
            kind = "DoRA's magnitudes" if layout.dora else "what PiSSA takes out of the base"
            notes.append(f"{adapter.directory}: B·A alone is compared, without {kind}")
        if layout.replaced:
            notes.append(f"{adapter.directory}: {', '.join(sorted(layout.replaced))} came whole and are not compared")
    return notes
