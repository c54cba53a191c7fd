"""What the engine is given, the models and requests, and what comes back: plain values that any thread may hold."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from peftune.data.sources.chat_template import EOS_TURNS, contents_of, render_chat
from peftune.data.tokens.encode import begin_of_text_id, encode_texts, end_of_text_id
from peftune.errors import UserError
from peftune.inference.settings import FinishReason, GenerationSettings
from peftune.model.decode.batch import ModelVariant
from peftune.model.decode.build import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ModelProvider(Protocol):
    """A base and adapters on it by name; `AdapterBank` is one."""

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    end: int
    """The id of `<|endoftext|>`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""

    def tokenizer_of(self, name: str | None) -> PreTrainedTokenizerFast:
        """The tokenizer of the texts with the adapter `name`, None for the base alone."""

    def variant(self, name: str | None) -> ModelVariant:
        """The base with the adapter `name`, None for the base alone; UserError where none has this name."""


def context_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, parse: bool = False) -> list[int]:
    """The token ids of a prompt: the context token (begin of text), then the prompt.

    Special tokens in it are plain text, or with `parse` the tokens.
    """
    return [begin_of_text_id(tokenizer), *encode_texts([prompt], tokenizer, parse)[0]]


def chat_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], chat: str, parse: bool = False
) -> list[int]:
    """The token ids of a conversation that the assistant is to continue, by the template `chat`.

    With eos-turns there is no context token, and special tokens are plain text in any case. UserError for a role or
    content that we do not know.
    """
    if chat != EOS_TURNS:
        return context_ids(tokenizer, render_chat(messages), parse)
    end = end_of_text_id(tokenizer)
    return [id for ids in encode_texts(contents_of(messages), tokenizer) for id in (*ids, end)]


def slide(ids: list[int], n_positions: int) -> list[int]:
    """The tokens of `ids` that the model sees: all while they fit, else the last n_positions - n_positions // 4."""
    return ids if len(ids) <= n_positions else ids[n_positions // 4 - n_positions :]


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability (nats) under the unmodified softmax, before temperature and penalties.

    `logprob` is None for the first token of a context, which nothing predicts. `top` holds the likeliest tokens as
    (id, logprob), best first; `rank` 1 means that nothing is likelier.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    `ids`        the prompt's tokens, context token included (`AdapterBank.encode` makes them)
    `adapter`    a name in the bank, None for the base alone
    `settings`   length, sampling, seed and stop strings; `beams` must be 1
    `logprobs`   None, or how many of the likeliest tokens to name beside each token generated
    `echo`       with `logprobs`: also those of the prompt's tokens, before the first token generated
    `only_score` generate nothing: end after the prompt (with `echo` and `logprobs`: its log-probabilities)
    `slide`      a full window slides on (see `slide`); otherwise the text ends there with "length"
    """

    ids: tuple[int, ...]
    adapter: str | None
    settings: GenerationSettings
    logprobs: int | None = None
    echo: bool = False
    only_score: bool = False
    slide: bool = False

    def check(self, vocabulary: int, tokens: int, positions: int) -> None:
        """UserError for what a model of so many rows, tokens of its tokenizer and positions cannot answer."""
        if self.settings.beams > 1:
            raise UserError("beams: a bank samples or takes the likeliest token; beam search is generate.generate's")
        if self.settings.num_return_sequences > 1:
            raise UserError("num_return_sequences: a request is one text; submit it several times")
        if not self.ids or min(self.ids) < 0 or max(self.ids) >= vocabulary:
            raise UserError(f"token ids must lie in 0 to {vocabulary - 1}, at least one of them")
        new = 0 if self.only_score else self.settings.max_new_tokens
        if not self.slide and len(self.ids) + new > positions:
            found = f"{len(self.ids)} tokens of the prompt and {new} to write"
            raise UserError(f"{found} exceed the model's {positions} positions")
        self.settings.check_ids(tokens)


@dataclass(frozen=True)
class RequestOutput:
    """What one step of the engine brought for a request; `finish_reason` is set in the last output and nowhere else.

    `text`       what may be shown now: complete characters, nothing of a stop string; often ""
    `ids`        tokens generated in this step (one, or none)
    `logprobs`   one for each of `ids` where asked for
    `prompt`     with `echo` and `logprobs`, once: one for each token of the prompt, the context token first
    `error`      why, where `finish_reason` is "error"
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""


OnOutput = Callable[[RequestOutput], None]
"""Called in the engine's thread, in order; must be quick and must not raise."""

OnText = Callable[[int, str], None]
"""`on_text(i, text)`: the next part of prompt i's text, never empty; the parts join to it."""


@dataclass(eq=False)
class RequestHandle:
    """A request that was accepted; `seed` gives the same text again.

    `submitted` and `started` are when it was accepted and when it got a slot, on the monotonic clock.
    `cancel` may be called from any thread: the slot is free after the current step. `on_cancel` tells it to an engine
    that does not see this object.
    """

    request: Request
    on_output: OnOutput
    cancelled: bool = field(default=False)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    seed: int = field(init=False)
    on_cancel: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        asked = self.request.settings.seed
        self.seed = secrets.randbelow(2**32) if asked is None else asked

    def cancel(self) -> None:
        """Give the request up; its last output says "cancelled", unless it had ended already."""
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    `text` continues `prompt` and holds nothing of a stop string. `ids` are all tokens that the model generated, those
    of the stop string too, without the `<|endoftext|>` that ended them. `finish_reason`: "stop" (a stop string came),
    "end" (`<|endoftext|>` came), "length" (`max_new_tokens` generated). `prompt_tokens` counts the context token too.
    `seed` gives the same text again; None where nothing was drawn.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int | None
