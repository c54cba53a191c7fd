"""Which base and tokenizer an adapter belongs to: fingerprints of content, and the check that they are the same.

A fingerprint is a sha256 (64 hex digits) over names, shapes, dtypes and bytes, so it does not depend on sharding, key
prefixes or file format. It is cached by the identity of the files (path, size, modification time, inode) under
`PEFTUNE_CACHE`, else `~/.cache/peftune`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftune.data.store import cache_directory
from peftune.errors import UserError
from peftune.model.base import load_tokenizer
from peftune.model.weights import open_weights

_REMEMBERED = 512
_PIECE = 1_000_000  # values hashed at a time: three of 4 MB are held at once, the mapped one, its copy and the last
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "config.json",
)  # fmt: skip


def base_fingerprint(directory: Path) -> str:
    """sha256 of the base weights: each tensor's name, shape, dtype and bytes.

    Raises UserError where the weights cannot be read.
    """
    weights = open_weights(directory)

    def compute() -> str:
        digest = hashlib.sha256()
        for name in weights.names():
            digest.update(f"{name}|{list(weights.shape(name))}|{weights.dtype(name)}\n".encode())
            for chunk in weights.chunks(name, _PIECE):
                digest.update(_bytes(chunk))
        return digest.hexdigest()

    return _remembered("base", [*weights.files, directory / "config.json"], compute)


def tokenizer_fingerprint(directory: Path) -> str:
    """sha256 of vocabulary, merges and special tokens; the same for `tokenizer.json` and `vocab.json` + `merges.txt`.

    Raises UserError where there is no tokenizer, or it cannot be read.
    """

    def compute() -> str:
        tokenizer = load_tokenizer(directory)
        inner = json.loads(tokenizer.backend_tokenizer.to_str())
        pairs = inner["model"].get("merges", [])
        facts = {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
            "added": sorted((token["id"], token["content"]) for token in inner["added_tokens"]),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "add_prefix_space": _adds_prefix_space(inner),
        }
        return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()

    return _remembered("tokenizer", [directory / name for name in _TOKENIZER_FILES], compute)


def tensors_fingerprint(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of an adapter: the settings that change what it computes, and its tensors."""
    kept = {key: value for key, value in config.items() if key not in _NOT_FUNCTION}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        digest.update(f"{name}|{list(tensors[name].shape)}|{tensors[name].dtype}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


_NOT_FUNCTION = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping",
    "fan_in_fan_out", "lora_dropout", "runtime_config",
}  # fmt: skip


def describe_base(name: str, directory: Path) -> dict[str, str]:
    """The entries of peftune.json that `check_base` compares: `base`, `base_fingerprint`, `tokenizer_fingerprint`."""
    return {
        "base": name,
        "base_fingerprint": base_fingerprint(directory),
        "tokenizer_fingerprint": tokenizer_fingerprint(directory),
    }


def read_provenance(adapter_dir: Path) -> dict[str, Any] | None:
    """What peftune.json says, or None for an adapter that plain PEFT wrote; UserError where it cannot be read."""
    path = adapter_dir / "peftune.json"
    try:
        if not path.is_file():
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"adapter {adapter_dir}: peftune.json cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"adapter {adapter_dir}: peftune.json holds {type(value).__name__}, expected an object")
    return value


def check_base(adapter_dir: Path, base_dir: Path) -> None:
    """Refuse an adapter on another base or tokenizer than it was trained with.

    Adapters without fingerprints (plain PEFT) pass; their shapes are checked on loading. Raises UserError.
    """
    recorded = read_provenance(adapter_dir) or {}
    trained = recorded.get("base", "its base")
    checks = (
        ("base_fingerprint", "weights", base_fingerprint),
        ("tokenizer_fingerprint", "tokenizer", tokenizer_fingerprint),
    )
    for key, what, fingerprint in checks:
        expected = recorded.get(key)
        if not isinstance(expected, str):
            continue
        found = fingerprint(base_dir)
        if found != expected:
            raise UserError(
                f"adapter {adapter_dir} was trained on {trained} ({what} {expected[:12]}), but {base_dir} has other "
                f"{what} ({found[:12]}); pass the base that it was trained on"
            )


def _adds_prefix_space(inner: dict[str, Any]) -> bool:
    pre = inner.get("pre_tokenizer") or {}
    return any(part.get("add_prefix_space", False) for part in [pre, *pre.get("pretokenizers", [])])


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _remembered(kind: str, files: list[Path], compute: Callable[[], str]) -> str:
    """A cache that never fails: what cannot be read or written is computed again."""
    identity = _identity(files)
    key = hashlib.sha256(json.dumps([kind, 1, identity]).encode()).hexdigest()
    path = cache_directory() / "fingerprints.json"
    known = _load_cache(path).get(key)
    if known is not None:
        return known
    value = compute()
    if _identity(files) == identity:  # nobody wrote to the files meanwhile
        _store_cache(path, key, value)
    return value


def _identity(files: list[Path]) -> list[list[str | int]]:
    found: list[list[str | int]] = []
    for file in files:
        if file.is_file():
            stat = file.stat()
            found.append([os.path.realpath(file), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return found


def _load_cache(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _store_cache(path: Path, key: str, value: str) -> None:
    entries = _load_cache(path)
    kept = dict(list(entries.items())[-_REMEMBERED:]) | {key: value}
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        beside.replace(path)
    except OSError:
        return
