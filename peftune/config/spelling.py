"""How a message spells settings of a source that it advises: as a recipe has them, or as the verb in use takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextvars import ContextVar

_PLAIN = re.compile(r"[\w./…-]+")


def spelt(**settings: str) -> str:
    """Settings of one source as they are to be typed."""
    return spelling.get()(settings)


def as_yaml(settings: dict[str, str]) -> str:
    """One setting as `key: value`, several as a mapping in braces."""
    pairs = [f"{key}: {value if _PLAIN.fullmatch(value) else json.dumps(value)}" for key, value in settings.items()]
    return pairs[0] if len(pairs) == 1 else f"{{{', '.join(pairs)}}}"


spelling: ContextVar[Callable[[dict[str, str]], str]] = ContextVar("spelling", default=as_yaml)
