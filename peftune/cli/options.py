"""Options that several verbs share, and how NAME=VALUE is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftune.errors import UserError
from peftune.files import check_writable, write_json

if TYPE_CHECKING:
    from peftune.config.data_section import Source

BASE_HELP = "Hub name, directory, or builtin:small."
_ADAPTER_HELP = "Adapter directory, with the name to show; a bare DIR is named after its last part. May be repeated."
_EXAMPLES = {"--adapter": "poems=adapters/poems", "--data": "poems=held.txt", "--column": "prompt=question"}
_EXAMPLES |= {"FILE": "after=texts.jsonl", "--trained-on": "poems=poems.txt"}

_JSON_HELP = "Also write the figures to this file."

Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help=_ADAPTER_HELP)]

_COLUMN_HELP = "Column to read: text=, prompt=, completion= or messages=; of a hub data set also split=, subset=."
Columns = Annotated[list[str] | None, typer.Option("--column", metavar="KEY=COLUMN", help=_COLUMN_HELP)]
BlockSize = Annotated[int | None, typer.Option(min=8, help="Tokens per block. Default: the base's context.")]


def writable(paths: list[Path] | Path | None) -> list[Path] | Path | None:
    """The paths of an option, each of which can be written; UserError before any work where one cannot."""
    for path in paths if isinstance(paths, list) else [paths]:
        if path is not None:
            check_writable(path)
    return paths


Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help=_JSON_HELP, callback=writable)]


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
            suffix = "" if option == "--adapter" else Path(value).suffix
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
