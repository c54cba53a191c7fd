"""`key=value` of the command line, put into what a recipe file says."""

from __future__ import annotations

from typing import Any

from peftune.config.messages import short
from peftune.config.yaml_loader import parse_yaml
from peftune.errors import UserError

_DEEPEST = 4  # parents of a key, more than any has


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the key of `key=value` in a mapping, value read as YAML; UserError where it is no such text."""
    key, separator, text = override.partition("=")
    shown = short(override)
    if not separator or not key:
        raise UserError(f"override {shown}: expected key=value, such as optim.lr=1e-4")
    try:
        value = parse_yaml(text) if text else ""
    except ValueError:
        raise UserError(f"override {shown}: {short(text)} is not a YAML value") from None
    if isinstance(value, str) and text.lstrip()[:1] not in ("'", '"', "|", ">", "!", "&"):
        value = text  # as it was typed: YAML folds lines and takes what follows a # for a comment
    section, last = section_of(values, key, f"override {shown}")
    section[last] = value


def section_of(values: dict[str, Any], key: str, shown: str) -> tuple[dict[str, Any], str]:
    """The section that a dotted key lies in, made where there is none, and the last part of the key.

    UserError, in which what says so is `shown`, where that is no section.
    """
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST:
        raise UserError(f"{shown}: no key of a recipe lies so deep; expected one such as optim.lr")
    for parent in parents:
        inner = {} if values.get(parent) is None else values[parent]
        values[parent] = inner
        if not isinstance(inner, dict):
            raise UserError(f"{shown}: {parent[:80]} is not a section")
        values = inner
    return values, last
