"""JSON files: `--json FILE` whole or not at all and known to be writable before the work is done; objects read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peftune.errors import UserError


def check_writable(path: Path) -> None:
    """Refuse a --json file that cannot be written."""
    try:
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:  # a name that is too long
        writable = False
    if not writable:
        raise UserError(f"--json {str(path)[:200]}: cannot be written; expected a file in a directory that exists")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, beside and then renamed; into a pipe (`/dev/stdout`) as it is."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from None


def read_object(path: Path, name: str | None = None) -> dict[str, Any]:
    """The JSON object in a file; UserError, in which the file is called `name`, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name or path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name or path}: holds {type(value).__name__}, expected an object")
    return value
