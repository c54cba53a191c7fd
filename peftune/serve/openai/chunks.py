"""From the engine's outputs to the chunks that a client gets of one choice; all chunks joined are the full choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftune.inference.detokenize import TextStream
from peftune.inference.request import RequestOutput, TokenLogprob
from peftune.inference.token_text import TokenText

_MIN_LOGPROB = -9999.0  # OpenAI's for a token of probability 0: JSON has no infinity


@dataclass(frozen=True)
class TokenEntry:
    """A token as text and bytes with its log-probability (nats)."""

    text: str
    raw: bytes
    logprob: float | None


@dataclass(frozen=True)
class ScoredToken:
    """A token at its character offset, with the likeliest tokens there; `top` may lack the token itself."""

    token: TokenEntry
    top: tuple[TokenEntry, ...]
    offset: int


@dataclass(frozen=True)
class Chunk:
    """What is new of one choice.

    `ids` are the tokens generated, `scored` those with log-probabilities (with `echo` the prompt's too). The first
    chunk has `prompt_ids`, the last one OpenAI's `finish_reason`. `prompt_logprobs` are vLLM's, in the first chunk: of
    each of the prompt's tokens {id: {logprob, rank, decoded_token}}, None where nothing predicts it.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether a stream may leave it out."""
        return not (self.text or self.scored or self.ids or self.finish_reason)


def join(chunks: Sequence[Chunk]) -> Chunk:
    """All chunks of a choice as one."""
    return Chunk(
        "".join(chunk.text for chunk in chunks),
        tuple(id for chunk in chunks for id in chunk.ids),
        tuple(scored for chunk in chunks for scored in chunk.scored),
        chunks[0].prompt_ids,
        chunks[-1].finish_reason,
        chunks[0].prompt_logprobs,
    )


class ChoiceFormatter:
    """Makes the chunks of one choice.

    `prompt` is the prompt's text and `ids` its tokens as the client counts them. With `echo` the first chunk begins
    with it. `logprobs` and `prompt_logprobs` say how many of the likeliest tokens to name, None that nobody asked.
    Offsets count from the beginning of the prompt, echoed or not. A text that begins with `lead` loses it.
    """

    def __init__(
        self,
        token_text: TokenText,
        prompt: str,
        ids: Sequence[int],
        echo: bool,
        lead: str = "",
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        self._token_text = token_text
        self._stream = TextStream(token_text.tokenizer, () if echo else ids)
        self._offset = 0 if echo else len(prompt)
        self._echo = prompt if echo else ""
        self._scores_prompt, self._logprobs, self._prompt_logprobs = echo, logprobs, prompt_logprobs
        self._prompt_ids: tuple[int, ...] | None = tuple(ids)
        self._lead = lead

    def format(self, output: RequestOutput) -> Chunk:
        """The chunk of one output; the first one brings the prompt."""
        prompt = output.prompt[-len(self._prompt_ids) :] if self._prompt_ids else ()  # without the context token
        scored: tuple[ScoredToken, ...] = ()
        if self._logprobs is not None:
            scored = tuple(map(self._score, (*(prompt if self._scores_prompt else ()), *output.logprobs)))
        first = self._prompt_ids is not None
        told = tuple(map(self._told, prompt)) if first and self._prompt_logprobs is not None else None
        text = output.text
        if text:
            text, self._lead = text.removeprefix(self._lead), ""
        text, self._echo = self._echo + text, ""
        ids, self._prompt_ids = self._prompt_ids, None
        reason = "stop" if output.finish_reason == "end" else output.finish_reason
        return Chunk(text, output.ids, scored, ids, reason, told)

    def _score(self, logprob: TokenLogprob) -> ScoredToken:
        """The parts of one character share its offset."""
        token, offset = self._entry(logprob.id, logprob.logprob), self._offset
        self._offset += len(self._stream.push(logprob.id))
        top = tuple(self._entry(id, nats) for id, nats in logprob.top[: self._logprobs])
        return ScoredToken(token, top, offset)

    def _told(self, logprob: TokenLogprob) -> dict[str, Any] | None:
        """vLLM's form of a token of the prompt with the likeliest there."""
        if logprob.logprob is None:
            return None
        likeliest = [(id, nats, rank) for rank, (id, nats) in enumerate(logprob.top[: self._prompt_logprobs], 1)]
        return {
            str(id): {
                "logprob": max(nats, _MIN_LOGPROB),
                "rank": rank,
                "decoded_token": self._token_text.text_of(id),
            }
            for id, nats, rank in [*likeliest, (logprob.id, logprob.logprob, logprob.rank)]
        }

    def _entry(self, token: int, nats: float | None) -> TokenEntry:
        logprob = None if nats is None else max(nats, _MIN_LOGPROB)
        return TokenEntry(self._token_text.text_of(token), self._token_text.bytes_of(token), logprob)
