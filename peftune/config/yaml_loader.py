"""YAML as people mean it: `2e-4` is a number, a repeated key is an error, errors are one line, and size is bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import UserError

_BYTES = 1 << 20  # of a file
_VALUES = 10_000  # what repeated parts (aliases) stand for counted each time
_DEPTH = 30
_DIGITS = 100  # of a number


def read_yaml(path: Path, what: str = "the recipe", keys: str = "base, data and run") -> dict[str, Any]:
    """The mapping that a YAML file holds; UserError where it cannot be read or holds something else."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot read {what}: it is not a file")  # a pipe would be waited for
        if path.stat().st_size > _BYTES:
            raise UserError(f"{path}: cannot read {what}: {path.stat().st_size:,} bytes; expected at most {_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{str(path)[:200]}: cannot read {what}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save {what} as UTF-8") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(path)[:200]!r}: cannot read {what}: {error}") from None
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path}: expected a mapping with {keys}, found {found}")
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain values, at most 10,000 of them, nested at most 30 deep; else ValueError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as text; people and every other tool mean a number. Repeated keys are refused.

    What it refuses raises yaml.YAMLError or ValueError. Sizes are bounded before a value is made: an alias costs a
    few letters and may stand for any number of values (nine levels of nine: a billion).
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.values = 0
        self.values_of: dict[str, int] = {}  # of each part that has a name (anchor), once it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self.values
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self.values_of:
                raise ValueError(f"*{event.anchor} stands inside of what it names")
            self.values += self.values_of.get(event.anchor or "", 0)
        elif event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise ValueError(f"the tag {event.tag[:80]!r} is not known here")
        self.values += 1
        self.depth += 1
        if self.values > _VALUES or self.depth > _DEPTH:
            raise ValueError(f"expected at most {_VALUES:,} values, nested at most {_DEPTH} deep; found more")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor := getattr(event, "anchor", None):
            self.values_of[anchor] = self.values - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = str(super().construct_scalar(node))
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"half a character (surrogate) in {text!r}")
        if len(text) > _DIGITS and node.tag.endswith((":int", ":float", ":timestamp", "!sci")):
            raise ValueError(f"a number of {len(text):,} characters, {text[:20]}…; expected at most {_DIGITS}")
        return text

    def construct_number(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).replace("_", ""))


_Loader.add_implicit_resolver("!sci", re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_constructor("!sci", _Loader.construct_number)
