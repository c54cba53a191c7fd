"""Options that several verbs share, and how NAME=VALUE is read."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from peftune.config import choices
from peftune.config.spelling import spelling
from peftune.errors import BaseNotFound, PeftuneError, UserError
from peftune.files import check_writable, json_document, write_json

if TYPE_CHECKING:
    from peftune.config.data_section import DataSection, Source


BASE_HELP = "Hub name, directory, or builtin:small."
_ADAPTER_HELP = "Adapter directory, with the name to show; a bare DIR is named after its last part. May be repeated."
_EXAMPLES = {"--adapter": "poems=adapters/poems", "--data": "poems=held.txt", "--column": "prompt=question"}
_EXAMPLES |= {"FILE": "after=texts.jsonl", "--trained-on": "poems=poems.txt"}

_JSON_HELP = "Also write the figures to this file; - writes them to stdout, and nothing else."
_STDOUT = Path("-")

Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help=_ADAPTER_HELP)]

_COLUMN_HELP = (
    "Column to read: text=, prompt=, completion= or messages=; of a hub data set also split=, subset=. Also "
    "where.COLUMN=VALUE, explode=, delimiter=, encoding=, split_on=, unknown_files=, on_bad_row=, as in a recipe."
)


def _as_columns(settings: dict[str, str]) -> str:
    """Settings of a source as a shell takes them."""
    pairs = [f"{key}={value}" for key, value in settings.items() if key != "path"]
    return " ".join(f"--column {shlex.quote(pair)}" for pair in pairs)


def _spell_as_columns(values: list[str] | None) -> list[str] | None:
    """Have messages about a source name the option of the verb in use, until the end of the call."""
    spelling.set(_as_columns)
    return values


Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="KEY=VALUE", help=_COLUMN_HELP, callback=_spell_as_columns),
]
Precision = Annotated[
    choices.Precision,
    typer.Option(help="What to compute in; auto is bf16 on a GPU that has it, else fp32."),
]
Device = Annotated[choices.Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]
BlockSize = Annotated[int | None, typer.Option(min=8, help="Tokens per block. Default: the base's context.")]


def writable(paths: list[Path] | Path | None) -> list[Path] | Path | None:
    """The paths of an option, each of which can be written; UserError before any work where one cannot."""
    for path in paths if isinstance(paths, list) else [paths]:
        if path not in (None, _STDOUT):
            check_writable(path)
    return paths


Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help=_JSON_HELP, callback=writable)]


class _OnlyJson(io.StringIO):
    """In the place of `stdout` while that is for JSON alone: takes and drops whatever else is printed."""

    def __init__(self, stdout: TextIO) -> None:
        super().__init__()
        self.stdout = stdout

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def only_json(path: Path | None) -> Iterator[None]:
    """Where `--json` is `-`, a block in which nothing but that JSON reaches stdout."""
    if path != _STDOUT:
        yield
        return
    with _OnlyJson(sys.stdout) as stand_in, redirect_stdout(stand_in):
        yield


def told(error: PeftuneError, arguments: list[str]) -> str:
    """What an error says, with the option that names another base where it was not found and the verb has one."""
    has_option = not {"train", "launch"}.intersection(arguments[:1])
    return f"{error} (--base DIR)" if isinstance(error, BaseNotFound) and has_option else str(error)


def save_json(path: Path | None, value: Any) -> None:
    """Write a result to where `--json` says, if anywhere; CheckFailed where it holds a number that is not finite."""
    if isinstance(sys.stdout, _OnlyJson):
        sys.stdout.stdout.write(json_document(value, "stdout"))
    elif path is not None:
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


_KEY = re.compile(r"[a-z_][a-z0-9_]*(\.[^/]+)*")  # of a recipe; below data.validation and where stand a person's names


def recipes_and_overrides(first: Path, others: list[str] | None) -> tuple[list[Path], list[str]]:
    """The recipes of a call, of which the first argument is one, and its KEY=VALUE; UserError for what is neither."""
    overrides = [text for text in others or [] if "=" in text and _KEY.fullmatch(text.partition("=")[0])]
    more = [text for text in others or [] if text not in overrides]
    if unknown := [text for text in more if not text.endswith((".yaml", ".yml")) and not os.path.exists(text)]:
        expected = "expected a recipe, a YAML file, or KEY=VALUE such as optim.lr=1e-4"
        raise UserError(f"{', '.join(repr(text[:80]) for text in unknown[:10])}: {expected}")
    return [first, *map(Path, more)], overrides


def source_of(path: str, columns: dict[str, Any] | None = None) -> Source:
    """A `Source` from the command line; UserError for columns that do not go together."""
    from peftune.config.data_section import Source
    from peftune.config.messages import validated

    return validated(Source, {"path": path, **(columns or {})}, f"{path}: ")


def data_section_of(paths: list[str], columns: dict[str, Any], **settings: str) -> DataSection:
    """What `data` of a recipe would say of these paths; UserError for columns or settings that do not go together."""
    from peftune.config.data_section import DataSection
    from peftune.config.messages import validated

    return validated(DataSection, {"train": [source_of(path, columns) for path in paths], **settings})


def columns_of(values: list[str] | None) -> dict[str, Any]:
    """What each `--column KEY=VALUE` says of a source; UserError for a key that no source has.

    `where.COLUMN=VALUE` may be repeated, with one value of a column or several.
    """
    from peftune.config.data_section import Source
    from peftune.config.yaml_loader import parse_yaml

    known = [key for key in Source.model_fields if key not in ("path", "where")]
    wanted = [value.removeprefix("where.") for value in values or [] if value.startswith("where.")]
    columns: dict[str, Any] = named("--column", [value for value in values or [] if not value.startswith("where.")])
    for key in columns:
        if key not in known:
            names = ", ".join([*known, "where.COLUMN"])
            raise UserError(f"--column {key}={columns[key]}: expected one of {names} before the =")
    where: dict[str, list[Any]] = {}
    for pair in wanted:
        column, separator, text = pair.partition("=")
        if not column or not separator:
            raise UserError(f"--column where.{pair}: expected where.COLUMN=VALUE, such as where.department=billing")
        try:
            value = parse_yaml(text)
        except ValueError:
            value = text
        where.setdefault(column, []).append(value if isinstance(value, bool | int | float) else text)
    return columns | ({"where": where} if where else {})
