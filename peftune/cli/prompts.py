"""Prompts from the command line and from a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peftune.data.sources import records
from peftune.data.sources.plain_text import open_text
from peftune.errors import UserError


def gather(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given, then those of the file; UserError where there is none, or one is not valid Unicode."""
    prompts = [*given, *(read_prompts(file) if file is not None else ())]
    if not prompts:
        source = f"{file}: holds no prompt" if file is not None else "no prompt"
        raise UserError(f'{source}; give --prompt TEXT (--prompt "" begins a document) or --prompts FILE')
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"prompt {number}: not valid UTF-8 at character {error.start + 1}; expected text") from None
    return prompts


def read_prompts(file: Path) -> Iterator[str]:
    """One prompt a line, blank lines left out; from jsonl, json, csv, tsv or parquet the column `prompt`.

    A byte order mark and CRLF line ends are understood. Raises UserError that says where something cannot be read.
    """
    if file.suffix.lower() in records.SUFFIXES:
        for where, columns in records.rows(file, lambda names: [name for name in names if name == "prompt"]):
            prompt = columns.get("prompt")
            if not isinstance(prompt, str):
                found = f"prompt is {records.kind_of(prompt)}" if "prompt" in columns else "no prompt"
                raise UserError(f'{where}: {found}; expected {{"prompt": "text"}} in every row')
            yield prompt
    else:
        with open_text(file) as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
