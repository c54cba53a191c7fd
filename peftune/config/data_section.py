"""`data` in the recipe: which sources are read, and how they become documents and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from peftune.config.choices import Chat, Lint, OnBadRow, SpecialTokens, SplitOn, UnknownFiles
from peftune.config.messages import short
from peftune.config.new_tokens import NewTokens
from peftune.config.section import Fraction, NonEmpty, Section
from peftune.config.text_codecs import codec_named


def _known_encoding(name: str) -> str:
    codec_named(name)
    return name


def _a_date_is_its_text(value: Any) -> Any:
    return {str(k): [_plain(one) for one in v] if isinstance(v, list) else _plain(v) for k, v in value.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, date) else value


def _check_wanted(where: dict[str, Any]) -> dict[str, Any]:
    for name, wanted in where.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if not values or not all(value is None or isinstance(value, str | int | float) for value in values):
            raise ValueError(f"column {name[:40]!r}: expected a value or a list of values, found {short(wanted)}")
    return where


Where = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: _a_date_is_its_text(value) if isinstance(value, dict) else value),
    AfterValidator(_check_wanted),
    Field(min_length=1),
]


def _delimiter(value: Any) -> Any:
    value = "\t" if value == "\\t" else value  # as it is typed between single quotes
    if not isinstance(value, str) or len(value) != 1 or value in '"\r\n\0':
        raise ValueError(f'expected one character such as ";" or "\\t", found {short(value)}')
    return value


class Source(Section):
    """Where documents come from; a bare string in the recipe is short for `{path: string}`."""

    path: NonEmpty
    """A file (txt, jsonl, json, csv, tsv, parquet), a directory of such, a glob, `builtin:DOMAIN/PART`, or the name of
    a hub data set."""
    text: str | None = None
    """Column of plain text, or a template over several: `"{title}: {body}[[ ({year})]]"`; what stands in `[[…]]` is
    left out where one of its columns is empty. Where no column is named, those called `text`, else `prompt` and
    `completion`, else `messages`, else `conversations` are read."""
    prompt: str | None = None
    """Column (or template) of the prompt (context, never scored); goes with `completion`."""
    completion: str | None = None
    """Column (or template) of the completion (scored)."""
    messages: str | None = None
    """Column of chat messages, each `{role, content}` or ShareGPT's `{from, value}`. What the assistant says is scored,
    and what ends its turn (the end of the text, or a blank line and `User:`), which is how it learns to stop."""
    where: Where | None = None
    """Rows to read: a mapping of columns to a value or a list of values; each column must hold one of its own. `null`
    is an empty one."""
    explode: str | None = None
    """Column that holds a list: each entry makes a row of its own, in which the column is that entry."""
    delimiter: Annotated[str | None, BeforeValidator(lambda value: value and _delimiter(value))] = None
    """What separates the fields of a csv file (default `,`, of a tsv file a tab)."""
    on_bad_row: OnBadRow | None = None
    """As `data.on_bad_row`, for this source."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = None
    """Encoding of text, csv and json files (`cp1252`, `latin-1`, `utf-16`, `gb18030`, …) where it is not UTF-8. A byte
    order mark wins."""
    split_on: SplitOn | None = None
    """As `data.split_on`, for this source."""
    unknown_files: UnknownFiles | None = None
    """As `data.unknown_files`, for this source."""
    split: str | None = None
    """Split of a hub data set (default `train`)."""
    subset: str | None = None
    """Configuration name of a hub data set."""

    def is_builtin(self) -> bool:
        """Whether it names a corpus that every Python carries."""
        return self.path.startswith("builtin:")

    def codec(self) -> str | None:
        """Python's codec for `encoding`."""
        return codec_named(self.encoding) if self.encoding is not None else None

    @model_validator(mode="after")
    def _columns_make_sense(self) -> Source:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together")
        if sum(column is not None for column in (self.text, self.prompt, self.messages)) > 1:
            raise ValueError("give one of text, prompt + completion, messages")
        return self


SourceLike = Annotated[Source, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]
_OneIsAList = BeforeValidator(lambda value: [value] if isinstance(value, str | dict) else value)
SourceList = Annotated[list[SourceLike], _OneIsAList, Field(min_length=1)]


def _validation_kind(value: Any) -> str:
    """What `data.validation` holds; a mapping whose keys are not those of a source names evaluation domains."""
    if isinstance(value, dict) and not set(value) & set(Source.model_fields):
        return "(domains)"
    return "(sources)" if isinstance(value, str | dict | list) else "(fraction)"


_NamesAreText = BeforeValidator(lambda value: {str(name): source for name, source in value.items()})
Domains = Annotated[dict[str, SourceList], _NamesAreText, Field(min_length=1)]
Validation = Annotated[
    Annotated[Fraction, Tag("(fraction)")]
    | Annotated[SourceList, Tag("(sources)")]
    | Annotated[Domains, Tag("(domains)")],
    Discriminator(_validation_kind),
]


_OF_ALL = ("on_bad_row", "unknown_files")
"""Keys of a source that it takes from the section where it has none of its own."""


Documents = str | Path | Source | Sequence[str | Path | Source]
"""In Python: a file, glob, `builtin:DOMAIN/PART` or hub data set, or several."""


def as_sources(documents: Documents) -> list[Source]:
    """The sources of some documents."""
    several = [documents] if isinstance(documents, str | Path | Source) else documents
    return [one if isinstance(one, Source) else Source(path=str(one)) for one in several]


class DataSection(Section):
    """What is read, and how it becomes blocks of tokens."""

    train: SourceList
    """Sources to learn from: a path, a list of paths, or mappings with `path` and the columns to read."""
    validation: Validation = 0.05
    """A fraction held out by document hash (equal documents fall on one side), sources as above, or a mapping of
    domain names to sources, each evaluated by itself; 0 is none. Documents that are trained on too are counted."""
    block_size: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Tokens per block; `auto` is the context length of the base (1,024 for GPT-2)."""
    packing: bool = True
    """Lay several documents in one row; `false` gives each a row of its own, sorted by length. Same result."""
    one_document_per_block: bool = False
    """Make each document a block of its own (a longer one several): a step then learns from `batch.global_size`
    documents, as in most papers, instead of that many full blocks."""
    new_tokens: NewTokens = []
    """Texts that become one token each (`<|name|>`, …) and that the base's tokenizer does not know. Their rows of the
    embedding begin as the mean of all and are trained, no others are; the adapter holds them and the tokenizer."""
    join: Literal[" ", ""] = " "
    """Put between prompt and completion where neither has white space at the seam."""
    on_bad_row: OnBadRow = "refuse"
    """What becomes of a row that cannot be learnt from (a missing column, null, no JSON, an unknown role): `refuse` the
    file, or `skip` the row; skipped rows are counted, and a file of nothing else is refused."""
    lint: Annotated[Lint, BeforeValidator(lambda value: "off" if value is False else value)] = "warn"  # YAML's off
    """What becomes of faults that texts show (mojibake, control characters, credentials, templates left open, held-out
    text that is trained on, …): `warn` tells the grave ones at the start in a line each, `strict` refuses the text and
    tells all, near-duplicates and e-mail addresses among them. `peftune data` shows all without a run."""
    special_tokens: SpecialTokens = "text"
    """How `<|title|>` and other special tokens of the base's tokenizer are read where a text spells them out: as the
    `text` that it is, or as the token (`parse`), in training and in the prompts of the adapter that comes out."""
    chat: Chat = "plain"
    """How the messages of a chat become one text, in training and when the adapter is asked: `plain` with names
    (`User: …`, a blank line, `Assistant: …`), or `eos-turns`, each followed by the end-of-text token, as DialoGPT's."""
    split_on: SplitOn = "auto"
    """How a text file becomes documents: `blank-line` (cut at blank lines), `wide-gap` (at two or more of them),
    `endoftext` (at `<|endoftext|>`), `line`, `file`. `auto`: `endoftext` if the file has one; else `file` where there
    are several text files; else `wide-gap` if at least one gap in 20 is that wide; else `blank-line`."""
    unknown_files: UnknownFiles = "refuse"
    """What becomes of files in a directory (or of a glob) that are neither text nor data, such as docx and jpg:
    `refuse`, naming all, or `skip`. Hidden files are always left out."""
    repeats: Literal["keep", "drop"] = "keep"
    """Documents that are equal byte for byte: `keep` all, or `drop` all but the first, over all sources."""

    def validation_sources(self) -> dict[str, list[Source]]:
        """Sources to validate on by domain; none where a fraction of the training text is held out."""
        if isinstance(self.validation, float | int):
            return {}
        return self.validation if isinstance(self.validation, dict) else {"validation": self.validation}

    def read_as(self, sources: Sequence[Source]) -> list[Source]:
        """The sources with what the section says of all of them."""
        return [
            source.model_copy(update={key: getattr(source, key) or getattr(self, key) for key in _OF_ALL})
            for source in sources
        ]

    @model_validator(mode="after")
    def _turns_end_for_certain(self) -> DataSection:
        if self.chat == "eos-turns" and self.special_tokens == "parse":
            raise ValueError(
                "chat eos-turns goes with special_tokens text: a message that spells the end token would end its turn"
            )
        return self
