#!/usr/bin/env python3
"""Fill docs/api.md with signatures and docstrings of the code; a test fails where the two differ.

    python docs/build_api_reference.py

Prose and examples are written in the page; what stands between `<!-- peftune.NAME -->` and `<!-- end -->` is made here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
_PLACE = re.compile(r"<!-- (peftune[\w.]*) -->\n.*?<!-- end -->", re.DOTALL)
_ENTRY = re.compile(r"`(\w+)` +(\S.*)")
_WIDTH = 100
_INSIDE = {"refuse_sampling", "samples", "end_ids", "check_ids", "variant", "read", "put", "check"}
"""Methods that other modules of the package call, and nobody else needs to."""


def page(text: str) -> str:
    """The page with every place filled."""
    return _PLACE.sub(lambda found: f"<!-- {found[1]} -->\n{entry(found[1])}\n<!-- end -->", text)


def entry(name: str) -> str:
    """Signature and docstring of a function; of a class also its fields or methods."""
    value = lookup(name)
    short = name.rpartition(".")[2]
    place = name.rpartition(".")[0]
    head = "" if place == "peftune" else f"from {place} import {short}\n\n"
    if not inspect.isclass(value):
        return f"```text\n{head}{call(short, value)}\n```\n\n{prose(value)}"
    if issubclass(value, Exception):
        return f"```text\n{head}class {short}({value.__base__.__name__})\n```\n\n{prose(value)}"
    parts = [f"```text\n{head}{call(short, value)}\n```", prose(value)]
    if dataclasses.is_dataclass(value):
        parts.append(fields(value))
    parts += [f"**`{short}.{line}`**{text}" for line, text in methods(value)]
    return "\n\n".join(part for part in parts if part)


def lookup(name: str) -> Any:
    """What a dotted name means: an object of a module."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def call(name: str, value: Any) -> str:
    """A signature as one would write it, a parameter a line where it is long."""
    signature = inspect.signature(value)
    parts = [shown(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    returned = signature.return_annotation
    arrow = "" if inspect.isclass(value) or returned is inspect.Signature.empty else f" -> {returned}"
    line = f"{name}({', '.join(parts)}){arrow}"
    return line if len(line) <= _WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def shown(parameter: inspect.Parameter) -> str:
    """`name: type = default`."""
    text = f"{'**' if parameter.kind is parameter.VAR_KEYWORD else ''}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    return text if parameter.default is parameter.empty else f"{text} = {value(parameter.default)}"


def value(default: Any) -> str:
    """A default as code has it."""
    return json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)


def prose(value: Any) -> str:
    """A docstring as Markdown, without the list of fields, which becomes a table."""
    entries = listed(value)
    lines, inside = [], False
    for line in (inspect.getdoc(value) or "").splitlines():
        match = _ENTRY.match(line)
        inside = bool(match and match[1] in entries) or (inside and line.startswith("  "))
        lines += [] if inside else [line]
    return "\n".join(lines).strip()


def fields(value: Any) -> str:
    """The fields of a dataclass of which its docstring, or the one below each, says something."""
    meant = listed(value) | documented(value)
    rows = [f"| `{f.name}` | {cell(meant[f.name])} |" for f in dataclasses.fields(value) if f.name in meant]
    return "\n".join(["| field | |", "|---|---|", *rows]) if rows else ""


def cell(text: str) -> str:
    """A text in a table."""
    return text.replace("|", "\\|")


def listed(value: Any) -> dict[str, str]:
    """What the list in a dataclass's docstring says of each field: its name in backticks, spaces, the text."""
    lines = (inspect.getdoc(value) or "").splitlines()
    if not dataclasses.is_dataclass(value) or not any(re.match(r"`\w+`  ", line) for line in lines):
        return {}
    names = {field.name for field in dataclasses.fields(value)}
    found: dict[str, str] = {}
    last = ""
    for line in lines:
        if (match := _ENTRY.match(line)) and match[1] in names:
            last = match[1]
            found[last] = match[2]
        elif last and line.startswith("  "):
            found[last] += " " + line.strip()
        else:
            last = ""
    return found


def documented(value: Any) -> dict[str, str]:
    """What the string below each field of a class says."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def methods(value: Any) -> list[tuple[str, str]]:
    """Signature and docstring of each public method and property of a class, and of ours that it builds on."""
    found = []
    ours = [vars(kind) for kind in reversed(value.__mro__) if kind.__module__.startswith("peftune.")]
    for name, member in {name: member for kind in ours for name, member in kind.items()}.items():
        if name.startswith("_") or name in _INSIDE or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        if isinstance(member, property):
            assert member.fget is not None
            line = f"{name} -> {inspect.signature(member.fget).return_annotation}"
        else:
            line = " ".join(call(name, member).split()).replace("( ", "(").replace(", )", ")")
        found.append((line, f"\n\n{prose(member)}"))
    return found


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}")
