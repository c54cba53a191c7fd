"""YAML as people mean it: `2e-4` is a number, a repeated key is an error, and errors are one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; UserError where it cannot be read or holds something else."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path}: expected a mapping with base, data and run, found {found}")
    return value


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as text; people and every other tool mean a number. Repeated keys are refused.

    What it refuses raises yaml.YAMLError or ValueError.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"key {sorted(repeated)[0]} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = str(super().construct_scalar(node))
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"half a character (surrogate) in {text!r}")
        return text

    def construct_number(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).replace("_", ""))


Loader.add_implicit_resolver("!sci", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
Loader.add_constructor("!sci", Loader.construct_number)
