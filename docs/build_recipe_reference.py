#!/usr/bin/env python3
"""Write docs/recipe.md from the recipe's own field docstrings; a test fails where the two differ.

python docs/build_recipe_reference.py
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from peftune.config import data_section, recipe

PAGE = Path(__file__).with_name("recipe.md")
HEAD = """\
# The recipe

What to learn, as YAML. Only `base`, `data.train` and `run.out` must be given. On the command line `key=value` wins over
the file: `peftune train recipe.yaml optim.lr=1e-4 run.out=adapters/slow`. Unknown keys are refused with the nearest
known one, and every problem is listed at once.

This page is written by `python docs/build_recipe_reference.py` from the docstrings of `peftune/config`.
"""
FLEET = """\
## fleet: many adapters from one file

A file may have a list `fleet` besides, with an entry for each adapter: what it has otherwise than the rest of the file.

```yaml
base: builtin:small
data: {train: builtin:docs/train}
run: {out: adapters}
fleet:
  - {name: rank-4, lora.rank: 4}
  - name: unicode
    data: {train: builtin:unicode/train}
    optim.lr: 1.0e-3
```

Keys may be nested, as in a recipe, or dotted, as on the command line, or both in one entry. A section keeps the keys
that the entry does not name. A list or a single value takes the place of the file's, and so do the domains of
`data.validation` and the columns of `where`. An entry has either a `name`, and its adapter goes to `run.out`/`name`, or
a `run.out` of its own. On the command line `key=value` wins over the file and over every entry; `run.out=DIR` is then
the directory above those of named entries. At most 1,024 entries are taken. What such a run does is in the
[guide](guide.md#many-adapters-in-one-run).
"""
SECTIONS = ("data", "lora", "optim", "batch", "run")
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
NAMES |= {Any: "a value or a list of values"}
NAMES |= {data_section.Source: "source", recipe.Recipe: "recipe"}
PLURALS = {str: "texts", data_section.SourceLike: "sources"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def page() -> str:
    """The whole text of docs/recipe.md."""
    top = {name: field for name, field in recipe.Recipe.model_fields.items() if name not in SECTIONS}
    parts = [HEAD, "## The top", table(top, "")]
    for name in SECTIONS:
        section = recipe.Recipe.model_fields[name].annotation
        assert section is not None
        parts += [f"## {name}: {sentence(section.__doc__)}", table(section.model_fields, f"{name}.")]
    parts += [f"## A source: {sentence(data_section.Source.__doc__)}", table(data_section.Source.model_fields, "")]
    parts.append(FLEET)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sentence(docstring: str | None) -> str:
    """A docstring as the end of a heading."""
    text = " ".join((docstring or "").split()).rstrip(".")
    return text[:1].lower() + text[1:] if not text.startswith("AdamW") else text


def table(fields: dict[str, FieldInfo], prefix: str) -> str:
    """One row for each field: key, what it may be, default, meaning."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split())
        cells = [f"`{prefix}{name}`", kind(field.annotation, field.metadata), default(field), meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def default(field: FieldInfo) -> str:
    """The default as YAML, or that there is none."""
    value = field.default
    if value is PydanticUndefined:
        return "must be given"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else repr(value) if value in ('', ' ') else value}`"


def kind(annotation: Any, metadata: list[Any]) -> str:
    """What a field may hold, in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(arguments[0], list(arguments[1:]))
    if origin is Literal:
        return ", ".join(f"`{value!r}`" if value in ("", " ") else f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(argument, []) for argument in arguments)
    if origin is list:
        return "list of " + PLURALS.get(arguments[0], kind(arguments[0], []))
    if origin is tuple:
        return f"list of {len(arguments)}: {kind(arguments[0], [])}"
    if origin is dict:
        return f"mapping of names to {kind(arguments[1], [])}"
    return " ".join([NAMES[annotation], ", ".join(bounds(metadata))]).strip()


def bounds(metadata: list[Any]) -> list[str]:
    """The limits among a field's metadata."""
    limits = [limit for entry in metadata for limit in (getattr(entry, "metadata", None) or [entry])]
    return [BOUNDS[n].format(f"{getattr(limit, n):g}") for limit in limits for n in BOUNDS if hasattr(limit, n)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
