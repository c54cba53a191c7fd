"""The values that travel through the data room: `Document` and `Example`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Document:
    """One text to learn from: plain (`prompt` is None), or a prompt with its completion in `text`.

    `turns` is set for chat: pairs of (text, supervised), already rendered by the template.
    `source` names where it came from, for messages to people (`poems.txt:17`).
    """

    text: str
    prompt: str | None = None
    turns: tuple[tuple[str, bool], ...] | None = None
    source: str = ""

    def content(self) -> str:
        """Everything a reader would see, joined: what the validation split hashes."""
        if self.turns is not None:
            return "".join(text for text, _ in self.turns)
        return self.text if self.prompt is None else f"{self.prompt}\x00{self.text}"


@dataclass(frozen=True)
class Example:
    """A tokenised document: `ids` (n,) and, for each, whether the model is scored on it.

    `ids[0]` is always the context `<|endoftext|>` and never supervised.
    `supervised_bytes` is the UTF-8 length of the supervised text, for bits per byte.
    """

    ids: np.ndarray
    supervised: np.ndarray
    supervised_bytes: int
