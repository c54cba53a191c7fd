"""Every adapter below a directory, and why some of them cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftune.adapters.base_of import infer_config
from peftune.adapters.directory import Adapter, read_adapter
from peftune.adapters.inspect.describe import megabytes, variant
from peftune.adapters.layout import module_of, plain_name
from peftune.errors import UserError
from peftune.model.lora import ALL, ATTENTION

DEPTH, DIRECTORIES = 8, 20_000
_SIGNS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", ".commit/adapter_config.json")
_TRAINING = ("checkpoints", "metrics.jsonl")
_PASSED = {"checkpoints", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class ScanEntry:
    """One adapter directory: `facts` of one that can be read, else `problem` in a line."""

    name: str
    directory: Path
    facts: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class ScanResult:
    """Adapters by path; `cut` says that the search ended at its bounds."""

    directory: Path
    entries: list[ScanEntry]
    cut: bool

    def as_json(self) -> dict[str, Any]:
        """The contract of `peftune adapters list --json`."""
        rows = [
            {"name": e.name, "directory": str(e.directory), **e.facts, "problem": e.problem or None}
            for e in self.entries
        ]
        return {"directory": str(self.directory), "adapters": rows, "cut": self.cut}


def scan(directory: Path) -> ScanResult:
    """Adapters in `directory` and below, at most 8 levels and 20,000 directories; links are followed, each place once.

    Raises UserError where it is no directory that can be read.
    """
    try:
        os.scandir(directory).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{str(directory)[:200]}: {getattr(error, 'strerror', None) or error}") from None
    walk = _Walk()
    places = sorted(walk.below(directory, 0))
    return ScanResult(directory, [_entry(place, directory) for place in places], walk.cut)


class _Walk:
    """A search that goes to each place once and ends at its bounds."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.cut = False

    def below(self, directory: Path, depth: int) -> Iterator[Path]:
        """Directories that hold an adapter, whole or not, or a training on its way to one."""
        place = os.path.realpath(directory)
        if place in self.seen:
            return
        if depth > DEPTH or len(self.seen) >= DIRECTORIES:
            self.cut = True
            return
        self.seen.add(place)
        if any((directory / sign).is_file() for sign in _SIGNS) or all((directory / s).exists() for s in _TRAINING):
            yield directory
        for child in _children(directory):
            yield from self.below(child, depth + 1)


def _children(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as found:
            names = [entry.name for entry in found if entry.is_dir()]
    except OSError:  # not readable, or gone meanwhile: there is nothing to list in it
        return []
    return [directory / name for name in sorted(names) if not name.startswith(".") and name not in _PASSED]


def _entry(place: Path, root: Path) -> ScanEntry:
    name = str(place.relative_to(root)) if place != root else place.resolve().name
    try:
        adapter = read_adapter(place)
        infer_config([adapter])
    except UserError as error:
        return ScanEntry(name, place, {}, str(error).removeprefix(f"adapter {place}: "))
    return ScanEntry(name, place, _facts(adapter))


def _facts(adapter: Adapter) -> dict[str, Any]:
    recorded = adapter.provenance or {}
    metrics = recorded.get("metrics")
    losses = {name: _loss(rows) for name, rows in metrics.items()} if isinstance(metrics, dict) else {}
    return {
        "base": adapter.base,
        "base_fingerprint": recorded.get("base_fingerprint"),
        "variant": variant(adapter),
        "ranks": ranks(adapter),
        "targets": targets(adapter),
        "megabytes": megabytes(adapter),
        **{key: recorded[key] if isinstance(recorded.get(key), int) else None for key in ("step", "tokens")},
        "loss": {domain: loss for domain, loss in losses.items() if loss is not None},
    }


def _loss(rows: Any) -> float | None:
    adapter = rows.get("adapter") if isinstance(rows, dict) else None
    loss = adapter.get("loss") if isinstance(adapter, dict) else None
    return loss if isinstance(loss, int | float) else None


def ranks(adapter: Adapter) -> list[int]:
    """The ranks of its modules, each once, from the shapes of A."""
    named = (".lora_A.weight", ".lora_embedding_A")
    return sorted({tensor.shape[0] for name, tensor in adapter.tensors.items() if name.endswith(named)})


def targets(adapter: Adapter) -> list[str]:
    """What it adapts, by the names within a block, in the model's order; modules trained whole are marked with `=`."""
    found: dict[str, None] = {}
    for name in sorted(adapter.tensors):
        module = module_of(plain_name(name).replace(".modules_to_save.", ".").replace(".base_layer.", "."))
        inside = module.split(".", 3)[3] if ".h." in module else module.rpartition(".")[2]
        found.setdefault(inside if "lora_" in name else f"{inside}=")
    order = [*ALL]
    return sorted(found, key=lambda inside: (order.index(inside) if inside in order else len(order), inside))


def targets_told(names: list[str]) -> str:
    """The names for a table: `all` and `attention` as in a recipe."""
    short = {ALL: "all", ATTENTION: "attention"}
    return short.get(tuple(names), ", ".join(names))
