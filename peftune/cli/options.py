"""Options that several verbs share, and how NAME=VALUE is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftune.errors import BaseNotFound, PeftuneError, UserError
from peftune.files import check_writable, write_json

if TYPE_CHECKING:
    from peftune.config.data_section import Source

BASE_HELP = "Hub name, directory, or builtin:small."
_ADAPTER_HELP = "Adapter directory, with the name to show; a bare DIR is named after its last part. May be repeated."
_EXAMPLES = {"--adapter": "poems=adapters/poems", "--data": "poems=held.txt", "--column": "prompt=question"}

_JSON_HELP = "Also write the figures to this file."

Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help=_ADAPTER_HELP)]


def _writable(path: Path | None) -> Path | None:
    if path is not None:
        check_writable(path)
    return path


Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help=_JSON_HELP, callback=_writable)]


def told(error: PeftuneError, arguments: list[str]) -> str:
    """What an error says, with the option that names another base where it was not found and the verb has one."""
    has_option = not {"train", "launch"}.intersection(arguments[:1])
    return f"{error} (--base DIR)" if isinstance(error, BaseNotFound) and has_option else str(error)


def save_json(path: Path | None, value: Any) -> None:
    """Write a result to the file of `--json`, if it was given."""
    if path is not None:
        write_json(path, value)


def named(option: str, values: list[str] | None) -> dict[str, str]:
    """NAME=VALUE pairs in the order given; a bare path is named after its last part."""
    pairs: dict[str, str] = {}
    for value in values or []:
        name, separator, path = value.partition("=")
        if option != "--column" and (not separator or "/" in name):
            suffix = Path(value).suffix if option == "--data" else ""
            name, path = Path(value).resolve().name.removesuffix(suffix), value
        if not name or not path:
            raise UserError(f"{option} {value!r}: expected a name, = and a value, such as {_EXAMPLES[option]}")
        if name in pairs:
            raise UserError(f"{option}: {name} is given twice, {pairs[name]} and {path}; give each a name of its own")
        pairs[name] = path
    return pairs


def source_of(path: str, columns: dict[str, str] | None = None) -> Source:
    """A `Source` from the command line; UserError for columns that do not go together."""
    from peftune.config.data_section import Source

    try:
        return Source(path=path, **(columns or {}))
    except ValueError as error:
        reason = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)
        raise UserError(f"{path}: {reason.removeprefix('Value error, ')}") from None


_COLUMN_KEYS = ("text", "prompt", "completion", "messages", "split", "subset")


def columns_of(values: list[str] | None) -> dict[str, str]:
    """What each `--column KEY=NAME` says; UserError for a key that no source has."""
    columns = named("--column", values)
    for key in columns:
        if key not in _COLUMN_KEYS:
            raise UserError(f"--column {key}={columns[key]}: expected one of {', '.join(_COLUMN_KEYS)} before the =")
    return columns
