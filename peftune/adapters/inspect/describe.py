"""One adapter, described: where its update sits and how strong it is, what it was trained on, what made it.

The norm of an update comes from its factors. DoRA, PiSSA as PEFT stores it and modules trained whole change the base by
more than the factors say; with the base at hand the whole change is computed, one matrix at a time, as a merge does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.adapters.base_of import read_layout
from peftune.adapters.directory import Adapter, check_fits, read_adapter
from peftune.adapters.fold import MergedTensors
from peftune.adapters.layout import AdapterLayout, LoraTarget
from peftune.adapters.low_rank import delta_of, norm
from peftune.adapters.provenance import check_base, tensors_fingerprint
from peftune.model.base import open_base
from peftune.model.weights import HEAD, WTE, Weights


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
    """What `peftune adapters show` tells; `norms_are` says what stands behind the norms, `whole` what came uncut."""

    directory: Path
    name: str
    base: str | None
    variant: str
    parameters: int
    megabytes: float
    fingerprint: str
    modules: dict[str, ModuleDescription]
    whole: list[str]
    norms_are: str
    provenance: dict[str, Any] | None = field(repr=False)

    def layers(self) -> dict[str, float]:
        """‖ΔW‖ over all modules of each block, and of each module outside the blocks; in the order of the model."""
        squares: dict[str, float] = {}
        for name, module in self.modules.items():
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + module.norm**2
        return {layer: math.sqrt(square) for layer, square in squares.items()}

    def as_json(self) -> dict[str, Any]:
        """The contract of `peftune adapters show --json`."""
        values = {k: v for k, v in vars(self).items() if k not in ("directory", "modules")}
        modules = {name: vars(module) for name, module in self.modules.items()}
        return {"adapter": str(self.directory), **values, "layers": self.layers(), "modules": modules}


def describe(directory: Path, base: str | None = None) -> AdapterDescription:
    """Read one adapter; with `base` norms are set against those of the base's weights.

    Raises UserError for a broken adapter, for one that is not for a GPT-2, and for another base than its own.
    """
    weights = None
    if base is None:
        adapter = read_adapter(directory)
        layout = read_layout(adapter)
    else:
        found = open_base(base)
        check_base(directory, found)
        adapter, layout = check_fits(directory, found.config)
        weights = found.weights
    modules = {name: _module(layout.targets[name], layout, weights) for name in sorted(layout.targets, key=place_of)}
    return AdapterDescription(
        directory, directory.resolve().name, adapter.base, variant(adapter), parameters(adapter),
        megabytes(adapter), tensors_fingerprint(adapter.config, adapter.tensors), modules,
        sorted(layout.replaced), _norms_are(layout, weights), adapter.provenance,
    )  # fmt: skip


def variant(adapter: Adapter) -> str:
    """What kind of LoRA it is: as it was made, else as its configuration says."""
    recorded, config = adapter.provenance or {}, adapter.config
    for key in ("combined", "extracted"):
        if key in recorded:
            return key
    recipe = recorded.get("recipe")
    lora = recipe.get("lora") if isinstance(recipe, dict) else None
    if isinstance(lora, dict) and isinstance(lora.get("variant"), str):
        return str(lora["variant"])
    pissa = ["pissa"] if config.get("init_lora_weights") == "pissa" else []
    flags = {"use_dora": "dora", "use_rslora": "rslora"}
    return "+".join([*(name for flag, name in flags.items() if config.get(flag)), *pissa]) or "lora"


def parameters(adapter: Adapter) -> int:
    """How many numbers it holds."""
    return sum(tensor.numel() for tensor in adapter.tensors.values())


def megabytes(adapter: Adapter) -> float:
    """Size of its tensors in 10^6 bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values()) / 1e6


def layer_of(name: str) -> str:
    """The block's number, or the module's last word outside the blocks."""
    words = name.split(".")
    return words[2] if words[1:2] == ["h"] else words[-1]


def place_of(name: str) -> tuple[int, str]:
    """Sorts modules as the model runs: embeddings, blocks, head."""
    layer = layer_of(name)
    return (int(layer) if layer.isdigit() else -1 if layer in ("wte", "wpe") else 1 << 30, name)


def _module(target: LoraTarget, layout: AdapterLayout, weights: Weights | None) -> ModuleDescription:
    size = norm(delta_of(target))
    relative = None
    if weights is not None:
        moved, before = _in_base(target, layout, weights)
        size = moved if _is_more_than_factors(target, layout) else size
        relative = size / before if before else None
    return ModuleDescription(target.rank, target.alpha, target.scale, size, relative)


def _is_more_than_factors(target: LoraTarget, layout: AdapterLayout) -> bool:
    return layout.dora or target.pissa


def _in_base(target: LoraTarget, layout: AdapterLayout, weights: Weights) -> tuple[float, float]:
    """(‖ΔW‖, ‖W_base‖) in a base; the first only where the factors do not tell it."""
    name = f"{target.name}.weight"
    source = WTE if name == HEAD and weights.tied else name
    if not _is_more_than_factors(target, layout):
        return 0.0, math.sqrt(sum(float(chunk.double().square().sum()) for chunk in weights.chunks(source)))
    moved, before, row = 0.0, 0.0, 0
    for chunk in MergedTensors(weights, layout).chunks(name):
        held = weights.rows(source, row, row + len(chunk)).double()
        row += len(chunk)
        moved += float((chunk.double() - held).square().sum())
        before += float(held.square().sum())
    return math.sqrt(moved), math.sqrt(before)


def _norms_are(layout: AdapterLayout, weights: Weights | None) -> str:
    if not any(_is_more_than_factors(target, layout) for target in layout.targets.values()):
        return "of the whole update"
    kind = "DoRA's magnitudes" if layout.dora else "the part that PiSSA takes out of the base"
    return f"of B·A alone, without {kind}; --base tells the whole" if weights is None else "of the whole change"
