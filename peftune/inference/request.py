"""What is asked of the engine, and what comes back: plain values that any thread may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from peftune.inference.settings import GenerationSettings

FinishReason = Literal["stop", "length", "end", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability (nats) under the unmodified softmax, before temperature and penalties.

    `logprob` is None for the first token of a context, which nothing predicts. `top` holds the likeliest tokens as
    (id, logprob), best first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    `ids`        what the model reads, context `<|endoftext|>` included (`AdapterBank.encode` makes it)
    `adapter`    a name in the bank, None for the base alone
    `settings`   length, sampling, seed and stop strings; `beams` must be 1
    `logprobs`   None, or how many of the likeliest tokens to name beside each token written
    `echo`       with `logprobs`: also those of the prompt's tokens, before the first token written
    `only_score` write nothing: end after the prompt (with `echo` and `logprobs`: its log-probabilities)
    `slide`      a full window slides on (see `decode.slide`); otherwise the text ends there with "length"
    """

    ids: tuple[int, ...]
    adapter: str | None
    settings: GenerationSettings
    logprobs: int | None = None
    echo: bool = False
    only_score: bool = False
    slide: bool = False


@dataclass(frozen=True)
class RequestOutput:
    """What one token boundary brought for a request; `finish_reason` is set in the last update and nowhere else.

    `text`       what may be shown now: whole characters, nothing of a stop string; often ""
    `ids`        tokens written in this step (one, or none)
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


@dataclass(eq=False)
class RequestHandle:
    """A request that was accepted; `seed` writes the same text again.

    `cancel` may be called from any thread: the slot is free at the next boundary.
    """

    request: Request
    on_output: OnOutput
    seed: int
    cancelled: bool = field(default=False)

    def cancel(self) -> None:
        """Give the request up; its last update says "cancelled", unless it had ended already."""
        self.cancelled = True
