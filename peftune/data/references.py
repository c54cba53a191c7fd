"""Test sets: prompts with their references, what a model wrote for them, and both as files.

Rows with the same prompt are one item with several references; items stand in the order of their first rows. Sources
are read as in training, with the same columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftune.config.data_section import Source
from peftune.data.documents import Document, ReadStats
from peftune.data.rows.row_columns import kind_of
from peftune.data.sources import records
from peftune.data.sources.decode import open_text
from peftune.data.sources.listing import has_rows
from peftune.data.sources.read import read_documents
from peftune.errors import UserError
from peftune.files import write_text


@dataclass(frozen=True)
class Item:
    """What is asked, and every answer that is right; `prompt` None where only the references are known."""

    prompt: str | None
    references: tuple[str, ...] = ()
    is_chat: bool = False
    """The prompt is a conversation, and the answer its last turn."""


def read_items(source: Source) -> list[Item]:
    """The items of a source with prompts and completions, or with conversations.

    UserError naming the row that has no prompt, and where there is no item.
    """
    stats, found, chat = ReadStats(), dict[str, list[str]](), set[str]()
    for document in read_documents(source, "auto", stats):
        prompt, reference = _asked(document)
        found.setdefault(prompt, []).append(reference)
        if document.turns is not None:
            chat.add(prompt)
    if not found:
        raise UserError(f"{source.path}: no item found ({stats.blank} without a completion); expected at least one")
    return [Item(prompt, tuple(references), prompt in chat) for prompt, references in found.items()]


def _asked(document: Document) -> tuple[str, str]:
    if document.turns is not None:
        return "".join(text for text, _ in document.turns[:-1]), document.turns[-1][0]
    if document.prompt is None:
        raise UserError(
            f"{document.source}: a text without a prompt; a test set has prompts and completions, in columns of these "
            "names or of others that you name"
        )
    return document.prompt, document.text


def read_references(source: Source) -> list[Item]:
    """Items of a source, of rows as `write_hypotheses` makes them, or of a text file of the E2E challenge.

    In such a text file a line is a reference and a blank line comes between two items; without any blank line each
    line is an item.
    """
    path = Path(source.path)
    if path.is_file() and source.prompt is None and not has_rows(path):
        with open_text(path) as file:
            text = "\n".join(map(str.strip, file)).strip("\n")
        groups = [group.split("\n") for group in re.split("\n\n+", text)]
        groups = [[line] for line in groups[0]] if len(groups) == 1 else groups
        return _checked([Item(None, tuple(filter(None, group))) for group in groups], path)
    if path.is_file() and source.prompt is None:
        rows = _rows(path, ("prompt", "references"))
        if rows and "references" in rows[0][1]:
            return _checked([_item(where, row) for where, row in rows], path)
    return read_items(source)


def read_hypotheses(path: Path) -> tuple[list[str], list[Item] | None]:
    """Texts of a file: rows with `hypothesis`, or a line each; and the items beside them, where there are references.

    Raises UserError naming the row that has none.
    """
    if not has_rows(path):
        with open_text(path) as file:
            lines = file.read()
        return lines.removesuffix("\n").split("\n") if lines else [], None
    texts, items = [], list[Item]()
    for where, row in _rows(path, ("hypothesis", "prompt", "references")):
        texts.append(_text_in(row, "hypothesis", where))
        if row.get("references"):
            items.append(_item(where, row))
    return texts, _checked(items, path) if texts and len(items) == len(texts) else None


def read_prompts(path: Path) -> Iterator[str]:
    """One prompt a line, blank lines left out; from rows their `prompt`. UserError naming the row that has none."""
    if has_rows(path):
        for where, row in _rows(path, ("prompt",)):
            yield _text_in(row, "prompt", where)
    else:
        with open_text(path) as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())


def write_hypotheses(path: Path, items: Sequence[Item], texts: Sequence[str]) -> None:
    """One row an item: `.jsonl` has prompt, hypothesis and references, any other file the hypothesis as a line.

    White space around a text is left out; in a line each run of white space with a line break becomes one space.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = [
            {"prompt": item.prompt, "hypothesis": text.strip(), "references": list(item.references)}
            for item, text in zip(items, texts, strict=True)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [as_line(text) for text in texts]
    write_text(path, "".join(f"{line}\n" for line in lines))


def as_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(filter(None, (line.strip() for line in text.splitlines())))


def _rows(path: Path, columns: Sequence[str]) -> list[records.Row]:
    return list(records.rows(path, lambda names: [name for name in names if name in columns]))


def _text_in(row: dict[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        found = f"{column} is {kind_of(text)}" if column in row else f"no {column}"
        raise UserError(f'{where}: {found}; expected {{"{column}": "text"}} in every row')
    return text


def _item(where: str, row: dict[str, Any]) -> Item:
    prompt, references = row.get("prompt"), row.get("references")
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError(f"{where}: references is {kind_of(references)}; expected a list of texts")
    return Item(prompt if isinstance(prompt, str) else None, tuple(filter(str.strip, references)))


def _checked(items: list[Item], path: Path) -> list[Item]:
    for number, item in enumerate(items, 1):
        if not item.references:
            raise UserError(f"{path}: item {number} has no reference; expected at least one text for each")
    return items
