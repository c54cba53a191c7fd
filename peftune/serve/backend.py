"""What the endpoints need of models and of an engine, which compute in this process or in others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from peftune.errors import PeftuneError
from peftune.inference.bank import AdapterInfo
from peftune.inference.engine import EngineLoad
from peftune.inference.request import OnOutput, Request, RequestHandle
from peftune.inference.routing.route import Route
from peftune.model.base import Base

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerFast


class EngineLost(PeftuneError):
    """The process that was to answer has ended."""


class ServedModels(Protocol):
    """A base and its adapters by name, as `AdapterBank` has them."""

    base: Base
    config: GPT2Config
    tokenizer: PreTrainedTokenizerFast
    begin: int

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""

    def get(self, name: str) -> AdapterInfo:
        """The adapter of this name; UserError where there is none."""

    def parses(self, name: str | None) -> bool:
        """Whether special tokens that a prompt for it (None: the base) spells out are tokens."""

    def chat(self, name: str | None) -> str | None:
        """The template of the conversations that it answers, None where it answers none."""

    def add(self, name: str, directory: Path, replace: bool = False, new_tokens: bool = True) -> AdapterInfo:
        """Load an adapter, or UserError and nothing has changed."""

    def remove(self, name: str) -> None:
        """Unload an adapter."""


class TextEngine(Protocol):
    """What writes texts, as `Engine` does."""

    @property
    def failed(self) -> bool:
        """Whether nothing will be answered any more."""

    @property
    def load(self) -> EngineLoad:
        """What it does now."""

    def submit(self, request: Request, on_output: OnOutput) -> RequestHandle:
        """Put a request into the queue; Busy where it is full, UserError for what cannot be answered."""

    def route(self, ids: Sequence[int], names: Sequence[str] | None, threshold: float | None) -> Future[Route]:
        """Which adapter a prompt is likeliest under; raises as `submit` does."""

    def start(self) -> None:
        """Begin to answer."""

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those that are here end for so long, cancel the rest."""
