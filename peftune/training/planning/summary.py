"""What a corpus holds and what is probably wrong with it, as a base's tokenizer reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftune.config.choices import Chat, SpecialTokens, SplitOn
from peftune.config.data_section import DataSection, Documents, as_sources
from peftune.config.messages import validated
from peftune.data.summary import summarize
from peftune.model.base import Base, open_base


def summarize_data(
    data: Documents,
    base: str | Path | Base = "builtin:small",
    block_size: int | None = None,
    split_on: SplitOn = "auto",
    special_tokens: SpecialTokens = "text",
    chat: Chat = "plain",
) -> dict[str, Any]:
    """Count what a corpus holds, and look for what spoils training: what `peftune data` prints, as plain values.

    `data` is a file, glob, `builtin:DOMAIN/PART` or hub data set, or several; `base` the one whose tokenizer counts;
    `block_size` (tokens) None is its context; `split_on`, `special_tokens` and `chat` are those of the recipe.

    Lengths are in tokens, `bytes` are of the scored text. `findings` are mappings: `what` is wrong, in how many
    `documents`, the `first` places as file:line, and `advice`. Raises UserError for text that cannot be read and
    for settings that a recipe refuses.
    """
    found = open_base(base)
    settings = {"split_on": split_on, "special_tokens": special_tokens, "chat": chat}
    how = validated(DataSection, {"train": as_sources(data), **settings})
    return summarize(how, found.tokenizer, found.tokenizer_fingerprint, found.block_size(block_size))
