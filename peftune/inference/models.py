"""What the engine and routing need to know of the models that they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from peftune.model.decode.batch import ModelVariant
from peftune.model.decode.build import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ModelProvider(Protocol):
    """A base and adapters on it by name; `AdapterBank` is one."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""

    @property
    def end(self) -> int:
        """The id of `<|endoftext|>`."""

    def variant(self, name: str | None) -> ModelVariant:
        """The base with the adapter `name`, None for the base alone; UserError where none has this name."""
