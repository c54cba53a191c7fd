"""Every adapter below a directory, and why some of them cannot be used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftune.adapters.base_of import infer_config
from peftune.adapters.directory import COMMIT, CONFIG, PICKLED, TENSORS, Adapter, check_directory, read_adapter
from peftune.adapters.inspect.describe import lora_variant, size_in_megabytes
from peftune.adapters.layout import base_name, block_of, module_of, suffix_in_block
from peftune.adapters.provenance import recorded, recorded_dict
from peftune.adapters.token_rows import ROWS_PART
from peftune.adapters.training_output import remarks
from peftune.errors import UserError
from peftune.model.lora import ALL

DEPTH, DIRECTORIES = 8, 20_000
_ADAPTER_FILES = (CONFIG, TENSORS, PICKLED, f"{COMMIT}/{CONFIG}")
_A = (".lora_A.weight", ".lora_embedding_A")  # their rows are the rank
_TRAINING_FILES = ("checkpoints", "metrics.jsonl")
_SKIPPED = {"checkpoints", "__pycache__", "node_modules"}


@dataclass(frozen=True)
class ScanEntry:
    """One adapter directory: `facts` of one that can be read, else `problem` in a line."""

    name: str
    directory: Path
    facts: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class ScanResult:
    """Adapters by path; `cut` says that the search ended at its limits."""

    directory: Path
    entries: list[ScanEntry]
    cut: bool

    def notes(self) -> list[str]:
        """Which adapters to use of a trainer's run that left several."""
        return remarks(entry.directory for entry in self.entries)

    def as_json(self) -> dict[str, Any]:
        """What `peftune adapters list` writes as JSON; its keys are a contract."""
        rows = [
            {"name": e.name, "directory": str(e.directory), **e.facts, "problem": e.problem or None}
            for e in self.entries
        ]
        return {"directory": str(self.directory), "adapters": rows, "cut": self.cut, "notes": self.notes()}


def scan(directory: Path) -> ScanResult:
    """Adapters in `directory` and below, at most 8 levels and 20,000 directories; links are followed, each directory
    is visited once.

    Raises UserError where it is no directory that can be read.
    """
    check_directory(directory, str(directory))
    found, cut = _adapter_directories(directory)
    return ScanResult(directory, [_entry(path, directory) for path in found], cut)


def _adapter_directories(root: Path) -> tuple[list[Path], bool]:
    """Directories that hold an adapter, complete or not, or a training that will write one; True if limits were met."""
    found: list[Path] = []
    visited: set[str] = set()
    cut = False
    for name, children, _ in os.walk(root, followlinks=True):  # what cannot be read is left out
        path, real = Path(name), os.path.realpath(name)
        if real in visited:
            children.clear()
        elif len(visited) >= DIRECTORIES:
            return sorted(found), True
        elif len(path.relative_to(root).parts) > DEPTH:
            cut = True
            children.clear()
        else:
            visited.add(real)
            children[:] = sorted(child for child in children if not child.startswith(".") and child not in _SKIPPED)
            is_adapter = any((path / file).is_file() for file in _ADAPTER_FILES)
            if is_adapter or all((path / file).exists() for file in _TRAINING_FILES):
                found.append(path)
    return sorted(found), cut


def _entry(path: Path, root: Path) -> ScanEntry:
    name = str(path.relative_to(root)) if path != root else path.resolve().name
    try:
        adapter = read_adapter(path)
        infer_config([adapter])
    except UserError as error:
        return ScanEntry(name, path, {}, str(error).removeprefix(f"adapter {path}: "))
    return ScanEntry(name, path, _facts(adapter))


def _facts(adapter: Adapter) -> dict[str, Any]:
    provenance = adapter.provenance or {}
    metrics = recorded_dict(provenance, "metrics").items()
    losses = {domain: recorded(models, "adapter", "loss") for domain, models in metrics}
    return {
        "base": adapter.base,
        "base_fingerprint": provenance.get("base_fingerprint"),
        "variant": lora_variant(adapter),
        "ranks": sorted({t.shape[0] for name, t in adapter.tensors.items() if name.endswith(_A)}),
        "targets": target_modules(adapter),
        "megabytes": size_in_megabytes(adapter),
        **{key: provenance[key] if isinstance(provenance.get(key), int) else None for key in ("step", "tokens")},
        "loss": {domain: loss for domain, loss in losses.items() if isinstance(loss, int | float)},
    }


def target_modules(adapter: Adapter) -> list[str]:
    """What it adapts, by the names within a block, in the model's order; a module trained in full is marked by `=`, one
    of which single rows were by `[]`."""
    found: set[str] = set()
    for name in adapter.tensors:
        module = module_of(base_name(name))
        short = suffix_in_block(module) or block_of(module)
        found.add(short if "lora_" in name else f"{short}[]" if name.endswith(ROWS_PART) else f"{short}=")
    return sorted(found, key=lambda short: (ALL.index(short) if short in ALL else len(ALL), short))
