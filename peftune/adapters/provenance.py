"""What peftune.json records of an adapter: its base and tokenizer, how texts were read, and the way to its base.

A fingerprint is a sha256 (64 hex digits) over names, shapes, dtypes and bytes, so it does not depend on sharding, key
prefixes or file format (`Base.fingerprint`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftune.errors import UserError
from peftune.files import read_object_if_present, sha256_of_values
from peftune.model.base import BUILTIN

FINGERPRINTS = {
    "base_fingerprint": "weights", "tokenizer_fingerprint": "tokenizer", "config_fingerprint": "architecture",
}  # fmt: skip
"""Keys of peftune.json that tell one base from another, and what each is of."""


PROVENANCE = "peftune.json"
BASE_PATH = "base_model_name_or_path"  # of adapter_config.json
FROM_ADAPTER = "base_from_adapter"  # of peftune.json: the way from the adapter's directory to that of its base
_HASHES = "sha256"  # of every file that was written with peftune.json, by name
_OWN_HASH = "sha256_of_peftune_json"  # of everything else in it


def read_provenance(adapter_dir: Path) -> dict[str, Any] | None:
    """What peftune.json says, or None for an adapter that plain PEFT wrote.

    Raises UserError where it cannot be read, and where it is not as it was written.
    """
    name = f"adapter {adapter_dir}: {PROVENANCE}"
    provenance = read_object_if_present(adapter_dir / PROVENANCE, name)
    hashed = provenance is not None and (_HASHES in provenance or _OWN_HASH in provenance)
    if provenance is not None and hashed and provenance.get(_OWN_HASH) != _hash_of(provenance):
        raise UserError(
            f"{name} is not as it was written (its SHA-256 differs): it was changed or damaged; copy the adapter again"
        )
    return provenance


def recorded_hashes(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    """sha256 by file name, as peftune.json records it; empty for adapters of plain PEFT and of older versions."""
    hashes = recorded_dict(provenance, _HASHES)
    return {name: value for name, value in hashes.items() if isinstance(value, str)}


def sealed(provenance: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """What peftune.json is to hold beside files with these hashes: `provenance`, the hashes, and its own."""
    values = {**provenance, _HASHES: dict(hashes)}
    return {**values, _OWN_HASH: _hash_of(values)}


def _hash_of(provenance: Mapping[str, Any]) -> str:
    """Of its values, however the file spells them, without its own hash."""
    return sha256_of_values({key: value for key, value in provenance.items() if key != _OWN_HASH})


def versions_of(*packages: str) -> dict[str, str]:
    """What peftune.json records of these: their versions by name, that of Python first."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def recorded(provenance: Any, *keys: str) -> Any:
    """The entry of peftune.json below these keys; None where it is missing, as in a file that another program wrote."""
    for key in keys:
        provenance = provenance.get(key) if isinstance(provenance, dict) else None
    return provenance


def recorded_dict(provenance: Any, key: str) -> dict[str, Any]:
    """The object below this key of peftune.json; empty where there is none."""
    value = recorded(provenance, key)
    return value if isinstance(value, dict) else {}


def recorded_list(provenance: Any, key: str) -> list[dict[str, Any]]:
    """The objects in the list below this key of peftune.json; empty where there is none."""
    value = recorded(provenance, key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


INIT = "init"
"""Key of peftune.json: the adapters that training went on from, the nearest first. Of figures: those at its start."""


def first_row(figures: Any) -> str:
    """Which row of a domain's figures is of step 0: `init` where training went on from an adapter, else `base`."""
    return INIT if recorded(figures, INIT) is not None else "base"


def parses_special_tokens(provenance: Any) -> bool:
    """Whether special tokens that a text spells out were tokens in training; prompts are read the same."""
    said = recorded(provenance, "special_tokens") or recorded(provenance, "recipe", "data", "special_tokens")
    return bool(said == "parse")


def merged_text(merged: Sequence[Mapping[str, Any]]) -> str:
    """A merged model in words; `merged` are the adapters in it, the last first (`Base.merged`)."""
    names = [f"{m.get('adapter') or 'an adapter'} ({str(m.get('adapter_fingerprint'))[:12]})" for m in merged]
    return f"a merge of {', before that '.join(names)} into {merged[-1].get('base') or 'a base'}"


def chat_of(provenance: Any) -> str | None:
    """By which template it was trained on conversations, `plain` or `eos-turns`; None where it was not.

    `chat` is recorded since that key exists; older adapters show it where the recipe names a column of messages.
    """
    chat = recorded(provenance, "chat")
    if not isinstance(chat, bool):
        sources = recorded(provenance, "recipe", "data", "train")
        chat = isinstance(sources, list) and bool(sources) and all(recorded(one, "messages") for one in sources)
    said = recorded(provenance, "chat_template") or recorded(provenance, "recipe", "data", "chat")
    return ("eos-turns" if said == "eos-turns" else "plain") if chat else None


def recorded_base(config: Mapping[str, Any], provenance: Mapping[str, Any] | None) -> str | None:
    """The name of the base that an adapter's two files record, or None."""
    name = (provenance or {}).get("base") or config.get(BASE_PATH)
    return name if isinstance(name, str) and name else None


def with_place_of_base(
    config: Mapping[str, Any], provenance: Mapping[str, Any], out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two files' contents, with where a base that is a directory lies; `provenance` names it as `base`.

    peftune.json gets the way from the adapter's directory to it, so that the two can be moved together, and
    adapter_config.json the whole path, for Transformers and PEFT look nowhere else.
    """
    name = provenance.get("base")
    if not isinstance(name, str):
        return dict(config), dict(provenance)
    path = directory_of(name)
    found, known = {**config, BASE_PATH: str(path or name)}, dict(provenance)
    if path is not None and name not in BUILTIN:
        with suppress(ValueError):  # another drive of Windows
            known[FROM_ADAPTER] = os.path.relpath(path, out.resolve())
    return found, known


def directory_of(name: str) -> Path | None:
    """The whole path of a base that lies in a directory of this machine, or None."""
    path = os.path.expanduser(BUILTIN.get(name, name))
    return Path(path).resolve() if os.path.isdir(path) else None


def place_of_base(adapter_dir: Path, config: Mapping[str, Any], provenance: Mapping[str, Any] | None) -> str | None:
    """What the base of an adapter can be opened by, wherever this is called from, or None where it names none.

    The name that was recorded, unless that is of a directory that lies elsewhere as seen from here.
    """
    name, way, path = recorded_base(config, provenance), recorded(provenance, FROM_ADAPTER), config.get(BASE_PATH)
    if name is None or name in BUILTIN or not isinstance(way, str):
        return name
    places = [adapter_dir.resolve() / way, *([Path(path)] if isinstance(path, str) and os.path.isabs(path) else [])]
    for place in places:
        with suppress(OSError, ValueError):  # no name that a file can have
            if (place / "config.json").is_file():
                return name if directory_of(name) == place.resolve() else str(place.resolve())
    return name
