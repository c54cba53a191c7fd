"""Which base and tokenizer an adapter belongs to: fingerprints of content, and the check that they are the same.

A fingerprint is a sha256 (64 hex digits) over names, shapes, dtypes and bytes, so it does not depend on sharding, key
prefixes or file format (`Base.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftune.errors import UserError
from peftune.files import read_object_if_present
from peftune.model.base import Base

FINGERPRINTS = {
    "base_fingerprint": "weights", "tokenizer_fingerprint": "tokenizer", "config_fingerprint": "architecture",
}  # fmt: skip
"""Keys of peftune.json that tell one base from another, and what each is of."""


def read_provenance(adapter_dir: Path) -> dict[str, Any] | None:
    """What peftune.json says, or None for an adapter that plain PEFT wrote; UserError where it cannot be read."""
    return read_object_if_present(adapter_dir / "peftune.json", f"adapter {adapter_dir}: peftune.json")


def recorded(provenance: Any, *keys: str) -> Any:
    """The entry of peftune.json below these keys; None where it is missing, as in a file that another program wrote."""
    for key in keys:
        provenance = provenance.get(key) if isinstance(provenance, dict) else None
    return provenance


def recorded_dict(provenance: Any, key: str) -> dict[str, Any]:
    """The object below this key of peftune.json; empty where there is none."""
    value = recorded(provenance, key)
    return value if isinstance(value, dict) else {}


def recorded_base(config: Mapping[str, Any], provenance: Mapping[str, Any] | None) -> str | None:
    """The name of the base that an adapter's two files record, or None."""
    name = (provenance or {}).get("base") or config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def check_base(adapter_dir: Path, base: Base) -> None:
    """Refuse an adapter on another base or tokenizer than it was trained with.

    Adapters without fingerprints (plain PEFT) pass; their shapes are checked on loading. Raises UserError.
    """
    provenance = read_provenance(adapter_dir) or {}
    trained = provenance.get("base", "its base")
    for key, what in FINGERPRINTS.items():
        expected = provenance.get(key)
        if not isinstance(expected, str):
            continue
        found: str = getattr(base, key.removeprefix("base_"))
        if found != expected:
            raise UserError(
                f"adapter {adapter_dir} was trained on {trained} ({what} {expected[:12]}), but {base.directory} has "
                f"other {what} ({found[:12]}); pass the base that it was trained on"
            )
