"""`data` in the recipe: which sources are read, and how they become documents and blocks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from peftune.config.new_tokens import NewTokens
from peftune.config.section import Fraction, NonEmpty, Section


class Source(Section):
    """Where documents come from; a bare string in the recipe is short for `{path: string}`."""

    path: NonEmpty
    """A file (txt, jsonl, json, csv, tsv, parquet), a directory of such, a glob, `builtin:DOMAIN/PART`, or the name of
    a hub data set."""
    text: str | None = None
    """Column of plain text. Where no column is named, those called `text`, else `prompt` and `completion`, else
    `messages` are read."""
    prompt: str | None = None
    """Column of the prompt (context, never scored); goes with `completion`."""
    completion: str | None = None
    """Column of the completion (scored)."""
    messages: str | None = None
    """Column of chat messages, each `{role, content}`; only what the assistant says is scored."""
    split: str | None = None
    """Split of a hub data set (default `train`)."""
    subset: str | None = None
    """Configuration name of a hub data set."""

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


class DataSection(Section):
    """What is read, and how it becomes blocks of tokens."""

    train: SourceList
    """Sources to learn from: a path, a list of paths, or mappings with `path` and the columns to read."""
    validation: Validation = 0.05
    """A fraction held out by document hash (equal documents fall on one side), sources as above, or a mapping of
    domain names to sources, each evaluated by itself; 0 is none."""
    block_size: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """Tokens per block; `auto` is the context length of the base (1,024 for GPT-2)."""
    packing: bool = True
    """Lay several documents in one row; `false` gives each a row of its own, sorted by length. Same result."""
    new_tokens: NewTokens = []
    """Texts that become one token each (`<|name|>`, …) and that the base's tokenizer does not know. Their rows of the
    embedding begin as the mean of all and are trained, no others are; the adapter holds them and the tokenizer."""
    join: Literal[" ", ""] = " "
    """Put between prompt and completion where neither has white space at the seam."""
    special_tokens: Literal["parse", "text"] = "text"
    """How `<|title|>` and other special tokens of the base's tokenizer are read where a text spells them out: as the
    `text` that it is, or as the token (`parse`), in training and in the prompts of the adapter that comes out."""
    chat: Literal["eos-turns", "plain"] = "plain"
    """How the messages of a chat become one text, in training and when the adapter is asked: `plain` with names
    (`User: …`, a blank line, `Assistant: …`), or `eos-turns`, each followed by the end-of-text token, as DialoGPT's."""
    split_on: Literal["auto", "blank-line", "endoftext", "file", "line"] = "auto"
    """How a txt file becomes documents; `auto`: at `<|endoftext|>` if the file has one, else at two or more blank lines
    if at least one gap in 20 is that wide, else at every blank line."""

    @model_validator(mode="after")
    def _turns_end_for_certain(self) -> DataSection:
        if self.chat == "eos-turns" and self.special_tokens == "parse":
            raise ValueError(
                "chat eos-turns goes with special_tokens text: a message that spells the end token would end its turn"
            )
        return self
