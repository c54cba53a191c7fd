"""pydantic's errors in plain words, one line each, for people who wrote a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from peftune.errors import UserError

_Section = TypeVar("_Section", bound=BaseModel)

# A field that may hold one thing or another has one message; pydantic reports an error for each.
_EITHER = {
    "data.validation": "a fraction below 1 (0 is none), sources, or a mapping of domain names to sources",
    "data.block_size": "a whole number of at least 8, or auto",
    "batch.micro_size": "a whole number of at least 1, or auto",
    "lora.targets": "all, attention, query-value, or a list of module names",
}
_CALLED = {"adapter": "run.init", "continue_from": "run.init", "start_from": "run.init"}
_PLAIN = {
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "tuple_type": "expected a list of two numbers",
    "model_type": "expected a section with keys of its own",
    "list_type": "expected a list, such as [a, b]",
    "dict_type": "expected a section with keys of its own",
    "too_short": "expected at least one",
    "string_too_short": "expected some text",
}


def validated(section: type[_Section], values: dict[str, Any], name: str = "") -> _Section:
    """A section of these values; UserError with all that is wrong with them, after `name`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = validation_messages(error, {"": list(section.model_fields)})
        raise UserError(f"{name}{'; '.join(problems)}") from None


def validation_messages(error: ValidationError, keys: Mapping[str, Sequence[str]]) -> list[str]:
    """One line of plain words for each problem; `keys` are those known in each section, "" for the top."""
    found: dict[str, str] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        somebodys_key = len(parts) - 1 if item["type"] == "extra_forbidden" else None
        # pydantic's own begin with a parenthesis: which of a union it tried
        location = [part for at, part in enumerate(parts) if at == somebodys_key or not part.startswith("(")]
        where, field = ".".join(location), ".".join(location[:2])
        if item["type"] == "extra_forbidden":
            message = f"unknown key {where or repr(where)}, {_nearest(location, keys)}"
        elif item["type"] == "missing":
            message = f"{where} is missing"
        elif field in _EITHER and (field != "data.validation" or where == field):
            where, message = field, f"{field}: expected {_EITHER[field]}, found {short(item['input'])}"
        else:
            message = f"{where}: {_problem(item)}" if where else _problem(item)
        found.setdefault(where, message)
    return list(found.values())


def _problem(item: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    should_be = "expected a number" if "_than" in item["type"] else "expected"  # "Input should be less than 1"
    expected = _PLAIN.get(item["type"]) or item["msg"].replace("Input should be", should_be)
    return f"{expected[:1].lower()}{expected[1:]}, found {short(item['input'])}"


def short(value: Any) -> str:
    """A value as a person may have written it, cut to what fits into a message."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _nearest(location: list[str], keys: Mapping[str, Sequence[str]]) -> str:
    """What an unknown key may have meant: one of its section, or one of another section."""
    *sections, key = location
    known = next(keys[name] for depth in (2, 1, 0) if (name := ".".join(sections[:depth])) in keys)
    outer = [section for section in keys if section and "." not in section]
    elsewhere = {name: f"{section}.{name}" for section in outer for name in keys[section]}
    elsewhere |= _CALLED
    near = [elsewhere[key]] if key in elsewhere else difflib.get_close_matches(key, known, n=1)
    near = near or [elsewhere[name] for name in difflib.get_close_matches(key, elsewhere, n=1)]
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
