"""`data.new_tokens` of a recipe: what such a token may be, and what cannot go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from peftune.config.messages import short

_MOST = 100  # characters


def _is_token(value: str) -> str:
    if not 2 <= len(value) <= _MOST:
        raise ValueError(f"expected a name of 2 to {_MOST} characters like <|name|>, found {short(value)}")
    if value != value.strip() or not value.isprintable():
        raise ValueError(f"{value!r} has white space at an end or a control character; expected a name like <|name|>")
    return value


def _each_once(value: list[str]) -> list[str]:
    if twice := [token for token in value if value.count(token) > 1]:
        raise ValueError(f"{twice[0]!r} is named twice")
    return value


_Token = Annotated[str, AfterValidator(_is_token)]
NewTokens = Annotated[list[_Token], AfterValidator(_each_once)]
"""Texts that become one token each."""


def reasons_against(modules: Sequence[str], quantize: str | None) -> list[str]:
    """Why rows of new tokens cannot be trained beside these adapted modules, or on this quantised base."""
    embeddings = [name for name in modules if name.rpartition(".")[2] in ("wte", "lm_head")]
    reasons = [f"data.new_tokens: trains rows of wte and lm_head, leave {name} out of lora" for name in embeddings]
    return [*reasons, f"data.new_tokens: cannot be learnt with quantize {quantize}"] if quantize else reasons
