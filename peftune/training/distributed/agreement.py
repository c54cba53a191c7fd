"""What all ranks must have in common before the first step; each is started on its own, perhaps on other files."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Any

from accelerate import Accelerator

from peftune.errors import UserError
from peftune.training.distributed.collectives import all_gather, raise_on_all_ranks
from peftune.version import __version__

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")  # numpy draws the order of samples
_NAMED = 4  # differences that the line quotes; one cause often has many


def refuse_different_ranks(accelerator: Accelerator, facts: Mapping[str, object]) -> None:
    """UserError, on all ranks, that names what another rank has otherwise than the first; a collective."""
    here = (socket.gethostname(), {name: str(value) for name, value in facts.items()})
    (_, first), *others = all_gather(accelerator, here)
    with raise_on_all_ranks(accelerator):
        for rank, (host, other) in enumerate(others, start=1):
            if differences := _differences(first, other):
                raise UserError(
                    f"the ranks differ: rank {rank} on {host} has {differences}. Start all ranks by the same command, "
                    "with the same files and the same installation"
                )


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Of everything that decides how a step is computed, by name; `none` where a library of `more` is missing."""
    found = {"peftune": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for name in (*_LIBRARIES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> str:
    names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
    texts = []
    for name in names[:_NAMED]:
        there, here = where_they_differ(other.get(name, "nothing"), first.get(name, "nothing"))
        texts.append(f"{name} {there} where rank 0 has {here}")
    return ", ".join(texts + [f"{len(names) - _NAMED} more"] * (len(names) > _NAMED))


def where_they_differ(*texts: str) -> list[str]:
    """At most some 40 characters of each of two texts, from shortly before the first difference."""
    same = takewhile(lambda letters: letters[0] == letters[1], zip(*texts, strict=False))
    begin = max(0, len([*same]) - 12)
    return [
        ("…" if begin else "") + text[begin : begin + 40] + ("…" if len(text) > begin + 40 else "") for text in texts
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
