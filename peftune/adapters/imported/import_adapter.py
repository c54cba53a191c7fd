"""An adapter that another program made, as one of peftune's: loralib's files, other PEFT methods, a trainer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftune.adapters.base_of import infer_config, read_layout, shared_base
from peftune.adapters.directory import (
    CONFIG,
    PICKLED,
    TENSORS,
    Adapter,
    check_free,
    read_adapter,
    read_any_settings,
    write_adapter,
)
from peftune.adapters.edit.computed_adapter import write_computed_adapter
from peftune.adapters.imported.loralib import Factors, delta_of_factors, rank_of, read_loralib
from peftune.adapters.imported.other_methods import converted
from peftune.adapters.low_rank import stored_tensors
from peftune.adapters.model_card import model_card
from peftune.adapters.provenance import recorded_base
from peftune.adapters.training_output import adapters_inside
from peftune.errors import UserError
from peftune.files import sha256_of
from peftune.model.architecture import FAMILY
from peftune.model.base import Base, open_base
from peftune.version import __version__

ALPHA = 32.0
"""What microsoft/LoRA's commands for GPT-2 train with; no file of loralib says its alpha."""

_SIZES = {(width, layers): name for name, (layers, width, _) in FAMILY.items()}
Figures = dict[str, Any]


@dataclass(frozen=True)
class ImportResult:
    """What was written: per module the rank and the relative error of the stored update, and what a person should know.

    `kind` is what was found: loralib, or PEFT's method.
    """

    out: Path
    source: Path
    kind: str
    base: str
    modules: dict[str, Figures]
    relative_error: float
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters import` writes as JSON; its keys are a contract."""
        return {**vars(self), "out": str(self.out), "source": str(self.source)}


def import_adapter(
    source: Path,
    out: Path,
    base: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    parts: Sequence[str] | None = None,
) -> ImportResult:
    """Write `out`, an adapter that computes what `source` does: a file of loralib, or a directory of PEFT's.

    `rank` cuts other PEFT methods; `alpha` and `parts` say of a loralib file what it does not. Raises UserError for
    what is no adapter, for several to choose from, and where options are given that the source has no use for.
    """
    check_free(out, "the adapter")
    given = None if base is None else open_base(base)
    if source.is_file():
        if rank is not None:
            raise UserError(f"{source}: a file of loralib keeps its rank; combine can make it smaller afterwards")
        return _import_loralib(source, out, given, alpha, parts)
    if alpha is not None or parts is not None:
        raise UserError(f"{source}: alpha and parts are of loralib's files; a directory of PEFT's says both itself")
    if source.is_dir() and not (source / CONFIG).exists() and len(inside := adapters_inside(source, CONFIG)) == 1:
        source = inside[0]
    config, _ = read_any_settings(source)
    if config.get("peft_type") == "LORA":
        if rank is not None:
            raise UserError(f"{source}: is a LoRA already; combine can make it smaller")
        return _import_lora(read_adapter(source), out, given)
    return _convert(source, config, out, given, rank)


def _import_loralib(
    file: Path, out: Path, base: Base | None, alpha: float | None, parts: Sequence[str] | None
) -> ImportResult:
    modules = read_loralib(file)
    scale = (ALPHA if alpha is None else alpha) / rank_of(modules, file)
    deltas = [delta_of_factors(name, factors, parts, file) for name, factors in modules.items()]
    shape = infer_config([Adapter(file, {}, stored_tensors(deltas), None)])
    notes = []
    if alpha is None:
        notes.append(f"loralib's files do not say alpha; {ALPHA:g} is taken, as in microsoft/LoRA's commands for GPT-2")
    if parts is None and _two_parts(modules):
        notes.append("the file does not say which two parts of c_attn it adapts; queries and values are taken")
    if base is not None:
        identity: Mapping[str, str] = base.identity()
    elif (name := _SIZES.get((shape.n_embd, shape.n_layer))) is not None:
        identity = {"base": name}
        notes.append(f"{shape.n_layer} blocks of width {shape.n_embd}: the base is taken to be {name}, unseen")
    else:
        raise UserError(
            f"{file}: {shape.n_layer} blocks of width {shape.n_embd} are no size of GPT-2 that tells its name; "
            "pass the base"
        )
    facts = {"source": file.name, "kind": "loralib", "scale": scale, "sha256": sha256_of(file)}
    config = shape if base is None else base.config
    write_computed_adapter(
        out, identity, config, deltas, {"imported": facts}, _card(file, "a loralib adapter", 0.0), scale
    )
    figures: dict[str, Figures] = {d.name: {"rank": d.rank, "relative_error": 0.0} for d in deltas}
    return ImportResult(out, file, "loralib", identity["base"], figures, 0.0, notes)


def _two_parts(modules: Mapping[str, Factors]) -> bool:
    return any(factors["A"].shape[0] == 2 * factors["B"].shape[1] for factors in modules.values())


def _import_lora(adapter: Adapter, out: Path, base: Base | None) -> ImportResult:
    """As it is, in safetensors, with the base's identity where that is known."""
    identity = shared_base([adapter], base)
    layout = read_layout(adapter, None if base is None else base.config)
    config = {**adapter.config, "inference_mode": True}
    source = {"source": adapter.directory.name, "kind": "LORA", "fingerprint": adapter.fingerprint}
    provenance = {"peftune": __version__, **(adapter.provenance or {}), **identity, "imported": source}
    body = _card(adapter.directory, "a PEFT LoRA", 0.0)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in adapter.tensors.items()}
    write_adapter(out, config, tensors, provenance, {"README.md": model_card(identity["base"], str(out), body)})
    modules: dict[str, Figures] = {name: {"rank": t.rank, "relative_error": 0.0} for name, t in layout.targets.items()}
    return ImportResult(out, adapter.directory, "LORA", identity["base"], modules, 0.0)


def _convert(source: Path, config: dict[str, Any], out: Path, base: Base | None, rank: int | None) -> ImportResult:
    if base is None:
        name = recorded_base(config, None)
        if name is None:
            raise UserError(f"adapter {source}: does not say which base it was trained on; pass the base")
        base = open_base(name)
    kind = str(config["peft_type"])
    deltas, modules, squares = [], {}, [0.0, 0.0]
    for update, norm, missed in converted(source, config, base, rank):
        deltas.append(update)
        modules[update.name] = {"rank": update.rank, "relative_error": missed / norm if norm else 0.0}
        squares = [squares[0] + norm**2, squares[1] + missed**2]
    if not squares[0]:
        raise UserError(f"adapter {source}: changes nothing; it was never trained")
    error = math.sqrt(squares[1] / squares[0])
    stored = next(path for name in (TENSORS, PICKLED) if (path := source / name).is_file())
    facts = {"source": source.name, "kind": kind, "rank": rank, "relative_error": error, "sha256": sha256_of(stored)}
    identity = base.identity()
    body = _card(source, f"a PEFT adapter of the method {kind}", error)
    write_computed_adapter(out, identity, base.config, deltas, {"imported": facts}, body)
    return ImportResult(out, source, kind, base.name, modules, error)


def _card(source: Path, what: str, error: float) -> str:
    nearness = "It computes the same." if not error else f"It differs from it by {error:.1e} of the update's norm."
    return f"Imported from `{source.name}`, {what}. {nearness}"
