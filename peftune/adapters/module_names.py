"""Which modules the patterns of an adapter's settings mean: lists of full names, so that PEFT gets no pattern at all.

A pattern is somebody else's program: Python's `re` can take years over one. Here it runs under a deadline, outside of
Python's lock, with PEFT's own rules (`check_target_module_exists`, `get_pattern_key` in peft 0.21).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import regex

_SECONDS = 2.0  # for all patterns of an adapter; an honest one takes microseconds
_LONGEST = 4_000  # characters of a pattern


def check_pattern(pattern: str) -> str:
    """The pattern, if it is a regular expression; else ValueError."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"a pattern of {len(pattern):,} characters; expected at most {_LONGEST:,}")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{pattern[:200]!r} is not a regular expression: {error}") from None
    return pattern


def with_full_names(settings: dict[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The settings with the full names of `modules` in place of every pattern and ending of a name.

    Raises ValueError where no module is meant, and where a pattern takes longer than two seconds.
    """
    matches, resolved = _matcher(), dict(settings)
    targets = settings.get("target_modules")
    if targets is not None and not (isinstance(targets, str) and targets.lower() == "all-linear"):
        chosen = modules if isinstance(targets, str) else _in_layers(settings, targets, modules)
        resolved["target_modules"] = _named(targets, chosen, matches)
        resolved["layers_to_transform"] = resolved["layers_pattern"] = None
        if not resolved["target_modules"]:
            raise ValueError(f"it has no module that target_modules names: {str(targets)[:200]}")
    if excluded := settings.get("exclude_modules"):
        resolved["exclude_modules"] = _named(excluded, modules, matches) or None
    for key in ("rank_pattern", "alpha_pattern"):
        resolved[key] = _by_full_name(settings.get(key) or {}, modules, matches)
    return resolved


def _in_layers(settings: dict[str, Any], targets: list[str], modules: Sequence[str]) -> list[str]:
    """The modules of `layers_to_transform`, all where it names none; what is named in full needs no layer."""
    layers, prefixes = settings.get("layers_to_transform"), settings.get("layers_pattern") or r"[^.]*"
    layers = [layers] if isinstance(layers, int) else layers
    if not layers:
        return list(modules)
    chosen, full = set(layers), set(targets)
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    before = re.compile(rf"(?:^|.*?\.)(?:{'|'.join(prefixes)})\.(\d+)\.")  # plain names, see `peft_config`
    numbers = ((name, before.match(name)) for name in modules)
    return [name for name, number in numbers if name in full or (number is not None and int(number[1]) in chosen)]


def _named(wanted: str | list[str], modules: Sequence[str], matches: Callable[[str, str], bool]) -> list[str]:
    if isinstance(wanted, str):
        return [name for name in modules if matches(wanted, name)]
    endings = set(wanted)
    return [name for name in modules if not endings.isdisjoint(_endings(name))]


def _by_full_name(
    values: dict[str, Any], modules: Sequence[str], matches: Callable[[str, str], bool]
) -> dict[str, Any]:
    """The value of the first key that fits each name; keys of letters, digits and escaped dots need no matching."""
    literal: dict[str, int] = {}
    patterns: list[tuple[int, str]] = []
    for number, key in enumerate(values):
        plain = re.sub(r"\\(\W)", r"\1", key)
        if key == re.escape(plain):
            literal.setdefault(plain, number)
        else:
            patterns.append((number, rf"(.*\.)?({key})"))
    numbered, found = list(values.values()), {}
    for name in modules:
        first = min((literal[ending] for ending in _endings(name) if ending in literal), default=len(numbered))
        first = next((number for number, pattern in patterns if number < first and matches(pattern, name)), first)
        if first < len(numbered):
            found[re.escape(name)] = numbered[first]
    return found


def _endings(name: str) -> Iterator[str]:
    """The name, and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def _matcher() -> Callable[[str, str], bool]:
    """A function (pattern, name) that says whether all of the name matches; ValueError when its time is over."""
    end = time.monotonic() + _SECONDS

    def matches(pattern: str, name: str) -> bool:
        left = end - time.monotonic()
        try:
            if left > 0:
                return regex.fullmatch(pattern, name, timeout=left, concurrent=True) is not None
        except TimeoutError:
            pass
        raise ValueError(f"its pattern {pattern[:200]!r} takes more than {_SECONDS:g} s to match; name the modules")

    return matches
