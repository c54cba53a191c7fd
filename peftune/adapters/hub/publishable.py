"""What of an adapter or a merged model may leave for a hub: its weights and what they need, not what it was made from.

Names of files decide, by a list of what is known to be needed: texts, samples, metrics, checkpoints and whatever else
lies in the directory stay. peftune.json goes without the recipe, whose sources and sample prompts are somebody's own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, not listed

from peftune.adapters.base_of import read_layout
from peftune.adapters.directory import CONFIG, TENSORS, Adapter, read_adapter
from peftune.adapters.merge.tokenizer_files import begins_texts
from peftune.adapters.model_card import figures_table, merged_card, model_card
from peftune.adapters.provenance import (
    FINGERPRINTS,
    INIT,
    PROVENANCE,
    recorded,
    recorded_dict,
    recorded_list,
    sealed,
)
from peftune.errors import UserError
from peftune.files import read_object, read_object_if_present, sha256_of
from peftune.model.base import open_base

CARD = "README.md"
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors|model-\d+-of-\d+\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|vocab\.txt|merges\.txt|chat_template\.jinja|spiece\.model"
)
_OWN_PATHS = ("_name_or_path", "name_or_path")  # where Transformers loaded it from, on this machine
_OF_ORIGINS = ("adapter_fingerprint", "base_fingerprint", "step")
_KEPT = (  # of peftune.json
    "peftune", *FINGERPRINTS, "chat", "chat_template", "step", "tokens", "precision", "versions",
)  # fmt: skip


@dataclass(frozen=True)
class Publishable:
    """What would be sent, by name: bytes, or the file to be read; and why each other entry of the directory stays."""

    directory: Path
    files: dict[str, bytes | Path]
    left_out: dict[str, str]

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def publishable(
    directory: Path, repository: str, base: str | None = None, metrics: bool = False, recipe: bool = False
) -> Publishable:
    """What to send of an adapter directory or a merged model; nothing is written, and no network is used.

    `base` is the hub's name of the base, needed where the adapter names a directory of this machine. `metrics` adds the
    figures on held-out data and the plot of the loss, `recipe` the recipe with its sources and sample prompts. Raises
    UserError for what is no adapter and no model, or is damaged.
    """
    check_repository(repository)
    if (directory / CONFIG).exists() or not (directory / "config.json").exists():
        files = _adapter_files(read_adapter(directory), repository, base, metrics, recipe)
    elif metrics or recipe:
        raise UserError(f"{directory}: is a merged model, which holds no metrics and no recipe")
    else:
        files = _model_files(directory, repository, base)
    for name, file in files.items():
        if isinstance(file, Path) and (directory / name).is_symlink():
            raise UserError(f"{directory / name}: is a link, which may lead to anything; send a copy of the directory")
    rest = sorted(path.name for path in directory.iterdir() if path.name not in files)
    return Publishable(directory, dict(sorted(files.items())), {name: _why_not(name) for name in rest})


def check_repository(name: str) -> None:
    """UserError for what cannot be the name of a repository."""
    if not _is_repository(name):
        raise UserError(f"repository {name[:200]!r}: expected a name on the hub, such as me/poems")


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _adapter_files(
    adapter: Adapter, repository: str, base: str | None, metrics: bool, recipe: bool
) -> dict[str, bytes | Path]:
    where = adapter.directory
    if not (where / TENSORS).exists():
        raise UserError(f"adapter {where}: its weights are a pickle; import it first, which stores them as safetensors")
    read_layout(adapter)
    name = base or adapter.base
    if name is None or not is_hub_name(name):
        raise UserError(
            f"adapter {where}: its base is {name or 'not recorded'}, which nobody else can load; pass the base's name "
            "on the hub"
        )
    config = {**adapter.config, "base_model_name_or_path": name}
    provenance = _without_sources(adapter.provenance or {}, metrics, recipe) | {"base": name}
    body = _about(adapter, name, metrics)
    files: dict[str, bytes | Path] = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        TENSORS: where / TENSORS,
        CARD: model_card(name, repository.split("/")[-1], body, repository).encode(),
    }
    if metrics and (where / "loss.png").is_file():
        files["loss.png"] = where / "loss.png"
    if adapter.provenance is not None:
        hashes = {n: hashlib.sha256(f).hexdigest() if isinstance(f, bytes) else sha256_of(f) for n, f in files.items()}
        files[PROVENANCE] = json.dumps(sealed(provenance, hashes), indent=2).encode()
    return files


def is_hub_name(name: str) -> bool:
    """Whether a base's name means the same everywhere: no directory of this machine, and nothing built in."""
    return _is_repository(name) and not Path(name).exists()


def _without_sources(provenance: Mapping[str, Any], metrics: bool, recipe: bool) -> dict[str, Any]:
    kept = [*_KEPT, *(["metrics"] if metrics else []), *(["recipe", "identity", "data_fingerprints"] if recipe else [])]
    values = {key: provenance[key] for key in kept if key in provenance}
    chains = {key: recorded_list(provenance, key) for key in (INIT, "base_merged")}  # without names of directories
    values |= {key: [{k: e[k] for k in _OF_ORIGINS if k in e} for e in chain] for key, chain in chains.items() if chain}
    lora = recorded_dict(recorded(provenance, "recipe"), "lora")
    if lora and not recipe:
        values["recipe"] = {"lora": lora, "quantize": recorded(provenance, "recipe", "quantize")}
    return values


def _about(adapter: Adapter, base: str, metrics: bool) -> str:
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    config = adapter.config
    about = f"A LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']:g}) for `{base}`, {count:,} parameters."
    figures = recorded_dict(adapter.provenance, "metrics")
    return f"{about}\n\n{figures_table(figures)}" if metrics and figures else about


def _model_files(directory: Path, repository: str, base: str | None) -> dict[str, bytes | Path]:
    opened = open_base(str(directory))
    if any(path.suffix != ".safetensors" for path in opened.weights.files):
        raise UserError(f"{directory}: its weights are pickles; save it as safetensors first")
    merged = read_object_if_present(directory / "merge.json") or {}
    name = base or merged.get("base")
    named = name if isinstance(name, str) and is_hub_name(name) else None
    files: dict[str, bytes | Path] = {CARD: merged_card(repository, named, begins_texts(opened)).encode()}
    for path in sorted(directory.iterdir()):
        if (path.is_file() or path.is_symlink()) and _MODEL_FILES.fullmatch(path.name):
            settings = path.name.endswith("config.json") and not path.is_symlink()
            files[path.name] = _without_paths(path) if settings else path
    return files


def _without_paths(path: Path) -> bytes:
    values = {key: value for key, value in read_object(path, str(path)).items() if key not in _OWN_PATHS}
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


def _why_not(name: str) -> str:
    reasons = {
        "metrics.jsonl": "holds sample texts",
        "checkpoints": "checkpoints are never sent",
        "loss.png": "is of the metrics",
        "merge.json": "names files of this machine",
    }
    return reasons.get(name, "checkpoints are never sent" if name.startswith("checkpoint-") else "is not needed")
