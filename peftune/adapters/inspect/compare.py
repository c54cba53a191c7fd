"""Two adapters side by side: angle and distance of their updates, and what differs in how they were made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peftune.adapters.base_of import base_mismatch, read_layout
from peftune.adapters.directory import Adapter, read_adapter
from peftune.adapters.inspect.describe import beyond_factors, lora_variant
from peftune.adapters.inspect.scan import target_modules
from peftune.adapters.layout import AdapterLayout, model_order
from peftune.adapters.low_rank import LowRankDelta, delta_of, distance, inner, norm, overlap, spectrum
from peftune.adapters.provenance import recorded, recorded_dict
from peftune.errors import UserError

T = TypeVar("T")
Pair = tuple[T, T]
Figures = dict[str, float | None]
Differences = dict[str, Pair[Any]]


@dataclass(frozen=True)
class Comparison:
    """Per module of both: norms, cosine, distance ‖ΔWa - ΔWb‖/‖ΔWa‖, and how far the spaces that they read from
    (`overlap_in`) and write to (`overlap_out`) lie in each other, 0 to 1; None where an update is zero.

    `overall` counts modules that only one has as zero in the other. `base_mismatch` says why the bases may differ, and
    is empty where they are the same; `differences` are settings and data, first and second.
    """

    first: Path
    second: Path
    base_mismatch: str
    overall: Figures
    modules: dict[str, Figures]
    only_first: list[str]
    only_second: list[str]
    differences: Differences
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters compare` writes as JSON; its keys are a contract."""
        values = {key: value for key, value in vars(self).items() if key != "base_mismatch"}
        paths = {"first": str(self.first), "second": str(self.second)}
        return values | paths | {"apart": self.base_mismatch, "same_base": not self.base_mismatch}


def compare(first: Path, second: Path) -> Comparison:
    """Compare two adapters, whatever their ranks, scales and targets; UserError only for one that cannot be read."""
    adapters = read_adapter(first), read_adapter(second)
    layouts = read_layout(adapters[0]), read_layout(adapters[1])
    a, b = ({name: delta_of(target) for name, target in layout.targets.items()} for layout in layouts)
    shared = [name for name in sorted(a, key=model_order) if name in b and a[name].shape == b[name].shape]
    reshaped = [name for name in a if name in b and name not in shared]
    if reshaped and not shared:
        shapes = f"{a[reshaped[0]].shape} and {b[reshaped[0]].shape}"
        raise UserError(f"{first} and {second}: no module has the same shape in both, {reshaped[0]} has {shapes}")
    notes = [f"{name} has another shape in each and is left out" for name in reshaped]
    modules = {name: _figures(a[name], b[name]) for name in shared}
    recipes = [_recipe(adapter) for adapter in adapters]
    return Comparison(
        first, second, base_mismatch(*adapters), _overall(a, b, shared), modules,
        sorted(a.keys() - b.keys(), key=model_order), sorted(b.keys() - a.keys(), key=model_order),
        _differences(adapters, layouts, recipes), notes + _notes(adapters, layouts, recipes),
    )  # fmt: skip


def _figures(a: LowRankDelta, b: LowRankDelta) -> Figures:
    product, norms = inner(a, b), (norm(a), norm(b))
    spectra = spectrum(a), spectrum(b)
    spanned = [s.spanned() for s in spectra]
    overlaps: list[float | None] = [None, None]
    if all(spanned):
        rows = overlap(*(s.left[:, :count] for s, count in zip(spectra, spanned, strict=True)))
        columns = overlap(*(s.right[:count].T for s, count in zip(spectra, spanned, strict=True)))
        overlaps = [rows, columns] if a.kind == "embedding" else [columns, rows]  # rows of an embedding are its input
    return _norms_and_angle(product, norms, distance(a, b)) | {"overlap_in": overlaps[0], "overlap_out": overlaps[1]}


def _overall(a: dict[str, LowRankDelta], b: dict[str, LowRankDelta], shared: list[str]) -> Figures:
    norms = math.hypot(*map(norm, a.values())), math.hypot(*map(norm, b.values()))
    product = math.fsum(inner(a[name], b[name]) for name in shared)
    distances = [distance(a[name], b[name]) for name in shared]
    distances += [norm(update) for name, update in [*a.items(), *b.items()] if name not in shared]
    return _norms_and_angle(product, norms, math.hypot(*distances))


def _norms_and_angle(product: float, norms: Pair[float], gap: float) -> Figures:
    first, second = norms
    cosine = max(-1.0, min(1.0, product / (first * second))) if first and second else None
    relative = gap / first if first else None
    return {"norm_first": first, "norm_second": second, "cosine": cosine, "distance": relative}


def _differences(adapters: Pair[Adapter], layouts: Pair[AdapterLayout], recipes: list[dict[str, Any]]) -> Differences:
    """Settings that differ, and where both were trained by a recipe what differs in these."""
    a, b = map(_settings, adapters, layouts)
    if all(recipes):
        a, b = a | recipes[0], b | recipes[1]
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def _settings(adapter: Adapter, layout: AdapterLayout) -> dict[str, Any]:
    return {
        "base": adapter.base,
        "variant": lora_variant(adapter),
        "targets": target_modules(adapter),
        "ranks": sorted({target.rank for target in layout.targets.values()}),
        "scales": sorted({target.scale for target in layout.targets.values()}),
        **{key: recorded(adapter.provenance, key) for key in ("step", "tokens", "precision")},
    }


def _recipe(adapter: Adapter) -> dict[str, Any]:
    """Every recipe value that decides what is learnt, flat; without `lora.`, which the adapter's own settings show."""
    identity = recorded_dict(adapter.provenance, "identity")
    return {key: value for key, value in identity.items() if not key.startswith("lora.") and key != "files"}


def _notes(adapters: Pair[Adapter], layouts: Pair[AdapterLayout], recipes: list[dict[str, Any]]) -> list[str]:
    """What is left out of the comparison."""
    notes = []
    for adapter, layout, recipe in zip(adapters, layouts, recipes, strict=True):
        if not recipe and any(recipes):
            notes.append(f"{adapter.directory}: no recipe is recorded, so training is not compared")
        if missing := beyond_factors(layout):
            notes.append(f"{adapter.directory}: B·A alone is compared, without {missing}")
        if layout.replaced:
            names = ", ".join(sorted(layout.replaced))
            notes.append(f"{adapter.directory}: {names} are stored in full and are not compared")
        notes += [
            f"{adapter.directory}: {len(rows.indices)} rows of {name} are stored beside B·A and are not compared"
            for name, rows in layout.rows.items()
        ]
    return notes
