"""One adapter, described: where its update sits and how strong it is, what it was trained on, what made it.

The norm of an update comes from its factors. DoRA, PiSSA as PEFT stores it and modules trained in full change the base
by more than their factors; given the base, the full change is computed, one matrix at a time, as a merge does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.adapters.attach import fit
from peftune.adapters.base_of import read_layout
from peftune.adapters.directory import Adapter, read_adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget, block_of, model_order
from peftune.adapters.low_rank import delta_of, norm
from peftune.adapters.provenance import directory_of, place_of_base, recorded
from peftune.model.base import open_base
from peftune.model.weights import Weights


@dataclass(frozen=True)
class ModuleDescription:
    """One adapted module; `relative` is ‖ΔW‖/‖W_base‖, None without the base."""

    rank: int
    alpha: float
    scale: float
    norm: float
    relative: float | None = None


@dataclass(frozen=True)
class AdapterDescription:
    """What `peftune adapters show` prints; `norms_are` says what the norms are of, `replaced` lists the tensors that
    the adapter stores in full, `rows` how many single rows of a tensor.
    """

    directory: Path
    name: str
    base: str | None
    base_place: str | None
    variant: str
    parameters: int
    megabytes: float
    fingerprint: str
    modules: dict[str, ModuleDescription]
    replaced: list[str]
    rows: dict[str, int]
    norms_are: str
    provenance: dict[str, Any] | None = field(repr=False)

    def layers(self) -> dict[str, float]:
        """‖ΔW‖ over all modules of each block, and of each module outside the blocks; in the order of the model."""
        squares: dict[str, float] = {}
        for name, module in self.modules.items():
            squares[block_of(name)] = squares.get(block_of(name), 0.0) + module.norm**2
        return {block: math.sqrt(square) for block, square in squares.items()}

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters show` writes as JSON; its keys are a contract."""
        values = {key: value for key, value in vars(self).items() if key not in ("directory", "replaced")}
        modules = {name: vars(module) for name, module in self.modules.items()}
        own = {"whole": self.replaced, "layers": self.layers(), "modules": modules}
        return {"adapter": str(self.directory), **values, **own}


def describe(directory: Path, base: str | None = None) -> AdapterDescription:
    """Read one adapter; with `base` norms are also given relative to the base's weights.

    Raises UserError for a broken adapter, for one that is not for a GPT-2, and for another base than its own.
    """
    weights = None
    if base is None:
        adapter = read_adapter(directory)
        layout = read_layout(adapter)
    else:
        opened = open_base(base)
        adapter, layout, _ = fit(directory, opened)
        weights = opened.weights
    missing = beyond_factors(layout)
    norms_are = "of the whole update" if not missing else "of the whole change"
    if missing and weights is None:
        norms_are = f"of B·A alone, without {missing}; pass the base for the whole change"
    modules = {name: _module(layout.targets[name], layout, weights) for name in sorted(layout.targets, key=model_order)}
    return AdapterDescription(
        directory, directory.resolve().name, adapter.base, _place(adapter), lora_variant(adapter),
        sum(tensor.numel() for tensor in adapter.tensors.values()), size_in_megabytes(adapter),
        adapter.fingerprint, modules, sorted(layout.replaced),
        {name: len(rows.indices) for name, rows in layout.rows.items()}, norms_are, adapter.provenance,
    )  # fmt: skip


def _place(adapter: Adapter) -> str | None:
    """The directory in which its base lies, on this machine; None where it is not found, or on a hub."""
    name = place_of_base(adapter.directory, adapter.config, adapter.provenance)
    path = directory_of(name) if name else None
    return str(path) if path else None


def lora_variant(adapter: Adapter) -> str:
    """`lora`, `dora`, `combined`, …: what peftune.json records, else what the PEFT configuration says."""
    provenance, config = adapter.provenance or {}, adapter.config
    for key in ("combined", "extracted"):
        if key in provenance:
            return key
    variant = recorded(provenance, "recipe", "lora", "variant")
    if isinstance(variant, str):
        return variant
    pissa = ["pissa"] if config.get("init_lora_weights") == "pissa" else []
    flags = {"use_dora": "dora", "use_rslora": "rslora"}
    return "+".join([*(name for flag, name in flags.items() if config.get(flag)), *pissa]) or "lora"


def size_in_megabytes(adapter: Adapter) -> float:
    """Size of its tensors in 10^6 bytes."""
    return sum(tensor.nbytes for tensor in adapter.tensors.values()) / 1e6


def beyond_factors(layout: AdapterLayout) -> str:
    """What changes the base besides the products B·A, in words; empty for an adapter without."""
    pissa = any(target.pissa for target in layout.targets.values())
    return "DoRA's magnitudes" if layout.dora else "the part that PiSSA takes out of the base" if pissa else ""


def _module(target: LoraTarget, layout: AdapterLayout, weights: Weights | None) -> ModuleDescription:
    size, relative = norm(delta_of(target)), None
    if weights is not None:
        name = f"{target.name}.weight"
        source = weights.stored_name(name)
        if layout.dora or target.pissa:
            size, base_norm = _merged_change(name, source, layout, weights)
        else:
            base_norm = math.sqrt(sum(float(chunk.double().square().sum()) for chunk in weights.chunks(source)))
        relative = size / base_norm if base_norm else None
    return ModuleDescription(target.rank, target.alpha, target.scale, size, relative)


def _merged_change(name: str, source: str, layout: AdapterLayout, weights: Weights) -> tuple[float, float]:
    """(‖W_merged - W_base‖, ‖W_base‖) of one matrix, read in chunks of rows."""
    changed, size, row = 0.0, 0.0, 0
    for chunk in MergedTensors(weights, layout).chunks(name):
        before = weights.rows(source, row, row + len(chunk)).double()
        row += len(chunk)
        changed += float((chunk.double() - before).square().sum())
        size += float(before.square().sum())
    return math.sqrt(changed), math.sqrt(size)
